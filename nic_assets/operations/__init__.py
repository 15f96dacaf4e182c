"""Commands for the operator of a study: refresh, doctor, store clean-up."""

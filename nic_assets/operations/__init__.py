"""Commands that maintain a study: refresh, doctor, garbage collection."""

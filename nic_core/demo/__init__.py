"""The demo cohort: a procedural H&E generator with planted structures and known targets."""

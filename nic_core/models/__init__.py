"""Slide- and patient-level models on compressed slides."""

"""Tiling of slides: tissue mask, patch table, quality of cells, annotated regions."""

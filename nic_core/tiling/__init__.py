"""Tiling: tissue masks, patch tables, quality of cells, annotated regions."""

"""Grids of patch embeddings: their store on disk, and the eight orientations of a slide."""

from nic_core.grids.store import (
    GRID_FORMAT,
    Embeddings,
    Grid,
    GridError,
    GridPart,
    GridProvenance,
    Orientations,
    grid_hash,
    grid_preview,
    open_grid,
    recorded_hash,
    verify_grid,
    write_grid,
    write_parts,
)

__all__ = [
    "GRID_FORMAT",
    "Embeddings",
    "Grid",
    "GridError",
    "GridPart",
    "GridProvenance",
    "Orientations",
    "grid_hash",
    "grid_preview",
    "open_grid",
    "recorded_hash",
    "verify_grid",
    "write_grid",
    "write_parts",
]

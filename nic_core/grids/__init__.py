"""Grids of patch embeddings: the store on disk, and its eight orientations."""

from nic_core.grids.store import (
    Embeddings,
    Grid,
    GridError,
    GridProvenance,
    Orientations,
    grid_hash,
    grid_preview,
    nic_version,
    open_grid,
    verify_grid,
    write_grid,
)

__all__ = [
    "Embeddings",
    "Grid",
    "GridError",
    "GridProvenance",
    "Orientations",
    "grid_hash",
    "grid_preview",
    "nic_version",
    "open_grid",
    "verify_grid",
    "write_grid",
]

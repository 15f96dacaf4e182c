"""Grids of patch embeddings: their store on disk, eight orientations, and previews."""

from nic_core.grids.preview import (
    EmbeddingColours,
    draw_grid,
    embedding_colours,
    enlarge,
    read_colours,
    verify_preview,
    write_colours,
    write_preview,
    write_previews,
)
from nic_core.grids.store import (
    GRID_FORMAT,
    Embeddings,
    Grid,
    GridError,
    GridProvenance,
    Orientations,
    grid_hash,
    open_grid,
    recorded_hash,
    verify_grid,
    write_grid,
)

__all__ = [
    "GRID_FORMAT",
    "EmbeddingColours",
    "Embeddings",
    "Grid",
    "GridError",
    "GridProvenance",
    "Orientations",
    "draw_grid",
    "embedding_colours",
    "enlarge",
    "grid_hash",
    "open_grid",
    "read_colours",
    "recorded_hash",
    "verify_grid",
    "verify_preview",
    "write_colours",
    "write_grid",
    "write_preview",
    "write_previews",
]

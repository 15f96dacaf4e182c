"""Grids: compress slides with an encoder, and gather what was made."""

from __future__ import annotations

import polars as pl

from nic_core.cohort import Cohort
from nic_core.compression import compress_slide
from nic_core.encoders import load_encoder
from nic_core.encoders.inference import PreparedEncoder
from nic_core.grids import Grid, grid_hash, open_grid, write_grid
from nic_core.patches import read_patch_table
from nic_core.slides import content_identity
from nic_core.steps.inputs import open_indexed, read_index
from nic_core.store import Store


def prepare_encoder(
    cohort: Cohort, store: Store, encoder: str, device: str = "auto"
) -> PreparedEncoder:
    """Load an encoder for compression as the cohort's settings say."""
    how = cohort.settings.compression
    return load_encoder(store.encoder(encoder)).prepare(device, how.precision, how.reading)


def compress(cohort: Cohort, store: Store, encoder: PreparedEncoder, slide: str) -> Grid:
    """Compress a slide with an encoder; writes and returns the grid.

    Raises
    ------
    SlideError, PatchTableError
        See :func:`~nic_core.compression.compress_slide`.
    """
    cells = read_patch_table(store.patch_table(slide))
    with open_indexed(store, slide) as opened:
        grid = compress_slide(
            opened,
            cells,
            encoder,
            slide_id=slide,
            slide_identity=content_identity(opened.path),
            orientations=cohort.settings.compression.orientations,
        )
    write_grid(store.grid(encoder.card.name, slide), grid)
    return grid


def gather_grids(store: Store, encoder: str) -> pl.DataFrame:
    """Every grid of an encoder: slide, content hash (null: no grid) and cells."""
    rows: list[tuple[str, str | None, int]] = []
    for slide in read_index(store)["slide"]:
        path = store.grid(encoder, slide)
        if path.exists():
            grid = open_grid(path)
            rows.append((slide, grid_hash(grid), int(grid.valid.sum())))
        else:
            rows.append((slide, None, 0))
    return pl.DataFrame(
        rows, schema={"slide": pl.String, "hash": pl.String, "cells": pl.Int64}, orient="row"
    )

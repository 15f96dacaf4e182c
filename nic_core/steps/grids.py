"""Make grids, grid manifests and previews: compress slides, list and colour their grids."""

from __future__ import annotations

from collections.abc import Callable

import polars as pl

from nic_core.cohort import Cohort, CohortError, FeaturesEncoder
from nic_core.compression import compress_to_store
from nic_core.encoders import load_encoder
from nic_core.encoders.files import read_card
from nic_core.encoders.inference import PreparedEncoder
from nic_core.grids import (
    EmbeddingColours,
    Grid,
    GridError,
    embedding_colours,
    grid_hash,
    open_grid,
    read_colours,
    recorded_hash,
    write_colours,
    write_grid,
    write_preview,
)
from nic_core.grids.features import find_features, read_features
from nic_core.grids.lattice import SlideFacts, features_grid
from nic_core.grids.similar import CellIndex, open_index, write_index
from nic_core.slides import content_identity
from nic_core.steps.slide_index import (
    digest,
    open_indexed,
    read_slide_index,
    read_table_of,
    used_slides,
)
from nic_core.store import GridKey, PatchTableKey, Store, atomic_file, exclusive_lock
from nic_core.tiling.patches import read_patch_table
from nic_core.types import Pixels

MANIFEST_SCHEMA = pl.Schema(
    {
        "slide": pl.String(),
        "hash": pl.String(),  # content hash of the grid; null if the slide has no grid
        "cells": pl.Int64(),  # cells with an embedding
    }
)


def prepare_encoder(
    cohort: Cohort, store: Store, encoder: str, device: str = "auto"
) -> PreparedEncoder:
    """Load an encoder and prepare it for compression with the cohort's settings."""
    settings = cohort.settings.compression
    return load_encoder(store.encoder(encoder)).prepare(
        device, settings.precision, settings.reading
    )


def make_grid(
    cohort: Cohort,
    store: Store,
    encoder: PreparedEncoder,
    slide: str,
    progress: Callable[[int, int], None] | None = None,
) -> Grid:
    """Compress a slide with an encoder into its grid store, in bounded memory; open the store.

    Parameters
    ----------
    progress
        Called with the number of cells done and of all cells.

    Raises
    ------
    CohortError
        The slide is not in the slide index.
    SlideError, PatchTableError, StoreError
        See :func:`~nic_core.compression.compress_to_store`.
    """
    cells = read_cells(cohort, store, GridKey(encoder=encoder.card.name, slide=slide))
    settings = cohort.settings.compression
    with open_indexed(store, slide, colours=settings.colours) as opened:
        return compress_to_store(
            store.grid(GridKey(encoder=encoder.card.name, slide=slide)),
            opened,
            cells,
            encoder,
            slide_id=slide,
            slide_identity=content_identity(opened.path),
            orientations=settings.orientations,
            progress=progress,
        )


def read_cells(cohort: Cohort, store: Store, key: GridKey) -> pl.DataFrame:
    """Read the patch table that a grid is made from: that of its encoder's geometry.

    Raises
    ------
    PatchTableError
        See :func:`~nic_core.tiling.patches.read_patch_table`.
    """
    geometry = cohort.geometry(key.encoder).name
    return read_patch_table(store.patch_table(PatchTableKey(geometry=geometry, slide=key.slide)))


def make_features_grid(cohort: Cohort, store: Store, key: GridKey) -> Grid:
    """Read the grid of a slide from a folder of features; write and return it.

    Of the slide's file, only its metadata and samples for its content identity are read.

    Parameters
    ----------
    key
        Slide, and an encoder of objective ``features`` whose card is in the store.

    Raises
    ------
    CohortError
        The slide is not in the slide index.
    EncoderError
        The store has no card of the encoder.
    FeaturesError
        The slide has no file, or its features are no grid; see
        :func:`~nic_core.grids.lattice.features_grid`.
    SlideError
        The slide cannot be opened.
    """
    entry = cohort.encoder(key.encoder)
    if not isinstance(entry, FeaturesEncoder):
        raise CohortError(f"encoder '{key.encoder}' does not have objective 'features'")
    card = read_card(store.encoder(key.encoder))
    with open_indexed(store, key.slide) as opened:
        slide = SlideFacts(
            key.slide,
            content_identity(opened.path),
            opened.image,
            opened.mpp,
            opened.width,
            opened.height,
        )
        path, layout = find_features(entry.folder, key.slide, opened.path, entry.format)
    grid = features_grid(
        read_features(path, layout, slide_mpp=slide.mpp),
        slide,
        cohort.geometry(key.encoder),
        embedding_size=entry.embedding_size,
        encoder=key.encoder,
        weights_hash=card.weights_hash,
    )
    write_grid(store.grid(key), grid)
    return grid


def make_grid_manifest(store: Store, encoder: str) -> pl.DataFrame:
    """List the grids of all indexed slides that are not excluded; write and return the manifest.

    Content hashes are computed from the grids, so the manifest changes exactly when a grid does.

    Returns
    -------
    polars.DataFrame
        :data:`MANIFEST_SCHEMA`, by slide id.

    Raises
    ------
    GridError
        A grid cannot be read.
    """
    rows: list[tuple[str, str | None, int]] = []
    for slide in used_slides(read_slide_index(store))["slide"]:
        path = store.grid(GridKey(encoder=encoder, slide=slide))
        if path.exists():
            grid = open_grid(path)
            rows.append((slide, grid_hash(grid), int(grid.valid.sum())))
        else:
            rows.append((slide, None, 0))
    manifest = pl.DataFrame(rows, schema=MANIFEST_SCHEMA, orient="row")
    with atomic_file(store.grid_manifest(encoder)) as path:
        manifest.write_parquet(path)
    return manifest


def read_grid_manifest(store: Store, encoder: str) -> pl.DataFrame:
    """Read the manifest that :func:`make_grid_manifest` wrote.

    Raises
    ------
    CohortError
        The manifest does not exist yet.
    """
    return read_table_of(
        store.grid_manifest(encoder),
        f"encoder '{encoder}' has no grid manifest; materialize 'grid_manifest' first",
    )


def make_embedding_colours(store: Store, encoder: str) -> EmbeddingColours:
    """Compute the colours of an encoder's embeddings from all grids of its manifest; write them.

    Raises
    ------
    CohortError
        The manifest does not exist yet, or no slide has a grid.
    GridError
        See :func:`~nic_core.grids.preview.embedding_colours`.
    """
    with_grid = read_grid_manifest(store, encoder).drop_nulls("hash")["slide"]
    if with_grid.is_empty():
        raise CohortError(f"encoder '{encoder}': no slide has a grid; materialize 'grid' first")
    colours = embedding_colours(
        [store.grid(GridKey(encoder=encoder, slide=slide)) for slide in with_grid]
    )
    write_colours(store.embedding_colours(encoder), colours)
    return colours


def open_cell_index(store: Store, encoder: str) -> CellIndex:
    """Open the index of all cells of an encoder's grids; write it first if it is not of the present
    grid manifest.

    Raises
    ------
    CohortError
        The manifest does not exist yet, or no grid has a cell.
    GridError
        A grid cannot be read, or changed after the manifest was made.
    ChunkError
        A grid is damaged.
    StoreError
        The index cannot be written.
    """
    with_cells = read_grid_manifest(store, encoder).filter(pl.col("cells") > 0)
    if with_cells.is_empty():
        raise CohortError(f"encoder '{encoder}': no slide has a grid; materialize 'grid' first")
    folder, key = store.cell_index(encoder), digest(with_cells.rows())
    if (index := open_index(folder, key)) is not None:
        return index
    with exclusive_lock(folder):
        # another thread or process may have written it meanwhile
        if (index := open_index(folder, key)) is not None:
            return index
        grids = {s: store.grid(GridKey(encoder=encoder, slide=s)) for s in with_cells["slide"]}
        for slide, stated in with_cells.select("slide", "hash").iter_rows():
            if recorded_hash(grids[slide]) != stated:
                raise GridError(
                    f"{grids[slide]}: changed after the grid manifest was made; materialize "
                    "'grid_manifest' again"
                )
        write_index(folder, key, grids)
        index = open_index(folder, key)
    assert index is not None
    return index


def make_grid_preview(store: Store, key: GridKey) -> Pixels:
    """Draw a grid in the colours of its encoder's embeddings; write the preview.

    Returns
    -------
    uint8 (rows, columns, 3)
        The colour of every cell.

    Raises
    ------
    GridError
        The grid or the colours cannot be read, or they are of different weights.
    """
    colours = read_colours(store.embedding_colours(key.encoder))
    return write_preview(store.grid_preview(key), open_grid(store.grid(key)), colours)

"""Make probability maps and map scores: apply an encoder's head to every cell of a grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from matplotlib.image import imread, imsave

from nic_core.cohort import Cohort, ProbabilityMap
from nic_core.encoders import load_encoder, load_patch_task
from nic_core.grids import Grid, open_grid
from nic_core.maps import overlay, probability_map, score_maps, truth_of_cells
from nic_core.maps.heatmaps import write_cell_image
from nic_core.pictures import with_colour_key, with_scale_bar
from nic_core.steps.keys import patch_task_keys
from nic_core.steps.slide_index import index_row, read_slide_index
from nic_core.steps.slides import THUMBNAIL, read_record
from nic_core.store import GridKey, MapKey, Store, atomic_file, atomic_folder
from nic_core.types import Pixels

CELLS, OVERLAY, PROBABILITY = "cells.parquet", "overlay.jpg", "probability.zarr"


def make_probability_map(cohort: Cohort, store: Store, key: MapKey) -> tuple[pl.DataFrame, Pixels]:
    """Compute the probability map of a slide; write its cells, an overlay and an OME-Zarr image.

    Returns
    -------
    cells : polars.DataFrame
        :data:`nic_core.maps.MAP_SCHEMA`.
    overlay : uint8 (H, W, 3)
        The map over a thumbnail, with scale bar, colour key and caption.

    Raises
    ------
    CohortError
        The map or its class is not defined, or the truth image cannot be read.
    GridError
        The grid of the slide cannot be read.
    """
    entry = cohort.probability_map(key.map)
    encoder = load_encoder(store.encoder(entry.encoder))
    grid = open_grid(store.grid(GridKey(encoder=entry.encoder, slide=key.slide)))
    record = read_record(store, key.slide)
    truth = slide_truth(store, entry, grid)
    cells = probability_map(grid, encoder, entry, truth)
    picture = overlay(
        imread(store.slide(key.slide) / THUMBNAIL),
        cells,
        width=record.width,
        height=record.height,
        cell=grid.provenance.cell,
        origin=grid.provenance.origin,
    )
    mpp = record.width * record.mpp / picture.shape[1]
    picture = with_colour_key(
        with_scale_bar(picture, mpp),
        low="0",
        high="1",
        caption=f"{key.slide}, {key.map}: probability of class '{entry.label}' in each cell, by "
        f"the head of task '{entry.task}' of encoder '{entry.encoder}'",
    )
    with atomic_folder(store.probability_map(key)) as folder:
        cells.write_parquet(folder / CELLS)
        imsave(folder / OVERLAY, picture)
        write_cell_image(folder / PROBABILITY, probabilities(cells, grid), grid.provenance)
    return cells, picture


def probabilities(cells: pl.DataFrame, grid: Grid) -> npt.NDArray[np.float32]:
    """Return a probability map as an array; NaN where the grid has no embedding.

    Parameters
    ----------
    cells : polars.DataFrame
        :data:`nic_core.maps.MAP_SCHEMA`, of this grid.

    Returns
    -------
    float32 (rows, columns)
    """
    values = np.full(grid.valid.shape, np.nan, np.float32)
    values[cells["row"].to_numpy(), cells["column"].to_numpy()] = cells["probability"].to_numpy()
    return values


def make_map_scores(cohort: Cohort, store: Store, name: str) -> pl.DataFrame:
    """Score a map on every slide with a truth image; write and return the scores.

    Returns
    -------
    polars.DataFrame
        The columns of :func:`nic_core.maps.score_maps`, ``patient`` and ``in_training``. The latter
        is true if the encoder was trained on patches of the patient; the AUC then says little about
        other patients.
    """
    index = read_slide_index(store)
    paths = [
        store.probability_map(MapKey(map=name, slide=slide)) / CELLS for slide in index["slide"]
    ]
    scores = score_maps(
        pl.concat([pl.read_parquet(path, glob=False) for path in paths if path.exists()])
    )
    entry = cohort.probability_map(name)
    key = patch_task_keys(cohort, entry.encoder)[entry.task]
    patches = load_patch_task(store.patch_task(key)).table
    trained_on = patches.filter(pl.col("split") != "test")["group"].unique()
    patients = index.select(
        "slide", "patient", in_training=pl.col("patient").is_in(trained_on.implode())
    )
    scores = scores.join(patients, on="slide", maintain_order="left")
    with atomic_file(store.map_scores(name)) as path:
        scores.write_parquet(path)
    return scores


def slide_truth(store: Store, entry: ProbabilityMap, grid: Grid) -> npt.NDArray[np.int8] | None:
    """Read the truth of a grid's cells from the slide's truth image, if the slide table gives one.

    Returns
    -------
    int8 (rows, columns) or None
        See :func:`nic_core.maps.truth_of_cells`.
    """
    about = grid.provenance
    path, record = index_row(store, about.slide)["truth"], read_record(store, about.slide)
    if not path:
        return None
    rows, columns = grid.valid.shape
    return truth_of_cells(
        Path(path),
        entry,
        width=record.width,
        height=record.height,
        mpp=record.mpp,
        cell=about.cell,
        origin=about.origin,
        shape=(rows, columns),
    )

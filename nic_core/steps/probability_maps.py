"""Probability maps: an encoder's own head on every cell, and its scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from matplotlib.image import imread, imsave

from nic_core.cohort import Cohort, ProbabilityMap
from nic_core.encoders import load_encoder, load_patch_task
from nic_core.grids import open_grid
from nic_core.maps import overlay, probability_map, score_maps, truth_of_cells
from nic_core.steps.slide_index import index_row, read_slide_index
from nic_core.steps.slides import THUMBNAIL, read_record
from nic_core.store import GridKey, MapKey, Store, atomic_file, atomic_folder
from nic_core.types import Pixels

CELLS, OVERLAY = "cells.parquet", "overlay.jpg"


def make_probability_map(cohort: Cohort, store: Store, key: MapKey) -> tuple[pl.DataFrame, Pixels]:
    """Read a probability map off a grid; writes its cells and returns them with an overlay."""
    item = cohort.probability_map(key.map)
    encoder = load_encoder(store.encoder(item.encoder))
    grid = open_grid(store.grid(GridKey(encoder=item.encoder, slide=key.slide)))
    record = read_record(store, key.slide)
    cell = cohort.settings.patch * cohort.settings.mpp / record.mpp
    truth = slide_truth(cohort, store, item, key.slide, grid.valid.shape)
    cells = probability_map(grid, encoder, item, truth)
    picture = overlay(
        imread(store.slide(key.slide) / THUMBNAIL),
        cells,
        width=record.width,
        height=record.height,
        cell=cell,
    )
    with atomic_folder(store.probability_map(key)) as folder:
        cells.write_parquet(folder / CELLS)
        imsave(folder / OVERLAY, picture)
    return cells, picture


def make_map_scores(cohort: Cohort, store: Store, name: str) -> pl.DataFrame:
    """Score a map on every slide with a truth image; writes and returns the scores.

    They are those of :func:`nic_core.maps.score_maps` with ``patient`` and ``in_training``: whether
    the encoder was trained on patches of that patient, so that the AUC says little about others.
    """
    index = read_slide_index(store)
    found = [
        store.probability_map(MapKey(map=name, slide=slide)) / CELLS for slide in index["slide"]
    ]
    scores = score_maps(pl.concat([pl.read_parquet(path) for path in found if path.exists()]))
    patches = load_patch_task(store.patch_task(cohort.probability_map(name).task)).table
    trained_on = patches.filter(pl.col("split") != "test")["group"].unique()
    about = index.select(
        "slide", "patient", in_training=pl.col("patient").is_in(trained_on.implode())
    )
    scores = scores.join(about, on="slide", maintain_order="left")
    with atomic_file(store.map_scores(name)) as path:
        scores.write_parquet(path)
    return scores


def slide_truth(
    cohort: Cohort, store: Store, item: ProbabilityMap, slide: str, shape: tuple[int, ...]
) -> npt.NDArray[np.int8] | None:
    """What the slide's truth image says of its cells, if it has one; see
    :func:`nic_core.maps.truth_of_cells`."""
    path, record = index_row(store, slide)["truth"], read_record(store, slide)
    if not path:
        return None
    return truth_of_cells(
        Path(path),
        item,
        width=record.width,
        height=record.height,
        cell=cohort.settings.patch * cohort.settings.mpp / record.mpp,
        shape=(shape[0], shape[1]),
    )

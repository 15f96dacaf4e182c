"""Probability maps: what an encoder's own head says of every cell of a slide.

A multitask encoder keeps the heads that taught it. A head applied to the embeddings of a grid gives
each cell a class probability: a picture of the slide at no cost beyond the compression. Where
a truth image exists, the map is scored by the area under the ROC curve over cells.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import polars as pl
import pyvips
from sklearn.metrics import roc_auc_score

from nic_core.cohort import CohortError, ProbabilityMap
from nic_core.encoders import Encoder, task_probabilities
from nic_core.grids import Grid
from nic_core.types import Pixels

MAP_SCHEMA = pl.Schema(
    {
        "slide": pl.String(),
        "row": pl.Int32(),
        "column": pl.Int32(),
        "probability": pl.Float32(),
        "truth": pl.Boolean(),  # null: unknown, or to be ignored
    }
)


def probability_map(
    grid: Grid, encoder: Encoder, item: ProbabilityMap, truth: npt.NDArray[np.int8] | None
) -> pl.DataFrame:
    """The probability of ``item.label`` in every valid cell, by row then column.

    Parameters
    ----------
    truth : int8 (rows, columns), optional
        1 positive, 0 negative, -1 unknown; from :func:`truth_of_cells`.

    Returns
    -------
    polars.DataFrame
        :data:`MAP_SCHEMA`.

    Raises
    ------
    CohortError
        The task has no class ``item.label``.
    """
    classes = encoder.card.tasks[item.task]
    if item.label not in classes:
        raise CohortError(
            f"map '{item.name}': task '{item.task}' has no class '{item.label}'; "
            f"it has {', '.join(classes)}"
        )
    rows, columns = np.nonzero(grid.valid)
    embeddings = np.asarray(grid.embeddings[:])[:, grid.valid].T
    probability = task_probabilities(encoder, item.task, embeddings)[:, classes.index(item.label)]
    known = None if truth is None else truth[rows, columns]
    return pl.DataFrame(
        {
            "slide": [grid.provenance.slide] * len(rows),
            "row": rows,
            "column": columns,
            "probability": probability,
            "truth": None if known is None else [None if t < 0 else bool(t) for t in known],
        },
        schema=MAP_SCHEMA,
    )


def truth_of_cells(
    path: Path,
    item: ProbabilityMap,
    *,
    width: int,
    height: int,
    cell: float,
    shape: tuple[int, int],
) -> npt.NDArray[np.int8]:
    """What a label image says of every cell, by the majority of the cell's area.

    Parameters
    ----------
    path
        Single-band label image, stretched over the whole slide.
    width, height
        Of the slide, level-0 px.
    cell
        Side of a cell, level-0 px.
    shape
        Rows and columns of the grid.

    Returns
    -------
    int8 (rows, columns)
        1 where ``item.positive`` labels take most of the cell, -1 where ``item.ignore`` or
        nothing does, else 0.
    """
    try:
        labels = pyvips.Image.new_from_file(str(path), fail_on="error").extract_band(0).numpy()
    except pyvips.Error as error:
        raise CohortError(f"map '{item.name}': truth image {path} cannot be read") from error
    known = ~np.isin(labels, item.ignore)
    down = _overlap(labels.shape[0], height, cell, shape[0])
    across = _overlap(labels.shape[1], width, cell, shape[1])
    share_known = down @ known @ across.T
    share_positive = down @ (np.isin(labels, item.positive) & known) @ across.T
    # areas are sums of rounded numbers: half a cell exactly is no majority
    truth = np.where(share_positive > share_known / 2 + 1e-9, 1, 0)
    return np.where(share_known < 0.5 - 1e-9, -1, truth).astype(np.int8)


def score_maps(cells: pl.DataFrame) -> pl.DataFrame:
    """AUC of each slide with cells of both kinds: slide, auc, cells, positive."""
    rows = []
    for (slide,), of_slide in cells.filter(pl.col("truth").is_not_null()).group_by(
        "slide", maintain_order=True
    ):
        truth = of_slide["truth"].to_numpy()
        if truth.any() and not truth.all():
            auc = float(roc_auc_score(truth, of_slide["probability"].to_numpy()))
            rows.append((slide, auc, len(truth), int(truth.sum())))
    return pl.DataFrame(
        rows,
        schema={
            "slide": pl.String,
            "auc": pl.Float64,
            "cells": pl.Int64,
            "positive": pl.Int64,
        },
        orient="row",
    )


def overlay(
    thumbnail: Pixels, cells: pl.DataFrame, *, width: int, height: int, cell: float
) -> Pixels:
    """The map over a thumbnail: blue is 0, red is 1; uint8 (H, W, 3).

    ``width`` and ``height`` are the slide's and ``cell`` a cell's side, level-0 px.
    """
    row, column = cells["row"].to_numpy(), cells["column"].to_numpy()
    values = np.full((max(row, default=0) + 1, max(column, default=0) + 1), np.nan)
    values[row, column] = cells["probability"].to_numpy()
    return tint(thumbnail, values, width=width, height=height, cell=cell)


def tint(
    thumbnail: Pixels,
    values: npt.NDArray[np.floating],
    *,
    width: int,
    height: int,
    cell: float,
) -> Pixels:
    """Values of cells as colours over a thumbnail, uint8 (H, W, 3).

    Parameters
    ----------
    thumbnail : uint8 (H, W, 3)
        Of the whole slide.
    values : float (rows, columns)
        0 (blue) to 1 (red); NaN leaves the thumbnail as it is.
    width, height, cell
        Of the slide, and a cell's side; level-0 px.
    """
    rows, columns = values.shape
    y = ((np.arange(thumbnail.shape[0]) + 0.5) * height / thumbnail.shape[0] / cell).astype(int)
    x = ((np.arange(thumbnail.shape[1]) + 0.5) * width / thumbnail.shape[1] / cell).astype(int)
    inside = np.ix_(y < rows, x < columns)
    spread = np.full(thumbnail.shape[:2], np.nan)
    spread[inside] = values[np.ix_(y[y < rows], x[x < columns])]
    colours = matplotlib.colormaps["coolwarm"](np.nan_to_num(spread))[..., :3] * 255
    mixed = np.where(np.isnan(spread)[..., None], thumbnail, 0.45 * thumbnail + 0.55 * colours)
    return mixed.round().astype(np.uint8)


def _overlap(pixels: int, length: int, cell: float, cells: int) -> npt.NDArray[np.float64]:
    """How much of each cell (rows of the result) each label pixel covers, 0 to 1."""
    edges = np.arange(pixels + 1) * length / pixels
    start = np.arange(cells)[:, None] * cell
    covered = np.minimum(edges[1:], start + cell) - np.maximum(edges[:-1], start)
    share: npt.NDArray[np.float64] = np.clip(covered, 0, None) / cell
    return share

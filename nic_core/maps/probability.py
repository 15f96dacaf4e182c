"""Probability maps: the class probability of every cell, from a head of the encoder.

A multitask encoder keeps the classification heads of its patch tasks. Applied to the embeddings of
a grid, a head gives a class probability for each cell, without reading the slide again. If the
slide has a truth image, the map is scored by the area under the ROC curve (AUC) over cells.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import polars as pl
from sklearn.metrics import roc_auc_score

from nic_core.cohort import CohortError, ProbabilityMap
from nic_core.encoders import Encoder, task_probabilities
from nic_core.grids import Grid
from nic_core.grids.chunks import tissue_blocks
from nic_core.libvips import pyvips
from nic_core.pictures import HEAT_COLOURS, HEAT_OPACITY
from nic_core.tiling.mask_files import MaskFileError, level0_px_per_px, open_stored_image
from nic_core.types import Pixels

MAP_SCHEMA = pl.Schema(
    {
        "slide": pl.String(),
        "row": pl.Int32(),
        "column": pl.Int32(),
        "probability": pl.Float32(),
        "truth": pl.Boolean(),  # null if unknown or ignored
    }
)


def probability_map(
    grid: Grid, encoder: Encoder, entry: ProbabilityMap, truth: npt.NDArray[np.int8] | None
) -> pl.DataFrame:
    """Compute the probability of the class ``entry.label`` in every valid cell.

    Parameters
    ----------
    grid : Grid
        Grid of the slide, made by ``encoder``.
    encoder : Encoder
        Has a head for ``entry.task``.
    truth : int8 (rows, columns), optional
        1 positive, 0 negative, -1 unknown; from :func:`truth_of_cells`.

    Returns
    -------
    polars.DataFrame
        :data:`MAP_SCHEMA`, by row then column.

    Raises
    ------
    CohortError
        The task has no class ``entry.label``, or the encoder saw it at another um/px than that of
        the grid.
    """
    classes = encoder.card.tasks[entry.task]
    seen = encoder.card.task_mpp.get(entry.task, grid.provenance.mpp)
    if seen != grid.provenance.mpp:
        raise CohortError(
            f"map '{entry.name}': encoder '{encoder.card.name}' saw the patches of task "
            f"'{entry.task}' at {seen:g} um/px, but the grid is at {grid.provenance.mpp:g}; use an "
            f"encoder with 'objective: reused' and 'mpp: {seen:g}'"
        )
    if entry.label not in classes:
        raise CohortError(
            f"map '{entry.name}': task '{entry.task}' has no class '{entry.label}'; "
            f"its classes are {', '.join(classes)}"
        )
    rows, columns = np.nonzero(grid.valid)
    of_label = np.zeros(grid.valid.shape, np.float32)
    for window, valid, embeddings in tissue_blocks(grid.embeddings, grid.valid):
        found = task_probabilities(encoder, entry.task, embeddings.T)
        of_label[window][valid] = found[:, classes.index(entry.label)]
    probability = of_label[rows, columns]
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
    entry: ProbabilityMap,
    *,
    width: int,
    height: int,
    mpp: float,
    cell: float,
    shape: tuple[int, int],
    origin: tuple[float, float] = (0, 0),
) -> npt.NDArray[np.int8]:
    """Read a truth image, and classify each cell by the majority of its area.

    Parameters
    ----------
    path : Path
        Label image of one band, or of equal ones (PNG or TIFF), with values and place on the slide
        as those of a tissue mask (:mod:`nic_core.tiling.mask_files`).
    entry : ProbabilityMap
        ``positive`` lists the positive label values, ``ignore`` those that count as unknown.
    width, height : int
        Size of the slide, level-0 px.
    mpp : float
        um/px of the slide at level 0.
    cell : float
        Side of a cell, level-0 px.
    shape : (int, int)
        Rows and columns of the grid.
    origin : (float, float)
        Top-left corner (x, y) of cell (0, 0), level-0 px.

    Returns
    -------
    int8 (rows, columns)
        -1 (unknown) where less than half of the cell's area has a known label. Elsewhere 1 if
        positive labels cover more than half of the known area, else 0.

    Raises
    ------
    CohortError
        The image cannot be read, has several different bands, or does not fit the slide.
    """
    try:
        stored = open_stored_image(path)
        across_px, down_px = level0_px_per_px(stored, width, height, mpp)
        bands = stored.image.numpy().reshape(stored.image.height, stored.image.width, -1)
    except (MaskFileError, pyvips.Error) as error:
        raise CohortError(f"map '{entry.name}': truth image {path}: {error}") from error
    labels = bands[..., 0]
    if (bands != labels[..., None]).any():
        raise CohortError(
            f"map '{entry.name}': truth image {path} has several bands; give an image of one band "
            "whose values are the labels"
        )
    known = ~np.isin(labels, entry.ignore)
    down = _overlap(labels.shape[0], down_px, height, origin[1], cell, shape[0])
    across = _overlap(labels.shape[1], across_px, width, origin[0], cell, shape[1])
    known_area = down @ known @ across.T
    positive_area = down @ (np.isin(labels, entry.positive) & known) @ across.T
    # areas are inexact sums; exactly half an area is not a majority
    truth = np.where(positive_area > known_area / 2 + 1e-9, 1, 0)
    return np.where(known_area < 0.5 - 1e-9, -1, truth).astype(np.int8)


def score_maps(cells: pl.DataFrame) -> pl.DataFrame:
    """Score each slide that has positive and negative cells.

    Parameters
    ----------
    cells : polars.DataFrame
        :data:`MAP_SCHEMA`, of any number of slides.

    Returns
    -------
    polars.DataFrame
        ``slide``, ``auc``, ``cells`` (with a known truth) and ``positive`` (cells).
    """
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
    thumbnail: Pixels,
    cells: pl.DataFrame,
    *,
    width: int,
    height: int,
    cell: float,
    origin: tuple[float, float] = (0, 0),
) -> Pixels:
    """Draw a probability map over a thumbnail; blue is 0, red is 1.

    Parameters
    ----------
    thumbnail : uint8 (H, W, 3)
        Thumbnail of the whole slide.
    cells : polars.DataFrame
        :data:`MAP_SCHEMA`.
    width, height : int
        Size of the slide, level-0 px.
    cell : float
        Side of a cell, level-0 px.
    origin : (float, float)
        Top-left corner (x, y) of cell (0, 0), level-0 px.

    Returns
    -------
    uint8 (H, W, 3)
    """
    row, column = cells["row"].to_numpy(), cells["column"].to_numpy()
    values = np.full((max(row, default=0) + 1, max(column, default=0) + 1), np.nan)
    values[row, column] = cells["probability"].to_numpy()
    return tint(thumbnail, values, width=width, height=height, cell=cell, origin=origin)


def tint(
    thumbnail: Pixels,
    values: npt.NDArray[np.floating],
    *,
    width: int,
    height: int,
    cell: float,
    origin: tuple[float, float] = (0, 0),
) -> Pixels:
    """Draw values of cells as colours over a thumbnail.

    Parameters
    ----------
    thumbnail : uint8 (H, W, 3)
        Thumbnail of the whole slide.
    values : float (rows, columns)
        0 (blue) to 1 (red). Cells with NaN are not coloured.
    width, height : int
        Size of the slide, level-0 px.
    cell : float
        Side of a cell, level-0 px.
    origin : (float, float)
        Top-left corner (x, y) of cell (0, 0), level-0 px.

    Returns
    -------
    uint8 (H, W, 3)
    """
    (down, rows), (across, columns) = (
        _cells_of_pixels(pixels, length, corner, cell, cells)
        for pixels, length, corner, cells in zip(
            thumbnail.shape[:2], (height, width), origin[::-1], values.shape, strict=True
        )
    )
    per_pixel = np.full(thumbnail.shape[:2], np.nan)
    per_pixel[np.ix_(down, across)] = values[np.ix_(rows, columns)]
    colours = matplotlib.colormaps[HEAT_COLOURS](np.nan_to_num(per_pixel))[..., :3] * 255
    tinted = (1 - HEAT_OPACITY) * thumbnail + HEAT_OPACITY * colours
    mixed = np.where(np.isnan(per_pixel)[..., None], thumbnail, tinted)
    return mixed.round().astype(np.uint8)


def _cells_of_pixels(
    pixels: int, length: int, origin: float, cell: float, cells: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return the pixels along an axis whose centre is in a cell, and the cell of each.

    ``length`` is the slide's side, ``origin`` the start of the first cell, level-0 px.
    """
    centres = (np.arange(pixels) + 0.5) * length / pixels
    of_pixel = np.floor((centres - origin) / cell).astype(np.intp)
    inside = np.flatnonzero((of_pixel >= 0) & (of_pixel < cells))
    return inside, of_pixel[inside]


def _overlap(
    pixels: int, scale: float, length: int, origin: float, cell: float, cells: int
) -> npt.NDArray[np.float64]:
    """Fraction of each cell (rows) that each label pixel (columns) covers, along one axis.

    ``scale`` is level-0 px per label pixel; ``length`` is the slide's side and ``origin`` the start
    of the first cell, level-0 px.
    """
    edges = np.minimum(np.arange(pixels + 1) * scale, length)
    start = origin + np.arange(cells)[:, None] * cell
    covered = np.minimum(edges[1:], start + cell) - np.maximum(edges[:-1], start)
    fraction: npt.NDArray[np.float64] = np.clip(covered, 0, None) / cell
    return fraction

"""Cells that are similar to one cell of a slide, and pictures of them."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from typing import Any

from nic_core.cohort import CohortError
from nic_core.grids import GridError
from nic_core.grids.chunks import ChunkError
from nic_core.grids.similar import CellIndex, similar_cells
from nic_core.steps.grids import open_cell_index
from nic_core.store import StoreError
from nic_core.view.cache import AnswerCache
from nic_core.view.errors import ViewError, without_paths
from nic_core.view.slides import OpenedSlide
from nic_core.view.study import ViewedStudy, labels_of
from nic_core.view.tiles import encode_jpeg

MAX_CELLS = 100  # of an answer
LARGEST_PATCH = 8192  # level-0 px a side
PICTURE_SIDES = (16, 512)  # px of a picture, the smallest and the largest


def similar_answer(
    study: ViewedStudy, slide: str, encoder: str, row: int, column: int, count: int
) -> dict[str, Any]:
    """Return what ``/api/slides/{slide}/similar`` answers.

    The first search in the grids of an encoder makes their index
    (:func:`nic_core.steps.grids.open_cell_index`).

    Raises
    ------
    ViewError
        404: no such slide, encoder or cell, or no grids yet. 422: a grid is damaged, or nothing can
        be similar to this cell.
    """
    study.row(slide)
    index = _cell_index(study, encoder)
    try:
        cell = index.position(slide, row, column)
    except KeyError as error:
        raise ViewError(404, str(error.args[0]), "choose a cell of the grid") from error
    started = time.perf_counter()
    try:
        found = similar_cells(index, cell, count=count)
    except ValueError as error:
        raise ViewError(422, "nothing is similar to this cell", str(error)) from error
    seconds = time.perf_counter() - started
    labels = {target.name: labels_of(study, target)[0] for target in study.cohort.targets}
    return {
        "seconds": seconds,
        "cells_searched": len(index.vectors),
        "cells": [
            asdict(similar)
            | {
                "labels": {
                    target: of_slides[similar.slide]
                    for target, of_slides in labels.items()
                    if similar.slide in of_slides
                }
            }
            for similar in found
        ],
    }


def patch_jpeg(
    answers: AnswerCache, opened: OpenedSlide, x: float, y: float, size: float, side: int
) -> bytes:
    """Return a square of a slide as JPEG.

    Parameters
    ----------
    answers : AnswerCache
        Holds the pictures that were read last.
    x, y : float
        Centre of the square, level-0 px.
    size : float
        Its side, level-0 px, at most :data:`LARGEST_PATCH`.
    side : int
        Side of the picture, px.

    Raises
    ------
    ViewError
        400: the size is out of range. 404: the slide has no such place.
    SlideError
        It cannot be decoded.
    """
    if not 1 <= size <= LARGEST_PATCH:
        raise ViewError(400, "'size' is out of range", f"give 1 to {LARGEST_PATCH} level-0 px")
    slide = opened.slide
    if not (-size < x < slide.width + size and -size < y < slide.height + size):
        raise ViewError(404, f"slide '{opened.id}' has no such place", "give level-0 px inside it")
    key = (opened.version, "patch", x, y, size, side)
    found = answers.get(key)
    if found is None:
        mpp = slide.mpp * size / side
        corner = x - size / 2, y - size / 2
        found = encode_jpeg(slide.read(*corner, side, side, mpp, scaled=True))
        answers.put(key, found)
    return found


def _cell_index(study: ViewedStudy, encoder: str) -> CellIndex:
    if encoder not in {entry.name for entry in study.cohort.encoders}:
        raise ViewError(404, "the study has no such encoder", "choose one of the slide's page")
    manifest = study.store.grid_manifest(encoder)
    try:
        return study.files.get(manifest, partial(open_cell_index, study.store, encoder), "cells")
    except FileNotFoundError as error:
        raise ViewError(
            404, f"encoder '{encoder}' has no grid manifest", "materialize 'grid_manifest'"
        ) from error
    except (CohortError, GridError, ChunkError, StoreError) as error:
        # these messages end with what to do
        reason, _, remedy = without_paths(str(error)).rpartition("; ")
        raise ViewError(422, reason, remedy) from error

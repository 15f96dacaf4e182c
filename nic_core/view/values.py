"""The values under a point of a slide, as the page shows them when the pointer rests there."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from nic_core.slides import Slide
from nic_core.view.products import (
    DAMAGED,
    KEPT,
    STATES,
    Cells,
    grid_cells,
    heat_cells,
    heat_sources,
    label_cells,
    map_cells,
    patch_cells,
)
from nic_core.view.study import ViewedStudy

Value = TypeVar("Value")


def values_at(study: ViewedStudy, slide: str, opened: Slide, x: float, y: float) -> dict[str, Any]:
    """Return what the products of a slide say about a point.

    A product that does not exist, or cannot be read, is left out: its layer says why. So is one
    without a cell at the point.

    Parameters
    ----------
    opened : Slide
        The slide of this id.
    x, y : float
        Level-0 px.

    Returns
    -------
    dict
        ``x_um``, ``y_um``; ``patch``: geometry to ``kept``, ``reason``, ``focus`` (grey levels
        squared) and ``tissue`` (fraction); ``grids``: encoder to ``row`` and ``column``;
        ``maps``: map to class to probability; ``heat``: layer id to value; ``label``: value of the
        label image.
    """
    cohort = study.cohort
    found: dict[str, Any] = {
        "x_um": x * opened.mpp,
        "y_um": y * opened.mpp,
        "patch": {},
        "grids": {},
        "maps": {},
        "heat": {},
    }
    for geometry in cohort.geometries:
        table = _readable(partial(patch_cells, study, slide, geometry))
        if table is not None and (at := table.state.index(x, y)) is not None:
            state = int(table.state.values[at])
            found["patch"][geometry] = {
                "kept": state == KEPT,
                "reason": None if state == KEPT else STATES[state],
                "focus": _number(table.focus[at]),
                "tissue": _number(table.tissue[at]),
            }
    for entry in cohort.encoders:
        grid = _readable(partial(grid_cells, study, slide, entry.name))
        if grid is not None and (at := grid.index(x, y)) is not None and grid.values[at]:
            found["grids"][entry.name] = {"row": at[0], "column": at[1]}
    for item in cohort.maps:
        probability = _value(partial(map_cells, study, slide, item), x, y)
        if probability is not None:
            found["maps"][item.name] = {item.label: probability}
    for source in heat_sources(study, slide):
        heat = _value(partial(heat_cells, study, source.folder), x, y)
        if heat is not None:
            found["heat"][source.layer] = heat
    if study.row(slide)["truth"]:
        place = opened.width, opened.height, opened.mpp
        found["label"] = _value(partial(label_cells, study, slide, *place), x, y)
    return found


def _readable(read: Callable[[], Value]) -> Value | None:
    """Return what is read; None if it does not exist or is damaged."""
    try:
        return read()
    except DAMAGED:
        return None


def _value(read: Callable[[], Cells], x: float, y: float) -> float | None:
    """Return the value of the cell at a point; None if there is none."""
    cells = _readable(read)
    at = None if cells is None else cells.index(x, y)
    return None if cells is None or at is None else _number(cells.values[at])


def _number(value: Any) -> float | None:
    """Return a number as JSON has it: None for NaN."""
    return float(value) if math.isfinite(value) else None

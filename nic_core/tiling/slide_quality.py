"""Quality of slides relative to their cohort: blur, ink, unreadable cells, tissue, colour [choice].

What a value of focus or colour means depends on scanner, stain and tissue, so a slide is compared
with the other slides of its study: focus and colour with those of about the same um/px at level 0,
in place of the scanner, which most files do not name. Robust z-scores (median and median absolute
deviation) are used as in Iglewicz and Hoaglin 1993, who call a value beyond 3.5 an outlier.
"""

from __future__ import annotations

import math

import numpy as np
import polars as pl
from numpy.typing import NDArray

QUALITY_SCHEMA: dict[str, pl.DataType] = {
    "slide": pl.String(),
    "exclude": pl.String(),  # reason in the slide table; null: the slide is used
    "mpp": pl.Float64(),  # um/px at level 0
    "tissue_share": pl.Float64(),  # fraction of the slide's area
    "ink_share": pl.Float64(),  # fraction of the slide's area: pen ink and black areas
    "unreadable_share": pl.Float64(),  # fraction of the tissue cells
    "cells": pl.Int64(),  # kept cells; the columns below are null where there are none
    "focus": pl.Float64(),  # median over the cells of log2(1 + focus)
    "focus_spread": pl.Float64(),  # median absolute deviation of the same
    "blurred_share": pl.Float64(),  # fraction of the cells, see :func:`blurred_share`
    "red": pl.Float64(),  # optical density of the mean colour of the cells
    "green": pl.Float64(),
    "blue": pl.Float64(),
}
COLOURS = ("red", "green", "blue")

MIN_SLIDES = 5  # fewer slides are too few for a comparison
MAX_Z = 3.5  # Iglewicz and Hoaglin 1993
MIN_SPREAD = {  # least standard deviation of a comparison: smaller differences do not matter
    "focus": 0.5,  # log2
    "tissue_share": 0.5,  # ln
    "colour": 0.03,  # optical density
}
BLURRED_CELL = -3.5  # z-score of a cell's log2 focus
MAX_BLURRED = 0.25  # fraction of the cells
MAX_INK = 0.02  # fraction of the slide's area
MAX_UNREADABLE = 0.01  # fraction of the tissue cells

_MAD = 1.4826  # standard deviations of a normal distribution in a median absolute deviation


def slide_quality(
    slide: str,
    cells: pl.DataFrame,
    *,
    exclude: str | None,
    mpp: float,
    tissue_share: float,
    ink_share: float,
) -> dict[str, object]:
    """Summarize a slide.

    Parameters
    ----------
    slide : str
        Slide id.
    cells : polars.DataFrame
        Patch table of the slide, with its quality measured.
    exclude : str or None
        Reason for which the slide is excluded.
    mpp : float
        um/px at level 0.
    tissue_share, ink_share : float
        Fractions of the slide's area.

    Returns
    -------
    dict
        A row of :data:`QUALITY_SCHEMA`; ``blurred_share`` is null until :func:`blurred_share`.
    """
    kept = cells.filter("kept")
    unreadable = cells.filter(reason="unreadable").height
    row: dict[str, object] = {
        "slide": slide,
        "exclude": exclude,
        "mpp": mpp,
        "tissue_share": tissue_share,
        "ink_share": ink_share,
        "unreadable_share": unreadable / max(kept.height + unreadable, 1),
        "cells": kept.height,
        "blurred_share": None,
    }
    names = ("focus", "focus_spread", *COLOURS)
    if kept.is_empty():
        return row | dict.fromkeys(names)
    focus = _log_focus(kept)
    median = float(np.median(focus))
    light = [max(float(kept[name].mean()), 1.0) for name in COLOURS]  # type: ignore[arg-type]
    density = [-math.log10(value / 255) for value in light]
    spread = float(np.median(abs(focus - median)))
    return row | dict(zip(names, (median, spread, *density), strict=True))


def blurred_share(cells: pl.DataFrame, slides: pl.DataFrame, slide: str) -> float | None:
    """Fraction of a slide's kept cells whose focus is far below that of comparable slides.

    A cell is blurred if its log2 focus is more than 3.5 standard deviations of a typical slide's
    cells below the median of the slides' medians.

    Parameters
    ----------
    cells : polars.DataFrame
        Patch table of the slide.
    slides : polars.DataFrame
        :data:`QUALITY_SCHEMA`, one row for each slide of the cohort.
    slide : str
        Slide id.

    Returns
    -------
    float or None
        None if the slide has no kept cell or fewer than ``MIN_SLIDES`` slides are comparable.
    """
    group = _comparable(slides, slide)
    kept = cells.filter("kept")
    if group.height < MIN_SLIDES or kept.is_empty():
        return None
    centre = float(np.median(group["focus"]))
    spread = max(_MAD * float(np.median(group["focus_spread"])), MIN_SPREAD["focus"])
    return float(((_log_focus(kept) - centre) / spread < BLURRED_CELL).mean())


def find_outliers(slides: pl.DataFrame) -> pl.DataFrame:
    """Find the slides that differ from their cohort, or have a fault of their own.

    Parameters
    ----------
    slides : polars.DataFrame
        :data:`QUALITY_SCHEMA`, one row for each slide.

    Returns
    -------
    polars.DataFrame
        The rows with ``compared_with`` (number of slides of about the same um/px that are not
        excluded; 0 if they are too few for a comparison), the z-scores ``focus_z``, ``tissue_z``
        and ``colour_z`` (of the channel with the largest absolute value; all null without a
        comparison), and ``problems`` (text; empty if there are none).
    """
    rows = []
    for row in slides.iter_rows(named=True):
        group = _comparable(slides, row["slide"])
        scores: dict[str, float | None] = dict.fromkeys(("focus_z", "tissue_z", "colour_z"))
        compared = group.height if group.height >= MIN_SLIDES else 0
        if compared and row["cells"]:
            scores["focus_z"] = _z(row["focus"], group["focus"], MIN_SPREAD["focus"])
            scores["colour_z"] = max(
                (_z(row[name], group[name], MIN_SPREAD["colour"]) for name in COLOURS), key=abs
            )
        used = slides.filter(pl.col("exclude").is_null(), pl.col("tissue_share") > 0)
        present = used["tissue_share"].log()
        if present.len() >= MIN_SLIDES and row["tissue_share"] > 0:
            scores["tissue_z"] = _z(
                math.log(row["tissue_share"]), present, MIN_SPREAD["tissue_share"]
            )
        found = row | {"compared_with": compared} | scores
        rows.append(found | {"problems": "; ".join(_problems(found))})
    extra = {
        "compared_with": pl.Int64(),
        "focus_z": pl.Float64(),
        "tissue_z": pl.Float64(),
        "colour_z": pl.Float64(),
        "problems": pl.String(),
    }
    return pl.DataFrame(rows, schema=QUALITY_SCHEMA | extra)


def _problems(row: dict[str, float | None]) -> list[str]:
    """What is wrong with a slide, worst first within each kind of fault."""
    focus, tissue, colour = (row[f"{name}_z"] for name in ("focus", "tissue", "colour"))
    blurred, ink, unreadable = (
        row[f"{name}_share"] or 0.0 for name in ("blurred", "ink", "unreadable")
    )
    problems = []
    if not row["tissue_share"]:
        problems.append("no tissue")
    elif not row["cells"]:
        problems.append("no kept cell")
    if blurred > MAX_BLURRED:
        problems.append(f"{blurred:.0%} of the cells are blurred")
    if focus is not None and focus < -MAX_Z:
        problems.append(f"focus is lower than that of the other slides (z {focus:.1f})")
    if ink > MAX_INK:
        problems.append(f"{ink:.1%} of the slide is ink or black")
    if unreadable > MAX_UNREADABLE:
        problems.append(f"{unreadable:.1%} of the tissue cells cannot be decoded")
    if tissue is not None and abs(tissue) > MAX_Z:
        problems.append(f"{'much' if tissue > 0 else 'little'} tissue (z {tissue:.1f})")
    if colour is not None and abs(colour) > MAX_Z:
        strength = "darker" if colour > 0 else "paler"
        problems.append(f"colour is {strength} than that of the other slides (z {colour:.1f})")
    return problems


def _comparable(slides: pl.DataFrame, slide: str) -> pl.DataFrame:
    """The slides in use whose um/px is nearest to the same power of two, with a kept cell."""
    step = pl.col("mpp").log(2).round()
    same = step == slides.filter(slide=slide).select(step).item()
    return slides.filter(pl.col("exclude").is_null(), same).drop_nulls("focus")


def _log_focus(cells: pl.DataFrame) -> NDArray[np.float64]:
    return np.asarray(np.log2(1 + cells["focus"].to_numpy().astype(np.float64)))


def _z(value: float, values: pl.Series, least: float) -> float:
    """Robust z-score of a value among values."""
    array = values.to_numpy()
    centre = float(np.median(array))
    spread = _MAD * float(np.median(abs(array - centre)))
    return (value - centre) / max(spread, least)

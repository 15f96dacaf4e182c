"""Quality of a slide's cells: focus and mean colour, into the patch table.

Measured [choice] on what the encoder sees: its 2 x 2 mean pooling makes 1.0 um/px of patches at
0.5 um/px, and so does this.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from nic_core.parallel import cores
from nic_core.slides.slide import Slide
from nic_core.tiling.blocks import (
    MAX_UNREADABLE,
    Block,
    allow_unreadable,
    in_order,
    plan_blocks,
    read_block,
)
from nic_core.tiling.patches import MEASURED, PATCH_SCHEMA
from nic_core.types import Pixels

LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green, blue: ITU-R BT.601

Floats = NDArray[np.float32]


def measure_quality(
    table: pl.DataFrame,
    slide: Slide,
    *,
    workers: int | None = None,
    max_unreadable: float = MAX_UNREADABLE,
) -> pl.DataFrame:
    """Read the kept cells of a patch table at twice its um/px and fill in their quality.

    Parameters
    ----------
    table : polars.DataFrame
        A patch table of the slide (:func:`nic_core.tiling.patches.patch_table`).
    workers : int, optional
        Threads; default: one a core.
    max_unreadable : float
        Share of the kept cells that may be undecodable. Those are no longer kept, for the
        reason ``unreadable``.

    Returns
    -------
    polars.DataFrame
        The table with ``focus``, ``red``, ``green`` and ``blue`` at every kept cell.

    Raises
    ------
    SlideError
        More of the slide is undecodable than allowed.
    """
    cell = float(table["size"][0]) * slide.mpp  # um
    side = max(1, round(cell / (2 * float(table["mpp"][0]))))
    mpp = cell / side
    columns = int(table["column"].to_numpy().max()) + 1
    found = np.full((table.height, len(MEASURED)), np.nan, np.float32)

    def work(block: Block) -> tuple[NDArray[np.int64], Floats]:
        cells, pixels = read_block(slide, block, patch=side, mpp=mpp)
        # px of each cell that lie within the slide, down and across: white beyond is no edge
        left = (slide.height, slide.width) - cells * (cell / slide.mpp)
        inside = np.clip(np.ceil(left * (slide.mpp / mpp) - 1e-6), 1, side).astype(np.int64)
        values = np.empty((len(cells), len(MEASURED)), np.float32)
        for down, across in np.unique(inside, axis=0):  # one but at the slide's far edges
            own = (inside == (down, across)).all(axis=1)
            part = pixels if own.all() else pixels[own]
            values[own] = cell_statistics(part[:, :down, :across])
        return cells, values

    for cells, values in in_order(plan_blocks(table), work, workers or cores()):
        found[cells[:, 0] * columns + cells[:, 1]] = values
    kept, read = table["kept"].to_numpy(), ~np.isnan(found[:, 0])
    allow_unreadable(slide, int((kept & ~read).sum()), int(kept.sum()), max_unreadable)
    return table.with_columns(
        *(
            pl.Series(name, found[:, i]).fill_nan(None).alias(name)
            for i, name in enumerate(MEASURED)
        ),
        kept=pl.Series(read),
        reason=pl.when(pl.Series(kept & ~read))
        .then(pl.lit("unreadable", PATCH_SCHEMA["reason"]))
        .otherwise("reason"),
    )


def summarize(table: pl.DataFrame) -> dict[str, int | float | None]:
    """A patch table in figures: cells kept and cells not by reason, the share of the tissue's
    cells that cannot be decoded, the median focus of the kept cells (None without any)."""
    kept, unreadable = int(table["kept"].sum()), table.filter(reason="unreadable").height
    focus = table["focus"].to_numpy()[table["kept"].to_numpy()]
    return {
        "kept": kept,
        "background": table.filter(reason="background").height,
        "unreadable": unreadable,
        "unreadable_share": unreadable / max(kept + unreadable, 1),
        "median_focus": float(np.median(focus)) if kept else None,
    }


def cell_statistics(pixels: Pixels) -> Floats:
    """Focus and mean colour of patches.

    Parameters
    ----------
    pixels : uint8 (n, H, W, 3)

    Returns
    -------
    float32 (n, 4)
        Variance of the Laplacian (the four neighbours less four times the px) of luminance over
        the px that have all neighbours (0 without any), grey levels squared; means of red,
        green and blue, 0..255.
    """
    count, height, width = pixels.shape[:3]
    result = np.zeros((count, 4), np.float32)
    # rows are summed first: long runs; a sum over (H, W) at once would be runs of three
    rows = pixels.reshape(count, height, width * 3).sum(axis=1, dtype=np.uint32)
    result[:, 1:] = rows.reshape(count, width, 3).sum(axis=1) / (height * width)
    if min(height, width) >= 3:
        grey = pixels.astype(np.float32) @ LUMINANCE
        middle = grey[:, 1:-1]
        edges = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1]
        edges += middle[..., :-2]
        edges += middle[..., 2:]
        edges -= 4 * middle[..., 1:-1]
        result[:, 0] = edges.var(axis=(1, 2))
    return result

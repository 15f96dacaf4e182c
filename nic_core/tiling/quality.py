"""Quality of cells: focus and mean colour, for the patch table.

The area of a cell is measured, which is the central square of its patch if patches overlap.

Quality is measured at twice the um/px of a patch [choice]. The encoder, too, first reduces patches
of 0.5 um/px to 1.0 um/px by a mean pooling of 2 x 2 px.
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
    check_unreadable,
    map_in_order,
    plan_blocks,
    read_block,
)
from nic_core.tiling.patches import MEASURED, PATCH_SCHEMA
from nic_core.types import Pixels

LUMINANCE = np.array(
    [0.299, 0.587, 0.114], np.float32
)  # weights of red, green, blue (ITU-R BT.601)

Floats = NDArray[np.float32]


def measure_quality(
    table: pl.DataFrame,
    slide: Slide,
    *,
    workers: int | None = None,
    max_unreadable: float = MAX_UNREADABLE,
) -> pl.DataFrame:
    """Measure the quality of the kept cells at twice the um/px of the patch table.

    Parameters
    ----------
    table : polars.DataFrame
        Patch table of the slide (:func:`nic_core.tiling.patches.patch_table`).
    workers : int, optional
        Number of threads; default: one per core.
    max_unreadable : float
        Fraction of the kept cells that may be undecodable. They are no longer kept, with the reason
        ``unreadable``.

    Returns
    -------
    polars.DataFrame
        The table with ``focus``, ``red``, ``green`` and ``blue`` set at every kept cell.

    Raises
    ------
    SlideError
        More than ``max_unreadable`` of the cells cannot be decoded.
    """
    cell = float(table["stride"][0]) * slide.mpp  # um
    side = max(1, round(cell / (2 * float(table["mpp"][0]))))
    mpp = cell / side
    columns = int(table["column"].to_numpy().max()) + 1
    values_of_cell = np.full((table.height, len(MEASURED)), np.nan, np.float32)

    def work(block: Block) -> tuple[NDArray[np.int64], Floats]:
        cells, pixels = read_block(slide, block, patch=side, mpp=mpp)
        # leave out px beyond the slide: the white there would count as an edge and as colour
        left = (slide.height, slide.width) - cells * (cell / slide.mpp)
        inside = np.clip(np.ceil(left * (slide.mpp / mpp) - 1e-6), 1, side).astype(np.int64)
        values = np.empty((len(cells), len(MEASURED)), np.float32)
        for down, across in np.unique(inside, axis=0):  # a single shape, except at the far edges
            same = (inside == (down, across)).all(axis=1)
            part = pixels if same.all() else pixels[same]
            values[same] = cell_statistics(part[:, :down, :across])
        return cells, values

    for cells, values in map_in_order(plan_blocks(table), work, workers or cores()):
        values_of_cell[cells[:, 0] * columns + cells[:, 1]] = values
    kept, read = table["kept"].to_numpy(), ~np.isnan(values_of_cell[:, 0])
    check_unreadable(slide, int((kept & ~read).sum()), int(kept.sum()), max_unreadable)
    return table.with_columns(
        *(
            pl.Series(name, values_of_cell[:, i]).fill_nan(None).alias(name)
            for i, name in enumerate(MEASURED)
        ),
        kept=pl.Series(read),
        reason=pl.when(pl.Series(kept & ~read))
        .then(pl.lit("unreadable", PATCH_SCHEMA["reason"]))
        .otherwise("reason"),
    )


def summarize(table: pl.DataFrame) -> dict[str, int | float | None]:
    """Summarize a patch table.

    Returns
    -------
    dict
        ``kept``, ``background`` and ``unreadable``: numbers of cells; ``unreadable_share``: the
        fraction of tissue cells that cannot be decoded; ``median_focus`` of the kept cells (None if
        there are none).
    """
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
    """Return the focus and the mean colour of patches.

    Focus is the variance of the Laplacian of luminance: the sum of the four neighbours minus four
    times the px, over all px with four neighbours.

    Parameters
    ----------
    pixels : uint8 (n, H, W, 3)

    Returns
    -------
    float32 (n, 4)
        Focus in grey levels squared (0 for patches of fewer than 3 x 3 px), and the means of red,
        green and blue (0 to 255).
    """
    count, height, width = pixels.shape[:3]
    result = np.zeros((count, 4), np.float32)
    # sum over rows first: NumPy is slow on an inner axis of three elements
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

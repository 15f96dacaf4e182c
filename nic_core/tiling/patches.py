"""The patch table: which cells of a slide's grid are compressed, and where they lie."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl

from nic_core.slides.resample import coverage
from nic_core.slides.slide import Slide
from nic_core.store import atomic_file
from nic_core.tiling.tissue import TissueMask

PATCH_SCHEMA: dict[str, pl.DataType] = {
    "slide": pl.String(),
    "row": pl.Int32(),
    "column": pl.Int32(),
    "x": pl.Float64(),  # top-left corner, level-0 px; exact, so cells neither drift nor overlap
    "y": pl.Float64(),
    "size": pl.Float64(),  # side, level-0 px
    "mpp": pl.Float64(),  # um/px that the patch is read at
    "tissue": pl.Float32(),  # fraction of the cell
    "focus": pl.Float32(),  # variance of the Laplacian of luminance, grey levels squared
    "red": pl.Float32(),  # mean colour, 0..255
    "green": pl.Float32(),
    "blue": pl.Float32(),
    "kept": pl.Boolean(),
    "reason": pl.Enum(["background", "unreadable"]),  # why a cell is not kept; null: it is
}
MEASURED = ("focus", "red", "green", "blue")  # filled in by nic_core.tiling.quality


class PatchTableError(ValueError):
    """A patch table is not one, or not that of the slide it is used with."""


def grid_shape(slide: Slide, patch: int, mpp: float) -> tuple[int, int]:
    """Rows and columns of cells of ``patch`` px at ``mpp`` um/px that cover the slide."""
    cell = patch * mpp / slide.mpp
    # a cell that would hold less than a thousandth of a cell of slide is rounding
    rows, columns = slide.height / cell, slide.width / cell
    return max(1, math.ceil(rows - 1e-3)), max(1, math.ceil(columns - 1e-3))


def patch_table(
    slide_id: str, slide: Slide, mask: TissueMask, *, patch: int, mpp: float, tissue: float
) -> pl.DataFrame:
    """Lay the grid over a slide.

    Cells do not overlap and cover the slide from its top-left corner; the last row and column
    may reach outside. A cell is kept if its tissue fraction, the area mean of the mask (outside
    the slide: none), exceeds ``tissue`` (0.6 in the released code of the paper).

    Parameters
    ----------
    patch : int
        Side of a patch, px at ``mpp``.
    mpp : float
        um/px.

    Returns
    -------
    polars.DataFrame
        ``PATCH_SCHEMA``, one row a cell, by row then column; no pixel is read, so the columns
        ``MEASURED`` are null: :func:`nic_core.tiling.quality.measure_quality` fills them.
    """
    rows, columns = grid_shape(slide, patch, mpp)
    cell = patch * mpp / mask.mpp  # mask px
    height, width = mask.array.shape
    down = coverage(0.0, cell, rows, height)
    across = coverage(0.0, cell, columns, width)
    share = np.clip(across @ (down @ mask.array.astype(np.float32)).T, 0, 1).T
    # one cell's share summed in float32: 0.6 exactly must not pass as more than 0.6
    share = np.round(share, 6).astype(np.float32)
    size = patch * mpp / slide.mpp
    row, column = np.divmod(np.arange(rows * columns), columns)
    table = (
        pl.DataFrame(
            {
                "slide": [slide_id] * (rows * columns),
                "row": row,
                "column": column,
                "x": column * size,
                "y": row * size,
                "size": np.full(rows * columns, size),
                "mpp": np.full(rows * columns, float(mpp)),
                "tissue": share.ravel(),
                "kept": (share > np.float32(tissue)).ravel(),
            },
            schema_overrides=PATCH_SCHEMA,
        )
        .with_columns(pl.lit(None).alias(name) for name in MEASURED)
        .with_columns(reason=pl.when(~pl.col("kept")).then(pl.lit("background")))
    )
    return table.select(pl.col(name).cast(kind) for name, kind in PATCH_SCHEMA.items())


def check_patch_table(table: pl.DataFrame, source: str) -> None:
    """Raise PatchTableError unless a table has the schema, whole rows and one slide.

    Null are: ``reason`` exactly where a cell is kept; the columns ``MEASURED`` exactly where it
    is not, or everywhere if quality was not measured. Nothing else is.
    """
    if dict(table.schema) != PATCH_SCHEMA:
        wrong = {
            name: str(table.schema.get(name, "missing"))
            for name, kind in PATCH_SCHEMA.items()
            if table.schema.get(name) != kind
        } | {name: "unknown column" for name in table.columns if name not in PATCH_SCHEMA}
        raise PatchTableError(f"{source}: no patch table: {wrong or 'columns out of order'}")
    if table.is_empty():
        raise PatchTableError(f"{source}: a patch table has a row a cell; this one has none")
    _check_nulls(table, source)
    if table["slide"].n_unique() != 1:
        raise PatchTableError(f"{source}: cells of more than one slide")
    rows, columns = int(table["row"].max()) + 1, int(table["column"].max()) + 1  # type: ignore[arg-type]
    place = table["row"].cast(pl.Int64) * columns + table["column"]
    if not place.equals(pl.Series(np.arange(rows * columns))):
        raise PatchTableError(
            f"{source}: not one row a cell of {rows} x {columns}, by row then column"
        )


def _check_nulls(table: pl.DataFrame, source: str) -> None:
    whole = table.drop(*MEASURED, "reason")
    gaps = [name for name in whole.columns if whole[name].null_count()]
    if gaps:
        raise PatchTableError(f"{source}: missing values in {', '.join(gaps)}")
    if not table["reason"].is_null().equals(table["kept"]):
        raise PatchTableError(f"{source}: a cell has a reason if and only if it is not kept")
    measured = table.select(pl.col(MEASURED).is_not_null())
    if measured.to_numpy().any() and not all(column.equals(table["kept"]) for column in measured):
        raise PatchTableError(
            f"{source}: {', '.join(MEASURED)} stand at every kept cell and no other, or nowhere"
        )
    if not table.select(pl.col(MEASURED).is_finite().all()).to_numpy().all():
        raise PatchTableError(f"{source}: {', '.join(MEASURED)} must be finite numbers")


def write_patch_table(path: Path, table: pl.DataFrame) -> None:
    """Write a patch table as parquet, whole or not at all."""
    check_patch_table(table, str(path))
    with atomic_file(path) as temporary:
        table.write_parquet(temporary)


def read_patch_table(path: Path) -> pl.DataFrame:
    """Read and check a patch table.

    Raises
    ------
    PatchTableError
        The file is no patch table.
    """
    try:
        table = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise PatchTableError(f"{path}: cannot be read ({error})") from error
    check_patch_table(table, str(path))
    return table

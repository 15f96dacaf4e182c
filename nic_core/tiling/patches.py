"""The patch table: the cells of a slide's grid, their positions, and which are compressed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from nic_core.cohort import Geometry
from nic_core.store import atomic_file

if TYPE_CHECKING:
    from nic_core.slides.slide import Slide
    from nic_core.tiling.tissue import TissueMask

PATCH_SCHEMA: dict[str, pl.DataType] = {
    "slide": pl.String(),
    "row": pl.Int32(),
    "column": pl.Int32(),
    # top-left corner of the patch, level-0 px; not rounded, so that errors do not add up
    "x": pl.Float64(),
    "y": pl.Float64(),
    "size": pl.Float64(),  # side of the patch, level-0 px
    "stride": pl.Float64(),  # side of the cell, which is the patch's central square, level-0 px
    "mpp": pl.Float64(),  # um/px of the patch
    "tissue": pl.Float32(),  # fraction of the patch's area that is tissue
    # variance of the Laplacian of luminance of the cell, grey levels squared
    "focus": pl.Float32(),
    "red": pl.Float32(),  # mean colour of the cell, 0 to 255
    "green": pl.Float32(),
    "blue": pl.Float32(),
    "kept": pl.Boolean(),
    "reason": pl.Enum(["background", "unreadable"]),  # why a cell is not kept; null if it is
}
PATCH_UNITS = {
    "x": "level-0 px",
    "y": "level-0 px",
    "size": "level-0 px",
    "stride": "level-0 px",
    "mpp": "um/px",
    "focus": "grey levels squared",
}
PATCH_FORMAT = 3
"""Format number of the file, raised when the columns or their meaning change."""
MEASURED = ("focus", "red", "green", "blue")  # columns that measure_quality fills in


class PatchTableError(ValueError):
    """A patch table is invalid, or belongs to another slide."""


def grid_shape(slide: Slide, geometry: Geometry) -> tuple[int, int]:
    """Return the rows and columns of cells that cover the slide."""
    cell = geometry.cell_um / slide.mpp
    # a remainder below a thousandth of a cell is rounding of um/px, not another cell
    rows, columns = slide.height / cell, slide.width / cell
    return max(1, math.ceil(rows - 1e-3)), max(1, math.ceil(columns - 1e-3))


def patch_table(
    slide_id: str, slide: Slide, mask: TissueMask, geometry: Geometry, *, tissue: float
) -> pl.DataFrame:
    """Divide a slide into a grid of cells, and decide which are kept.

    Cells do not overlap. They cover the slide from its top-left corner; the last row and column
    may extend beyond the slide. A cell is the central square of its patch; patches overlap if the
    geometry's stride is smaller than its patch. A cell is kept if the tissue fraction of its patch
    exceeds ``tissue``. The fraction is the mean of the mask over the patch's area, and 0 outside
    the slide.

    Parameters
    ----------
    slide_id : str
    slide : Slide
        Only its size and um/px are used; no pixel is read.
    mask : TissueMask
    geometry : Geometry
        Patch, um/px and stride.
    tissue : float
        Tissue fraction; 0.6 in the code released with the paper [code].

    Returns
    -------
    polars.DataFrame
        :data:`PATCH_SCHEMA`, one row per cell, by row then column. The columns :data:`MEASURED`
        are null; :func:`nic_core.tiling.quality.measure_quality` fills them in.
    """
    rows, columns = grid_shape(slide, geometry)
    px = geometry.mpp / mask.mpp  # mask px per px of a patch
    size, step, margin = (n * px for n in (geometry.patch, geometry.stride, geometry.margin))
    height, width = mask.array.shape
    from nic_core.slides.resample import coverage

    down = coverage(-margin, size, rows, height, step=step)
    across = coverage(-margin, size, columns, width, step=step)
    fraction = np.clip(across @ (down @ mask.array.astype(np.float32)).T, 0, 1).T
    # float32 sums are inexact: a fraction of exactly 0.6 must not exceed a limit of 0.6
    fraction = np.round(fraction, 6).astype(np.float32)
    px = geometry.mpp / slide.mpp  # level-0 px per px of a patch
    size, step, margin = (n * px for n in (geometry.patch, geometry.stride, geometry.margin))
    row, column = np.divmod(np.arange(rows * columns), columns)
    table = (
        pl.DataFrame(
            {
                "slide": [slide_id] * (rows * columns),
                "row": row,
                "column": column,
                "x": column * step - margin,
                "y": row * step - margin,
                "size": np.full(rows * columns, size),
                "stride": np.full(rows * columns, step),
                "mpp": np.full(rows * columns, float(geometry.mpp)),
                "tissue": fraction.ravel(),
                "kept": (fraction > np.float32(tissue)).ravel(),
            },
            schema_overrides=PATCH_SCHEMA,
        )
        .with_columns(pl.lit(None).alias(name) for name in MEASURED)
        .with_columns(reason=pl.when(~pl.col("kept")).then(pl.lit("background")))
    )
    return table.select(pl.col(name).cast(kind) for name, kind in PATCH_SCHEMA.items())


def check_patch_table(table: pl.DataFrame, source: str) -> None:
    """Refuse a table that is not a complete patch table of one slide.

    ``reason`` must be null exactly where a cell is kept. The columns :data:`MEASURED` must be null
    exactly where it is not kept, or everywhere if quality was not measured. No other column may
    have nulls.

    Parameters
    ----------
    source : str
        Name of the table in the error.

    Raises
    ------
    PatchTableError
        Columns, rows or values are wrong.
    """
    if dict(table.schema) != PATCH_SCHEMA:
        wrong = {
            name: str(table.schema.get(name, "missing"))
            for name, kind in PATCH_SCHEMA.items()
            if table.schema.get(name) != kind
        } | {name: "unknown column" for name in table.columns if name not in PATCH_SCHEMA}
        raise PatchTableError(
            f"{source}: not a patch table: {wrong or 'columns are in another order'}"
        )
    if table.is_empty():
        raise PatchTableError(f"{source}: the patch table is empty; it needs a row per cell")
    _check_nulls(table, source)
    if table["slide"].n_unique() != 1:
        raise PatchTableError(f"{source}: the patch table has cells of several slides")
    rows, columns = int(table["row"].max()) + 1, int(table["column"].max()) + 1  # type: ignore[arg-type]
    number = table["row"].cast(pl.Int64) * columns + table["column"]
    if not number.equals(pl.Series(np.arange(rows * columns))):
        raise PatchTableError(
            f"{source}: the patch table must have one row for each of {rows} x {columns} cells, "
            "sorted by row then column"
        )


def _check_nulls(table: pl.DataFrame, source: str) -> None:
    required = table.drop(*MEASURED, "reason")
    incomplete = [name for name in required.columns if required[name].null_count()]
    if incomplete:
        raise PatchTableError(f"{source}: missing values in {', '.join(incomplete)}")
    if not table["reason"].is_null().equals(table["kept"]):
        raise PatchTableError(f"{source}: 'reason' must be set exactly where a cell is not kept")
    measured = table.select(pl.col(MEASURED).is_not_null())
    if measured.to_numpy().any() and not all(column.equals(table["kept"]) for column in measured):
        raise PatchTableError(
            f"{source}: {', '.join(MEASURED)} must be set exactly where a cell is kept, or nowhere"
        )
    if not table.select(pl.col(MEASURED).is_finite().all()).to_numpy().all():
        raise PatchTableError(f"{source}: {', '.join(MEASURED)} must be finite numbers")


def write_patch_table(path: Path, table: pl.DataFrame) -> None:
    """Check a patch table and write it as parquet, atomically.

    The parquet schema holds the format number (key ``nic_format``) and the unit of each column
    (field key ``unit``), so that the file explains itself to other readers of Arrow.

    Raises
    ------
    PatchTableError
        The table is not a patch table.
    StoreError
        The file cannot be written.
    """
    check_patch_table(table, str(path))
    arrow = table.to_arrow()
    fields = [
        field.with_metadata({**(field.metadata or {}), b"unit": PATCH_UNITS[field.name].encode()})
        if field.name in PATCH_UNITS
        else field
        for field in arrow.schema
    ]
    schema = pa.schema(fields, metadata={"nic_format": str(PATCH_FORMAT)})
    with atomic_file(path) as temporary:
        pq.write_table(arrow.cast(schema), temporary)


def read_patch_table(path: Path) -> pl.DataFrame:
    """Read and check a patch table.

    Raises
    ------
    PatchTableError
        The file cannot be read, is not a patch table or has another format number.
    """
    try:
        metadata = pq.read_metadata(path).metadata or {}
        table = pl.read_parquet(path, glob=False)
    except (OSError, pa.ArrowException, pl.exceptions.PolarsError) as error:
        raise PatchTableError(f"{path}: cannot be read ({error})") from error
    number = metadata.get(b"nic_format", b"1").decode()
    if number != str(PATCH_FORMAT):
        raise PatchTableError(
            f"{path}: a patch table of format {number}, this version reads format "
            f"{PATCH_FORMAT}; materialize 'patch_table' again"
        )
    check_patch_table(table, str(path))
    return table

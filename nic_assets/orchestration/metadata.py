"""How products show in the Dagster UI: pictures, tables, digests."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import dagster as dg
import numpy as np
import numpy.typing as npt
import polars as pl
from matplotlib.figure import Figure
from matplotlib.image import imsave

from nic_core.steps import digest

OWNERS = ["team:pathology"]


def code_version(number: int, *settings: object) -> str:
    """A code version that also changes with the settings that the code reads."""
    return f"{number}-{digest(*settings)}" if settings else str(number)


def figure(drawing: Figure, alt: str) -> dg.MarkdownMetadataValue:
    """A figure inside the event itself; kept small, since events live in a database."""
    stream = io.BytesIO()
    drawing.savefig(stream, format="png", dpi=60, bbox_inches="tight")
    return _image(stream.getvalue(), alt)


def picture(pixels: npt.NDArray[np.uint8], alt: str) -> dg.MarkdownMetadataValue:
    """An H x W x 3 uint8 picture inside the event itself."""
    stream = io.BytesIO()
    imsave(stream, pixels, format="jpg", pil_kwargs={"quality": 80})
    return _image(stream.getvalue(), alt, kind="jpeg")


def _image(data: bytes, alt: str, kind: str = "png") -> dg.MarkdownMetadataValue:
    return dg.MetadataValue.md(
        f"![{alt}](data:image/{kind};base64,{base64.b64encode(data).decode()})"
    )


def log_progress(context: dg.AssetExecutionContext) -> Callable[[int, int], None]:
    """A progress callback that writes ten lines to the run's log, whatever the number of steps."""
    logged = 0

    def show(done: int, total: int) -> None:
        nonlocal logged
        tenths = 10 * done // total
        if tenths > logged:
            logged = tenths
            context.log.info(f"{done:,} of {total:,}")

    return show


def table(frame: pl.DataFrame) -> dg.TableMetadataValue:
    """A small table, shown row by row."""
    records = [
        dg.TableRecord({name: _plain(value) for name, value in row.items()})
        for row in frame.iter_rows(named=True)
    ]
    return dg.MetadataValue.table(records, schema=column_schema(frame.schema))


def column_schema(schema: pl.Schema) -> dg.TableSchema:
    """A polars schema in Dagster's terms, for ``dagster/column_schema``."""
    return dg.TableSchema(
        [dg.TableColumn(name, str(dtype).lower()) for name, dtype in schema.items()]
    )


def _plain(value: Any) -> str | int | float | bool | None:
    if value is None or isinstance(value, str | int | bool):
        return value
    return round(value, 4) if isinstance(value, float) else str(value)

"""Metadata of materializations: figures, pictures and tables for the Dagster UI."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from nic_core.numbers import rounded

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.figure import Figure

OWNERS = ["team:pathology"]
SCREEN_DPI = 96  # px an inch
VECTOR_BYTES = 200_000  # size of a vector drawing from which on a figure is stored as pixels
PROGRESS_SECONDS = 30.0  # time between two lines of progress in a run's log


def code_version(number: int, *settings: object) -> str:
    """Return a code version that changes with ``number`` and with the settings."""
    from nic_core.steps import digest

    return f"{number}-{digest(*settings)}" if settings else str(number)


def figure(drawing: Figure, alt: str) -> dg.MarkdownMetadataValue:
    """Return a figure inside the event, which is stored in a database.

    The page shows a figure at 96 px an inch (:func:`nic_core.pictures.figure_uri`).
    """
    from nic_core.pictures import figure_uri

    return _image(figure_uri(drawing, vector_bytes=VECTOR_BYTES, dpi=SCREEN_DPI), alt)


def figures(drawings: Mapping[str, Figure]) -> dict[str, dg.MarkdownMetadataValue]:
    """Return each figure under its name; see :func:`figure`."""
    return {name: figure(drawing, name) for name, drawing in drawings.items()}


def picture(pixels: npt.NDArray[np.uint8], alt: str) -> dg.MarkdownMetadataValue:
    """Return a picture (height, width, 3) as a JPEG inside the event."""
    from matplotlib.image import imsave

    from nic_core.pictures import data_uri

    stream = io.BytesIO()
    imsave(stream, pixels, format="jpg", pil_kwargs={"quality": 80})
    return _image(data_uri("image/jpeg", stream.getvalue()), alt)


def _image(uri: str, alt: str) -> dg.MarkdownMetadataValue:
    return dg.MetadataValue.md(f"![{alt}]({uri})")


def log_progress(context: dg.AssetExecutionContext, unit: str) -> Callable[[int, int], None]:
    """Return a progress callback that logs what is done and the time left.

    It receives (done, total) in ``unit`` and logs a line every :data:`PROGRESS_SECONDS`. The time
    left follows from the speed since the first call, so what an earlier attempt did does not count.
    """
    begun = logged = time.monotonic()
    first: int | None = None

    def show(done: int, total: int) -> None:
        nonlocal begun, logged, first
        now = time.monotonic()
        if first is None:
            begun, first = now, done
        if now - logged < PROGRESS_SECONDS:
            return
        logged = now
        left = (now - begun) / (done - first) * (total - done) if done > first else None
        rest = "" if left is None else f", about {duration(left)} left"
        context.log.info(f"{done:,} of {total:,} {unit}{rest}")

    return show


def duration(seconds: float) -> str:
    """Return a duration in s, min or h, for messages."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def table(frame: pl.DataFrame) -> dg.TableMetadataValue:
    """Return a small table; floats are rounded to four significant digits."""
    records = [
        dg.TableRecord({name: _plain(value) for name, value in row.items()})
        for row in frame.iter_rows(named=True)
    ]
    return dg.MetadataValue.table(records, schema=column_schema(frame.schema))


def column_schema(schema: pl.Schema) -> dg.TableSchema:
    """Return a polars schema as the metadata ``dagster/column_schema``."""
    return dg.TableSchema(
        [dg.TableColumn(name, str(dtype).lower()) for name, dtype in schema.items()]
    )


def _plain(value: Any) -> str | int | float | bool | None:
    if value is None or isinstance(value, str | int | bool):
        return value
    return rounded(value) if isinstance(value, float) else str(value)

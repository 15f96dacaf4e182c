"""Prediction of a table of slide files: what a caller sends who has paths and no cohort."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import polars as pl

from nic_core.cohort.tables import NumberError, existing_path, to_numbers, to_text
from nic_core.compression.batch import slides_by_id
from nic_core.encoders.encoder import Encoder
from nic_core.models.files import SlideModel
from nic_core.models.prediction import predict_slides
from nic_core.slides import SlideSource
from nic_core.slides.remote import RemotePath, SlidePath, slide_path
from nic_core.types import Origin

TABLE_SCHEMA: dict[str, pl.DataType] = {
    "slide": pl.String(),  # path or address of the slide; the only column that is required
    "mpp": pl.Float64(),  # um/px at level 0; null: as the file states
    "mask": pl.String(),  # path of a tissue mask; null: tissue is detected
    "origin": pl.String(),  # level0 or bounds: of a mask of regions; null: as the file states
    "patient": pl.String(),  # in every row or in none
}
_MAX_NAME = 200  # bytes; the name of a slide's grid is longer, and file systems stop at 255


class SlideTableError(ValueError):
    """A table of slide files is invalid."""


def predict_table(
    model: SlideModel,
    encoder: Encoder,
    table: pl.DataFrame,
    *,
    times: Sequence[float] = (),
    device: str = "auto",
) -> pl.DataFrame:
    """Predict the slides of a table.

    Parameters
    ----------
    table
        Columns of :data:`TABLE_SCHEMA`, a row for each slide. Relative paths start at the working
        directory.
    times, device
        As in :func:`nic_core.models.prediction.predict_slides`.

    Returns
    -------
    polars.DataFrame
        The predictions of :func:`nic_core.models.prediction.predict_slides`, in the order of the
        table, with ``reasons`` (list of str) after ``failed``: why each of these slides could not
        be used, and what to do. The id of a slide is the name of its file.

    Raises
    ------
    SlideTableError
        A column is missing or unknown, a value is invalid, two rows have the same slide id, or
        only some rows have a patient.
    ModelMismatchError, ValueError
        See :func:`nic_core.models.prediction.predict_slides`.
    """
    slides, patients = read_slide_table(table)
    predicted = predict_slides(
        model, encoder, slides, patients=patients, times=times, device=device
    )
    reasons = {
        slide: f"{reason}; {remedy}"
        for slide, reason, remedy in predicted.slides.select("slide", "reason", "remedy").rows()
    }
    predictions = predicted.predictions
    failed = predictions["failed"].to_list()
    column = pl.Series(
        "reasons", [[reasons[slide] for slide in unit] for unit in failed], pl.List(pl.String)
    )
    return predictions.insert_column(predictions.columns.index("failed") + 1, column)


def read_slide_table(
    table: pl.DataFrame,
) -> tuple[dict[str, SlideSource], dict[str, str] | None]:
    """Return the slides of a table by slide id, and their patients if the table names them.

    Raises
    ------
    SlideTableError
        See :func:`predict_table`.
    """
    known = ", ".join(TABLE_SCHEMA)
    if unknown := [name for name in table.columns if name not in TABLE_SCHEMA]:
        raise SlideTableError(f"column '{unknown[0]}' is unknown; the columns are {known}")
    if "slide" not in table.columns:
        raise SlideTableError(
            f"no column 'slide' with the paths of slides; the columns are {known}"
        )
    values = {
        name: _values(table[name]) if name in table.columns else [None] * table.height
        for name in TABLE_SCHEMA
    }
    slides: dict[str, SlideSource] = {}
    for number in range(table.height):
        path, mpp, mask, origin = (values[n][number] for n in ("slide", "mpp", "mask", "origin"))
        if origin not in (None, *get_args(Origin)):
            allowed = " or ".join(map(repr, get_args(Origin)))
            raise SlideTableError(f"row {number + 1}: origin '{origin}' must be {allowed}")
        source = SlideSource(
            _slide(path, number + 1),
            cast(float | None, mpp),
            mask=None if mask is None else _path(mask, "mask", number + 1),
            origin=cast(Origin | None, origin),
        )
        ((slide, source),) = slides_by_id([source]).items()
        if slide in slides:
            raise SlideTableError(
                f"row {number + 1}: {source.path} has the slide id '{slide}' of "
                f"{slides[slide].path}; keep one row of a slide, or predict the two separately"
            )
        slides[slide] = source
    patients = values["patient"]
    if lacking := [number + 1 for number, patient in enumerate(patients) if patient is None]:
        if len(lacking) < len(patients):
            raise SlideTableError(
                f"row {lacking[0]} has no patient; give one in every row, or leave the column out"
            )
        return slides, None
    return slides, dict(zip(slides, map(str, patients), strict=True))


def _values(column: pl.Series) -> list[object]:
    """Return a column with the type of :data:`TABLE_SCHEMA`; blank text and NaN are None."""
    try:
        if TABLE_SCHEMA[column.name].is_numeric():
            return to_numbers(column).fill_nan(None).to_list()
        return [text if text and text.strip() else None for text in to_text(column)]
    except NumberError as error:
        problem = f"row {error.index + 1}, column '{column.name}': {error}"
        raise SlideTableError(problem) from error
    except TypeError as error:
        raise SlideTableError(f"column '{column.name}' {error}") from error


def _slide(value: object, row: int) -> SlidePath:
    """Return the address of a slide, or its path (:func:`_path`)."""
    try:
        place = slide_path(str(value or ""))
    except ValueError as error:
        raise SlideTableError(f"row {row}: slide {error}") from error
    return place if isinstance(place, RemotePath) else _path(value, "slide", row)


def _path(value: object, column: str, row: int) -> Path:
    """Return a path that can be looked up and named; whether it exists is not checked."""
    text = str(value or "")
    path, problem = Path(text), None
    if not path.name:
        problem = "is not the path of a file"
    elif "\0" in text:
        problem = "contains a null character"
    elif len(os.fsencode(path.name)) > _MAX_NAME:
        problem = f"has a name of more than {_MAX_NAME} bytes"
    if problem is not None:
        raise SlideTableError(f"row {row}: {column} {text!r} {problem}; give the path of a file")
    return existing_path(path)

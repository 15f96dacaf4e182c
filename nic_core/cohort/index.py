"""The slide index: one table of all slides, from the cohort's folders and its slide table."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, get_args

import polars as pl

from nic_core.cohort.external import ExternalCohort
from nic_core.cohort.fields import CohortError, normalise
from nic_core.cohort.file import Cohort
from nic_core.cohort.slides import SlideFolder
from nic_core.cohort.tables import (
    MISSING,
    ROW,
    NumberError,
    existing_path,
    read_table,
    require_columns,
    to_numbers,
    to_text,
    visible,
)
from nic_core.object_stores import RemoteError, RemoteUnavailableError
from nic_core.slides.dicom import folder_series
from nic_core.slides.errors import SlideError
from nic_core.slides.files import LeftAside, SlideFiles, files_of_slide
from nic_core.slides.folders import find_slide_files, list_candidates, summarize_left_aside
from nic_core.slides.remote import RemotePath, SlidePath, look_up, slide_path
from nic_core.slides.source import SlideSource
from nic_core.types import Origin

INDEX_SCHEMA: dict[str, pl.DataType] = {
    "slide": pl.String(),  # slide id
    "path": pl.String(),  # absolute, as all paths
    "patient": pl.String(),
    "mpp": pl.Float64(),  # um/px at level 0; null: as the file states
    "image": pl.Int64(),  # number of the image in a file with several; null: the largest scan
    "mask": pl.String(),  # tissue mask; null: tissue is detected
    "origin": pl.String(),  # level0 or bounds: of a mask of regions; null: as the file states
    "truth": pl.String(),  # truth image for probability maps; null: none
    "split": pl.String(),  # cv or test
    "exclude": pl.String(),  # reason why no model uses the slide; null: it is used
    "fold": pl.String(),  # fold of the patient, for settings.models.folds: given
    "site": pl.String(),  # where the slide is from, for settings.models.folds: site
    "scanner": pl.String(),
    "stain": pl.String(),
    "organ": pl.String(),
}
_REQUIRED = ("slide", "path", "patient")
DESCRIPTIVE_COLUMNS = ("scanner", "stain", "organ")
"""Columns of the slide index that describe a slide and change no computation."""
FILE_COLUMNS = ("path", "mask", "truth")
"""Columns of the slide index with paths of files."""
_SPLITS = ("cv", "test")
_ORIGINS = get_args(Origin)
# what tables write for yes and no: as a reason, "no" would exclude the slide
_NO_REASONS = frozenset(
    ("0", "1", "0.0", "1.0", "true", "false", "t", "f", "yes", "no", "y", "n", "none", "-")
)
_ROWS_SHOWN = 3  # in a message


@dataclass(frozen=True)
class FoundSlides:
    """What the folders and the slide table of a cohort hold.

    Attributes
    ----------
    index : polars.DataFrame
        :data:`INDEX_SCHEMA`, sorted by slide id; slides with a problem are among them.
    parts : dict of str to tuple of str
        Path of a slide to its other files, for slides with several files.
    problems : dict of str to str
        Slide id to the reason why the slide cannot be used, for example "path /data/a.svs does not
        exist", as far as its files show it without a look at the pixels.
    left_aside : tuple of LeftAside
        Files of the folders that are not slides, with the reason
        (:func:`nic_core.slides.folders.summarize_left_aside` shortens them).
    """

    index: pl.DataFrame
    parts: dict[str, tuple[str, ...]]
    problems: dict[str, str]
    left_aside: tuple[LeftAside, ...]


def find_slides(cohort: Cohort | ExternalCohort) -> FoundSlides:
    """List the slides of a cohort, and what its folders hold beside them.

    Raises
    ------
    CohortError
        There are no slides; a slide id occurs twice or cannot be a folder's name; two rows of the
        slide table name files of one slide; or the slide table cannot be read, lacks a column or
        has an invalid value.
    """
    rows: list[dict[str, object]] = []
    files: dict[str, SlideFiles] = {}  # path of the slide to its files
    left_aside: list[LeftAside] = []
    for folder in cohort.slides.folders:
        folder_rows, found, left = folder_slides(folder)
        rows += folder_rows
        files |= found
        left_aside += left
    if cohort.slides.table is not None:
        table, found = table_slides(cohort.slides.table)
        rows += table
        files |= found
    if not rows:
        sources = [f"{f.path}/{f.pattern or '**'}" for f in cohort.slides.folders]
        sources += [str(cohort.slides.table)] if cohort.slides.table else []
        reasons = "".join(f"; {line}" for line in summarize_left_aside(left_aside))
        raise CohortError(
            f"cohort '{cohort.name}': no slides found in {', '.join(sources)}{reasons}"
        )
    for row in rows:
        if (wrong := row_problem(row)) is not None:
            raise CohortError(wrong)
    index = pl.DataFrame(rows, schema=INDEX_SCHEMA).sort("slide")
    _check_ids(index)
    problems = {
        slide: f"{problem.reason}; {problem.remedy}"
        for slide, path in index.select("slide", "path").iter_rows()
        if (problem := files[path].problem) is not None
    } | missing_files(index)
    parts = {path: tuple(map(str, slide.parts)) for path, slide in files.items() if slide.parts}
    return FoundSlides(index, parts, problems, tuple(left_aside))


def slide_index(cohort: Cohort) -> pl.DataFrame:
    """List the slides of a cohort, all of which must have their files.

    Returns
    -------
    polars.DataFrame
        :data:`INDEX_SCHEMA`, sorted by slide id.

    Raises
    ------
    CohortError
        See :func:`find_slides`; or a file is missing, empty or incomplete.
    """
    found = find_slides(cohort)
    for slide, problem in found.problems.items():
        raise CohortError(f"slide '{slide}': {problem}")
    return found.index


def row_source(row: Mapping[str, Any]) -> SlideSource:
    """Return the file of a slide and how it is read, from its row of a slide index."""
    mask = None if row["mask"] is None else Path(row["mask"])
    return SlideSource(slide_path(row["path"]), row["mpp"], row["image"], mask, row["origin"])


def missing_files(index: pl.DataFrame) -> dict[str, str]:
    """Return the slides of an index with a missing file, and the reason for each.

    Returns
    -------
    dict of str to str
        Slide id to reason, for example "path /data/a.svs does not exist".
    """
    places = [slide_path(place) for column in FILE_COLUMNS for place in index[column].drop_nulls()]
    look_up(place for place in places if isinstance(place, RemotePath))
    return {
        row["slide"]: f"{column} {row[column]} does not exist"
        for row in index.iter_rows(named=True)
        for column in reversed(FILE_COLUMNS)
        if row[column] and not slide_path(row[column]).exists()
    }


def folder_files(folder: SlideFolder) -> tuple[SlidePath, ...]:
    """Return the paths in a folder that may be slides, by their names, sorted.

    Raises
    ------
    CohortError
        The folder does not exist.
    """
    return list_candidates(_existing(folder), folder.pattern).candidates


def _existing(folder: SlideFolder) -> SlidePath:
    try:
        if not folder.path.is_dir():
            raise CohortError(f"slides.folders: {folder.path} is not a folder")
    except RemoteUnavailableError:
        raise
    except RemoteError as error:
        raise CohortError(f"slides.folders: {error}") from error
    return folder.path


def slide_id(slide: SlideFiles) -> str:
    """Return the id of a slide in a folder: its file name without suffix and ``.ome``.

    The id of a DICOM slide is the name of its folder, if that holds no other series, else the name
    of the file of its level 0. The last number of a UID is not a suffix.
    """
    if slide.folder:
        return normalise(slide.folder)
    name = normalise(slide.path.name)
    stem, dot, suffix = name.rpartition(".")
    if not stem or (dot and suffix.isdecimal()):
        return name
    return stem[: -len(".ome")] if stem.lower().endswith(".ome") else stem


def folder_slides(
    folder: SlideFolder,
) -> tuple[list[dict[str, object]], dict[str, SlideFiles], list[LeftAside]]:
    """Find the slides of a folder.

    Returns
    -------
    rows : list of dict
        With columns of :data:`INDEX_SCHEMA`.
    files : dict of str to SlideFiles
        The files of each slide by its path.
    left_aside : list of LeftAside

    Raises
    ------
    CohortError
        The folder does not exist, or its pattern finds no patient in a slide id.
    """
    slides, left_aside = find_slide_files(_existing(folder), folder.pattern)
    files = {str(slide.path): slide for slide in slides}
    return _folder_rows(folder, slides), files, left_aside


def _folder_rows(folder: SlideFolder, slides: Iterable[SlideFiles]) -> list[dict[str, object]]:
    try:
        pattern = re.compile(folder.patient) if folder.patient else None
    except re.error as error:
        raise CohortError(f"slides.folders: patient '{folder.patient}': {error}") from error
    if pattern is not None and "patient" not in pattern.groupindex:
        raise CohortError(
            f"slides.folders: patient '{folder.patient}' has no group (?P<patient>...)"
        )
    rows: list[dict[str, object]] = []
    for files in slides:
        slide, path = slide_id(files), files.path
        match = pattern.search(slide) if pattern else None
        if pattern is not None and match is None:
            raise CohortError(
                f"slide '{slide}' ({path}): the pattern '{folder.patient}' finds no patient in its "
                "id"
            )
        patient = normalise(match["patient"]) if match else slide
        rows.append({"slide": slide, "path": str(path), "patient": patient, "split": "cv"})
    return rows


def table_slides(table: Path) -> tuple[list[dict[str, object]], dict[str, SlideFiles]]:
    """Return the rows of a slide table with the path of each slide, and the files by that path.

    Raises
    ------
    CohortError
        See :func:`table_rows`; or two rows name files of one slide.
    """
    rows = table_rows(table)
    files: dict[str, SlideFiles] = {}
    named: dict[str, str] = {}  # path of the slide to the file that a row names
    series_of = functools.cache(folder_series)
    for row in rows:
        given = str(row["path"])
        found = files_of_slide(slide_path(given), series_of=series_of)
        if isinstance(found, LeftAside):
            problem = SlideError(given, found.reason, "name the file of a slide in column 'path'")
            found = SlideFiles(found.path, problem=problem)
        path = str(found.path)
        if named.setdefault(path, given) != given:
            raise CohortError(
                f"slide table {table}: {PurePath(named[path]).name} and {PurePath(given).name} are "
                f"files of one slide ({path}); keep one row for it"
            )
        row["path"] = path
        files[path] = found
    return rows, files


def table_rows(path: Path) -> list[dict[str, object]]:
    """Read the rows of a slide table, with the columns of :data:`INDEX_SCHEMA`.

    Paths are made absolute; relative ones are relative to the folder of the table. Words that mean
    'no value' (:data:`nic_core.cohort.tables.MISSING`) are missing values in every column.

    Raises
    ------
    CohortError
        The table cannot be read, lacks a column or has an invalid value; a line for each kind of
        invalid value. Rows are numbered as in :func:`nic_core.cohort.tables.read_table`.
    """
    table = read_table(path, "slide table", row_column=ROW)
    numbers = table[ROW].to_list()
    table = table.drop(ROW)
    require_columns(table, _REQUIRED, path, "slide table")
    known = [column for column in INDEX_SCHEMA if column in table.columns]
    problems = [
        f"column '{visible(column)}' has no effect: rename it to '{column.casefold()}'"
        for column in table.columns
        if column.casefold() in INDEX_SCHEMA and column.casefold() not in known
    ]
    columns: dict[str, list[object]] = {}
    for column in known:
        try:
            columns[column] = _values(table[column])
        except NumberError as error:
            problems.append(f"row {numbers[error.index]}, column '{column}': {error}")
        except TypeError as error:
            problems.append(f"column '{column}' {error}")
    for column in _REQUIRED:
        if empty := [n for n, v in zip(numbers, columns.get(column, ()), strict=False) if not v]:
            problems.append(
                f"no {column} in {_rows(empty)}; write it (words such as NA and None mean that it "
                "is missing)"
            )
    used = [n for n, v in zip(numbers, columns.get("exclude", ()), strict=False) if _is_no(v)]
    if used:
        problems.append(
            f"column 'exclude' of {_rows(used)} has no reason; write why the slide is not used, or "
            "leave the cell of a slide that is used empty"
        )
    if problems:
        raise CohortError("\n".join(f"slide table {path}: {problem}" for problem in problems))
    rows: list[dict[str, object]] = []
    for number in range(table.height):
        row = {
            column: columns[column][number] if column in columns else None
            for column in INDEX_SCHEMA
        }
        for column in FILE_COLUMNS:
            if row[column]:
                row[column] = str(_absolute(path, column, str(row[column])))
        rows.append(row | {"split": row["split"] or "cv"})
    return rows


def _absolute(table: Path, column: str, text: str) -> SlidePath:
    """The path or address of a slide table; a relative path is relative to the table's folder."""
    try:
        place = slide_path(text)
    except ValueError as error:
        raise CohortError(f"slide table {table}: column '{column}': {error}") from error
    if isinstance(place, RemotePath):
        if column != "path":
            raise CohortError(
                f"slide table {table}: column '{column}': {text} is an address; only slides are "
                "read from an object store: copy the file, and write its path"
            )
        return place
    # not resolved: the other files of a slide are beside a link, not beside its target
    return existing_path(Path(os.path.abspath(table.parent / place)))


def _values(column: pl.Series) -> list[object]:
    """The values of a column of a slide table, with the type of :data:`INDEX_SCHEMA`.

    Raises
    ------
    NumberError, TypeError
        A value has another type.
    """
    if not INDEX_SCHEMA[column.name].is_numeric():
        return [None if text in MISSING else text for text in to_text(column)]
    values = to_numbers(column)
    if INDEX_SCHEMA[column.name].is_integer():
        for index, number in enumerate(values):
            if number is not None and not (number.is_integer() and 0 <= number < 2**31):
                raise NumberError(
                    index, f"'{column[index]}' is not the number of an image (0, 1, ...)"
                )
    return values.cast(INDEX_SCHEMA[column.name]).to_list()


def _is_no(value: object) -> bool:
    return isinstance(value, str) and value.casefold() in _NO_REASONS


def _rows(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_ROWS_SHOWN]))
    more = f" and {len(numbers) - _ROWS_SHOWN} more" if len(numbers) > _ROWS_SHOWN else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _check_ids(index: pl.DataFrame) -> None:
    duplicates = index.filter(pl.col("slide").is_duplicated())
    if duplicates.height:
        slide = duplicates["slide"][0]
        paths = duplicates.filter(pl.col("slide") == slide)["path"].to_list()
        raise CohortError(
            f"slide id '{slide}' occurs more than once: {', '.join(paths)}; rename a file, narrow "
            "the pattern, or give the slides ids in a slide table"
        )


def row_problem(row: dict[str, object]) -> str | None:
    """Return what is wrong with the fields of a row, and what to do; None if nothing is."""
    slide = str(row["slide"])
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", slide):
        return (
            f"slide '{slide}' ({row['path']}): a slide id becomes a folder and a partition key: "
            "use letters, digits, '-', '_' and '.'; the slide table can give a slide another id"
        )
    if row["split"] not in _SPLITS:
        return f"slide '{slide}': split '{row['split']}' must be 'cv' or 'test'"
    if row.get("origin") not in (None, *_ORIGINS):
        origins = " or ".join(map(repr, _ORIGINS))
        return f"slide '{slide}': origin '{row['origin']}' must be {origins}"
    return None

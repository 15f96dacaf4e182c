"""The slide index: one table of all slides, from the cohort's folders and its slide table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import polars as pl

from nic_core.cohort.fields import CohortError, normalise
from nic_core.cohort.file import Cohort
from nic_core.cohort.slides import SlideFolder
from nic_core.cohort.tables import existing_path, read_table, require_columns
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
}
_REQUIRED = ("slide", "path", "patient")
FILE_COLUMNS = ("path", "mask", "truth")
"""Columns of the slide index with paths of files."""
_SPLITS = ("cv", "test")
_ORIGINS = get_args(Origin)


def slide_index(cohort: Cohort, *, allow_missing: bool = False) -> pl.DataFrame:
    """List the slides of a cohort.

    Parameters
    ----------
    allow_missing : bool
        Keep slides of the slide table with a missing file; :func:`missing_files` lists them.

    Returns
    -------
    polars.DataFrame
        :data:`INDEX_SCHEMA`, sorted by slide id.

    Raises
    ------
    CohortError
        There are no slides; a file is missing (unless ``allow_missing``); a slide id occurs twice
        or cannot be a folder's name; or the slide table cannot be read, lacks a column or has an
        invalid value.
    """
    rows = [row for folder in cohort.slides.folders for row in folder_rows(folder)]
    if cohort.slides.table is not None:
        rows += table_rows(cohort.slides.table)
    if not rows:
        sources = [f"{f.path}/{f.pattern}" for f in cohort.slides.folders]
        sources += [str(cohort.slides.table)] if cohort.slides.table else []
        raise CohortError(f"cohort '{cohort.name}': no slides found in {', '.join(sources)}")
    for row in rows:
        if problem := row_problem(row):
            raise CohortError(problem)
    index = pl.DataFrame(rows, schema=INDEX_SCHEMA).sort("slide")
    duplicates = index.filter(pl.col("slide").is_duplicated())
    if duplicates.height:
        slide = duplicates["slide"][0]
        paths = duplicates.filter(pl.col("slide") == slide)["path"].to_list()
        raise CohortError(f"slide id '{slide}' occurs more than once: {', '.join(paths)}")
    if not allow_missing:
        for slide, problem in missing_files(index).items():
            raise CohortError(f"slide '{slide}': {problem}")
    return index


def missing_files(index: pl.DataFrame) -> dict[str, str]:
    """Return the slides of an index with a missing file, and the reason for each.

    Returns
    -------
    dict of str to str
        Slide id to reason, for example "path /data/a.svs does not exist".
    """
    return {
        row["slide"]: f"{column} {row[column]} does not exist"
        for row in index.iter_rows(named=True)
        for column in reversed(FILE_COLUMNS)
        if row[column] and not Path(row[column]).is_file()
    }


def folder_files(folder: SlideFolder) -> list[Path]:
    """Return the paths that match a folder's pattern, sorted; some may not be regular files.

    Raises
    ------
    CohortError
        The folder does not exist.
    """
    if not folder.path.is_dir():
        raise CohortError(f"slides.folders: {folder.path} is not a folder")
    return sorted(p for p in folder.path.glob(folder.pattern) if not p.name.startswith("."))


def slide_id(path: Path) -> str:
    """Return the id of a slide in a folder: its file name without suffix and ``.ome``."""
    return normalise(path.stem).removesuffix(".ome")


def folder_rows(folder: SlideFolder) -> list[dict[str, object]]:
    """List the slides of a folder, with columns of :data:`INDEX_SCHEMA`.

    Raises
    ------
    CohortError
        The folder does not exist, or its pattern finds no patient in a slide id.
    """
    try:
        pattern = re.compile(folder.patient) if folder.patient else None
    except re.error as error:
        raise CohortError(f"slides.folders: patient '{folder.patient}': {error}") from error
    if pattern is not None and "patient" not in pattern.groupindex:
        raise CohortError(
            f"slides.folders: patient '{folder.patient}' has no group (?P<patient>...)"
        )
    rows: list[dict[str, object]] = []
    for path in folder_files(folder):
        if not path.is_file():
            continue
        slide = slide_id(path)
        match = pattern.search(slide) if pattern else None
        if pattern is not None and match is None:
            raise CohortError(
                f"slide '{slide}' ({path}): the pattern '{folder.patient}' finds no patient in its "
                "id"
            )
        patient = normalise(match["patient"]) if match else slide
        rows.append({"slide": slide, "path": str(path), "patient": patient, "split": "cv"})
    return rows


def table_rows(path: Path) -> list[dict[str, object]]:
    """Read the rows of a slide table, with the columns of :data:`INDEX_SCHEMA`.

    Paths are made absolute; relative ones are relative to the folder of the table.

    Raises
    ------
    CohortError
        The table cannot be read, lacks a column or has an invalid value.
    """
    table = read_table(path, "slide table")
    require_columns(table, _REQUIRED, path, "slide table")
    known = [column for column in INDEX_SCHEMA if column in table.columns]
    try:
        table = table.select(pl.col(c).cast(INDEX_SCHEMA[c]) for c in known)
    except pl.exceptions.PolarsError as error:
        raise CohortError(
            f"slide table {path}: column mpp is not a number, or image no whole number ({error})"
        ) from error
    rows: list[dict[str, object]] = []
    for number, row in enumerate(table.iter_rows(named=True), start=1):
        for column in _REQUIRED:
            if not row[column]:
                raise CohortError(f"slide table {path}: row {number} has no {column}")
        for column in FILE_COLUMNS:
            if row.get(column):
                row[column] = str(existing_path((path.parent / str(row[column])).resolve()))
        rows.append({column: row.get(column) or None for column in INDEX_SCHEMA})
        rows[-1]["split"] = row.get("split") or "cv"
        # 0 um/px is kept, so that opening the slide refuses it; image 0 is the first image
        rows[-1] |= {"mpp": row.get("mpp"), "image": row.get("image")}
    return rows


def row_problem(row: dict[str, object]) -> str | None:
    """Return what is wrong with a slide's id or split, and what to do; None if nothing is."""
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

"""The slides of a cohort: one table from its folders and its slide table."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl

from nic_core.cohort.fields import CohortError
from nic_core.cohort.file import Cohort
from nic_core.cohort.slides import SlideFolder

INDEX_SCHEMA: dict[str, pl.DataType] = {
    "slide": pl.String(),
    "path": pl.String(),
    "patient": pl.String(),
    "mpp": pl.Float64(),
    "mask": pl.String(),
    "truth": pl.String(),
    "split": pl.String(),
}
_REQUIRED = ("slide", "path", "patient")
_FILES = ("path", "mask", "truth")
_SPLITS = ("cv", "test")


def slide_index(cohort: Cohort, *, allow_missing: bool = False) -> pl.DataFrame:
    """Every slide of the cohort, sorted by slide id.

    Parameters
    ----------
    allow_missing : bool
        Keep slides of the table with a file that does not exist (:func:`missing_files` lists them).

    Returns
    -------
    polars.DataFrame
        ``INDEX_SCHEMA``: slide id, absolute path, patient, um/px (null: the file's own), paths of
        a ready tissue mask and of a truth image (null: none), split (``cv`` or ``test``).

    Raises
    ------
    CohortError
        No slides; a file that is not there (unless ``allow_missing``); an id that stands twice or cannot
        name a folder; a table that cannot be read, lacks a column or has an impossible value.
    """
    rows = [row for folder in cohort.slides.folders for row in _of_folder(folder)]
    if cohort.slides.table is not None:
        rows += table_rows(cohort.slides.table)
    if not rows:
        places = [f"{f.path}/{f.pattern}" for f in cohort.slides.folders]
        places += [str(cohort.slides.table)] if cohort.slides.table else []
        raise CohortError(f"cohort '{cohort.name}': no slides found in {', '.join(places)}")
    for row in rows:
        _check(row)
    index = pl.DataFrame(rows, schema=INDEX_SCHEMA).sort("slide")
    twice = index.filter(pl.col("slide").is_duplicated())
    if twice.height:
        slide = twice["slide"][0]
        paths = twice.filter(pl.col("slide") == slide)["path"].to_list()
        raise CohortError(f"slide '{slide}' stands more than once: {', '.join(paths)}")
    if not allow_missing:
        for slide, problem in missing_files(index).items():
            raise CohortError(f"slide '{slide}': {problem}")
    return index


def missing_files(index: pl.DataFrame) -> dict[str, str]:
    """The slides of an index of which a file does not exist, and which."""
    return {
        row["slide"]: f"{column} {row[column]} does not exist"
        for row in index.iter_rows(named=True)
        for column in reversed(_FILES)
        if row[column] and not Path(row[column]).is_file()
    }


def folder_files(folder: SlideFolder) -> list[Path]:
    """What a folder holds by its pattern, sorted; not yet asked whether each is a file.

    Raises
    ------
    CohortError
        There is no such folder.
    """
    if not folder.path.is_dir():
        raise CohortError(f"slides.folders: {folder.path} is no folder")
    return sorted(p for p in folder.path.glob(folder.pattern) if not p.name.startswith("."))


def slide_id(path: Path) -> str:
    """Id of a slide that no table names: its file's name without the ending."""
    return path.stem.removesuffix(".ome")


def _of_folder(folder: SlideFolder) -> list[dict[str, object]]:
    try:
        rule = re.compile(folder.patient) if folder.patient else None
    except re.error as error:
        raise CohortError(f"slides.folders: patient '{folder.patient}': {error}") from error
    if rule is not None and "patient" not in rule.groupindex:
        raise CohortError(
            f"slides.folders: patient '{folder.patient}' has no group (?P<patient>...)"
        )
    rows: list[dict[str, object]] = []
    for path in folder_files(folder):
        if not path.is_file():
            continue
        slide = slide_id(path)
        match = rule.search(slide) if rule else None
        if rule is not None and match is None:
            raise CohortError(
                f"slide '{slide}' ({path}): the pattern '{folder.patient}' finds no patient in it"
            )
        patient = match["patient"] if match else slide
        rows.append({"slide": slide, "path": str(path), "patient": patient, "split": "cv"})
    return rows


def table_rows(path: Path) -> list[dict[str, object]]:
    """The rows of a slide table, their paths absolute, each of ``INDEX_SCHEMA``'s columns.

    Raises
    ------
    CohortError
        It cannot be read, lacks a column or has an impossible value.
    """
    try:
        # as text first: an id such as 007 must keep its zeros
        table = (
            pl.read_parquet(path)
            if path.suffix == ".parquet"
            else pl.read_csv(path, infer_schema=False)
        )
    except (OSError, pl.exceptions.PolarsError) as error:
        raise CohortError(f"slide table {path}: cannot be read ({error})") from error
    missing = [column for column in _REQUIRED if column not in table.columns]
    if missing:
        raise CohortError(
            f"slide table {path}: no column {', '.join(missing)}; it has {', '.join(table.columns)}"
        )
    known = [column for column in INDEX_SCHEMA if column in table.columns]
    try:
        table = table.select(pl.col(c).cast(INDEX_SCHEMA[c]) for c in known)
    except pl.exceptions.PolarsError as error:
        raise CohortError(f"slide table {path}: column mpp is not a number ({error})") from error
    rows: list[dict[str, object]] = []
    for number, row in enumerate(table.iter_rows(named=True), start=1):
        for column in _REQUIRED:
            if not row[column]:
                raise CohortError(f"slide table {path}: row {number} has no {column}")
        for column in _FILES:
            if row.get(column):
                row[column] = str((path.parent / str(row[column])).resolve())
        rows.append({column: row.get(column) or None for column in INDEX_SCHEMA})
        rows[-1]["split"] = row.get("split") or "cv"
        # 0 um/px is no missing value: the slide itself refuses it
        rows[-1]["mpp"] = row.get("mpp")
    return rows


def _check(row: dict[str, object]) -> None:
    slide = str(row["slide"])
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", slide):
        raise CohortError(
            f"slide '{slide}' ({row['path']}): an id becomes a folder and a partition key: "
            "use letters, digits, '-', '_' and '.', and give it in the slide table"
        )
    if row["split"] not in _SPLITS:
        raise CohortError(f"slide '{slide}': split '{row['split']}' is neither 'cv' nor 'test'")

"""Whether the files of a cohort have changed, at one ``stat`` a file.

What was seen of each file when it was last taken in lies in a table in the store. A look
compares that with the folders as they are; a difference counts once two looks in a row found
the same, so a file that is still being copied is left alone.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import polars as pl

from nic_core.cohort import Cohort
from nic_core.slides.errors import SlideError
from nic_core.slides.identity import content_identity
from nic_core.slides.index import folder_files, table_rows

SEEN_SCHEMA = pl.Schema(
    {
        "path": pl.String(),
        "size": pl.Int64(),  # bytes
        "modified": pl.Int64(),  # ns since 1970
        "identity": pl.String(),  # of the content; null: not asked for (tables)
    }
)


class Stamp(NamedTuple):
    """Size in bytes and time of modification in ns."""

    size: int
    modified: int


@dataclass(frozen=True)
class Look:
    """What one look found.

    Attributes
    ----------
    files
        How many there are.
    settled
        Paths that are new, changed or gone, in the state in which the look before found them.
    moving
        Paths that differ from what was seen, and from the look before.
    marks
        Of all that differ, for the next look.
    """

    files: int
    settled: tuple[str, ...]
    moving: tuple[str, ...]
    marks: tuple[str, ...]


def look(cohort: Cohort, seen: pl.DataFrame, marks: Collection[str] = ()) -> Look:
    """Compare the cohort's slides, masks and tables with what was ``seen`` of them.

    Parameters
    ----------
    seen : polars.DataFrame
        Of :data:`SEEN_SCHEMA`.
    marks : collection of str
        Those of the look before.

    Raises
    ------
    CohortError
        A slide folder is not there, or the slide table cannot be read.
    """
    now = stamps(watched_files(cohort))
    known = {
        path: Stamp(size, modified)
        for path, size, modified in seen.select("path", "size", "modified").iter_rows()
    }
    differing = {
        path: _mark(path, now.get(path))
        for path in sorted(now.keys() | known.keys())
        if now.get(path) != known.get(path)
    }
    before = set(marks)
    return Look(
        files=len(now),
        settled=tuple(path for path, mark in differing.items() if mark in before),
        moving=tuple(path for path, mark in differing.items() if mark not in before),
        marks=tuple(differing.values()),
    )


def watched_files(cohort: Cohort) -> list[Path]:
    """Every file of which a change matters: slides, ready masks, slide table, label table."""
    paths = [path for folder in cohort.slides.folders for path in folder_files(folder)]
    if cohort.slides.table is not None:
        paths.append(cohort.slides.table)
        for row in table_rows(cohort.slides.table):
            paths += [Path(str(row[column])) for column in ("path", "mask") if row.get(column)]
    if cohort.labels is not None:
        paths.append(cohort.labels)
    return paths


def stamps(paths: Iterable[Path]) -> dict[str, Stamp]:
    """Size and time of each file; those that are not there are left out."""
    found: dict[str, Stamp] = {}
    for path in paths:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            continue
        if stat.S_ISREG(status.st_mode):
            found[str(path)] = Stamp(status.st_size, status.st_mtime_ns)
    return found


def take_in(paths: Mapping[str, bool], seen: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, str]]:
    """What is seen of files now, and what is wrong with those that cannot be read.

    Parameters
    ----------
    paths : mapping of str to bool
        Path, and whether its content counts (a slide or mask, not a table).
    seen : polars.DataFrame
        Of :data:`SEEN_SCHEMA`: a file that had the same size and time is not read again. Of any
        other a quarter MB is.

    Returns
    -------
    polars.DataFrame
        Of :data:`SEEN_SCHEMA`, without the files that are not there or cannot be read.
    dict of str to str
        Path and reason.
    """
    known = {
        (path, size, modified): identity for path, size, modified, identity in seen.iter_rows()
    }
    rows: list[tuple[str, int, int, str | None]] = []
    problems: dict[str, str] = {}
    # the stamp comes first: what changes while its content is read differs at the next look
    for path, stamp in stamps(map(Path, paths)).items():
        identity = known.get((path, *stamp))
        if paths[path] and identity is None:
            try:
                identity = content_identity(Path(path))
            except SlideError as error:
                problems[path] = str(error)
                continue
        rows.append((path, *stamp, identity))
    return pl.DataFrame(rows, SEEN_SCHEMA, orient="row"), problems


def _mark(path: str, stamp: Stamp | None) -> str:
    # eight digits: the marks of ten thousand new slides travel in a sensor's cursor
    return hashlib.blake2b(f"{path}:{stamp}".encode(), digest_size=4).hexdigest()

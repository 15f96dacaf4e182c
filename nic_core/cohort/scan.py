"""Scan of the input files: which have changed, at the cost of one ``stat`` a file.

The store keeps a snapshot of every input file, taken when the slide index was last written. A scan
compares the files with that snapshot. A change counts once two scans in a row found the same state,
so that a file that is still being copied is left alone.
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

from nic_core.cohort.file import Cohort
from nic_core.cohort.index import folder_files, table_rows
from nic_core.slides.errors import SlideError
from nic_core.slides.identity import content_identity

SNAPSHOT_SCHEMA = pl.Schema(
    {
        "path": pl.String(),
        "size": pl.Int64(),  # bytes
        "modified": pl.Int64(),  # ns since 1970
        "identity": pl.String(),  # of the content; null for tables
    }
)


class Stamp(NamedTuple):
    """Size in bytes and time of modification in ns."""

    size: int
    modified: int


@dataclass(frozen=True)
class FileScan:
    """The result of one scan.

    Attributes
    ----------
    files
        Number of files.
    stable
        Paths that are new, changed or removed since the snapshot, and that the previous scan found
        in the same state.
    changing
        Paths that differ from the snapshot and from the previous scan: probably still being
        written.
    fingerprints
        One for each path that differs from the snapshot, for the next scan to compare with.
    """

    files: int
    stable: tuple[str, ...]
    changing: tuple[str, ...]
    fingerprints: tuple[str, ...]


def scan_files(
    cohort: Cohort, snapshot: pl.DataFrame, fingerprints: Collection[str] = ()
) -> FileScan:
    """Compare the cohort's slides, masks and tables with the snapshot of the last slide index.

    Parameters
    ----------
    snapshot : polars.DataFrame
        :data:`SNAPSHOT_SCHEMA`.
    fingerprints : collection of str
        Those of the previous scan.

    Raises
    ------
    CohortError
        A slide folder does not exist, or the slide table cannot be read.
    """
    now = stamps(watched_files(cohort))
    known = {
        path: Stamp(size, modified)
        for path, size, modified in snapshot.select("path", "size", "modified").iter_rows()
    }
    differing = {
        path: _fingerprint(path, now.get(path))
        for path in sorted(now.keys() | known.keys())
        if now.get(path) != known.get(path)
    }
    previous = set(fingerprints)
    return FileScan(
        files=len(now),
        stable=tuple(path for path, print_ in differing.items() if print_ in previous),
        changing=tuple(path for path, print_ in differing.items() if print_ not in previous),
        fingerprints=tuple(differing.values()),
    )


def watched_files(cohort: Cohort) -> list[Path]:
    """Every input file: slides, tissue masks, slide table, label table."""
    paths = [path for folder in cohort.slides.folders for path in folder_files(folder)]
    if cohort.slides.table is not None:
        paths.append(cohort.slides.table)
        for row in table_rows(cohort.slides.table):
            paths += [Path(str(row[column])) for column in ("path", "mask") if row.get(column)]
    if cohort.labels is not None:
        paths.append(cohort.labels)
    return paths


def stamps(paths: Iterable[Path]) -> dict[str, Stamp]:
    """Size and time of each file; files that do not exist are left out."""
    found: dict[str, Stamp] = {}
    for path in paths:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            continue
        if stat.S_ISREG(status.st_mode):
            found[str(path)] = Stamp(status.st_size, status.st_mtime_ns)
    return found


def take_snapshot(
    paths: Mapping[str, bool], previous: pl.DataFrame
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Size, time and identity of files, and the files that cannot be read.

    Parameters
    ----------
    paths : mapping of str to bool
        Path, and whether to compute the identity of its content (of slides and masks, not of
        tables).
    previous : polars.DataFrame
        :data:`SNAPSHOT_SCHEMA`. The identity of a file with unchanged size and time is taken from
        here; of any other file at most 0.25 MB are read.

    Returns
    -------
    polars.DataFrame
        :data:`SNAPSHOT_SCHEMA`, without files that do not exist or cannot be read.
    dict of str to str
        Unreadable path to reason.
    """
    known = {
        (path, size, modified): identity for path, size, modified, identity in previous.iter_rows()
    }
    rows: list[tuple[str, int, int, str | None]] = []
    problems: dict[str, str] = {}
    # the stamp is taken before the content is read: a change in between shows in the next scan
    for path, stamp in stamps(map(Path, paths)).items():
        identity = known.get((path, *stamp))
        if paths[path] and identity is None:
            try:
                identity = content_identity(Path(path))
            except SlideError as error:
                problems[path] = str(error)
                continue
        rows.append((path, *stamp, identity))
    return pl.DataFrame(rows, SNAPSHOT_SCHEMA, orient="row"), problems


def _fingerprint(path: str, stamp: Stamp | None) -> str:
    # eight digits: a sensor's cursor holds the fingerprints of ten thousand new slides
    return hashlib.blake2b(f"{path}:{stamp}".encode(), digest_size=4).hexdigest()

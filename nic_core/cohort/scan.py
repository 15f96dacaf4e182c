"""Scan the input files for changes, with one ``stat`` call per file.

The store has a snapshot of the input files, taken when the slide index was last written. A scan
compares the files with the snapshot. A change is reported as stable only if the previous scan found
the file in the same state, so that a file that is still being copied is not used.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import polars as pl

from nic_core.cohort.fields import CohortError
from nic_core.cohort.file import Cohort
from nic_core.cohort.index import folder_files, table_rows
from nic_core.cohort.slides import Slides
from nic_core.slides.errors import SlideError
from nic_core.slides.identity import content_identity
from nic_core.slides.remote import RemotePath, SlidePath, look_up, slide_path

SNAPSHOT_SCHEMA = pl.Schema(
    {
        "path": pl.String(),
        "size": pl.Int64(),  # bytes
        "modified": pl.Int64(),  # time of modification, ns since 1970
        "identity": pl.String(),  # content identity; null for all files but slides and masks
        "part_of": pl.String(),  # path of the slide to which the file belongs; null: to none
    }
)


class Stamp(NamedTuple):
    """Size (bytes) and time of modification (ns since 1970) of a file.

    Of a remote file see :class:`nic_core.slides.remote.RemoteStatus`.
    """

    size: int
    modified: int


@dataclass(frozen=True)
class FileScan:
    """The result of one scan.

    Attributes
    ----------
    files : int
        Number of existing input files.
    stable : tuple of str
        Paths that are new, changed or removed since the snapshot, and that the previous scan found
        in the same state.
    changing : tuple of str
        Paths that differ from both the snapshot and the previous scan: probably still being
        written.
    fingerprints : tuple of str
        Fingerprint of the state of each path that differs from the snapshot. Pass them to the next
        scan.
    """

    files: int
    stable: tuple[str, ...]
    changing: tuple[str, ...]
    fingerprints: tuple[str, ...]


def scan_files(
    cohort: Cohort,
    snapshot: pl.DataFrame,
    fingerprints: Collection[str] = (),
    *,
    further: Iterable[Path] = (),
) -> FileScan:
    """Compare the cohort's slides, masks and tables with the snapshot of the last slide index.

    Parameters
    ----------
    snapshot : polars.DataFrame
        :data:`SNAPSHOT_SCHEMA`.
    fingerprints : collection of str
        Fingerprints of the previous scan.
    further : iterable of Path
        Other files to compare.

    Raises
    ------
    CohortError
        A slide folder does not exist, or the slide table cannot be read.
    """
    parts = snapshot.drop_nulls("part_of")["path"]
    current = stamps({*watched_files(cohort), *further, *map(slide_path, parts)})
    recorded = {
        path: Stamp(size, modified)
        for path, size, modified in snapshot.select("path", "size", "modified").iter_rows()
    }
    differing = {
        path: _fingerprint(path, current.get(path))
        for path in sorted(current.keys() | recorded.keys())
        if current.get(path) != recorded.get(path)
    }
    previous = set(fingerprints)
    return FileScan(
        files=len(current),
        stable=tuple(path for path, state in differing.items() if state in previous),
        changing=tuple(path for path, state in differing.items() if state not in previous),
        fingerprints=tuple(differing.values()),
    )


def watched_files(cohort: Cohort) -> list[SlidePath]:
    """Return the paths of all scanned files: slides, tissue masks, slide tables and label tables.

    Those of the external cohorts are among them. No file but the slide tables is opened. In a
    folder these are all files that may be slides by their names.

    Raises
    ------
    CohortError
        A slide folder of the study does not exist, or its slide table cannot be read.
    """
    paths: list[SlidePath] = _slide_files(cohort.slides)
    if cohort.labels is not None:
        paths.append(cohort.labels)
    for external in cohort.external:
        paths.append(external.labels)
        try:
            paths += _slide_files(external.slides)
        except CohortError:  # its evaluation reports it; the study itself does not depend on it
            if external.slides.table is not None:
                paths.append(external.slides.table)
    # the time of a MIRAX slide's data folder shows that files were added to it
    return paths + [path.with_suffix("") for path in paths if path.suffix.lower() == ".mrxs"]


def _slide_files(slides: Slides) -> list[SlidePath]:
    """Return the slides and tissue masks of an entry ``slides``, and its slide table."""
    paths: list[SlidePath] = [p for folder in slides.folders for p in folder_files(folder)]
    if slides.table is not None:
        paths.append(slides.table)
        for row in table_rows(slides.table):
            paths += [
                slide_path(str(row[column])) for column in ("path", "mask") if row.get(column)
            ]
    return paths


def stamps(paths: Iterable[SlidePath]) -> dict[str, Stamp]:
    """Return size and time of each file, by path; missing files are left out.

    A folder (OME-Zarr) has size 0.
    """
    paths, result = list(paths), dict[str, Stamp]()
    look_up(path for path in paths if isinstance(path, RemotePath))
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if stat.S_ISREG(status.st_mode):
            result[str(path)] = Stamp(status.st_size, status.st_mtime_ns)
        elif stat.S_ISDIR(status.st_mode):
            result[str(path)] = Stamp(0, status.st_mtime_ns)
    return result


def take_snapshot(
    slides: Mapping[str, tuple[str, ...]], others: Iterable[str], previous: pl.DataFrame
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Record size, time and content identity of files.

    Parameters
    ----------
    slides : mapping of str to tuple of str
        Path of each slide and mask, and its other files.
    others : iterable of str
        Paths of files without an identity: tables, and files that are not slides.
    previous : polars.DataFrame
        :data:`SNAPSHOT_SCHEMA`. The identity of a slide whose files have unchanged sizes and times
        is copied from here. Of every other one, at most 0.25 MB are read, and the ends of its other
        files.

    Returns
    -------
    snapshot : polars.DataFrame
        :data:`SNAPSHOT_SCHEMA`, without files that are missing or unreadable.
    unreadable : dict of str to str
        Path to reason.
    """
    recorded = {
        path: (Stamp(size, modified), identity)
        for path, size, modified, identity, _ in previous.iter_rows()
    }
    owners = {part: path for path, parts in slides.items() for part in parts}
    # stamps are taken before contents are read, so that the next scan finds a change in between
    found = stamps(map(slide_path, dict.fromkeys([*slides, *owners, *others])))
    unreadable: dict[str, str] = {}
    rows: list[tuple[str, int, int, str | None, str | None]] = []
    for path, stamp in found.items():
        identity = None
        if path in slides:
            files = (path, *slides[path])
            if all(recorded.get(file, (None, None))[0] == found.get(file) for file in files):
                identity = recorded[path][1]
            try:
                identity = identity or content_identity(slide_path(path))
            except SlideError as error:
                unreadable[path] = str(error)
                continue
        rows.append((path, *stamp, identity, owners.get(path)))
    return pl.DataFrame(rows, SNAPSHOT_SCHEMA, orient="row"), unreadable


def _fingerprint(path: str, stamp: Stamp | None) -> str:
    # short, since the fingerprints of thousands of new slides must fit into the cursor of a sensor
    return hashlib.blake2b(f"{path}:{stamp}".encode(), digest_size=4).hexdigest()

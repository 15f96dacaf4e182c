"""Slide index: scan the cohort's files, and give a version to every input."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from nic_core.cohort import Cohort, CohortError, ImportedEncoder, PatchTask, RegisteredEncoder
from nic_core.cohort.index import missing_files, slide_index
from nic_core.cohort.scan import SNAPSHOT_SCHEMA, take_snapshot
from nic_core.encoders.patch_sources import source_files
from nic_core.models.labels import target_table
from nic_core.slides import Slide, content_identity, open_slide
from nic_core.store import Store, atomic_file


@dataclass(frozen=True)
class SlideScan:
    """The result of :func:`scan_slides`.

    Attributes
    ----------
    index
        The usable slides; see :func:`nic_core.cohort.index.slide_index`.
    versions
        Slide id to version: a digest of the file's content and of its row in the slide table.
    missing
        Slides with a file that does not exist or cannot be read, and the reason.
    removed
        Slides of the previous index that are no longer in this one.
    snapshot
        Size, time and identity of every file (:data:`nic_core.cohort.scan.SNAPSHOT_SCHEMA`).
    """

    index: pl.DataFrame
    versions: dict[str, str]
    missing: dict[str, str]
    removed: list[str]
    snapshot: pl.DataFrame


def make_slide_index(cohort: Cohort, store: Store) -> SlideScan:
    """Scan the cohort's slides and write the slide index; see :func:`scan_slides`."""
    scan = scan_slides(cohort, store)
    write_slide_index(store, scan)
    return scan


def scan_slides(
    cohort: Cohort,
    store: Store,
    *,
    ignore_paths: Collection[str] = (),
    rehash: bool = True,
    allow_missing_slides: bool = False,
) -> SlideScan:
    """Find the cohort's slides, and what changed since the index was last written.

    Parameters
    ----------
    ignore_paths : collection of str
        Files that are still being written. A new slide among them is left out; a known slide
        keeps its last state.
    rehash : bool
        Compute the content identity of every file again; otherwise only of files whose size or
        time changed.
    allow_missing_slides : bool
        Accept that more than half of the known slides are missing.

    Raises
    ------
    CohortError
        See :func:`nic_core.cohort.index.slide_index`; or more than half of the slides are missing.
    """
    before = pl.read_parquet(store.slide_index) if store.slide_index.exists() else None
    index = slide_index(cohort, allow_missing=True)
    previous = read_file_snapshot(store)
    tables = [str(table) for table in (cohort.slides.table, cohort.labels) if table is not None]
    files = [path for column in ("path", "mask") for path in index[column].drop_nulls()]
    hashed = {**dict.fromkeys(files, True), **dict.fromkeys(tables, False)}
    snapshot, unreadable = take_snapshot(
        {path: content for path, content in hashed.items() if path not in ignore_paths},
        previous.clear() if rehash else previous,
    )
    # a file that is still being written keeps its last state
    snapshot = pl.concat([snapshot, previous.filter(pl.col("path").is_in(list(ignore_paths)))])
    identity = dict(snapshot.select("path", "identity").iter_rows())
    missing = missing_files(index) | {
        slide: unreadable[path]
        for slide, *own in index.select("slide", "path", "mask").iter_rows()
        for path in own
        if path in unreadable
    }
    index = index.filter(
        ~pl.col("slide").is_in(list(missing)),
        pl.col("path").is_in(list(identity)),
        pl.col("mask").is_null() | pl.col("mask").is_in(list(identity)),
    )
    removed = [] if before is None else sorted(set(before["slide"]) - set(index["slide"]))
    many = before is not None and len(removed) > max(1, before.height / 2)
    if before is not None and many and not allow_missing_slides:
        raise CohortError(
            f"{len(removed)} of {before.height} slides are missing, for example {removed[0]}: is "
            "their folder mounted? If they were removed on purpose, materialize 'slide_index' "
            "with the configuration 'allow_missing_slides: true'"
        )
    if index.is_empty():
        raise CohortError(f"cohort '{cohort.name}': none of its slides can be read yet")
    versions = {
        slide: digest(identity[path], mpp, identity[mask] if mask else None)
        for slide, path, mpp, mask in index.select("slide", "path", "mpp", "mask").iter_rows()
    }
    return SlideScan(index, versions, missing, removed, snapshot)


def write_slide_index(store: Store, scan: SlideScan) -> None:
    """Write the slide index and the file snapshot to the store."""
    with atomic_file(store.slide_index) as path:
        scan.index.write_parquet(path)
    with atomic_file(store.file_snapshot) as path:
        scan.snapshot.write_parquet(path)


def read_slide_index(store: Store) -> pl.DataFrame:
    """The slide index that :func:`write_slide_index` wrote.

    Raises
    ------
    CohortError
        It does not exist yet.
    """
    if not store.slide_index.exists():
        raise CohortError(f"{store.slide_index} does not exist; materialize 'slide_index' first")
    return pl.read_parquet(store.slide_index)


def read_file_snapshot(store: Store) -> pl.DataFrame:
    """The file snapshot of the last scan; empty before the first one."""
    if not store.file_snapshot.exists():
        return pl.DataFrame(schema=SNAPSHOT_SCHEMA)
    return pl.read_parquet(store.file_snapshot)


def patch_task_versions(cohort: Cohort) -> dict[str, str]:
    """A version of every patch task (:func:`patch_task_version`)."""
    return {task.name: patch_task_version(task) for task in cohort.patch_tasks}


def patch_task_version(task: PatchTask) -> str:
    """Digest of a patch task's entry, its files, and the listing of its folder."""
    return digest(
        task,
        [content_identity(path) for path in source_files(task)],
        _listing(task.folder) if task.folder is not None else None,
    )


def encoder_versions(cohort: Cohort) -> dict[str, str]:
    """A version of every encoder: digest of its entry in the cohort file and of the file it names.

    Encoders of a registry are left out: only the registry knows their version.
    """
    return {
        encoder.name: digest(encoder, _listing(encoder.file))
        if isinstance(encoder, ImportedEncoder)
        else digest(encoder)
        for encoder in cohort.encoders
        if not isinstance(encoder, RegisteredEncoder)
    }


def target_versions(cohort: Cohort, index: pl.DataFrame) -> dict[str, str]:
    """A version of every target: digest of its entry and of the labels and splits it uses."""
    return {
        target.name: digest(target, target_table(cohort, target, index).rows())
        for target in cohort.targets
    }


def index_row(store: Store, slide: str) -> dict[str, Any]:
    """The row of a slide in the index.

    Raises
    ------
    CohortError
        The slide is not in the index.
    """
    rows = read_slide_index(store).filter(pl.col("slide") == slide)
    if rows.is_empty():
        raise CohortError(f"slide '{slide}' is not in the cohort; materialize 'slide_index' again")
    return rows.row(0, named=True)


def open_indexed(store: Store, slide: str) -> Slide:
    """Open a slide of the index, with the um/px that the slide table gives."""
    row = index_row(store, slide)
    return open_slide(Path(row["path"]), mpp=row["mpp"])


def digest(*parts: object) -> str:
    """A short, stable digest of objects with a complete ``repr``; 16 hexadecimal digits."""
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:16]


def _listing(place: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of a folder, or of one file; empty if it does not exist.

    Contents are not read: they may be thousands of images or gigabytes of weights.
    """
    paths = [place] if place.is_file() else place.rglob("*")
    return sorted(
        (str(path.relative_to(place)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in paths
        if path.is_file()
    )

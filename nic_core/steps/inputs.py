"""What the user provides: the slides that are there, and a version of every input."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from nic_core.cohort import Cohort, CohortError, PatchTask, ReadyEncoder, RegisteredEncoder
from nic_core.encoders.patch_sources import source_files
from nic_core.models.labels import target_table
from nic_core.slides import Slide, content_identity, open_slide
from nic_core.slides.index import absent_files, slide_index
from nic_core.slides.watch import SEEN_SCHEMA, take_in
from nic_core.store import Store, whole_file


@dataclass(frozen=True)
class Found:
    """What :func:`find_slides` found.

    Attributes
    ----------
    index
        The slides that are there; see :func:`nic_core.slides.index.slide_index`.
    versions
        Of each: its file's content, and what the slide table says of it.
    absent
        Slides of which a file is not there or cannot be read, with the reason.
    gone
        Slides that were in the index before, and are no more.
    seen
        What was seen of each file (:data:`nic_core.slides.watch.SEEN_SCHEMA`).
    """

    index: pl.DataFrame
    versions: dict[str, str]
    absent: dict[str, str]
    gone: list[str]
    seen: pl.DataFrame


def write_index(store: Store, index: pl.DataFrame) -> None:
    """Leave the slide index (:func:`nic_core.slides.index.slide_index`) in the store."""
    with whole_file(store.index) as path:
        index.write_parquet(path)


def read_index(store: Store) -> pl.DataFrame:
    """The slide index that :func:`write_index` left.

    Raises
    ------
    CohortError
        There is none yet.
    """
    if not store.index.exists():
        raise CohortError(f"{store.index} is missing; materialize 'slide_index' first")
    return pl.read_parquet(store.index)


def find_slides(
    cohort: Cohort,
    store: Store,
    *,
    leave: Collection[str] = (),
    reread: bool = True,
    accept_loss: bool = False,
) -> Found:
    """Find the cohort's slides and what changed since :func:`write_found` was last called.

    Parameters
    ----------
    leave : collection of str
        Paths that are still being written: a new slide waits, a known one stays as it was.
    reread : bool
        Read every file's identity anew; else only where its size or time has changed.
    accept_loss : bool
        More than half of the known slides may be gone.

    Raises
    ------
    CohortError
        See :func:`nic_core.slides.index.slide_index`; or most slides are gone at once.
    """
    before = pl.read_parquet(store.index) if store.index.exists() else None
    index = slide_index(cohort, absent=True)
    seen = read_seen(store)
    tables = [str(table) for table in (cohort.slides.table, cohort.labels) if table is not None]
    files = [path for column in ("path", "mask") for path in index[column].drop_nulls()]
    paths = {**dict.fromkeys(files, True), **dict.fromkeys(tables, False)}
    now, unreadable = take_in(
        {path: content for path, content in paths.items() if path not in leave},
        seen.clear() if reread else seen,
    )
    # of what is still being written, the state that was last taken in stands
    now = pl.concat([now, seen.filter(pl.col("path").is_in(list(leave)))])
    identity = dict(now.select("path", "identity").iter_rows())
    absent = absent_files(index) | {
        slide: unreadable[path]
        for slide, *own in index.select("slide", "path", "mask").iter_rows()
        for path in own
        if path in unreadable
    }
    index = index.filter(
        ~pl.col("slide").is_in(list(absent)),
        pl.col("path").is_in(list(identity)),
        pl.col("mask").is_null() | pl.col("mask").is_in(list(identity)),
    )
    gone = [] if before is None else sorted(set(before["slide"]) - set(index["slide"]))
    if before is not None and len(gone) > max(1, before.height / 2) and not accept_loss:
        raise CohortError(
            f"{len(gone)} of {before.height} slides are gone at once, {gone[0]} among them: is "
            "their folder mounted? If they were taken away, materialize 'slide_index' with the "
            "configuration 'accept_loss: true'"
        )
    if index.is_empty():
        raise CohortError(f"cohort '{cohort.name}': none of its slides can be read yet")
    versions = {
        slide: digest(identity[path], mpp, identity[mask] if mask else None)
        for slide, path, mpp, mask in index.select("slide", "path", "mpp", "mask").iter_rows()
    }
    return Found(index, versions, absent, gone, now)


def write_found(store: Store, found: Found) -> None:
    """Leave the slide index in the store, and what was seen of each file."""
    write_index(store, found.index)
    with whole_file(store.seen) as path:
        found.seen.write_parquet(path)


def read_seen(store: Store) -> pl.DataFrame:
    """What :func:`write_found` left of each file; empty where nobody has looked yet."""
    return pl.read_parquet(store.seen) if store.seen.exists() else pl.DataFrame(schema=SEEN_SCHEMA)


def patch_task_versions(cohort: Cohort) -> dict[str, str]:
    """A version for every patch task (:func:`patch_task_version`)."""
    return {task.name: patch_task_version(task) for task in cohort.patch_tasks}


def patch_task_version(task: PatchTask) -> str:
    """Of its entry, its files, and the listing of its folder."""
    return digest(
        task,
        [content_identity(path) for path in source_files(task)],
        _listing(task.folder) if task.folder is not None else None,
    )


def encoder_versions(cohort: Cohort) -> dict[str, str]:
    """A version for every encoder: its entry in the cohort file, and the file that it names.

    Not of those of a registry: what it holds is not known here.
    """
    return {
        encoder.name: digest(encoder, _listing(encoder.file))
        if isinstance(encoder, ReadyEncoder)
        else digest(encoder)
        for encoder in cohort.encoders
        if not isinstance(encoder, RegisteredEncoder)
    }


def target_versions(cohort: Cohort, index: pl.DataFrame) -> dict[str, str]:
    """A version for every target: its entry, and the labels and splits that it reads."""
    return {
        target.name: digest(target, target_table(cohort, target, index).rows())
        for target in cohort.targets
    }


def index_row(store: Store, slide: str) -> dict[str, Any]:
    """A slide's row of the index.

    Raises
    ------
    CohortError
        It is not there.
    """
    rows = read_index(store).filter(pl.col("slide") == slide)
    if rows.is_empty():
        raise CohortError(f"slide '{slide}' is not in the cohort; materialize 'slide_index' again")
    return rows.row(0, named=True)


def open_indexed(store: Store, slide: str) -> Slide:
    """Open a slide of the index, with the resolution that the slide table gives."""
    row = index_row(store, slide)
    return open_slide(Path(row["path"]), mpp=row["mpp"])


def digest(*parts: object) -> str:
    """A short stable digest of anything with a faithful ``repr``."""
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:16]


def _listing(place: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a folder's files, or of one file; none if there is no such place.

    Thousands of images, or gigabytes of weights, are not read for this.
    """
    paths = [place] if place.is_file() else place.rglob("*")
    return sorted(
        (str(path.relative_to(place)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in paths
        if path.is_file()
    )

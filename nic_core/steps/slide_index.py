"""Make the slide index: scan the cohort's files, and compute a version of every input."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from nic_core.cohort import (
    Cohort,
    CohortError,
    EncoderEntry,
    EncoderSpec,
    FeaturesEncoder,
    ImportedEncoder,
    PatchTask,
    RegisteredEncoder,
    ReusedEncoder,
    Target,
)
from nic_core.cohort.index import INDEX_SCHEMA, FoundSlides, find_slides, row_source
from nic_core.cohort.scan import SNAPSHOT_SCHEMA, take_snapshot, watched_files
from nic_core.encoders.folder_names import CARD
from nic_core.store import Store, atomic_file
from nic_core.types import Colours

if TYPE_CHECKING:
    from nic_core.models.fold_columns import FoldColumn
    from nic_core.slides import Slide
    from nic_core.slides.files import LeftAside

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlideScan:
    """The result of :func:`scan_slides`.

    Attributes
    ----------
    index : polars.DataFrame
        The usable slides (:data:`nic_core.cohort.index.INDEX_SCHEMA`).
    versions : dict of str to str
        Slide id to version: a digest of the content of slide and mask, of the slide's um/px and
        image number, and of the mask's origin.
    missing : dict of str to str
        Slide id to reason, for slides with a file that does not exist, is incomplete or cannot be
        read.
    left_aside : tuple of LeftAside
        Files of the cohort's folders that are not slides, with the reason.
    duplicates : tuple of tuple of str
        Ids of the slides that have the same content, for each such content.
    removed : list of str
        Slides of the previous index that are not in this one.
    snapshot : polars.DataFrame
        Size, time and content identity of every file
        (:data:`nic_core.cohort.scan.SNAPSHOT_SCHEMA`).
    """

    index: pl.DataFrame
    versions: dict[str, str]
    missing: dict[str, str]
    left_aside: tuple[LeftAside, ...]
    duplicates: tuple[tuple[str, ...], ...]
    removed: list[str]
    snapshot: pl.DataFrame


def make_slide_index(cohort: Cohort, store: Store) -> SlideScan:
    """Scan the cohort's slides and write the slide index.

    Raises
    ------
    CohortError
        See :func:`scan_slides`.
    """
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
    """List the usable slides of the cohort and compute their versions.

    Parameters
    ----------
    ignore_paths : collection of str
        Files that are still being written. A new slide among them is left out; a known slide keeps
        the state of the previous snapshot.
    rehash : bool
        Compute the content identity of every file; otherwise only of files whose size or time
        changed.
    allow_missing_slides : bool
        Accept that more than half of the slides of the previous index are missing.

    Raises
    ------
    CohortError
        More than half of the slides are missing, none can be read, or the slides are not valid
        (see :func:`nic_core.cohort.index.find_slides`).
    """
    from nic_core.slides.remote import slide_path

    previous_index = (
        pl.read_parquet(store.slide_index, glob=False) if store.slide_index.exists() else None
    )
    found = find_slides(cohort)
    index = found.index
    previous = read_file_snapshot(store)
    files = _parts(found) | _external_parts(cohort)
    busy = set(ignore_paths)
    waiting = {path for path, parts in files.items() if busy & {path, *parts}}
    # what is wrong with a slide that is still being written is not known yet
    problems = {
        slide: problem
        for slide, path in index.select("slide", "path").iter_rows()
        if (problem := found.problems.get(slide))
        and not (path in waiting and slide_path(path).exists())
    }
    unusable = set(index.filter(pl.col("slide").is_in(list(problems)))["path"])
    readable = {path: parts for path, parts in files.items() if path not in waiting | unusable}
    watched = [*watched_files(cohort), *initial_weight_files(cohort, store)]
    others = {str(path) for path in watched} - set(readable) - busy
    snapshot, unreadable = take_snapshot(readable, others, previous.clear() if rehash else previous)
    # a slide with a file that is still being written keeps the state of the previous snapshot
    kept = previous.filter(
        pl.col("path").is_in(list(busy | waiting)) | pl.col("part_of").is_in(list(waiting))
    )
    snapshot = pl.concat([snapshot.join(kept, on="path", how="anti"), kept])
    identity = dict(snapshot.drop_nulls("identity").select("path", "identity").iter_rows())
    missing = problems | {
        slide: unreadable[path]
        for slide, *paths in index.select("slide", "path", "mask").iter_rows()
        for path in paths
        if path in unreadable
    }
    index = index.filter(
        ~pl.col("slide").is_in(list(missing)),
        pl.col("path").is_in(list(identity)),
        pl.col("mask").is_null() | pl.col("mask").is_in(list(identity)),
    )
    known = [] if previous_index is None else previous_index["slide"].to_list()
    removed = sorted(set(known) - set(index["slide"]))
    if len(removed) > max(1, len(known) / 2) and not allow_missing_slides:
        raise CohortError(
            f"{len(removed)} of {len(known)} slides are missing, for example {removed[0]}: is "
            "their folder mounted? If they were removed on purpose, materialize 'slide_index' "
            "with the configuration 'allow_missing_slides: true'"
        )
    if index.is_empty():
        raise CohortError(
            f"cohort '{cohort.name}': no slide can be read; check the slide files, or wait until "
            "they are copied"
        )
    versions = {
        slide: digest(identity[path], mpp, image, identity[mask] if mask else None, origin)
        for slide, path, mpp, image, mask, origin in index.select(
            "slide", "path", "mpp", "image", "mask", "origin"
        ).iter_rows()
    }
    duplicates = same_content(index, snapshot)
    return SlideScan(index, versions, missing, found.left_aside, duplicates, removed, snapshot)


def _parts(found: FoundSlides) -> dict[str, tuple[str, ...]]:
    """Return each slide and mask, and its other files."""
    paths = (*found.index["path"], *found.index["mask"].drop_nulls())
    return {path: found.parts.get(path, ()) for path in paths}


def _external_parts(cohort: Cohort) -> dict[str, tuple[str, ...]]:
    """Return each usable slide and mask of the external cohorts, and its other files."""
    files: dict[str, tuple[str, ...]] = {}
    for entry in cohort.external:
        try:
            found = find_slides(entry)
        except CohortError:  # in the version of the cohort, and reported by its evaluation
            continue
        usable = found.index.filter(~pl.col("slide").is_in(list(found.problems)))
        files |= _parts(replace(found, index=usable))
    return files


def same_content(index: pl.DataFrame, identities: pl.DataFrame) -> tuple[tuple[str, ...], ...]:
    """Return the ids of the slides with the same content, for each such content.

    Slides that name different images of one content are different.

    Parameters
    ----------
    index : polars.DataFrame
        :data:`nic_core.cohort.index.INDEX_SCHEMA`.
    identities : polars.DataFrame
        Columns ``path`` and ``identity``.
    """
    # a slide that names no image may be any of them
    images = pl.when(pl.col("image").is_null().any().over("identity")).then(None).otherwise("image")
    found = (
        index.select("slide", "path", "image")
        .join(identities.drop_nulls("identity").select("path", "identity"), on="path")
        .sort("slide")
        .group_by("identity", images.alias("image"), maintain_order=True)
        .agg("slide")
        .filter(pl.col("slide").list.len() > 1)
    )
    return tuple(tuple(slides) for slides in found["slide"])


def patient_groups(index: pl.DataFrame, duplicates: Iterable[Sequence[str]]) -> dict[str, str]:
    """Return the group of each patient that shares slides with another: folds keep groups whole.

    Parameters
    ----------
    index : polars.DataFrame
        :data:`nic_core.cohort.index.INDEX_SCHEMA`.
    duplicates : iterable of sequence of str
        Slides with the same content (:func:`same_content`).

    Returns
    -------
    dict of str to str
        Patient to group, which is the first of its patients. Patients without a shared slide are
        left out: each is its own group.
    """
    patient_of = dict(index.select("slide", "patient").iter_rows())
    patients = [sorted({patient_of[slide] for slide in slides}) for slides in duplicates]
    group: dict[str, str] = {}
    for shared in patients:
        joined = {group.get(patient, patient) for patient in shared}
        members = {p for p, first in group.items() if first in joined} | set(shared)
        group |= dict.fromkeys(members, min(joined | members))
    return {
        patient: first for patient, first in group.items() if list(group.values()).count(first) > 1
    }


def read_patient_groups(store: Store) -> dict[str, str]:
    """Return the :func:`patient_groups` of the stored slide index, without excluded slides.

    Raises
    ------
    CohortError
        The slide index does not exist yet.
    """
    index = used_slides(read_slide_index(store))
    return patient_groups(index, same_content(index, read_file_snapshot(store)))


def write_slide_index(store: Store, scan: SlideScan) -> None:
    """Write the slide index and the file snapshot to the store.

    Raises
    ------
    StoreError
        A file cannot be written.
    """
    with atomic_file(store.slide_index) as path:
        scan.index.write_parquet(path)
    with atomic_file(store.file_snapshot) as path:
        scan.snapshot.write_parquet(path)


def read_table_of(path: Path, missing: str) -> pl.DataFrame:
    """Read a table of the store.

    Raises
    ------
    CohortError
        It does not exist yet; ``missing`` is the message.
    """
    if not path.exists():
        raise CohortError(missing)
    return pl.read_parquet(path, glob=False)


def read_slide_index(store: Store) -> pl.DataFrame:
    """Read the slide index that :func:`write_slide_index` wrote.

    Returns
    -------
    polars.DataFrame
        :data:`nic_core.cohort.index.INDEX_SCHEMA`.

    Raises
    ------
    CohortError
        The slide index does not exist yet, or has the columns of another version.
    """
    index = read_table_of(
        store.slide_index, f"{store.slide_index} does not exist; materialize 'slide_index' first"
    )
    if index.schema != pl.Schema(INDEX_SCHEMA):
        raise CohortError(
            f"{store.slide_index} has the columns of another version; "
            "materialize 'slide_index' again"
        )
    return index


def used_slides(index: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of a slide index that are not excluded."""
    return index.filter(pl.col("exclude").is_null())


def excluded_slides(index: pl.DataFrame) -> dict[str, str]:
    """Return the excluded slides of a slide index: slide id to reason."""
    return dict(index.drop_nulls("exclude").select("slide", "exclude").iter_rows())


def read_file_snapshot(store: Store) -> pl.DataFrame:
    """Read the file snapshot of the last slide index; empty before the first one.

    Returns
    -------
    polars.DataFrame
        :data:`nic_core.cohort.scan.SNAPSHOT_SCHEMA`.

    Raises
    ------
    CohortError
        Another version of this project wrote the snapshot.
    """
    if not store.file_snapshot.exists():
        return pl.DataFrame(schema=SNAPSHOT_SCHEMA)
    snapshot = pl.read_parquet(store.file_snapshot, glob=False)
    if snapshot.schema != SNAPSHOT_SCHEMA:
        raise CohortError(
            f"{store.file_snapshot}: another version wrote it; delete the file and materialize "
            "'slide_index' again"
        )
    return snapshot


def patch_task_versions(cohort: Cohort) -> dict[str, str]:
    """Return the version of every patch task by name (:func:`patch_task_version`)."""
    return {task.name: patch_task_version(task) for task in cohort.patch_tasks}


def patch_task_version(task: PatchTask) -> str:
    """Return a digest of a patch task's entry, its files, and the file list of its folder.

    Raises
    ------
    CohortError, SlideError
        A file of the task cannot be read.
    """
    from nic_core.encoders.patch_sources import source_files
    from nic_core.slides import content_identity

    return digest(
        task,
        [content_identity(path) for path in source_files(task)],
        _listing(task.folder) if task.folder is not None else None,
    )


def encoder_versions(cohort: Cohort, store: Store) -> dict[str, str]:
    """Return a version of every encoder by name.

    It is a digest of the encoder's entry with the settings that apply to it, and of the file that
    it imports or the weights that it reuses or starts from, if any. Weights that are not made yet,
    or cannot be read, have a version too, of the problem: the encoder's own materialization reports
    it. Encoders of the registry, and those that start from one, are left out, since only the
    registry has their version.
    """
    versions = {}
    for encoder in cohort.encoders:
        parts: list[object] = [encoder, cohort.geometry(encoder.name)]
        match encoder:
            case RegisteredEncoder():
                continue
            case ImportedEncoder():
                parts.append(_listing(encoder.file))
            case FeaturesEncoder():
                parts.append(_listing(encoder.folder))
            case EncoderSpec():
                if encoder.registered_start is not None:
                    continue
                parts.append(encoder.embedding_size or cohort.settings.embedding_size)
        if (place := _base_place(encoder, store)) is not None:
            parts.append(_weights_or_problem(place))
        versions[encoder.name] = digest(*parts)
    return versions


def encoder_bases(cohort: Cohort) -> dict[str, str]:
    """Return the encoder of the study that each encoder reuses or starts from, by name."""
    bases = {encoder.name: _base(encoder) for encoder in cohort.encoders}
    return {name: base for name, base in bases.items() if base is not None}


def initial_weight_files(cohort: Cohort, store: Store) -> list[Path]:
    """Return the files whose change shows that initial or reused weights changed.

    They are the cards of encoder folders, and Keras files.
    """
    places = [place for entry in cohort.encoders if (place := _base_place(entry, store))]
    return [place if place.is_file() else place / CARD for place in places]


def _base_place(encoder: EncoderEntry, store: Store) -> Path | None:
    """File or folder of the weights that an encoder reuses or starts from; None without one."""
    if (base := _base(encoder)) is not None:
        return store.encoder(base)
    start = encoder.initial_weights if isinstance(encoder, EncoderSpec) else None
    return None if start is None else start.file


def _base(encoder: EncoderEntry) -> str | None:
    """Name of the encoder of the study that an encoder reuses or starts from; None without one."""
    if isinstance(encoder, ReusedEncoder):
        return encoder.encoder
    start = encoder.initial_weights if isinstance(encoder, EncoderSpec) else None
    return None if start is None else start.encoder


def _weights_or_problem(place: Path) -> str:
    from nic_core.encoders import EncoderError, initial_weights_version

    try:
        return initial_weights_version(place)
    except EncoderError as error:  # reported when the weights are used
        return str(error)


def target_versions(cohort: Cohort, scan: SlideScan) -> dict[str, str]:
    """Return a version of every target by name: a digest of its entry, labels, splits and groups.

    The sites of its patients are part of it, and for ``settings.models.folds: given`` their folds.
    The groups are those of the patients that share slides (:func:`patient_groups`). Excluded slides
    have no part in it. A target whose labels are invalid has a version too, of the problem: it
    stops its own folds, which report it, and nothing else.
    """
    used = used_slides(scan.index)
    groups = sorted(patient_groups(used, same_content(used, scan.snapshot)).items())
    return {
        target.name: digest(target, _labels_or_problem(cohort, target, scan.index), *groups)
        for target in cohort.targets
    }


def _labels_or_problem(cohort: Cohort, target: Target, index: pl.DataFrame) -> object:
    from nic_core.models.fold_columns import read_fold_column
    from nic_core.models.labels import read_labels, target_table

    try:
        used = used_slides(index)
        table = target_table(target, read_labels(cohort, target, index), used)
        columns: list[FoldColumn] = ["site"]
        if cohort.settings.models.folds == "given":
            columns.append("fold")
        patients = table["patient"].implode()
        return table.rows(), [
            read_fold_column(cohort, used, column)
            .filter(pl.col("patient").is_in(patients))
            .drop_nulls(column)
            .rows()
            for column in columns
        ]
    except CohortError as error:
        log.warning("%s", error)
        return str(error)


def index_row(store: Store, slide: str) -> dict[str, Any]:
    """Return the row of a slide in the slide index.

    Raises
    ------
    CohortError
        The slide is not in the slide index.
    """
    rows = read_slide_index(store).filter(pl.col("slide") == slide)
    if rows.is_empty():
        raise CohortError(f"slide '{slide}' is not in the cohort; materialize 'slide_index' again")
    return rows.row(0, named=True)


def open_indexed(store: Store, slide: str, *, colours: Colours = "stored") -> Slide:
    """Open a slide of the slide index, with the um/px and the image of the slide table.

    Raises
    ------
    CohortError
        The slide is not in the slide index.
    SlideError
        The slide cannot be used.
    """
    from nic_core.slides import open_source

    return open_source(row_source(index_row(store, slide)), colours=colours)


def digest(*parts: object) -> str:
    """Return a digest of objects, whose ``repr`` must be complete; 16 hexadecimal digits."""
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:16]


def _listing(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of a folder, or of one file; empty if it does not exist.

    Contents are not read, since there may be thousands of images or gigabytes of weights.
    """
    files = [path] if path.is_file() else path.rglob("*")
    return sorted(
        (str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
        if file.is_file()
    )

"""Sources of labelled images: tables, one folder per class, HDF5 files, annotated slides.

A source is a listing and a function that reads the image of one row. Images are read lazily.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import polars as pl

from nic_core.cohort import AnnotatedSlides, CohortError, Geometry, Hdf5Images, PatchTask
from nic_core.cohort.tables import existing_path, read_table, require_columns, to_numbers
from nic_core.libvips import pyvips
from nic_core.slides import Slide, SlideError, open_slide
from nic_core.slides.resample import resample, snap_to_whole
from nic_core.tiling.annotations import (
    NO_CLASS,
    Annotations,
    placed,
    read_annotations,
    unused_features,
)
from nic_core.tiling.mask_files import check_mask, read_mask
from nic_core.tiling.patches import patch_table
from nic_core.tiling.regions import Region, label_patches, tissue_fraction
from nic_core.tiling.tissue import TissueMask, tissue_mask
from nic_core.types import Origin, Pixels

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_OPTIONAL = ("split", "mpp", "image", "mask", "origin")  # columns of a table
# holds a chunk of PatchCamelyon, so that reading image by image decompresses each chunk once
_CHUNK_CACHE = 64 * 2**20  # bytes


# findings on the annotations of slides; each kind is one of `patch_tasks.FINDING_KINDS`
ANNOTATION_FINDINGS_SCHEMA: dict[str, pl.DataType] = {
    "kind": pl.String(),
    "label": pl.String(),
    "source": pl.String(),  # annotation file
    "detail": pl.String(),
}
_MIN_IN_TISSUE = 0.5  # of a region's area; those with less are reported [choice]
_FEATURES_SHOWN = 10  # in a finding


class ImageError(ValueError):
    """An image of a source cannot be read."""


@dataclass(frozen=True)
class PatchSource:
    """Labelled images of a patch task.

    Attributes
    ----------
    listing : polars.DataFrame
        One row per image, sorted by source: source (path, for messages), x, y (level-0 px in a
        slide, else 0), grid_row, grid_column (cell of the patch grid of a slide, else 0), label,
        group and, if the source has one, split.
    read : callable
        Maps a row number to uint8 RGB (H, W, 3); thread-safe; raises :class:`ImageError`.
    scale : float
        Factor from the images' own resolution to the study's.
    findings : polars.DataFrame
        Annotations that are not used or are doubtful (:data:`ANNOTATION_FINDINGS_SCHEMA`).
    """

    listing: pl.DataFrame
    read: Callable[[int], Pixels]
    scale: float
    findings: pl.DataFrame = field(
        default_factory=lambda: pl.DataFrame(schema=ANNOTATION_FINDINGS_SCHEMA)
    )


@contextmanager
def open_source(
    task: PatchTask, *, patch: int, mpp: float, tissue: float, seed: int
) -> Iterator[PatchSource]:
    """List the images of a task; files stay open inside the ``with`` block.

    Parameters
    ----------
    task : PatchTask
        Entry of the cohort file.
    patch, mpp, tissue
        Patch size (px), resolution (um/px) and minimum tissue fraction of a cell; they
        define the grid of annotated slides.
    seed : int
        Of the random choice if a slide has more than ``slides.max_per_slide`` patches of a class.

    Raises
    ------
    CohortError
        A table, column, folder or file is missing or invalid, or a class is empty; the message
        names it and the task.
    """
    scale = 1.0 if task.mpp is None or task.mpp == "unknown" else task.mpp / mpp
    if task.slides is not None:
        with ExitStack() as stack:
            yield _annotated_slides(task, task.slides, stack, patch, mpp, tissue, seed)
    elif task.hdf5:
        with ExitStack() as stack:
            yield _hdf5(task, scale, stack)
    else:
        listing = _list_folder(task) if task.folder is not None else _list_table(task)
        paths = [Path(source) for source in listing["source"]]
        if missing := [path for path in paths if not path.exists()]:
            raise task_error(
                task,
                f"{len(missing)} image(s) do not exist; the first is {missing[0]}; correct the "
                "paths or remove the rows",
            )
        yield PatchSource(listing, lambda row: read_image(paths[row]), scale)


def source_files(task: PatchTask) -> list[Path]:
    """Return the files of a source, except the images that a table or a folder names."""
    if task.slides is not None:
        table = _read_table(task, task.slides.table, (task.path_column, "annotations"))
        columns = (task.path_column, "annotations", *(["mask"] if "mask" in table.columns else []))
        named = [path for column in columns for path in table[column] if path]
        base = task.slides.table.parent
        return [task.slides.table, *(existing_path(base / path) for path in named)]
    parts = (path for part in task.hdf5 for path in (part.images, part.labels, part.meta))
    return [path for path in (task.table, *parts) if path is not None]


def task_error(task: PatchTask, problem: str) -> CohortError:
    """Return an error that names the task."""
    return CohortError(f"patch task '{task.name}': {problem}")


# --- images ----------------------------------------------------------------------------------


def read_image(path: Path) -> Pixels:
    """Read an image file as uint8 RGB (H, W, 3); transparent pixels become white.

    Raises
    ------
    ImageError
        The file is missing, not an image, or truncated.
    """
    try:
        image = pyvips.Image.new_from_file(str(path), fail_on="truncated").colourspace("srgb")
        if image.hasalpha():  # colourspace() made it 8 bits, so white is 255
            image = image.flatten(background=[255])
        return np.ascontiguousarray(image.cast("uchar").numpy())
    except pyvips.Error as error:
        raise ImageError(str(error).strip().splitlines()[-1]) from error


def rescale(image: Pixels, scale: float) -> Pixels:
    """Multiply the sides of an image (H, W, 3) by ``scale``, rounded down to whole pixels.

    Reductions are means over areas, enlargements are linear (:mod:`nic_core.slides.resample`). A
    scale within 0.001 of 1 is taken as 1, and a deficit of 0.01 px is taken as rounding.
    """
    height, width = (scaled_side(side, scale) for side in image.shape[:2])
    if (height, width) == image.shape[:2]:
        return image
    start, step = snap_to_whole(0.0, 1 / scale)
    return resample(image, (start, start), step, (width, height))


def scaled_side(side: int, scale: float) -> int:
    """Return the side after :func:`rescale`, px."""
    return side if abs(scale - 1) < 1e-3 else max(1, int(side * scale + 1e-2))


# --- tables and folders ----------------------------------------------------------------------


def _list_folder(task: PatchTask) -> pl.DataFrame:
    """List all images in the subfolders, sorted by path."""
    assert task.folder is not None
    if not task.folder.is_dir():
        raise task_error(task, f"folder {task.folder} does not exist")
    folders = sorted(path for path in task.folder.iterdir() if path.is_dir())
    if not folders:
        raise task_error(task, f"{task.folder} has no subfolders; make one folder per class")
    rows: list[tuple[str, str, str]] = []
    for folder in folders:
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise task_error(
                task, f"class '{folder.name}' has no image in {folder}; add images or remove it"
            )
        rows += [(str(file), folder.name, _group_of(task, file)) for file in files]
    return _at_origin(pl.DataFrame(rows, schema=["source", "label", "group"], orient="row"))


def _group_of(task: PatchTask, file: Path) -> str:
    if task.group_pattern is None:
        return str(file)
    try:
        found = re.search(task.group_pattern, file.name)
        if found is not None:
            return found["group"]
    except (re.error, IndexError) as error:
        raise task_error(
            task,
            f"group_pattern '{task.group_pattern}' has no named group (?P<group>...) ({error})",
        ) from error
    raise task_error(
        task, f"group_pattern '{task.group_pattern}' does not match the name of {file}"
    )


def _list_table(task: PatchTask) -> pl.DataFrame:
    """List the rows that match ``where``, sorted by path."""
    assert task.table is not None
    columns = (task.path_column, task.label_column, task.group_column, *task.where)
    table = _read_table(task, task.table, columns)
    for column, value in task.where.items():
        table = table.filter(pl.col(column) == value)
    if table.is_empty():
        raise task_error(task, f"table {task.table} has no row that matches 'where' {task.where}")
    _refuse_empty(task, task.table, table, (task.path_column, task.label_column))
    base = task.table.parent
    listing = pl.DataFrame(
        {
            "source": pl.Series(
                [str(existing_path(base / path)) for path in table[task.path_column]]
            ),
            "label": table[task.label_column],
        }
    )
    listing = listing.with_columns(_groups(task, table, listing["source"]))
    if "split" in table.columns:
        listing = listing.with_columns(split=table["split"])
    return _at_origin(listing.sort("source"))


def _read_table(task: PatchTask, path: Path, columns: Sequence[str | None]) -> pl.DataFrame:
    """Read a CSV or parquet table as text, so that an id such as 007 keeps its zeros."""
    try:
        table = read_table(path, "table")
        require_columns(table, [column for column in columns if column], path, "table")
    except CohortError as error:
        raise task_error(task, str(error)) from error
    # other columns may have any type
    used = {*columns, *_OPTIONAL} & set(table.columns)
    try:
        return table.select(pl.col(name).cast(pl.String) for name in table.columns if name in used)
    except pl.exceptions.PolarsError as error:
        raise task_error(
            task, f"table {path} has a column that cannot be read as text: {error}"
        ) from error


def _refuse_empty(task: PatchTask, path: Path, table: pl.DataFrame, columns: Sequence[str]) -> None:
    for column in columns:
        if (empty := table[column].is_null() | (table[column] == "")).any():
            raise task_error(
                task,
                f"table {path}: {int(empty.sum())} of the rows used have an empty '{column}'; "
                f"the first is row {empty.arg_true()[0] + 1} of them",
            )


def _groups(task: PatchTask, table: pl.DataFrame | None, source: pl.Series) -> pl.Series:
    """Return the group column; a row without a group gets its source, which stands for unknown."""
    if table is None or task.group_column is None:
        return source.alias("group")
    group = table[task.group_column]
    return group.set(group == "", None).fill_null(source).alias("group")


def _at_origin(listing: pl.DataFrame) -> pl.DataFrame:
    return listing.with_columns(
        pl.lit(0, pl.Int64).alias(name) for name in ("x", "y", "grid_row", "grid_column")
    )


# --- HDF5 ------------------------------------------------------------------------------------


def _hdf5(task: PatchTask, scale: float, stack: ExitStack) -> PatchSource:
    parts = [_open_part(task, part, stack) for part in task.hdf5]
    ends = np.cumsum([len(images) for images, _ in parts])

    def read(row: int) -> Pixels:
        part = int(np.searchsorted(ends, row, side="right"))
        images, _ = parts[part]
        try:
            pixels: Pixels = images[row - (ends[part - 1] if part else 0)]
        except (OSError, ValueError) as error:
            raise ImageError(str(error)) from error
        return pixels

    return PatchSource(_at_origin(pl.concat([rows for _, rows in parts])), read, scale)


def _open_part(
    task: PatchTask, part: Hdf5Images, stack: ExitStack
) -> tuple[h5py.Dataset, pl.DataFrame]:
    assert task.classes is not None
    images = _dataset(task, part.images, "x", stack)
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise task_error(
            task,
            f"{part.images}: dataset 'x' is {images.dtype} {images.shape}; it must be uint8 "
            "(N, H, W, 3)",
        )
    numbers = np.asarray(_dataset(task, part.labels, "y", stack)[:]).reshape(-1)
    if len(numbers) != len(images):
        raise task_error(
            task,
            f"{part.images} has {len(images)} images, but {part.labels} has {len(numbers)} labels",
        )
    known = range(len(task.classes))
    if wrong := sorted(set(numbers.tolist()) - set(known)):
        raise task_error(
            task,
            f"{part.labels}: class number {wrong[0]} is not in 'classes', which names the numbers "
            f"0 to {len(known) - 1}",
        )
    source = pl.Series("source", [f"{part.images}#{number}" for number in range(len(images))])
    meta = None
    if part.meta is not None:
        meta = _read_table(task, part.meta, (task.group_column,))
        if len(meta) != len(images):
            raise task_error(
                task,
                f"{part.meta} has {len(meta)} rows, but {part.images} has {len(images)} images",
            )
    rows = pl.DataFrame(
        [
            source,
            pl.Series("label", [task.classes[int(number)] for number in numbers]),
            _groups(task, meta, source),
        ]
    )
    if part.split is not None:
        rows = rows.with_columns(split=pl.lit(part.split))
    return images, rows


def _dataset(task: PatchTask, path: Path, name: str, stack: ExitStack) -> h5py.Dataset:
    try:
        file = stack.enter_context(h5py.File(path, "r", rdcc_nbytes=_CHUNK_CACHE))
    except OSError as error:
        hint = "; decompress it with gunzip" if path.suffix == ".gz" else ""
        raise task_error(task, f"{path} cannot be read as HDF5 ({error}){hint}") from error
    found: Any = file.get(name)
    if not isinstance(found, h5py.Dataset):
        raise task_error(task, f"{path} has no dataset '{name}'; it has {sorted(file)}")
    return found


# --- annotated slides ------------------------------------------------------------------------


def _annotated_slides(
    task: PatchTask,
    about: AnnotatedSlides,
    stack: ExitStack,
    patch: int,
    mpp: float,
    tissue: float,
    seed: int,
) -> PatchSource:
    table = _read_table(task, about.table, (task.path_column, "annotations", task.group_column))
    # with a background label, a slide without annotations is all background
    required = [task.path_column, *([] if about.background_label is not None else ["annotations"])]
    if table.is_empty():
        raise task_error(task, f"table {about.table} has no slide")
    _refuse_empty(task, about.table, table, required)
    groups = _groups(task, table, table[task.path_column])
    slides: dict[str, Slide] = {}
    parts: list[pl.DataFrame] = []
    findings = [pl.DataFrame(schema=ANNOTATION_FINDINGS_SCHEMA)]
    for row, group in zip(table.iter_rows(named=True), groups, strict=True):
        path = existing_path(about.table.parent / row[task.path_column])
        if str(path) in slides:
            raise task_error(task, f"table {about.table} lists {path} more than once")
        try:
            slide = stack.enter_context(_open_row(path, row))
            cells, found = _labelled_cells(about, row, slide, patch, mpp, tissue)
        except (SlideError, ValueError) as error:
            raise task_error(task, str(error)) from error
        if task.classes is not None:
            cells = cells.filter(pl.col("label").is_in(task.classes))
        slides[str(path)] = slide
        findings.append(found)
        rows = _draw(cells, about.max_per_slide, path.name, seed).with_columns(
            source=pl.lit(str(path)), group=pl.lit(group)
        )
        if "split" in table.columns:
            rows = rows.with_columns(split=pl.lit(row["split"], pl.String))
        parts.append(rows)
    cells = pl.concat(parts)
    if cells.is_empty():
        why = [f"{row['source']}: {row['detail']}" for row in pl.concat(findings).to_dicts()]
        raise task_error(
            task,
            f"no tissue cell of the slides in {about.table} is covered by an annotated region"
            f"{f' ({why[0]})' if why else ''}; check the annotations or lower 'min_coverage'",
        )
    places = cells.select("source", "x", "y").rows()

    def read(number: int) -> Pixels:
        source, x, y = places[number]
        try:
            return slides[source].read(x, y, patch, patch, mpp)
        except SlideError as error:
            raise ImageError(str(error)) from error

    listing = cells.with_columns(pl.col("x", "y").round().cast(pl.Int64))
    return PatchSource(listing, read, 1.0, pl.concat(findings))


def annotated_slide_problems(task: PatchTask, absent: Collection[Path]) -> Iterator[str]:
    """Yield what is wrong with slides, annotations and masks of a task, without labelling cells.

    Parameters
    ----------
    absent : collection of Path
        Files of the task that do not exist; they are not opened.

    Raises
    ------
    CohortError
        The table cannot be read, or lacks a column.
    """
    assert task.slides is not None
    about, base = task.slides, task.slides.table.parent
    table = _read_table(task, about.table, (task.path_column, "annotations", task.group_column))
    columns = (task.path_column, "annotations", "mask")
    for row in table.iter_rows(named=True):
        slide, drawn, mask = (existing_path(base / row[c]) if row.get(c) else None for c in columns)
        try:
            origin = _origin(row)
            if drawn is not None and drawn not in absent:
                read_annotations(drawn)
            if slide is None or slide in absent:
                continue
            with _open_row(slide, row) as opened:
                if mask is not None and mask not in absent:
                    check_mask(mask, opened, origin=origin or about.origin)
        except (SlideError, ValueError) as error:
            yield str(error)


def annotated_rows(task: PatchTask) -> dict[Path, dict[str, str | None]]:
    """Return the rows of a task's table of annotated slides by the path of the slide.

    Rows without annotations are left out, and tasks of other sources have none.

    Raises
    ------
    CohortError
        The table cannot be read, or lacks a column.
    """
    if task.slides is None:
        return {}
    table = task.slides.table
    columns = (task.path_column, "annotations", task.group_column)
    return {
        existing_path(table.parent / str(row[task.path_column])).resolve(): row
        for row in _read_table(task, table, columns).iter_rows(named=True)
        if row["annotations"]
    }


def row_regions(task: PatchTask, row: dict[str, str | None], slide: Slide) -> tuple[Region, ...]:
    """Return the regions of a row of :func:`annotated_rows` on its slide, level-0 px.

    Raises
    ------
    SlideError
        The annotations cannot be read, or it is not known what their coordinates count from.
    ValueError
        The column ``origin`` has another value than ``level0`` and ``bounds``.
    """
    assert task.slides is not None
    return placed(
        _read_renamed(task.slides, str(row["annotations"])),
        slide,
        tuple,
        lambda one, other: False,  # they have an area, so another origin is another place
        origin=_origin(row),
        default=task.slides.origin,
    )


def _read_renamed(about: AnnotatedSlides, drawn: str) -> Annotations:
    """Read the annotations of a row, with the labels that the entry gives them."""
    annotations = read_annotations(existing_path(about.table.parent / drawn))
    return replace(
        annotations,
        regions=tuple(
            replace(region, label=about.rename.get(region.label, region.label))
            for region in annotations.regions
        ),
    )


def _open_row(path: Path, row: dict[str, str | None]) -> Slide:
    """Open the slide of a row; raises SlideError, or ValueError for a wrong number."""
    numbers: dict[str, float | None] = {}
    for column in ("mpp", "image"):
        try:
            numbers[column] = to_numbers(pl.Series([row.get(column)], dtype=pl.String))[0]
        except ValueError as error:
            raise ValueError(f"{path}: column '{column}': {error}") from error
    image = numbers["image"]
    if image is not None and not image.is_integer():
        raise ValueError(f"{path}: column 'image': '{row['image']}' is not a whole number")
    return open_slide(path, mpp=numbers["mpp"], image=None if image is None else int(image))


def _labelled_cells(
    about: AnnotatedSlides,
    row: dict[str, str | None],
    slide: Slide,
    patch: int,
    mpp: float,
    tissue: float,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Label the tissue cells of a slide.

    Returns
    -------
    cells : polars.DataFrame
        x, y (level-0 px), grid_row, grid_column, label.
    findings : polars.DataFrame
        :data:`ANNOTATION_FINDINGS_SCHEMA`.
    """
    base = about.table.parent
    mask_file, drawn, origin = row.get("mask"), row["annotations"], _origin(row)
    mask = (
        read_mask(
            existing_path(base / mask_file), slide, origin=origin, default_origin=about.origin
        )
        if mask_file
        else tissue_mask(slide)
    )
    cells = patch_table(slide.path.stem, slide, mask, Geometry(patch, mpp, patch), tissue=tissue)

    def label(regions: Sequence[Region]) -> tuple[pl.DataFrame, Sequence[Region]]:
        labels = label_patches(cells, regions, min_coverage=about.min_coverage)
        labelled = cells.hstack(labels.select("label", "touched")).with_columns(
            label=pl.coalesce(
                "label", pl.when(~pl.col("touched")).then(pl.lit(about.background_label))
            )
        )
        kept = labelled.filter(pl.col("kept") & pl.col("label").is_not_null()).select(
            "x", "y", pl.col("row", "column").cast(pl.Int64).name.prefix("grid_"), "label"
        )
        return kept, regions

    if not drawn:
        return label([])[0], pl.DataFrame(schema=ANNOTATION_FINDINGS_SCHEMA)
    renamed = _read_renamed(about, drawn)
    labelled, regions = placed(
        renamed,
        slide,
        label,
        lambda one, other: one[0].equals(other[0]),
        origin=origin,
        default=about.origin,
    )
    return labelled, _annotation_findings(renamed, regions, mask, slide.mpp)


def _origin(row: dict[str, str | None]) -> Origin | None:
    """The column ``origin`` of a row; None if it is empty or there is no such column."""
    text = row.get("origin")
    if not text:
        return None
    for origin in get_args(Origin):
        if text == origin:
            return origin  # type: ignore[no-any-return]
    raise ValueError(f"{row['annotations']}: origin '{text}' must be 'level0' or 'bounds'")


def _annotation_findings(
    annotations: Annotations, regions: Sequence[Region], mask: TissueMask, mpp: float
) -> pl.DataFrame:
    """List features that are not used, and regions that lie mostly outside the tissue.

    ``regions`` are those of the annotations in level-0 px of the slide of ``mpp`` um/px.
    """
    rows: list[tuple[str, str | None, str, str]] = []

    def add(kind: str, label: str, what: str, features: Sequence[object]) -> None:
        shown = [str(feature) for feature in features[:_FEATURES_SHOWN]]
        shown += ["..."] if len(features) > _FEATURES_SHOWN else []
        detail = f"{len(features)} {what}: features {', '.join(shown)}"
        rows.append((kind, label or None, str(annotations.path), detail))

    for reason, label, _, features in unused_features(annotations).iter_rows():
        kind = "unclassified" if reason == NO_CLASS else "unused"
        add(kind, label, f"of {annotations.features} features {reason}", features)
    outside: dict[str, list[str]] = {}
    for region in regions:
        if (share := tissue_fraction(region, mask, mpp)) < _MIN_IN_TISSUE:
            outside.setdefault(region.label, []).append(f"{region.feature} ({share:.0%} in tissue)")
    for label, names in outside.items():
        add("outside_tissue", label, f"of {len(regions)} regions mostly outside tissue", names)
    return pl.DataFrame(rows, schema=ANNOTATION_FINDINGS_SCHEMA, orient="row")


def _draw(cells: pl.DataFrame, limit: int | None, slide: str, seed: int) -> pl.DataFrame:
    """Draw at most ``limit`` cells of each label, independently of the other slides."""
    if limit is None:
        return cells
    key = int.from_bytes(hashlib.sha256(slide.encode()).digest()[:8], "big")
    shuffled = cells[np.random.default_rng([seed, key]).permutation(len(cells))]
    return shuffled.group_by("label").head(limit).sort("y", "x")

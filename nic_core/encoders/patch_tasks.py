"""Patch tasks: labelled images become one array of equal patches, split by patient.

What is wrong with them and can be left out or lived with is not an error: it is a row of
:attr:`PatchDataset.findings`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from nic_core.cohort import PatchTask
from nic_core.encoders.errors import EncoderError
from nic_core.encoders.near_duplicates import near_duplicates
from nic_core.encoders.patch_sources import (
    ImageError,
    PatchSource,
    open_source,
    rescale,
    scaled_side,
    task_error,
)
from nic_core.encoders.splits import SPLITS, split_by_group
from nic_core.parallel import cores
from nic_core.types import Pixels

PATCHES = "patches.npy"
TABLE = "patches.parquet"
FINDINGS = "findings.parquet"
_METADATA = "nic.patch_task"

TABLE_SCHEMA: dict[str, pl.DataType] = {
    "index": pl.Int64(),  # row of `patches`
    "source": pl.String(),  # image file, HDF5 file#row, or slide
    # left edge: px of the image after resampling (negative: mirrored margin), level-0 px of a slide
    "x": pl.Int64(),
    "y": pl.Int64(),
    # place in the grid of patches of its image or slide: neighbours differ by one
    "row": pl.Int64(),
    "column": pl.Int64(),
    "label": pl.String(),
    "class": pl.Int64(),  # number of the label in `classes`
    "group": pl.String(),
    "split": pl.String(),  # train, validation or test
}

FINDINGS_SCHEMA: dict[str, pl.DataType] = {
    "kind": pl.String(),  # of FINDING_KINDS
    "label": pl.String(),
    "source": pl.String(),
    "split": pl.String(),
    "other": pl.String(),  # source of the image that it agrees with
    "other_label": pl.String(),
    "other_split": pl.String(),
    "detail": pl.String(),
}
FINDING_KINDS = {
    "conflict": "identical pixels under different labels: all of them left out",
    "copy": "identical pixels under one label: left out",
    "unreadable": "image that cannot be read: left out",
    "near_duplicate": "patch much like one of another split",
    "one_group": "class that a single group has: it is in one split",
    "absent": "class without a patch in this split",
    "unknown_mpp": "um/px declared unknown: pixels taken as they are",
}

_ABOUT = ("source", "label", "split")
_OTHER = ("other", "other_label", "other_split")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# images handed to the threads at once
_BLOCK = 4096


@dataclass(frozen=True)
class PatchDataset:
    """Patches of one task: ``patches`` uint8 (N, P, P, 3) and a row of ``table`` for each.

    ``findings`` (``FINDINGS_SCHEMA``) lists what is doubtful about them or was left out.
    """

    name: str
    organ: str
    classes: tuple[str, ...]
    mpp: float
    patches: Pixels
    table: pl.DataFrame
    findings: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=FINDINGS_SCHEMA))

    @property
    def patch(self) -> int:
        """Side of a patch, px."""
        return int(self.patches.shape[1])

    @cached_property
    def identity(self) -> str:
        """sha256 of everything a training sees: pixels, classes, splits, groups, neighbours."""
        digest = hashlib.sha256(f"{self.name}{self.classes}{self.mpp}".encode())
        # sources by number: a folder that moved is the same data
        seen = self.table.select("class", "split", "group", "row", "column")
        digest.update(seen.with_columns(self.table["source"].rle_id()).write_csv().encode())
        for start in range(0, len(self.patches), 1024):
            digest.update(np.ascontiguousarray(self.patches[start : start + 1024]).data)
        return digest.hexdigest()

    def rows(self, split: str) -> NDArray[np.int64]:
        """Indices of the patches of a split, ascending."""
        return self.table.filter(pl.col("split") == split)["index"].to_numpy()

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class number of each patch (N,)."""
        return self.table["class"].to_numpy()

    def found(self, kind: str) -> pl.DataFrame:
        """The findings of a kind (``FINDING_KINDS``)."""
        return self.findings.filter(pl.col("kind") == kind)

    def findings_by_kind(self) -> pl.DataFrame:
        """Number of findings of every kind: kind, count, meaning."""
        kinds = pl.DataFrame({"kind": FINDING_KINDS.keys(), "meaning": FINDING_KINDS.values()})
        counts = self.findings.group_by("kind").agg(count=pl.len())
        return kinds.join(counts, on="kind", how="left", maintain_order="left").select(
            "kind", pl.col("count").fill_null(0), "meaning"
        )

    def counts(self) -> pl.DataFrame:
        """Patches and groups of each split and class: split, label, patches, groups."""
        return (
            self.table.group_by("split", "label")
            .agg(patches=pl.len(), groups=pl.col("group").n_unique())
            .sort("split", "label")
        )


def build_patch_task(
    task: PatchTask,
    *,
    patch: int,
    mpp: float,
    seed: int,
    tissue: float = 0.6,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PatchDataset:
    """Read a task's images, bring them to ``mpp``, cut patches of ``patch`` px and split them.

    An image becomes all its whole, non-overlapping patches, centred; one that is smaller than
    a patch after resampling is mirrored at its edges to make one [choice]. Splits are whole
    groups, 60/20/20 and stratified by class [choice], unless the source has splits; where it has
    no validation split, that is a quarter of train's groups. An image without a group is a group
    of its own. Images are read twice: to compare their pixels, then to cut them.

    Parameters
    ----------
    patch : int
        Side of a patch, px at ``mpp``.
    mpp : float
        um/px.
    tissue : float
        Annotated slides: a cell is kept above this tissue fraction.
    folder : Path, optional
        Where the dataset is written, as :func:`save_patch_task` does, without ever being whole in
        memory; the result is memory-mapped. Without it the patches are in memory.
    progress
        Called with images done and their number, both times that they are read together.

    Raises
    ------
    CohortError
        Missing table, column, folder or image; fewer than two classes or one without images;
        images too small to be mirrored; groups in two splits; too few groups. The message names
        the task and the file.
    """
    with open_source(task, patch=patch, mpp=mpp, tissue=tissue, seed=seed) as source:
        listing = source.listing.with_row_index("row")
        if task.classes is not None:
            listing = listing.filter(pl.col("label").is_in(task.classes))
        classes = task.classes or tuple(listing["label"].unique().sort().to_list())
        _refuse_empty_classes(task, listing["label"], classes)
        listing = _survey(source, listing, progress)
        kept, findings = _distinct_images(listing)
        _refuse_empty_classes(task, kept["label"], classes)
        kept = kept.with_columns(split=pl.Series(_splits(task, kept, classes, seed)))
        images, table = _lay_out(task, kept, source.scale, classes, patch)
        shape = (len(table), patch, patch, 3)
        patches: Pixels = (
            np.empty(shape, np.uint8)
            if folder is None
            else np.lib.format.open_memmap(folder / PATCHES, "w+", np.uint8, shape)
        )
        _fill(task, source, images, patches, len(listing), progress)

    findings = pl.concat(
        [findings, _near_duplicates(table, patches), _about_classes(task, table, classes)]
    )
    dataset = PatchDataset(task.name, task.organ, classes, mpp, patches, table, findings)
    if folder is None:
        return dataset
    _save_tables(folder, dataset)
    return load_patch_task(folder)


def save_patch_task(folder: Path, dataset: PatchDataset) -> None:
    """Write patches, table and findings into ``folder`` (made if missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / PATCHES, dataset.patches)
    _save_tables(folder, dataset)


def _save_tables(folder: Path, dataset: PatchDataset) -> None:
    about = {
        "name": dataset.name,
        "organ": dataset.organ,
        "classes": dataset.classes,
        "mpp": dataset.mpp,
    }
    dataset.table.write_parquet(folder / TABLE, metadata={_METADATA: json.dumps(about)})
    dataset.findings.write_parquet(folder / FINDINGS)


def load_patch_task(folder: Path) -> PatchDataset:
    """Read what :func:`save_patch_task` wrote; the patches stay on disk (memory-mapped).

    Raises
    ------
    EncoderError
        One of the three files is missing or damaged, they are not a patch task's, or not of one
        another.
    """
    try:
        patches = np.load(folder / PATCHES, mmap_mode="r")
        table = pl.read_parquet(folder / TABLE)
        metadata = pl.read_parquet_metadata(folder / TABLE)
        findings = pl.read_parquet(folder / FINDINGS)
    except (OSError, ValueError, EOFError, pl.exceptions.PolarsError) as error:
        raise EncoderError(
            f"{folder}: not a whole patch task ({str(error).splitlines()[0]}); make it again"
        ) from error
    if _METADATA not in metadata or table.schema != pl.Schema(TABLE_SCHEMA):
        raise EncoderError(f"{folder / TABLE} is not the table of a patch task; make it again")
    if len(table) != len(patches):
        raise EncoderError(
            f"{folder}: {len(patches)} patches but {len(table)} rows; make the patch task again"
        )
    about = json.loads(metadata[_METADATA])
    return PatchDataset(
        about["name"],
        about["organ"],
        tuple(about["classes"]),
        about["mpp"],
        patches,
        table,
        findings,
    )


def leaks(trained: Sequence[PatchDataset], tested: Sequence[PatchDataset]) -> list[str]:
    """Test groups of one task that training on another sees, a sentence a pair of tasks.

    Each task deals its own groups, so a patient of two tasks can stand on both sides. Groups of the
    same name are taken for the same patient; they may be of two data sets that number alike.
    """
    found = []
    for test, train in product(tested, trained):
        if test.name == train.name:
            continue
        seen = set(train.table.filter(pl.col("split") != "test")["group"])
        both = sorted(seen & set(test.table.filter(split="test")["group"]))
        if both:
            found.append(
                f"{len(both)} group(s) of the test split of '{test.name}' are in the training of "
                f"'{train.name}', '{both[0]}' for one"
            )
    return found


def cut_patches(image: Pixels, patch: int) -> Iterator[tuple[int, int, Pixels]]:
    """All whole non-overlapping patches of an image (H, W, 3), centred: x, y, pixels.

    A side shorter than ``patch`` is first mirrored about both its edges; x or y is then
    negative.
    """
    height, width = image.shape[:2]
    before = [max(0, patch - side) // 2 for side in (height, width)]
    after = [max(0, patch - side) - b for side, b in zip((height, width), before, strict=True)]
    if any(after):
        pad = [*zip(before, after, strict=True), (0, 0)]
        image = np.pad(image, pad, mode="symmetric")
    for x, y in patch_places(height, width, patch):
        top, left = y + before[0], x + before[1]
        yield x, y, image[top : top + patch, left : left + patch]


def patch_places(height: int, width: int, patch: int) -> list[tuple[int, int]]:
    """Corners (x, y) of the patches that :func:`cut_patches` cuts, row by row."""

    def starts(side: int) -> range:
        if side < patch:
            return range(-((patch - side) // 2), 1, patch)[:1]
        return range(side % patch // 2, side - patch + 1, patch)

    return [(x, y) for y in starts(height) for x in starts(width)]


# --- building --------------------------------------------------------------------------------


def _survey(
    source: PatchSource, listing: pl.DataFrame, progress: Callable[[int, int], None] | None
) -> pl.DataFrame:
    """Adds each image's hash of its pixels, height and width; null, and a reason, if unreadable."""

    def look(row: int) -> tuple[str | None, int | None, int | None, str | None]:
        try:
            pixels = source.read(row)
        except ImageError as error:
            return None, None, None, str(error)
        digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(pixels).data)
        return digest.hexdigest(), *pixels.shape[:2], None

    seen = []
    for number, what in enumerate(_in_threads(look, listing["row"].to_list()), start=1):
        seen.append(what)
        if progress is not None:
            progress(number, 2 * len(listing))
    schema = {"hash": pl.String, "height": pl.Int64, "width": pl.Int64, "reason": pl.String}
    return listing.hstack(pl.DataFrame(seen, schema=schema, orient="row"))


def _fill(
    task: PatchTask,
    source: PatchSource,
    images: Sequence[tuple[int, int]],
    patches: Pixels,
    surveyed: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Cut the images, given by their row and the number of their first patch."""

    def cut(image: tuple[int, int]) -> None:
        row, first = image
        try:
            pixels = source.read(row)
        except ImageError as error:
            name = source.listing["source"][row]
            raise task_error(task, f"image {name} changed while it was read ({error})") from error
        crops = cut_patches(rescale(pixels, source.scale), patches.shape[1])
        for number, (_, _, crop) in enumerate(crops, start=first):
            patches[number] = crop

    left_out = surveyed - len(images)
    for number, _ in enumerate(_in_threads(cut, images), start=1):
        if progress is not None:
            progress(surveyed + left_out + number, 2 * surveyed)


def _in_threads(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
    """Results in order; never more than a block of them waits."""
    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(items), _BLOCK):
            yield from pool.map(work, items[start : start + _BLOCK])


def _distinct_images(listing: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The readable images that no other equals in every pixel, and what was left out.

    Of copies under one label the first stays, of published splits that in test before one in
    validation before one in train. Of copies under several labels none stays.
    """
    unreadable = listing.filter(pl.col("hash").is_null())
    listing = listing.filter(pl.col("hash").is_not_null())
    if "split" in listing.columns:
        order = dict(zip(reversed(SPLITS), range(3), strict=True))
        rank = pl.col("split").replace_strict(order, default=3, return_dtype=pl.Int64)
        listing = listing.sort(rank, "row")
    else:
        listing = listing.with_columns(split=pl.lit(None, pl.String))
    first = (pl.col(name).first().over("hash") for name in ("source", "label", "split"))
    listing = listing.with_columns(
        *(column.alias(name) for column, name in zip(first, _OTHER, strict=True)),
        labels=pl.col("label").n_unique().over("hash"),
        copy=pl.int_range(pl.len()).over("hash") > 0,
    )
    findings = [
        _findings("unreadable", unreadable.with_columns(detail="reason")),
        _findings("conflict", listing.filter(pl.col("copy") & (pl.col("labels") > 1))),
        _findings("copy", listing.filter(pl.col("copy") & (pl.col("labels") == 1))),
    ]
    kept = listing.filter(~pl.col("copy") & (pl.col("labels") == 1)).sort("row")
    return kept, pl.concat(findings)


def _findings(kind: str, rows: pl.DataFrame) -> pl.DataFrame:
    """Rows as findings of a kind; columns that they lack are null."""
    rows = rows.with_columns(kind=pl.lit(kind))
    missing = {name: None for name in FINDINGS_SCHEMA if name not in rows.columns}
    return rows.with_columns(**missing).select(
        pl.col(name).cast(dtype) for name, dtype in FINDINGS_SCHEMA.items()
    )


def _refuse_empty_classes(task: PatchTask, labels: pl.Series, classes: tuple[str, ...]) -> None:
    if empty := [label for label in classes if label not in set(labels)]:
        raise task_error(
            task,
            f"class '{empty[0]}' has no image that can be used; those that can be are labelled "
            f"{labels.unique().sort().to_list()}",
        )
    if len(classes) < 2:
        raise task_error(task, f"has the class {list(classes)} alone; two or more are needed")


def _lay_out(
    task: PatchTask, kept: pl.DataFrame, scale: float, classes: tuple[str, ...], patch: int
) -> tuple[list[tuple[int, int]], pl.DataFrame]:
    """Row and first patch of each image, and the table of patches."""
    images: list[tuple[int, int]] = []
    rows: list[tuple[int, str, int, int, int, int, str, int, str, str]] = []
    for image in kept.iter_rows(named=True):
        height, width = (scaled_side(image[side], scale) for side in ("height", "width"))
        if 3 * min(height, width) < patch:
            raise task_error(
                task,
                f"image {image['source']} is {width} x {height} px at the study's resolution; "
                f"under a third of a patch ({patch} px) mirroring cannot fill it",
            )
        images.append((image["row"], len(rows)))
        label = image["label"]
        about = (label, classes.index(label), image["group"], image["split"])
        places = patch_places(height, width, patch)
        columns = sum(y == places[0][1] for _, y in places)
        for number, (x, y) in enumerate(places):
            row, column = divmod(number, columns)
            cell = (image["grid_row"] + row, image["grid_column"] + column)
            rows.append((len(rows), image["source"], image["x"] + x, image["y"] + y, *cell, *about))
    return images, pl.DataFrame(rows, schema=TABLE_SCHEMA, orient="row")


def _near_duplicates(table: pl.DataFrame, patches: Pixels) -> pl.DataFrame:
    pairs = near_duplicates(patches, table["split"].to_list())
    own, other = table[pairs["index"].to_list()], table[pairs["other"].to_list()]
    place = pl.format("({}, {})", "x", "y")
    places = [rows.select(place.alias("place"))["place"] for rows in (own, other)]
    rows = pl.DataFrame(
        {
            "label": own["label"],
            "source": own["source"],
            "split": own["split"],
            **dict(zip(_OTHER, (other[name] for name in _ABOUT), strict=True)),
        }
    )
    about = pl.DataFrame({"here": places[0], "there": places[1], "r": pairs["agreement"].round(3)})
    detail = about.select(detail=pl.format("{} and {} agree to {}", "here", "there", "r"))
    return _findings("near_duplicate", rows.hstack(detail))


def _about_classes(task: PatchTask, table: pl.DataFrame, classes: tuple[str, ...]) -> pl.DataFrame:
    """Classes of one group, classes missing in a split, an unknown resolution."""
    lonely = (
        table.group_by("label").agg(pl.col("group").unique()).filter(pl.col("group").list.len() < 2)
    ).select("label", detail=pl.format("all of group {}", pl.col("group").list.first()))
    there = set(table.select("label", "split").unique().rows())
    absent = [(c, split) for c in classes for split in SPLITS if (c, split) not in there]
    unknown = [FINDING_KINDS["unknown_mpp"]] if task.mpp == "unknown" else []
    return pl.concat(
        [
            _findings("one_group", lonely.sort("label")),
            _findings("absent", pl.DataFrame(absent, ["label", "split"], orient="row")),
            _findings("unknown_mpp", pl.DataFrame({"detail": unknown})),
        ]
    )


def _splits(task: PatchTask, kept: pl.DataFrame, classes: tuple[str, ...], seed: int) -> list[str]:
    """The split of each image: as published, or whole groups dealt by seed."""
    if kept["split"].is_null().all():
        return _deal(task, kept, classes, seed, task.test_groups)
    found = set(kept["split"])
    if found not in (set(SPLITS), {"train", "test"}):
        raise task_error(
            task,
            f"the source's splits must be {', '.join(SPLITS)}, or train and test; they are {found}",
        )
    if task.test_groups:
        raise task_error(task, "has published splits and 'test_groups': give one of them")
    torn = kept.group_by("group").agg(pl.col("split").n_unique()).filter(pl.col("split") > 1)
    if not torn.is_empty():
        first = torn["group"].sort()[0]
        raise task_error(
            task, f"the source's splits tear {len(torn)} group(s) apart, '{first}' for one"
        )
    trained = set(kept.filter(pl.col("split") == "train")["label"])
    if missing := sorted(set(classes) - trained):
        raise task_error(task, f"the source's train split has no image of {missing}")
    if "validation" not in found:
        tested = kept.filter(pl.col("split") == "test")["group"].unique().to_list()
        return _deal(task, kept, classes, seed, tested)
    return kept["split"].to_list()


def _deal(
    task: PatchTask,
    kept: pl.DataFrame,
    classes: tuple[str, ...],
    seed: int,
    test_groups: Collection[str],
) -> list[str]:
    labels = np.array([classes.index(label) for label in kept["label"]])
    try:
        return split_by_group(labels, kept["group"].to_list(), seed=seed, test_groups=test_groups)
    except ValueError as error:
        raise task_error(
            task,
            f"{error}. Give more groups, or set 'group_column: null' to split by image "
            "(scores then do not tell about other patients)",
        ) from error

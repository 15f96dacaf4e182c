"""Patch tasks: labelled images, cut into patches of one size and split by patient.

Problems with single images or classes that do not prevent training are no errors: they are rows of
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
from nic_core.encoders.order import blocks_of_order, order_test, texture
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
    # upper left corner: px of the resampled image (negative: mirrored margin), or level-0 px
    "x": pl.Int64(),
    "y": pl.Int64(),
    # cell in the grid of patches of the image or slide
    "row": pl.Int64(),
    "column": pl.Int64(),
    "label": pl.String(),
    "class": pl.Int64(),  # index of the label in `classes`
    "group": pl.String(),
    "split": pl.String(),  # train, validation or test
}

FINDINGS_SCHEMA: dict[str, pl.DataType] = {
    "kind": pl.String(),  # of FINDING_KINDS
    "label": pl.String(),
    "source": pl.String(),
    "split": pl.String(),
    "other": pl.String(),  # source of the identical or similar image
    "other_label": pl.String(),
    "other_split": pl.String(),
    "detail": pl.String(),
}
FINDING_KINDS = {
    "conflict": "images with identical pixels and different labels; all are excluded",
    "copy": "image with the pixels and the label of another image; excluded",
    "unreadable": "image that cannot be read; excluded",
    "near_duplicate": "patch that is almost identical to a patch of another split",
    "one_group": "class that only one group has, so it is in one split only",
    "absent": "class without a patch in this split",
    "unknown_groups": "patients unknown; splits consist of blocks of consecutive images",
    "ordered": "patients unknown, and images that follow each other are alike",
    "unknown_mpp": "resolution declared unknown; images are not resampled",
    "unclassified": "regions without a class; the cells that they touch are not background",
    "unused": "features of an annotation file that are no regions",
    "outside_tissue": "regions that lie mostly outside the tissue",
}

_IMAGE = ("source", "label", "split")
_OTHER = ("other", "other_label", "other_split")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_BLOCK = 4096  # images queued for the threads at once


@dataclass(frozen=True)
class PatchDataset:
    """The patches of one task.

    Attributes
    ----------
    classes
        Labels, in the order of the class numbers.
    mpp
        Resolution, um/px.
    patches
        uint8 (N, P, P, 3).
    table
        One row per patch (``TABLE_SCHEMA``).
    findings
        Excluded or doubtful images and classes (``FINDINGS_SCHEMA``).
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
        """sha256 of all that training uses: pixels, classes, splits, groups, positions."""
        digest = hashlib.sha256(f"{self.name}{self.classes}{self.mpp}".encode())
        # sources are numbered, so that moving the files keeps the hash
        seen = self.table.select("class", "split", "group", "row", "column")
        digest.update(seen.with_columns(self.table["source"].rle_id()).write_csv().encode())
        for start in range(0, len(self.patches), 1024):
            digest.update(np.ascontiguousarray(self.patches[start : start + 1024]).data)
        return digest.hexdigest()

    def rows(self, split: str) -> NDArray[np.int64]:
        """Return the indices of the patches of a split, ascending."""
        return self.table.filter(pl.col("split") == split)["index"].to_numpy()

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class number of each patch (N,)."""
        return self.table["class"].to_numpy()

    def found(self, kind: str) -> pl.DataFrame:
        """Return the findings of one kind (``FINDING_KINDS``)."""
        return self.findings.filter(pl.col("kind") == kind)

    def findings_by_kind(self) -> pl.DataFrame:
        """Count the findings of every kind; columns kind, count, meaning."""
        kinds = pl.DataFrame({"kind": FINDING_KINDS.keys(), "meaning": FINDING_KINDS.values()})
        counts = self.findings.group_by("kind").agg(count=pl.len())
        return kinds.join(counts, on="kind", how="left", maintain_order="left").select(
            "kind", pl.col("count").fill_null(0), "meaning"
        )

    def counts(self) -> pl.DataFrame:
        """Count patches and groups by split and class; columns split, label, patches, groups."""
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
    """Read the images of a task, resample them to ``mpp``, cut patches and assign splits.

    An image is cut into all complete non-overlapping patches, centred. An image that is smaller
    than a patch after resampling is mirrored at its edges to the size of one patch [choice].
    Splits consist of complete groups, 60/20/20 and stratified by class [choice], unless the source
    has splits; if it lacks a validation split, a quarter of the train groups is used. Of images
    without a group, blocks of consecutive images are the groups (:mod:`nic_core.encoders.order`).
    Images are read twice: once to compare pixels, once to cut patches.

    Parameters
    ----------
    task : PatchTask
        Entry of the cohort file.
    patch : int
        Side of a patch, px at ``mpp``.
    mpp : float
        Resolution of the patches, um/px.
    seed : int
        Of the splits, and of the choice of patches of annotated slides.
    tissue : float
        Minimum tissue fraction of the cells of annotated slides.
    folder : Path, optional
        Folder for the dataset, in the format of :func:`save_patch_task`. Patches are then written
        directly to disk and the result is memory-mapped; without it they are in memory.
    progress : callable, optional
        Called with (images read, total); each image counts twice.

    Raises
    ------
    CohortError
        A table, column, folder or image is missing; there are fewer than two classes, or a class
        without images; images are too small for mirroring; a group is in two splits; there are too
        few groups. The message names the task and the file.
    """
    with open_source(task, patch=patch, mpp=mpp, tissue=tissue, seed=seed) as source:
        listing = source.listing.with_row_index("row")
        if task.classes is not None:
            listing = listing.filter(pl.col("label").is_in(task.classes))
        classes = task.classes or tuple(listing["label"].unique().sort().to_list())
        _check_classes(task, listing["label"], classes)
        listing = _hash_images(source, listing, progress)
        kept, findings = _distinct_images(listing)
        _check_classes(task, kept["label"], classes)
        unknown = kept.clear() if task.slides else kept.filter(pl.col("group") == pl.col("source"))
        blocks = unknown.select("row", block=pl.Series(_blocks(unknown), dtype=pl.String))
        kept = kept.join(blocks, on="row", how="left", maintain_order="left").with_columns(
            group=pl.coalesce("block", "group")
        )
        kept = kept.with_columns(split=pl.Series(_splits(task, kept, classes, seed)))
        images, table = _patch_table(task, kept, source.scale, classes, patch)
        shape = (len(table), patch, patch, 3)
        patches: Pixels = (
            np.empty(shape, np.uint8)
            if folder is None
            else np.lib.format.open_memmap(folder / PATCHES, "w+", np.uint8, shape)
        )
        _cut_images(task, source, images, patches, len(listing), progress)
        source_findings = _with_schema(source.findings)

    findings = pl.concat(
        [
            findings,
            _near_duplicates(table, patches),
            _class_findings(task, table, classes),
            source_findings,
            *([_order_findings(table, patches, unknown["source"])] if len(unknown) else []),
        ]
    )
    dataset = PatchDataset(task.name, task.organ, classes, mpp, patches, table, findings)
    if folder is None:
        return dataset
    _save_tables(folder, dataset)
    return load_patch_task(folder)


def save_patch_task(folder: Path, dataset: PatchDataset) -> None:
    """Write patches, table and findings into ``folder``, created if necessary."""
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
    """Load a folder of :func:`save_patch_task`; the patches are memory-mapped.

    Raises
    ------
    EncoderError
        A file is missing or damaged, is not part of a patch task, or does not match the others.
    """
    try:
        patches = np.load(folder / PATCHES, mmap_mode="r")
        table = pl.read_parquet(folder / TABLE, glob=False)
        metadata = pl.read_parquet_metadata(folder / TABLE)
        findings = pl.read_parquet(folder / FINDINGS, glob=False)
    except (OSError, ValueError, EOFError, pl.exceptions.PolarsError) as error:
        raise EncoderError(
            f"{folder}: not a complete patch task ({str(error).splitlines()[0]}); make it again"
        ) from error
    if _METADATA not in metadata or table.schema != pl.Schema(TABLE_SCHEMA):
        raise EncoderError(f"{folder / TABLE} is not the table of a patch task; make it again")
    if len(table) != len(patches):
        raise EncoderError(
            f"{folder}: the patch task has {len(patches)} patches but {len(table)} rows; make it "
            "again"
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
    """Describe test groups of one task that occur in the training of another task.

    Splits are assigned per task, so a patient of two tasks may be in the test split of one and the
    train split of the other. Groups of the same name are assumed to be the same patient; they may
    belong to two datasets with the same numbering.

    Returns
    -------
    list of str
        One sentence for each pair of tasks with such groups.
    """
    found = []
    for test, train in product(tested, trained):
        if test.name == train.name:
            continue
        seen = set(train.table.filter(pl.col("split") != "test")["group"])
        both = sorted(seen & set(test.table.filter(split="test")["group"]))
        if both:
            found.append(
                f"{len(both)} group(s) of the test split of '{test.name}' are in the training data "
                f"of '{train.name}', for example '{both[0]}'"
            )
    return found


def cut_patches(image: Pixels, patch: int) -> Iterator[tuple[int, int, Pixels]]:
    """Yield x, y and pixels of all complete non-overlapping patches of an image (H, W, 3).

    The patches are centred. A side shorter than ``patch`` is first mirrored at both edges; x or y
    is then negative.
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
    """Return the corners (x, y) of the patches of :func:`cut_patches`, row by row."""

    def starts(side: int) -> range:
        if side < patch:
            return range(-((patch - side) // 2), 1, patch)[:1]
        return range(side % patch // 2, side - patch + 1, patch)

    return [(x, y) for y in starts(height) for x in starts(width)]


# --- building --------------------------------------------------------------------------------


def _hash_images(
    source: PatchSource, listing: pl.DataFrame, progress: Callable[[int, int], None] | None
) -> pl.DataFrame:
    """Add the columns hash (of the pixels), height, width, and reason if an image is unreadable."""

    def hash_image(row: int) -> tuple[str | None, int | None, int | None, str | None]:
        try:
            pixels = source.read(row)
        except ImageError as error:
            return None, None, None, str(error)
        digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(pixels).data)
        return digest.hexdigest(), *pixels.shape[:2], None

    rows = []
    for number, row in enumerate(_in_threads(hash_image, listing["row"].to_list()), start=1):
        rows.append(row)
        if progress is not None:
            progress(number, 2 * len(listing))
    schema = {"hash": pl.String, "height": pl.Int64, "width": pl.Int64, "reason": pl.String}
    return listing.hstack(pl.DataFrame(rows, schema=schema, orient="row"))


def _cut_images(
    task: PatchTask,
    source: PatchSource,
    images: Sequence[tuple[int, int]],
    patches: Pixels,
    hashed: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Cut images, given by their row and the index of their first patch, into ``patches``."""

    def cut(image: tuple[int, int]) -> None:
        row, first = image
        try:
            pixels = source.read(row)
        except ImageError as error:
            name = source.listing["source"][row]
            raise task_error(
                task, f"image {name} changed during the build ({error}); make the patch task again"
            ) from error
        crops = cut_patches(rescale(pixels, source.scale), patches.shape[1])
        for number, (_, _, crop) in enumerate(crops, start=first):
            patches[number] = crop

    excluded = hashed - len(images)
    for number, _ in enumerate(_in_threads(cut, images), start=1):
        if progress is not None:
            progress(hashed + excluded + number, 2 * hashed)


def _in_threads(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
    """Yield results in order, with at most one block of them in memory."""
    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(items), _BLOCK):
            yield from pool.map(work, items[start : start + _BLOCK])


def _distinct_images(listing: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return readable images with distinct pixels, and findings on the excluded ones.

    Of copies with one label the first is kept; with published splits, one in test is preferred to
    one in validation, and one in validation to one in train. Copies with several labels are all
    excluded.
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
    """Convert rows to findings of a kind."""
    return _with_schema(rows.with_columns(kind=pl.lit(kind)))


def _with_schema(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the rows with the columns of ``FINDINGS_SCHEMA``; missing ones are null."""
    missing = {name: None for name in FINDINGS_SCHEMA if name not in rows.columns}
    return rows.with_columns(**missing).select(
        pl.col(name).cast(dtype) for name, dtype in FINDINGS_SCHEMA.items()
    )


def _check_classes(task: PatchTask, labels: pl.Series, classes: tuple[str, ...]) -> None:
    if empty := [label for label in classes if label not in set(labels)]:
        raise task_error(
            task,
            f"class '{empty[0]}' has no usable image; the labels of usable images are "
            f"{labels.unique().sort().to_list()}; correct 'classes' or add images",
        )
    if len(classes) < 2:
        raise task_error(
            task, f"has only the class {list(classes)}; classification requires two or more"
        )


def _patch_table(
    task: PatchTask, kept: pl.DataFrame, scale: float, classes: tuple[str, ...], patch: int
) -> tuple[list[tuple[int, int]], pl.DataFrame]:
    """Return row and first patch of each image, and the table of patches."""
    images: list[tuple[int, int]] = []
    rows: list[tuple[int, str, int, int, int, int, str, int, str, str]] = []
    for image in kept.iter_rows(named=True):
        height, width = (scaled_side(image[side], scale) for side in ("height", "width"))
        if 3 * min(height, width) < patch:
            raise task_error(
                task,
                f"image {image['source']} is {width} x {height} px at the study's resolution, less "
                f"than a third of a patch ({patch} px), which is too small for mirroring; check "
                "its 'mpp' or remove it",
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
            **dict(zip(_OTHER, (other[name] for name in _IMAGE), strict=True)),
        }
    )
    about = pl.DataFrame({"one": places[0], "two": places[1], "r": pairs["correlation"].round(3)})
    detail = about.select(
        detail=pl.format("patches at (x, y) {} and {}: correlation {}", "one", "two", "r")
    )
    return _findings("near_duplicate", rows.hstack(detail))


def _class_findings(task: PatchTask, table: pl.DataFrame, classes: tuple[str, ...]) -> pl.DataFrame:
    """Find classes of a single group, classes missing in a split, and an unknown resolution."""
    lonely = (
        table.group_by("label").agg(pl.col("group").unique()).filter(pl.col("group").list.len() < 2)
    ).select("label", detail=pl.format("only in group {}", pl.col("group").list.first()))
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


def _blocks(kept: pl.DataFrame) -> list[str]:
    """Return blocks of consecutive images of a class, and of a split if the source has splits."""
    published = kept["split"].fill_null("")
    labels = [
        f"{label} {split}".strip() for label, split in zip(kept["label"], published, strict=True)
    ]
    return blocks_of_order(labels, kept["source"].to_list())


def _order_findings(table: pl.DataFrame, patches: Pixels, unknown: pl.Series) -> pl.DataFrame:
    """Report images whose patients are ``unknown``, and an order in which neighbours are alike."""
    images = table["source"].n_unique()
    table = table.filter(pl.col("source").is_in(unknown.implode()))
    chunks = np.array_split(table["index"].to_numpy(), len(table) // 512 + 1)
    measured = {
        "mean colour": np.concatenate(
            [patches[rows].mean((1, 2), dtype=np.float64) for rows in chunks]
        ),
        "texture": np.concatenate([texture(patches[rows]) for rows in chunks]),
    }
    names, first, image = np.unique(
        table["source"].to_numpy(), return_index=True, return_inverse=True
    )
    labels = table["label"].gather(first).to_list()
    ordered = []
    for what, values in measured.items():
        sums = np.zeros((len(names), values.shape[1]))
        np.add.at(sums, image, values)
        found = order_test(sums / np.bincount(image)[:, None], labels, names.tolist())
        if found is not None and found.ordered:
            ordered.append(
                f"{what} correlates by {found.correlation:.2f} with that of the next image "
                f"(p {found.p:.3f})"
            )
    blocks = f"{table['group'].n_unique()} blocks of {len(names)} images"
    if len(names) < images:
        blocks += f"; the other {images - len(names)} images have groups"
    return pl.concat(
        [
            _findings("unknown_groups", pl.DataFrame({"detail": [blocks]})),
            _findings("ordered", pl.DataFrame({"detail": ordered}, {"detail": pl.String})),
        ]
    )


def _splits(task: PatchTask, kept: pl.DataFrame, classes: tuple[str, ...], seed: int) -> list[str]:
    """Return the split of each image: the published one, or one assigned by group and seed."""
    if kept["split"].is_null().all():
        return _split_groups(task, kept, classes, seed, task.test_groups)
    found = set(kept["split"])
    if found not in (set(SPLITS), {"train", "test"}):
        raise task_error(
            task,
            f"the splits of the source must be {', '.join(SPLITS)}, or train and test; they are "
            f"{sorted(map(str, found))}",
        )
    if task.test_groups:
        raise task_error(task, "has published splits and 'test_groups'; remove one of them")
    divided = kept.group_by("group").agg(pl.col("split").n_unique()).filter(pl.col("split") > 1)
    if not divided.is_empty():
        first = divided["group"].sort()[0]
        raise task_error(
            task,
            f"{len(divided)} group(s) are in several splits of the source, for example '{first}'; "
            "assign each group to one split",
        )
    trained = set(kept.filter(pl.col("split") == "train")["label"])
    if missing := sorted(set(classes) - trained):
        raise task_error(task, f"the train split of the source has no image of {missing}")
    if "validation" not in found:
        tested = kept.filter(pl.col("split") == "test")["group"].unique().to_list()
        return _split_groups(task, kept, classes, seed, tested)
    return kept["split"].to_list()


def _split_groups(
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
            f"{error}; add groups, or set 'group_column: null' to split by blocks of consecutive "
            "images (scores are then not valid for new patients)",
        ) from error

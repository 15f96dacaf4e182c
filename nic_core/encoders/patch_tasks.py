"""Patch tasks: labelled images become one array of equal patches, split by patient."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import pyvips
from numpy.typing import NDArray

from nic_core.cohort import CohortError, PatchTask
from nic_core.encoders.splits import SPLITS, split_by_group

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
PATCHES = "patches.npy"
TABLE = "patches.parquet"
_METADATA = "nic.patch_task"

TABLE_SCHEMA: dict[str, pl.DataType] = {
    "index": pl.Int64(),  # row of `patches`
    "source": pl.String(),  # image file
    "x": pl.Int64(),  # left edge in the image after resampling, px; negative: mirrored margin
    "y": pl.Int64(),
    "label": pl.String(),
    "class": pl.Int64(),  # number of the label in `classes`
    "group": pl.String(),
    "split": pl.String(),  # train, validation or test
}


@dataclass(frozen=True)
class PatchDataset:
    """Patches of one task: ``patches`` uint8 (N, P, P, 3) and a row of ``table`` for each."""

    name: str
    organ: str
    classes: tuple[str, ...]
    mpp: float
    patches: Pixels
    table: pl.DataFrame

    @property
    def patch(self) -> int:
        """Side of a patch, px."""
        return int(self.patches.shape[1])

    @cached_property
    def identity(self) -> str:
        """sha256 of everything a training sees: pixels, classes, splits."""
        digest = hashlib.sha256(f"{self.name}{self.classes}{self.mpp}".encode())
        digest.update(self.table.select("class", "split").write_csv().encode())
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
    progress: Callable[[int, int], None] | None = None,
) -> PatchDataset:
    """Read a task's images, bring them to ``mpp``, cut patches of ``patch`` px and split them.

    An image becomes all its whole, non-overlapping patches, centred; one that is smaller than
    a patch after resampling is mirrored at its edges to make one [choice]. Splits are whole
    groups, 60/20/20 and stratified by class [choice], unless the table has a ``split`` column.
    An image without a group is a group of its own. Copies of an image are read once.

    Raises
    ------
    CohortError
        Missing table, column, folder or image; unreadable image; fewer than two classes or one
        without images; identical images with different labels; groups in two splits; too few
        groups. The message names the task and the file.
    """
    listing = _list_folder(task) if task.folder is not None else _list_table(task)
    classes = tuple(listing["label"].unique().sort().to_list())
    if len(classes) < 2:
        raise _error(task, f"has the class {list(classes)} alone; two or more are needed")

    paths = [Path(source) for source in listing["source"]]
    images: list[Pixels] = []
    hashes: list[str] = []
    for number, (image, digest) in enumerate(_read_all(task, paths, mpp), start=1):
        images.append(image)
        hashes.append(digest)
        if progress is not None:
            progress(number, len(paths))
    listing = listing.with_columns(hash=pl.Series(hashes), image=pl.int_range(pl.len()))
    listing = _unique_images(task, listing)
    listing = listing.with_columns(split=pl.Series(_splits(task, listing, classes, seed)))

    patches: list[Pixels] = []
    rows: list[tuple[int, str, int, int, str, int, str, str]] = []
    for record in listing.iter_rows(named=True):
        label = record["label"]
        for x, y, pixels in cut_patches(images[record["image"]], patch):
            place = (len(rows), record["source"], x, y)
            rows.append((*place, label, classes.index(label), record["group"], record["split"]))
            patches.append(pixels)
    table = pl.DataFrame(rows, schema=TABLE_SCHEMA, orient="row")
    return PatchDataset(task.name, task.organ, classes, mpp, np.stack(patches), table)


def save_patch_task(folder: Path, dataset: PatchDataset) -> None:
    """Write ``patches.npy`` and ``patches.parquet`` into ``folder`` (made if missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / PATCHES, dataset.patches)
    about = {
        "name": dataset.name,
        "organ": dataset.organ,
        "classes": dataset.classes,
        "mpp": dataset.mpp,
    }
    dataset.table.write_parquet(folder / TABLE, metadata={_METADATA: json.dumps(about)})


def load_patch_task(folder: Path) -> PatchDataset:
    """Read what :func:`save_patch_task` wrote; the patches stay on disk (memory-mapped).

    Raises
    ------
    FileNotFoundError
        One of the two files is missing.
    ValueError
        They are not a patch task's, or not of one another.
    """
    patches = np.load(folder / PATCHES, mmap_mode="r")
    table = pl.read_parquet(folder / TABLE)
    metadata = pl.read_parquet_metadata(folder / TABLE)
    if _METADATA not in metadata or table.schema != pl.Schema(TABLE_SCHEMA):
        raise ValueError(f"{folder / TABLE} is not the table of a patch task; make it again")
    if len(table) != len(patches):
        raise ValueError(
            f"{folder}: {len(patches)} patches but {len(table)} rows; make the patch task again"
        )
    about = json.loads(metadata[_METADATA])
    return PatchDataset(
        about["name"], about["organ"], tuple(about["classes"]), about["mpp"], patches, table
    )


def cut_patches(image: Pixels, patch: int) -> Iterator[tuple[int, int, Pixels]]:
    """All whole non-overlapping patches of an image (H, W, 3), centred: x, y, pixels.

    A side shorter than ``patch`` is first mirrored about both its edges; x or y is then
    negative.
    """
    height, width = image.shape[:2]
    margins = [max(0, patch - side) for side in (height, width)]
    before = [margin // 2 for margin in margins]
    if any(margins):
        pad = [(b, m - b) for b, m in zip(before, margins, strict=True)] + [(0, 0)]
        image = np.pad(image, pad, mode="symmetric")
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    top = (image.shape[0] - rows * patch) // 2
    left = (image.shape[1] - columns * patch) // 2
    for y in range(top, top + rows * patch, patch):
        for x in range(left, left + columns * patch, patch):
            yield x - before[1], y - before[0], image[y : y + patch, x : x + patch]


def read_image(path: Path, scale: float) -> Pixels:
    """An image file as uint8 RGB (H, W, 3), its sides multiplied by ``scale``.

    Whole-number reductions are means over areas; others, and enlargements, are bilinear
    (after a whole-number reduction, so nothing is skipped). Transparency becomes white.

    Raises
    ------
    pyvips.Error
        Missing, not an image, or cut short.
    """
    image = pyvips.Image.new_from_file(str(path), fail_on="truncated")
    if image.hasalpha():
        image = image.flatten(background=[255])
    image = image.colourspace("srgb").cast("uchar")
    reduction = 1 / scale
    if reduction >= 2 and abs(reduction - round(reduction)) < 1e-3:
        image = image.shrink(round(reduction), round(reduction))
    elif abs(reduction - 1) > 1e-3:
        image = image.resize(scale, kernel="linear")
    return np.ascontiguousarray(image.numpy())


def _read_all(task: PatchTask, paths: Sequence[Path], mpp: float) -> Iterator[tuple[Pixels, str]]:
    def read(path: Path) -> tuple[Pixels, str]:
        try:
            pixels = read_image(path, task.mpp / mpp)
        except pyvips.Error as error:
            what = "cannot be read" if path.exists() else "does not exist"
            reason = str(error).strip().splitlines()[-1]
            raise _error(task, f"image {path} {what} ({reason}); restore or remove it") from error
        return pixels, hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(read, paths)


def _list_folder(task: PatchTask) -> pl.DataFrame:
    """source, label, group of every image in the sub-folders, sorted by path."""
    assert task.folder is not None
    if not task.folder.is_dir():
        raise _error(task, f"folder {task.folder} does not exist")
    rows: list[tuple[str, str, str]] = []
    for folder in sorted(path for path in task.folder.iterdir() if path.is_dir()):
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise _error(task, f"class '{folder.name}' has no image in {folder}")
        rows += [(str(file), folder.name, str(file)) for file in files]
    if not rows:
        raise _error(task, f"{task.folder} has no sub-folders; one a class is needed")
    return pl.DataFrame(rows, schema=["source", "label", "group"], orient="row")


def _list_table(task: PatchTask) -> pl.DataFrame:
    """source, label, group and, if the table has it, split of the rows that `where` keeps."""
    assert task.table is not None
    try:
        table = (
            pl.read_parquet(task.table)
            if task.table.suffix == ".parquet"
            else pl.read_csv(task.table, infer_schema=False)
        )
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _error(task, f"table {task.table} cannot be read: {error}") from error
    for column in (task.path_column, task.label_column, task.group_column, *task.where):
        if column is not None and column not in table.columns:
            raise _error(
                task, f"table {task.table} has no column '{column}'; it has {table.columns}"
            )
    table = table.cast(pl.String)
    for column, value in task.where.items():
        table = table.filter(pl.col(column) == value)
    if table.is_empty():
        raise _error(task, f"table {task.table} has no rows where {task.where}")
    for column in (task.path_column, task.label_column):
        if (empty := table[column].is_null() | (table[column] == "")).any():
            raise _error(
                task,
                f"table {task.table}: {int(empty.sum())} kept rows have an empty '{column}', "
                f"the first is number {empty.arg_true()[0] + 1}",
            )
    base = task.table.parent
    source = pl.Series([str(base / path) for path in table[task.path_column]])
    group = table[task.group_column] if task.group_column is not None else source
    listing = pl.DataFrame(
        {"source": source, "label": table[task.label_column], "group": group}
    ).with_columns(
        pl.when(pl.col("group") == "")
        .then(None)
        .otherwise(pl.col("group"))
        .fill_null(pl.col("source"))
        .alias("group")
    )
    if "split" in table.columns:
        listing = listing.with_columns(split=table["split"])
    return listing.sort("source")


def _unique_images(task: PatchTask, listing: pl.DataFrame) -> pl.DataFrame:
    """The listing without copies of an image; a copy with another label is an error."""
    by_hash = listing.group_by("hash", maintain_order=True).agg(
        pl.col("label").unique().sort(), pl.col("source"), count=pl.len()
    )
    conflicts = by_hash.filter(pl.col("label").list.len() > 1)
    if not conflicts.is_empty():
        first = conflicts.row(0, named=True)
        raise _error(
            task,
            f"{len(conflicts)} image(s) stand under different labels: {', '.join(first['source'])} "
            f"are identical but labelled {', '.join(first['label'])}; correct or remove them",
        )
    copies = len(listing) - len(by_hash)
    if copies:
        log.warning("patch task '%s': %d copies of other images left out", task.name, copies)
    return listing.unique("hash", keep="first", maintain_order=True)


def _splits(
    task: PatchTask, listing: pl.DataFrame, classes: tuple[str, ...], seed: int
) -> list[str]:
    if "split" in listing.columns:
        return _given_splits(task, listing)
    labels = np.array([classes.index(label) for label in listing["label"]])
    try:
        splits = split_by_group(
            labels, listing["group"].to_list(), seed=seed, test_groups=task.test_groups
        )
    except ValueError as error:
        raise _error(
            task,
            f"{error}. Give more groups, or set 'group_column: null' to split by image "
            "(scores then do not tell about other patients)",
        ) from error
    return splits


def _given_splits(task: PatchTask, listing: pl.DataFrame) -> list[str]:
    found = set(listing["split"])
    if found != set(SPLITS):
        raise _error(task, f"column 'split' must hold {', '.join(SPLITS)}; it holds {found}")
    if task.test_groups:
        raise _error(task, "has a 'split' column and 'test_groups': give one of them")
    torn = listing.group_by("group").agg(pl.col("split").n_unique()).filter(pl.col("split") > 1)
    if not torn.is_empty():
        raise _error(task, f"column 'split' tears group '{torn['group'].sort()[0]}' apart")
    trained = set(listing.filter(pl.col("split") == "train")["label"])
    missing = sorted(set(listing["label"]) - trained)
    if missing:
        raise _error(task, f"column 'split' has no image of {missing} in train")
    splits: list[str] = listing["split"].to_list()
    return splits


def _error(task: PatchTask, problem: str) -> CohortError:
    return CohortError(f"patch task '{task.name}': {problem}")

"""The real patch tasks of the studies, read from a folder with ``MANIFEST.csv``.

The manifest has the columns path, kind, task, label, group (the patient, where known). None of the
images is part of this project; ``docs/explanation/study-real.md`` names the sets. Each task keeps
its own um/px. Patches are 128 px; an image that is smaller is mirrored at its edges. All choices
here are [choice].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from nic_core.cohort import PatchTask
from nic_core.encoders import PatchDataset, build_patch_task, load_patch_task
from nic_core.encoders.patch_sources import read_image
from nic_core.encoders.patch_tasks import TABLE_SCHEMA, patch_places, save_patch_task
from nic_core.encoders.splits import split_by_group
from nic_core.store import atomic_folder
from nic_core.types import Pixels

PATCH = 128  # px
GLAS_MPP = 0.62005

GLAND_SHARE = 0.75  # of a patch's central square, for gland; at most 1 - this for stroma
GLANDS_PER_REGION = 12  # patches of each class


@dataclass(frozen=True)
class TissueTask:
    """A patch task and how it is judged.

    Attributes
    ----------
    unit
        What is classified: each patch, or each region by mean and deviation of its embeddings.
    tissue
        Name of the images, which several tasks may share.
    """

    dataset: PatchDataset
    unit: Literal["patch", "region"]
    tissue: str

    @property
    def name(self) -> str:
        return self.dataset.name


@dataclass(frozen=True)
class ManifestTask:
    """How a task of the manifest is read: um/px of its images and of its patches."""

    organ: str
    mpp: float | Literal["unknown"]
    patch_mpp: float
    without: tuple[str, ...] = ()  # classes with one image, too few for five folds
    block: str | None = None  # group: this pattern in the path, not the column


MANIFEST_TASKS = {
    # 10 patients; 50 px at 4 um/px = 200 um = a patch
    "idc": ManifestTask("breast", 4.0, 50 * 4.0 / PATCH),
    "monuseg_nuc64": ManifestTask("seven organs", 0.5, 0.5),  # 30 patients
    "brecahad_cell64": ManifestTask("breast", "unknown", 0.5),  # 4 patients
    # patients are unknown: nearly every image is a group
    "nct_crc": ManifestTask("colon", 0.5, 0.5, without=("BACK", "DEB")),
    "lc25000": ManifestTask(
        "lung and colon", "unknown", 0.5
    ),  # patients are unknown: original images
    # blocks of tissue of 2 patients
    "osteosarcoma": ManifestTask("bone", 1.0, 1.0, block=r"((?:Case-4-[A-Z]|P9-[A-Z])\d+)"),
    # patients are unknown: 20 blocks of consecutive images of each class
    "oral_oscc": ManifestTask("oral cavity", "unknown", 0.5),
}


def tissue_tasks(folder: Path, cache: Path, *, seed: int = 0) -> list[TissueTask]:
    """Return all real tasks; the patches of each are cut once and kept under ``cache``.

    Parameters
    ----------
    folder : Path
        Folder with ``MANIFEST.csv`` and the images.
    cache : Path
        Folder for the patches.
    seed : int
        Of the splits that encoders are trained with.
    """
    manifest = pl.read_csv(folder / "MANIFEST.csv", infer_schema=False)
    made = [_glas(manifest, folder, cache, seed, "glas_grade")]
    made.append(_glas(manifest, folder, cache, seed, "glas_gland"))
    for name, entry in MANIFEST_TASKS.items():
        kept = cache / f"{name}-{seed}"
        if not kept.exists():
            rows = manifest.filter(task=name).filter(~pl.col("label").is_in(entry.without))
            table = rows.select(
                path=pl.format("{}/{}", pl.lit(str(folder.resolve())), "path"),
                label="label",
                group=pl.col("path").str.extract(entry.block) if entry.block else pl.col("group"),
            )
            cache.mkdir(parents=True, exist_ok=True)
            table.write_csv(cache / f"{name}.csv")
            task = PatchTask(
                name=name, organ=entry.organ, mpp=entry.mpp, table=cache / f"{name}.csv"
            )
            with atomic_folder(kept) as partial:
                build_patch_task(task, patch=PATCH, mpp=entry.patch_mpp, seed=seed, folder=partial)
        made.append(TissueTask(load_patch_task(kept), "patch", name))
    return made


def dataset(
    name: str,
    organ: str,
    classes: tuple[str, ...],
    mpp: float,
    pixels: Pixels,
    places: pl.DataFrame,
    seed: int,
) -> PatchDataset:
    """Return patches as a patch task, with splits by group.

    Parameters
    ----------
    pixels : uint8 (N, 128, 128, 3)
    places : polars.DataFrame
        One row per patch: source, x, y (px), row, column (of the grid of patches), label, group.
    """
    labels = np.array([classes.index(label) for label in places["label"]])
    splits = split_by_group(labels, places["group"].to_list(), seed=seed)
    table = places.with_columns(
        pl.Series("index", np.arange(len(places))),
        pl.Series("class", labels),
        pl.Series("split", splits),
    ).select(pl.col(column).cast(dtype) for column, dtype in TABLE_SCHEMA.items())
    return PatchDataset(name, organ, classes, mpp, pixels, table)


def _glas(manifest: pl.DataFrame, folder: Path, cache: Path, seed: int, name: str) -> TissueTask:
    """Cut regions of GlaS: all patches with the region's grade, or patches of gland and stroma."""
    kept = cache / f"{name}-{seed}"
    if not kept.exists():
        regions = manifest.filter(task="glas_grade", kind="region775")
        masks = {
            Path(row).stem: row for row in manifest.filter(task="glas_grade", kind="mask")["path"]
        }
        rng = np.random.default_rng(0)
        cut = _grade_patches if name == "glas_grade" else _gland_patches
        rows: list[tuple[str, int, int, int, int, str, str]] = []
        pixels: list[Pixels] = []
        for region in regions.sort("path").iter_rows(named=True):
            image = read_image(folder / region["path"])
            mask = read_image(folder / masks[Path(region["path"]).stem])[..., 0] > 127
            for x, y, label in cut(image, mask, region["label"], rng):
                pixels.append(image[y : y + PATCH, x : x + PATCH])
                place = (x, y, y // (PATCH // 2), x // (PATCH // 2))
                rows.append((region["path"], *place, label, region["group"]))
        places = pl.DataFrame(
            rows, ["source", "x", "y", "row", "column", "label", "group"], orient="row"
        )
        classes = ("benign", "malignant") if name == "glas_grade" else ("stroma", "gland")
        made = dataset(name, "colon", classes, GLAS_MPP, np.stack(pixels), places, seed)
        with atomic_folder(kept) as partial:
            save_patch_task(partial, made)
    unit: Literal["patch", "region"] = "region" if name == "glas_grade" else "patch"
    return TissueTask(load_patch_task(kept), unit, "glas")


def _grade_patches(
    image: Pixels, mask: NDArray[np.bool_], grade: str, rng: np.random.Generator
) -> Iterator[tuple[int, int, str]]:
    height, width = mask.shape
    for x, y in patch_places(height, width, PATCH):
        yield x, y, grade


def _gland_patches(
    image: Pixels, mask: NDArray[np.bool_], grade: str, rng: np.random.Generator
) -> Iterator[tuple[int, int, str]]:
    """Yield patches whose central square of 64 px is mostly gland, or mostly not."""
    height, width = mask.shape
    quarter = PATCH // 4
    found: dict[str, list[tuple[int, int]]] = {"gland": [], "stroma": []}
    for y in range(0, height - PATCH + 1, PATCH // 2):
        for x in range(0, width - PATCH + 1, PATCH // 2):
            centre = mask[y + quarter : y + 3 * quarter, x + quarter : x + 3 * quarter].mean()
            if centre >= GLAND_SHARE:
                found["gland"].append((x, y))
            elif centre <= 1 - GLAND_SHARE:
                found["stroma"].append((x, y))
    for label, places in found.items():
        for number in sorted(rng.permutation(len(places))[:GLANDS_PER_REGION]):
            yield *places[number], label

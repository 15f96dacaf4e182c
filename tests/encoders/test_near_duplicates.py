"""Tests of near-duplicates: modified copies are found, other tissue is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import simplejpeg
from scipy import ndimage

from nic_core.cohort import PatchTask
from nic_core.encoders.near_duplicates import near_duplicates
from nic_core.encoders.patch_tasks import build_patch_task


def tissue(seed: int, side: int = 160) -> np.ndarray:
    """Draw blobs of the size of nuclei on a textured background."""
    rng = np.random.default_rng(seed)
    fine, coarse = (ndimage.gaussian_filter(rng.normal(size=(side, side)), s) for s in (3, 12))
    grey = (
        170 - 45 * (fine > fine.std()) + 20 * coarse / coarse.std() + rng.normal(0, 3, (side,) * 2)
    )
    return (grey[..., None] * [1.0, 0.75, 1.0]).clip(0, 255).astype(np.uint8)


def patch(seed: int, x: int = 16, y: int = 16, side: int = 128) -> np.ndarray:
    return tissue(seed)[y : y + side, x : x + side]


def again(pixels: np.ndarray, quality: int) -> np.ndarray:
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality)
    return simplejpeg.decode_jpeg(data)


COPIES: dict[str, Callable[[int], np.ndarray]] = {
    "JPEG 80": lambda seed: again(patch(seed), 80),
    "JPEG 30": lambda seed: again(patch(seed), 30),
    "brighter": lambda seed: (patch(seed) * 0.85 + 30).astype(np.uint8),
    "darker, gamma 1.4": lambda seed: (255 * (patch(seed) / 255) ** 1.4).astype(np.uint8),
    "shifted 4 px": lambda seed: patch(seed, 20, 12),
    "all together": lambda seed: again((patch(seed, 13, 18) * 0.9 + 20).astype(np.uint8), 50),
    "mirrored": lambda seed: patch(seed)[:, ::-1],
    "rotated": lambda seed: np.rot90(patch(seed)),
}  # fmt: skip


@pytest.mark.parametrize("kind", COPIES)
def test_a_modified_copy_in_another_split_is_found(kind: str):
    patches = [patch(seed) for seed in range(40)]
    patches += [COPIES[kind](seed) for seed in (3, 17, 31)] + [patch(seed) for seed in (90, 91)]
    splits = ["train"] * 40 + ["validation", "test", "test", "test", "validation"]
    pairs = near_duplicates(np.stack(patches), splits)
    assert pairs.select("index", "other").rows() == [(40, 3), (41, 17), (42, 31)]


def test_copies_are_found_across_splits_not_within_one():
    patches = np.stack([patch(0), patch(0), patch(1), patch(1), patch(2)])
    splits = ["train", "train", "validation", "test", "test"]
    assert near_duplicates(patches, splits).select("index", "other").rows() == [(3, 2)]


@pytest.mark.parametrize("side", [64, 96, 256])
def test_near_duplicates_of_any_patch_size_are_found(side: int):
    big = [tissue(seed, side + 20) for seed in range(12)]
    patches = [image[:side, :side] for image in big] + [big[5][2 : side + 2, 1 : side + 1]]
    pairs = near_duplicates(np.stack(patches), ["train"] * 12 + ["test"])
    assert pairs.select("index", "other").rows() == [(12, 5)]


def test_mostly_empty_patches_are_not_compared():
    empty = np.full((4, 128, 128, 3), 240, np.uint8)
    empty[:, :30, :30] = patch(0)[:30, :30]
    noisy = empty + np.random.default_rng(0).integers(0, 3, empty.shape, dtype=np.uint8)
    assert near_duplicates(noisy, ["train", "validation", "test", "test"]).is_empty()


@pytest.mark.parametrize(
    ("task", "mpp"), [("idc", 4.0), ("nct_crc", 0.5), ("osteosarcoma", 1.0), ("lc25000", 0.5)]
)
def test_real_tissue_of_other_patients_has_no_near_duplicates(
    real_data: Path, tmp_path: Path, task: str, mpp: float
):
    table = tmp_path / "table.csv"
    rows = pl.read_csv(real_data / "MANIFEST.csv", infer_schema=False).filter(
        pl.col("task") == task
    )
    rows = rows.with_columns(path=pl.format("{}/{}", pl.lit(str(real_data)), "path"))
    rows.sample(min(len(rows), 500), seed=0).write_csv(table)
    declared = PatchTask(
        name=task,
        organ="any",
        mpp=mpp,
        table=table,
        group_column=None if task == "osteosarcoma" else "group",
    )
    study = mpp * 50 / 128 if task == "idc" else mpp
    dataset = build_patch_task(declared, patch=128, mpp=study, seed=0)
    assert dataset.found("near_duplicate").is_empty()

"""Grids with planted structure: tumour nests that have a rim of stroma, or have not.

Both kinds of slide have the same composition of cells, so only the arrangement differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
from scipy import ndimage

EMBEDDING_SIZE = 16


@dataclass(frozen=True)
class ArrayGrid:
    """A grid in memory; implements :class:`nic_core.models.crops.GridData`."""

    embeddings: np.ndarray
    valid: np.ndarray
    orientations: np.ndarray | None = None

    def oriented(self, k: int) -> np.ndarray:
        return self.embeddings if k == 0 else self.orientations[k]


@dataclass(frozen=True)
class Planted:
    grids: dict[str, ArrayGrid]
    table: pl.DataFrame  # unit, patient, slides, split, rim (int), grade (float)

    def source(self, slide: str) -> ArrayGrid:
        return self.grids[slide]


def plant_grid(random: np.random.Generator, rim: bool, grade: float, means: np.ndarray):
    rows, columns = random.integers(16, 20, 2)
    y, x = np.mgrid[:rows, :columns]
    tissue = np.hypot((y - rows / 2) / rows, (x - columns / 2) / columns) < 0.47
    depth = ndimage.distance_transform_edt(np.pad(tissue, 1))[1:-1, 1:-1]
    tumour = np.zeros_like(tissue)
    for cy, cx in random.permutation(np.argwhere(depth > 3.5))[:3]:
        tumour |= np.hypot(y - cy, x - cx) < random.uniform(1.5, 2.6)
    ring = ndimage.binary_dilation(tumour, np.ones((3, 3))) & ~tumour & tissue
    stroma = ring
    if not rim:
        clumps = ndimage.gaussian_filter(random.normal(size=tissue.shape), 1)
        clumps[~tissue | tumour | ring] = -np.inf
        best = np.argsort(clumps.ravel())[::-1][: ring.sum()]
        stroma = np.zeros_like(tissue)
        stroma.ravel()[best[np.isfinite(clumps.ravel()[best])]] = True
    kind = np.where(tumour, 0, np.where(stroma, 1, 2))
    embeddings = means[kind] + grade * tumour[..., None] * means[3]
    embeddings = (
        embeddings + random.normal(size=embeddings.shape) + 0.2 * random.normal(size=EMBEDDING_SIZE)
    )
    embeddings = np.where(tissue[..., None], embeddings, 0).transpose(2, 0, 1)
    return ArrayGrid(np.ascontiguousarray(embeddings, np.float16), tissue)


def plant(patients: int, seed: int = 0, slides: int = 1) -> Planted:
    random = np.random.default_rng(seed)
    means = 1.5 * random.normal(size=(4, EMBEDDING_SIZE))
    grids, rows = {}, []
    for i in range(patients):
        rim, grade = i % 2, random.uniform(0, 1)
        for j in range(slides):
            name = f"s{i:02d}-{j}"
            grids[name] = plant_grid(random, bool(rim), grade, means)
            rows.append((name, f"p{i:02d}", [name], "cv", rim, grade))
    schema = ["unit", "patient", "slides", "split", "rim", "grade"]
    return Planted(grids, pl.DataFrame(rows, schema=schema, orient="row"))


@pytest.fixture(scope="session")
def planted() -> Planted:
    """40 patients with one slide each."""
    return plant(40)


@pytest.fixture(scope="session")
def few() -> Planted:
    """12 patients with two slides each."""
    return plant(12, seed=1, slides=2)

"""Patch tasks of the demo cohort: one painted sheet per patient, cut into labelled patches.

Organs and classes follow the four tasks of [A] (method section 1); the images are synthetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nic_core.demo.cells import (
    COLON,
    PROSTATE,
    Bools,
    GlandStyle,
    Tumour,
    add_figures,
    add_glands,
    populate,
)
from nic_core.demo.layout import add_tumour_detail, scatter_vessels
from nic_core.demo.nuclei import Nucleus
from nic_core.demo.painter import RASTER, Floats, Scene, paint, random_stain, smooth_noise
from nic_core.demo.tissues import Tissue

PATCH = 128  # px per side, at 0.5 um/px
_CELL = PATCH // RASTER  # raster points per patch
_MARGIN = 5  # raster points around a zone, which may contain cells of the adjacent zone

COLORECTAL = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")


@dataclass(frozen=True)
class DemoTask:
    """A patch task.

    ``cut`` paints the sheet of one patient: (rng, patches of each class) -> [(class, pixels)].
    """

    name: str
    organ: str
    classes: tuple[str, ...]
    cut: Callable[[np.random.Generator, tuple[int, ...]], list[tuple[int, NDArray[np.uint8]]]]


def _fibres(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    y, x = (RASTER * a.astype(np.float32) for a in np.indices(shape))
    turn = rng.uniform(0, np.pi)
    bend = rng.uniform(20, 70) * smooth_noise(rng, shape, 280 / RASTER)
    return np.asarray(y * np.cos(turn) - x * np.sin(turn) + bend, np.float32)


def _empty(rng: np.random.Generator, cells: int, ground: Tissue) -> Scene:
    shape = (cells * _CELL, cells * _CELL)
    return Scene(np.full(shape, ground, np.uint8), _fibres(rng, shape))


def _share(where: Bools) -> Floats:
    """Return the share of each cell that ``where`` covers, float32 (cells, cells)."""
    cells = where.shape[0] // _CELL
    return np.asarray(where.reshape(cells, _CELL, cells, _CELL).mean((1, 3)), np.float32)


def _choose(rng: np.random.Generator, fitness: Floats, count: int, good: float) -> NDArray[np.intp]:
    """Choose cells (count, 2): random among those fitter than ``good``, then the fittest."""
    flat = fitness.ravel() + rng.uniform(0, 1e-6, fitness.size)
    order = np.argsort(-np.where(flat > good, 1 + rng.random(flat.size), flat))
    return np.column_stack(np.unravel_index(order[:count], fitness.shape))


def _cut(
    sheet: NDArray[np.uint8], label: int, cells: NDArray[np.intp]
) -> list[tuple[int, NDArray[np.uint8]]]:
    return [_patch(sheet, label, i * PATCH, j * PATCH) for i, j in cells]


def _patch(
    sheet: NDArray[np.uint8], label: int, top: int, left: int
) -> tuple[int, NDArray[np.uint8]]:
    return label, sheet[top : top + PATCH, left : left + PATCH]


def _lymph_node(
    rng: np.random.Generator, counts: tuple[int, ...]
) -> list[tuple[int, NDArray[np.uint8]]]:
    """Paint lymphoid tissue with capsule, stroma, fat and metastases."""
    cells = max(3, int(np.ceil((2.2 * sum(counts)) ** 0.5)))
    scene = _empty(rng, cells, Tissue.LYMPHOCYTES)
    shape = scene.tissue.shape
    other = smooth_noise(rng, shape, 1.6 * _CELL)
    for kind, low, high in (
        (Tissue.STROMA, 0.70, 0.88),
        (Tissue.RIM, 0.88, 0.95),
        (Tissue.FAT, 0.95, 1.0),
    ):
        between = (other > np.quantile(other, low)) & (other <= np.quantile(other, high))
        scene.tissue[between] = kind
    field = smooth_noise(rng, shape, 2.2 * _CELL)
    metastasis = field > np.quantile(field, 0.45)
    scene.tissue[metastasis] = Tissue.TUMOUR
    add_tumour_detail(rng, scene.tissue)
    populate(scene, rng, Tumour(rng.uniform(1, 3), float(np.exp(rng.uniform(1.5, 5)))))
    sheet = paint(scene, random_stain(rng), rng)
    share = _share(metastasis)
    return _cut(sheet, 0, _choose(rng, 1 - share, counts[0], 0.99)) + _cut(
        sheet, 1, _choose(rng, share, counts[1], 0.75)
    )


def _breast_mitosis(
    rng: np.random.Generator, counts: tuple[int, ...]
) -> list[tuple[int, NDArray[np.uint8]]]:
    """Paint tumour of one grade; half of the negatives contain a mimic of a mitosis."""
    cells = max(2, int(np.ceil(sum(counts) ** 0.5)))
    scene = _empty(rng, cells, Tissue.TUMOUR)
    add_tumour_detail(rng, scene.tissue)
    chosen = rng.permutation(cells * cells)[: sum(counts)]
    places = np.column_stack(np.unravel_index(chosen, (cells, cells)))
    centres = (places + 0.5) * PATCH + rng.uniform(-22, 22, places.shape)
    y, x = centres.astype(np.float32).T
    mimic = rng.choice(4, len(chosen), p=(0.5, 0.17, 0.16, 0.17))
    kinds = np.where(np.arange(len(chosen)) < counts[0], mimic, 4)
    for k, kind in enumerate(
        (Nucleus.PYKNOTIC, Nucleus.HYPERCHROMATIC, Nucleus.APOPTOTIC, Nucleus.MITOSIS), start=1
    ):
        add_figures(scene, rng, kind, x[kinds == k], y[kinds == k])
    taken = x[kinds > 0], y[kinds > 0]
    populate(scene, rng, Tumour(rng.uniform(1, 3), 0.0), taken)
    sheet = paint(scene, random_stain(rng), rng)
    return _cut(sheet, 0, places[: counts[0]]) + _cut(sheet, 1, places[counts[0] :])


def _prostate_epithelium(
    rng: np.random.Generator, counts: tuple[int, ...]
) -> list[tuple[int, NDArray[np.uint8]]]:
    """Paint glands, benign or small and crowded, in muscular stroma with a few lymphocytes."""
    cells = max(3, int(np.ceil((2.6 * sum(counts)) ** 0.5)))
    scene = _empty(rng, cells, Tissue.STROMA)
    shape = scene.tissue.shape
    other = smooth_noise(rng, shape, 1.8 * _CELL)
    scene.tissue[other > np.quantile(other, 0.55)] = Tissue.MUSCLE
    scene.tissue[other < np.quantile(other, 0.05)] = Tissue.LYMPHOCYTES
    walls, lumens = scatter_vessels(rng, scene.tissue == Tissue.STROMA)
    scene.tissue[walls] = Tissue.MUSCLE
    scene.tissue[lumens] = Tissue.BLOOD
    field = smooth_noise(rng, shape, 2.5 * _CELL)
    crowded = rng.uniform(0, 1)
    style = GlandStyle(
        radius=PROSTATE.radius * (1 - 0.45 * crowded),
        lumen=PROSTATE.lumen * (1 - 0.35 * crowded),
        goblets=0.0,
        wobble=PROSTATE.wobble,
        spacing=PROSTATE.spacing * (1 - 0.45 * crowded),
    )
    add_glands(scene, rng, field > np.quantile(field, 0.45), style)
    populate(scene, rng, Tumour(1, 0))
    sheet = paint(scene, random_stain(rng), rng)
    gland = _share(scene.tissue == Tissue.GLAND)
    lumen = _share(scene.tissue == Tissue.LUMEN)
    return _cut(sheet, 0, _choose(rng, 1 - gland - lumen, counts[0], 0.985)) + _cut(
        sheet, 1, _choose(rng, gland, counts[1], 0.30)
    )


_ZONES = {
    "ADI": Tissue.FAT,
    "BACK": Tissue.BACKGROUND,
    "DEB": Tissue.NECROSIS,
    "LYM": Tissue.LYMPHOCYTES,
    "MUC": Tissue.MUCUS,
    "MUS": Tissue.MUSCLE,
    "NORM": Tissue.STROMA,
    "STR": Tissue.RIM,
    "TUM": Tissue.TUMOUR,
}


def _colorectal(
    rng: np.random.Generator, counts: tuple[int, ...]
) -> list[tuple[int, NDArray[np.uint8]]]:
    """Paint nine square zones, one per class."""
    side = max(1, int(np.ceil(max(counts) ** 0.5)))
    pitch = side * _CELL + 2 * _MARGIN
    shape = (3 * pitch, 3 * pitch)
    scene = Scene(np.full(shape, Tissue.STROMA, np.uint8), _fibres(rng, shape))
    corners = [(pitch * i, pitch * j) for i, j in np.argwhere(np.ones((3, 3)))]
    zones = rng.permutation(corners)
    normal = np.zeros(shape, bool)
    for (i, j), name in zip(zones, COLORECTAL, strict=True):
        window = (slice(i, i + pitch), slice(j, j + pitch))
        scene.tissue[window] = _ZONES[name]
        normal[window] = name == "NORM"
    # between crypts: lamina propria with lymphocytes; elsewhere submucosa without crypts
    lamina = smooth_noise(rng, shape, 90 / RASTER) > 0.9
    scene.tissue[normal & lamina] = Tissue.LYMPHOCYTES
    add_tumour_detail(rng, scene.tissue)
    mucosa = smooth_noise(rng, shape, 1.5 * _CELL) > -0.55
    add_glands(scene, rng, normal & mucosa, COLON)
    populate(scene, rng, Tumour(rng.uniform(1, 3), float(np.exp(rng.uniform(1.5, 5)))))
    sheet = paint(scene, random_stain(rng), rng)
    out = []
    for label, ((i, j), count) in enumerate(zip(zones, counts, strict=True)):
        for cell in rng.permutation(side * side)[:count]:
            row, column = divmod(int(cell), side)
            top, left = (
                (i + _MARGIN) * RASTER + row * PATCH,
                (j + _MARGIN) * RASTER + column * PATCH,
            )
            out.append(_patch(sheet, label, top, left))
    return out


TASKS = (
    DemoTask("lymph_node", "lymph node", ("normal", "tumor"), _lymph_node),
    DemoTask("breast_mitosis", "breast", ("non_mitosis", "mitosis"), _breast_mitosis),
    DemoTask("prostate_epithelium", "prostate", ("other", "epithelium"), _prostate_epithelium),
    DemoTask("colorectal", "colon", COLORECTAL, _colorectal),
)

"""Patch tasks of the demo cohort: one painted sheet per patient, cut into labelled patches.

Organs and classes follow the four tasks of [A] (method section 1); the images are synthetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
from nic_core.demo.painter import RASTER, Floats, Scene, paint, smooth_noise
from nic_core.demo.tissues import Tissue
from nic_core.demo.variety import PATCH, Form, Variety, draw_form, draw_stain, resized

_MARGIN = 5  # raster points around a zone, which may contain cells of the adjacent zone

Labelled = list[tuple[int, NDArray[np.uint8]]]  # (class, pixels)

COLORECTAL = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")


@dataclass(frozen=True)
class DemoTask:
    """A patch task.

    ``cut`` paints the patches of one patient: (rng, patches of each class, variety) -> [(class,
    pixels)], pixels uint8 (PATCH, PATCH, 3).
    """

    name: str
    organ: str
    classes: tuple[str, ...]
    cut: Callable[[np.random.Generator, tuple[int, ...], Variety], Labelled]


def class_counts(patches: int, patients: int, classes: int) -> list[tuple[int, ...]]:
    """Return for each patient the number of patches of each class, balanced over both."""
    counts = []
    for c in range(classes):
        of_class = patches // classes + (c < patches % classes)
        edges = np.linspace(0, of_class, patients + 1) + c / classes
        counts.append(np.diff(np.floor(edges).astype(int)).tolist())
    return list(zip(*counts, strict=True))


def fibres(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Return the potential of fibres that bend, float32 of the shape of the raster, px."""
    y, x = (RASTER * a.astype(np.float32) for a in np.indices(shape))
    turn = rng.uniform(0, np.pi)
    bend = rng.uniform(20, 70) * smooth_noise(rng, shape, 280 / RASTER)
    return np.asarray(y * np.cos(turn) - x * np.sin(turn) + bend, np.float32)


def empty(rng: np.random.Generator, cells: int, ground: Tissue, form: Form) -> Scene:
    """Return a scene of ``cells`` x ``cells`` patches without nuclei."""
    shape = (cells * form.window, cells * form.window)
    return Scene(np.full(shape, ground, np.uint8), fibres(rng, shape), shapes=form.shapes)


def _share(where: Bools, form: Form) -> Floats:
    """Return the share of each cell that ``where`` covers, float32 (cells, cells)."""
    n = form.window
    cells = where.shape[0] // n
    return np.asarray(where.reshape(cells, n, cells, n).mean((1, 3)), np.float32)


def _choose(rng: np.random.Generator, fitness: Floats, count: int, good: float) -> NDArray[np.intp]:
    """Choose cells (count, 2): random among those fitter than ``good``, then the fittest."""
    flat = fitness.ravel() + rng.uniform(0, 1e-6, fitness.size)
    order = np.argsort(-np.where(flat > good, 1 + rng.random(flat.size), flat))
    return np.column_stack(np.unravel_index(order[:count], fitness.shape))


def painted(
    rng: np.random.Generator, scene: Scene, form: Form, variety: Variety
) -> NDArray[np.uint8]:
    """Paint a scene at the um/px of ``form``: uint8, PATCH px for each ``form.window`` points."""
    return resized(paint(scene, draw_stain(rng, variety), rng), form)


def _cut(sheet: NDArray[np.uint8], label: int, cells: NDArray[np.intp]) -> Labelled:
    return [_patch(sheet, label, i * PATCH, j * PATCH) for i, j in cells]


def _patch(
    sheet: NDArray[np.uint8], label: int, top: int, left: int
) -> tuple[int, NDArray[np.uint8]]:
    return label, sheet[top : top + PATCH, left : left + PATCH]


def _lymph_node(rng: np.random.Generator, counts: tuple[int, ...], variety: Variety) -> Labelled:
    """Paint lymphoid tissue with capsule, stroma, fat and metastases."""
    form = draw_form(rng, variety)
    cells = max(3, int(np.ceil((2.2 * sum(counts)) ** 0.5)))
    scene = empty(rng, cells, Tissue.LYMPHOCYTES, form)
    shape = scene.tissue.shape
    other = smooth_noise(rng, shape, 1.6 * form.window)
    for kind, low, high in (
        (Tissue.STROMA, 0.70, 0.88),
        (Tissue.RIM, 0.88, 0.95),
        (Tissue.FAT, 0.95, 1.0),
    ):
        between = (other > np.quantile(other, low)) & (other <= np.quantile(other, high))
        scene.tissue[between] = kind
    field = smooth_noise(rng, shape, 2.2 * form.window)
    metastasis = field > np.quantile(field, 0.45)
    scene.tissue[metastasis] = Tissue.TUMOUR
    add_tumour_detail(rng, scene.tissue)
    populate(scene, rng, Tumour(rng.uniform(1, 3), float(np.exp(rng.uniform(1.5, 5)))))
    sheet = painted(rng, scene, form, variety)
    share = _share(metastasis, form)
    return _cut(sheet, 0, _choose(rng, 1 - share, counts[0], 0.99)) + _cut(
        sheet, 1, _choose(rng, share, counts[1], 0.75)
    )


def _breast_mitosis(
    rng: np.random.Generator, counts: tuple[int, ...], variety: Variety
) -> Labelled:
    """Paint tumour of one grade; half of the negatives contain a mimic of a mitosis."""
    form = draw_form(rng, variety)
    cells = max(2, int(np.ceil(sum(counts) ** 0.5)))
    scene = empty(rng, cells, Tissue.TUMOUR, form)
    add_tumour_detail(rng, scene.tissue)
    chosen = rng.permutation(cells * cells)[: sum(counts)]
    places = np.column_stack(np.unravel_index(chosen, (cells, cells)))
    centres = (places + 0.5) * form.side + rng.uniform(-22, 22, places.shape)
    y, x = centres.astype(np.float32).T
    mimic = rng.choice(4, len(chosen), p=(0.5, 0.17, 0.16, 0.17))
    kinds = np.where(np.arange(len(chosen)) < counts[0], mimic, 4)
    for k, kind in enumerate(
        (Nucleus.PYKNOTIC, Nucleus.HYPERCHROMATIC, Nucleus.APOPTOTIC, Nucleus.MITOSIS), start=1
    ):
        add_figures(scene, rng, kind, x[kinds == k], y[kinds == k])
    taken = x[kinds > 0], y[kinds > 0]
    populate(scene, rng, Tumour(rng.uniform(1, 3), 0.0), taken)
    sheet = painted(rng, scene, form, variety)
    return _cut(sheet, 0, places[: counts[0]]) + _cut(sheet, 1, places[counts[0] :])


def _prostate_epithelium(
    rng: np.random.Generator, counts: tuple[int, ...], variety: Variety
) -> Labelled:
    """Paint glands, benign or small and crowded, in muscular stroma with a few lymphocytes."""
    form = draw_form(rng, variety)
    cells = max(3, int(np.ceil((2.6 * sum(counts)) ** 0.5)))
    scene = empty(rng, cells, Tissue.STROMA, form)
    shape = scene.tissue.shape
    other = smooth_noise(rng, shape, 1.8 * form.window)
    scene.tissue[other > np.quantile(other, 0.55)] = Tissue.MUSCLE
    scene.tissue[other < np.quantile(other, 0.05)] = Tissue.LYMPHOCYTES
    walls, lumens = scatter_vessels(rng, scene.tissue == Tissue.STROMA)
    scene.tissue[walls] = Tissue.MUSCLE
    scene.tissue[lumens] = Tissue.BLOOD
    field = smooth_noise(rng, shape, 2.5 * form.window)
    crowded = rng.uniform(0, 1)
    style = GlandStyle(
        radius=PROSTATE.radius * (1 - 0.45 * crowded) * form.glands,
        lumen=PROSTATE.lumen * (1 - 0.35 * crowded),
        goblets=0.0,
        wobble=PROSTATE.wobble,
        spacing=PROSTATE.spacing * (1 - 0.45 * crowded) * form.glands,
    )
    add_glands(scene, rng, field > np.quantile(field, 0.45), style)
    populate(scene, rng, Tumour(1, 0))
    sheet = painted(rng, scene, form, variety)
    gland = _share(scene.tissue == Tissue.GLAND, form)
    lumen = _share(scene.tissue == Tissue.LUMEN, form)
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


def _colorectal(rng: np.random.Generator, counts: tuple[int, ...], variety: Variety) -> Labelled:
    """Paint nine square zones, one per class."""
    form = draw_form(rng, variety)
    side = max(1, int(np.ceil(max(counts) ** 0.5)))
    pitch = side * form.window + 2 * _MARGIN
    shape = (3 * pitch, 3 * pitch)
    scene = Scene(np.full(shape, Tissue.STROMA, np.uint8), fibres(rng, shape), shapes=form.shapes)
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
    mucosa = smooth_noise(rng, shape, 1.5 * form.window) > -0.55
    crypts = replace(COLON, radius=COLON.radius * form.glands, spacing=COLON.spacing * form.glands)
    add_glands(scene, rng, normal & mucosa, crypts)
    populate(scene, rng, Tumour(rng.uniform(1, 3), float(np.exp(rng.uniform(1.5, 5)))))
    sheet = painted(rng, scene, form, variety)
    out = []
    for label, ((i, j), count) in enumerate(zip(zones, counts, strict=True)):
        for cell in rng.permutation(side * side)[:count]:
            row, column = divmod(int(cell), side)
            # the margin is in raster points of the scene, the sheet at the patient's um/px
            top, left = (
                round((start + _MARGIN) * PATCH / form.window) + step * PATCH
                for start, step in ((i, row), (j, column))
            )
            out.append(_patch(sheet, label, top, left))
    return out


TASKS = (
    DemoTask("lymph_node", "lymph node", ("normal", "tumor"), _lymph_node),
    DemoTask("breast_mitosis", "breast", ("non_mitosis", "mitosis"), _breast_mitosis),
    DemoTask("prostate_epithelium", "prostate", ("other", "epithelium"), _prostate_epithelium),
    DemoTask("colorectal", "colon", COLORECTAL, _colorectal),
)

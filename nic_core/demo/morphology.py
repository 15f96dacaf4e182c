"""Patch tasks of morphology: glands, nuclei, cells and fibres, for encoders of real tissue.

The demo cohort does not use them; :func:`nic_core.demo.painted.paint_task` paints them. Classes
differ in form only: within a patient, the mean colours of patches are exchanged at random
(:func:`nic_core.demo.variety.exchange_colours`), so that they carry hardly any label. Patches of
a sheet may overlap by half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, spatial

from nic_core.demo.cells import (
    COLON,
    Bools,
    Tumour,
    add_clefts,
    add_figures,
    add_glands,
    add_malignant_glands,
    away_from,
    fibre_angle,
    populate,
    scatter,
)
from nic_core.demo.layout import add_tumour_detail
from nic_core.demo.nuclei import TUMOUR_GRADES, Nucleus
from nic_core.demo.painter import RASTER, Floats, Nuclei, Scene, paint, smooth_noise
from nic_core.demo.patches import DemoTask, Labelled, empty
from nic_core.demo.tissues import Tissue
from nic_core.demo.variety import (
    PATCH,
    Form,
    Variety,
    draw_form,
    draw_stain,
    exchange_colours,
    resized,
)

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class _Sheet:
    """A scene and the patches that are cut from it.

    Attributes
    ----------
    scene
    corners
        float (N, 2): top and left of each patch in painted px, inside the scene.
    labels
        int64 (N,)
    """

    scene: Scene
    corners: NDArray[np.float64]
    labels: Integers


_Plan = Callable[[np.random.Generator, tuple[int, ...], Form], list[_Sheet]]


def _cut(
    rng: np.random.Generator, counts: tuple[int, ...], variety: Variety, *, plan: _Plan
) -> Labelled:
    """Paint the sheets of ``plan``, cut them, and exchange the mean colours of the patches."""
    form = draw_form(rng, variety)
    sheets = plan(rng, counts, form)
    stain = draw_stain(rng, variety)
    labels: list[int] = []
    patches: list[NDArray[np.uint8]] = []
    for sheet in sheets:
        picture = resized(paint(sheet.scene, stain, rng), form)
        last = np.array(picture.shape[:2]) - PATCH
        corners = np.rint(sheet.corners * PATCH / form.side).astype(int).clip(0, last)
        patches += [picture[y : y + PATCH, x : x + PATCH] for y, x in corners]
        labels += sheet.labels.tolist()
    if not patches:
        return []
    exchanged = exchange_colours(np.stack(patches), stain.white, rng)
    return list(zip(labels, exchanged, strict=True))


def _lattice(rng: np.random.Generator, windows: int, form: Form) -> NDArray[np.float64]:
    """Return corners of windows that overlap by about half, (N, 2) in px of the scene.

    The scene is that of :func:`_plain` with so many windows.
    """
    steps = np.indices((2 * windows - 1, 2 * windows - 1)).reshape(2, -1).T
    return steps * form.side / 2 + rng.uniform(0, form.side / 2, steps.shape)


def _windows(count: int) -> int:
    """Return the windows along a side of the scene whose lattice has ``count`` corners."""
    return max(2, int(np.ceil((np.sqrt(count) + 1) / 2)))


def _plain(rng: np.random.Generator, windows: int, ground: Tissue, form: Form) -> Scene:
    """Return a scene of one tissue, of ``windows`` + 1 patches along a side."""
    return empty(rng, windows + 1, ground, form)


def _by_class(
    rng: np.random.Generator,
    counts: tuple[int, ...],
    form: Form,
    make: Callable[[int, int], Scene],
) -> list[_Sheet]:
    """Plan one sheet for each class: ``make(class, windows)`` returns its scene."""
    sheets = []
    for label, count in enumerate(counts):
        if count == 0:
            continue
        windows = _windows(count)
        corners = rng.permutation(_lattice(rng, windows, form))[:count]
        sheets.append(_Sheet(make(label, windows), corners, np.full(count, label)))
    return sheets


def _add(scene: Scene, rng: np.random.Generator, kind: Nucleus, x: Floats, y: Floats) -> None:
    """Add nuclei; spindles follow the fibres."""
    angle = None
    if kind in (Nucleus.SPINDLE, Nucleus.MUSCLE):
        angle = fibre_angle(scene, x, y) + rng.normal(0, 0.2, len(x)).astype(np.float32)
    scene.cells.append(Nuclei(kind, x, y, angle))


def _add_mixture(
    scene: Scene,
    rng: np.random.Generator,
    where: Bools,
    spacing: float,
    keep: float,
    shares: dict[Nucleus, float],
) -> list[tuple[Nucleus, Floats, Floats]]:
    """Scatter nuclei of several kinds, mixed at random in these shares; return them."""
    x, y = scatter(rng, where, spacing * scene.shapes.spacing, keep)
    weights = np.array(list(shares.values()))
    chosen = rng.choice(len(shares), len(x), p=weights / weights.sum())
    added = []
    for k, kind in enumerate(shares):
        part = chosen == k
        _add(scene, rng, kind, x[part], y[part])
        added.append((kind, x[part], y[part]))
    return added


# --- glands ---


def _lamina(rng: np.random.Generator, scene: Scene) -> None:
    """Add the cells between glands, from few fibroblasts to dense inflammation."""
    stroma = np.isin(scene.tissue, (Tissue.STROMA, Tissue.RIM, Tissue.LYMPHOCYTES))
    dense = stroma & (smooth_noise(rng, stroma.shape, 110 / RASTER) > rng.uniform(-1.5, 1.5))
    inflamed = {
        Nucleus.LYMPHOCYTE: 1.0,
        Nucleus.SPINDLE: rng.uniform(0.2, 0.8),
        Nucleus.VESICULAR: rng.uniform(0.1, 0.5),
        Nucleus.EPITHELIAL: rng.uniform(0.0, 0.3),  # plasma cells
    }
    _add_mixture(scene, rng, dense, rng.uniform(14, 20), 0.9, inflamed)
    _add_mixture(
        scene, rng, stroma & ~dense, 27, 0.7, {Nucleus.SPINDLE: 1.0, Nucleus.LYMPHOCYTE: 0.2}
    )


def _stroma_ground(rng: np.random.Generator, scene: Scene) -> None:
    """Turn parts of the loose stroma into dense stroma, lamina propria and gaps."""
    for kind, period, low, high in (
        (Tissue.RIM, 200, 0.3, 1.5),
        (Tissue.LYMPHOCYTES, 200, -0.8, 1.0),
        (Tissue.BACKGROUND, 34, 1.2, 2.6),
    ):
        some = smooth_noise(rng, scene.tissue.shape, period / RASTER) > rng.uniform(low, high)
        scene.tissue[some & (scene.tissue == Tissue.STROMA)] = kind


def _add_benign(scene: Scene, rng: np.random.Generator, where: Bools, form: Form) -> None:
    """Add round or oval crypts with one row of basal nuclei."""
    radius = COLON.radius * form.glands * rng.uniform(0.85, 1.4)
    style = replace(
        COLON,
        radius=radius,
        spacing=radius * rng.uniform(2.15, 2.7),
        lumen=rng.uniform(0.12, 0.42),
        goblets=rng.uniform(0.2, 0.95),
        wobble=rng.uniform(0.02, 0.07),
        nucleus=Nucleus.COLUMNAR,
    )
    add_glands(scene, rng, where, style)


def _gland_grade(rng: np.random.Generator, counts: tuple[int, ...], form: Form) -> list[_Sheet]:
    """Regular crypts, or irregular, fused and cribriform glands with rows of long nuclei."""
    sheets = []
    for label, count in enumerate(counts):
        windows = _windows(int(1.6 * count))
        scene = _plain(rng, windows, Tissue.STROMA, form)
        everywhere = np.ones(scene.tissue.shape, bool)
        if label == 0:
            _add_benign(scene, rng, everywhere, form)
        else:
            add_malignant_glands(scene, rng, everywhere, form.glands)
        _stroma_ground(rng, scene)
        add_clefts(scene, rng)
        _lamina(rng, scene)
        corners = _lattice(rng, windows, form)
        epithelium = _share(scene.tissue == Tissue.GLAND, corners, form.window, form)
        chosen = _fittest(rng, epithelium, count, 0.25)
        sheets.append(_Sheet(scene, corners[chosen], np.full(count, label)))
    return sheets


def _gland_stroma(rng: np.random.Generator, counts: tuple[int, ...], form: Form) -> list[_Sheet]:
    """Stroma, or gland, in the central half of the patch; crypts and malignant glands."""
    windows = _windows(int(2.4 * sum(counts)))
    scene = _plain(rng, windows, Tissue.STROMA, form)
    shape = scene.tissue.shape
    malignant = smooth_noise(rng, shape, 3 * form.window) > rng.normal()
    _add_benign(scene, rng, ~malignant, form)
    free = malignant & ~np.isin(scene.tissue, (Tissue.GLAND, Tissue.LUMEN))
    add_malignant_glands(scene, rng, free, form.glands)
    _stroma_ground(rng, scene)
    is_stroma = ~np.isin(scene.tissue, (Tissue.GLAND, Tissue.LUMEN, Tissue.NECROSIS))
    add_clefts(scene, rng)
    _lamina(rng, scene)
    corners = _lattice(rng, windows, form)
    gland = _share(~is_stroma, corners, form.window // 2, form)
    chosen = [
        _fittest(rng, fitness, count, 0.65)
        for fitness, count in zip((1 - gland, gland), counts, strict=True)
    ]
    return [
        _Sheet(
            scene,
            corners[np.concatenate(chosen)],
            np.repeat(np.arange(2), [len(c) for c in chosen]),
        )
    ]


def _share(where: Bools, corners: NDArray[np.float64], points: int, form: Form) -> Floats:
    """Return the share of ``where`` in the central ``points`` x ``points`` of patches (N,)."""
    share = ndimage.uniform_filter(where.astype(np.float32), points)
    i, j = ((corners + form.side / 2) / RASTER).astype(int).T
    return np.asarray(share[i, j], np.float32)


def _fittest(
    rng: np.random.Generator, fitness: Floats, count: int, good: float
) -> NDArray[np.intp]:
    """Choose ``count`` indices: random among those fitter than ``good``, then the fittest."""
    return np.argsort(-np.where(fitness > good, 1 + rng.random(len(fitness)), fitness))[:count]


# --- nuclei and cells ---


def _nuclear_grade(rng: np.random.Generator, counts: tuple[int, ...], form: Form) -> list[_Sheet]:
    """Tumour nuclei of grade 1, 2 or 3, of the same density; all have mitoses and mimics."""
    mitoses = float(np.exp(rng.uniform(1.5, 5)))

    def make(label: int, windows: int) -> Scene:
        scene = _plain(rng, windows, Tissue.TUMOUR, form)
        add_tumour_detail(rng, scene.tissue)
        populate(scene, rng, Tumour(label + 1, mitoses))
        return scene

    return _by_class(rng, counts, form, make)


_LYMPHOCYTE_SHARES = (0.04, 0.30, 0.60, 0.95)


def _lymphocytes(rng: np.random.Generator, counts: tuple[int, ...], form: Form) -> list[_Sheet]:
    """Cells of the same density, of which few, some, many or nearly all are lymphocytes."""
    ground = rng.choice([Tissue.STROMA, Tissue.TUMOUR, Tissue.LYMPHOCYTES, Tissue.GLAND])
    spacing, keep = rng.uniform(16, 24), rng.uniform(0.6, 0.95)
    others = (Nucleus.SPINDLE, Nucleus.EPITHELIAL, Nucleus.VESICULAR, *TUMOUR_GRADES[:2])
    weights = rng.dirichlet(np.full(len(others), 0.7))

    def make(label: int, windows: int) -> Scene:
        scene = _plain(rng, windows, Tissue(ground), form)
        share = _LYMPHOCYTE_SHARES[label]
        shares = {k: (1 - share) * float(w) for k, w in zip(others, weights, strict=True)}
        everywhere = np.ones(scene.tissue.shape, bool)
        _add_mixture(scene, rng, everywhere, spacing, keep, shares | {Nucleus.LYMPHOCYTE: share})
        return scene

    return _by_class(rng, counts, form, make)


def _tumour_reactive(rng: np.random.Generator, counts: tuple[int, ...], form: Form) -> list[_Sheet]:
    """Reactive tissue with inflammation, or tumour of the same cellularity."""
    spacing, keep = rng.uniform(18, 24), rng.uniform(0.8, 0.97)
    ground = Tissue(rng.choice([Tissue.STROMA, Tissue.TUMOUR, Tissue.LYMPHOCYTES]))
    grade = rng.dirichlet((1, 1, 1))
    reactive = {
        Nucleus.LYMPHOCYTE: rng.uniform(0.4, 1.0),
        Nucleus.VESICULAR: rng.uniform(0.2, 0.8),
        Nucleus.SPINDLE: rng.uniform(0.1, 0.6),
        Nucleus.EPITHELIAL: rng.uniform(0.1, 0.4),
    }
    tumour = dict(zip(TUMOUR_GRADES, grade.tolist(), strict=True))
    tumour |= {Nucleus.STRATIFIED: rng.uniform(0, 0.3), Nucleus.LYMPHOCYTE: rng.uniform(0, 0.15)}

    def make(label: int, windows: int) -> Scene:
        scene = _plain(rng, windows, ground, form)
        septa = np.abs(smooth_noise(rng, scene.tissue.shape, 150 / RASTER)) < 0.08
        scene.tissue[septa] = Tissue.STROMA
        everywhere = np.ones(scene.tissue.shape, bool)
        _add_mixture(scene, rng, everywhere, spacing, keep, tumour if label else reactive)
        return scene

    return _by_class(rng, counts, form, make)


def _mitosis_apoptosis(
    rng: np.random.Generator, counts: tuple[int, ...], form: Form
) -> list[_Sheet]:
    """Tumour with a mitosis, or an apoptotic or pyknotic cell, near the middle of the patch."""
    total = sum(counts)
    windows = _windows(total)
    scene = _plain(rng, windows, Tissue.TUMOUR, form)
    add_tumour_detail(rng, scene.tissue)
    corners = rng.permutation(_lattice(rng, windows, form))[:total]
    labels = np.repeat(np.arange(2), counts)
    y, x = (corners + form.side / 2 + rng.uniform(-9, 9, corners.shape)).astype(np.float32).T
    pyknotic = rng.random(total) < 0.4
    for kind, part in (
        (Nucleus.MITOSIS, labels == 0),
        (Nucleus.APOPTOTIC, (labels == 1) & ~pyknotic),
        (Nucleus.PYKNOTIC, (labels == 1) & pyknotic),
    ):
        add_figures(scene, rng, kind, x[part], y[part])
    populate(scene, rng, Tumour(rng.uniform(1, 3), 0.0, 0.0, 0.0), (x, y))
    return [_Sheet(scene, corners, labels)]


_CELL_KINDS = (
    (Nucleus.LYMPHOCYTE,),
    (Nucleus.SPINDLE,),
    (Nucleus.EPITHELIAL, Nucleus.COLUMNAR),
    TUMOUR_GRADES[1:],
)


def _cell_kind(rng: np.random.Generator, counts: tuple[int, ...], form: Form) -> list[_Sheet]:
    """A lymphocyte, fibroblast, normal epithelial cell or tumour cell in the middle of the patch.

    Its neighbours are of all kinds.
    """
    total = sum(counts)
    windows = _windows(total)
    scene = _plain(rng, windows, Tissue.STROMA, form)
    some = smooth_noise(rng, scene.tissue.shape, 120 / RASTER) > rng.normal()
    scene.tissue[some] = rng.choice([Tissue.TUMOUR, Tissue.GLAND, Tissue.LYMPHOCYTES])
    labels = np.repeat(np.arange(len(counts)), counts)
    corners = rng.permutation(_lattice(rng, windows, form))[:total]
    y, x = (corners + form.side / 2 + rng.uniform(-4, 4, corners.shape)).astype(np.float32).T
    for label, of_class in enumerate(_CELL_KINDS):
        of_kind = rng.integers(len(of_class), size=total)
        for k, kind in enumerate(of_class):
            part = (labels == label) & (of_kind == k)
            _add(scene, rng, kind, x[part], y[part])
    kinds = [kind for of_class in _CELL_KINDS for kind in of_class]
    around_x, around_y = scatter(
        rng, np.ones(scene.tissue.shape, bool), rng.uniform(19, 28) * form.shapes.spacing, 0.8
    )
    around_x, around_y = away_from(around_x, around_y, (x, y), 16.0 * form.shapes.spacing)
    chosen = rng.integers(len(kinds), size=len(around_x))
    for k, kind in enumerate(kinds):
        _add(scene, rng, kind, around_x[chosen == k], around_y[chosen == k])
    return [_Sheet(scene, corners, labels)]


_GAP = 15.0  # px between the centre of a patch without a central nucleus and any nucleus


def _nucleus(rng: np.random.Generator, counts: tuple[int, ...], form: Form) -> list[_Sheet]:
    """No nucleus, or a nucleus, in the middle of the patch, in bands of several tissues.

    A nucleus is taken near each place without one, so that both classes have the same tissues.
    """
    windows = _windows(max(counts)) + 1
    scene = _plain(rng, windows, Tissue.STROMA, form)
    grounds = rng.permutation(
        [Tissue.TUMOUR, Tissue.STROMA, Tissue.MUSCLE, Tissue.GLAND, Tissue.LYMPHOCYTES]
    )[:4]
    field = smooth_noise(rng, scene.tissue.shape, 2 * form.window)
    edges = np.quantile(field, np.linspace(0, 1, len(grounds) + 1))
    x, y = [], []
    for (low, high), ground in zip(pairwise(edges), grounds, strict=True):
        where = (field >= low) & (field <= high)
        scene.tissue[where] = ground
        kinds = _KINDS_OF[Tissue(ground)]
        shares = dict(zip(kinds, rng.dirichlet(np.ones(len(kinds))).tolist(), strict=True))
        spacing, keep = rng.uniform(19, 30), rng.uniform(0.5, 0.8)
        for _, px, py in _add_mixture(scene, rng, where, spacing, keep, shares):
            x.append(px)
            y.append(py)
    nuclei = np.column_stack([np.concatenate(y), np.concatenate(x)])
    half, end = form.side / 2, np.array(scene.shape) - form.side / 2
    nuclei = nuclei[((nuclei >= half) & (nuclei <= end)).all(1)]
    tree = spatial.cKDTree(nuclei)
    gaps = rng.uniform(half, end, (40 * max(counts), 2))
    distance, _ = tree.query(gaps)
    gap = _GAP * form.shapes.spacing
    gaps = gaps[distance > gap][: max(counts)]
    near = tree.query(gaps[: counts[1]], k=6)[1]
    centred = nuclei[near[np.arange(len(near)), rng.integers(0, 6, len(near))]]
    centred += rng.uniform(-3, 3, centred.shape)
    centres = np.concatenate([gaps[: counts[0]], centred])
    return [_Sheet(scene, centres - half, np.repeat(np.arange(2), counts))]


_KINDS_OF = {
    Tissue.TUMOUR: (*TUMOUR_GRADES, Nucleus.STRATIFIED),
    Tissue.STROMA: (Nucleus.SPINDLE, Nucleus.LYMPHOCYTE, Nucleus.VESICULAR),
    Tissue.MUSCLE: (Nucleus.MUSCLE,),
    Tissue.GLAND: (Nucleus.EPITHELIAL, Nucleus.COLUMNAR),
    Tissue.LYMPHOCYTES: (Nucleus.LYMPHOCYTE, Nucleus.VESICULAR),
}


# --- fibres ---


def _stroma_fibres(rng: np.random.Generator, counts: tuple[int, ...], form: Form) -> list[_Sheet]:
    """Loose fibres, or dense ones: straight and aligned, crimped, or in whorls."""
    thickness = float(form.shapes.texture)

    def make(label: int, windows: int) -> Scene:
        scene = _plain(rng, windows, Tissue.RIM if label else Tissue.STROMA, form)
        shape = scene.tissue.shape
        y, x = (RASTER * a.astype(np.float32) for a in np.indices(shape))
        turn = rng.uniform(0, np.pi)
        across = y * np.cos(turn) - x * np.sin(turn)
        along = x * np.cos(turn) + y * np.sin(turn)
        if label == 0:
            bend = rng.uniform(20, 60) * smooth_noise(rng, shape, 200 / RASTER)
        elif label == 1:
            bend = rng.uniform(4, 12) * smooth_noise(rng, shape, 400 / RASTER)
        elif label == 2:
            period = rng.uniform(38, 70) * thickness
            phase = 2 * np.pi * along / period + 1.2 * smooth_noise(rng, shape, 160 / RASTER)
            bend = period * rng.uniform(0.14, 0.26) * np.sin(phase)
        else:
            bend = rng.uniform(90, 160) * smooth_noise(rng, shape, 150 / RASTER)
        scene.fibres[...] = across + bend
        everywhere = np.ones(shape, bool)
        _add_mixture(
            scene, rng, everywhere, 29, 0.6, {Nucleus.SPINDLE: 1.0, Nucleus.LYMPHOCYTE: 0.1}
        )
        return scene

    return _by_class(rng, counts, form, make)


def _task(name: str, organ: str, classes: tuple[str, ...], plan: _Plan) -> DemoTask:
    return DemoTask(name, organ, classes, partial(_cut, plan=plan))


MORPHOLOGY_TASKS = (
    _task("gland_grade", "colon", ("benign", "malignant"), _gland_grade),
    _task("gland_stroma", "colon", ("stroma", "gland"), _gland_stroma),
    _task("nuclear_grade", "breast", ("grade_1", "grade_2", "grade_3"), _nuclear_grade),
    _task("lymphocytes", "several", ("few", "some", "many", "nearly_all"), _lymphocytes),
    _task("tumour_reactive", "several", ("reactive", "tumour"), _tumour_reactive),
    _task("mitosis_apoptosis", "breast", ("mitosis", "apoptosis"), _mitosis_apoptosis),
    _task(
        "cell_kind",
        "several",
        ("lymphocyte", "fibroblast", "epithelial", "tumour"),
        _cell_kind,
    ),
    _task("nucleus", "several", ("none", "centred"), _nucleus),
    _task("stroma_fibres", "several", ("loose", "aligned", "crimped", "whorled"), _stroma_fibres),
)

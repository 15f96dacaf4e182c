"""Positions of cells: nuclei by tissue, glands, mitoses and their mimics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, spatial

from nic_core.demo.nuclei import TUMOUR_GRADES, Nucleus
from nic_core.demo.painter import RASTER, Discs, Floats, Nuclei, Scene, smooth_noise
from nic_core.demo.tissues import Tissue

Bools = NDArray[np.bool_]

TUMOUR_SPACING = 21.0  # px between the centres of tumour nuclei, for all grades


def scatter(
    rng: np.random.Generator, where: Bools, spacing: float, keep: float = 1.0
) -> tuple[Floats, Floats]:
    """Return points (px) of a jittered hexagonal lattice inside the raster points ``where``."""
    height, width = (n * RASTER for n in where.shape)
    pitch = spacing * 3**0.5 / 2
    y, x = np.mgrid[0 : int(height / pitch) + 1, 0 : int(width / spacing) + 1].astype(np.float32)
    x = (x + 0.5 * (y % 2)) * spacing + rng.normal(0, 0.17 * spacing, x.shape)
    y = y * pitch + rng.normal(0, 0.17 * spacing, y.shape)
    inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    if keep < 1:
        inside &= rng.random(x.shape) < keep
    x, y = x[inside], y[inside]
    hit = where[(y / RASTER).astype(int), (x / RASTER).astype(int)]
    return x[hit].astype(np.float32), y[hit].astype(np.float32)


def away_from(
    x: Floats, y: Floats, others: tuple[Floats, Floats], distance: float
) -> tuple[Floats, Floats]:
    """Return the points farther than ``distance`` px from all ``others``."""
    if len(others[0]) == 0 or len(x) == 0:
        return x, y
    nearest, _ = spatial.cKDTree(np.column_stack(others)).query(np.column_stack([x, y]))
    far = nearest > distance
    return x[far], y[far]


def fibre_angle(scene: Scene, x: Floats, y: Floats) -> Floats:
    """Return the direction of the fibres (radians) at points (px)."""
    i = np.clip((y / RASTER).astype(int), 1, scene.tissue.shape[0] - 2)
    j = np.clip((x / RASTER).astype(int), 1, scene.tissue.shape[1] - 2)
    f = scene.fibres
    gradient_y, gradient_x = f[i + 1, j] - f[i - 1, j], f[i, j + 1] - f[i, j - 1]
    return np.asarray(np.arctan2(gradient_y, gradient_x) + np.pi / 2, np.float32)


@dataclass(frozen=True)
class Tumour:
    """Appearance of a tumour: ``grade`` 1..3 (a real number) and the density of rare nuclei.

    ``mitoses``, ``pyknotic`` and ``apoptotic`` are numbers per mm2 of tumour.
    """

    grade: float
    mitoses: float
    pyknotic: float = 60.0
    apoptotic: float = 40.0


def populate(
    scene: Scene,
    rng: np.random.Generator,
    tumour: Tumour,
    taken: tuple[Floats, Floats] | None = None,
) -> tuple[Floats, Floats]:
    """Add the cells of every tissue except glands to ``scene``; return centres of mitoses, px.

    Tumour nuclei keep a distance from the points ``taken``.
    """
    tissue = scene.tissue
    scale = scene.shapes.spacing
    mitoses = _tumour_cells(scene, rng, tumour, taken)
    for kind, spacing, keep in (
        (Tissue.STROMA, 34.0, 0.6),
        (Tissue.RIM, 24.0, 0.66),
        (Tissue.MUSCLE, 34.0, 0.8),
        (Tissue.MUCUS, 70.0, 0.4),
    ):
        x, y = scatter(rng, tissue == kind, spacing * scale, keep)
        nucleus = Nucleus.MUSCLE if kind is Tissue.MUSCLE else Nucleus.SPINDLE
        angle = fibre_angle(scene, x, y) + rng.normal(0, 0.16, len(x)).astype(np.float32)
        scene.cells.append(Nuclei(nucleus, x, y, angle))
    lymphocytes = [
        scatter(rng, tissue == Tissue.LYMPHOCYTES, 13.6 * scale, 0.94),
        scatter(rng, np.isin(tissue, (Tissue.STROMA, Tissue.RIM)), 60.0, 0.35),
        scatter(rng, tissue == Tissue.TUMOUR, 70.0, 0.25),
        scatter(rng, tissue == Tissue.MUCUS, 90.0, 0.3),
    ]
    x, y = (np.concatenate(a) for a in zip(*lymphocytes, strict=True))
    scene.cells.append(Nuclei(Nucleus.LYMPHOCYTE, x, y))
    for where, kind_of, spacing, keep in (
        (Tissue.NECROSIS, Nucleus.PYKNOTIC, 46.0, 0.25),
        (Tissue.NECROSIS, Nucleus.APOPTOTIC, 52.0, 0.35),
        (Tissue.BLOOD, Nucleus.ERYTHROCYTE, 12.5, 0.85),
    ):
        x, y = scatter(rng, tissue == where, spacing * scale, keep)
        scene.cells.append(Nuclei(kind_of, x, y))
    return mitoses


def add_figures(
    scene: Scene, rng: np.random.Generator, kind: Nucleus, x: Floats, y: Floats
) -> None:
    """Add mitoses or their mimics, each in a pale (mitosis) or shrunken (mimic) cell."""
    if kind is Nucleus.MITOSIS:
        radius = rng.uniform(11, 13.5, len(x)).astype(np.float32)
        scene.discs.append(Discs(x, y, radius, 0.50))
    elif kind in (Nucleus.PYKNOTIC, Nucleus.APOPTOTIC):
        radius = rng.uniform(8, 11, len(x)).astype(np.float32)
        scene.discs.append(Discs(x, y, radius, 0.30))
    scene.cells.append(Nuclei(kind, x, y))


def _tumour_cells(
    scene: Scene,
    rng: np.random.Generator,
    tumour: Tumour,
    taken: tuple[Floats, Floats] | None,
) -> tuple[Floats, Floats]:
    where = scene.tissue == Tissue.TUMOUR
    spacing = TUMOUR_SPACING * scene.shapes.spacing
    # 0.5 um/px: a raster point is RASTER**2 / 4e6 mm2
    area = where.sum() * RASTER**2 / 4e6
    x, y = scatter(rng, where, 3 * spacing)
    if taken is not None:
        x, y = away_from(x, y, taken, 2 * TUMOUR_SPACING)
    order = rng.permutation(len(x))
    figures = {}
    start = 0
    for kind, density in (
        (Nucleus.MITOSIS, tumour.mitoses),
        (Nucleus.PYKNOTIC, tumour.pyknotic),
        (Nucleus.APOPTOTIC, tumour.apoptotic),
    ):
        chosen = order[start : start + round(density * area)]
        start += len(chosen)
        figures[kind] = x[chosen], y[chosen]
        add_figures(scene, rng, kind, *figures[kind])
    keep_out = [*figures.values(), *([] if taken is None else [taken])]
    around_x, around_y = (np.concatenate(a) for a in zip(*keep_out, strict=True))
    x, y = scatter(rng, where, spacing, 0.96)
    x, y = away_from(x, y, (around_x, around_y), 15.0)
    # a fractional grade is a mixture of two integer grades
    lower = int(np.clip(np.floor(tumour.grade), 1, 2))
    upper = rng.random(len(x)) < tumour.grade - lower
    scene.cells.append(Nuclei(TUMOUR_GRADES[lower - 1], x[~upper], y[~upper]))
    scene.cells.append(Nuclei(TUMOUR_GRADES[lower], x[upper], y[upper]))
    return figures[Nucleus.MITOSIS]


@dataclass(frozen=True)
class GlandStyle:
    """Shape of glands: ``radius`` in px; ``goblets`` is the share of cells with a vacuole."""

    radius: float
    lumen: float
    goblets: float
    wobble: float
    spacing: float
    nucleus: Nucleus = Nucleus.EPITHELIAL


COLON = GlandStyle(radius=62, lumen=0.24, goblets=0.75, wobble=0.06, spacing=142)
PROSTATE = GlandStyle(radius=78, lumen=0.62, goblets=0.0, wobble=0.16, spacing=180)


def add_glands(scene: Scene, rng: np.random.Generator, where: Bools, style: GlandStyle) -> None:
    """Add glands with centres inside ``where``: rings of cells around a lumen."""
    centres_x, centres_y = scatter(rng, where, style.spacing)
    nuclei: list[tuple[Floats, Floats, Floats]] = []
    goblets: list[tuple[Floats, Floats, Floats]] = []
    for cx, cy in zip(centres_x, centres_y, strict=True):
        size = style.radius * float(np.exp(rng.normal(0, 0.15)))
        stretch, turn = float(np.exp(abs(rng.normal(0, 0.28)))), rng.uniform(0, np.pi)
        waves = [(k, rng.normal(0, style.wobble / k**0.5), rng.uniform(0, 6.3)) for k in (2, 3, 5)]

        def outline(t: Floats, waves: list[tuple[int, float, float]] = waves) -> Floats:
            return np.asarray(1 + sum(a * np.cos(k * t + p) for k, a, p in waves), np.float32)

        reach = int(size * stretch * 1.5 / RASTER) + 2
        i0, j0 = int(cy / RASTER), int(cx / RASTER)
        window = (
            slice(max(i0 - reach, 0), min(i0 + reach, where.shape[0])),
            slice(max(j0 - reach, 0), min(j0 + reach, where.shape[1])),
        )
        y, x = np.mgrid[window].astype(np.float32) * RASTER
        u = ((x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)) / (size * stretch**0.5)
        v = ((y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)) / (size / stretch**0.5)
        polar = np.arctan2(v, u)
        radius = np.hypot(u, v) / outline(polar)
        # papillae: the border of the lumen is wavier than the border of the gland
        border = style.lumen * (1 + 1.6 * style.wobble * np.cos(7 * polar + rng.uniform(0, 6.3)))
        part = scene.tissue[window]
        free = (part == Tissue.STROMA) | (part == Tissue.MUSCLE) | (part == Tissue.LYMPHOCYTES)
        part[free & (radius < 1)] = Tissue.GLAND
        part[free & (radius < border)] = Tissue.LUMEN

        def ring(
            share: float,
            pitch: float,
            jitter: float,
            *,
            size: float = size,
            stretch: float = stretch,
            turn: float = turn,
            cx: float = cx,
            cy: float = cy,
        ) -> tuple[Floats, Floats, Floats]:
            """Return points at ``share`` of the radius, ``pitch`` px apart, and their angle."""
            n = max(int(2 * np.pi * share * size / pitch), 3)
            t = (np.arange(n) + rng.uniform(-0.3, 0.3, n)) * 2 * np.pi / n
            r = outline(t.astype(np.float32)) * share * (1 + rng.normal(0, jitter, n))
            u, v = r * np.cos(t) * size * stretch**0.5, r * np.sin(t) * size / stretch**0.5
            px = cx + u * np.cos(turn) - v * np.sin(turn)
            py = cy + u * np.sin(turn) + v * np.cos(turn)
            return (
                px.astype(np.float32),
                py.astype(np.float32),
                np.arctan2(py - cy, px - cx).astype(np.float32),
            )

        nuclei.append(ring(0.87, 8.5, 0.03))
        if style.goblets:
            depth = size * (0.86 - style.lumen)
            x, y, angle = ring((0.80 + style.lumen) / 2, 15.0, 0.07)
            has = rng.random(len(x)) < style.goblets
            vacuole = (depth * rng.uniform(0.20, 0.28, len(x))).astype(np.float32)
            goblets.append((x[has], y[has], vacuole[has]))
        else:
            nuclei.append(ring((0.87 + style.lumen) / 2 + 0.02, 15.0, 0.05))
    if not nuclei:
        return
    x, y, angle = (np.concatenate(a) for a in zip(*nuclei, strict=True))
    inside = _on(scene, x, y, Tissue.GLAND)
    scene.cells.append(Nuclei(style.nucleus, x[inside], y[inside], angle[inside]))
    if goblets:
        x, y, radius = (np.concatenate(a) for a in zip(*goblets, strict=True))
        inside = _on(scene, x, y, Tissue.GLAND)
        scene.discs.append(Discs(x[inside], y[inside], radius[inside], clear=0.78))


def add_malignant_glands(scene: Scene, rng: np.random.Generator, where: Bools, size: float) -> None:
    """Add irregular, fused and cribriform glands of a carcinoma inside ``where``.

    Their nuclei are elongated, perpendicular to the border of the gland and in several rows.

    Parameters
    ----------
    scene, rng
    where : bool (rows, columns)
        Raster points that may become gland.
    size : float
        Factor of the width of glands and of the thickness of their epithelium.
    """
    shape = where.shape
    field = smooth_noise(rng, shape, rng.uniform(120, 210) * size / RASTER)
    field += 0.3 * smooth_noise(rng, shape, 50 * size / RASTER)
    gland = where & (field > rng.uniform(-0.5, 0.3))
    depth = ndimage.distance_transform_edt(np.pad(gland, 1, constant_values=True))[1:-1, 1:-1]
    depth = np.asarray(depth * RASTER, np.float32)  # px from the border of the gland
    wall = rng.uniform(38, 75) * size * (1 + 0.2 * smooth_noise(rng, shape, 90 / RASTER))
    # round holes make a gland cribriform; without a lumen it is solid
    hollow = smooth_noise(rng, shape, 260 * size / RASTER) > rng.uniform(-1.2, 0.8)
    holes = smooth_noise(rng, shape, rng.uniform(24, 40) * size / RASTER) > rng.uniform(1.0, 2.0)
    lumen = ((depth > wall) & hollow) | (holes & (depth > 20 * size))
    debris = lumen & (smooth_noise(rng, shape, 40 / RASTER) > rng.uniform(0.4, 2.2))
    scene.tissue[gland] = Tissue.GLAND
    scene.tissue[lumen] = Tissue.LUMEN
    scene.tissue[debris] = Tissue.NECROSIS
    spacing = rng.uniform(12.5, 19) * scene.shapes.spacing
    x, y = scatter(rng, gland & ~lumen, spacing, 0.92)
    i, j = (y / RASTER).astype(int), (x / RASTER).astype(int)
    # apical cytoplasm is free of nuclei
    inside = (depth < wall * rng.uniform(0.55, 0.95))[i, j] | ~hollow[i, j]
    x, y, i, j = x[inside], y[inside], i[inside], j[inside]
    down, aside = np.gradient(ndimage.gaussian_filter(depth, 2))
    angle = np.arctan2(down[i, j], aside[i, j]) + rng.normal(0, 0.22, len(x))
    nuclei = (Nucleus.STRATIFIED, Nucleus.TUMOUR_2, Nucleus.TUMOUR_3)
    chosen = rng.choice(3, len(x), p=rng.dirichlet((6, 1, 0.5)))
    for k, nucleus in enumerate(nuclei):
        part = chosen == k
        scene.cells.append(Nuclei(nucleus, x[part], y[part], np.asarray(angle[part], np.float32)))


def add_clefts(scene: Scene, rng: np.random.Generator) -> None:
    """Separate parts of glands from the stroma by clefts, which the fixation of tissue makes."""
    gland = np.isin(scene.tissue, (Tissue.GLAND, Tissue.LUMEN))
    near = ndimage.binary_dilation(gland, iterations=int(rng.integers(1, 4))) & ~gland
    some = smooth_noise(rng, gland.shape, 80 / RASTER) > rng.uniform(0.2, 1.6)
    scene.tissue[near & some] = Tissue.BACKGROUND


def _on(scene: Scene, x: Floats, y: Floats, kind: Tissue) -> Bools:
    i, j = (y / RASTER).astype(int), (x / RASTER).astype(int)
    rows, columns = scene.tissue.shape
    inside = (i >= 0) & (j >= 0) & (i < rows) & (j < columns)
    hit = scene.tissue[i.clip(0, rows - 1), j.clip(0, columns - 1)] == kind
    return np.asarray(inside & hit)

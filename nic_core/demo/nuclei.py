"""Nuclei as pre-rendered sprites: optical density of haematoxylin at 0.5 um/px.

The sprites of one kind are a float32 array ``(angles, variants, side, side)``. A nucleus is one
sprite, combined with the nuclear layer by maximum. The long axis of a sprite has the angle
``index * pi / angles``. Each kind has several series of sprites: 0 is the ordinary one, the others
differ from it in size, outline and chromatin, in the same way for every kind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.float32]

ANGLES = 16
VARIANTS = 12  # of each angle, in the ordinary series; the others have half as many
SERIES = 16  # ordinary nuclei, and 15 variations of them


class Nucleus(StrEnum):
    """Kinds of nuclei."""

    LYMPHOCYTE = "lymphocyte"
    EPITHELIAL = "epithelial"
    SPINDLE = "spindle"
    MUSCLE = "muscle"
    TUMOUR_1 = "tumour grade 1"
    TUMOUR_2 = "tumour grade 2"
    TUMOUR_3 = "tumour grade 3"
    MITOSIS = "mitosis"
    PYKNOTIC = "pyknotic"
    HYPERCHROMATIC = "hyperchromatic"
    APOPTOTIC = "apoptotic"
    ERYTHROCYTE = "erythrocyte"
    COLUMNAR = "columnar"
    STRATIFIED = "stratified"
    VESICULAR = "vesicular"


TUMOUR_GRADES = (Nucleus.TUMOUR_1, Nucleus.TUMOUR_2, Nucleus.TUMOUR_3)
# Sum of optical density over an average nucleus. Large nuclei overlap more, so they have a higher
# sum; otherwise the mean colour of a tumour would reveal its grade.
TUMOUR_DOSE = dict(zip(TUMOUR_GRADES, (134.0, 136.0, 143.0), strict=True))


@dataclass(frozen=True)
class _Shape:
    """Means and coefficients of variation (cv) of a kind of nucleus; lengths in px."""

    length: float
    width: float
    size_cv: float
    density: float  # optical density of the body
    density_cv: float
    rim: float  # optical density that the nuclear membrane adds
    vesicle: float  # reduction of the density in the centre
    clump: float  # chromatin texture
    ragged: float  # irregularity of the outline
    nucleoli: int
    side: int = 32


_SHAPES = {
    Nucleus.LYMPHOCYTE: _Shape(6.3, 5.8, 0.09, 1.25, 0.12, 0.15, 0.0, 0.20, 0.05, 0, 20),
    Nucleus.EPITHELIAL: _Shape(8.2, 5.6, 0.10, 0.85, 0.12, 0.22, 0.15, 0.16, 0.04, 1, 24),
    Nucleus.SPINDLE: _Shape(13.0, 2.7, 0.22, 1.00, 0.20, 0.10, 0.0, 0.15, 0.10, 0, 40),
    Nucleus.MUSCLE: _Shape(15.0, 3.3, 0.15, 0.75, 0.15, 0.15, 0.1, 0.12, 0.04, 0, 44),
    Nucleus.TUMOUR_1: _Shape(8.0, 6.9, 0.07, 0.80, 0.08, 0.15, 0.05, 0.12, 0.03, 0, 28),
    Nucleus.TUMOUR_2: _Shape(9.4, 7.9, 0.16, 0.70, 0.18, 0.36, 0.40, 0.20, 0.07, 2, 40),
    Nucleus.TUMOUR_3: _Shape(11.2, 8.8, 0.27, 0.62, 0.30, 0.55, 0.70, 0.28, 0.13, 4, 52),
    Nucleus.HYPERCHROMATIC: _Shape(9.5, 7.5, 0.12, 1.35, 0.10, 0.05, 0.0, 0.12, 0.06, 0, 36),
    # of colon: in one row at the base of a crypt; crowded in rows of a carcinoma or an adenoma
    Nucleus.COLUMNAR: _Shape(7.8, 4.6, 0.12, 0.80, 0.15, 0.35, 0.30, 0.18, 0.05, 1, 28),
    Nucleus.STRATIFIED: _Shape(11.0, 4.9, 0.18, 0.72, 0.22, 0.42, 0.45, 0.24, 0.09, 2, 40),
    # macrophages, endothelium, activated cells: pale, with a thin membrane
    Nucleus.VESICULAR: _Shape(8.6, 6.2, 0.15, 0.45, 0.15, 0.50, 0.60, 0.20, 0.08, 1, 32),
}


@lru_cache(maxsize=128)
def bank(kind: Nucleus, series: int = 0) -> Floats:
    """Return the sprites of a kind, float32 ``(ANGLES, variants, side, side)``.

    ``series`` is at least 0 and below ``SERIES``.
    """
    seed = [1673, list(Nucleus).index(kind)]
    rng = np.random.default_rng([*seed, series] if series else seed)
    size = _series_size(series)
    variants = VARIANTS // 2 if series else VARIANTS
    special = {
        Nucleus.MITOSIS: _mitosis,
        Nucleus.PYKNOTIC: _pyknotic,
        Nucleus.APOPTOTIC: _apoptotic,
        Nucleus.ERYTHROCYTE: _erythrocyte,
    }.get(kind)
    sprites = []
    for angle in np.arange(ANGLES) * np.pi / ANGLES:
        for _ in range(variants):
            if special is None:
                sprites.append(_nucleus(rng, _varied(_SHAPES[kind], series), angle))
            else:
                sprites.append(special(rng, angle, size))
    side = sprites[0].shape[0]
    out = np.stack(sprites).reshape(ANGLES, variants, side, side)
    if kind in TUMOUR_DOSE:
        out *= TUMOUR_DOSE[kind] * size**2 / out.sum((2, 3)).mean()
    return np.ascontiguousarray(out, np.float32)


def _series_size(series: int) -> float:
    """Return the factor of the lengths in a series; 1 in the ordinary one."""
    if series == 0:
        return 1.0
    # every series has another size, from 0.78 to 1.32
    return float(0.78 * (1.32 / 0.78) ** ((series * 4 % (SERIES - 1)) / (SERIES - 2)))


def _varied(shape: _Shape, series: int) -> _Shape:
    if series == 0:
        return shape
    rng = np.random.default_rng([1674, series])
    size, slender = _series_size(series), float(np.exp(rng.normal(0, 0.08)))
    return replace(
        shape,
        length=shape.length * size * slender,
        width=shape.width * size / slender,
        size_cv=shape.size_cv * rng.uniform(0.8, 1.5),
        density=shape.density * float(np.exp(rng.normal(0, 0.18))),
        density_cv=shape.density_cv * rng.uniform(0.8, 1.6),
        rim=shape.rim * rng.uniform(0.6, 1.8),
        vesicle=float(np.clip(shape.vesicle + rng.uniform(-0.15, 0.35), 0, 0.85)),
        clump=shape.clump * rng.uniform(0.8, 2.2),
        ragged=shape.ragged * rng.uniform(0.8, 1.7),
        side=round(shape.side * max(size * slender, 1.0) * 1.1),
    )


def _frame(side: int, angle: float, size: float = 1.0) -> tuple[Floats, Floats]:
    """Return coordinates along and across an axis at ``angle``, centred, in px / ``size``."""
    y, x = (np.mgrid[0:side, 0:side].astype(np.float32) - (side - 1) / 2) / np.float32(size)
    along = x * np.cos(angle) + y * np.sin(angle)
    return along, y * np.cos(angle) - x * np.sin(angle)


def _soft(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -30, 30))), np.float32)


def _speckle(rng: np.random.Generator, side: int, sigma: float) -> Floats:
    out = ndimage.gaussian_filter(rng.standard_normal((side, side)).astype(np.float32), sigma)
    return np.asarray(out / out.std(), np.float32)


def _nucleus(rng: np.random.Generator, shape: _Shape, angle: float) -> Floats:
    limit = (shape.side / 2 - 2) / shape.length
    size = float(np.clip(np.exp(rng.normal(0, shape.size_cv)), 0.5, limit))
    aspect = np.exp(rng.normal(0, 0.08 + shape.ragged / 2))
    along, across = _frame(shape.side, angle)
    a, b = shape.length * size * aspect**0.5, shape.width * size / aspect**0.5
    polar = np.arctan2(across / b, along / a)
    outline = np.ones_like(polar)
    for k in (2, 3, 4, 5):
        outline += shape.ragged * rng.normal(0, 1.4 / k) * np.cos(k * polar + rng.uniform(0, 6.3))
    radius = np.hypot(along / a, across / b) / np.clip(outline, 0.6, 1.4)
    edge = min(a, b)
    body = _soft((1 - radius) * edge * 2.2)
    chromatin = 1 + shape.clump * _speckle(rng, shape.side, 1.3)
    middle = 1 - shape.vesicle * _soft((0.72 - radius) * edge * 1.4)
    density = shape.density * np.exp(rng.normal(0, shape.density_cv))
    out = density * chromatin * middle + shape.rim * np.exp(-(((radius - 0.88) * edge / 1.1) ** 2))
    for _ in range(rng.integers(0, shape.nucleoli + 1)):
        r, t = rng.uniform(0, 0.5), rng.uniform(0, 6.3)
        spot = np.hypot(along - a * r * np.cos(t), across - b * r * np.sin(t))
        out += (0.5 + 0.15 * shape.nucleoli) * _soft((1.2 + 0.25 * shape.nucleoli - spot) * 2.2)
    return np.asarray(np.clip(out, 0.05, 2.2) * body, np.float32)


def _mitosis(rng: np.random.Generator, angle: float, size: float) -> Floats:
    """Draw a metaphase plate, an anaphase or telophase pair, or a ragged prometaphase clump."""
    side = round(40 * max(size, 1.0))
    along, across = _frame(side, angle, size)
    rough = 1.3 * _speckle(rng, side, 1.4)
    stage = rng.choice(3, p=(0.45, 0.3, 0.25))
    if stage == 0:
        half, thick = rng.uniform(8, 11), rng.uniform(2.4, 3.4)
        inside = 1 - np.hypot(along / half, across / thick)
        figure = _soft(inside * thick * 1.8 + 0.6 * rough)
    elif stage == 1:
        gap, half, thick = rng.uniform(4.0, 8.5), rng.uniform(6, 8.5), rng.uniform(2.0, 2.8)
        bend = 0.03 * along**2
        upper = 1 - np.hypot(along / half, (across - gap + bend) / thick)
        lower = 1 - np.hypot(along / half, (across + gap - bend) / thick)
        figure = _soft(np.maximum(upper, lower) * thick * 1.8 + 0.5 * rough)
    else:
        radius = np.hypot(along / 7.5, across / 6.2)
        figure = _soft((1 - radius) * 8 + 2.0 * rough)
    return np.asarray(2.1 * figure * (1 + 0.08 * rough), np.float32)


def _pyknotic(rng: np.random.Generator, angle: float, size: float) -> Floats:
    along, across = _frame(round(20 * max(size, 1.0)), angle, size)
    radius = np.hypot(along / rng.uniform(4, 6), across / rng.uniform(3.5, 5))
    return np.asarray(rng.uniform(1.4, 1.8) * _soft((1 - radius) * 9), np.float32)


def _apoptotic(rng: np.random.Generator, angle: float, scale: float) -> Floats:
    """Draw a few smooth round bodies."""
    along, across = _frame(round(28 * max(scale, 1.0)), angle, scale)
    out = np.zeros_like(along)
    for _ in range(rng.integers(2, 5)):
        r, t, size = rng.uniform(1, 6.5), rng.uniform(0, 6.3), rng.uniform(1.6, 3.6)
        ball = np.hypot(along - r * np.cos(t), across - r * np.sin(t))
        out = np.maximum(out, 1.6 * _soft((size - ball) * 2.4))
    return np.asarray(out, np.float32)


def _erythrocyte(rng: np.random.Generator, angle: float, size: float) -> Floats:
    along, across = _frame(round(18 * max(size, 1.0)), angle, size)
    radius = np.hypot(along / rng.uniform(5.8, 6.8), across / rng.uniform(4.6, 6.4))
    disc = _soft((1 - radius) * 9) * (1 - 0.35 * np.exp(-((radius / 0.45) ** 2)))
    return np.asarray(rng.uniform(0.85, 1.15) * disc, np.float32)

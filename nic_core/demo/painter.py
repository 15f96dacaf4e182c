"""Paint a scene: from the positions of tissues and nuclei to pixels.

The concentrations of haematoxylin, eosin and blood pigment are computed first, then the transmitted
light by the Beer-Lambert law, sensor noise and blur. A slide of 3072 px takes about 2 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nic_core.demo import textures
from nic_core.demo.nuclei import ANGLES, Nucleus, bank
from nic_core.demo.tissues import Tissue
from nic_core.libvips import pyvips

RASTER = 4  # px per raster point of a scene
STRIP = 256  # rows of px that are computed together, so that they stay in the cache

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Stain:
    """Stain and scanner of a slide.

    Attributes
    ----------
    vectors
        float32 (3, 3): optical density in R, G, B of haematoxylin, eosin and blood pigment.
    haematoxylin, eosin
        Factors of the concentrations; 1 is ordinary.
    white
        float32 (3,): the colour of empty glass, 0..255.
    blur
        Standard deviation in px.
    noise
        Standard deviation of the sensor noise in grey levels.
    shading
        Relative variation of the light of each channel across the slide.
    unevenness
        Relative variation of the section thickness across the slide; the ratio of eosin to
        haematoxylin varies by half as much.
    """

    vectors: Floats
    haematoxylin: float
    eosin: float
    white: Floats
    blur: float
    noise: float
    shading: float
    unevenness: float


# Macenko's reference vectors; erythrocytes are more orange than eosin
_VECTORS = np.array([(0.57, 0.73, 0.38), (0.17, 0.84, 0.46), (0.10, 0.78, 0.66)], np.float32)


def ordinary_stain() -> Stain:
    """Return the mean stain, around which the stains of patients vary [choice]."""
    return Stain(_VECTORS, 1.0, 1.0, np.array([244, 242, 244], np.float32), 0.6, 1.5, 0.005, 0.10)


def random_stain(rng: np.random.Generator) -> Stain:
    """Draw the stain and scanner of a laboratory."""
    return Stain(
        vectors=(_VECTORS * np.exp(rng.normal(0, 0.035, (3, 3)))).astype(np.float32),
        haematoxylin=float(np.exp(rng.normal(0, 0.08))),
        eosin=float(np.exp(rng.normal(0, 0.08))),
        white=(rng.uniform(232, 250) + rng.normal(0, 2.5, 3)).clip(225, 252).astype(np.float32),
        blur=float(rng.uniform(0.45, 0.85)),
        noise=float(rng.uniform(0.8, 2.5)),
        shading=float(rng.uniform(0.006, 0.010)),
        unevenness=float(rng.uniform(0.10, 0.18)),
    )


@dataclass(frozen=True)
class Nuclei:
    """Nuclei of one kind: centres in px; ``angle`` in radians, ``None`` for random angles."""

    kind: Nucleus
    x: Floats
    y: Floats
    angle: Floats | None = None


@dataclass(frozen=True)
class Discs:
    """Soft pale discs (vacuoles, halos of mitoses): centres and radii in px.

    ``clear`` is the share of the cytoplasm's stain that they remove.
    """

    x: Floats
    y: Floats
    radius: Floats
    clear: float


@dataclass(frozen=True)
class Shapes:
    """How the cells and fibres of a patient differ in form from the ordinary ones.

    Attributes
    ----------
    nuclei
        The series of nuclei (:func:`nic_core.demo.nuclei.bank`); 0 is the ordinary one.
    spacing
        Factor of the distances between nuclei.
    texture
        Factor of the size of textures: the thickness of fibres, the size of cells in the ground.
    eosin, haematoxylin
        float32 (tissues,): factors of the stain of each tissue without nuclei.
    mottle
        Standard deviation of the fine variation of that stain, relative to it.
    """

    nuclei: int
    spacing: float
    texture: float
    eosin: Floats
    haematoxylin: Floats
    mottle: float


_AS_IS = np.ones(len(Tissue), np.float32)
ORDINARY_SHAPES = Shapes(0, 1.0, 1.0, _AS_IS, _AS_IS, 0.0)


@dataclass
class Scene:
    """The content of an image.

    Attributes
    ----------
    tissue
        uint8 (rows, columns) of :class:`Tissue`, one point per RASTER x RASTER px.
    fibres
        float32, same shape: a potential in px whose level sets are the fibres.
    cells, discs
        Nuclei, and pale discs that are painted before the nuclei.
    shapes
        The forms of its cells and fibres.
    """

    tissue: NDArray[np.uint8]
    fibres: Floats
    cells: list[Nuclei] = field(default_factory=list)
    discs: list[Discs] = field(default_factory=list)
    shapes: Shapes = ORDINARY_SHAPES

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in px."""
        return self.tissue.shape[0] * RASTER, self.tissue.shape[1] * RASTER


def paint(scene: Scene, stain: Stain, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Paint a scene, uint8 (height, width, 3) at 0.5 um/px."""
    eosin, haematoxylin = _ground(scene, rng)
    _clear(scene.discs, eosin, haematoxylin)
    nuclear = np.zeros_like(eosin)
    blood = np.zeros_like(eosin)
    for cells in scene.cells:
        layer = blood if cells.kind is Nucleus.ERYTHROCYTE else nuclear
        _stamp(layer, cells, scene.shapes.nuclei, rng)
    thickness = 1 + stain.unevenness * smooth_noise(rng, scene.tissue.shape, 300 / RASTER)
    uptake = 1 + stain.unevenness / 2 * smooth_noise(rng, scene.tissue.shape, 300 / RASTER)
    white = [
        w * (1 + stain.shading * smooth_noise(rng, scene.tissue.shape, 300 / RASTER))
        for w in stain.white
    ]
    vectors = stain.vectors * np.array([[stain.haematoxylin], [stain.eosin], [stain.eosin]])
    vectors = vectors.astype(np.float32)
    grain, cytoplasm = _Tiled(textures.grain_table(), rng), _Tiled(textures.grain_table(), rng)
    picture = np.empty((*scene.shape, 3), np.uint8)
    for strip in _strips(scene.shape[0]):
        n, b = nuclear[strip], blood[strip]
        thick = enlarge(thickness, strip)
        h = (haematoxylin[strip] + n) * thick
        thick *= enlarge(uptake, strip)
        thick *= 1 + cytoplasm.part(strip, thick.shape[1]) * np.float32(0.09 / 16)
        # chromatin displaces cytoplasm
        e = eosin[strip] * thick * (1 - 0.45 * np.minimum(n, 1))
        noise = grain.part(strip, thick.shape[1]) * np.float32(stain.noise / 16)
        for c in range(3):
            light = np.exp(-(h * vectors[0, c] + e * vectors[1, c] + b * vectors[2, c]))
            light *= enlarge(white[c], strip)
            light += noise
            np.clip(light, 0, 255, out=light)
            picture[strip, :, c] = light
    return blurred(picture, stain.blur)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], period: float) -> Floats:
    """Return Gaussian noise of unit variance over ``shape``, smooth over ``period`` points."""
    rows, columns = (_spline_basis(n, period) for n in shape)
    coarse = rng.standard_normal((rows.shape[1], columns.shape[1]), dtype=np.float32)
    # cubic B-splines multiply the variance of white noise by 0.479 per dimension
    return np.asarray(rows @ coarse @ columns.T / np.float32(0.479), np.float32)


def _spline_basis(points: int, period: float) -> Floats:
    """Return cubic B-splines ``period`` points apart, float32 (points, knots)."""
    at = np.arange(points) / period
    knots = np.arange(-1, int(at[-1]) + 3)
    t = np.abs(at[:, None] - knots)
    near = 2 / 3 - t**2 * (1 - t / 2)
    return np.where(t < 1, near, np.clip(2 - t, 0, None) ** 3 / 6).astype(np.float32)


def enlarge(raster: Floats, rows: slice) -> Floats:
    """Return px ``rows`` of ``raster``, enlarged RASTER times by linear interpolation.

    ``rows`` starts and stops at multiples of RASTER.
    """
    start, stop = rows.start // RASTER, rows.stop // RASTER
    halo = np.arange(start - 1, stop + 1).clip(0, raster.shape[0] - 1)
    tall = _enlarge_rows(raster[halo])[RASTER:-RASTER]
    return _enlarge_rows(tall.T).T


def _enlarge_rows(a: Floats) -> Floats:
    before = np.concatenate([a[:1], a[:-1]])
    after = np.concatenate([a[1:], a[-1:]])
    out = np.empty((a.shape[0] * RASTER, *a.shape[1:]), np.float32)
    for k in range(RASTER):
        t = (k + 0.5) / RASTER - 0.5
        out[k::RASTER] = a + abs(t) * ((after if t > 0 else before) - a)
    return out


def blurred(picture: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    """Blur uint8 (H, W, 3) with a Gaussian of ``sigma`` px."""
    image = pyvips.Image.new_from_array(np.ascontiguousarray(picture))
    return np.ascontiguousarray(image.gaussblur(sigma, min_ampl=0.05).numpy(), np.uint8)


def _ground(scene: Scene, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return concentrations of eosin and haematoxylin without nuclei."""
    tables = textures.stain_tables()
    height, width = scene.shape
    shift = rng.integers(0, textures.SIDE, 2)
    # the mean direction of the fibres is perpendicular to the mean gradient of their potential
    turn = np.arctan2(np.diff(scene.fibres, axis=0).mean(), np.diff(scene.fibres).mean())
    turn += np.pi / 2
    y, x = (RASTER * a.astype(np.float32) for a in np.indices(scene.tissue.shape))
    # isotropic tissues: by position, displaced to hide the repetition of the tile
    rows = y + 30 * smooth_noise(rng, scene.tissue.shape, 260 / RASTER)
    columns = x + 30 * smooth_noise(rng, scene.tissue.shape, 260 / RASTER)
    rows, columns = (a / np.float32(scene.shapes.texture) for a in (rows, columns))
    across = scene.fibres * np.float32(textures.ACROSS / scene.shapes.texture)
    along = (x * np.cos(turn) + y * np.sin(turn)) * textures.ALONG
    along += 20 * smooth_noise(rng, scene.tissue.shape, 200 / RASTER)
    down, aside = _Tiled(textures.ragged_table(), rng), _Tiled(textures.ragged_table(), rng)
    mottled = _Tiled(textures.mottle_table(), rng.spawn(1)[0])
    mask = textures.SIDE - 1
    is_fibrous = np.zeros(len(Tissue), bool)
    is_fibrous[list(textures.FIBROUS)] = True
    eosin = np.empty((height, width), np.float32)
    haematoxylin = np.empty((height, width), np.float32)
    for strip in _strips(height):
        ys = np.arange(strip.start, strip.stop)[:, None] + down.part(strip, width).astype(np.intp)
        xs = np.arange(width)[None, :] + aside.part(strip, width).astype(np.intp)
        tissue = scene.tissue[
            np.clip(ys, 0, height - 1) // RASTER, np.clip(xs, 0, width - 1) // RASTER
        ]
        fibrous = is_fibrous[tissue]
        i = np.where(fibrous, enlarge(across, strip), enlarge(rows, strip)).astype(np.int32)
        j = np.where(fibrous, enlarge(along, strip), enlarge(columns, strip)).astype(np.int32)
        i = (i + shift[0]) & mask
        j = (j + shift[1]) & mask
        index = (tissue.astype(np.int32) * textures.SIDE + i) * textures.SIDE + j
        eosin[strip] = tables[0].ravel()[index]
        haematoxylin[strip] = tables[1].ravel()[index]
        if scene.shapes is not ORDINARY_SHAPES:
            mottle = 1 + mottled.part(strip, width) * np.float32(scene.shapes.mottle / 32)
            np.clip(mottle, 0.1, None, out=mottle)
            eosin[strip] *= scene.shapes.eosin[tissue] * mottle
            haematoxylin[strip] *= scene.shapes.haematoxylin[tissue] * mottle
    eosin /= textures.SCALE
    haematoxylin /= textures.SCALE
    return eosin, haematoxylin


def _clear(discs: list[Discs], eosin: Floats, haematoxylin: Floats) -> None:
    height, width = eosin.shape
    for group in discs:
        for x, y, radius in zip(group.x, group.y, group.radius, strict=True):
            reach = int(radius + 4)
            top, left = max(int(y) - reach, 0), max(int(x) - reach, 0)
            bottom, right = min(int(y) + reach, height), min(int(x) + reach, width)
            if top >= bottom or left >= right:
                continue
            dy = np.arange(top, bottom, dtype=np.float32)[:, None] - y
            dx = np.arange(left, right, dtype=np.float32)[None, :] - x
            share = group.clear * np.clip((radius - np.hypot(dx, dy)) / 2.5 + 0.5, 0, 1)
            eosin[top:bottom, left:right] *= 1 - share
            haematoxylin[top:bottom, left:right] *= 1 - 0.8 * share


def _stamp(layer: Floats, cells: Nuclei, series: int, rng: np.random.Generator) -> None:
    """Combine sprites with ``layer`` by maximum; sprites are cropped at the border."""
    sprites = bank(cells.kind, series)
    side = sprites.shape[-1]
    height, width = layer.shape
    n = len(cells.x)
    if cells.angle is None:
        turns = rng.integers(0, ANGLES, n)
    else:
        turns = np.rint(cells.angle / np.pi * ANGLES).astype(int) % ANGLES
    variants = rng.integers(0, sprites.shape[1], n)
    lefts = np.rint(cells.x - side / 2).astype(int)
    tops = np.rint(cells.y - side / 2).astype(int)
    for left, top, turn, variant in zip(
        lefts.tolist(), tops.tolist(), turns.tolist(), variants.tolist(), strict=True
    ):
        sprite = sprites[turn, variant]
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + side, width), min(top + side, height)
        if x0 >= x1 or y0 >= y1:
            continue
        place = layer[y0:y1, x0:x1]
        np.maximum(place, sprite[y0 - top : y1 - top, x0 - left : x1 - left], out=place)


def _strips(height: int) -> Iterator[slice]:
    for top in range(0, height, STRIP):
        yield slice(top, min(top + STRIP, height))


class _Tiled:
    """A table that is repeated over the plane from a random origin."""

    def __init__(self, table: NDArray[np.int8], rng: np.random.Generator) -> None:
        self._table = table
        self._start = rng.integers(0, textures.SIDE, 2)

    def part(self, rows: slice, width: int) -> NDArray[np.int8]:
        i = (self._start[0] + np.arange(rows.start, rows.stop)) & (textures.SIDE - 1)
        j = (self._start[1] + np.arange(width)) & (textures.SIDE - 1)
        return self._table[np.ix_(i, j)]

"""Layout of a slide: tumour nests, capsules or bands of dense stroma, islands of other tissue.

:func:`plant_slide` lays out a painted slide, :func:`arrange_slide` a composed one.

Lengths are in units of the slide's side / 24, which is one cell of the compressed grid of a 3072 px
slide. The two growth patterns differ only in the arrangement of tissue. Every slide has the same
area of dense stroma: that of a capsule around each of its nests. The area that is not used for
capsules becomes bands as thick as a capsule, away from all nests. In both patterns no other tissue
is placed in the zone of the capsules, so the areas of all tissues are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nic_core.demo.cells import COLON, Bools, Tumour, add_glands, populate
from nic_core.demo.painter import RASTER, Floats, Scene, smooth_noise
from nic_core.demo.tissues import Tissue

UNITS = 24  # per side
NESTS = 3
NEST_RADIUS = 3.2  # root mean square
CAPSULE = 1.35
GAP = 0.15  # between the zone of a capsule and other tissue
TRUTH = 64  # px per point of the truth image

# tissue of an island and its mean share of the slide's tissue
ISLANDS = (
    (Tissue.GLAND, 0.050),
    (Tissue.LYMPHOCYTES, 0.032),
    (Tissue.FAT, 0.028),
    (Tissue.MUSCLE, 0.026),
    (Tissue.MUCUS, 0.014),
    (Tissue.BLOOD, 0.006),
)


@dataclass(frozen=True)
class PlantedSlide:
    """A scene to paint, with its ground truth.

    Attributes
    ----------
    scene
        What :func:`~nic_core.demo.painter.paint` paints.
    truth
        uint8, one point per TRUTH x TRUTH px, values of :class:`Tissue`.
    mitoses
        Centres in px, x and y.
    """

    scene: Scene
    truth: NDArray[np.uint8]
    mitoses: tuple[Floats, Floats]


def plant_slide(
    rng: np.random.Generator, side: int, tumour: Tumour, capsules: tuple[bool, ...]
) -> PlantedSlide:
    """Lay out a slide of ``side`` px; nest *i* has a capsule if ``capsules[i]``."""
    frame = _Frame.draw(rng, side, len(capsules))
    x, y, unit, blob = frame.x, frame.y, frame.unit, frame.blob
    rings, nearest, free = frame.rings, frame.nests.min(0), frame.free
    region = np.where(blob, Tissue.STROMA, Tissue.BACKGROUND).astype(np.uint8)
    region[nearest <= 0] = Tissue.TUMOUR
    for kind, share in ISLANDS:
        area = int(share * blob.sum() * np.exp(rng.normal(0, 0.15)))
        island = _grow(rng, free, area, unit)
        region[island] = kind
        free = free & ~island
    waves = 3.0 * smooth_noise(rng, x.shape, 1.5 * unit) + 0.6 * smooth_noise(rng, x.shape, 12)
    direction = rng.uniform(0, np.pi)
    fibres = y * np.cos(direction) - x * np.sin(direction) + 1.5 * waves
    capsule = rings[list(capsules)].any(0)
    region[capsule] = Tissue.RIM
    fibres = np.where(capsule, nearest + 0.4 * waves, fibres)
    budget = int(rings.any(0).sum() - capsule.sum())
    if budget > 0:
        band, across = _bands(rng, x, y, unit, free, budget)
        region[band] = Tissue.RIM
        fibres = np.where(band, across + 0.4 * waves, fibres)
    _necrosis(rng, region, frame.nests, unit)
    scene = Scene(_materials(rng, region, unit), (fibres * RASTER).astype(np.float32))
    add_glands(scene, rng, region == Tissue.GLAND, COLON)
    mitoses = populate(scene, rng, tumour)
    return PlantedSlide(scene, truth_points(region), mitoses)


def truth_points(region: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the truth image of ``region``, of which one point is RASTER x RASTER px."""
    step = TRUTH // RASTER
    return region[step // 2 :: step, step // 2 :: step].copy()


@dataclass(frozen=True)
class Arrangement:
    """The parts of a composed slide, one point per RASTER x RASTER px.

    Attributes
    ----------
    tissue
        uint8: BACKGROUND, GLAND (the tissue between the parts), TUMOUR (the nests) or RIM.
    parts
        uint8: 2 *i* + 1 the ring around nest *i*, 2 *i* + 2 a band of equal area away from the
        nests, 0 elsewhere. One of the two is RIM and the other one GLAND, so that the borders of
        all parts are the same in both growth patterns.
    """

    tissue: NDArray[np.uint8]
    parts: NDArray[np.uint8]


def arrange_slide(rng: np.random.Generator, side: int, capsules: tuple[bool, ...]) -> Arrangement:
    """Lay out a composed slide of ``side`` px; nest *i* has a capsule if ``capsules[i]``."""
    frame = _Frame.draw(rng, side, len(capsules))
    tissue = np.where(frame.blob, Tissue.GLAND, Tissue.BACKGROUND).astype(np.uint8)
    tissue[frame.nests.min(0) <= 0] = Tissue.TUMOUR
    parts = np.zeros_like(tissue)
    free = frame.free & ~frame.rings.any(0)
    for nest, (ring, capsule) in enumerate(zip(frame.rings, capsules, strict=True)):
        band, _ = _bands(rng, frame.x, frame.y, frame.unit, free, int(ring.sum()))
        free = free & ~band
        parts[ring], parts[band] = 2 * nest + 1, 2 * nest + 2
        tissue[ring if capsule else band] = Tissue.RIM
    return Arrangement(tissue, parts)


@dataclass(frozen=True)
class _Frame:
    """What painted and composed slides have in common: the outline, nests and their rings.

    Attributes
    ----------
    x, y
        float32: coordinates of the raster points.
    unit
        Raster points of a unit of length.
    blob
        The tissue.
    nests
        float32 (nests, rows, columns): distance to the border of each nest in raster points,
        negative inside.
    rings
        bool (nests, rows, columns): the place of each nest's capsule.
    free
        The tissue away from nests and rings.
    """

    x: Floats
    y: Floats
    unit: float
    blob: Bools
    nests: Floats
    rings: Bools
    free: Bools

    @classmethod
    def draw(cls, rng: np.random.Generator, side: int, nests: int) -> _Frame:
        n = -(-side // RASTER)
        unit = n / UNITS
        y, x = np.indices((n, n), dtype=np.float32)
        blob = _outline(rng, x, y, unit)
        distances = _nests(rng, x, y, unit, blob, nests)
        nearest = distances.min(0)
        thickness = CAPSULE * unit * (1 + 0.15 * smooth_noise(rng, (n, n), 2 * unit))
        rings = (distances > 0) & (distances < thickness) & (distances == nearest) & blob
        free = blob & (nearest > (CAPSULE + GAP) * unit * 1.15)
        return cls(x, y, unit, blob, distances, rings, free)


def _outline(rng: np.random.Generator, x: Floats, y: Floats, unit: float) -> Bools:
    """Return the mask of an irregular piece of tissue, about three quarters of the slide."""
    middle = UNITS * unit / 2
    distance = ((abs(x - middle) / unit) ** 3 + (abs(y - middle) / unit) ** 3) ** (1 / 3)
    distance += 0.35 * smooth_noise(rng, x.shape, 3.5 * unit) + 0.06 * smooth_noise(
        rng, x.shape, 0.6 * unit
    )
    edge = np.quantile(distance, rng.uniform(0.76, 0.80))
    return np.asarray(distance < min(float(edge), UNITS / 2 - 0.4))


def _nests(
    rng: np.random.Generator, x: Floats, y: Floats, unit: float, blob: Bools, count: int
) -> Floats:
    """Return the distance to the border of each nest, negative inside the nest.

    Distances are in raster points, float32 (count, rows, columns).
    """
    radii = rng.uniform(0.88, 1.12, count)
    radii *= NEST_RADIUS * unit / np.sqrt((radii**2).mean())
    room = ndimage.distance_transform_edt(blob)
    zone = (CAPSULE + GAP) * unit
    candidates = np.argwhere(room > radii.min() + zone)
    while True:
        centres: list[tuple[float, float]] = []
        for radius in radii:
            for cy, cx in candidates[rng.integers(0, len(candidates), 60)]:
                clear = all(
                    np.hypot(cy - b, cx - a) > radius + r + 2 * zone
                    for (b, a), r in zip(centres, radii, strict=False)
                )
                if clear and room[cy, cx] > radius + zone:
                    centres.append((cy, cx))
                    break
        if len(centres) == count:
            break
    nests = []
    for (cy, cx), radius in zip(centres, radii, strict=True):
        polar = np.arctan2(y - cy, x - cx)
        waves = sum(
            rng.normal(0, 0.05) * np.cos(k * polar + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4)
        )
        nests.append(np.hypot(x - cx, y - cy) - radius * (1 + waves))
    return np.asarray(nests, np.float32)


def _grow(rng: np.random.Generator, free: Bools, area: int, unit: float) -> Bools:
    """Return a rounded island of ``area`` raster points within ``free``, empty without space."""
    room = ndimage.distance_transform_edt(free)
    inner = np.argwhere(room > 0.7 * room.max())
    island = np.zeros_like(free)
    if len(inner) == 0 or area == 0:
        return island
    cy, cx = inner[rng.integers(len(inner))]
    y, x = np.indices(free.shape, dtype=np.float32)
    cost = np.hypot(x - cx, y - cy) + 0.25 * unit * smooth_noise(rng, free.shape, unit)
    reach = np.partition(cost[free], min(area, int(free.sum()) - 1))[min(area, int(free.sum()) - 1)]
    return np.asarray(free & (cost < reach))


def _bands(
    rng: np.random.Generator, x: Floats, y: Floats, unit: float, free: Bools, area: int
) -> tuple[Bools, Floats]:
    """Return curved bands of ``area`` raster points in ``free``, and the potential of their fibres.

    Arcs are added until the bands have this area and are no thicker than a capsule.
    """
    cost = np.full(free.shape, np.inf, np.float32)
    across = np.zeros(free.shape, np.float32)
    free_area = int(free.sum())
    area = min(area, free_area - 1)
    places = np.argwhere(free)
    while True:
        py, px = places[rng.integers(len(places))]
        radius, turn = rng.uniform(4, 12) * unit, rng.uniform(0, 2 * np.pi)
        arc = np.hypot(x - px - radius * np.cos(turn), y - py - radius * np.sin(turn)) - radius
        nearer = abs(arc) < cost
        cost = np.where(nearer, abs(arc), cost).astype(np.float32)
        across = np.where(nearer, arc, across).astype(np.float32)
        reach = np.partition(cost[free], area)[area]
        if reach <= CAPSULE * unit / 2 or area > 0.9 * free_area:
            return np.asarray(free & (cost < reach)), across


def _necrosis(
    rng: np.random.Generator, region: NDArray[np.uint8], nests: Floats, unit: float
) -> None:
    """Add necrosis to the centre of one or two nests, in place."""
    noise = 0.3 * unit * smooth_noise(rng, region.shape, 0.8 * unit)
    for nest in rng.permutation(len(nests))[: rng.integers(1, 3)]:
        depth = rng.uniform(0.45, 0.65) * nests[nest].min()
        region[nests[nest] + noise < depth] = Tissue.NECROSIS


def _materials(
    rng: np.random.Generator, region: NDArray[np.uint8], unit: float
) -> NDArray[np.uint8]:
    """Return the tissue to paint: regions plus septa and lumens of tumour and vessels of stroma."""
    tissue = region.copy()
    tissue[region == Tissue.GLAND] = Tissue.STROMA
    add_tumour_detail(rng, tissue)
    vessels = scatter_vessels(rng, np.isin(tissue, (Tissue.STROMA, Tissue.RIM)))
    tissue[vessels[0]] = Tissue.MUSCLE
    tissue[vessels[1]] = Tissue.BLOOD
    return tissue


def add_tumour_detail(rng: np.random.Generator, tissue: NDArray[np.uint8]) -> None:
    """Add thin stromal septa and small lumens to TUMOUR, in place."""
    tumour = tissue == Tissue.TUMOUR
    septa = abs(smooth_noise(rng, tissue.shape, 170 / RASTER)) < 0.035
    lumens = smooth_noise(rng, tissue.shape, 60 / RASTER) > 2.25
    tissue[tumour & septa] = Tissue.STROMA
    tissue[tumour & lumens] = Tissue.LUMEN


def scatter_vessels(rng: np.random.Generator, where: Bools) -> tuple[Bools, Bools]:
    """Return masks of walls and lumens of small vessels, about one per 0.1 mm2."""
    walls, lumens = np.zeros_like(where), np.zeros_like(where)
    room = ndimage.distance_transform_edt(np.pad(where, 1))[1:-1, 1:-1] * RASTER
    places = np.argwhere(room > 50)
    if len(places) == 0:
        return walls, lumens
    y, x = np.indices(where.shape, dtype=np.float32) * RASTER
    for cy, cx in places[rng.integers(0, len(places), round(where.sum() * RASTER**2 / 4e5))]:
        radius = rng.uniform(18, 36)
        a, turn = rng.uniform(1, 1.7), rng.uniform(0, np.pi)
        dx, dy = x - cx * RASTER, y - cy * RASTER
        u = (dx * np.cos(turn) + dy * np.sin(turn)) / a
        v = (dy * np.cos(turn) - dx * np.sin(turn)) * a**0.5
        distance = np.hypot(u, v)
        walls |= (distance < radius) & where
        lumens |= (distance < 0.62 * radius) & where
    return walls, lumens

"""Test images for tissue detection: sections with a known tissue mask, and slide artefacts.

A section, half stroma and half fat, is painted like the slides of the demo cohort and reduced to
the resolution of tissue detection. :func:`sections` yields it with each artefact: pen marks, black
borders, dust, coloured and uneven light, and stain on the glass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nic_core.demo.cells import Tumour, populate
from nic_core.demo.painter import RASTER, Scene, Stain, ordinary_stain, paint, smooth_noise
from nic_core.demo.tissues import Tissue
from nic_core.slides.resample import resample
from nic_core.tiling.tissue import TISSUE_MPP
from nic_core.types import Pixels

MPP = 0.5  # um/px of the painter
SIDE = 2048  # px of the painting
GLASS = 64  # px of empty glass around the section, at TISSUE_MPP
INKS = {
    "green": (40, 150, 130),
    "red": (215, 40, 55),
    "blue": (50, 70, 190),
    "black": (15, 15, 18),
}

# relative optical densities of red, green and blue
PINK, GREY = (0.1, 1.0, 0.4), (1.0, 1.0, 1.0)

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Section:
    """An image at ``TISSUE_MPP`` um/px with its true tissue mask.

    Attributes
    ----------
    pixels
        uint8 (H, W, 3).
    tissue
        bool (H, W): tissue, including the inside of fat cells.
    fat
        bool (H, W): the part of the tissue that is fat.
    """

    name: str
    pixels: Pixels
    tissue: Mask
    fat: Mask


def sections(seed: int = 0) -> Iterator[Section]:
    """Yield one section with every artefact, and sections of almost no tissue and of no glass."""
    rng = np.random.default_rng(seed)
    plain = _section("plain", ordinary_stain(), rng)
    yield plain
    yield _section("pale stain", replace(ordinary_stain(), haematoxylin=0.6, eosin=0.6), rng)
    for name, lamp in (("grey lamp", (215, 215, 217)), ("yellow lamp", (232, 226, 212))):
        yield replace(plain, name=name, pixels=_grey_levels(plain.pixels * (np.array(lamp) / 244)))
    y, x = np.indices(plain.tissue.shape) / len(plain.tissue) - 0.5
    away = ndimage.distance_transform_edt(~plain.tissue) * TISSUE_MPP
    for name, density, colour in (
        ("vignette", 0.5 * (x**2 + y**2), GREY),
        ("pink glass", np.full_like(x, 0.1), PINK),
        ("pink gradient", 0.1 * (x + 0.5), PINK),
        ("stain that leaked", 0.05 * np.exp(-away / 300), PINK),
    ):
        yield replace(plain, name=name, pixels=tinted(plain.pixels, density, colour))
    for name, ink in INKS.items():
        yield replace(plain, name=f"{name} pen", pixels=_drawn(plain.pixels, ink, rng))
    yield replace(plain, name="black border", pixels=_bordered(plain.pixels))
    yield replace(plain, name="dust", pixels=_dusty(plain.pixels, rng))
    yield _without(plain, "almost empty", ~_disc(plain.tissue.shape, (128, 100), 9))
    yield _without(plain, "empty", np.ones_like(plain.tissue))
    inside = slice(104, 152), slice(80, 128)
    yield Section(
        "all tissue",
        plain.pixels[inside],
        np.ones((48, 48), np.bool_),
        np.zeros((48, 48), np.bool_),
    )


def tinted(
    pixels: Pixels, density: NDArray[np.floating], colour: tuple[float, float, float]
) -> Pixels:
    """An image behind a tint.

    Parameters
    ----------
    pixels : uint8 (H, W, 3)
    density : float (H, W)
        Optical density of the tint.
    colour : tuple of float
        Densities of red, green and blue relative to ``density``.
    """
    return _grey_levels(pixels * 10 ** (-density[..., None] * np.array(colour)))


def _section(name: str, stain: Stain, rng: np.random.Generator) -> Section:
    side = SIDE // RASTER
    y, x = np.indices((side, side), dtype=np.float32)
    radius = 0.4 * side + 10 * smooth_noise(rng, (side, side), 60)
    where = np.hypot(y - side / 2, x - side / 2) < radius
    tissue = np.where(where, Tissue.STROMA, Tissue.BACKGROUND).astype(np.uint8)
    tissue[where & (x > side / 2)] = Tissue.FAT
    scene = Scene(tissue, y * RASTER)
    populate(scene, rng, Tumour(2, 0))
    step = TISSUE_MPP / MPP
    length = round(SIDE / step)
    small = resample(paint(scene, stain, rng), (0, 0), step, (length, length))
    size = length + 2 * GLASS
    pixels = stain.white + rng.normal(0, stain.noise / 2, (size, size, 1))
    pixels[GLASS:-GLASS, GLASS:-GLASS] = small
    middle = int(step) // RASTER
    truth = np.pad(tissue[middle // 2 :: middle, middle // 2 :: middle], GLASS)
    return Section(name, _grey_levels(pixels), truth != Tissue.BACKGROUND, truth == Tissue.FAT)


def _without(section: Section, name: str, gone: Mask) -> Section:
    """Replace the part ``gone`` by glass from the corner of the section."""
    glass = np.tile(section.pixels[:32, :32], (*(-(-n // 32) for n in gone.shape), 1))
    pixels = np.where(gone[..., None], glass[: gone.shape[0], : gone.shape[1]], section.pixels)
    return Section(name, pixels, section.tissue & ~gone, section.fat & ~gone)


def _drawn(pixels: Pixels, ink: tuple[int, int, int], rng: np.random.Generator) -> Pixels:
    """Draw pen strokes along the left margin and in the lower right corner."""
    height, width = pixels.shape[:2]
    y, x = np.indices((height, width))
    stroke = (abs(x - 22 - 6 * np.sin(y / 30)) < 9) & (y > 20) & (y < height - 40)
    stroke |= (abs(x + y - 1.86 * width) < 14) & (x < width - 20)
    cover = ndimage.gaussian_filter(stroke.astype(float), 2)
    cover *= 0.85 + 0.1 * smooth_noise(rng, (height, width), 20)
    # ink absorbs light, as stain does
    return _grey_levels(pixels * (np.array(ink) / 244) ** np.clip(cover, 0, 1)[..., None])


def _bordered(pixels: Pixels) -> Pixels:
    bordered = pixels.copy()
    bordered[:14] = bordered[:, -18:] = 3
    return bordered


def _dusty(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Add grey specks, sharp and out of focus, and a fibre."""
    height, width = pixels.shape[:2]
    y, x = np.indices((height, width))
    shadow = np.zeros((height, width))
    for _ in range(40):
        cy, cx, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.5, 5)
        distance = np.hypot(y - cy, x - cx)
        shadow = np.maximum(shadow, rng.uniform(0.2, 0.7) * np.clip(radius + 1 - distance, 0, 1))
    fibre = abs(y - 30 - 8 * np.sin(x / 15)) < 0.7
    shadow = np.maximum(ndimage.gaussian_filter(shadow, 0.8), 0.5 * fibre)
    return _grey_levels(pixels * (1 - shadow[..., None]))


def _disc(shape: tuple[int, ...], middle: tuple[int, int], radius: float) -> Mask:
    y, x = np.indices(shape)
    return np.asarray(np.hypot(y - middle[0], x - middle[1]) < radius)


def _grey_levels(light: NDArray[np.float64]) -> Pixels:
    return np.asarray(np.rint(np.clip(light, 0, 255)), np.uint8)

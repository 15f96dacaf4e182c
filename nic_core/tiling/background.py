"""The glass of a slide, and the optical density of what lies on it [choice].

Glass is rarely of one colour: stain that leaks from a section tints the glass around it, the
illumination falls off towards the corners of an image, and scanners fill areas that they did not
scan with white. So the light of the glass is measured wherever the slide is certainly glass, and
interpolated elsewhere. A px is certainly glass if

1. it is smooth. Stained tissue varies at the scale of cells and fibres by more than ``TEXTURE``;
   a tint does not, however strong it is;
2. it is light: within ``MAX_TINT`` and ``MAX_SHADE`` of the lightest smooth areas;
3. it is connected, over px with both properties, to glass of almost the colour of the lightest
   areas (``SEED_TINT``), or belongs to such glass. A smooth area enclosed by tissue, such as a pool
   of secretion, is not;
4. it is not pen ink, whose faint margin can be smooth.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from nic_core.slides.resample import coverage
from nic_core.tiling.ink import components_with, find_ink
from nic_core.types import Pixels

TEXTURE = 0.004  # optical density, root mean square of the variation between FINE and COARSE
FINE, COARSE = 4.0, 25.0  # um, standard deviations of the Gaussians of this band-pass
MIN_COARSE = 2.0  # px: on coarser images the band-pass would measure a single px
# optical density: largest differences between the channels, relative to the lightest areas
SEED_TINT, MAX_TINT = 0.06, 0.2
MAX_SHADE = 0.35  # optical density of shaded glass, relative to the lightest areas

MIN_SMOOTH = 10_000.0  # um^2: smaller smooth areas could as well be a part of tissue

_CELL = 32.0  # um: the glass is interpolated on px of this size
_WINDOWS = (4096.0, 1024.0, 256.0, 64.0)  # um
_PRIOR = 0.02  # weight of the wider window's mean, relative to a window full of glass

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]


def stain_density(pixels: Pixels, mpp: float) -> Floats:
    """Optical density relative to the glass at each place.

    Parameters
    ----------
    pixels : uint8 (H, W, 3)
    mpp : float
        um/px of the pixels.

    Returns
    -------
    float32 (H, W, 3)
        0 where the slide is certainly glass; below 0 where it is lighter than the interpolated
        glass. Relative to white (255) if no px is certainly glass.
    """
    density = np.asarray(-np.log10(np.maximum(pixels, 1) / np.float32(255)), np.float32)
    smooth = texture(density, mpp) < TEXTURE
    if smooth.sum() * mpp**2 < MIN_SMOOTH:
        return density
    tinted = density - _lightest(density[smooth])
    sigma = FINE / mpp
    channels = ndimage.gaussian_filter(tinted, (sigma, sigma, 0))
    highest, tint = channels.max(axis=2), np.ptp(channels, axis=2)
    light = smooth & (tint < MAX_TINT) & (highest < MAX_SHADE)
    glass = components_with(light, light & (tint < SEED_TINT))
    # texture spreads over the window in which it is measured, so px near smooth ones are glass too
    near = glass | (ndimage.distance_transform_edt(~glass) * mpp <= COARSE)
    known = near & ~find_ink(tinted, mpp)
    if not known.any():
        return density
    density -= _interpolated(density, known, mpp)
    density[glass] = 0
    return density


def texture(density: Floats, mpp: float) -> Floats:
    """Variation of the optical density at the scale of cells and fibres.

    Parameters
    ----------
    density : float32 (H, W, 3)
    mpp : float
        um/px.

    Returns
    -------
    float32 (H, W)
        Root mean square of the band-passed mean of the channels, in optical density.
    """
    coarse = max(COARSE / mpp, MIN_COARSE)
    grey = ndimage.gaussian_filter(density.mean(axis=2), FINE / mpp)
    detail = grey - ndimage.gaussian_filter(grey, coarse)
    return np.asarray(np.sqrt(ndimage.gaussian_filter(detail**2, coarse)))


def _lightest(density: Floats) -> Floats:
    """Median colour of the lightest tenth of the px (n, 3)."""
    grey = density.mean(axis=1)
    return np.asarray(np.median(density[grey <= np.quantile(grey, 0.1)], axis=0))


def _interpolated(density: Floats, known: Mask, mpp: float) -> Floats:
    """The density of the glass at every px: the mean of the known px in a window around it.

    The windows become narrower while they contain enough known px.
    """
    shape = tuple(max(1, math.ceil(side * mpp / _CELL)) for side in known.shape)
    scale = tuple(side / cells for side, cells in zip(known.shape, shape, strict=True))
    down, across = (
        coverage(0.0, step, cells, side)
        for step, cells, side in zip(scale, shape, known.shape, strict=True)
    )
    weight = _reduced(known.astype(np.float32), down, across)
    result = np.empty_like(density)
    for channel in range(density.shape[2]):
        total = _reduced(np.where(known, density[..., channel], 0), down, across)
        field = np.full(shape, total.sum() / weight.sum(), np.float32)
        for um in _WINDOWS:
            width = 2 * round(um / _CELL / 2) + 1
            field = (_mean(total, width) + _PRIOR * field) / (_mean(weight, width) + _PRIOR)
        ndimage.zoom(field, scale, result[..., channel], order=1, mode="nearest", grid_mode=True)
    return result


def _reduced(values: Floats, down: sparse.csr_matrix, across: sparse.csr_matrix) -> Floats:
    """Mean over cells, float32 (rows, columns)."""
    return np.asarray((across @ (down @ values).T).T)


def _mean(values: Floats, width: int) -> Floats:
    """Weighted mean over a square window, whose weights fall off linearly from its centre."""
    return np.asarray(ndimage.uniform_filter(ndimage.uniform_filter(values, width), width))

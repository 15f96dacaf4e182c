"""Pen ink and black areas: colours that no mixture of haematoxylin and eosin has [choice].

Haematoxylin and eosin both absorb green the most. Areas that absorb red more than green (blue and
green pens), blue about as much as green at full density (red pens) or all colours (black pens and
borders) are ink, and so is the blurred rim around them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import morphology

MIN_AREA = 10_000.0  # um^2: a disc 113 um across; smaller strokes and specks are ignored
RIM = 25.0  # um

Mask = NDArray[np.bool_]


def find_ink(density: NDArray[np.float32], mpp: float) -> Mask:
    """Detect pen ink and black areas.

    Parameters
    ----------
    density : float32 (H, W, 3)
        Optical density relative to the glass.
    mpp : float
        um/px.

    Returns
    -------
    bool (H, W)
    """
    sigma = 8.0 / mpp
    red, green, blue = np.moveaxis(ndimage.gaussian_filter(density, (sigma, sigma, 0)), 2, 0)
    floor = np.maximum(green, 0) + 1e-3  # glass can be lighter than estimated
    cold, hot = red / floor, blue / floor - 2 * red / floor
    black = np.minimum(np.minimum(red, green), blue)
    strong = ((cold > 1.25) & (red > 0.15)) | ((hot > 0.4) & (green > 0.5)) | (black > 0.9)
    strong = morphology.remove_small_objects(strong, max_size=int(MIN_AREA / mpp**2))
    if not strong.any():
        return np.asarray(strong)
    # a stroke fades towards its edge: add connected px of the same hue with a lower density
    weak = ((cold > 1.1) & (red > 0.03)) | ((hot > 0.2) & (green > 0.05)) | strong
    stroke = components_with(weak, strong)
    return np.asarray(ndimage.distance_transform_edt(~stroke) * mpp <= RIM)


def components_with(mask: Mask, seeds: Mask) -> Mask:
    """The connected components of a mask that contain a seed."""
    label, count = ndimage.label(mask)
    chosen = np.zeros(count + 1, np.bool_)
    chosen[label[seeds & mask]] = True
    return np.asarray(chosen[label])

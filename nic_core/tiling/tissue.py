"""Tissue detection and tissue masks.

The rule [choice] works at 8 um/px on optical densities relative to the glass at each place
(:mod:`nic_core.tiling.background`), so that neither the colour of a lamp nor stain that leaked
onto the glass is taken for tissue:

1. Colour. Haematoxylin and eosin both absorb green the most. The measure is by how much the density
   of green exceeds that of red or of blue, whichever is lower; smoothed. It is about 0 for glass,
   dust, shadows and black borders, or low relative to their density (``GREY``), and high for
   stained tissue. Otsu's threshold is applied to it, clipped to ``COLOUR_RANGE``: on a slide with
   almost no tissue, or with tissue only, Otsu would split noise or the tissue itself. Fainter
   areas, down to ``FAINT``, are tissue if they are connected to areas above the threshold, across
   gaps of up to ``GAP``. This includes fat (thin strands) and pale stroma.
2. Ink (:mod:`nic_core.tiling.ink`) is not tissue.
3. Shape. Tissue areas below ``MIN_AREA`` are removed. Holes below ``MAX_HOLE`` are filled, except
   at the border of the image, where an area of glass may extend beyond it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import filters, morphology, segmentation

from nic_core.libvips import pyvips
from nic_core.slides.slide import Slide
from nic_core.tiling.background import stain_density
from nic_core.tiling.ink import components_with, find_ink

TISSUE_MPP = 8.0
COLOUR_RANGE = (0.03, 0.06)  # optical density
FAINT = 0.012  # optical density
GREY = 0.15  # colour relative to density; dark areas below it are tinted grey, not stained
GAP = 50.0  # um
# um^2: a disc 113 um across; at most a quarter of the image, so that small images keep their tissue
MIN_AREA = 10_000.0
MAX_HOLE = 20_000.0  # um^2; lumens and vessels count as tissue

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class TissueMask:
    """A tissue mask of the whole slide, from its top-left corner.

    Attributes
    ----------
    array : bool (H, W)
        True for tissue.
    mpp : float
        um/px of the mask.
    """

    array: Mask
    mpp: float

    def save(self, path: Path) -> None:
        """Write the mask as a PNG of 1 bit per px."""
        image = pyvips.Image.new_from_array(self.array.astype(np.uint8) * 255)
        image.pngsave(str(path), bitdepth=1)

    @classmethod
    def load(cls, path: Path, mpp: float) -> TissueMask:
        """Read a mask that :meth:`save` wrote; ``mpp`` is its um/px.

        Raises
        ------
        pyvips.Error
            The file cannot be read.
        """
        image = pyvips.Image.pngload(str(path), fail_on="error")
        return cls(image.extract_band(0).numpy() > 127, mpp)


def tissue_mask(slide: Slide, *, mpp: float = TISSUE_MPP) -> TissueMask:
    """Detect the tissue of a slide by the rule of this module.

    Parameters
    ----------
    mpp : float
        um/px of the mask; a coarser slide is used at its own um/px.

    Raises
    ------
    SlideError
        A part of the slide cannot be decoded.
    """
    mpp = max(mpp, slide.mpp)
    width, height = mask_size(slide, mpp)
    return TissueMask(find_tissue(slide.read(0, 0, width, height, mpp), mpp), mpp)


def find_tissue(pixels: NDArray[np.uint8], mpp: float) -> Mask:
    """Detect tissue in pixels by the rule of this module.

    Parameters
    ----------
    pixels : uint8 (H, W, 3)
    mpp : float
        um/px of the pixels.

    Returns
    -------
    bool (H, W)
    """
    density = stain_density(pixels, mpp)
    ink = find_ink(density, mpp)
    sigma = 8.0 / mpp
    red, green, blue = np.moveaxis(ndimage.gaussian_filter(density, (sigma, sigma, 0)), 2, 0)
    colour = green - np.minimum(red, blue)
    highest = np.maximum(np.maximum(red, green), blue)
    low, high = COLOUR_RANGE
    without_ink = colour[~ink]
    threshold = high
    if without_ink.size and np.ptp(without_ink) > 0:
        threshold = float(filters.threshold_otsu(without_ink))  # type: ignore[no-untyped-call]
    stained = (colour > FAINT) & (colour > GREY * highest) & ~ink
    faint = _close(stained, mpp) & ~ink
    tissue = components_with(faint, stained & (colour > np.clip(threshold, low, high)))
    min_area = min(MIN_AREA, tissue.size * mpp**2 / 4)
    tissue = morphology.remove_small_objects(tissue, max_size=int(min_area / mpp**2))
    holes = segmentation.clear_border(~tissue)  # type: ignore[no-untyped-call]
    large = morphology.remove_small_objects(holes, max_size=int(MAX_HOLE / mpp**2))
    return np.asarray((tissue | (holes & ~large)) & ~ink)


def _close(mask: Mask, mpp: float) -> Mask:
    """Close gaps narrower than ``GAP``, except between tissue and the border of the image."""
    # px; the structuring element is a square because it separates into two passes along lines
    reach = round(GAP / 2 / mpp)
    grown = ndimage.maximum_filter(np.pad(mask, reach), 2 * reach + 1)
    closed = ndimage.minimum_filter(grown, 2 * reach + 1)
    return np.asarray(closed[reach : reach + len(mask), reach : reach + mask.shape[1]])


def mask_size(slide: Slide, mpp: float) -> tuple[int, int]:
    """Return the width and height of a mask that covers the slide, px at ``mpp`` um/px."""
    width, height = slide.width * slide.mpp / mpp, slide.height * slide.mpp / mpp
    return math.ceil(width - 1e-6), math.ceil(height - 1e-6)


def tissue_outline(slide: Slide, mask: TissueMask, *, side: int = 768) -> NDArray[np.uint8]:
    """Return a thumbnail with the outline of the tissue.

    Parameters
    ----------
    side : int
        Longest side of the thumbnail, px.

    Returns
    -------
    uint8 (H, W, 3)

    Raises
    ------
    SlideError
        A part of the slide cannot be decoded.
    """
    picture = slide.thumbnail(side)
    height, width = picture.shape[:2]
    um = slide.width * slide.mpp / width, slide.height * slide.mpp / height
    rows = np.minimum(
        ((np.arange(height) + 0.5) * um[1] / mask.mpp).astype(int), len(mask.array) - 1
    )
    columns = np.minimum(
        ((np.arange(width) + 0.5) * um[0] / mask.mpp).astype(int), mask.array.shape[1] - 1
    )
    return draw_outline(picture, mask.array[np.ix_(rows, columns)], thick=max(1, side // 400))


def draw_outline(picture: NDArray[np.uint8], mask: Mask, *, thick: int = 1) -> NDArray[np.uint8]:
    """Return a picture with a line drawn around a mask.

    Parameters
    ----------
    picture : uint8 (H, W, 3)
    mask : bool (H, W)
    thick : int
        Width of the line, px.
    """
    result = picture.copy()
    result[ndimage.binary_dilation(mask, iterations=thick) & ~mask] = (0, 140, 60)
    return result

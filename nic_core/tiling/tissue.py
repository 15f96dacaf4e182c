"""Where a slide holds tissue.

The rule [choice] works on the slide at 8 um/px, in optical densities against the slide's own
glass, so that a grey or yellowish lamp is no stain:

1. colour: the spread between the densities of red, green and blue, smoothed. Glass, dust, shadow
   and black borders have none, or little for how dark they are (``GREY``); stained tissue has.
   Otsu's threshold on it, held within ``COLOUR_RANGE``: on a slide with (nearly) no tissue, or
   nothing else, Otsu would split noise or the tissue itself, and the range takes its place. What
   is fainter, down to ``FAINT``, is tissue where it hangs together with what is not, over gaps
   of ``GAP``: fat is thin strands, and pale stroma no more than a tint;
2. ink: haematoxylin and eosin both absorb green the most. What absorbs red more than green (blue
   and green pens), blue as much as green at full strength (red pens) or everything (black pens
   and borders) is none of them, with the blurred rim around it;
3. shape: specks under ``MIN_AREA`` go, holes under ``MAX_HOLE`` close, unless at the border: what
   lies there is not known to be a hole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyvips
from numpy.typing import NDArray
from scipy import ndimage
from skimage import filters, morphology, segmentation

from nic_core.slides.errors import SlideError
from nic_core.slides.resample import coverage
from nic_core.slides.slide import Slide
from nic_core.tiling.annotations import ANNOTATION_SUFFIXES, read_annotations, region_mask

TISSUE_MPP = 8.0
COLOUR_RANGE = (0.03, 0.06)  # optical density
FAINT = 0.02  # optical density
GREY = 0.15  # spread over density: below it a dark place is grey with a hue, not stained
GAP = 50.0  # um
MIN_AREA = 10_000.0  # um^2: a disc of 113 um; of a small region no more than a quarter
INK_RIM = 25.0  # um
MAX_HOLE = 20_000.0  # um^2: lumens and vessels belong to the tissue

_MASK_PIXELS = 1 << 24  # of a ready-made mask that are looked at in one go: it may be of level 0

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TissueMask:
    """A mask over the whole slide from its top-left corner.

    Attributes
    ----------
    array : bool (H, W)
        True where there is tissue.
    mpp : float
        um/px of the mask.
    """

    array: Mask
    mpp: float

    def save(self, path: Path) -> None:
        """Write as a black and white PNG, 1 bit a px."""
        image = pyvips.Image.new_from_array(self.array.astype(np.uint8) * 255)
        image.pngsave(str(path), bitdepth=1)

    @classmethod
    def load(cls, path: Path, mpp: float) -> TissueMask:
        """Read what :meth:`save` wrote."""
        image = pyvips.Image.pngload(str(path), fail_on="error")
        return cls(image.extract_band(0).numpy() > 127, mpp)


def tissue_mask(slide: Slide, *, mpp: float = TISSUE_MPP) -> TissueMask:
    """Find the tissue of a slide by the module's rule.

    Parameters
    ----------
    mpp : float
        um/px to look at; a coarser slide is looked at as it is.
    """
    mpp = max(mpp, slide.mpp)
    width, height = _mask_size(slide, mpp)
    return TissueMask(find_tissue(slide.read(0, 0, width, height, mpp), mpp), mpp)


def read_mask(path: Path, slide: Slide, *, mpp: float = TISSUE_MPP) -> TissueMask:
    """A ready-made mask instead of the rule's.

    Parameters
    ----------
    path : Path
        An image of the whole slide (0 is background, all else tissue), stretched over it, or
        annotated regions (QuPath GeoJSON, ASAP XML) that are the tissue.

    Raises
    ------
    SlideError
        The file cannot be read, or the image's shape is not the slide's.
    """
    mpp = max(mpp, slide.mpp)
    width, height = _mask_size(slide, mpp)
    if path.suffix.lower() in ANNOTATION_SUFFIXES:
        regions = read_annotations(path)
        return TissueMask(region_mask(regions, slide, (height, width), mpp), mpp)
    remedy = "give an image of the whole slide in the column `mask` of the slide table"
    try:
        image = pyvips.Image.new_from_file(str(path), fail_on="error").extract_band(0)
        if abs(image.width / image.height * slide.height / slide.width - 1) > 0.05:
            raise SlideError(
                slide.path,
                f"mask {path} has {image.width} x {image.height} px, "
                f"another shape than the slide's {slide.width} x {slide.height}",
                remedy,
            )
        return TissueMask(_stretched(image, slide, (height, width), mpp), mpp)
    except pyvips.Error as error:
        raise SlideError(slide.path, f"mask {path}: {error}", remedy) from error


def _stretched(image: pyvips.Image, slide: Slide, shape: tuple[int, int], mpp: float) -> Mask:
    """Px of a mask of which more than half is not 0 in an image stretched over the slide."""
    # px of the image a px of the mask; the slide's size need not be a whole number of the latter
    down = image.height / (slide.height * slide.mpp / mpp)
    across = image.width / (slide.width * slide.mpp / mpp)
    rows = coverage(0.0, down, shape[0], image.height)
    columns = coverage(0.0, across, shape[1], image.width)
    inside = np.outer(rows.sum(axis=1), columns.sum(axis=1))  # the last px reach outside
    mask = np.empty(shape, np.bool_)
    step = max(1, int(_MASK_PIXELS / (image.width * down)))
    for top in range(0, shape[0], step):
        band = rows[top : top + step]
        low, high = int(band.indices.min()), int(band.indices.max()) + 1
        drawn = (image.crop(0, low, image.width, high - low) != 0).numpy().astype(np.float32) / 255
        share = (columns @ (band[:, low:high] @ drawn).T).T
        mask[top : top + step] = share > 0.5 * inside[top : top + step]
    return mask


def find_tissue(pixels: NDArray[np.uint8], mpp: float) -> Mask:
    """The rule on pixels: uint8 (H, W, 3) at ``mpp`` um/px to bool (H, W)."""
    density = _optical_density(pixels)
    most = ndimage.gaussian_filter(density.max(axis=2), _px(8.0, mpp))
    colour = most - ndimage.gaussian_filter(density.min(axis=2), _px(8.0, mpp))
    ink = _ink(density, mpp)
    low, high = COLOUR_RANGE
    seen = colour[~ink]
    threshold = high
    if seen.size and np.ptp(seen) > 0:
        threshold = float(filters.threshold_otsu(seen))  # type: ignore[no-untyped-call]
    stained = (colour > FAINT) & (colour > GREY * most) & ~ink
    faint = _close(stained, mpp) & ~ink
    tissue = _parts_with(faint, stained & (colour > np.clip(threshold, low, high)))
    speck = min(MIN_AREA, tissue.size * mpp**2 / 4)
    tissue = morphology.remove_small_objects(tissue, max_size=int(speck / mpp**2))
    holes = segmentation.clear_border(~tissue)  # type: ignore[no-untyped-call]
    large = morphology.remove_small_objects(holes, max_size=int(MAX_HOLE / mpp**2))
    return np.asarray((tissue | (holes & ~large)) & ~ink)


def _close(mask: Mask, mpp: float) -> Mask:
    """Close gaps narrower than ``GAP``, but not towards the border."""
    reach = round(GAP / 2 / mpp)  # px; of a square, since that is two passes of a line
    grown = ndimage.maximum_filter(np.pad(mask, reach), 2 * reach + 1)
    closed = ndimage.minimum_filter(grown, 2 * reach + 1)
    return np.asarray(closed[reach : reach + len(mask), reach : reach + mask.shape[1]])


def _parts_with(mask: Mask, seeds: Mask) -> Mask:
    """The connected parts of a mask that hold a seed."""
    label, count = ndimage.label(mask)
    chosen = np.zeros(count + 1, np.bool_)
    chosen[label[seeds & mask]] = True
    return np.asarray(chosen[label])


def _optical_density(pixels: NDArray[np.uint8]) -> Floats:
    """-log10 of the light let through, against the slide's glass: float32 (H, W, 3)."""
    light = np.clip(pixels, 1, 255).astype(np.float32)
    return np.asarray(np.maximum(np.log10(_glass(pixels) / light), 0), np.float32)


def _glass(pixels: NDArray[np.uint8]) -> Floats:
    """Colour of the empty glass: the commonest bright, nearly grey one; else white."""
    low, high = pixels.min(axis=2), pixels.max(axis=2)
    empty = pixels[(low > 195) & (high - low < 20)]
    if len(empty) < 0.002 * low.size:
        return np.full(3, 255, np.float32)
    # counts smoothed, since a small region has few px of each grey level
    counts = [np.bincount(empty[:, c], minlength=256).astype(np.float32) for c in range(3)]
    return np.array([ndimage.uniform_filter1d(c, 5).argmax() for c in counts], np.float32)


def _ink(density: Floats, mpp: float) -> Mask:
    """Pens and black: no mixture of haematoxylin and eosin."""
    red, green, blue = np.moveaxis(
        ndimage.gaussian_filter(density, (_px(8.0, mpp), _px(8.0, mpp), 0)), 2, 0
    )
    cold, hot = red / (green + 1e-3), blue / (green + 1e-3) - 2 * red / (green + 1e-3)
    black = np.minimum(np.minimum(red, green), blue)
    strong = ((cold > 1.25) & (red > 0.15)) | ((hot > 0.4) & (green > 0.5)) | (black > 0.9)
    strong = morphology.remove_small_objects(strong, max_size=int(MIN_AREA / mpp**2))
    if not strong.any():
        return np.asarray(strong)
    # a stroke fades out: take all of its hue that hangs together with its core
    weak = ((cold > 1.1) & (red > 0.03)) | ((hot > 0.2) & (green > 0.05)) | strong
    stroke = _parts_with(weak, strong)
    return np.asarray(ndimage.distance_transform_edt(~stroke) * mpp <= INK_RIM)


def _px(um: float, mpp: float) -> float:
    return um / mpp


def _mask_size(slide: Slide, mpp: float) -> tuple[int, int]:
    width, height = slide.width * slide.mpp / mpp, slide.height * slide.mpp / mpp
    return math.ceil(width - 1e-6), math.ceil(height - 1e-6)


def tissue_outline(slide: Slide, mask: TissueMask, *, side: int = 768) -> NDArray[np.uint8]:
    """Thumbnail with the tissue's outline drawn on it, uint8 (H, W, 3)."""
    picture = slide.thumbnail(side)
    height, width = picture.shape[:2]
    um = slide.width * slide.mpp / width, slide.height * slide.mpp / height
    rows = np.minimum(
        ((np.arange(height) + 0.5) * um[1] / mask.mpp).astype(int), len(mask.array) - 1
    )
    columns = np.minimum(
        ((np.arange(width) + 0.5) * um[0] / mask.mpp).astype(int), mask.array.shape[1] - 1
    )
    return outlined(picture, mask.array[np.ix_(rows, columns)], thick=max(1, side // 400))


def outlined(picture: NDArray[np.uint8], inside: Mask, *, thick: int = 1) -> NDArray[np.uint8]:
    """A picture with a line of ``thick`` px drawn round a mask of its size."""
    drawn = picture.copy()
    drawn[ndimage.binary_dilation(inside, iterations=thick) & ~inside] = (0, 140, 60)
    return drawn

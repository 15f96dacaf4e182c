"""Tissue masks and truth images from files: their values, and their place on the slide.

Values. The value 0 is background: of a grey image the stored value, of an image with a palette the
index, of a colour image black. If an image has transparent px, these are background, too. Images
whose background cannot be determined, or whose compression changes values, are refused.

Place. An image starts at the slide's top-left corner. Its scale is, in this order:

1. the whole number of level-0 px per px that gives its size, rounded down or up, if there is
   exactly one, and the um/px that the image states, if any, agree within 1 %;
2. the um/px that it states, if it then covers the slide; it may extend beyond it, as masks padded
   to whole tiles do;
3. the ratio of the sizes, if one scale fits both sides within half a px of the image.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from nic_core.libvips import pyvips
from nic_core.slides.errors import SlideError
from nic_core.slides.images import alpha_kind, find_images
from nic_core.slides.metadata import MPP_RANGE
from nic_core.slides.resample import coverage
from nic_core.slides.slide import Slide
from nic_core.slides.source import SlideSource
from nic_core.tiling.annotations import (
    NO_CLASS,
    is_annotation_file,
    placed,
    read_annotations,
    unused_features,
)
from nic_core.tiling.regions import region_mask
from nic_core.tiling.tissue import TISSUE_MPP, Mask, TissueMask, mask_size, tissue_mask
from nic_core.types import Origin

log = logging.getLogger(__name__)

_MASK_PIXELS = 1 << 24  # of an image in memory at a time; it may be as large as level 0
_MAX_PADDING = 4096  # px: no program stores larger tiles
_MPP_ROUNDING = 0.01  # files round their um/px
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# the compressions that keep every value; others (JPEG, JPEG 2000, WebP, JPEG XL) may change them
_LOSSLESS = {
    tifffile.COMPRESSION.NONE,
    tifffile.COMPRESSION.CCITTRLE,
    tifffile.COMPRESSION.CCITT_T4,
    tifffile.COMPRESSION.CCITT_T6,
    tifffile.COMPRESSION.LZW,
    tifffile.COMPRESSION.ADOBE_DEFLATE,
    tifffile.COMPRESSION.DEFLATE,
    tifffile.COMPRESSION.PACKBITS,
    tifffile.COMPRESSION.LZMA,
    tifffile.COMPRESSION.ZSTD,
    tifffile.COMPRESSION.ZSTD_DEPRECATED,
}
_PLANES = tifffile.PLANARCONFIG.SEPARATE
_VIPS_TYPES = tuple(map(np.dtype, ("u1", "i1", "u2", "i2", "u4", "i4", "f4")))
_REMEDY = "give an image of the whole slide as PNG or TIFF, with 0 for background"


class MaskFileError(ValueError):
    """A mask or truth image cannot be used. The message is the reason, without the file's name."""


@dataclass(frozen=True)
class StoredImage:
    """An opened mask or truth image.

    Attributes
    ----------
    image : pyvips.Image
        Stored values; palette indices of one band if the image has a palette.
    alpha : bool
        Whether the last band is the opacity.
    mpp : (float, float) or None
        um/px in x and y that the file states, if possible for a microscope; print resolutions are
        not.
    """

    image: pyvips.Image
    alpha: bool
    mpp: tuple[float, float] | None


def read_mask(
    path: Path,
    slide: Slide,
    *,
    mpp: float = TISSUE_MPP,
    origin: Origin | None = None,
    default_origin: Origin | None = None,
) -> TissueMask:
    """Read a given tissue mask, which replaces detection.

    Parameters
    ----------
    path : Path
        Either an image, as this module's docstring says (PNG or TIFF), or annotated tissue regions
        (QuPath GeoJSON, ASAP XML) of any class.
    mpp : float
        um/px of the returned mask; a coarser slide is used at its own um/px.
    origin, default_origin : {"level0", "bounds"}, optional
        What the coordinates of regions count from (:func:`nic_core.tiling.annotations.placed`).

    Raises
    ------
    SlideError
        The file cannot be read, has no region, does not fit the slide, or its background or the
        origin of its coordinates is not known.
    """
    mpp = max(mpp, slide.mpp)
    width, height = mask_size(slide, mpp)
    if is_annotation_file(path):
        try:
            annotations = read_annotations(path)
        except SlideError as error:  # it names the mask as the slide
            raise SlideError(slide.path, f"mask {path}: {error.reason}", error.remedy) from error
        if not annotations.regions:
            raise SlideError(
                slide.path,
                f"mask {path} has no region: none of its {annotations.features} features is one",
                "draw the tissue as annotations with an area",
            )
        for reason, _, count, features in unused_features(annotations).iter_rows():
            if reason != NO_CLASS:  # a mask needs no class
                log.warning("mask %s: %d features not used: %s: %s", path, count, reason, features)
        mask = placed(
            annotations,
            slide,
            lambda regions: region_mask(regions, slide, (height, width), mpp),
            np.array_equal,
            origin=origin,
            default=default_origin,
        )
        return TissueMask(mask, mpp)
    with _named(path, slide):
        stored = open_stored_image(path)
        tissue = _foreground(stored)
        scale = level0_px_per_px(stored, slide.width, slide.height, slide.mpp)
        return TissueMask(_rasterised(tissue, scale, slide, (height, width), mpp), mpp)


def source_mask(source: SlideSource, slide: Slide) -> TissueMask:
    """Return the tissue mask of an opened slide: its source's mask, else detected tissue.

    Raises
    ------
    SlideError
        See :func:`read_mask` and :func:`nic_core.tiling.tissue.tissue_mask`.
    """
    if source.mask is not None:
        return read_mask(source.mask, slide, origin=source.origin)
    return tissue_mask(slide)


def check_mask(path: Path, slide: Slide, *, origin: Origin | None = None) -> None:
    """Raise ``SlideError`` if a tissue mask cannot be used, without reading the px of an image.

    Parameters
    ----------
    origin : {"level0", "bounds"}, optional
        As for :func:`read_mask`.
    """
    if is_annotation_file(path):
        read_mask(path, slide, origin=origin)
        return
    with _named(path, slide):
        level0_px_per_px(open_stored_image(path), slide.width, slide.height, slide.mpp)


@contextmanager
def _named(path: Path, slide: Slide) -> Iterator[None]:
    """Name the slide and the mask in errors."""
    try:
        yield
    except (MaskFileError, pyvips.Error) as error:
        raise SlideError(slide.path, f"mask {path}: {error}", _REMEDY) from error


def open_stored_image(path: Path) -> StoredImage:
    """Open a PNG or TIFF image with the values that it stores; of a pyramid the largest image.

    Images with a palette, and TIFF images that libvips does not read as stored, are read at once.

    Raises
    ------
    MaskFileError
        The file does not exist, has another format, a compression that may change values, or
        several images of the same size; or 0 is white in it.
    pyvips.Error
        It cannot be decoded.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise MaskFileError(error.strerror or str(error)) from error
    if head.startswith(_TIFF):
        return _open_tiff(path)
    if head != _PNG:
        raise MaskFileError("neither a PNG nor a TIFF image, and other formats may change values")
    image = pyvips.Image.new_from_file(str(path), fail_on="error")
    stated = _possible_mpp(1000 / image.xres, 1000 / image.yres)
    alpha = bool(image.hasalpha())
    if image.get_typeof("palette"):
        # the class itself, since `PIL.Image.open` limits the number of px
        try:
            with PngImageFile(path) as png:
                image, alpha = pyvips.Image.new_from_array(np.asarray(png)), False
        except (OSError, SyntaxError, ValueError) as error:
            raise MaskFileError(f"cannot be read ({error})") from error
    return StoredImage(image, alpha, stated)


def _open_tiff(path: Path) -> StoredImage:
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [page.aspage() for page in tiff.pages]
            sizes = [page.imagelength * page.imagewidth for page in pages]
            if sizes.count(max(sizes)) > 1:
                raise MaskFileError(f"{sizes.count(max(sizes))} images of the same size")
            number = sizes.index(max(sizes))
            page = pages[number]
            if page.compression not in _LOSSLESS:
                name = getattr(page.compression, "name", page.compression)
                raise MaskFileError(f"compressed by {name}, which may change values")
            of_page = (i.metadata.mpp for i in find_images(path, tiff) if page in i.pages)
            stated = _possible_mpp(*(next(of_page, None) or (0, 0)))
            alpha = alpha_kind(page) is not None
            inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
            if inverted and not (tiff.is_imagej or page.software.startswith("tifffile")):
                raise MaskFileError(
                    "0 is white in this TIFF image (WhiteIsZero): it is unclear whether black "
                    "or white is background; write it with 0 as black"
                )
            values = None
            # libvips would replace indices by colours, invert where 0 is white, and mix up planes
            palette = page.photometric == tifffile.PHOTOMETRIC.PALETTE
            planes = page.samplesperpixel > 1 and page.planarconfig == _PLANES
            if palette or inverted or planes or page.dtype not in _VIPS_TYPES:
                values = _as_vips_type(page.asarray())
                values = np.moveaxis(values, 0, -1) if planes else values
    except MaskFileError:
        raise
    # tifffile raises any of a dozen exception types for a damaged structure
    except Exception as error:
        raise MaskFileError(f"damaged TIFF structure ({error})") from error
    if values is not None:
        return StoredImage(pyvips.Image.new_from_array(values), alpha, stated)
    image = pyvips.Image.new_from_file(str(path), page=number, fail_on="error")
    return StoredImage(image.autorot(), alpha, stated)


def _as_vips_type(values: NDArray[Any]) -> NDArray[Any]:
    """Convert values to a type that libvips has, without loss."""
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if values.dtype == np.float16:
        return values.astype(np.float32)
    if values.dtype in (np.int64, np.uint64):
        if values.size and not (values.min() >= -(2**31) and values.max() < 2**31):
            raise MaskFileError("values of more than 32 bits")
        return values.astype(np.int32)
    return values


def _possible_mpp(x: float, y: float) -> tuple[float, float] | None:
    low, high = MPP_RANGE
    return (x, y) if low <= x <= high and low <= y <= high else None


def level0_px_per_px(
    stored: StoredImage, width: int, height: int, mpp: float
) -> tuple[float, float]:
    """Return the scale by which an image lies over a slide, as this module's docstring says.

    Parameters
    ----------
    width, height : int
        Size of the slide, level-0 px.
    mpp : float
        um/px at level 0.

    Returns
    -------
    (float, float)
        Level-0 px per px of the image, across and down.

    Raises
    ------
    MaskFileError
        The image does not fit the slide.
    """
    slide, size = np.array([width, height]), np.array([stored.image.width, stored.image.height])
    stated = None if stored.mpp is None else np.array(stored.mpp) / mpp
    about = f"{size[0]} x {size[1]} px do not fit the slide of {width} x {height} px"
    whole = _whole_scale(size, slide)
    if whole is not None and (stated is None or (abs(stated / whole - 1) <= _MPP_ROUNDING).all()):
        return float(whole), float(whole)
    # one scale fits if (size - 0.5) / slide of one side is below (size + 0.5) / slide of the other
    fits = ((size - 0.5) / slide).max() <= ((size + 0.5) / slide).min()
    ratio = slide / size
    if stated is not None:
        beyond = size - slide / stated  # px
        if (beyond >= -1).all() and (beyond < _MAX_PADDING).all():
            return float(stated[0]), float(stated[1])
        if not fits or (abs(stated / ratio - 1) > _MPP_ROUNDING).any():
            raise MaskFileError(
                f"{about} at the {stated[0] * mpp:.4g} um/px that it states; correct or remove it"
            )
    if not fits:
        remedy = "" if stated is not None else ", and it states no um/px"
        raise MaskFileError(f"{about} (another ratio of sides){remedy}")
    return float(ratio[0]), float(ratio[1])


def _whole_scale(size: NDArray[np.int64], slide: NDArray[np.int64]) -> int | None:
    """The only whole scale at which the slide has this size, rounded down or up; else None."""
    first, last = int(slide[0] // (size[0] + 1)), int(slide[0] // max(1, size[0] - 1)) + 1
    scales = [
        scale
        for scale in range(max(1, first), last + 1)
        if all(
            side in (length // scale, math.ceil(length / scale))
            for side, length in zip(size.tolist(), slide.tolist(), strict=True)
        )
    ]
    return scales[0] if len(scales) == 1 else None


def _foreground(stored: StoredImage) -> pyvips.Image:
    """One band, 255 where the image is not background and 0 elsewhere.

    Raises
    ------
    MaskFileError
        The background px cannot be determined.
    """
    image = stored.image
    if image.format in ("float", "double") and _soft(image):
        raise MaskFileError("fractional values, such as probabilities; write 0 and 1")
    if image.format in ("complex", "dpcomplex"):
        raise MaskFileError("complex values")
    alpha = image[image.bands - 1] if stored.alpha else None
    colours = image if alpha is None else image.extract_band(0, n=image.bands - 1)
    coloured = (colours != 0).bandor()
    if alpha is not None and alpha.min() == 0:
        visible = alpha > 0
        if (visible & coloured).max() == 0:
            return visible  # black is the colour of the tissue
        if (visible & (coloured == 0)).max() > 0:
            raise MaskFileError(
                "transparent, black and coloured px: it is unclear whether black is background"
            )
        return visible
    if coloured.min() > 0 and any(
        colours[band].min() < colours[band].max() for band in range(colours.bands)
    ):
        raise MaskFileError("several values, but none is 0: it is unclear which is background")
    return coloured


def _soft(image: pyvips.Image) -> bool:
    """Whether a float image has NaN, or other values than its smallest and its largest."""
    low, high = image.min(), image.max()
    return bool(((image != low) & (image != high)).bandor().max() > 0)


def _rasterised(
    tissue: pyvips.Image,
    scale: tuple[float, float],
    slide: Slide,
    shape: tuple[int, int],
    mpp: float,
) -> Mask:
    """A mask whose px are True if more than half of their area in the slide is tissue.

    ``tissue`` is 255 or 0, ``scale`` its level-0 px per px.
    """
    # the image may extend beyond the slide: a px is within it if a part is
    width = min(tissue.width, math.ceil(slide.width / scale[0] - 1e-6))
    height = min(tissue.height, math.ceil(slide.height / scale[1] - 1e-6))
    _refuse_tissue_beyond(tissue, width, height)
    across, down = (mpp / slide.mpp / s for s in scale)  # image px per mask px
    rows = coverage(0.0, down, shape[0], height)
    columns = coverage(0.0, across, shape[1], width)
    inside = np.outer(rows.sum(axis=1), columns.sum(axis=1))  # the last px extend beyond the slide
    mask = np.zeros(shape, np.bool_)
    step = max(1, int(_MASK_PIXELS / (width * down)))
    for top in range(0, shape[0], step):
        band = rows[top : top + step]
        if not band.nnz:  # below the image, which may end less than a px before the slide
            continue
        low, high = int(band.indices.min()), int(band.indices.max()) + 1
        part = tissue.crop(0, low, width, high - low).numpy().astype(np.float32) / 255
        fraction = (columns @ (band[:, low:high] @ part).T).T
        mask[top : top + step] = fraction > 0.5 * inside[top : top + step]
    return mask


def _refuse_tissue_beyond(tissue: pyvips.Image, width: int, height: int) -> None:
    """Refuse an image with tissue right of or below the first ``width`` x ``height`` px."""
    beyond = []
    if tissue.width > width:
        beyond.append(tissue.crop(width, 0, tissue.width - width, tissue.height))
    if tissue.height > height:
        beyond.append(tissue.crop(0, height, width, tissue.height - height))
    if any(part.max() > 0 for part in beyond):
        raise MaskFileError(
            f"at its um/px the slide ends at {width} x {height} px, and it has tissue beyond: it "
            "is the mask of another slide, or its um/px is wrong"
        )

"""What is in a TIFF slide: which image is the scan, its levels, and who can decode it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyvips
import tifffile

from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import BRIGHTFIELD_REMEDY, DAMAGED_REMEDY, fluorescence_filter
from nic_core.slides.metadata import tiff_mpp as _tiff_mpp

_VENDORS = ("is_ndpi", "is_scn", "is_philips", "is_bif")


@dataclass(frozen=True)
class TiffLevel:
    """Where a level lies: the page, and which of the page's sub-IFDs if it is one."""

    page: int
    subifd: int | None


@dataclass(frozen=True)
class TiffScan:
    """The scan in a TIFF file.

    Attributes
    ----------
    series : int
        Its index among tifffile's series.
    levels : tuple of TiffLevel
        Finest first.
    vendor : bool
        A vendor's dialect, with a layout of its own behind the TIFF tags.
    libvips : bool
        libvips decodes its pixels, in the right colours.
    mpp : (x, y) or None
        um/px at level 0.
    """

    series: int
    levels: tuple[TiffLevel, ...]
    vendor: bool
    libvips: bool
    mpp: tuple[float, float] | None


def tiff_scan(path: Path) -> TiffScan:
    """Find the scan in a TIFF file.

    Raises
    ------
    SlideError
        Not readable as TIFF, cut short, or not an 8-bit RGB brightfield image.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            return _scan(path, tiff)
    except SlideError:
        raise
    except MemoryError as error:
        raise SlideError(
            path, "damaged TIFF structure (impossible sizes)", DAMAGED_REMEDY
        ) from error
    # a damaged structure surfaces in tifffile as whatever its bytes lead to: any of a dozen types
    except Exception as error:
        raise SlideError(path, f"damaged TIFF structure ({error})", DAMAGED_REMEDY) from error


def _scan(path: Path, tiff: tifffile.TiffFile) -> TiffScan:
    if dye := fluorescence_filter(tiff):
        raise SlideError(path, f"a fluorescence scan (filter set '{dye}')", BRIGHTFIELD_REMEDY)
    if not tiff.series:
        raise SlideError(path, "holds no image", DAMAGED_REMEDY)
    number, series = max(
        enumerate(tiff.series), key=lambda s: s[1].keyframe.imagewidth * s[1].keyframe.imagelength
    )
    page = series.keyframe
    if series.dtype != np.uint8 or page.samplesperpixel not in (3, 4) or len(series.pages) != 1:
        raise SlideError(
            path,
            f"not an 8-bit RGB image: axes {series.axes}, shape {series.shape}, {series.dtype}",
            BRIGHTFIELD_REMEDY,
        )
    _check_whole(path, tiff, series)
    parts = list(page.subifds or ())
    levels = tuple(
        TiffLevel(page.index, parts.index(level.keyframe.offset))
        if level.keyframe.offset in parts
        else TiffLevel(level.keyframe.index, None)
        for level in series.levels
    )
    return TiffScan(
        series=number,
        levels=levels,
        vendor=any(getattr(tiff, kind) for kind in _VENDORS),
        libvips=_libvips_reads(page),
        mpp=_tiff_mpp(tiff, page),
    )


def _check_whole(path: Path, tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> None:
    """A file cut short still opens, and some libraries give white for what is gone."""
    size = tiff.filehandle.size
    for level in series.levels:
        page = level.keyframe
        ends = np.asarray(page.dataoffsets, np.int64) + np.asarray(page.databytecounts, np.int64)
        if len(ends) and ends.max() > size:
            raise SlideError(
                path,
                f"cut short: {size:,} bytes, but pixels lie up to byte {ends.max():,}",
                DAMAGED_REMEDY,
            )


def _libvips_reads(page: tifffile.TiffPage) -> bool:
    compression = tifffile.COMPRESSION(page.compression)
    if compression == tifffile.COMPRESSION.JPEG:
        # Tagged RGB but in a JFIF stream, which is YCbCr by definition: libvips trusts the tag
        return not (page.photometric == tifffile.PHOTOMETRIC.RGB and _is_jfif(page))
    if compression in _JPEG_2000:
        return bool(pyvips.type_find("VipsOperation", "jp2kload"))
    return compression.name in {"NONE", "LZW", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS"}


_JPEG_2000 = {
    tifffile.COMPRESSION.APERIO_JP2000_YCBC,
    tifffile.COMPRESSION.APERIO_JP2000_RGB,
    tifffile.COMPRESSION.JPEG2000,
}


def _is_jfif(page: tifffile.TiffPage) -> bool:
    stored = next((i for i, count in enumerate(page.databytecounts) if count), None)
    if stored is None:
        return False
    file = page.parent.filehandle
    file.seek(page.dataoffsets[stored])
    return bool(file.read(10)[6:10] == b"JFIF")

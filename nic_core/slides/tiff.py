"""What is in a TIFF slide: which image is the scan, whether it is whole and brightfield."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from operator import add
from pathlib import Path

import numpy as np
import tifffile

from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import (
    BRIGHTFIELD_REMEDY,
    DAMAGED_REMEDY,
    fluorescence_filter,
    tiff_mpp,
)

_VENDORS = ("is_ndpi", "is_scn", "is_philips", "is_bif")
_SUBIFDS = 330
_MAX_TILE = 1 << 28  # px
# TIFF data types by number: the size of one value
_VALUE_FORMATS = tifffile.TIFF.DATA_FORMATS


@dataclass(frozen=True)
class TiffScan:
    """The scan in a TIFF file.

    Attributes
    ----------
    series : int
        Its index among tifffile's series.
    vendor : bool
        A vendor's dialect, with a layout of its own behind the TIFF tags.
    mpp : (x, y) or None
        um/px at level 0.
    """

    series: int
    vendor: bool
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
    for level in series.levels:
        _check_tiles(path, level.keyframe)
    _check_whole(path, tiff, series)
    return TiffScan(
        series=number,
        vendor=any(getattr(tiff, kind) for kind in _VENDORS),
        mpp=tiff_mpp(tiff, page),
    )


def _check_tiles(path: Path, page: tifffile.TiffPage) -> None:
    """Sizes, offsets and byte counts must tell the same number of tiles of a possible size."""
    side = (page.tilewidth, page.tilelength)
    if not page.is_tiled:
        side = (page.imagewidth, min(page.rowsperstrip, page.imagelength))
    if min(side) < 1 or side[0] * side[1] > _MAX_TILE:
        raise SlideError(path, f"damaged: tiles of {side[0]} x {side[1]} px", DAMAGED_REMEDY)
    if page.planarconfig != tifffile.PLANARCONFIG.CONTIG:
        raise SlideError(path, "its colours are stored as separate planes", "save it as RGB pixels")
    count = -(-page.imagewidth // side[0]) * -(-page.imagelength // side[1])
    stored = len(page.dataoffsets), len(page.databytecounts)
    if stored != (count, count):
        raise SlideError(
            path, f"damaged: {count} tiles by its size, {stored[0]} stored", DAMAGED_REMEDY
        )


def _check_whole(path: Path, tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> None:
    """A file cut short still opens, and some libraries give white for what is gone."""
    end = max(
        max(map(add, level.keyframe.dataoffsets, level.keyframe.databytecounts), default=0)
        for level in series.levels
    )
    # NDPI has directories of its own kind
    end = max(end, 0 if tiff.is_ndpi else _directories_end(tiff))
    size = tiff.filehandle.size
    if end > size:
        raise SlideError(
            path, f"cut short: {size:,} bytes, but its parts reach byte {end:,}", DAMAGED_REMEDY
        )


def _directories_end(tiff: tifffile.TiffFile) -> int:
    """Where the image directories and their values end, as far as they can be followed.

    Coarse levels often lie last: a file cut there would pass for one without them.
    """
    file, form = tiff.filehandle, tiff.tiff
    width, order, letter = form.offsetsize, form.offsetformat[0], form.offsetformat[1]
    end, seen, waiting = 0, set(), [tiff.pages.first.offset]
    while waiting and end <= file.size:
        start = waiting.pop()
        if start == 0 or start in seen:
            continue
        seen.add(start)
        end = max(end, start + form.tagnosize)
        if end > file.size:
            break
        file.seek(start)
        (count,) = struct.unpack(form.tagnoformat, file.read(form.tagnosize))
        end = max(end, file.tell() + count * form.tagsize + width)
        if end > file.size:
            break
        tags, following = file.read(count * form.tagsize), file.read(width)
        waiting += struct.unpack(form.offsetformat, following)
        for at in range(0, len(tags), form.tagsize):
            code, kind = struct.unpack_from(form.tagformat1, tags, at)
            number, value = struct.unpack_from(
                form.offsetformat[0] + 2 * form.offsetformat[1], tags, at + 4
            )
            length = number * struct.calcsize(_VALUE_FORMATS.get(kind, "B"))
            if length > width:
                end = max(end, value + length)
            if code == _SUBIFDS and end <= file.size:
                if length <= width:
                    waiting.append(value)
                else:
                    file.seek(value)
                    waiting += struct.unpack(f"{order}{number}{letter}", file.read(length))
    return end

"""What is in a TIFF slide: which image is the scan, whether it is whole and brightfield."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add
from pathlib import Path

import numpy as np
import openslide
import tifffile

from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import (
    BRIGHTFIELD_REMEDY,
    DAMAGED_REMEDY,
    About,
    fluorescence,
    tiff_about,
)

# Formats whose tiles lie where the TIFF tags say; OpenSlide knows more of any other.
_PLAIN_FORMATS = (None, "aperio", "generic-tiff")
_PICTURES = ("label", "macro", "thumbnail", "overview")
_JPEG2000_YCBCR = 33003  # Aperio's
_DECODED_TO_RGB = (7, 34892, 33007)  # JPEG, by its decoder
_SUBIFDS = 330
_MAX_TILE = 1 << 28  # px
# TIFF data types by number: the size of one value
_VALUE_FORMATS = tifffile.TIFF.DATA_FORMATS


@dataclass(frozen=True)
class TiffScan:
    """The scan in a TIFF file.

    Attributes
    ----------
    dialect : str
        What the tags and tiles alone do not tell, so that OpenSlide must read it; empty: nothing.
    series : int
        Its index among tifffile's series, where there is no dialect.
    about : About
    """

    dialect: str = ""
    series: int = 0
    about: About = field(default_factory=About)


def open_tiff(path: Path, *, ndpi: bool = False) -> tifffile.TiffFile:
    """tifffile's view of a file as what it is: left to itself it goes by the name for NDPI."""
    return tifffile.TiffFile(path, is_ndpi=ndpi)


def tiff_scan(path: Path) -> TiffScan:
    """Find the scan in a TIFF file.

    Raises
    ------
    SlideError
        Not readable as TIFF, cut short, or not an 8-bit RGB brightfield image.
    """
    vendor = openslide.OpenSlide.detect_format(path)
    try:
        with open_tiff(path, ndpi=vendor == "hamamatsu") as tiff:
            if how := fluorescence(tiff.pages.first):
                raise SlideError(path, f"a fluorescence scan ({how})", BRIGHTFIELD_REMEDY)
            if vendor not in _PLAIN_FORMATS:
                _check_whole(path, tiff, list(tiff.pages))
                return TiffScan(dialect=f"the format of {vendor}")
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
    if page.photometric not in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR):
        colours = tifffile.PHOTOMETRIC(page.photometric).name
        raise SlideError(path, f"not an RGB image: its colours are {colours}", BRIGHTFIELD_REMEDY)
    pages = [level.keyframe for level in series.levels]
    if any(page.parent is not tiff for page in pages):
        raise SlideError(path, "its pixels lie in another file of its OME series", "give that file")
    for page in pages:
        _check_tiles(path, page)
    _check_whole(path, tiff, [*tiff.pages, *pages])
    ycbcr = page.photometric == tifffile.PHOTOMETRIC.YCBCR
    if page.compression == _JPEG2000_YCBCR or (ycbcr and page.compression not in _DECODED_TO_RGB):
        return TiffScan(dialect="YCbCr colours that are not JPEG's")
    # tifffile takes an Aperio file's second page for its thumbnail
    if tiff.is_svs and len(tiff.series) > 1 and tiff.series[1].keyframe.is_tiled:
        return TiffScan(dialect="an Aperio pyramid without the thumbnail that parts its levels")
    names = (other.name.lower() for other in tiff.series if other is not series)
    # any other name is a user's own, and may be a patient's
    pictures = [name if name in _PICTURES else "unnamed" for name in names]
    return TiffScan(series=number, about=tiff_about(tiff, pages[0], pictures))


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


def _check_whole(
    path: Path, tiff: tifffile.TiffFile, pages: Sequence[tifffile.TiffPage | tifffile.TiffFrame]
) -> None:
    """A file cut short still opens, and some libraries give white for what is gone."""
    end = max(max(map(add, page.dataoffsets, page.databytecounts), default=0) for page in pages)
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


def tile_size(page: tifffile.TiffPage) -> tuple[int, int]:
    """Width and height of a page's tiles or strips, px."""
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip, page.imagelength)

"""TIFF slides: find the slide among the images of the file, and refuse unusable files."""

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
    FileMetadata,
    fluorescence_evidence,
    tiff_metadata,
)

# Formats that the TIFF tags describe completely. Others need OpenSlide to place the tiles.
_PLAIN_FORMATS = (None, "aperio", "generic-tiff")
_ASSOCIATED_NAMES = ("label", "macro", "thumbnail", "overview")
_JPEG2000_YCBCR = 33003  # Aperio's compression tag
_DECODED_TO_RGB = (7, 34892, 33007)  # JPEG compressions, whose decoders return RGB
_SUBIFDS = 330
_MAX_TILE = 1 << 28  # px
# struct format of a value, by the number of the TIFF data type
_VALUE_FORMATS = tifffile.TIFF.DATA_FORMATS


@dataclass(frozen=True)
class TiffInfo:
    """The slide in a TIFF file.

    Attributes
    ----------
    openslide_reason : str
        Why only OpenSlide can read the file. Empty if TIFF tags and tiles suffice; only then are
        the other attributes set.
    series : int
        Index of the slide among tifffile's series.
    metadata : FileMetadata
    """

    openslide_reason: str = ""
    series: int = 0
    metadata: FileMetadata = field(default_factory=FileMetadata)


def open_tiff(path: Path, *, ndpi: bool = False) -> tifffile.TiffFile:
    """Open a file with tifffile; ``ndpi`` says whether it is an NDPI file.

    tifffile alone decides by the suffix, which may be wrong.
    """
    return tifffile.TiffFile(path, is_ndpi=ndpi)


def inspect_tiff(path: Path) -> TiffInfo:
    """Find the slide in a TIFF file: the series with the largest image.

    Raises
    ------
    SlideError
        The file is damaged, truncated, or not an 8-bit RGB brightfield image.
    """
    vendor = openslide.OpenSlide.detect_format(path)
    try:
        with open_tiff(path, ndpi=vendor == "hamamatsu") as tiff:
            if evidence := fluorescence_evidence(tiff.pages.first):
                raise SlideError(path, f"a fluorescence scan ({evidence})", BRIGHTFIELD_REMEDY)
            if vendor not in _PLAIN_FORMATS:
                _check_complete(path, tiff, list(tiff.pages))
                return TiffInfo(openslide_reason=f"{vendor} format")
            return _inspect(path, tiff)
    except SlideError:
        raise
    except MemoryError as error:
        raise SlideError(
            path, "damaged TIFF structure (impossible sizes)", DAMAGED_REMEDY
        ) from error
    # in a damaged structure tifffile raises whatever the bytes lead to: any of a dozen types
    except Exception as error:
        raise SlideError(path, f"damaged TIFF structure ({error})", DAMAGED_REMEDY) from error


def _inspect(path: Path, tiff: tifffile.TiffFile) -> TiffInfo:
    if not tiff.series:
        raise SlideError(path, "the file contains no image", DAMAGED_REMEDY)
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
        raise SlideError(
            path, f"not an RGB image: its colour space is {colours}", BRIGHTFIELD_REMEDY
        )
    pages = [level.keyframe for level in series.levels]
    if any(page.parent is not tiff for page in pages):
        raise SlideError(
            path, "its pixels are in another file of its OME series", "give that file instead"
        )
    for page in pages:
        _check_tiles(path, page)
    _check_complete(path, tiff, [*tiff.pages, *pages])
    ycbcr = page.photometric == tifffile.PHOTOMETRIC.YCBCR
    if page.compression == _JPEG2000_YCBCR or (ycbcr and page.compression not in _DECODED_TO_RGB):
        return TiffInfo(openslide_reason="YCbCr colours outside JPEG")
    # tifffile assumes that an Aperio file's second page is the thumbnail
    if tiff.is_svs and len(tiff.series) > 1 and tiff.series[1].keyframe.is_tiled:
        return TiffInfo(openslide_reason="Aperio pyramid without a thumbnail after level 0")
    names = (other.name.lower() for other in tiff.series if other is not series)
    # other names are free text and may contain a patient's name
    associated = [name if name in _ASSOCIATED_NAMES else "unnamed" for name in names]
    return TiffInfo(series=number, metadata=tiff_metadata(tiff, pages[0], associated))


def _check_tiles(path: Path, page: tifffile.TiffPage) -> None:
    """Refuse a page whose size, offsets and byte counts disagree about its tiles."""
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
            path,
            f"damaged: its size needs {count} tiles, {stored[0]} are stored",
            DAMAGED_REMEDY,
        )


def _check_complete(
    path: Path, tiff: tifffile.TiffFile, pages: Sequence[tifffile.TiffPage | tifffile.TiffFrame]
) -> None:
    """Refuse a truncated file; libraries open it, and some return white for missing pixels."""
    end = max(max(map(add, page.dataoffsets, page.databytecounts), default=0) for page in pages)
    # the directories of NDPI files have another layout
    end = max(end, 0 if tiff.is_ndpi else _directories_end(tiff))
    size = tiff.filehandle.size
    if end > size:
        raise SlideError(
            path,
            f"truncated: {size:,} bytes, but its contents extend to byte {end:,}",
            DAMAGED_REMEDY,
        )


def _directories_end(tiff: tifffile.TiffFile) -> int:
    """The byte after the last image directory and its values, as far as they can be followed.

    Coarse levels often come last in the file: truncated there, the file looks like a complete
    one without these levels.
    """
    file, form = tiff.filehandle, tiff.tiff
    width, order, letter = form.offsetsize, form.offsetformat[0], form.offsetformat[1]
    end, visited, waiting = 0, set(), [tiff.pages.first.offset]
    while waiting and end <= file.size:
        start = waiting.pop()
        if start == 0 or start in visited:
            continue
        visited.add(start)
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
    """Return the width and height of a page's tiles or strips, px."""
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip, page.imagelength)

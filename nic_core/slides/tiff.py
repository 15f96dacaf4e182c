"""TIFF slides: describe the slide in the file for the engines, and refuse unusable files."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import add
from pathlib import Path
from typing import IO, Any, cast

import openslide
import tifffile

from nic_core.object_stores import RemoteError
from nic_core.slides.errors import SlideError
from nic_core.slides.images import ImageInfo, choose_image, find_images
from nic_core.slides.metadata import (
    BRIGHTFIELD_REMEDY,
    CONVERT_REMEDY,
    DAMAGED_REMEDY,
    IMAGE_REMEDY,
    FileMetadata,
    fluorescence_evidence,
)
from nic_core.slides.remote import Range, RemoteFile, RemoteObject, RemotePath, SlidePath

# Formats that the TIFF tags describe completely. Others need OpenSlide to place the tiles.
_PLAIN_FORMATS = (None, "aperio", "generic-tiff")
_JPEG2000_YCBCR = 33003  # Aperio's compression tag
_DECODED_TO_RGB = (7, 34892, 33007)  # JPEG compressions, whose decoders return RGB
_SUBIFDS, _SOFTWARE, _XMP, _NDPI_FORMAT = 330, 305, 700, 65420
_MAX_TILE = 1 << 28  # px; 0.8 GB of RGB
SEPARATE = tifffile.PLANARCONFIG.SEPARATE
# struct format of a value, by the number of the TIFF data type
_VALUE_FORMATS = tifffile.TIFF.DATA_FORMATS


@dataclass(frozen=True)
class TiffInfo:
    """The slide in a TIFF file.

    Attributes
    ----------
    openslide_reason : str
        Why only OpenSlide can read the file. Empty if TIFF tags and tiles suffice.
    images : tuple of ImageInfo
        All images of the file. Empty if the format is a vendor's: OpenSlide then finds the slide,
        and the following attributes are not set.
    image : int
        Number of the image that is the slide.
    alternatives : tuple of int
        The next best images, if the pixels of this one are not those of a brightfield scan.
    levels : tuple of (int, int)
        Number of the page of each level, finest first, and of the sub-directory of that page; the
        latter is -1 for the page itself.
    metadata : FileMetadata
    remote : RemoteObject or None
        The file in the version that was inspected, if it is in an object store.
    """

    openslide_reason: str = ""
    images: tuple[ImageInfo, ...] = ()
    image: int = 0
    alternatives: tuple[int, ...] = ()
    levels: tuple[tuple[int, int], ...] = ()
    metadata: FileMetadata = field(default_factory=FileMetadata)
    remote: RemoteObject | None = None

    @property
    def scans(self) -> tuple[ImageInfo, ...]:
        """The images that are not a label, macro, thumbnail or overview."""
        return tuple(image for image in self.images if not image.name)


@contextmanager
def open_tiff(
    path: SlidePath | RemoteObject, *, ndpi: bool | None = False
) -> Iterator[tifffile.TiffFile]:
    """Open a file with tifffile, and close it at the end of the block.

    Parameters
    ----------
    ndpi : bool, optional
        Whether it is an NDPI file. None: tifffile decides by the suffix, which may be wrong.

    Raises
    ------
    RemoteError
        A part of a remote file cannot be read. tifffile alone leaves out the tags of that part.
    """
    kind: dict[str, Any] = {} if ndpi is None else {"is_ndpi": ndpi}
    if isinstance(path, Path):
        with tifffile.TiffFile(path, **kind) as tiff:
            yield tiff
        return
    file = RemoteFile(path if isinstance(path, RemoteObject) else RemoteObject(path))
    try:
        with tifffile.TiffFile(cast(IO[bytes], file), name=file.name, **kind) as tiff:
            yield tiff
    finally:
        if file.failure is not None:
            raise file.failure


def level_pages(tiff: tifffile.TiffFile, info: TiffInfo) -> list[tifffile.TiffPage]:
    """Return the page of each level of the slide, finest first."""
    pages = []
    for number, sub in info.levels:
        page = tiff.pages[number]
        assert isinstance(page, tifffile.TiffPage)  # frames exist only if they are asked for
        if sub >= 0:
            assert page.subifds is not None
            tiff.filehandle.seek(page.subifds[sub])
            page = tifffile.TiffPage(tiff, (number, sub))
        pages.append(page)
    return pages


def inspect_tiff(path: SlidePath, image: int | None = None) -> TiffInfo:
    """Find the slide in a TIFF file (:mod:`nic_core.slides.images`).

    Parameters
    ----------
    image : int, optional
        Number of the image to read instead of the one that the rule chooses.

    Raises
    ------
    SlideError
        The file is damaged, truncated, or not an 8-bit RGB brightfield image, or there is no such
        image.
    RemoteError
        A remote file cannot be read.
    """
    remote = RemoteObject(path) if isinstance(path, RemotePath) else None
    try:
        vendor = _remote_vendor(remote) if remote else openslide.OpenSlide.detect_format(path)
        with open_tiff(remote or path, ndpi=vendor == "hamamatsu") as tiff:
            if evidence := fluorescence_evidence(tiff.pages.first):
                raise SlideError(path, f"a fluorescence scan ({evidence})", BRIGHTFIELD_REMEDY)
            if vendor not in _PLAIN_FORMATS:
                _check_complete(path, tiff, list(tiff.pages))
                check_only_image(path, image)
                return TiffInfo(openslide_reason=f"{vendor} format")
            return replace(_inspect(path, tiff, image), remote=remote)
    except (SlideError, RemoteError):
        raise
    except MemoryError as error:
        raise SlideError(
            path, "damaged TIFF structure (impossible sizes)", DAMAGED_REMEDY
        ) from error
    # in a damaged structure tifffile raises whatever the bytes lead to: any of a dozen types
    except Exception as error:
        raise SlideError(
            path,
            f"its TIFF structure cannot be read ({error})",
            f"{DAMAGED_REMEDY}, or {CONVERT_REMEDY}",
        ) from error


def _remote_vendor(remote: RemoteObject) -> str | None:
    """The vendor whose format only OpenSlide reads, as OpenSlide finds it in the tags.

    What is taken for a vendor's format here is copied and opened by OpenSlide, which decides.
    """
    if _is_ndpi(remote):
        return "hamamatsu"
    with open_tiff(remote) as tiff:
        page = tiff.pages.first
        tags = {tag: str(page.tags.valueof(tag) or "") for tag in (_SOFTWARE, _XMP)}
    if "<scn" in page.description:
        return "leica"
    if "iScan" in tags[_XMP]:
        return "ventana"
    makers = {"Philips": "philips", "MedScan": "trestle"}
    found = (vendor for start, vendor in makers.items() if tags[_SOFTWARE].startswith(start))
    return next(found, None)


def _is_ndpi(remote: RemoteObject) -> bool:
    """Whether the first directory has the tag of NDPI; its offset has 64 bits in this format."""
    head = remote.read_blocks(Range(0, min(remote.size, 12)))
    order = "<" if head[:2] == b"II" else ">"
    if len(head) < 12 or struct.unpack(f"{order}H", head[2:4]) != (42,):
        return False
    (start,) = struct.unpack(f"{order}Q", head[4:])
    if start + 2 > remote.size:
        return False
    (count,) = struct.unpack(f"{order}H", remote.read_blocks(Range(start, 2)))
    entries = remote.read_blocks(Range(start + 2, min(12 * count, remote.size - start - 2)))
    starts = range(0, len(entries) - 1, 12)
    return any(struct.unpack_from(f"{order}H", entries, at) == (_NDPI_FORMAT,) for at in starts)


def check_only_image(path: SlidePath, image: int | None) -> None:
    """Refuse an image other than 0, for files whose format has one scan.

    Raises
    ------
    SlideError
    """
    if image not in (None, 0):
        raise SlideError(path, f"has no image {image}; its format has one scan: 0", IMAGE_REMEDY)


def _inspect(path: SlidePath, tiff: tifffile.TiffFile, number: int | None) -> TiffInfo:
    images = find_images(path, tiff)
    if not images:
        raise SlideError(path, "the file contains no image", DAMAGED_REMEDY)
    image, *others = choose_image(path, images, number)
    for page in image.pages:
        _check_tiles(path, page)
    _check_complete(path, tiff, [*tiff.pages, *image.pages])
    base = image.pages[0]
    ycbcr = base.photometric == tifffile.PHOTOMETRIC.YCBCR
    only_openslide = base.compression == _JPEG2000_YCBCR or (
        ycbcr and base.compression not in _DECODED_TO_RGB
    )
    return TiffInfo(
        openslide_reason="YCbCr colours outside JPEG" if only_openslide else "",
        images=tuple(found.info for found in images),
        image=image.info.number,
        alternatives=tuple(other.info.number for other in others),
        levels=tuple(
            (page.treeindex[0], page.treeindex[1] if page.is_subifd else -1) for page in image.pages
        ),
        metadata=replace(
            image.metadata,
            associated=tuple(found.info.name for found in images if found.info.name),
        ),
    )


def _check_tiles(path: SlidePath, page: tifffile.TiffPage) -> None:
    """Refuse a page whose size, offsets and byte counts disagree about its tiles."""
    side = tile_size(page)
    if min(side) < 1:
        raise SlideError(path, f"damaged: tiles of {side[0]} x {side[1]} px", DAMAGED_REMEDY)
    if side[0] * side[1] > _MAX_TILE:
        kind = "tiles" if page.is_tiled else "strips"
        reason = f"its pixels are stored as {kind} of {side[0]} x {side[1]} px: too large to decode"
        raise SlideError(path, reason, "save it tiled, with tiles of 256 or 512 px")
    planes = page.samplesperpixel if page.planarconfig == SEPARATE else 1
    count = -(-page.imagewidth // side[0]) * -(-page.imagelength // side[1]) * planes
    stored = len(page.dataoffsets), len(page.databytecounts)
    if stored != (count, count):
        raise SlideError(
            path,
            f"damaged: its size needs {count} tiles, {stored[0]} are stored",
            DAMAGED_REMEDY,
        )


def _check_complete(
    path: SlidePath,
    tiff: tifffile.TiffFile,
    pages: Sequence[tifffile.TiffPage | tifffile.TiffFrame],
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

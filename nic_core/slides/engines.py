"""The libraries that decode slides, behind one small interface.

:func:`open_engine` alone decides which of them reads a file:

==============================================  =========================================
file                                            engine
==============================================  =========================================
TIFF, OME-TIFF, Aperio SVS                      ``tifffile``: tiles by their offsets; JPEG by
                                                libjpeg-turbo, other codecs by imagecodecs
Hamamatsu NDPI, Leica SCN, Philips TIFF,        ``openslide``
Ventana BIF, DICOM, MIRAX, and other vendors'
PNG, JPEG                                       ``libvips``, whole into memory
==============================================  =========================================

libvips reads TIFF too, about as fast, but after one undecodable tile it paints that tile and
good ones beside it black without an error, and passes JPEG data damaged within a tile.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import openslide
import pyvips
import simplejpeg
import tifffile

from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import BRIGHTFIELD_REMEDY, DAMAGED_REMEDY, openslide_mpp
from nic_core.slides.resample import Pixels, block_means
from nic_core.slides.tiff import TiffScan, tiff_scan

EngineName = Literal["tifffile", "openslide", "libvips"]

_NOT_A_SLIDE = "give a whole-slide image (SVS, TIFF, NDPI, MIRAX, SCN, DICOM), a PNG or a JPEG"

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PLAIN_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"  # marker APP14: no transform
_TILE_CACHE = 64 * 1024 * 1024  # bytes of decoded tiles kept: what neighbouring reads share


class ReadError(Exception):
    """A region could not be decoded; the slide adds its name and turns it into a SlideError."""


@dataclass(frozen=True)
class Level:
    """One resolution of the pyramid: size in its own px, level-0 px per px."""

    width: int
    height: int
    downsample: float


class Engine(Protocol):
    """What a decoding library does for a slide. ``region`` may be called from several threads."""

    name: EngineName
    levels: tuple[Level, ...]
    mpp: tuple[float, float] | None

    def shrinks(self, level: int) -> tuple[int, ...]:
        """Whole factors by which decoding can shrink a level, 1 among them."""
        ...

    def region(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        """Pixels of a region inside the level, in px of the level shrunk by ``shrink``; raises
        ReadError."""
        ...

    def close(self) -> None: ...


def open_engine(path: Path, name: EngineName | None = None) -> Engine:
    """Open a slide file with the engine for it, or with the one asked for.

    Raises
    ------
    SlideError
        The file is missing, damaged, no image or not an RGB brightfield one, or not one for the
        engine asked for.
    """
    magic = _magic(path)
    if magic.startswith(_TIFF_MAGIC):
        scan = tiff_scan(path)
        name = name or ("openslide" if scan.vendor else "tifffile")
        if name == "tifffile":
            return TiffEngine(path, scan)
    elif magic.startswith(_PLAIN_MAGIC) and path.suffix.lower() != ".mrxs":
        name = name or "libvips"
        if name == "libvips":
            return VipsEngine(path)
    if name in (None, "openslide"):
        return _open_with_openslide(path)
    raise SlideError(path, f"engine '{name}' does not read this file", "leave the engine open")


def _open_with_openslide(path: Path) -> Engine:
    try:
        return OpenSlideEngine(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError(path, "not an image of a known format", _NOT_A_SLIDE) from error
    except openslide.OpenSlideError as error:
        raise SlideError(path, f"damaged: {error}", DAMAGED_REMEDY) from error


def _magic(path: Path) -> bytes:
    if path.is_dir():
        raise SlideError(path, "is a folder", _NOT_A_SLIDE)
    try:
        with path.open("rb") as file:
            magic = file.read(8)
    except OSError as error:
        raise SlideError(path, f"cannot be read ({error.strerror})", "check the path") from error
    if not magic:
        raise SlideError(path, "the file is empty", DAMAGED_REMEDY)
    return magic


def downsample(width: int, height: int, level_width: int, level_height: int) -> float:
    """Level-0 px per level px.

    Pyramids shrink by whole numbers and cut the sizes to whole px, so a whole number that
    explains both sides is the truth and the ratio of the sizes (700.5 / 175) is not.
    """
    ratio = max(width / level_width, height / level_height)
    for whole in (round(ratio), int(ratio)):
        if (
            whole >= 1
            and abs(width / whole - level_width) < 1
            and abs(height / whole - level_height) < 1
        ):
            return float(whole)
    return (width + height) / (level_width + level_height)


def _levels(sizes: list[tuple[int, int]]) -> tuple[Level, ...]:
    width, height = sizes[0]
    return tuple(Level(w, h, downsample(width, height, w, h)) for w, h in sizes)


class VipsEngine:
    """libvips: a PNG or JPEG, whole in memory. Its dpi is that of a print: no um/px."""

    name: EngineName = "libvips"
    mpp: tuple[float, float] | None = None

    def __init__(self, path: Path) -> None:
        try:
            image = pyvips.Image.new_from_file(str(path), fail_on="warning", revalidate=True)
            if image.bands < 3 or image.format != "uchar":
                raise SlideError(
                    path,
                    f"not an 8-bit RGB image: {image.bands} bands of {image.format}",
                    BRIGHTFIELD_REMEDY,
                )
            if image.interpretation not in ("srgb", "rgb"):
                image = image.colourspace("srgb")
            if image.hasalpha():
                image = image.flatten(background=255)
            self._pixels: Pixels = image.numpy()
        except pyvips.Error as error:
            raise SlideError(path, f"damaged: {error}", DAMAGED_REMEDY) from error
        self.levels = _levels([(image.width, image.height)])

    def shrinks(self, level: int) -> tuple[int, ...]:
        return (1,)

    def region(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        return self._pixels[y : y + height, x : x + width]

    def close(self) -> None:
        self._pixels = np.empty((0, 0, 3), np.uint8)


class OpenSlideEngine:
    """OpenSlide: the vendors' formats."""

    name: EngineName = "openslide"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = openslide.OpenSlide(path)
        self._lock = threading.Lock()
        self._factors = self._slide.level_downsamples
        sizes = self._slide.level_dimensions
        # a whole factor is the format's own word; any other is the ratio of rounded sizes
        self.levels = tuple(
            Level(w, h, factor if factor == round(factor) else downsample(*sizes[0], w, h))
            for (w, h), factor in zip(sizes, self._factors, strict=True)
        )
        self.mpp = openslide_mpp(self._slide.properties)

    def shrinks(self, level: int) -> tuple[int, ...]:
        return (1,)

    def region(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        slide, factor = self._slide, self._factors[level]
        try:
            image = slide.read_region(
                (round(x * factor), round(y * factor)), level, (width, height)
            )
        except openslide.OpenSlideError as error:
            self._renew(slide)
            raise ReadError(str(error)) from error
        pixels = np.asarray(image)
        if pixels[..., 3].min() < 255:  # not scanned there: glass
            alpha = pixels[..., 3:].astype(np.uint16)
            return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        return np.ascontiguousarray(pixels[..., :3])

    def _renew(self, failed: openslide.OpenSlide) -> None:
        """After one error an OpenSlide handle refuses everything: take a new one."""
        with self._lock:
            if self._slide is failed:
                self._slide = openslide.OpenSlide(self._path)

    def close(self) -> None:
        self._slide.close()


class TiffEngine:
    """Tiles (or strips) of a TIFF by their offsets, each decoded once while it is near.

    JPEG goes through libjpeg-turbo with its warnings as errors: damaged data is reported, not
    guessed at.
    """

    name: EngineName = "tifffile"

    def __init__(self, path: Path, scan: TiffScan) -> None:
        self._tiff = tifffile.TiffFile(path)
        self._pages = [level.keyframe for level in self._tiff.series[scan.series].levels]
        self._jpeg = [_jpeg_header(page) for page in self._pages]
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int, int], Pixels] = OrderedDict()
        self._cached = 0
        self.levels = _levels([(page.imagewidth, page.imagelength) for page in self._pages])
        self.mpp = scan.mpp

    def shrinks(self, level: int) -> tuple[int, ...]:
        page = self._pages[level]
        if self._jpeg[level] is None or not page.is_tiled:
            return (1,)
        # libjpeg makes 4, 2 or 1 px of 8 by leaving out the finer waves of each block
        return tuple(s for s in (1, 2, 4, 8) if not (page.tilewidth % s or page.tilelength % s))

    def region(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        page = self._pages[level]
        tile_w, tile_h = (side // shrink for side in _tile_size(page))
        across = -(-page.imagewidth // _tile_size(page)[0])
        result = np.empty((height, width, 3), np.uint8)
        for row in range(y // tile_h, -(-(y + height) // tile_h)):
            top = row * tile_h
            y0, y1 = max(y, top), min(y + height, top + tile_h)
            for column in range(x // tile_w, -(-(x + width) // tile_w)):
                left = column * tile_w
                x0, x1 = max(x, left), min(x + width, left + tile_w)
                tile = self._tile(level, row * across + column, shrink)
                part = tile[y0 - top : y1 - top, x0 - left : x1 - left]
                if part.shape[:2] != (y1 - y0, x1 - x0):
                    raise ReadError(f"tile {row * across + column} is too small")
                result[y0 - y : y1 - y, x0 - x : x1 - x] = part
        return result

    def _tile(self, level: int, index: int, shrink: int) -> Pixels:
        page, key = self._pages[level], (level, index, shrink)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            handle = page.parent.filehandle
            handle.seek(page.dataoffsets[index])
            data = handle.read(page.databytecounts[index])
        tile = self._decode(level, index, data, shrink)
        with self._lock:
            if key not in self._cache:
                self._cache[key] = tile
                self._cached += tile.nbytes
            while self._cached > _TILE_CACHE and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1].nbytes
        return tile

    def _decode(self, level: int, index: int, data: bytes, shrink: int) -> Pixels:
        page, header = self._pages[level], self._jpeg[level]
        width, height = (side // shrink for side in _tile_size(page))
        if not data:  # never written: glass
            return np.full((height, width, 3), 255, np.uint8)
        if header is not None:
            try:
                return _decode_jpeg(header.complete(data), width, height, shrink)
            except ValueError as error:
                raise ReadError(f"tile {index}: {error}") from error
        try:
            decoded: Any = page.decode(data, index)[0]
        # every codec of imagecodecs has an error class of its own
        except Exception as error:
            raise ReadError(f"tile {index}: {error}") from error
        return np.ascontiguousarray(decoded.reshape(decoded.shape[-3:])[..., :3])

    def close(self) -> None:
        self._tiff.close()
        self._cache.clear()


def _tile_size(page: tifffile.TiffPage) -> tuple[int, int]:
    """Width and height of a page's tiles or strips, px."""
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, page.rowsperstrip


def _decode_jpeg(data: bytes, width: int, height: int, shrink: int) -> Pixels:
    """A tile of ``width`` x ``height`` px after shrinking."""
    if shrink > 1:
        tile = np.asarray(simplejpeg.decode_jpeg(data, min_width=width, min_height=height))
        if tile.shape[:2] == (height, width):
            return tile
        # stored smaller than the page's tiles, as some writers do at its edges
    return block_means(np.asarray(simplejpeg.decode_jpeg(data)), shrink)


@dataclass(frozen=True)
class _JpegHeader:
    """What the tiles of a page leave out: shared tables, and the colours they are in."""

    tables: bytes
    rgb: bool

    def complete(self, tile: bytes) -> bytes:
        """A tile as a JPEG file of its own."""
        # without a marker decoders take three components for YCbCr; in JFIF they always are
        colours = _ADOBE_RGB if self.rgb and tile[6:10] != b"JFIF" else b""
        return tile[:2] + colours + self.tables + tile[2:]


def _jpeg_header(page: tifffile.TiffPage) -> _JpegHeader | None:
    if page.compression != tifffile.COMPRESSION.JPEG:
        return None
    tables = page.jpegtables or b""
    # a stream of its own: leave its start and end marks
    return _JpegHeader(tables[2:-2], page.photometric == tifffile.PHOTOMETRIC.RGB)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give a ReadError the slide's name."""
    try:
        yield
    except ReadError as error:
        raise SlideError(path, f"pixels cannot be decoded ({error})", DAMAGED_REMEDY) from error

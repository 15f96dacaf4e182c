"""The libraries that decode slides, behind one small interface.

:func:`open_engine` alone decides which of them reads a file:

=========================================  =========
file                                       engine
=========================================  =========
TIFF, OME-TIFF, Aperio SVS                 libvips
same, compression or colours libvips       tifffile
does not know (JPEG 2000 without OpenJPEG,
JFIF tiles tagged as RGB)
Hamamatsu NDPI, Leica SCN, Philips TIFF,   OpenSlide
Ventana BIF, Trestle
DICOM, MIRAX, Sakura, Zeiss and others     OpenSlide
PNG, JPEG                                  libvips
=========================================  =========
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openslide
import pyvips
import tifffile

from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import BRIGHTFIELD_REMEDY, DAMAGED_REMEDY, openslide_mpp
from nic_core.slides.resample import Pixels
from nic_core.slides.tiff import TiffScan, tiff_scan

_NOT_A_SLIDE = "give a whole-slide image (SVS, TIFF, NDPI, MIRAX, SCN, DICOM), a PNG or a JPEG"

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PLAIN_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


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

    name: str
    levels: tuple[Level, ...]
    mpp: tuple[float, float] | None

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Pixels of a region inside the level, in its px; raises ReadError."""
        ...

    def close(self) -> None: ...


def open_engine(path: Path) -> Engine:
    """Open a slide file with the engine for it.

    Raises
    ------
    SlideError
        The file is missing, damaged, no image or not an RGB brightfield one.
    """
    magic = _magic(path)
    if magic.startswith(_TIFF_MAGIC):
        return _open_tiff(path)
    if magic.startswith(_PLAIN_MAGIC) and path.suffix.lower() != ".mrxs":
        return VipsEngine.plain(path)
    return _open_with_openslide(path)


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


def _open_tiff(path: Path) -> Engine:
    scan = tiff_scan(path)
    if not scan.vendor:
        return VipsEngine.tiff(path, scan) if scan.libvips else TifffileEngine(path, scan)
    return _open_with_openslide(path)


def _open_with_openslide(path: Path) -> Engine:
    try:
        return OpenSlideEngine(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError(path, "not an image of a known format", _NOT_A_SLIDE) from error
    except openslide.OpenSlideError as error:
        raise SlideError(path, f"damaged: {error}", DAMAGED_REMEDY) from error


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
    """libvips: each level an image of its own, each thread a region of its own on it."""

    name = "libvips"

    def __init__(self, images: list[pyvips.Image], mpp: tuple[float, float] | None) -> None:
        self._images = images
        self._local = threading.local()
        self.levels = _levels([(image.width, image.height) for image in images])
        self.mpp = mpp

    @classmethod
    def tiff(cls, path: Path, scan: TiffScan) -> VipsEngine:
        images = []
        for level in scan.levels:
            part = {} if level.subifd is None else {"subifd": level.subifd}
            try:
                image = pyvips.Image.tiffload(
                    str(path), page=level.page, fail_on="error", revalidate=True, **part
                )
            except pyvips.Error as error:
                raise SlideError(path, f"damaged: {error}", DAMAGED_REMEDY) from error
            images.append(_rgb(path, image))
        return cls(images, scan.mpp)

    @classmethod
    def plain(cls, path: Path) -> VipsEngine:
        """A PNG or JPEG; its dpi is that of a print, so it has no um/px."""
        try:
            image = pyvips.Image.new_from_file(str(path), fail_on="warning", revalidate=True)
            return cls([_rgb(path, image)], None)
        except pyvips.Error as error:
            raise SlideError(path, f"damaged: {error}", DAMAGED_REMEDY) from error

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        regions = self._local.__dict__.setdefault("regions", {})
        try:
            if level not in regions:
                regions[level] = pyvips.Region.new(self._images[level])
            data = regions[level].fetch(x, y, width, height)
        except pyvips.Error as error:
            raise ReadError(str(error)) from error
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)

    def close(self) -> None:
        self._images = []
        self._local = threading.local()


def _rgb(path: Path, image: pyvips.Image) -> pyvips.Image:
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
    return image


class OpenSlideEngine:
    """OpenSlide: the vendors' formats."""

    name = "openslide"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = openslide.OpenSlide(path)
        self._lock = threading.Lock()
        # OpenSlide places a level by the ratio of its rounded sizes
        self._factors = self._slide.level_downsamples
        self.levels = _levels(list(self._slide.level_dimensions))
        self.mpp = openslide_mpp(self._slide.properties)

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
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


class TifffileEngine:
    """tifffile with imagecodecs: TIFF that libvips cannot read, tile by tile."""

    name = "tifffile"
    _CACHE = 64  # decoded tiles kept: a row of a few blocks

    def __init__(self, path: Path, scan: TiffScan) -> None:
        self._tiff = tifffile.TiffFile(path)
        self._pages = [level.keyframe for level in self._tiff.series[scan.series].levels]
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], Pixels] = OrderedDict()
        self.levels = _levels([(page.imagewidth, page.imagelength) for page in self._pages])
        self.mpp = scan.mpp

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        page = self._pages[level]
        tile_w = page.tilewidth if page.is_tiled else page.imagewidth
        tile_h = page.tilelength if page.is_tiled else page.rowsperstrip
        across = -(-page.imagewidth // tile_w)
        result = np.full((height, width, 3), 255, np.uint8)
        for row in range(y // tile_h, -(-(y + height) // tile_h)):
            for column in range(x // tile_w, -(-(x + width) // tile_w)):
                tile = self._tile(level, row * across + column)
                top, left = row * tile_h - y, column * tile_w - x
                part = tile[max(-top, 0) : height - top, max(-left, 0) : width - left]
                rows, columns = slice(max(top, 0), None), slice(max(left, 0), None)
                target = result[rows, columns][: part.shape[0], : part.shape[1]]
                target[:] = part[: target.shape[0], : target.shape[1]]
        return result

    def _tile(self, level: int, index: int) -> Pixels:
        page = self._pages[level]
        with self._lock:
            if (level, index) in self._cache:
                self._cache.move_to_end((level, index))
                return self._cache[level, index]
            handle = page.parent.filehandle
            handle.seek(page.dataoffsets[index])
            data = handle.read(page.databytecounts[index])
        tables: dict[str, Any] = {"jpegtables": page.jpegtables} if page.jpegtables else {}
        try:
            decoded, _, shape = page.decode(data, index, **tables)
        # the codecs of imagecodecs each have an error class of their own
        except Exception as error:
            raise ReadError(f"tile {index}: {error}") from error
        if decoded is None:  # not stored: glass
            decoded = np.full((*shape[1:3], 3), 255, np.uint8)
        tile = np.ascontiguousarray(decoded.reshape(decoded.shape[-3:])[..., :3])
        with self._lock:
            self._cache[level, index] = tile
            if len(self._cache) > self._CACHE:
                self._cache.popitem(last=False)
        return tile

    def close(self) -> None:
        self._tiff.close()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give a ReadError the slide's name."""
    try:
        yield
    except ReadError as error:
        raise SlideError(path, f"pixels cannot be decoded ({error})", DAMAGED_REMEDY) from error

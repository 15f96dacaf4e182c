"""The libraries that decode slides, behind one small interface.

:func:`open_engine` alone decides which of them reads a file:

==============================================  =========================================
file                                            engine
==============================================  =========================================
TIFF, OME-TIFF, Aperio SVS                      ``tifffile``: tiles by their offsets; JPEG by
                                                libjpeg-turbo, other codecs by imagecodecs
Hamamatsu NDPI, Leica SCN, Philips TIFF,        ``openslide``
Ventana BIF, DICOM, MIRAX, other vendors',
YCbCr that is not JPEG's (SVS 33003)
PNG, JPEG                                       ``libvips``, whole into memory
==============================================  =========================================

libvips reads TIFF too when asked, about as fast. It is not the default: it reports an
undecodable tile once, then gives it and good ones beside it as black, and passes JPEG data
damaged within a tile.
Vendors' formats it reads where it was built with OpenSlide, which the wheels are not.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import openslide
import pyvips
import simplejpeg
import tifffile
from PIL import Image

from nic_core.slides.dicom import check_dicom
from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import BRIGHTFIELD_REMEDY, DAMAGED_REMEDY, About, openslide_about
from nic_core.slides.resample import Pixels, block_means
from nic_core.slides.tiff import TiffScan, open_tiff, tiff_scan

EngineName = Literal["tifffile", "openslide", "libvips"]

_NOT_A_SLIDE = "give a whole-slide image (SVS, TIFF, NDPI, MIRAX, SCN, DICOM), a PNG or a JPEG"

_CONVERT = "convert it to a tiled RGB TIFF"

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PLAIN_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_RGB = tifffile.PHOTOMETRIC.RGB
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"  # marker APP14: no transform
# libvips would give back what it loaded before, with its black tiles or from an older file
_ANEW = {"revalidate": True} if pyvips.at_least_libvips(8, 15) else {}
if not _ANEW:
    pyvips.cache_set_max(0)
_VipsImage = Callable[[], pyvips.Image]  # opens it anew
_TILE_CACHE = 64 * 1024 * 1024  # bytes of decoded tiles kept: what neighbouring reads share


class ReadError(Exception):
    """A region could not be decoded; the slide adds its name and turns it into a SlideError."""


@dataclass(frozen=True)
class Level:
    """One resolution of the pyramid: size in its own px, level-0 px per px, stored tiles.

    ``tile`` is their width and height in px of the level; None: not known, or not a grid.
    """

    width: int
    height: int
    downsample: float
    tile: tuple[int, int] | None = None


class Engine(Protocol):
    """What a decoding library does for a slide. ``region`` may be called from several threads."""

    name: EngineName
    levels: tuple[Level, ...]
    about: About

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


def open_engine(path: Path, name: EngineName | None = None) -> tuple[Engine, str]:
    """Open a slide file with the engine for it, or with the one asked for.

    Returns
    -------
    engine, reason
        And why it is this one, in a few words.

    Raises
    ------
    SlideError
        The file is missing, damaged, no image or not an RGB brightfield one, or not one for the
        engine asked for.
    """
    magic = _magic(path)
    scan = tiff_scan(path) if magic.startswith(_TIFF_MAGIC) else None
    plain = magic.startswith(_PLAIN_MAGIC) and path.suffix.lower() != ".mrxs"
    default: EngineName = "openslide"
    if plain:
        default, reason = "libvips", "a plain image, whole in memory"
    elif scan is None:
        reason = "a vendor's format, not TIFF"
    elif scan.dialect:
        reason = scan.dialect
    else:
        default, reason = "tifffile", "TIFF: tiles by their offsets"
    engine = _open(path, name or default, scan, plain)
    return engine, reason if name in (None, default) else "asked for"


def _open(path: Path, name: EngineName, scan: TiffScan | None, plain: bool) -> Engine:
    remedy = "leave the engine open"
    if name == "openslide" and not plain:
        return _open_with_openslide(path, scan)
    if name == "tifffile" and scan is not None and not scan.dialect:
        return TiffEngine(path, scan)
    if name == "libvips" and plain:
        return VipsEngine.plain(path)
    if name == "libvips" and scan is not None and not scan.dialect:
        return VipsEngine.tiff(path, scan)
    if name == "libvips":
        if pyvips.type_find("VipsForeignLoad", "openslideload"):
            return VipsEngine.vendor(path)
        remedy += ", or install a libvips with OpenSlide"
    raise SlideError(path, f"engine '{name}' does not read this file", remedy)


def _open_with_openslide(path: Path, scan: TiffScan | None) -> Engine:
    if path.suffix.lower() == ".mrxs" and not path.with_suffix("").is_dir():
        raise SlideError(
            path, f"the folder {path.stem} beside it is missing", "copy the folder with the file"
        )
    check_dicom(path)
    try:
        return OpenSlideEngine(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        if scan is None:
            raise SlideError(path, "not an image of a known format", _NOT_A_SLIDE) from error
        kind = scan.dialect or "tiles by their offsets"
        raise SlideError(path, f"a TIFF that OpenSlide does not know ({kind})", _CONVERT) from error
    except openslide.OpenSlideError as error:
        remedy = f"{DAMAGED_REMEDY}, or {_CONVERT}"
        raise SlideError(path, f"OpenSlide cannot open it: {error}", remedy) from error


def _magic(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise SlideError(path, "is a folder", _NOT_A_SLIDE)
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise SlideError(path, "is no regular file", _NOT_A_SLIDE)
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


def _levels(sizes: list[tuple[int, int]], tiles: list[tuple[int, int]]) -> tuple[Level, ...]:
    width, height = sizes[0]
    return tuple(
        Level(w, h, downsample(width, height, w, h), tile)
        for (w, h), tile in zip_longest(sizes, tiles)
    )


class VipsEngine:
    """libvips: PNG and JPEG; on request TIFF, and vendors' formats where it has OpenSlide.

    Every thread has images of its own, and new ones after an error: libvips reports an
    undecodable tile once, keeps black in its place, and gives that to whoever comes next.
    """

    name: EngineName = "libvips"

    def __init__(
        self, path: Path, images: list[_VipsImage], tiles: list[tuple[int, int]], about: About
    ) -> None:
        self._path, self._images, self.about = path, images, about
        self._own = threading.local()
        try:
            opened = [image() for image in images]
        except pyvips.Error as error:
            raise SlideError(path, f"libvips cannot open it: {error}", DAMAGED_REMEDY) from error
        if opened[0].bands < 3 or opened[0].format != "uchar" or opened[0].interpretation == "cmyk":
            kind = f"{opened[0].bands} bands of {opened[0].format}, {opened[0].interpretation}"
            raise SlideError(path, f"not an 8-bit RGB image: {kind}", BRIGHTFIELD_REMEDY)
        self.levels = _levels([(image.width, image.height) for image in opened], tiles)

    @classmethod
    def plain(cls, path: Path) -> VipsEngine:
        """A PNG or JPEG, whole in memory. Its dpi is that of a print: no um/px."""
        try:
            image = pyvips.Image.new_from_file(str(path), fail_on="warning", **_ANEW)
            image = image.copy_memory()
        except pyvips.Error as error:
            raise SlideError(path, f"damaged: {error}", DAMAGED_REMEDY) from error
        return cls(path, [lambda: image], [], About())

    @classmethod
    def tiff(cls, path: Path, scan: TiffScan) -> VipsEngine:
        """A TIFF without a dialect."""
        with open_tiff(path) as tiff:
            pages = [level.keyframe for level in tiff.series[scan.series].levels]
            if any(_mistagged(page) for page in pages):
                raise SlideError(
                    path,
                    "its JPEG tiles are YCbCr but tagged RGB: libvips would give false colours",
                    "leave the engine open",
                )
            # libvips counts a page's sub-directories, tifffile names their places in the file
            known = {page.offset: (number, -1) for number, page in enumerate(tiff.pages)}
            number, _ = known[pages[0].offset]
            known |= {at: (number, sub) for sub, at in enumerate(pages[0].subifds or ())}
            places = [known[page.offset] for page in pages]
            tiles = [_tile_size(page) for page in pages]

        def image(page: int, subifd: int) -> _VipsImage:
            return lambda: pyvips.Image.tiffload(
                str(path), page=page, subifd=subifd, fail_on="warning", **_ANEW
            )

        return cls(path, [image(*place) for place in places], tiles, scan.about)

    @classmethod
    def vendor(cls, path: Path) -> VipsEngine:
        """A vendor's format, by the OpenSlide within libvips."""

        def image(level: int) -> _VipsImage:
            return lambda: pyvips.Image.openslideload(str(path), level=level, **_ANEW)

        try:
            whole = image(0)()
        except pyvips.Error as error:
            raise SlideError(path, f"libvips cannot open it: {error}", DAMAGED_REMEDY) from error
        fields = {name: str(whole.get(name)) for name in whole.get_fields()}
        pictures = fields.get("slide-associated-images", "").split(", ")
        about = openslide_about(fields, [name for name in pictures if name])
        count = int(fields["openslide.level-count"])
        return cls(path, [image(level) for level in range(count)], [], about)

    def shrinks(self, level: int) -> tuple[int, ...]:
        return (1,)

    def region(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        own: dict[int, pyvips.Region] = self._own.__dict__.setdefault("regions", {})
        try:
            if level not in own:
                own[level] = pyvips.Region.new(_rgb(self._images[level]()))
            data = own[level].fetch(x, y, width, height)
        except pyvips.Error as error:
            own.pop(level, None)
            raise ReadError(str(error)) from error
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)

    def close(self) -> None:
        self._images = []
        self._own = threading.local()


def _mistagged(page: tifffile.TiffPage) -> bool:
    """Whether JPEG tiles are JFIF, whose colours are YCbCr, and the page says RGB."""
    if page.compression != tifffile.COMPRESSION.JPEG or page.photometric != _RGB:
        return False
    stored = (o for o, size in zip(page.dataoffsets, page.databytecounts, strict=True) if size)
    page.parent.filehandle.seek(next(stored, 0))
    return bool(page.parent.filehandle.read(10)[6:] == b"JFIF")


def _rgb(image: pyvips.Image) -> pyvips.Image:
    if image.interpretation not in ("srgb", "rgb"):
        image = image.colourspace("srgb")
    return image.flatten(background=255) if image.hasalpha() else image


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
            Level(
                w,
                h,
                factor if factor == round(factor) else downsample(*sizes[0], w, h),
                _openslide_tile(self._slide.properties, number),
            )
            for number, ((w, h), factor) in enumerate(zip(sizes, self._factors, strict=True))
        )
        self.about = openslide_about(self._slide.properties, self._slide.associated_images)

    def shrinks(self, level: int) -> tuple[int, ...]:
        return (1,)

    def region(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        factor = self._factors[level]
        place = (round(x * factor), round(y * factor)), level, (width, height)
        slide = self._slide
        try:
            image = slide.read_region(*place)
        except openslide.OpenSlideError:
            # after one error a handle refuses everything, also what other threads ask of it
            self._renew(slide)
            image = self._read_alone(*place)
        pixels = np.asarray(image)
        if pixels[..., 3].min() < 255:  # not scanned there: glass
            alpha = pixels[..., 3:].astype(np.uint16)
            return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        return np.ascontiguousarray(pixels[..., :3])

    def _read_alone(
        self, corner: tuple[int, int], level: int, size: tuple[int, int]
    ) -> Image.Image:
        """Read with a handle of this read's own: an error is then this region's."""
        try:
            with openslide.OpenSlide(self._path) as own:
                return own.read_region(corner, level, size)
        except openslide.OpenSlideError as error:
            raise ReadError(str(error)) from error

    def _renew(self, failed: openslide.OpenSlide) -> None:
        with self._lock:
            if self._slide is failed:
                # it stays where the file is gone or cut by now
                with contextlib.suppress(openslide.OpenSlideError):
                    self._slide = openslide.OpenSlide(self._path)

    def close(self) -> None:
        self._slide.close()


def _openslide_tile(properties: Mapping[str, str], level: int) -> tuple[int, int] | None:
    sides = [
        properties.get(f"openslide.level[{level}].tile-{side}") for side in ("width", "height")
    ]
    return (int(sides[0]), int(sides[1])) if sides[0] and sides[1] else None


class TiffEngine:
    """Tiles (or strips) of a TIFF by their offsets, each decoded once while it is near.

    JPEG goes through libjpeg-turbo with its warnings as errors: damaged data is reported, not
    guessed at.
    """

    name: EngineName = "tifffile"

    def __init__(self, path: Path, scan: TiffScan) -> None:
        self._tiff = open_tiff(path)
        self._pages = [level.keyframe for level in self._tiff.series[scan.series].levels]
        self._jpeg = [_jpeg_header(page) for page in self._pages]
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int, int], Pixels] = OrderedDict()
        self._cached = 0
        self.levels = _levels(
            [(page.imagewidth, page.imagelength) for page in self._pages],
            [_tile_size(page) for page in self._pages],
        )
        self.about = scan.about

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
            data = self._stored(page, index)
        tile = self._decode(level, index, data, shrink)
        with self._lock:
            if key not in self._cache:
                self._cache[key] = tile
                self._cached += tile.nbytes
            while self._cached > _TILE_CACHE and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1].nbytes
        return tile

    def _stored(self, page: tifffile.TiffPage, index: int) -> bytes:
        handle, length = page.parent.filehandle, page.databytecounts[index]
        try:
            handle.seek(page.dataoffsets[index])
            data = bytes(handle.read(length))
        except OSError as error:
            raise ReadError(f"tile {index}: {error}") from error
        if len(data) != length:  # cut while it was open
            raise ReadError(f"tile {index}: {len(data)} of {length} bytes")
        return data

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
    return page.imagewidth, min(page.rowsperstrip, page.imagelength)


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
    return _JpegHeader(tables[2:-2], page.photometric == _RGB)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give a ReadError the slide's name."""
    try:
        yield
    except ReadError as error:
        raise SlideError(path, f"pixels cannot be decoded ({error})", DAMAGED_REMEDY) from error

"""tifffile: the tiles of a TIFF, read directly by their offsets in the file."""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray

from nic_core.slides.engines.base import (
    EngineName,
    ReadError,
    flatten_on_white,
    pyramid_levels,
)
from nic_core.slides.engines.tiles import region_of_tiles, tiles_of_region
from nic_core.slides.images import alpha_kind
from nic_core.slides.remote import Range, RemoteObject, SlidePath
from nic_core.slides.resample import block_means
from nic_core.slides.tiff import SEPARATE, TiffInfo, level_pages, open_tiff, tile_size
from nic_core.types import Pixels

_RGB = tifffile.PHOTOMETRIC.RGB
# JPEG marker APP14, which states that the components are RGB
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
_HUGE_TILE = 1 << 24  # px
_TILE_CACHE = 64 * 1024 * 1024  # bytes of decoded tiles; neighbouring reads share tiles


class TiffEngine:
    """Engine for TIFF files whose tags describe the tiles (or strips) completely.

    Decoded tiles are cached, so that neighbouring reads decode a tile once. JPEG is decoded by
    libjpeg-turbo with warnings as errors, so that damaged data are reported. The tiles that a
    region of a remote file needs are read together, in few requests.
    """

    name: EngineName = "tifffile"

    def __init__(self, path: SlidePath, tiff: TiffInfo) -> None:
        with ExitStack() as stack:
            opened = stack.enter_context(open_tiff(tiff.remote or path))
            self._pages = level_pages(opened, tiff)
            self._jpeg = [_jpeg_header(page) for page in self._pages]
            # the end of the block raises what a remote file could not read; a local one stays open
            self._file = ExitStack() if tiff.remote else stack.pop_all()
        self._remote = tiff.remote
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int, int], Pixels] = OrderedDict()
        self._cached = 0
        self.levels = pyramid_levels(
            [(page.imagewidth, page.imagelength) for page in self._pages],
            [tile_size(page) for page in self._pages],
        )
        self.metadata = tiff.metadata

    def shrink_factors(self, level: int) -> tuple[int, ...]:
        page = self._pages[level]
        if self._jpeg[level] is None or not page.is_tiled:
            return (1,)
        # libjpeg decodes a block of 8 px to 4, 2 or 1 px from its low frequencies
        return tuple(s for s in (1, 2, 4, 8) if not (page.tilewidth % s or page.tilelength % s))

    def read_region(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        page = self._pages[level]
        tile_w, tile_h = tile_size(page)
        across = -(-page.imagewidth // tile_w)
        side = (tile_w // shrink, tile_h // shrink)
        stored = {}
        if self._remote is not None:
            places = tiles_of_region(side, (x, y), (width, height))
            indices = (row * across + column for row, column in places)
            stored = self._fetch(self._remote, level, indices, shrink)
        return region_of_tiles(
            lambda row, column: self._tile(level, row * across + column, shrink, stored),
            side,
            (x, y),
            (width, height),
        )

    def _fetch(
        self, remote: RemoteObject, level: int, indices: Iterable[int], shrink: int
    ) -> dict[int, bytes]:
        """Read the bytes of all tiles that are not decoded yet, in few requests."""
        page = self._pages[level]
        with self._lock:
            missing = [index for index in indices if (level, index, shrink) not in self._cache]
        numbers = [number for index in missing for number in _stored_tiles(page, index)]
        ranges = [Range(page.dataoffsets[n], page.databytecounts[n]) for n in numbers]
        return dict(zip(numbers, remote.read(ranges), strict=True))

    def _tile(self, level: int, index: int, shrink: int, stored: Mapping[int, bytes]) -> Pixels:
        key = (level, index, shrink)
        with self._lock:
            if (cached := self._cached_tile(key)) is not None:
                return cached
            # threads that need the same huge tile must not decode it at the same time
            if math.prod(tile_size(self._pages[level])) > _HUGE_TILE:
                return self._keep(key, self._decode(level, index, shrink, stored))
        tile = self._decode(level, index, shrink, stored)
        with self._lock:
            return self._keep(key, tile)

    def _cached_tile(self, key: tuple[int, int, int]) -> Pixels | None:
        if key not in self._cache:
            return None
        self._cache.move_to_end(key)
        return self._cache[key]

    def _keep(self, key: tuple[int, int, int], tile: Pixels) -> Pixels:
        if key not in self._cache:
            self._cache[key] = tile
            self._cached += tile.nbytes
        while self._cached > _TILE_CACHE and len(self._cache) > 1:
            self._cached -= self._cache.popitem(last=False)[1].nbytes
        return tile

    def _read_tile(self, page: tifffile.TiffPage, number: int) -> bytes:
        """Read the bytes of a tile; threads read at the same time, without a shared position."""
        length = page.databytecounts[number]
        if self._remote is not None:  # another thread dropped the decoded tile meanwhile
            return self._remote.read([Range(page.dataoffsets[number], length)])[0]
        try:
            data = os.pread(page.parent.filehandle.fileno(), length, page.dataoffsets[number])
        except OSError as error:
            raise ReadError(f"tile {number}: {error}") from error
        if len(data) != length:  # the file was truncated while open
            raise ReadError(f"tile {number}: {len(data)} of {length} bytes")
        return data

    def _decode(self, level: int, index: int, shrink: int, stored: Mapping[int, bytes]) -> Pixels:
        """Decode a tile, and read it before if it is not among those ``stored``."""
        page, header = self._pages[level], self._jpeg[level]
        numbers = _stored_tiles(page, index)
        data = [
            stored[number] if number in stored else self._read_tile(page, number)
            for number in numbers
        ]
        width, height = (side // shrink for side in tile_size(page))
        if not all(data):  # not scanned
            return np.full((height, width, 3), 255, np.uint8)
        if header is not None:
            try:
                return _decode_jpeg(header.complete(data[0]), width, height, shrink)
            except ValueError as error:
                raise ReadError(f"tile {numbers[0]}: {error}") from error
        planes = [_decode_any(page, *part) for part in zip(data, numbers, strict=True)]
        pixels = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=-1)
        if alpha := alpha_kind(page):
            return flatten_on_white(pixels, alpha)
        return np.ascontiguousarray(pixels)

    def close(self) -> None:
        self._file.close()
        self._cache.clear()


def _stored_tiles(page: tifffile.TiffPage, index: int) -> list[int]:
    """The numbers of a tile's parts: separate colour planes are stored as one tile each."""
    separate = page.samplesperpixel if page.planarconfig == SEPARATE else 1
    count = len(page.dataoffsets) // separate
    return [index + plane * count for plane in range(separate)]


def _decode_any(page: tifffile.TiffPage, data: bytes, number: int) -> NDArray[np.uint8]:
    """Decode a tile of any codec, uint8 (height, width, samples)."""
    try:
        decoded: Any = page.decode(data, number, jpegtables=page.jpegtables)[0]
    # each codec of imagecodecs has its own error class
    except Exception as error:
        raise ReadError(f"tile {number}: {error}") from error
    tile: NDArray[np.uint8] = decoded.reshape(decoded.shape[-3:])
    return tile


def _decode_jpeg(data: bytes, width: int, height: int, shrink: int) -> Pixels:
    """Decode a tile to ``width`` x ``height`` px, its size divided by ``shrink``."""
    if shrink > 1:
        tile = np.asarray(simplejpeg.decode_jpeg(data, min_width=width, min_height=height))
        if tile.shape[:2] == (height, width):
            return tile
        # some writers store smaller tiles at the edges of a page
    return block_means(np.asarray(simplejpeg.decode_jpeg(data)), shrink)


@dataclass(frozen=True)
class _JpegHeader:
    """Parts of a JPEG file that the tiles of a page share.

    Attributes
    ----------
    tables : bytes
        Quantisation and Huffman tables.
    rgb : bool
        The components are RGB, not YCbCr.
    """

    tables: bytes
    rgb: bool

    def complete(self, tile: bytes) -> bytes:
        """Return a tile as a complete JPEG file."""
        # without the marker decoders assume YCbCr, and in JFIF files the components always are
        colours = _ADOBE_RGB if self.rgb and tile[6:10] != b"JFIF" else b""
        return tile[:2] + colours + self.tables + tile[2:]


def _jpeg_header(page: tifffile.TiffPage) -> _JpegHeader | None:
    # libjpeg-turbo is used for what nearly all slides are: interleaved RGB or YCbCr
    separate = page.planarconfig == SEPARATE
    if page.compression != tifffile.COMPRESSION.JPEG or separate or page.samplesperpixel != 3:
        return None
    tables = page.jpegtables or b""
    # the tables are a JPEG stream; drop its start and end markers
    return _JpegHeader(tables[2:-2], page.photometric == _RGB)

"""tifffile: the tiles of a TIFF, read directly by their offsets in the file."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tifffile

from nic_core.slides.engines.base import EngineName, ReadError, pyramid_levels
from nic_core.slides.resample import block_means
from nic_core.slides.tiff import TiffInfo, open_tiff, tile_size
from nic_core.types import Pixels

_RGB = tifffile.PHOTOMETRIC.RGB
# JPEG marker APP14, which states that the components are RGB
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
_TILE_CACHE = 64 * 1024 * 1024  # bytes of decoded tiles; neighbouring reads share tiles


class TiffEngine:
    """Engine for TIFF files whose tags describe the tiles (or strips) completely.

    Decoded tiles are cached, so that neighbouring reads decode a tile once. JPEG is decoded by
    libjpeg-turbo with warnings as errors, so that damaged data are reported.
    """

    name: EngineName = "tifffile"

    def __init__(self, path: Path, tiff: TiffInfo) -> None:
        self._tiff = open_tiff(path)
        self._pages = [level.keyframe for level in self._tiff.series[tiff.series].levels]
        self._jpeg = [_jpeg_header(page) for page in self._pages]
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
        tile_w, tile_h = (side // shrink for side in tile_size(page))
        across = -(-page.imagewidth // tile_size(page)[0])
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
            data = self._read_tile(page, index)
        tile = self._decode(level, index, data, shrink)
        with self._lock:
            if key not in self._cache:
                self._cache[key] = tile
                self._cached += tile.nbytes
            while self._cached > _TILE_CACHE and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1].nbytes
        return tile

    def _read_tile(self, page: tifffile.TiffPage, index: int) -> bytes:
        handle, length = page.parent.filehandle, page.databytecounts[index]
        try:
            handle.seek(page.dataoffsets[index])
            data = bytes(handle.read(length))
        except OSError as error:
            raise ReadError(f"tile {index}: {error}") from error
        if len(data) != length:  # the file was truncated while open
            raise ReadError(f"tile {index}: {len(data)} of {length} bytes")
        return data

    def _decode(self, level: int, index: int, data: bytes, shrink: int) -> Pixels:
        page, header = self._pages[level], self._jpeg[level]
        width, height = (side // shrink for side in tile_size(page))
        if not data:  # not scanned
            return np.full((height, width, 3), 255, np.uint8)
        if header is not None:
            try:
                return _decode_jpeg(header.complete(data), width, height, shrink)
            except ValueError as error:
                raise ReadError(f"tile {index}: {error}") from error
        try:
            decoded: Any = page.decode(data, index)[0]
        # each codec of imagecodecs has its own error class
        except Exception as error:
            raise ReadError(f"tile {index}: {error}") from error
        return np.ascontiguousarray(decoded.reshape(decoded.shape[-3:])[..., :3])

    def close(self) -> None:
        self._tiff.close()
        self._cache.clear()


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
    if page.compression != tifffile.COMPRESSION.JPEG:
        return None
    tables = page.jpegtables or b""
    # the tables are a JPEG stream; drop its start and end markers
    return _JpegHeader(tables[2:-2], page.photometric == _RGB)

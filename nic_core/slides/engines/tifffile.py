"""tifffile: tiles of a TIFF by their offsets."""

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
from nic_core.slides.tiff import TiffScan, open_tiff, tile_size
from nic_core.types import Pixels

_RGB = tifffile.PHOTOMETRIC.RGB
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"  # marker APP14: no transform
_TILE_CACHE = 64 * 1024 * 1024  # bytes of decoded tiles kept: what neighbouring reads share


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
        self.levels = pyramid_levels(
            [(page.imagewidth, page.imagelength) for page in self._pages],
            [tile_size(page) for page in self._pages],
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
        width, height = (side // shrink for side in tile_size(page))
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

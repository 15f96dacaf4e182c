"""Regions from tiles: a cache of decoded tiles, and a region put together from them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np

from nic_core.slides.engines.base import ReadError
from nic_core.types import Pixels

_CAPACITY = 64 * 1024 * 1024  # bytes of decoded tiles; neighbouring reads share tiles


class TileCache:
    """The tiles that were decoded last, up to 64 MB. Threads may share it."""

    def __init__(self) -> None:
        self._tiles: OrderedDict[Hashable, Pixels] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, decode: Callable[[], Pixels]) -> Pixels:
        """Return the tile of a key; ``decode`` makes it if it is not in the cache."""
        with self._lock:
            if key in self._tiles:
                self._tiles.move_to_end(key)
                return self._tiles[key]
        tile = decode()
        with self._lock:
            if key not in self._tiles:
                self._tiles[key] = tile
                self._bytes += tile.nbytes
            while self._bytes > _CAPACITY and len(self._tiles) > 1:
                self._bytes -= self._tiles.popitem(last=False)[1].nbytes
        return tile


def tiles_of_region(
    side: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
) -> list[tuple[int, int]]:
    """Return row and column of the tiles of a region; parameters as in :func:`region_of_tiles`."""
    (tile_w, tile_h), (x, y), (width, height) = side, corner, size
    return [
        (row, column)
        for row in range(y // tile_h, -(-(y + height) // tile_h))
        for column in range(x // tile_w, -(-(x + width) // tile_w))
    ]


def region_of_tiles(
    tile: Callable[[int, int], Pixels],
    side: tuple[int, int],
    corner: tuple[int, int],
    size: tuple[int, int],
) -> Pixels:
    """Put a region together from the tiles of a regular grid.

    Parameters
    ----------
    tile : callable
        Returns the tile of a row and column; the last ones may be smaller.
    side : (int, int)
        Width and height of a tile, px.
    corner, size : (int, int)
        Left and top, width and height of the region, px of the level.

    Returns
    -------
    uint8 (height, width, 3)

    Raises
    ------
    ReadError
        A tile does not cover its part of the region.
    """
    (tile_w, tile_h), (x, y), (width, height) = side, corner, size
    result = np.empty((height, width, 3), np.uint8)
    for row, column in tiles_of_region(side, corner, size):
        top, left = row * tile_h, column * tile_w
        y0, y1 = max(y, top), min(y + height, top + tile_h)
        x0, x1 = max(x, left), min(x + width, left + tile_w)
        part = tile(row, column)[y0 - top : y1 - top, x0 - left : x1 - left]
        if part.shape[:2] != (y1 - y0, x1 - x0):
            raise ReadError(f"the tile in row {row}, column {column} is too small")
        result[y0 - y : y1 - y, x0 - x : x1 - x] = part
    return result

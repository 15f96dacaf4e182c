"""zarr: OME-Zarr images, whose chunks are read as tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import zarr

from nic_core.object_stores import RemoteError
from nic_core.slides.engines.base import EngineName, ReadError, pyramid_levels
from nic_core.slides.engines.tiles import TileCache, region_of_tiles
from nic_core.slides.ome_zarr import read_ome_zarr, zarr_errors
from nic_core.slides.remote import SlidePath
from nic_core.types import Pixels


class ZarrEngine:
    """Engine for OME-Zarr folders. Chunks that are not stored are white, as in other formats.

    Raises
    ------
    SlideError
        The folder holds no 8-bit RGB image, or its metadata are damaged.
    """

    name: EngineName = "zarr"

    def __init__(self, path: SlidePath) -> None:
        self._path = path
        image = read_ome_zarr(path)
        self._axes = image.axes
        self._arrays = [_white_where_missing(level) for level in image.levels]
        self._cache = TileCache()
        down, across = self._axes.index("y"), self._axes.index("x")
        self._sides = [(array.chunks[across], array.chunks[down]) for array in self._arrays]
        self.levels = pyramid_levels(
            [(array.shape[across], array.shape[down]) for array in self._arrays], self._sides
        )
        self.metadata = image.metadata

    def shrink_factors(self, level: int) -> tuple[int, ...]:
        return (1,)

    def read_region(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        def tile(row: int, column: int) -> Pixels:
            return self._cache.get((level, row, column), lambda: self._read(level, row, column))

        return region_of_tiles(tile, self._sides[level], (x, y), (width, height))

    def _read(self, level: int, row: int, column: int) -> Pixels:
        width, height = self._sides[level]
        windows = {
            "y": slice(row * height, (row + 1) * height),
            "x": slice(column * width, (column + 1) * width),
            "c": slice(None),
        }
        try:
            with zarr_errors(self._path):
                window = tuple(windows.get(axis, 0) for axis in self._axes)
                block: Any = self._arrays[level][window]
        except RemoteError:
            raise
        # each codec of zarr has its own error class
        except Exception as error:
            raise ReadError(f"chunk {row}, {column} of level {level}: {error}") from error
        kept = [axis for axis in self._axes if axis in "yxc"]
        order = [kept.index(axis) for axis in "yxc"]
        return np.ascontiguousarray(np.asarray(block).transpose(order))

    def close(self) -> None:
        self._cache = TileCache()


def _white_where_missing(array: zarr.Array[Any]) -> zarr.Array[Any]:
    metadata = replace(array.metadata, fill_value=255)
    return zarr.Array(zarr.AsyncArray(metadata=metadata, store_path=array.store_path))

"""Embeddings of a grid store, chunk by chunk.

zarr hands each chunk from thread to thread, which takes more time than to decode it; a crop of
400 x 400 cells has some forty. Here chunks are read straight from their shard: its last bytes are
an index of offsets and lengths, as zarr's specification of sharding says.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import zarr
from numpy.typing import NDArray

Window = tuple[slice, slice]  # rows, columns of a grid

_INDEX, _CHECKSUM = np.dtype("<u8"), 4  # numbers of a shard's index; bytes after it
_ABSENT = np.iinfo(_INDEX).max


class ChunkError(ValueError):
    """A chunk of a store cannot be read."""


@dataclass(frozen=True)
class StoredEmbeddings:
    """Embeddings float16 (C, rows, columns) of one orientation, on disk.

    Indexed like the zarr array, through which they are then read.

    Attributes
    ----------
    array
        (C, rows, columns), or with axes before them.
    folder
        Of the array.
    at
        Where along the axes before.
    """

    array: zarr.Array[Any]
    folder: Path
    at: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape[len(self.at) :]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def __getitem__(self, index: Any) -> Any:
        return self.array[(*self.at, *(index if isinstance(index, tuple) else (index,)))]

    @cached_property
    def _direct(self) -> bool:
        """Whether the array is laid out as :func:`nic_core.grids.write_grid` does: all numbers of
        a cell in one chunk, compressed by Blosc alone, in shards with their index at the end."""
        about: dict[str, Any] = self.array.metadata.to_dict()
        codecs, keys = about["codecs"], about["chunk_key_encoding"]
        if [codec["name"] for codec in codecs] != ["sharding_indexed"]:
            return False
        layout = codecs[0]["configuration"]
        inner, outer = ([c["name"] for c in layout[part]] for part in ("codecs", "index_codecs"))
        leading = len(self.at)
        return (
            (inner, outer) == (["bytes", "blosc"], ["bytes", "crc32c"])
            and layout["index_location"] == "end"
            and layout["codecs"][0]["configuration"]["endian"] == "little"
            and keys == {"name": "default", "configuration": {"separator": "/"}}
            and self.array.chunks[: leading + 1] == (*[1] * leading, self.shape[0])
        )

    def blocks(self, window: Window) -> Iterator[Window]:
        """Cells that are best read together (a chunk), of all that meet a window."""
        if not self._direct:
            yield window
            return
        rows, columns = (
            [
                slice(start, min(start + side, length))
                for start in range(along.start // side * side, along.stop, side)
            ]
            for along, side, length in zip(
                window, self.array.chunks[-2:], self.shape[-2:], strict=True
            )
        )
        for row in rows:
            for column in columns:
                yield row, column

    def block(self, cells: Window) -> NDArray[np.float16]:
        """The embeddings of one of :meth:`blocks`, (C, rows, columns).

        Raises
        ------
        ChunkError
            The store is damaged.
        """
        if not self._direct:
            return np.asarray(self[:, cells[0], cells[1]])
        sides, shards = self.array.chunks, self.array.shards
        assert shards is not None
        first = (*self.at, 0, *(along.start for along in cells))
        number = [i // shard for i, shard in zip(first, shards, strict=True)]
        per_shard = [shard // side for shard, side in zip(shards, sides, strict=True)]
        within = [i // side % n for i, side, n in zip(first, sides, per_shard, strict=True)]
        embeddings = np.zeros(sides[len(self.at) :], np.float16)
        path = self.folder.joinpath("c", *map(str, number))
        length = 2 * _INDEX.itemsize * math.prod(per_shard)
        try:
            with path.open("rb") as file:
                file.seek(-length - _CHECKSUM, os.SEEK_END)
                index = np.frombuffer(file.read(length), _INDEX).reshape(*per_shard, 2)
                start, size = map(int, index[tuple(within)])
                if start != _ABSENT:
                    file.seek(start)
                    room = embeddings.reshape(-1).view(np.uint8).data
                    decoded = imagecodecs.blosc_decode(file.read(size), numthreads=1, out=room)
                    if len(decoded) != embeddings.nbytes:
                        raise ValueError(
                            f"a chunk of {len(decoded)}, not {embeddings.nbytes} bytes"
                        )
        except FileNotFoundError:
            pass  # a shard of zeros alone is not written
        except (OSError, ValueError, OverflowError, imagecodecs.BloscError) as error:
            raise ChunkError(f"{path}: damaged ({error}); compress the slide again") from error
        return embeddings[:, : cells[0].stop - cells[0].start, : cells[1].stop - cells[1].start]

"""Write the embeddings of a grid chunk by chunk, into the shards of a zarr array.

zarr writes a shard from memory as a whole. Here each chunk is compressed and appended to its shard
as soon as its cells are encoded, so only one chunk is in memory. The files follow zarr's
specification of sharding: chunks one after the other, then an index of their offsets and lengths
with its checksum. :mod:`nic_core.grids.chunks` reads them, and so does any zarr reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

import google_crc32c
import imagecodecs
import numpy as np
from numpy.typing import NDArray

from nic_core.grids.chunks import ABSENT, INDEX, Window

# of Blosc
COMPRESSOR: Literal["zstd"] = "zstd"
SHUFFLE: Literal["shuffle"] = "shuffle"
COMPRESSION_LEVEL = 5

# largest sides, cells
_CHUNK, _SHARD = 64, 512
# largest sizes of decoded embeddings: a crop reads whole chunks, and some readers whole shards
_CHUNK_BYTES, _SHARD_BYTES = 4 << 20, 256 << 20


@dataclass(frozen=True)
class Layout:
    """Where the cells of a grid are stored.

    Attributes
    ----------
    shape : (int, int, int)
        (C, rows, columns).
    chunk, shard : (int, int)
        Rows and columns of a chunk and of a shard, in cells; a shard is a whole number of chunks.
    """

    shape: tuple[int, int, int]
    chunk: tuple[int, int]
    shard: tuple[int, int]

    def windows(self) -> Iterator[Window]:
        """Yield the rows and columns of each chunk, in the order in which they are written.

        Shards by row and column, and in each shard its chunks by row and column. So the cells of
        each row come from left to right, and a shard is complete before the next one begins.
        """
        everything = slice(0, self.shape[1]), slice(0, self.shape[2])
        for shard in _tiles(everything, self.shard):
            yield from _tiles(shard, self.chunk)


def layout_of(shape: tuple[int, int, int]) -> Layout:
    """Return the layout of a grid (C, rows, columns).

    Chunks have 64 x 64 cells and shards 512 x 512, or the next smaller power of two at which a
    chunk has at most 4 MiB and a shard at most 256 MiB [choice]. Small grids are one chunk.
    """
    cell_bytes = shape[0] * np.dtype(np.float16).itemsize
    chunk = _largest_side(_CHUNK, _CHUNK_BYTES, cell_bytes)
    shard = max(chunk, _largest_side(_SHARD, _SHARD_BYTES, cell_bytes))
    chunks = tuple(min(chunk, length) for length in shape[1:])
    shards = tuple(
        min(shard, -(-length // side) * side)
        for length, side in zip(shape[1:], chunks, strict=True)
    )
    return Layout(shape, (chunks[0], chunks[1]), (shards[0], shards[1]))


def _largest_side(side: int, limit: int, cell_bytes: int) -> int:
    while side > 1 and side**2 * cell_bytes > limit:
        side //= 2
    return side


def _tiles(window: Window, sides: tuple[int, int]) -> Iterator[Window]:
    """Yield the tiles of a window by row and column; those at the end may be smaller."""
    rows, columns = (
        [slice(i, min(i + side, along.stop)) for i in range(along.start, along.stop, side)]
        for along, side in zip(window, sides, strict=True)
    )
    for row in rows:
        for column in columns:
            yield row, column


class ShardWriter:
    """Write the embeddings of one orientation into the folder of their array.

    A context manager. :meth:`add` is called for the windows of a :class:`Layout` in their order.
    As in zarr, chunks and shards of zeros are not written.

    Parameters
    ----------
    folder : Path
        Folder of the array.
    layout : Layout
    leading : tuple of int
        Index along the axes of the array before (C, rows, columns).
    """

    def __init__(self, folder: Path, layout: Layout, leading: tuple[int, ...] = ()) -> None:
        self._folder = folder
        self._layout = layout
        self._leading = leading
        self._shard: tuple[int, int] | None = None
        self._file: BinaryIO | None = None
        self._index: NDArray[np.uint64] = np.empty(0, INDEX)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()
        elif self._file is not None:
            self._file.close()

    def add(self, window: Window, embeddings: NDArray[np.float16]) -> None:
        """Append a chunk.

        Parameters
        ----------
        window
            Rows and columns of the chunk in the grid.
        embeddings : float16 (C, rows, columns)
            Those of the window.
        """
        layout = self._layout
        starts = window[0].start, window[1].start
        shard = starts[0] // layout.shard[0], starts[1] // layout.shard[1]
        if shard != self._shard:
            self._finish()
            self._shard = shard
        if not embeddings.view(np.uint16).any():  # bits, as -0 is not what a reader fills in
            return
        if self._file is None:
            path = self._folder.joinpath("c", *map(str, (*self._leading, 0, *shard)))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
            sides = zip(layout.shard, layout.chunk, strict=True)
            self._index = np.full((*(whole // part for whole, part in sides), 2), ABSENT, INDEX)
        chunk = np.zeros((layout.shape[0], *layout.chunk), "<f2")
        chunk[:, : embeddings.shape[1], : embeddings.shape[2]] = embeddings
        encoded = imagecodecs.blosc_encode(
            chunk.tobytes(),
            level=COMPRESSION_LEVEL,
            compressor=COMPRESSOR,
            shuffle=SHUFFLE,
            typesize=chunk.itemsize,
            numthreads=1,
        )
        row, column = (
            start % whole // part
            for start, whole, part in zip(starts, layout.shard, layout.chunk, strict=True)
        )
        self._index[row, column] = self._file.tell(), len(encoded)
        self._file.write(encoded)

    def _finish(self) -> None:
        """Complete the file of the current shard."""
        if self._file is None:
            return
        index = self._index.tobytes()
        with self._file as file:
            file.write(index + google_crc32c.value(index).to_bytes(4, "little"))
        self._file = None

"""Read the embeddings of a grid chunk by chunk.

zarr passes each chunk between threads, which takes longer than decoding it; a crop of 400 x 400
cells has about fifty chunks. This module reads chunks directly from their shard, by the index of
offsets and lengths at its end (zarr's specification of sharding).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import zarr
from numpy.typing import NDArray

Window = tuple[slice, slice]  # rows, columns of a grid

INDEX, _CHECKSUM = np.dtype("<u8"), 4  # dtype of a shard's index; bytes of the checksum after it
ABSENT = np.iinfo(INDEX).max  # marks a chunk that was not written


class ChunkError(ValueError):
    """A chunk of a grid store cannot be read."""


@dataclass(frozen=True)
class StoredEmbeddings:
    """Embeddings float16 (C, rows, columns) of one orientation, on disk.

    Indexing reads through zarr. :meth:`blocks` and :meth:`block` read chunks directly.

    Attributes
    ----------
    array : zarr.Array
        (C, rows, columns), or with leading axes.
    folder : Path
        Folder of the array.
    leading : tuple of int
        Index along the leading axes.
    """

    array: zarr.Array[Any]
    folder: Path
    leading: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape[len(self.leading) :]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def __getitem__(self, index: Any) -> Any:
        return self.array[(*self.leading, *(index if isinstance(index, tuple) else (index,)))]

    @cached_property
    def _direct(self) -> bool:
        """Whether the array has the layout of :func:`nic_core.grids.write_grid`.

        A chunk holds whole embeddings, compressed by Blosc, and shards end with their index.
        """
        metadata: dict[str, Any] = self.array.metadata.to_dict()
        codecs, keys = metadata["codecs"], metadata["chunk_key_encoding"]
        if [codec["name"] for codec in codecs] != ["sharding_indexed"]:
            return False
        layout = codecs[0]["configuration"]
        inner, outer = ([c["name"] for c in layout[part]] for part in ("codecs", "index_codecs"))
        axes = len(self.leading)
        return (
            (inner, outer) == (["bytes", "blosc"], ["bytes", "crc32c"])
            and layout["index_location"] == "end"
            and layout["codecs"][0]["configuration"]["endian"] == "little"
            and keys == {"name": "default", "configuration": {"separator": "/"}}
            and self.array.chunks[: axes + 1] == (*[1] * axes, self.shape[0])
        )

    def blocks(self, window: Window) -> Iterator[Window]:
        """Yield the rows and columns of each chunk that overlaps a window.

        An array in another layout yields the window itself.
        """
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
        """Read the embeddings of one of :meth:`blocks`.

        Returns
        -------
        float16 (C, rows, columns)

        Raises
        ------
        ChunkError
            The store is damaged.
        """
        if not self._direct:
            return np.asarray(self[:, cells[0], cells[1]])
        sides, shards = self.array.chunks, self.array.shards
        assert shards is not None
        first = (*self.leading, 0, *(along.start for along in cells))
        number = [i // shard for i, shard in zip(first, shards, strict=True)]
        per_shard = [shard // side for shard, side in zip(shards, sides, strict=True)]
        within = [i // side % n for i, side, n in zip(first, sides, per_shard, strict=True)]
        embeddings = np.zeros(sides[len(self.leading) :], np.float16)
        path = self.folder.joinpath("c", *map(str, number))
        length = 2 * INDEX.itemsize * math.prod(per_shard)
        try:
            with path.open("rb") as file:
                file.seek(-length - _CHECKSUM, os.SEEK_END)
                index = np.frombuffer(file.read(length), INDEX).reshape(*per_shard, 2)
                start, size = map(int, index[tuple(within)])
                if start != ABSENT:
                    file.seek(start)
                    buffer = embeddings.reshape(-1).view(np.uint8).data
                    decoded = imagecodecs.blosc_decode(file.read(size), numthreads=1, out=buffer)
                    if len(decoded) != embeddings.nbytes:
                        raise ValueError(
                            f"a chunk has {len(decoded)} bytes, not {embeddings.nbytes}"
                        )
        except FileNotFoundError:
            pass  # zarr does not write shards that contain only zeros
        except (OSError, ValueError, OverflowError, imagecodecs.BloscError) as error:
            raise ChunkError(f"{path}: damaged ({error}); compress the slide again") from error
        return embeddings[:, : cells[0].stop - cells[0].start, : cells[1].stop - cells[1].start]


def chunk_windows(embeddings: Any, window: Window) -> Iterable[Window]:
    """Return the windows to read one after the other: a store's chunks, else the whole window.

    Parameters
    ----------
    embeddings
        :class:`StoredEmbeddings`, or another array (C, rows, columns).
    """
    return embeddings.blocks(window) if isinstance(embeddings, StoredEmbeddings) else [window]


def read_chunk(embeddings: Any, cells: Window) -> NDArray[Any]:
    """Read one of the :func:`chunk_windows`.

    Raises
    ------
    ChunkError
        The store is damaged.
    """
    if isinstance(embeddings, StoredEmbeddings):
        return embeddings.block(cells)
    return np.asarray(embeddings[:, cells[0], cells[1]])


def tissue_blocks(
    embeddings: Any, valid: NDArray[np.bool_]
) -> Iterator[tuple[Window, NDArray[np.bool_], NDArray[Any]]]:
    """Yield the embeddings of the valid cells, one chunk of a store in memory at a time.

    Parameters
    ----------
    embeddings
        :class:`StoredEmbeddings`, or another array (C, rows, columns).
    valid : bool (rows, columns)

    Yields
    ------
    window : (slice, slice)
        Rows and columns of a block with valid cells.
    valid : bool (rows, columns)
        The valid cells of the block, n of them.
    embeddings : float16 (C, n)
        Their embeddings, by row and column of the block.

    Raises
    ------
    ChunkError
        The store is damaged.
    """
    for window in chunk_windows(embeddings, (slice(0, valid.shape[0]), slice(0, valid.shape[1]))):
        inside = valid[window]
        if inside.any():
            yield window, inside, read_chunk(embeddings, window)[:, inside]

"""Read the cells of a slide in blocks of neighbours.

Compression and the measurement of quality read cells this way, with one worker per core: each
stored tile is decoded once, and memory does not grow with the slide.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import polars as pl
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from nic_core.slides.errors import SlideError
from nic_core.slides.slide import Slide
from nic_core.types import Pixels

BLOCK = 8  # cells per side of a block
# fraction of kept cells that may be undecodable; a slide with more is refused as damaged [choice]
MAX_UNREADABLE = 0.05

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Block:
    """Neighbouring kept cells that are read together.

    Attributes
    ----------
    row, column : int
        Top-left cell of the block.
    shape : (int, int)
        Rows and columns of the block, in cells.
    cells : int64 (n, 2)
        Row and column in the grid of each kept cell.
    """

    row: int
    column: int
    shape: tuple[int, int]
    cells: NDArray[np.int64]


def plan_blocks(table: pl.DataFrame, *, side: int = BLOCK) -> list[Block]:
    """Group the kept cells into blocks of ``side`` x ``side`` cells, trimmed to the kept cells.

    A block of 8 x 8 cells of 128 px at 0.5 um/px covers a whole number of tiles of the usual sizes
    (240, 256, 512 or 1024 px), or ends within a tile that the engine caches for the next block.
    """
    kept = table.filter("kept").select("row", "column").to_numpy().astype(np.int64)
    blocks = []
    keys, member = np.unique(kept // side, axis=0, return_inverse=True)
    order = np.argsort(member.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(member.ravel(), minlength=len(keys)))
    for cells in np.split(kept[order], ends[:-1]) if len(keys) else []:
        (top, left), (bottom, right) = cells.min(axis=0), cells.max(axis=0) + 1
        blocks.append(Block(int(top), int(left), (int(bottom - top), int(right - left)), cells))
    return blocks


def read_block(
    slide: Slide,
    block: Block,
    *,
    patch: int,
    mpp: float,
    stride: int | None = None,
    scaled: bool = False,
) -> tuple[NDArray[np.int64], Pixels]:
    """Read the patches of the cells of a block; leave out those that cannot be decoded.

    Parameters
    ----------
    patch : int
        Side of a patch, px at ``mpp``.
    mpp : float
        um/px to read at.
    stride : int, optional
        Side of a cell, which is the central square of its patch, px at ``mpp``; default: the patch.
    scaled : bool
        Let the decoder shrink the image; see :meth:`nic_core.slides.Slide.read`.

    Returns
    -------
    cells : int64 (n, 2)
        Row and column in the grid of each decoded cell.
    pixels : uint8 (n, patch, patch, 3)
    """
    stride = patch if stride is None else stride
    px = mpp / slide.mpp  # level-0 px per px
    step, margin = stride * px, (patch - stride) / 2 * px

    def read(row: int, column: int, rows: int, columns: int) -> Pixels:
        """Patches of a rectangle of cells, by row then column."""
        pixels = slide.read(
            column * step - margin,
            row * step - margin,
            (columns - 1) * stride + patch,
            (rows - 1) * stride + patch,
            mpp,
            scaled=scaled,
        )
        if stride == patch:
            cells = pixels.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
        else:
            windows = sliding_window_view(pixels, (patch, patch), axis=(0, 1))
            cells = np.moveaxis(windows[::stride, ::stride], 2, -1)
        return cells.reshape(-1, patch, patch, 3)

    try:
        parts = [read(*rectangle) for rectangle in _rectangles(block)]
    except SlideError:
        return _decodable(block.cells, read, patch)
    return block.cells, parts[0] if len(parts) == 1 else np.concatenate(parts)


def _rectangles(block: Block) -> list[tuple[int, int, int, int]]:
    """Row, column, rows and columns of the reads that cover exactly the block's kept cells.

    One read if every cell is kept, else one for each run of neighbours in a row; the engine caches
    the tiles that runs share.
    """
    if len(block.cells) == block.shape[0] * block.shape[1]:
        return [(block.row, block.column, *block.shape)]
    step = np.diff(block.cells, axis=0)
    starts = np.flatnonzero((step[:, 0] != 0) | (step[:, 1] != 1)) + 1
    runs = np.split(block.cells, starts)
    return [(int(run[0, 0]), int(run[0, 1]), 1, len(run)) for run in runs]


def _decodable(
    cells: NDArray[np.int64], read: Callable[[int, int, int, int], Pixels], patch: int
) -> tuple[NDArray[np.int64], Pixels]:
    """Read cell by cell, and leave out undecodable cells."""
    decoded, pixels = [], [np.empty((0, patch, patch, 3), np.uint8)]
    for row, column in cells.tolist():
        try:
            pixels.append(read(row, column, 1, 1))
        except SlideError:
            continue
        decoded.append((row, column))
    return np.array(decoded, np.int64).reshape(-1, 2), np.concatenate(pixels)


def check_unreadable(slide: Slide, unreadable: int, total: int, limit: float) -> None:
    """Refuse a slide of which too many cells could not be decoded.

    Raises
    ------
    SlideError
        ``unreadable`` exceeds the fraction ``limit`` of ``total``.
    """
    if unreadable > limit * total:
        raise SlideError(
            slide.path,
            f"{unreadable} of {total} patches cannot be decoded (allowed: {limit:.0%})",
            "copy the file again from its source",
        )


def map_in_order(
    blocks: Iterable[Block], work: Callable[[Block], _Result], workers: int
) -> Generator[_Result]:
    """Yield ``work(block)`` for each block, in order, computed by a pool of threads.

    At most two blocks per worker are computed before the caller consumes them, which bounds
    memory.
    """
    pending: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="blocks") as pool:
        try:
            for block in blocks:
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result()
                pending.append(pool.submit(work, block))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

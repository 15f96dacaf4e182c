"""Cells of a slide's grid, read in blocks of neighbours.

Every pass over a slide's cells reads this way: one worker a core takes blocks, so that each
stored tile is decoded once and memory is bounded whatever the slide's size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from nic_core.slides.errors import SlideError
from nic_core.slides.slide import Slide
from nic_core.types import Pixels

BLOCK = 8  # cells a side that are read at once
MAX_UNREADABLE = 0.05  # share of kept cells [choice]: above it a slide is damaged, not scratched

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Block:
    """Neighbouring kept cells, read in one go.

    Attributes
    ----------
    row, column : int
        Top-left cell of the read.
    shape : (rows, columns)
        Cells read.
    cells : int64 (n, 2)
        Row and column in the grid of the kept ones.
    """

    row: int
    column: int
    shape: tuple[int, int]
    cells: NDArray[np.int64]


def plan_blocks(table: pl.DataFrame, *, side: int = BLOCK) -> list[Block]:
    """Group the kept cells into blocks of ``side`` x ``side`` cells, trimmed to what is kept.

    A block of 128 px cells at 0.5 um/px is a whole number of the usual tiles (240, 256, 512 or
    1024 px) or ends within a tile that the engine still holds for the next block.
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
    slide: Slide, block: Block, *, patch: int, mpp: float, scaled: bool = False
) -> tuple[NDArray[np.int64], Pixels]:
    """Cells of a block that can be decoded, and their pixels.

    Parameters
    ----------
    patch : int
        Side of a cell, px at ``mpp``.
    mpp : float
        um/px to read at.
    scaled : bool
        Let the decoder shrink, see :meth:`nic_core.slides.Slide.read`.

    Returns
    -------
    cells : int64 (n, 2)
        Row and column in the grid.
    pixels : uint8 (n, patch, patch, 3)
    """
    step = patch * mpp / slide.mpp  # level-0 px a cell

    def read(row: int, column: int, rows: int, columns: int) -> Pixels:
        """A rectangle of cells, cut into its patches by row then column."""
        pixels = slide.read(
            column * step, row * step, columns * patch, rows * patch, mpp, scaled=scaled
        )
        cells = pixels.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
        return cells.reshape(-1, patch, patch, 3)

    try:
        parts = [read(*rectangle) for rectangle in _rectangles(block)]
    except SlideError:
        return _decodable(block.cells, read, patch)
    return block.cells, parts[0] if len(parts) == 1 else np.concatenate(parts)


def _rectangles(block: Block) -> list[tuple[int, int, int, int]]:
    """Row, column, rows and columns of reads that hold the block's cells and no others: all of
    it if it is full, else each run of neighbours in a row (their tiles stay in the engine)."""
    if len(block.cells) == block.shape[0] * block.shape[1]:
        return [(block.row, block.column, *block.shape)]
    step = np.diff(block.cells, axis=0)
    starts = np.flatnonzero((step[:, 0] != 0) | (step[:, 1] != 1)) + 1
    runs = np.split(block.cells, starts)
    return [(int(run[0, 0]), int(run[0, 1]), 1, len(run)) for run in runs]


def _decodable(
    cells: NDArray[np.int64], read: Callable[[int, int, int, int], Pixels], patch: int
) -> tuple[NDArray[np.int64], Pixels]:
    """Cell by cell, where a part of a block is undecodable."""
    good, pixels = [], [np.empty((0, patch, patch, 3), np.uint8)]
    for row, column in cells.tolist():
        try:
            pixels.append(read(row, column, 1, 1))
        except SlideError:
            continue
        good.append((row, column))
    return np.array(good, np.int64).reshape(-1, 2), np.concatenate(pixels)


def allow_unreadable(slide: Slide, unreadable: int, total: int, share: float) -> None:
    """Raise SlideError if more than a share of a slide's cells could not be decoded."""
    if unreadable > share * total:
        raise SlideError(
            slide.path,
            f"{unreadable} of {total} patches cannot be decoded (allowed: {share:.0%})",
            "copy the file again from its source",
        )


def in_order(
    blocks: Iterable[Block], work: Callable[[Block], _Result], workers: int
) -> Iterator[_Result]:
    """Results of blocks in their order, at most two blocks a worker ahead of the consumer."""
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

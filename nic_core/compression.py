"""From a slide to its grid: read, encode, put back in place.

A stream of bounded memory whatever the slide's size: one worker a core takes blocks of
neighbouring cells, decodes each stored tile once and encodes the patches it cut, on that core
alone. Decoding and encoding so share the cores in the ratio that they need, and no thread waits
for another at every layer. No patch touches the disk.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import nn

from nic_core.grids import Grid, GridError, GridProvenance, open_grid
from nic_core.patches import PatchTableError, check_patch_table
from nic_core.slides.errors import SlideError
from nic_core.slides.resample import Pixels
from nic_core.slides.slide import Slide

BLOCK, GPU_BLOCK = 8, 16  # cells a side that are read at once
MAX_UNREADABLE = 0.05  # share of kept cells [choice]: above it a slide is damaged, not scratched
_CPU_BATCH = 32  # patches whose feature maps stay in a core's cache: faster than more


class _Card(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def patch(self) -> int: ...
    @property
    def mpp(self) -> float: ...
    @property
    def code(self) -> int: ...
    @property
    def weights_hash(self) -> str: ...


class PatchEncoder(Protocol):
    """What compression needs of an encoder."""

    @property
    def card(self) -> _Card: ...

    def inference_module(self, device: str = "auto") -> nn.Module:
        """uint8 (B, 3, P, P) to float32 (B, C), ready on its device."""
        ...


Progress = Callable[[int, int], None]
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


def compress_slide(
    slide: Slide,
    table: pl.DataFrame,
    encoder: PatchEncoder,
    *,
    slide_id: str,
    slide_identity: str,
    device: str = "auto",
    workers: int | None = None,
    max_unreadable: float = MAX_UNREADABLE,
    progress: Progress | None = None,
) -> Grid:
    """Encode the kept cells of a slide.

    Parameters
    ----------
    table : polars.DataFrame
        The slide's patch table, of the encoder's patch size and um/px.
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    workers : int, optional
        Threads; default: one a core.
    max_unreadable : float
        Share of the kept cells that may be undecodable. Those are left empty (not valid).
    progress : callable, optional
        Called with (cells done, cells in all) after every block.

    Returns
    -------
    Grid
        Codes float16 (C, rows, columns) in memory; nothing kept gives a grid of no valid cell.

    Raises
    ------
    SlideError
        More of the slide is undecodable than allowed.
    PatchTableError
        The table is of another slide, patch size or um/px.
    """
    card = encoder.card
    _check_fits(slide, table, card, slide_id)
    rows, columns = _max(table, "row") + 1, _max(table, "column") + 1
    codes = np.zeros((card.code, rows, columns), np.float16)
    valid = np.zeros((rows, columns), np.bool_)
    total, done = int(table["kept"].sum()), 0

    module = encoder.inference_module(device)
    at = next(chain(module.parameters(), module.buffers()), torch.empty(0)).device
    on_cpu = at.type == "cpu"

    def work(block: Block) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
        cells, pixels = read_block(slide, block, patch=card.patch, mpp=card.mpp)
        return cells, _encode(module, pixels, at, _CPU_BATCH if on_cpu else len(pixels), card.code)

    blocks = plan_blocks(table, side=BLOCK if on_cpu else GPU_BLOCK)
    for cells, found in _in_order(blocks, work, workers or _cores()):
        codes[:, cells[:, 0], cells[:, 1]] = found.T
        valid[cells[:, 0], cells[:, 1]] = True
        done += len(cells)
        if progress is not None:
            progress(done, total)
    unreadable = total - done
    if unreadable > max_unreadable * total:
        raise SlideError(
            slide.path,
            f"{unreadable} of {total} patches cannot be decoded (allowed: {max_unreadable:.0%})",
            "copy the file again from its source",
        )
    if not np.isfinite(codes).all():
        raise SlideError(
            slide.path,
            f"encoder '{card.name}' gives codes that are not finite numbers of float16",
            "train it again",
        )
    provenance = GridProvenance(
        slide=slide_id,
        slide_identity=slide_identity,
        slide_mpp=slide.mpp,
        encoder=card.name,
        weights_hash=card.weights_hash,
        mpp=card.mpp,
        patch=card.patch,
        stride=card.patch,
        unreadable=unreadable,
    )
    return Grid(codes, valid, provenance)


def up_to_date(
    store: Path,
    slide: Slide,
    table: pl.DataFrame,
    encoder: PatchEncoder,
    *,
    slide_identity: str,
) -> bool:
    """Whether a store already holds what compressing would give: the same slide, weights, scale
    and cells. A missing or damaged store is not."""
    try:
        grid = open_grid(store)
    except GridError:
        return False
    about, card = grid.provenance, encoder.card
    found = (about.slide_identity, about.weights_hash, about.mpp, about.patch, about.slide_mpp)
    if found != (slide_identity, card.weights_hash, card.mpp, card.patch, slide.mpp):
        return False
    rows, columns = _max(table, "row") + 1, _max(table, "column") + 1
    kept = table["kept"].to_numpy().reshape(rows, columns)
    if grid.valid.shape != kept.shape or (grid.valid & ~kept).any():
        return False
    return int((kept & ~grid.valid).sum()) == about.unreadable


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
    slide: Slide, block: Block, *, patch: int, mpp: float
) -> tuple[NDArray[np.int64], Pixels]:
    """Cells of a block that can be decoded, and their pixels.

    Returns
    -------
    cells : int64 (n, 2)
        Row and column in the grid.
    pixels : uint8 (n, patch, patch, 3)
    """
    step = patch * mpp / slide.mpp  # level-0 px a cell
    try:
        parts = [
            _cut(slide.read(left * step, top * step, columns * patch, rows * patch, mpp), patch)
            for top, left, rows, columns in _rectangles(block)
        ]
    except SlideError:
        return _read_cells(slide, block.cells, step, patch, mpp)
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


def _cut(pixels: Pixels, patch: int) -> Pixels:
    """Cut a read into its patches, by row then column."""
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    cells = pixels.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
    return cells.reshape(-1, patch, patch, 3)


def _read_cells(
    slide: Slide, cells: NDArray[np.int64], step: float, patch: int, mpp: float
) -> tuple[NDArray[np.int64], Pixels]:
    """Cell by cell, where a part of a block is undecodable."""
    good, pixels = [], []
    for row, column in cells:
        try:
            pixels.append(slide.read(column * step, row * step, patch, patch, mpp))
        except SlideError:
            continue
        good.append((row, column))
    return (
        np.array(good, np.int64).reshape(-1, 2),
        np.array(pixels, np.uint8).reshape(-1, patch, patch, 3),
    )


def _encode(
    module: nn.Module, pixels: Pixels, device: torch.device, batch: int, code: int
) -> NDArray[np.float16]:
    """uint8 (n, P, P, 3) to float16 (n, C)."""
    codes = np.empty((len(pixels), code), np.float16)
    with torch.inference_mode():
        for start in range(0, len(pixels), batch or 1):
            # (B, P, P, 3) seen as channels-last (B, 3, P, P): nothing is copied
            part = torch.from_numpy(pixels[start : start + batch]).to(device).permute(0, 3, 1, 2)
            codes[start : start + batch] = module(part).half().cpu().numpy()
    return codes


def _in_order(
    blocks: Iterable[Block], work: Callable[[Block], _Result], workers: int
) -> Iterator[_Result]:
    """Results of blocks in their order, at most two blocks a worker ahead of the consumer."""
    pending: deque[Future[_Result]] = deque()
    with _one_thread_each(), ThreadPoolExecutor(workers, thread_name_prefix="compress") as pool:
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


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """PyTorch on one core in every thread that starts in this block.

    Its own threads wait for each other by spinning; where cores are shared with anything, two
    of them encode slower than one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_fits(slide: Slide, table: pl.DataFrame, card: _Card, slide_id: str) -> None:
    check_patch_table(table, f"patch table of '{slide_id}'")
    found = table["slide"][0], table["mpp"][0], table["size"][0] * slide.mpp / table["mpp"][0]
    if found[0] != slide_id or found[1] != card.mpp or abs(found[2] - card.patch) > 1e-6:
        raise PatchTableError(
            f"patch table of '{found[0]}' with patches of {found[2]:g} px at {found[1]:g} um/px "
            f"does not fit slide '{slide_id}' and encoder '{card.name}' "
            f"({card.patch} px at {card.mpp:g} um/px): make it again"
        )


def _max(table: pl.DataFrame, column: str) -> int:
    return int(table[column].to_numpy().max())

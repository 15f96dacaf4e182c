"""From a slide to its grid: read, encode, put back in place.

A stream of bounded memory whatever the slide's size: one worker a core takes blocks of
neighbouring cells, decodes each stored tile once and encodes the patches it cut, on that core
alone. Decoding and encoding so share the cores in the ratio that they need, and no thread waits
for another at every layer. No patch touches the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import nn

from nic_core.grids import Grid, GridError, GridProvenance, open_grid
from nic_core.patches import PatchTableError, check_patch_table
from nic_core.slides.blocks import (
    BLOCK,
    MAX_UNREADABLE,
    Block,
    allow_unreadable,
    cores,
    in_order,
    plan_blocks,
    read_block,
)
from nic_core.slides.errors import SlideError
from nic_core.slides.resample import Pixels
from nic_core.slides.slide import Slide

GPU_BLOCK = 16  # cells a side that are read at once; on a CPU: BLOCK
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
    with _one_thread_each():
        for cells, found in in_order(blocks, work, workers or cores()):
            codes[:, cells[:, 0], cells[:, 1]] = found.T
            valid[cells[:, 0], cells[:, 1]] = True
            done += len(cells)
            if progress is not None:
                progress(done, total)
    unreadable = total - done
    allow_unreadable(slide, unreadable, total, max_unreadable)
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

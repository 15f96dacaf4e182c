"""From a slide to its grid: read, encode, put back in place.

A stream of bounded memory whatever the slide's size. On a CPU one worker a core takes blocks of
neighbouring cells, decodes each stored tile once and encodes the patches it cut, on that core
alone: decoding and encoding so share the cores in the ratio that they need, and no thread waits
for another at every layer. Before a GPU the workers only read, and one thread feeds it blocks as
they come. No patch touches the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from nic_core.encoders.inference import BATCH, Card, PreparedEncoder
from nic_core.grids import Grid, GridError, GridProvenance, open_grid
from nic_core.grids.orientations import ORIENTATIONS, orient
from nic_core.parallel import cores
from nic_core.slides.errors import SlideError
from nic_core.slides.slide import Slide
from nic_core.tiling.blocks import (
    BLOCK,
    MAX_UNREADABLE,
    Block,
    check_unreadable,
    map_in_order,
    plan_blocks,
    read_block,
)
from nic_core.tiling.patches import PatchTableError, check_patch_table
from nic_core.types import Pixels

GPU_BLOCK = 16  # patches a side that are read at once; on a CPU: BLOCK

Progress = Callable[[int, int], None]
Cells = NDArray[np.int64]
Embeddings = NDArray[np.float16]


def compress_slide(
    slide: Slide,
    table: pl.DataFrame,
    encoder: PreparedEncoder,
    *,
    slide_id: str,
    slide_identity: str,
    orientations: bool = False,
    workers: int | None = None,
    max_unreadable: float = MAX_UNREADABLE,
    progress: Progress | None = None,
) -> Grid:
    """Encode the kept cells of a slide.

    Parameters
    ----------
    table : polars.DataFrame
        The slide's patch table, of the encoder's patch size and um/px.
    encoder : PreparedEncoder
        Says where, how precisely and from pixels of what um/px it encodes.
    orientations : bool
        Encode each patch in all 8 orientations, from one read.
    workers : int, optional
        Threads; default: one a core.
    max_unreadable : float
        Share of the kept cells that may be undecodable. Those are left empty (not valid).
    progress : callable, optional
        Called with (cells done, cells in all) after every block.

    Returns
    -------
    Grid
        Embeddings float16 (C, rows, columns) in memory; nothing kept gives a grid of no valid cell.

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
    embeddings = np.zeros(
        (ORIENTATIONS if orientations else 1, card.embedding_size, rows, columns), np.float16
    )
    valid = np.zeros((rows, columns), np.bool_)
    total, done = int(table["kept"].sum()), 0

    def read(block: Block) -> tuple[Cells, Pixels]:
        return read_block(
            slide,
            block,
            patch=encoder.side,
            mpp=encoder.mpp,
            scaled=encoder.reading == "input",
        )

    def encode(part: tuple[Cells, Pixels]) -> tuple[Cells, Embeddings]:
        cells, pixels = part
        return cells, _encode(encoder, pixels, len(embeddings))

    workers = workers or cores()
    # as many pixels at once, whatever their size
    side = (BLOCK if encoder.on_cpu else GPU_BLOCK) * card.patch // encoder.side
    blocks = plan_blocks(table, side=side)
    with _one_thread_each():
        if encoder.on_cpu:
            encoded = map_in_order(blocks, lambda block: encode(read(block)), workers)
        else:
            encoded = map(encode, map_in_order(blocks, read, workers))
        for cells, found in encoded:
            embeddings[:, :, cells[:, 0], cells[:, 1]] = found
            valid[cells[:, 0], cells[:, 1]] = True
            done += len(cells)
            if progress is not None:
                progress(done, total)
    unreadable = total - done
    check_unreadable(slide, unreadable, total, max_unreadable)
    if not np.isfinite(embeddings).all():
        raise SlideError(
            slide.path,
            f"encoder '{card.name}' gives embeddings that are not finite numbers of float16",
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
        precision=encoder.precision,
        reading=encoder.reading,
    )
    return Grid(embeddings[0], valid, provenance, embeddings if orientations else None)


def up_to_date(
    store: Path,
    slide: Slide,
    table: pl.DataFrame,
    encoder: PreparedEncoder,
    *,
    slide_identity: str,
    orientations: bool = False,
) -> bool:
    """Whether a store already holds what compressing would give: the same slide, weights, scale,
    precision, reading, orientations and cells. A missing or damaged store is not."""
    try:
        grid = open_grid(store)
    except GridError:
        return False
    about, card = grid.provenance, encoder.card
    found = (about.slide_identity, about.weights_hash, about.mpp, about.patch, about.slide_mpp)
    if found != (slide_identity, card.weights_hash, card.mpp, card.patch, slide.mpp):
        return False
    how = (about.precision, about.reading, grid.orientations is not None)
    if how != (encoder.precision, encoder.reading, orientations):
        return False
    rows, columns = _max(table, "row") + 1, _max(table, "column") + 1
    kept = table["kept"].to_numpy().reshape(rows, columns)
    if grid.valid.shape != kept.shape or (grid.valid & ~kept).any():
        return False
    return int((kept & ~grid.valid).sum()) == about.unreadable


def _encode(encoder: PreparedEncoder, pixels: Pixels, orientations: int) -> Embeddings:
    """uint8 (n, side, side, 3) to float16 (orientations, C, n)."""
    cuda = encoder.device.type == "cuda"
    embeddings = np.empty((orientations, encoder.card.embedding_size, len(pixels)), np.float16)
    batch = BATCH if encoder.on_cpu else len(pixels)
    with torch.inference_mode():
        for k in range(orientations):
            turned = orient(pixels, k, axes=(1, 2))
            for start in range(0, len(pixels), batch or 1):
                part = torch.from_numpy(np.ascontiguousarray(turned[start : start + batch]))
                if cuda:  # from locked pages the copy runs beside the next read
                    part = part.pin_memory()
                # (B, P, P, 3) seen as channels-last (B, 3, P, P): nothing is copied
                part = part.to(encoder.device, non_blocking=cuda).permute(0, 3, 1, 2)
                found = encoder.module(part).half().cpu().numpy()
                embeddings[k, :, start : start + batch] = found.T
    return embeddings


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


def _check_fits(slide: Slide, table: pl.DataFrame, card: Card, slide_id: str) -> None:
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

"""Compress a slide: read its patches, encode them, and place the embeddings in a grid.

Patches are streamed: no patch is written to disk, and :func:`compress_to_store` writes each chunk
of the grid as soon as its cells are encoded. Memory therefore does not grow with the slide, except
for a few bytes a cell (its row of the patch table, the mask). On a CPU, one worker per core takes a
block of neighbouring cells, decodes each stored tile once and encodes the patches on the same core.
Decoding and encoding thus share the cores in the ratio they need, and threads do not wait for each
other at every layer of the network.
With a GPU, the workers only read, and the calling thread passes the blocks to the GPU in order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from itertools import chain, islice
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from nic_core.devices import single_threaded_torch
from nic_core.encoders.errors import EncoderError
from nic_core.encoders.inference import BATCH, Card, PreparedEncoder
from nic_core.grids import (
    GRID_FORMAT,
    Grid,
    GridError,
    GridPart,
    GridProvenance,
    open_grid,
    write_parts,
)
from nic_core.grids.chunks import Window
from nic_core.grids.shards import layout_of
from nic_core.orientations import ORIENTATIONS, orient
from nic_core.parallel import cores
from nic_core.slides.errors import SlideError
from nic_core.slides.remote import RemotePath
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
from nic_core.version import __version__

REMOTE_WORKERS = 2  # for each core, of a remote slide: some wait for the server [choice]
GPU_BLOCK = 16  # patches per side of a block with a GPU; with a CPU it is BLOCK

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
    """Encode the kept cells of a slide; return the grid in memory.

    Parameters
    ----------
    table : polars.DataFrame
        Patch table of the slide, with the encoder's patch size and um/px.
    encoder : PreparedEncoder
        Its preparation determines device, precision and the um/px at which pixels are read.
    slide_id, slide_identity : str
        Slide id and content identity of the slide's file, for the provenance.
    orientations : bool
        Encode each patch in all 8 orientations. Pixels are read only once.
    workers : int, optional
        Number of threads; default: one per core, or two of a remote slide.
    max_unreadable : float
        Fraction of the kept cells that may be undecodable. They are not valid in the grid.
    progress : callable, optional
        Called with (encoded cells, all kept cells) after every block.

    Returns
    -------
    Grid
        Embeddings float16 (C, rows, columns) in memory. Without kept cells, no cell is valid.

    Raises
    ------
    SlideError
        More than ``max_unreadable`` of the cells cannot be decoded, or an embedding is not finite
        in float16.
    PatchTableError
        The table belongs to another slide, patch size or um/px.
    EncoderError
        Pixels are read at the resolution of the network's input, and the stride is not a whole
        number of them.
    """
    _check_fits(slide, table, encoder, slide_id)
    shape, count = _shape(table, encoder.card), ORIENTATIONS if orientations else 1
    embeddings, valid = np.zeros((count, *shape), np.float16), np.zeros(shape[1:], np.bool_)
    with closing(
        _encode_slide(slide, table, encoder, count, workers, max_unreadable, progress)
    ) as parts:
        for part in parts:
            rows, columns = part.window
            embeddings[:, :, rows, columns] = part.embeddings
            valid[part.window] = part.valid
    provenance = _provenance(slide, table, encoder, valid, slide_id, slide_identity)
    return Grid(embeddings[0], valid, provenance, embeddings if orientations else None)


def compress_to_store(
    path: Path,
    slide: Slide,
    table: pl.DataFrame,
    encoder: PreparedEncoder,
    *,
    slide_id: str,
    slide_identity: str,
    orientations: bool = False,
    progress: Progress | None = None,
) -> Grid:
    """Encode the kept cells of a slide into a grid store; replace an existing one atomically.

    The content is that of :func:`compress_slide`, in bounded memory.

    Parameters
    ----------
    path : Path
        The grid store.
    table, encoder, slide_id, slide_identity, orientations, progress
        As in :func:`compress_slide`.

    Returns
    -------
    Grid
        The store, whose embeddings are read from disk when they are indexed.

    Raises
    ------
    SlideError, PatchTableError, EncoderError
        As in :func:`compress_slide`. An existing store remains.
    StoreError
        The store cannot be written, for example because the disk is full.
    """
    _check_fits(slide, table, encoder, slide_id)
    count = ORIENTATIONS if orientations else 1
    with closing(
        _encode_slide(slide, table, encoder, count, None, MAX_UNREADABLE, progress)
    ) as parts:
        write_parts(
            path,
            _shape(table, encoder.card),
            parts,
            lambda valid: _provenance(slide, table, encoder, valid, slide_id, slide_identity),
            orientations=count,
        )
    return open_grid(path)


def _encode_slide(
    slide: Slide,
    table: pl.DataFrame,
    encoder: PreparedEncoder,
    orientations: int,
    workers: int | None,
    max_unreadable: float,
    progress: Progress | None,
) -> Generator[GridPart]:
    """Yield the parts of a slide's grid in the order in which they are stored."""
    layout = layout_of(_shape(table, encoder.card))
    total, done = int(table["kept"].sum()), 0
    # the same number of pixels per block for both kinds of reading
    side = (BLOCK if encoder.on_cpu else GPU_BLOCK) * encoder.card.patch // encoder.side
    # a power of two, as the side of a chunk where a grid has several: each block is in one chunk
    side = min(1 << side.bit_length() - 1, max(layout.chunk))
    by_chunk: dict[tuple[int, int], list[Block]] = {}
    for block in plan_blocks(table, side=side):
        chunk = block.row // layout.chunk[0], block.column // layout.chunk[1]
        by_chunk.setdefault(chunk, []).append(block)

    def blocks_of(window: Window) -> list[Block]:
        chunk = window[0].start // layout.chunk[0], window[1].start // layout.chunk[1]
        return by_chunk.get(chunk, [])

    stride = _stride(table, slide) * encoder.side // encoder.card.patch  # px that are read

    def read(block: Block) -> tuple[Cells, Pixels]:
        return read_block(
            slide,
            block,
            patch=encoder.side,
            mpp=encoder.mpp,
            stride=stride,
            scaled=encoder.reading == "input",
        )

    def encode(part: tuple[Cells, Pixels]) -> tuple[Cells, Embeddings]:
        cells, pixels = part
        return cells, _encode(encoder, pixels, orientations)

    workers = workers or cores() * (REMOTE_WORKERS if isinstance(slide.path, RemotePath) else 1)
    blocks = chain.from_iterable(map(blocks_of, layout.windows()))
    with single_threaded_torch(), ExitStack() as stack:
        encoded: Iterator[tuple[Cells, Embeddings]]
        if encoder.on_cpu:
            encoded = stack.enter_context(
                closing(map_in_order(blocks, lambda block: encode(read(block)), workers))
            )
        else:
            encoded = map(encode, stack.enter_context(closing(map_in_order(blocks, read, workers))))
        for window in layout.windows():
            valid = np.zeros([along.stop - along.start for along in window], np.bool_)
            embeddings = np.zeros((orientations, layout.shape[0], *valid.shape), np.float16)
            for cells, found in islice(encoded, len(blocks_of(window))):
                rows, columns = (cells - [along.start for along in window]).T
                embeddings[:, :, rows, columns] = found
                valid[rows, columns] = True
                done += len(cells)
                if progress is not None:
                    progress(done, total)
            if not np.isfinite(embeddings).all():
                raise SlideError(
                    slide.path,
                    f"encoder '{encoder.card.name}' returns embeddings that are not finite in "
                    "float16",
                    "train the encoder again",
                )
            yield GridPart(window, embeddings, valid)
    check_unreadable(slide, total - done, total, max_unreadable)


def _provenance(
    slide: Slide,
    table: pl.DataFrame,
    encoder: PreparedEncoder,
    valid: NDArray[np.bool_],
    slide_id: str,
    slide_identity: str,
) -> GridProvenance:
    card = encoder.card
    return GridProvenance(
        format=GRID_FORMAT,
        slide=slide_id,
        slide_identity=slide_identity,
        slide_mpp=slide.mpp,
        slide_image=slide.image,
        encoder=card.name,
        weights_hash=card.weights_hash,
        mpp=card.mpp,
        patch=card.patch,
        stride=_stride(table, slide),
        origin=(0.0, 0.0),
        unreadable=int(table["kept"].sum()) - int(valid.sum()),
        precision=encoder.precision,
        reading=encoder.reading,
        colours=slide.colours,
        icc_profile=slide.icc_profile,
        software=f"nic {__version__}",
    )


def is_up_to_date(
    store: Path,
    slide: Slide,
    table: pl.DataFrame,
    encoder: PreparedEncoder,
    *,
    slide_identity: str,
    orientations: bool = False,
) -> bool:
    """Whether compressing a slide would give the grid that a store already contains.

    Slide and image, weights, patch size, stride, um/px, precision, reading, colours, orientations
    and cells must be equal. A missing, damaged or older store is not up to date.
    """
    try:
        grid = open_grid(store)
    except GridError:
        return False
    stored, card = grid.provenance, encoder.card
    read = stored.slide_identity, stored.slide_image, stored.slide_mpp, stored.colours
    if read != (slide_identity, slide.image, slide.mpp, slide.colours):
        return False
    if (stored.weights_hash, stored.mpp, stored.patch) != (card.weights_hash, card.mpp, card.patch):
        return False
    if stored.stride != _stride(table, slide):
        return False
    settings = stored.precision, stored.reading, grid.orientations is not None
    if settings != (encoder.precision, encoder.reading, orientations):
        return False
    _, rows, columns = _shape(table, card)
    kept = table["kept"].to_numpy().reshape(rows, columns)
    if grid.valid.shape != kept.shape or (grid.valid & ~kept).any():
        return False
    return int((kept & ~grid.valid).sum()) == stored.unreadable


def _encode(encoder: PreparedEncoder, pixels: Pixels, orientations: int) -> Embeddings:
    """Encode pixels uint8 (n, side, side, 3) to embeddings float16 (orientations, C, n)."""
    cuda = encoder.device.type == "cuda"
    embeddings = np.empty((orientations, encoder.card.embedding_size, len(pixels)), np.float16)
    batch = BATCH if encoder.on_cpu else len(pixels)
    with torch.inference_mode():
        for k in range(orientations):
            turned = orient(pixels, k, axes=(1, 2))
            for start in range(0, len(pixels), batch or 1):
                part = torch.from_numpy(np.ascontiguousarray(turned[start : start + batch]))
                if cuda:  # copies from page-locked memory run in parallel to the next read
                    part = part.pin_memory()
                # (B, P, P, 3) viewed as channels-last (B, 3, P, P), without a copy
                part = part.to(encoder.device, non_blocking=cuda).permute(0, 3, 1, 2)
                encoded = encoder.module(part).half().cpu().numpy()
                embeddings[k, :, start : start + batch] = encoded.T
    return embeddings


def _check_fits(slide: Slide, table: pl.DataFrame, encoder: PreparedEncoder, slide_id: str) -> None:
    """Refuse a patch table of another slide or geometry, and a stride that cannot be read."""
    card = encoder.card
    check_patch_table(table, f"patch table of '{slide_id}'")
    name, mpp = table["slide"][0], table["mpp"][0]
    patch = table["size"][0] * slide.mpp / mpp
    if name != slide_id or mpp != card.mpp or abs(patch - card.patch) > 1e-6:
        raise PatchTableError(
            f"the patch table of '{name}', with patches of {patch:g} px at {mpp:g} um/px, does not "
            f"fit slide '{slide_id}' and encoder '{card.name}' "
            f"({card.patch} px at {card.mpp:g} um/px): make it again"
        )
    stride = _stride(table, slide)
    if stride * encoder.side % card.patch:
        raise EncoderError(
            f"encoder '{card.name}': a stride of {stride} px is not a whole number of px "
            f"at {encoder.mpp:g} um/px, the resolution of the network's input; set "
            "settings.compression.reading to patch, or change the stride"
        )


def _stride(table: pl.DataFrame, slide: Slide) -> int:
    """Side of a cell, px at the um/px of the patches."""
    return round(float(table["stride"][0]) * slide.mpp / float(table["mpp"][0]))


def _shape(table: pl.DataFrame, card: Card) -> tuple[int, int, int]:
    """Return (C, rows, columns) of the grid of a patch table."""
    rows, columns = (int(table[axis].to_numpy().max()) + 1 for axis in ("row", "column"))
    return card.embedding_size, rows, columns

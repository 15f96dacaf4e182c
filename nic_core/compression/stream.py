"""Compress a slide: read its patches, encode them, and place the embeddings in a grid.

Patches are streamed: memory does not grow with the slide (except for the grid itself), and no patch
is written to disk. On a CPU, one worker per core takes a block of neighbouring cells, decodes each
stored tile once and encodes the patches on the same core. Decoding and encoding thus share the
cores in the ratio they need, and threads do not wait for each other at every layer of the network.
With a GPU, the workers only read, and the calling thread passes the blocks to the GPU in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from nic_core.cohort import Geometry
from nic_core.encoders.errors import EncoderError
from nic_core.encoders.inference import BATCH, Card, PreparedEncoder
from nic_core.grids import (
    GRID_FORMAT,
    Grid,
    GridError,
    GridProvenance,
    open_grid,
)
from nic_core.orientations import ORIENTATIONS, orient
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
from nic_core.version import __version__

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
    """Encode the kept cells of a slide.

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
        Number of threads; default: one per core.
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
    card = encoder.card
    geometry = _geometry(slide, table, card, slide_id)
    stride, remainder = divmod(geometry.stride * encoder.side, card.patch)
    if remainder:
        raise EncoderError(
            f"encoder '{card.name}': a stride of {geometry.stride} px is not a whole number of px "
            f"at {encoder.mpp:g} um/px, the resolution of the network's input; set "
            "settings.compression.reading to patch, or change the stride"
        )
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
            stride=stride,
            scaled=encoder.reading == "input",
        )

    def encode(part: tuple[Cells, Pixels]) -> tuple[Cells, Embeddings]:
        cells, pixels = part
        return cells, _encode(encoder, pixels, len(embeddings))

    workers = workers or cores()
    # the same number of pixels per block for both kinds of reading
    side = (BLOCK if encoder.on_cpu else GPU_BLOCK) * card.patch // encoder.side
    blocks = plan_blocks(table, side=side)
    with _single_threaded_torch():
        if encoder.on_cpu:
            encoded = map_in_order(blocks, lambda block: encode(read(block)), workers)
        else:
            encoded = map(encode, map_in_order(blocks, read, workers))
        for cells, block_embeddings in encoded:
            embeddings[:, :, cells[:, 0], cells[:, 1]] = block_embeddings
            valid[cells[:, 0], cells[:, 1]] = True
            done += len(cells)
            if progress is not None:
                progress(done, total)
    unreadable = total - done
    check_unreadable(slide, unreadable, total, max_unreadable)
    if not np.isfinite(embeddings).all():
        raise SlideError(
            slide.path,
            f"encoder '{card.name}' returns embeddings that are not finite in float16",
            "train the encoder again",
        )
    provenance = GridProvenance(
        format=GRID_FORMAT,
        slide=slide_id,
        slide_identity=slide_identity,
        slide_mpp=slide.mpp,
        slide_image=slide.image,
        encoder=card.name,
        weights_hash=card.weights_hash,
        mpp=card.mpp,
        patch=card.patch,
        stride=geometry.stride,
        origin=(0.0, 0.0),
        unreadable=unreadable,
        precision=encoder.precision,
        reading=encoder.reading,
        colours=slide.colours,
        icc_profile=slide.icc_profile,
        software=f"nic {__version__}",
    )
    return Grid(embeddings[0], valid, provenance, embeddings if orientations else None)


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
    rows, columns = _max(table, "row") + 1, _max(table, "column") + 1
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


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """Make PyTorch use one core in every thread that starts in this block.

    PyTorch's own threads spin while they wait for each other: on cores that other work shares, two
    of them encode slower than one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _geometry(slide: Slide, table: pl.DataFrame, card: Card, slide_id: str) -> Geometry:
    """Return the geometry of a patch table, which must be that of the slide and the encoder."""
    check_patch_table(table, f"patch table of '{slide_id}'")
    name, mpp = table["slide"][0], table["mpp"][0]
    patch = table["size"][0] * slide.mpp / mpp
    if name != slide_id or mpp != card.mpp or abs(patch - card.patch) > 1e-6:
        raise PatchTableError(
            f"the patch table of '{name}', with patches of {patch:g} px at {mpp:g} um/px, does not "
            f"fit slide '{slide_id}' and encoder '{card.name}' "
            f"({card.patch} px at {card.mpp:g} um/px): make it again"
        )
    return Geometry(card.patch, card.mpp, _stride(table, slide))


def _stride(table: pl.DataFrame, slide: Slide) -> int:
    """Side of a cell, px at the um/px of the patches."""
    return round(float(table["stride"][0]) * slide.mpp / float(table["mpp"][0]))


def _max(table: pl.DataFrame, column: str) -> int:
    return int(table[column].to_numpy().max())

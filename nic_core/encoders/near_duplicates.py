"""Patches of one split that show, nearly, what a patch of another split shows.

Pixels that were compressed again, brightened, shifted a little, turned or mirrored are no longer
identical, but a network that has seen one knows the other. All of this is [choice].

1. Of each patch, in grey, the means of 8 x 8 cells without their mean and at unit length. For
   each patch and each of its 8 orientations the nearest of the earlier splits is a candidate.
2. Candidates are compared at 128 px, between 4 and 32 periods a side (finer is noise and what JPEG
   removes, coarser is shading): the shift of at most 8 px where they correlate best, then their
   correlation on what they share. A first look at 32 px, 16 times cheaper, drops most of them.

Patches that are mostly empty are not compared: glass with a fleck of tissue in the same corner
correlates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from nic_core.encoders.splits import SPLITS
from nic_core.slides.resample import coverage

AGREEMENT = 0.75  # other tissue stays below 0.7, copies as above lie above 0.75, most above 0.9
SIDE = 128  # px at which patches are compared
REACH = 1 / 16  # of the side
ROUGH_SIDE, ROUGH = 32, 0.4  # of the first look; copies have 0.5 and more there
BAND = (4, 32)  # periods a side
CELLS = 8  # a side
# a cell has structure if its standard deviation exceeds 5 grey levels; half of them must
STRUCTURE, SHARE = 5.0, 0.5
CANDIDATE = 0.6
_BATCH = 256  # patches
_PRODUCTS = 2**24  # similarities at once

PAIRS_SCHEMA = {"index": pl.Int64(), "other": pl.Int64(), "agreement": pl.Float64()}


def near_duplicates(patches: NDArray[np.uint8], splits: Sequence[str]) -> pl.DataFrame:
    """The patches of test and validation that have a near-duplicate in an earlier split.

    Parameters
    ----------
    patches : uint8 (N, P, P, 3)
        May be memory-mapped: a batch is read at a time.
    splits
        The split of each patch.

    Returns
    -------
    polars.DataFrame
        ``PAIRS_SCHEMA``: a patch of validation or test, the patch of an earlier split that agrees
        best with it, and their correlation (over ``AGREEMENT``).
    """
    embeddings, busy = _embeddings(patches)
    order = np.array([SPLITS.index(split) for split in splits])
    pairs: list[tuple[int, int, float]] = []
    for split in range(1, len(SPLITS)):
        mine = np.flatnonzero((order == split) & busy)
        earlier = np.flatnonzero((order < split) & busy)
        if len(mine) and len(earlier):
            pairs += _pairs(patches, embeddings, mine, earlier)
    return pl.DataFrame(pairs, schema=PAIRS_SCHEMA, orient="row").sort("index")


def _embeddings(patches: NDArray[np.uint8]) -> tuple[Tensor, NDArray[np.bool_]]:
    """Unit vectors (N, CELLS, CELLS) of the cells' means, and whether a patch has structure."""
    embeddings, busy = torch.zeros((len(patches), CELLS, CELLS)), np.zeros(len(patches), bool)
    for start in range(0, len(patches), _BATCH):
        grey = _grey(patches[start : start + _BATCH])
        mean = _pooled(grey, CELLS)
        spread = (_pooled(grey**2, CELLS) - mean**2).clamp(min=0).sqrt()
        mean = mean - mean.mean((1, 2), keepdim=True)
        embeddings[start : start + _BATCH] = F.normalize(mean.flatten(1)).reshape(mean.shape)
        share = (spread > STRUCTURE).float().mean((1, 2))
        busy[start : start + _BATCH] = (share >= SHARE).numpy()
    return embeddings, busy


def _pairs(
    patches: NDArray[np.uint8],
    embeddings: Tensor,
    mine: NDArray[np.intp],
    earlier: NDArray[np.intp],
) -> list[tuple[int, int, float]]:
    """The best of the earlier patches for each of mine that agrees with one."""
    known = embeddings[earlier].flatten(1).T.contiguous()
    best: dict[int, tuple[float, int]] = {}
    step = max(1, min(_BATCH, _PRODUCTS // len(earlier)))
    for start in range(0, len(mine), step):
        rows = mine[start : start + step]
        own = _grey(patches[rows])
        for turn in range(8):
            likeness, nearest = (_turned(embeddings[rows], turn).flatten(1) @ known).max(1)
            chosen = np.flatnonzero((likeness > CANDIDATE).numpy())
            others = earlier[nearest.numpy()[chosen]]
            one, other = _turned(own[chosen], turn), _grey(patches[others])
            close = np.flatnonzero(np.array(_agreements(one, other, ROUGH_SIDE)) > ROUGH)
            chosen, others = chosen[close], others[close]
            agreements = _agreements(one[close], other[close], SIDE)
            for row, other, agreement in zip(rows[chosen], others, agreements, strict=True):
                if agreement > max(AGREEMENT, best.get(row, (0.0, 0))[0]):
                    best[row] = agreement, other
    return [(int(row), int(other), agreement) for row, (agreement, other) in best.items()]


def _grey(patches: NDArray[np.uint8]) -> Tensor:
    """float32 (B, SIDE, SIDE) of uint8 (B, P, P, 3)."""
    red, green, blue = (patches[..., channel].astype(np.uint16) for channel in range(3))
    return _pooled(torch.from_numpy((red + green + blue).astype(np.float32) / 3), SIDE)


def _pooled(images: Tensor, side: int) -> Tensor:
    """(B, H, H) to (B, side, side) by means over areas, as matrix products."""
    length = images.shape[-1]
    if length == side:
        return images
    weights = torch.from_numpy(coverage(0.0, length / side, side, length).toarray())
    return weights @ images @ weights.T


def _turned(images: Tensor, turn: int) -> Tensor:
    """One of the 8 orientations of (B, H, W)."""
    images = torch.rot90(images, turn % 4, (1, 2))
    return images.flip(2) if turn >= 4 else images


def _agreements(one: Tensor, other: Tensor, side: int) -> list[float]:
    """Correlation of each pair of (B, SIDE, SIDE) at its best shift, on what they share.

    They are compared at ``side`` px.
    """
    if not len(one):
        return []  # MKL's FFT refuses an empty batch
    reach = round(REACH * side)
    first, second = _filtered(one, side), _filtered(other, side)
    surface = torch.fft.irfft2(first * second.conj(), s=(side, side))
    surface = surface.roll((reach, reach), (1, 2))[:, : 2 * reach + 1, : 2 * reach + 1]
    peak = surface.flatten(1).argmax(1)
    a, b = (torch.fft.irfft2(spectrum, s=(side, side)) for spectrum in (first, second))
    found = []
    for p, q, place in zip(a, b, peak.tolist(), strict=True):
        y, x = (shift - reach for shift in divmod(place, 2 * reach + 1))
        p, q = _shared(p, y, x), _shared(q, -y, -x)
        found.append(float((p * q).sum() / (p.norm() * q.norm()).clamp(min=1e-6)))
    return found


def _shared(image: Tensor, y: int, x: int) -> Tensor:
    """What is left of an image when another lies over it, shifted by (y, x)."""
    height, width = image.shape
    return image[max(0, y) : height + min(0, y), max(0, x) : width + min(0, x)]


def _filtered(images: Tensor, side: int) -> Tensor:
    """Spectra of (B, SIDE, SIDE) at ``side`` px within the band."""
    low, high = BAND
    down, across = torch.fft.fftfreq(side) * side, torch.fft.rfftfreq(side) * side
    periods = torch.hypot(down[:, None], across[None, :])
    spectra: Tensor = torch.fft.rfft2(_pooled(images, side))
    return spectra * ((periods >= low) & (periods <= high))

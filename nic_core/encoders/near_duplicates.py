"""Near-duplicates: patches that are almost identical to a patch of another split [choice].

A copy that was recompressed, brightened, shifted by a few pixels, rotated or mirrored no longer has
identical pixels, but a network trained on one copy recognises the other, which biases its scores.

1. Each patch is described by the grey means of 8 x 8 cells, minus their mean and normalised to unit
   length. For each patch and each of its 8 orientations, the nearest patch of the earlier splits is
   a candidate.
2. Candidates are compared at 128 px, band-passed between 4 and 32 periods per side (finer detail is
   noise and lost by JPEG, coarser detail is shading): find the shift of at most 8 px with the
   highest correlation, then compute the correlation on the overlap. A first comparison at 32 px,
   16 times cheaper, rejects most candidates.

Patches that are mostly empty are skipped, because empty glass with a piece of tissue in the same
corner correlates.
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

# lower limit of the correlation: other tissue is below 0.7, copies as above are above 0.75 and
# most of them above 0.9
MIN_CORRELATION = 0.75
SIDE = 128  # px at which patches are compared
MAX_SHIFT = 1 / 16  # of the side
ROUGH_SIDE, MIN_ROUGH_CORRELATION = 32, 0.4  # of the first comparison; copies have at least 0.5
BAND = (4, 32)  # periods per side
CELLS = 8  # per side
# a cell has structure if its standard deviation exceeds MIN_DEVIATION grey levels; a patch is
# compared if at least this share of its cells has structure
MIN_DEVIATION, MIN_SHARE = 5.0, 0.5
MIN_SIMILARITY = 0.6  # cosine similarity of a candidate's cell means
_BATCH = 256  # patches
_PRODUCTS = 2**24  # upper limit of similarities in memory

PAIRS_SCHEMA = {"index": pl.Int64(), "other": pl.Int64(), "correlation": pl.Float64()}


def near_duplicates(patches: NDArray[np.uint8], splits: Sequence[str]) -> pl.DataFrame:
    """Find patches of validation and test that have a near-duplicate in an earlier split.

    Parameters
    ----------
    patches : ndarray
        uint8 (N, P, P, 3); may be memory-mapped, because it is read in batches.
    splits : sequence of str
        Split of each patch, of :data:`~nic_core.encoders.splits.SPLITS`.

    Returns
    -------
    polars.DataFrame
        ``PAIRS_SCHEMA``: index of a patch of validation or test, index of the patch of an earlier
        split with the highest correlation, and this correlation (above ``MIN_CORRELATION``).
    """
    descriptors, structured = _descriptors(patches)
    order = np.array([SPLITS.index(split) for split in splits])
    pairs: list[tuple[int, int, float]] = []
    for split in range(1, len(SPLITS)):
        later = np.flatnonzero((order == split) & structured)
        earlier = np.flatnonzero((order < split) & structured)
        if len(later) and len(earlier):
            pairs += _pairs(patches, descriptors, later, earlier)
    return pl.DataFrame(pairs, schema=PAIRS_SCHEMA, orient="row").sort("index")


def _descriptors(patches: NDArray[np.uint8]) -> tuple[Tensor, NDArray[np.bool_]]:
    """Return unit vectors (N, CELLS, CELLS) of cell means, and whether each patch has structure."""
    descriptors = torch.zeros((len(patches), CELLS, CELLS))
    structured = np.zeros(len(patches), bool)
    for start in range(0, len(patches), _BATCH):
        grey = _grey(patches[start : start + _BATCH])
        mean = _pooled(grey, CELLS)
        spread = (_pooled(grey**2, CELLS) - mean**2).clamp(min=0).sqrt()
        mean = mean - mean.mean((1, 2), keepdim=True)
        descriptors[start : start + _BATCH] = F.normalize(mean.flatten(1)).reshape(mean.shape)
        share = (spread > MIN_DEVIATION).float().mean((1, 2))
        structured[start : start + _BATCH] = (share >= MIN_SHARE).numpy()
    return descriptors, structured


def _pairs(
    patches: NDArray[np.uint8],
    descriptors: Tensor,
    later: NDArray[np.intp],
    earlier: NDArray[np.intp],
) -> list[tuple[int, int, float]]:
    """Return (later, earlier, correlation) of each later patch with a near-duplicate."""
    known = descriptors[earlier].flatten(1).T.contiguous()
    best: dict[int, tuple[float, int]] = {}
    step = max(1, min(_BATCH, _PRODUCTS // len(earlier)))
    for start in range(0, len(later), step):
        rows = later[start : start + step]
        grey = _grey(patches[rows])
        for number in range(8):
            turned = _orientation(descriptors[rows], number).flatten(1)
            similarity, nearest = (turned @ known).max(1)
            chosen = np.flatnonzero((similarity > MIN_SIMILARITY).numpy())
            others = earlier[nearest.numpy()[chosen]]
            one, two = _orientation(grey[chosen], number), _grey(patches[others])
            rough = np.array(_correlations(one, two, ROUGH_SIDE))
            close = np.flatnonzero(rough > MIN_ROUGH_CORRELATION)
            chosen, others = chosen[close], others[close]
            correlations = _correlations(one[close], two[close], SIDE)
            for row, other, correlation in zip(rows[chosen], others, correlations, strict=True):
                if correlation > max(MIN_CORRELATION, best.get(row, (0.0, 0))[0]):
                    best[row] = correlation, other
    return [(int(row), int(other), correlation) for row, (correlation, other) in best.items()]


def _grey(patches: NDArray[np.uint8]) -> Tensor:
    """Convert uint8 (B, P, P, 3) to grey float32 (B, SIDE, SIDE)."""
    red, green, blue = (patches[..., channel].astype(np.uint16) for channel in range(3))
    return _pooled(torch.from_numpy((red + green + blue).astype(np.float32) / 3), SIDE)


def _pooled(images: Tensor, side: int) -> Tensor:
    """Resample (B, H, H) to (B, side, side) by means over areas, as matrix products."""
    length = images.shape[-1]
    if length == side:
        return images
    weights = torch.from_numpy(coverage(0.0, length / side, side, length).toarray())
    return weights @ images @ weights.T


def _orientation(images: Tensor, number: int) -> Tensor:
    """Return orientation ``number``, 0 to 7, of (B, H, W)."""
    images = torch.rot90(images, number % 4, (1, 2))
    return images.flip(2) if number >= 4 else images


def _correlations(one: Tensor, two: Tensor, side: int) -> list[float]:
    """Return the correlation of each pair of (B, SIDE, SIDE) on the overlap at its best shift.

    The images are compared at ``side`` px.
    """
    if not len(one):
        return []  # MKL's FFT does not accept an empty batch
    reach = round(MAX_SHIFT * side)
    first, second = _filtered(one, side), _filtered(two, side)
    surface = torch.fft.irfft2(first * second.conj(), s=(side, side))
    surface = surface.roll((reach, reach), (1, 2))[:, : 2 * reach + 1, : 2 * reach + 1]
    peak = surface.flatten(1).argmax(1)
    a, b = (torch.fft.irfft2(spectrum, s=(side, side)) for spectrum in (first, second))
    found = []
    for p, q, place in zip(a, b, peak.tolist(), strict=True):
        y, x = (shift - reach for shift in divmod(place, 2 * reach + 1))
        p, q = _overlap(p, y, x), _overlap(q, -y, -x)
        found.append(float((p * q).sum() / (p.norm() * q.norm()).clamp(min=1e-6)))
    return found


def _overlap(image: Tensor, y: int, x: int) -> Tensor:
    """Return the part of an image that another image, shifted by (y, x), overlaps."""
    height, width = image.shape
    return image[max(0, y) : height + min(0, y), max(0, x) : width + min(0, x)]


def _filtered(images: Tensor, side: int) -> Tensor:
    """Return band-passed spectra of (B, SIDE, SIDE) at ``side`` px."""
    low, high = BAND
    down, across = torch.fft.fftfreq(side) * side, torch.fft.rfftfreq(side) * side
    periods = torch.hypot(down[:, None], across[None, :])
    spectra: Tensor = torch.fft.rfft2(_pooled(images, side))
    return spectra * ((periods >= low) & (periods <= high))

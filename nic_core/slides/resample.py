"""Area resampling of pixel blocks to an exact, possibly fractional, scale.

An output pixel is the mean of the source area that it covers; border pixels are weighted by the
fraction covered. Every output pixel depends only on its own position, so a block resampled in
parts gives the same pixels as the block resampled at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from nic_core.types import Pixels

# Files round their um/px: a scale of 2.00001 means 2, and a start within 0.01 px of a whole number
# means that number.
_SCALE_ROUNDING = 1e-5
_START_ROUNDING = 1e-2
# Rows computed at a time, so that their data stay in a core's cache: output rows of weighted means,
# bytes of source rows of block means. Smaller bands of the latter are slower where many threads
# read, because they take turns with Python's lock once for each operation.
_BAND = 32
_BAND_BYTES = 3 << 19


def coverage(
    start: float,
    scale: float,
    count: int,
    length: int,
    channels: int = 1,
    *,
    step: float | None = None,
) -> sparse.csr_matrix:
    """Return the weight of each source pixel in each output pixel, along one axis.

    Output pixel ``i`` covers ``scale`` source pixels from ``start + i*step`` on. A weight is the
    fraction of that interval within the source pixel. Positions outside ``[0, length)`` have no
    weight, so a row sums to 1 inside the source and to less across its border.

    Parameters
    ----------
    start, scale : float
        Start of the first output pixel, and source px per output px; in source px.
    count, length : int
        Number of output and of source pixels.
    channels : int
        Number of channels interleaved along the axis.
    step : float, optional
        Source px from one output pixel to the next; default: ``scale``, so that they do not
        overlap.

    Returns
    -------
    scipy.sparse.csr_matrix
        float32 (count * channels, length * channels).
    """
    low = start + (scale if step is None else step) * np.arange(count)
    first = np.floor(low).astype(np.int64)
    index = first[:, None] + np.arange(int(np.ceil(scale)) + 1)
    covered = np.minimum(low[:, None] + scale, index + 1) - np.maximum(low[:, None], index)
    return _matrix(index, covered / scale, length, channels)


def _interpolation(
    start: float, scale: float, count: int, length: int, channels: int = 1
) -> sparse.csr_matrix:
    """Weights of linear interpolation between pixel centres, for ``scale`` < 1.

    Positions beyond the outermost centres take the outermost pixel.
    """
    centre = start + scale * (np.arange(count) + 0.5) - 0.5
    first = np.floor(centre).astype(np.int64)
    after = centre - first
    index = np.clip(np.stack([first, first + 1], axis=1), 0, length - 1)
    return _matrix(index, np.stack([1 - after, after], axis=1), length, channels)


def _matrix(
    index: NDArray[np.int64], weight: NDArray[np.float64], length: int, channels: int
) -> sparse.csr_matrix:
    keep = (weight > 1e-9) & (index >= 0) & (index < length)
    rows = np.broadcast_to(np.arange(len(index))[:, None], index.shape)[keep]
    channel = np.arange(channels)[:, None]
    positions = (rows * channels + channel).ravel(), (index[keep] * channels + channel).ravel()
    values = np.tile(weight[keep].astype(np.float32), channels)
    return sparse.csr_matrix((values, positions), shape=(len(index) * channels, length * channels))


def snap_to_whole(start: float, scale: float) -> tuple[float, float]:
    """Round a start and a scale that differ from a whole number only by rounding in the file.

    Parameters
    ----------
    start : float
        Source px. Rounded if the scale is whole and the start within 0.01 px of a whole number.
    scale : float
        Source px per output px. Rounded if within a relative 1e-5 of a whole number.
    """
    if abs(scale - round(scale)) <= _SCALE_ROUNDING * scale:
        scale = float(round(scale))
        if abs(start - round(start)) <= _START_ROUNDING:
            start = float(round(start))
    return start, scale


def is_whole(start: float, scale: float) -> bool:
    """Whether every output pixel is a whole block of source pixels."""
    return scale >= 1 and scale == int(scale) and start == int(start)


def resample(
    pixels: Pixels,
    start: tuple[float, float],
    scale: float,
    size: tuple[int, int],
) -> Pixels:
    """Resample a block of pixels.

    Parameters
    ----------
    pixels : uint8 (H, W, 3)
        Source block. It must cover the whole output.
    start : (float, float)
        Top-left corner (x, y) of the output, in source px relative to the block.
    scale : float
        Source px per output px. From 0.99 up the result is an area mean, below it is linearly
        interpolated.
    size : (int, int)
        Width and height of the output, px.

    Returns
    -------
    uint8 (height, width, 3)
        Values are rounded half up.
    """
    if is_whole(start[0], scale) and is_whole(start[1], scale):
        x, y, step = int(start[0]), int(start[1]), int(scale)
        width, height = size
        return block_means(pixels[y : y + height * step, x : x + width * step], step)
    return _weighted_means(pixels, start, scale, size)


def block_means(pixels: Pixels, step: int) -> Pixels:
    """Return the means of blocks of ``step`` x ``step`` px, rounded half up.

    Parameters
    ----------
    pixels : uint8 (H, W, 3)
        Rows and columns that do not fill a block are dropped.

    Returns
    -------
    uint8 (H // step, W // step, 3)
    """
    if step == 1:
        return np.ascontiguousarray(pixels)
    height, width = pixels.shape[0] // step, pixels.shape[1] // step
    pixels = np.ascontiguousarray(pixels[: height * step, : width * step])
    pixels = pixels.reshape(height * step, -1)
    result = np.empty((height, width * 3), np.uint8)
    dtype = np.dtype(np.uint16 if 256 * step**2 <= 1 << 16 else np.uint32)
    band = max(1, _BAND_BYTES // (step * max(1, pixels.shape[1])))
    for top in range(0, height, band):
        rows = pixels[top * step : (top + band) * step]
        down: NDArray[np.unsignedinteger[Any]] = rows[::step].astype(dtype)
        for i in range(1, step):
            down += rows[i::step]
        # a channel at a time: NumPy is slow on an inner axis of three elements
        for channel in range(3):
            sums = down[:, channel :: 3 * step].copy()
            for i in range(1, step):
                sums += down[:, channel + 3 * i :: 3 * step]
            sums += step**2 // 2
            sums //= step**2
            result[top : top + band, channel::3] = sums
    return result.reshape(height, width, 3)


def _weighted_means(
    pixels: Pixels, start: tuple[float, float], scale: float, size: tuple[int, int]
) -> Pixels:
    width, height = size
    weights = coverage if scale >= 0.99 else _interpolation
    across = weights(start[0], scale, width, pixels.shape[1], channels=3)
    down = weights(start[1], scale, height, pixels.shape[0])
    result = np.empty((height, width * 3), np.uint8)
    # scipy multiplies on the calling thread only, so readers in parallel do not compete for cores
    for top in range(0, height, _BAND):
        rows = down[top : top + _BAND]
        low, high = int(rows.indices.min()), int(rows.indices.max()) + 1
        band = pixels[low:high].reshape(high - low, -1).astype(np.float32)
        turned = across @ np.ascontiguousarray((rows[:, low:high] @ band).T)
        turned += 0.5
        result[top : top + _BAND] = turned.astype(np.uint8).T
    return result.reshape(height, width, 3)

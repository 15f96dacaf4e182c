"""Image quilting: a texture from overlapping square windows (Efros and Freeman, SIGGRAPH 2001).

Each window is cut along the path in its overlap on which it differs least from what is there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nic_core.types import Pixels

OVERLAP = 32  # px of two neighbouring windows
SOFT = 5  # px over which the two sides of a cut are mixed

Draw = Callable[[int, int], Pixels]


def quilt(
    where: NDArray[np.bool_], window: int, start: tuple[int, int], draw: Draw
) -> tuple[Pixels, NDArray[np.int32]]:
    """Fill a part of an image with windows.

    Parameters
    ----------
    where : bool (H, W)
        Only the windows that touch it are placed.
    window : int
        Side of a window, px.
    start : tuple of int
        Rows and columns by which the lattice of windows begins before the image, from 0 to
        ``window - OVERLAP - 1``.
    draw : callable
        Called with row and column of the lattice; returns candidates for this place, uint8
        (n, window, window, 3). The one that fits its neighbours best is used.

    Returns
    -------
    pixels : uint8 (H, W, 3)
        0 where no window is.
    places : int32 (H, W, 2)
        Row and column of the lattice from which a px is; -1 where no window is.
    """
    height, width = where.shape
    step = window - OVERLAP
    rows, columns = (-(-(n + s) // step) for n, s in zip(where.shape, start, strict=True))
    size = rows * step + OVERLAP, columns * step + OVERLAP
    canvas = np.zeros((*size, 3), np.float32)
    places = np.full((*size, 2), -1, np.int32)
    padded = np.zeros(size, np.bool_)
    padded[start[0] : start[0] + height, start[1] : start[1] + width] = where
    for row in range(rows):
        for column in range(columns):
            at = (
                slice(row * step, row * step + window),
                slice(column * step, column * step + window),
            )
            if not padded[at].any():
                continue
            there, known = canvas[at], places[at][..., 0] >= 0
            candidates = draw(row, column).astype(np.float32)
            # the upper overlap of a window is the left one of the transposed window
            left = _differences(candidates, there, known)
            upper = _differences(candidates.swapaxes(1, 2), there.swapaxes(0, 1), known.T)
            best = int((left.sum((1, 2)) + upper.sum((1, 2))).argmin())
            paths = least_paths(np.stack([left[best], upper[best]]))
            new = ~known
            middle, far = window // 2, np.arange(window) >= paths[..., None]
            new |= (far[0] | ~known[middle, 0]) & (far[1].T | ~known[0, middle])
            soft = new.astype(np.float32)
            soft = np.where(known, ndimage.uniform_filter(soft, SOFT), 1)[..., None]
            canvas[at] = there + soft * (candidates[best] - there)
            places[at][new] = row, column
    inside = (slice(start[0], start[0] + height), slice(start[1], start[1] + width))
    return np.rint(canvas[inside]).astype(np.uint8), places[inside]


def _differences(
    candidates: NDArray[np.float32], there: NDArray[np.float32], known: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Return the squared differences to what is known in the left overlap, (n, rows, OVERLAP)."""
    difference = candidates[:, :, :OVERLAP] - there[:, :OVERLAP]
    squares = np.einsum("nijc,nijc->nij", difference, difference)
    return np.asarray(squares * known[:, :OVERLAP])


def least_paths(errors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the paths from top to bottom with the least total error.

    Parameters
    ----------
    errors : float32 (n, rows, columns)
        A path through each is found.

    Returns
    -------
    int64 (n, rows)
        The column in each row; from one row to the next it changes by at most 1.
    """
    count, rows, columns = errors.shape
    total = np.full((rows, count, columns + 2), np.inf)
    total[..., 1:-1] = errors.swapaxes(0, 1)
    for row in range(1, rows):
        above = total[row - 1]
        total[row, :, 1:-1] += np.minimum(np.minimum(above[:, :-2], above[:, 1:-1]), above[:, 2:])
    paths = np.empty((count, rows), np.int64)
    steps, which = np.arange(-1, 2), np.arange(count)[:, None]
    paths[:, -1] = total[-1].argmin(1)
    for row in range(rows - 2, -1, -1):
        near = paths[:, row + 1, None] + steps
        paths[:, row] = near[which[:, 0], total[row][which, near].argmin(1)]
    return paths - 1

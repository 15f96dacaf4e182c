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
            left, upper = (
                _differences(c[:, :, :OVERLAP], o[:, :OVERLAP], k[:, :OVERLAP])
                # a window and its transposition: the upper overlap becomes the left one
                for c, o, k in (
                    (candidates, there, known),
                    (candidates.swapaxes(1, 2), there.swapaxes(0, 1), known.T),
                )
            )
            best = int((left.sum((1, 2)) + upper.sum((1, 2))).argmin())
            new = _after_cut(left[best], known) & _after_cut(upper[best], known.T).T
            new |= ~known
            soft = new.astype(np.float32)
            soft = np.where(known, ndimage.uniform_filter(soft, SOFT), 1)[..., None]
            canvas[at] = there + soft * (candidates[best] - there)
            places[at][new] = row, column
    inside = (slice(start[0], start[0] + height), slice(start[1], start[1] + width))
    return np.rint(canvas[inside]).astype(np.uint8), places[inside]


def _differences(
    candidates: NDArray[np.float32], there: NDArray[np.float32], known: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Return the squared differences (n, rows, OVERLAP) to what is known."""
    difference = candidates - there
    return np.asarray(np.einsum("nijc,nijc->nij", difference, difference) * known)


def _after_cut(error: NDArray[np.float32], known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the part of a window right of the cut in its left overlap; all without neighbour."""
    if not known[len(known) // 2, 0]:
        return np.ones(known.shape, np.bool_)
    return np.asarray(np.arange(len(known)) >= least_path(error)[:, None])


def least_path(error: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the column in each row of the path from top to bottom with the least total error.

    From one row to the next, the column changes by at most 1.
    """
    total = np.pad(error.astype(np.float64), ((0, 0), (1, 1)), constant_values=np.inf)
    for row in range(1, len(total)):
        above = total[row - 1]
        total[row, 1:-1] += np.minimum(np.minimum(above[:-2], above[1:-1]), above[2:])
    total = total[:, 1:-1]
    path = np.empty(len(total), np.int64)
    path[-1] = total[-1].argmin()
    for row in range(len(total) - 2, -1, -1):
        low = max(path[row + 1] - 1, 0)
        path[row] = low + total[row, low : path[row + 1] + 2].argmin()
    return path

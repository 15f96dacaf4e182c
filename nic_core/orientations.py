"""The eight orientations of a slide: rotations by 90 degrees and flips.

Orientation ``k`` (0 to 7) is a left-right flip if ``k >= 4``, followed by ``k % 4`` quarter turns
counter-clockwise. Orientation 0 is upright. The numbering is [choice].
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

ORIENTATIONS = 8

_Type = TypeVar("_Type", bound=np.generic)


def orient(array: NDArray[_Type], k: int, *, axes: tuple[int, int] = (-2, -1)) -> NDArray[_Type]:
    """Turn an array into orientation ``k``.

    Parameters
    ----------
    array : (..., rows, columns)
        Rows and columns may be other axes; see ``axes``.
    k : int
        0 to 7.
    axes : (int, int)
        Axes of rows and columns; (-3, -2) for images (..., H, W, 3).

    Returns
    -------
    ndarray
        A view of ``array``. The lengths of rows and columns are exchanged if ``k`` is odd.

    Raises
    ------
    ValueError
        ``k`` is not an orientation.
    """
    flipped = np.flip(array, axes[1]) if _check(k) >= 4 else array
    return np.rot90(flipped, k % 4, axes)


def undo(array: NDArray[_Type], k: int, *, axes: tuple[int, int] = (-2, -1)) -> NDArray[_Type]:
    """Turn an array from orientation ``k`` back upright; the inverse of :func:`orient`.

    Parameters and exceptions are those of :func:`orient`.
    """
    # every orientation with a flip is its own inverse
    return orient(array, k if _check(k) >= 4 else -k % 4, axes=axes)


def _check(k: int) -> int:
    if not 0 <= k < ORIENTATIONS:
        raise ValueError(f"orientation {k} does not exist; give 0 to {ORIENTATIONS - 1}")
    return k

"""The 8 orientations of a slide: rotations by 90 degrees and flips.

Orientation k, 0 to 7, is a left-right flip if ``k >= 4``, and then ``k % 4`` quarter turns
counter-clockwise. 0 is upright. The numbering is ours [choice].
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
        Or any other place of rows and columns, named by ``axes``.
    k : int
        0 to 7.
    axes : (int, int)
        Axes of rows and columns; (-3, -2) for images (..., H, W, 3).

    Returns
    -------
    A view of ``array``; rows and columns change places if ``k`` is odd.

    Raises
    ------
    ValueError
        There is no such orientation.
    """
    flipped = np.flip(array, axes[1]) if _known(k) >= 4 else array
    return np.rot90(flipped, k % 4, axes)


def undo(array: NDArray[_Type], k: int, *, axes: tuple[int, int] = (-2, -1)) -> NDArray[_Type]:
    """Turn an array in orientation ``k`` back upright; the inverse of :func:`orient`."""
    # every orientation with a flip is its own inverse
    return orient(array, k if _known(k) >= 4 else -k % 4, axes=axes)


def _known(k: int) -> int:
    if not 0 <= k < ORIENTATIONS:
        raise ValueError(f"orientation {k}: there are 0 to {ORIENTATIONS - 1}")
    return k

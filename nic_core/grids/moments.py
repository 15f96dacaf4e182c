"""Sums over the cells of grids, from which mean, variance and covariance are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nic_core.grids.chunks import tissue_blocks

_CELLS = 1 << 12  # cells whose products are summed at once


@dataclass(frozen=True)
class GridMoments:
    """Sums over the tissue cells of one or several slides.

    Attributes
    ----------
    cells : int
    total : float64 (C,)
        Sum of the embeddings.
    squares : float64 (C,)
        Sum of their squares.
    within : float64 (C, C), optional
        Sum over slides of the scatter within each: outer products of the differences from the
        slide's mean. None if it was not asked for: 2,560 numbers take 52 MB.
    """

    cells: int
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    within: NDArray[np.float64] | None = None

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean embedding (C,)."""
        return self.total / self.cells

    def __add__(self, other: GridMoments) -> GridMoments:
        """Return the moments of the slides of both; with scatter if both have it."""
        within = None
        if self.within is not None and other.within is not None:
            within = self.within + other.within
        return GridMoments(
            self.cells + other.cells,
            self.total + other.total,
            self.squares + other.squares,
            within,
        )


def grid_moments(
    slide: str, embeddings: Any, valid: NDArray[np.bool_], *, within: bool = False
) -> GridMoments:
    """Compute the moments of one slide's embeddings, a few thousand cells at a time.

    Parameters
    ----------
    slide
        Slide id, for errors.
    embeddings
        Float16 (C, rows, columns): a NumPy array, or a stored array that is read on demand.
    valid : bool (rows, columns)
    within
        Compute the scatter matrix.

    Raises
    ------
    ValueError
        The grid has no tissue cell, or an embedding is not finite.
    ChunkError
        The store is damaged.
    """
    cells, size = int(valid.sum()), embeddings.shape[0]
    if not cells:
        raise ValueError(f"slide '{slide}': its grid has no tissue cell; leave the slide out")
    total, squares = np.zeros(size), np.zeros(size)
    products = np.zeros((size, size)) if within else None
    waiting: list[NDArray[np.float64]] = []
    for _, _, found in tissue_blocks(embeddings, valid):
        for start in range(0, found.shape[1], _CELLS):
            part = found[:, start : start + _CELLS].astype(np.float64)
            total += part.sum(1)
            squares += np.einsum("cn,cn->c", part, part)
            if products is not None:
                waiting.append(part)
                # a product of few cells would spend its time on adding the matrix
                if sum(p.shape[1] for p in waiting) >= _CELLS:
                    _add_products(products, waiting)
    if products is not None:
        _add_products(products, waiting)
    if not np.isfinite(total).all():
        raise ValueError(
            f"slide '{slide}': its grid has embeddings that are not finite; compress it again"
        )
    if products is not None:
        products -= np.outer(total, total / cells)
    return GridMoments(cells, total, squares, products)


def _add_products(products: NDArray[np.float64], waiting: list[NDArray[np.float64]]) -> None:
    """Add the outer products of the waiting cells, and remove them from the list."""
    if waiting:
        part = np.concatenate(waiting, axis=1)
        products += part @ part.T
        waiting.clear()

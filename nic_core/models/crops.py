"""Grids as training data: feature statistics, normalised features, crops and orientations."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from nic_core.models.networks import SMALL_COMPONENTS, Normalise
from nic_core.orientations import ORIENTATIONS, orient

CACHE_BYTES = 1 << 30


class GridLike(Protocol):
    """What is asked of a compressed slide (:class:`nic_core.grids.Grid` has it)."""

    @property
    def codes(self) -> Any:
        """float16 (C, rows, columns): a numpy array or a zarr array that is read lazily."""

    @property
    def valid(self) -> NDArray[np.bool_]:
        """bool (rows, columns)."""


GridSource = Callable[[str], GridLike]  # slide id -> its grid


@dataclass(frozen=True)
class GridMoments:
    """Sums over the tissue cells of one slide, from which means and covariances follow."""

    cells: int
    total: NDArray[np.float64]  # (C,)
    squares: NDArray[np.float64]  # (C, C): sum of outer products

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean code (C,): the mean-pooled embedding of the slide."""
        return self.total / self.cells


def grid_moments(slide: str, grid: GridLike) -> GridMoments:
    """Moments of one slide.

    Raises
    ------
    ValueError
        No cell is tissue, or a code is not finite.
    """
    codes = np.asarray(grid.codes[:], np.float64)[:, np.asarray(grid.valid)]
    if not codes.shape[1]:
        raise ValueError(f"slide '{slide}': its grid has no tissue cell; leave the slide out")
    if not np.isfinite(codes).all():
        raise ValueError(f"slide '{slide}': its grid has codes that are not finite; compress again")
    return GridMoments(codes.shape[1], codes.sum(1), codes @ codes.T)


def fit_normalise(moments: Iterable[GridMoments], *, components: int | None) -> Normalise:
    """Normalisation learned from training slides alone [choice].

    Codes are centred by the mean over all tissue cells. Without ``components`` each is then
    divided by its standard deviation. With them, codes are projected on that many leading
    principal components of the covariance *within* slides, so that differences of stain between
    slides do not lead; each is divided by the square root of its standard deviation (relative to
    the first one's), half way between keeping their sizes and making them equal: a few rare
    tissues own the largest components, and noise the smallest.
    """
    several = list(moments)
    cells = sum(m.cells for m in several)
    mean = np.sum([m.total for m in several], axis=0) / cells
    if components is None:
        variance = np.sum([np.diag(m.squares) for m in several], axis=0) / cells - mean**2
        # a code that never varies carries nothing, however it is scaled
        weight = 1 / np.sqrt(np.maximum(variance, 1e-12))
        weight[variance < 1e-12] = 0
    else:
        within = sum(m.squares - np.outer(m.total, m.total) / m.cells for m in several) / cells
        values, vectors = np.linalg.eigh(within)
        order = np.argsort(values)[::-1][:components]
        axes = vectors[:, order]
        # eigenvectors have no sign of their own: the largest entry is made positive
        axes *= np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
        deviation = np.sqrt(np.maximum(values[order], 1e-12))
        weight = axes.T / np.sqrt(deviation * deviation[0])[:, None]
    return Normalise(
        torch.tensor(mean, dtype=torch.float32), torch.tensor(weight, dtype=torch.float32)
    )


def normalise_for(network: str, moments: Iterable[GridMoments]) -> Normalise:
    """The normalisation that a network is trained with."""
    return fit_normalise(moments, components=SMALL_COMPONENTS if network == "small" else None)


def centre_weights(valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Probability of each cell to be a crop's centre: squared distance to background [code].

    Outside of the grid counts as background.

    Returns
    -------
    float64 (rows, columns), sum 1
    """
    distance = ndimage.distance_transform_edt(np.pad(valid, 1))[1:-1, 1:-1]
    weights: NDArray[np.float64] = distance**2
    weights /= weights.sum()
    return weights


def windows(
    shape: tuple[int, ...], centre: tuple[int, int], crop: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a crop lies in a grid (rows, columns), and where the grid lies in the crop.

    The crop covers ``crop`` cells a side from ``centre - crop // 2``.
    """
    inner, outer = [], []
    for position, length in zip(centre, shape, strict=True):
        start = position - crop // 2
        low, high = max(start, 0), min(start + crop, length)
        inner.append(slice(low, high))
        outer.append(slice(low - start, high - start))
    return (inner[0], inner[1]), (outer[0], outer[1])


def cut(
    grid: NDArray[Any], centre: tuple[int, int], crop: int
) -> tuple[NDArray[Any], tuple[slice, slice]]:
    """The part of ``grid`` (C, rows, columns) under a crop, and where it lies in the crop.

    What lies outside of the grid is left to the caller to fill with 0. Only the part is read
    from a zarr array.
    """
    inner, outer = windows(grid.shape[1:], centre, crop)
    return grid[:, inner[0], inner[1]], outer


class Crops:
    """Crops of normalised features, float32 (k, crop, crop) with 0 for background.

    Features of whole slides are kept until they fill ``cache_bytes``; of the other slides each
    crop reads its window alone, so memory is bounded whatever the cohort.
    """

    def __init__(
        self,
        grids: GridSource,
        normalise: Normalise,
        crop: int,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._grids = grids
        self._normalise = normalise
        self._crop = crop
        self._room = cache_bytes
        self._whole: dict[str, NDArray[np.float32]] = {}
        self._centres = lru_cache(maxsize=256)(self._centre_table)

    @property
    def bytes(self) -> int:
        """Size of one crop."""
        return 4 * self._normalise.channels * self._crop**2

    def draw(self, slide: str, random: np.random.Generator) -> NDArray[np.float32]:
        """A crop about a random centre in a random orientation.

        A grid that fits into the crop along an axis is shifted in it but never cut.
        """
        return self.at(slide, self._centre(slide, random), int(random.integers(ORIENTATIONS)))

    def fixed(self, slide: str, count: int, seed: int) -> list[tuple[int, int]]:
        """Centres that depend on the slide's id and the seed alone."""
        random = np.random.default_rng([seed, zlib.crc32(slide.encode())])
        return [self._centre(slide, random) for _ in range(count)]

    def at(self, slide: str, centre: tuple[int, int], orientation: int) -> NDArray[np.float32]:
        """The crop about a cell (row, column), turned; the *grid* is, not the pixels in a patch."""
        whole = self._features(slide)
        if whole is None:
            window, place = cut(self._grids(slide).codes, centre, self._crop)
            window = self._apply(window)
        else:
            window, place = cut(whole, centre, self._crop)
        out = np.zeros((len(window), self._crop, self._crop), np.float32)
        out[:, place[0], place[1]] = window
        return orient(out, orientation)

    def _features(self, slide: str) -> NDArray[np.float32] | None:
        if slide not in self._whole:
            grid = self._grids(slide)
            size = 4 * self._normalise.channels * grid.valid.size
            if size > self._room:
                return None
            self._room -= size
            self._whole[slide] = self._apply(grid.codes[:])
        return self._whole[slide]

    def _apply(self, codes: NDArray[Any]) -> NDArray[np.float32]:
        with torch.no_grad():
            features = self._normalise(torch.from_numpy(np.asarray(codes, np.float32))[None])
        out: NDArray[np.float32] = features[0].numpy()
        return out

    def _centre_table(self, slide: str) -> tuple[NDArray[np.float64], int]:
        weights = centre_weights(np.asarray(self._grids(slide).valid))
        return np.cumsum(weights), weights.shape[1]

    def _centre(self, slide: str, random: np.random.Generator) -> tuple[int, int]:
        cumulative, columns = self._centres(slide)
        cell = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
        rows = len(cumulative) // columns
        return (
            _keep_whole(cell // columns, rows, self._crop),
            _keep_whole(cell % columns, columns, self._crop),
        )


def _keep_whole(centre: int, length: int, crop: int) -> int:
    """The centre, moved so far that an axis that fits into the crop is not cut [choice]."""
    if length > crop:
        return centre
    return min(max(centre, length - crop + crop // 2), crop // 2)


def all_moments(slides: Iterable[str], grids: GridSource) -> Mapping[str, GridMoments]:
    """Moments of every slide, one grid in memory at a time."""
    return {slide: grid_moments(slide, grids(slide)) for slide in slides}

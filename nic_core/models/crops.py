"""Grids as training data (paper B): normalisation of features, crops and orientations.

Crop centres are drawn with probability proportional to the squared distance to background
[code]; crops are padded with 0 (paper B). Normalisation of features and feature noise are [choice].
Memory is bounded: grids that do not fit into the cache are read chunk by chunk.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock
from typing import Any, Protocol, TypeVar

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from nic_core.cohort import NetworkName
from nic_core.grids.chunks import Window, chunk_windows, read_chunk
from nic_core.grids.moments import GridMoments, grid_moments
from nic_core.models.networks import Normalise, component_count, occupied
from nic_core.orientations import ORIENTATIONS, undo
from nic_core.parallel import cores

CACHE_BYTES = 1 << 30
SMALL_CROP = 100  # cells a side; up to this size one thread is as fast as several

_Item = TypeVar("_Item")


class GridData(Protocol):
    """The members of a grid that models use; :class:`nic_core.grids.Grid` has them."""

    @property
    def embeddings(self) -> Any:
        """Embeddings float16 (C, rows, columns): a numpy array, or a zarr array read on demand."""

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Cells with an embedding, bool (rows, columns)."""

    @property
    def orientations(self) -> Any:
        """Embeddings in all 8 orientations; None if only the upright slide was compressed."""

    def oriented(self, k: int) -> Any:
        """Embeddings of orientation ``k``, placed at the upright cells like ``embeddings``."""


GridSource = Callable[[str], GridData]  # slide id to its grid
View = tuple[str, tuple[int, int], int]  # slide id, centre cell (row, column), orientation
_Block = tuple[Window, NDArray[np.float32] | None]  # cells; features, None: not cached or all 0


@dataclass(frozen=True)
class CohortMoments:
    """Moments of the slides of a cohort.

    Attributes
    ----------
    slides
        Slide id to its moments, without scatter matrix.
    groups
        Group of units (a fold) to the sum of the moments of its slides. The scatter matrices are
        summed because one matrix a slide would not fit into memory: 600 of 2,560 numbers are 31 GB.
    """

    slides: Mapping[str, GridMoments]
    groups: Mapping[int, GridMoments]


def cohort_moments(
    units: pl.DataFrame, grids: GridSource, *, components: int | None
) -> CohortMoments:
    """Compute the moments of the slides of all units; each grid is read once.

    Parameters
    ----------
    units
        With the columns ``slides`` (list of ids) and ``fold`` (null: in no group).
    grids
        Opens the grid of a slide.
    components
        Number of principal components of the normalisation; None: scatter is not needed.

    Raises
    ------
    ValueError
        A grid has no tissue cell, or an embedding that is not finite.
    """
    slides: dict[str, GridMoments] = {}
    groups: dict[int, GridMoments] = {}
    rows = units.select(pl.col("slides").alias("slide"), "fold").explode("slide")
    for (slide,), folds in rows.group_by("slide", maintain_order=True):
        used = folds["fold"].drop_nulls().to_list()
        grid = grids(str(slide))
        found = grid_moments(
            str(slide),
            grid.embeddings,
            np.asarray(grid.valid),
            within=components is not None and bool(used),
        )
        slides[str(slide)] = replace(found, within=None)
        # a slide of several units counts once for each
        for fold in used:
            groups[fold] = groups[fold] + found if fold in groups else found
    return CohortMoments(slides, groups)


def fit_normalise(moments: Iterable[GridMoments], *, components: int | None) -> Normalise:
    """Estimate the normalisation of embeddings from training slides [choice].

    Embeddings are centred by the mean over all tissue cells. Without ``components``, each number
    is divided by its standard deviation. With ``components``, embeddings are projected on the
    leading principal components of the covariance *within* slides, so that differences in stain
    between slides do not dominate. Each component is divided by the square root of its standard
    deviation, relative to the first component's. This is half way between keeping the variances
    and making them equal: the largest components may come from a few rare tissues, the smallest
    are mostly noise.

    Parameters
    ----------
    moments
        Moments of the training slides, or of groups of them.
    components
        Number of principal components; None: no projection.

    Raises
    ------
    ValueError
        ``components`` is given, and moments have no scatter matrix.
    """
    several = list(moments)
    cells = sum(m.cells for m in several)
    mean = np.sum([m.total for m in several], axis=0) / cells
    if components is None:
        variance = np.sum([m.squares for m in several], axis=0) / cells - mean**2
        weight = 1 / np.sqrt(np.maximum(variance, 1e-12))
        # a constant number carries no information and must not be scaled up
        weight[variance < 1e-12] = 0
    else:
        within = np.zeros((len(mean), len(mean)))
        for m in several:
            if m.within is None:
                raise ValueError("principal components need moments with a scatter matrix")
            within += m.within
        values, vectors = np.linalg.eigh(within / cells)
        order = np.argsort(values)[::-1][:components]
        axes = vectors[:, order]
        # the sign of an eigenvector is arbitrary: the largest entry is made positive
        axes *= np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
        deviation = np.sqrt(np.maximum(values[order], 1e-12))
        weight = axes.T / np.sqrt(deviation * deviation[0])[:, None]
    return Normalise(
        torch.tensor(mean, dtype=torch.float32), torch.tensor(weight, dtype=torch.float32)
    )


def normalise_for(network: NetworkName, moments: Iterable[GridMoments]) -> Normalise:
    """Estimate the normalisation that a network is trained with."""
    return fit_normalise(moments, components=component_count(network))


def centre_weights(valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the probability of each cell to be the centre of a crop.

    It is proportional to the squared distance to background [code]. Cells outside of the grid
    count as background.

    Parameters
    ----------
    valid : bool (rows, columns)

    Returns
    -------
    float64 (rows, columns), sum 1
    """
    distance = ndimage.distance_transform_edt(np.pad(valid, 1))[1:-1, 1:-1]
    weights: NDArray[np.float64] = distance**2
    weights /= weights.sum()
    return weights


def crop_windows(
    shape: tuple[int, ...], centre: tuple[int, int], crop: int
) -> tuple[Window, Window]:
    """Return the part of a grid that a crop covers: its cells in the grid, and in the crop.

    The crop covers ``crop`` cells a side, from ``centre - crop // 2`` on.

    Parameters
    ----------
    shape
        Rows and columns of the grid.
    centre
        Cell (row, column) of the grid.
    crop
        Cells a side.
    """
    in_grid, in_crop = [], []
    for position, length in zip(centre, shape, strict=True):
        start = position - crop // 2
        low, high = max(start, 0), min(start + crop, length)
        in_grid.append(slice(low, high))
        in_crop.append(slice(low - start, high - start))
    return (in_grid[0], in_grid[1]), (in_crop[0], in_crop[1])


def _intersection(first: Window, second: Window) -> tuple[Window, Window]:
    """Return the cells that two windows share, relative to the first and to the second."""
    in_first, in_second = [], []
    for one, other in zip(first, second, strict=True):
        low = max(one.start, other.start)
        high = max(low, min(one.stop, other.stop))
        in_first.append(slice(low - one.start, high - one.start))
        in_second.append(slice(low - other.start, high - other.start))
    return (in_first[0], in_first[1]), (in_second[0], in_second[1])


class _Buffer:
    """Memory that arrays share one after the other; allocation costs more than the arithmetic."""

    def __init__(self, *, pinned: bool = False) -> None:
        self._memory = np.empty(0, np.float32)
        self._pinned = pinned

    def array(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return an array of that shape, which is valid until the next call."""
        size = math.prod(shape)
        if size > len(self._memory):
            self._memory = (
                torch.empty(size, pin_memory=True).numpy()
                if self._pinned
                else np.empty(size, np.float32)
            )
        return self._memory[:size].reshape(shape)


class Crops:
    """Crops of normalised features, float32 (k, crop, crop), 0 in background.

    Features of whole slides are cached until they fill ``cache_bytes``. For other slides, each
    crop reads the blocks of its window that have tissue, one after the other. So memory is bounded
    for cohorts of any size.

    Orientation ``k`` of a crop uses the stored embeddings of rotated and flipped pixels if the
    grid has them (paper B). Otherwise the grid of upright embeddings is rotated and flipped,
    which is cheaper and not the same: a rotated patch has another embedding.

    Parameters
    ----------
    grids
        Opens the grid of a slide.
    normalise
        Normalisation from embeddings to features.
    crop
        Cells a side.
    cache_bytes
        Limit of the cache, in bytes.
    pinned
        :meth:`load` uses page-locked memory, from which a GPU copies asynchronously. The copy must
        be complete before the next batch is requested.
    """

    def __init__(
        self,
        grids: GridSource,
        normalise: Normalise,
        crop: int,
        *,
        cache_bytes: int = CACHE_BYTES,
        pinned: bool = False,
    ) -> None:
        self._normalise = normalise
        self._crop = crop
        self._free_bytes = cache_bytes
        self._buffers = _Buffer(pinned=pinned), _Buffer(pinned=pinned)
        self._cache: dict[tuple[str, int], list[_Block]] = {}
        self._reserved: set[tuple[str, int]] = set()
        self._reservation = Lock()
        self._open = lru_cache(maxsize=64)(grids)
        self._centres = lru_cache(maxsize=64)(self._centre_table)
        self._mean = normalise.mean.cpu().numpy()[:, None, None]
        self._weight = normalise.weight.cpu().numpy()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one crop: (k, crop, crop)."""
        return self._normalise.channels, self._crop, self._crop

    def random_view(self, slide: str, random: np.random.Generator) -> View:
        """Return a view of a slide with random centre and orientation.

        A grid that fits into the crop along an axis is shifted in the crop but never cut.
        """
        return slide, self._centre(slide, random), int(random.integers(ORIENTATIONS))

    def fixed_centres(self, slide: str, count: int, seed: int) -> list[tuple[int, int]]:
        """Return ``count`` centres that depend on the slide's id and the seed only.

        Grids of one slide with other cells give nearly the same places on the slide, because rows
        and columns are drawn from the distribution of tissue along each axis [choice].
        """
        random = np.random.default_rng([seed, zlib.crc32(slide.encode())])
        return [self._centre(slide, random) for _ in range(count)]

    def load(
        self, batches: Iterable[tuple[_Item, Sequence[View]]]
    ) -> Iterator[tuple[_Item, NDArray[np.float32]]]:
        """Yield the crops of each batch of views, float32 (views, k, crop, crop).

        The next batch is loaded while the caller uses this one; large crops are loaded by one
        thread per core. Two arrays are used in turn: a batch is valid until the next is
        requested. Only one such iterator may be active at a time.

        Parameters
        ----------
        batches
            Pairs of any object, which is yielded with the crops, and views.
        """
        workers = 1 if self._crop <= SMALL_CROP else cores()

        def loaded() -> Iterator[tuple[_Item, NDArray[np.float32]]]:
            with ThreadPoolExecutor(workers, thread_name_prefix="crops") as pool:
                for i, (item, views) in enumerate(batches):
                    features = self._buffers[i % 2].array((len(views), *self.shape))
                    each = map if workers == 1 else pool.map
                    list(each(self._write_crop, views, features))
                    yield item, features

        return prefetch(loaded())

    def crop_at(self, slide: str, centre: tuple[int, int], orientation: int) -> NDArray[np.float32]:
        """Return the crop around a cell (row, column) of the upright grid, in an orientation."""
        out = np.empty(self.shape, np.float32)
        self._write_crop((slide, centre, orientation), out)
        return out

    def _write_crop(self, view: View, out: NDArray[np.float32]) -> None:
        """Fill ``out`` (k, crop, crop) with the crop of a view."""
        slide, centre, orientation = view
        grid = self._open(slide)
        valid = np.asarray(grid.valid)
        in_grid, in_crop = crop_windows(valid.shape, centre, self._crop)
        stored = orientation if grid.orientations is not None else 0
        upright = undo(out, orientation)[:, in_crop[0], in_crop[1]]
        if upright.shape != out.shape:
            out.fill(0)
        embeddings, buffer = grid.oriented(stored), _Buffer()
        cached = self._cached(slide, stored, grid)
        parts = cached or [(cells, None) for cells in chunk_windows(embeddings, in_grid)]
        for cells, features in parts:
            source, destination = _intersection(cells, in_grid)
            part = upright[:, destination[0], destination[1]]
            if features is not None:
                np.copyto(part, features[:, source[0], source[1]])
            elif valid[cells].any():
                block = read_chunk(embeddings, cells)[:, source[0], source[1]]
                self._write_features(block, part, buffer)
            else:
                part.fill(0)

    def _cached(self, slide: str, stored: int, grid: GridData) -> list[_Block] | None:
        """Return the features of a whole slide in a stored orientation, if the cache has room."""
        key = slide, stored
        if key in self._cache:
            return self._cache[key]
        embeddings, valid = grid.oriented(stored), np.asarray(grid.valid)
        rows, columns = valid.shape
        blocks = list(chunk_windows(embeddings, (slice(0, rows), slice(0, columns))))
        tissue = [cells for cells in blocks if valid[cells].any()]
        size = 4 * self._normalise.channels * sum(valid[cells].size for cells in tissue)
        with self._reservation:
            if key in self._reserved or size > self._free_bytes:
                return None  # another thread is loading the slide, or the cache is full
            self._reserved.add(key)
            self._free_bytes -= size
        whole: list[_Block] = [(cells, None) for cells in blocks if not valid[cells].any()]
        buffer = _Buffer()
        for cells in tissue:
            features = np.empty((self._normalise.channels, *valid[cells].shape), np.float32)
            self._write_features(read_chunk(embeddings, cells), features, buffer)
            whole.append((cells, features))
        self._cache[key] = whole
        return whole

    def _write_features(
        self, embeddings: NDArray[Any], out: NDArray[np.float32], buffer: _Buffer
    ) -> None:
        """Apply :class:`Normalise` to embeddings (C, rows, columns); write (k, rows, columns).

        numpy is used because torch's threads are busy with the network at the same time.
        """
        cells = buffer.array(embeddings.shape)
        np.copyto(cells, embeddings)
        # as in Normalise: an embedding of 0 counts as background; the mask ignores the sign of -0
        nonzero = (np.bitwise_or.reduce(cells.view(np.uint32)) & 0x7FFFFFFF) != 0
        cells -= self._mean
        if self._weight.ndim == 1:
            cells *= self._weight[:, None, None]
        else:
            cells = (self._weight @ cells.reshape(len(embeddings), -1)).reshape(out.shape)
        if not nonzero.all():
            cells *= nonzero.astype(np.float32)
        np.copyto(out, cells)  # out may be a transposed view: one copy is faster than arithmetic

    def _centre_table(self, slide: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the cumulative weights of a slide's rows, and of the cells of each row."""
        weights = centre_weights(np.asarray(self._open(slide).valid))
        return np.cumsum(weights.sum(1)), np.cumsum(weights, axis=1)

    def _centre(self, slide: str, random: np.random.Generator) -> tuple[int, int]:
        """Draw a centre (row, column): first the row, then a cell of this row."""
        rows, cells = self._centres(slide)
        row = _draw(rows, random)
        column = _draw(cells[row], random)
        return (
            _keep_whole(row, cells.shape[0], self._crop),
            _keep_whole(column, cells.shape[1], self._crop),
        )


def _draw(cumulative: NDArray[np.float64], random: np.random.Generator) -> int:
    """Draw a position by its cumulative weights; one of weight 0 is never drawn."""
    return int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))


def _keep_whole(centre: int, length: int, crop: int) -> int:
    """Shift a centre so that an axis that fits into the crop is not cut [choice]."""
    if length > crop:
        return centre
    return min(max(centre, length - crop + crop // 2), crop // 2)


def augment_features(
    features: Tensor, *, noise: float, dropout: float, generator: torch.Generator | None = None
) -> Tensor:
    """Add noise and dropout to features (B, k, rows, columns) [choice]; background stays 0.

    Parameters
    ----------
    noise
        Standard deviation of normal noise on each feature of each tissue cell.
    dropout
        Probability that a feature is 0 in a whole crop; the others are divided by 1 - dropout.
    """
    tissue = occupied(features)
    if noise:
        drawn = torch.randn(
            features.shape, generator=generator, dtype=features.dtype, device=features.device
        )
        features = features + noise * drawn * tissue
    if dropout:
        kept = (
            torch.rand(features.shape[:2], generator=generator, device=features.device) >= dropout
        )
        features = features * (kept[:, :, None, None] / (1 - dropout))
    return features


def prefetch(items: Iterator[_Item]) -> Iterator[_Item]:
    """Yield the items of an iterator; a thread computes the next while the caller uses this one."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        following = pool.submit(next, items, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, items, end)
            yield item  # type: ignore[misc]

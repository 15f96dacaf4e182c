"""Grids as training data: feature statistics, normalised features, crops and orientations."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from nic_core.cohort import NetworkName
from nic_core.grids.chunks import StoredEmbeddings, Window
from nic_core.grids.orientations import ORIENTATIONS, undo
from nic_core.models.networks import Normalise, component_count, occupied
from nic_core.parallel import cores

CACHE_BYTES = 1 << 30
SMALL_CROP = 100  # cells a side up to which one thread is as fast as several
_BLOCK = 1 << 14  # cells whose moments are summed at once

_Item = TypeVar("_Item")


class GridLike(Protocol):
    """What is asked of a compressed slide (:class:`nic_core.grids.Grid` has it)."""

    @property
    def embeddings(self) -> Any:
        """float16 (C, rows, columns): a numpy array or a zarr array that is read lazily."""

    @property
    def valid(self) -> NDArray[np.bool_]:
        """bool (rows, columns)."""

    @property
    def orientations(self) -> Any:
        """Embeddings of all 8 orientations, or None where the slide was compressed upright alone."""

    def oriented(self, k: int) -> Any:
        """Embeddings of orientation ``k`` at the upright cells, like ``embeddings``."""


GridSource = Callable[[str], GridLike]  # slide id -> its grid
View = tuple[str, tuple[int, int], int]  # slide, centre, orientation
_Block = tuple[Window, NDArray[np.float32] | None]  # cells, their features; None: not held or 0


@dataclass(frozen=True)
class GridMoments:
    """Sums over the tissue cells of one slide, from which means and covariances follow."""

    cells: int
    total: NDArray[np.float64]  # (C,)
    squares: NDArray[np.float64]  # (C, C): sum of outer products

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean embedding (C,): the mean-pooled embedding of the slide."""
        return self.total / self.cells


def grid_moments(slide: str, grid: GridLike) -> GridMoments:
    """Moments of one slide.

    Raises
    ------
    ValueError
        No cell is tissue, or a embedding is not finite.
    """
    cells = np.asarray(grid.embeddings[:])[:, np.asarray(grid.valid)]
    if not cells.shape[1]:
        raise ValueError(f"slide '{slide}': its grid has no tissue cell; leave the slide out")
    total, squares = np.zeros(len(cells)), np.zeros((len(cells), len(cells)))
    for start in range(0, cells.shape[1], _BLOCK):
        embeddings = cells[:, start : start + _BLOCK].astype(np.float64)
        total += embeddings.sum(1)
        squares += embeddings @ embeddings.T
    if not np.isfinite(total).all():
        raise ValueError(
            f"slide '{slide}': its grid has embeddings that are not finite; compress again"
        )
    return GridMoments(cells.shape[1], total, squares)


def fit_normalise(moments: Iterable[GridMoments], *, components: int | None) -> Normalise:
    """Normalisation learned from training slides alone [choice].

    Embeddings are centred by the mean over all tissue cells. Without ``components`` each is then
    divided by its standard deviation. With them, embeddings are projected on that many leading
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
        # a embedding that never varies carries nothing, however it is scaled
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


def normalise_for(network: NetworkName, moments: Iterable[GridMoments]) -> Normalise:
    """The normalisation that a network is trained with."""
    return fit_normalise(moments, components=component_count(network))


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


def windows(shape: tuple[int, ...], centre: tuple[int, int], crop: int) -> tuple[Window, Window]:
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


def overlap(cells: Window, window: Window) -> tuple[Window, Window]:
    """Where two windows of a grid meet, counted in the first and in the second."""
    within, there = [], []
    for one, other in zip(cells, window, strict=True):
        low = max(one.start, other.start)
        high = max(low, min(one.stop, other.stop))
        within.append(slice(low - one.start, high - one.start))
        there.append(slice(low - other.start, high - other.start))
    return (within[0], within[1]), (there[0], there[1])


def _blocks(embeddings: Any, window: Window) -> Iterable[Window]:
    """What is read together of a window: the chunks of a store, else all of it."""
    return embeddings.blocks(window) if isinstance(embeddings, StoredEmbeddings) else [window]


def _read(embeddings: Any, cells: Window) -> NDArray[Any]:
    """One of the :func:`_blocks`."""
    if isinstance(embeddings, StoredEmbeddings):
        return embeddings.block(cells)
    return np.asarray(embeddings[:, cells[0], cells[1]])


class _Room:
    """Memory for one block after another: new memory costs more than what is done in it."""

    def __init__(self, *, pinned: bool = False) -> None:
        self._held = np.empty(0, np.float32)
        self._pinned = pinned

    def of(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        size = math.prod(shape)
        if size > len(self._held):
            self._held = (
                torch.empty(size, pin_memory=True).numpy()
                if self._pinned
                else np.empty(size, np.float32)
            )
        return self._held[:size].reshape(shape)


class Crops:
    """Crops of normalised features, float32 (k, crop, crop) with 0 for background.

    Blocks of features of whole slides are kept until they fill ``cache_bytes``; of the other
    slides each crop reads the blocks with tissue in its window, one after another, so memory is
    bounded whatever the cohort.

    Orientation ``k`` of a crop has the embeddings of the turned pixels where the grid holds them
    (B); of other grids the upright embeddings are turned, which is cheaper and not the same: a turned
    patch has another embedding.

    ``pinned``: those of :meth:`ahead` lie in page-locked memory, from which a GPU copies while the
    caller goes on; it must be through before the next are asked for.
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
        self._room = cache_bytes
        self._rooms = _Room(pinned=pinned), _Room(pinned=pinned)
        self._whole: dict[tuple[str, int], list[_Block]] = {}
        self._reserved: set[tuple[str, int]] = set()
        self._reserving = Lock()
        self._open = lru_cache(maxsize=64)(grids)
        self._centres = lru_cache(maxsize=64)(self._centre_table)
        self._mean = normalise.mean.cpu().numpy()[:, None, None]
        self._weight = normalise.weight.cpu().numpy()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one crop: (k, crop, crop)."""
        return self._normalise.channels, self._crop, self._crop

    def draw(self, slide: str, random: np.random.Generator) -> View:
        """A random centre in a random orientation.

        A grid that fits into the crop along an axis is shifted in it but never cut.
        """
        return slide, self._centre(slide, random), int(random.integers(ORIENTATIONS))

    def fixed(self, slide: str, count: int, seed: int) -> list[tuple[int, int]]:
        """Centres that depend on the slide's id and the seed alone."""
        random = np.random.default_rng([seed, zlib.crc32(slide.encode())])
        return [self._centre(slide, random) for _ in range(count)]

    def ahead(
        self, batches: Iterable[tuple[_Item, Sequence[View]]]
    ) -> Iterator[tuple[_Item, NDArray[np.float32]]]:
        """The crops of several views after those of several others, (views, k, crop, crop), each
        with what came with the views; large crops by a thread a core.

        The next ones are made while the caller works on these, in two arrays in turn: what is
        given is good until the next is asked for. One such iterator at a time.
        """
        workers = 1 if self._crop <= SMALL_CROP else cores()

        def made() -> Iterator[tuple[_Item, NDArray[np.float32]]]:
            with ThreadPoolExecutor(workers, thread_name_prefix="crops") as pool:
                for i, (item, views) in enumerate(batches):
                    features = self._rooms[i % 2].of((len(views), *self.shape))
                    each = map if workers == 1 else pool.map
                    list(each(self._put, views, features))
                    yield item, features

        return prefetch(made())

    def at(self, slide: str, centre: tuple[int, int], orientation: int) -> NDArray[np.float32]:
        """The crop about a cell (row, column) of the upright grid, turned."""
        out = np.empty(self.shape, np.float32)
        self._put((slide, centre, orientation), out)
        return out

    def _put(self, view: View, out: NDArray[np.float32]) -> None:
        """Write a crop, all of it, into ``out`` (k, crop, crop)."""
        slide, centre, orientation = view
        grid = self._open(slide)
        valid = np.asarray(grid.valid)
        inner, place = windows(valid.shape, centre, self._crop)
        stored = orientation if grid.orientations is not None else 0
        shown = undo(out, orientation)[:, place[0], place[1]]
        if shown.shape != out.shape:
            out.fill(0)
        embeddings, room = grid.oriented(stored), _Room()
        kept = self._kept(slide, stored, grid)
        for cells, features in kept or [(cells, None) for cells in _blocks(embeddings, inner)]:
            here, there = overlap(cells, inner)
            part = shown[:, there[0], there[1]]
            if features is not None:
                np.copyto(part, features[:, here[0], here[1]])
            elif valid[cells].any():
                self._apply(_read(embeddings, cells)[:, here[0], here[1]], part, room)
            else:
                part.fill(0)

    def _kept(self, slide: str, stored: int, grid: GridLike) -> list[_Block] | None:
        """A whole slide, of a stored orientation, if there is room for its features."""
        key = slide, stored
        if key in self._whole:
            return self._whole[key]
        embeddings, valid = grid.oriented(stored), np.asarray(grid.valid)
        rows, columns = valid.shape
        blocks = list(_blocks(embeddings, (slice(0, rows), slice(0, columns))))
        tissue = [cells for cells in blocks if valid[cells].any()]
        size = 4 * self._normalise.channels * sum(valid[cells].size for cells in tissue)
        with self._reserving:
            if key in self._reserved or size > self._room:
                return None  # another thread is at it, or there is no room
            self._reserved.add(key)
            self._room -= size
        whole: list[_Block] = [(cells, None) for cells in blocks if not valid[cells].any()]
        room = _Room()
        for cells in tissue:
            features = np.empty((self._normalise.channels, *valid[cells].shape), np.float32)
            self._apply(_read(embeddings, cells), features, room)
            whole.append((cells, features))
        self._whole[key] = whole
        return whole

    def _apply(self, embeddings: NDArray[Any], out: NDArray[np.float32], room: _Room) -> None:
        """What :class:`Normalise` does, of embeddings (C, rows, columns) to features (k, rows,
        columns), and without torch's threads, which the network is using meanwhile."""
        cells = room.of(embeddings.shape)
        np.copyto(cells, embeddings)
        # as the network sees it, should a tissue cell have the embedding 0 (or -0: but for the sign)
        occupied = (np.bitwise_or.reduce(cells.view(np.uint32)) & 0x7FFFFFFF) != 0
        cells -= self._mean
        if self._weight.ndim == 1:
            cells *= self._weight[:, None, None]
        else:
            cells = (self._weight @ cells.reshape(len(embeddings), -1)).reshape(out.shape)
        if not occupied.all():
            cells *= occupied.astype(np.float32)
        np.copyto(out, cells)  # faster, where it is turned, than to compute into it

    def _centre_table(self, slide: str) -> tuple[NDArray[np.float64], int]:
        weights = centre_weights(np.asarray(self._open(slide).valid))
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


def disturb(
    features: Tensor, *, noise: float, dropout: float, generator: torch.Generator | None = None
) -> Tensor:
    """Augmented features (B, k, rows, columns) [choice]; background stays 0.

    Parameters
    ----------
    noise
        Deviation of normal noise on each feature of each tissue cell.
    dropout
        Probability that a feature is 0 in all of a crop; the others are divided by 1 - dropout.
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
    """The same items; a thread makes the next one while the caller works on this one."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def all_moments(slides: Iterable[str], grids: GridSource) -> Mapping[str, GridMoments]:
    """Moments of every slide, one grid in memory at a time."""
    return {slide: grid_moments(slide, grids(slide)) for slide in slides}

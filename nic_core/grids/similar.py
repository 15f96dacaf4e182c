"""Search by content: the cells of all grids of an encoder that are most similar to one cell.

The similarity of two cells is the cosine of their embeddings after the mean embedding of all cells
is subtracted [choice]. Embeddings of one encoder have a large part in common, so that without the
subtraction almost all cosines are near 1, and it is this part that they compare.

The search is exact: the cosine is computed, in float32, for every cell. For this an index holds
the embeddings of all grids as unit vectors, in a folder:

- ``vectors.npy``: float32 (cells, C), read through a memory map; all 0 for a cell whose embedding
  is the mean;
- ``places.npy``: int32 (cells, 2), row and column of each cell in its grid;
- ``slides.parquet``: a row for each slide in the order of the cells (:data:`SLIDES_SCHEMA`);
- ``index.json``: the key that the index was made for, and patch and stride of the grids.

float32 takes twice the room of float16, but processors multiply it several times faster, and
nothing is rounded (`benchmarks/similar.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from nic_core.grids.chunks import tissue_blocks
from nic_core.grids.moments import grid_moments
from nic_core.grids.store import Grid, GridError, open_grid
from nic_core.store import atomic_folder

INDEX_FORMAT = 1
VECTORS, PLACES, SLIDES, ABOUT = "vectors.npy", "places.npy", "slides.parquet", "index.json"
SLIDES_SCHEMA = pl.Schema(
    {
        "slide": pl.String(),
        "cells": pl.Int64(),
        "cell": pl.Float64(),  # side of a cell, level-0 px
        "x": pl.Float64(),  # top-left corner of cell (0, 0), level-0 px
        "y": pl.Float64(),
    }
)
PER_SLIDE = 3
"""Cells that a search returns from one slide at most, by default [choice]."""

Vectors = NDArray[np.float32]


class _About(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    key: str
    patch: PositiveInt
    stride: PositiveInt


@dataclass(frozen=True)
class CellIndex:
    """The unit vectors of all cells of an encoder's grids.

    Attributes
    ----------
    vectors : float32 (cells, C)
        Memory-mapped.
    places : int32 (cells, 2)
        Row and column of each cell in the grid of its slide.
    slides : polars.DataFrame
        :data:`SLIDES_SCHEMA`; the cells of a slide follow each other in this order.
    starts : int64 (slides + 1,)
        First cell of each slide; the last value is the number of cells.
    patch, stride : int
        Side of a patch and of a cell, px of the encoder's input.
    """

    vectors: Vectors
    places: NDArray[np.int32]
    slides: pl.DataFrame
    starts: NDArray[np.int64]
    patch: int
    stride: int

    @property
    def apart(self) -> int:
        """Least distance in rows or columns at which two patches neither overlap nor touch."""
        return -(-self.patch // self.stride) + 1

    def slide_of(self, cell: int) -> int:
        """Return the number of the slide of a cell: its row of :attr:`slides`."""
        return int(np.searchsorted(self.starts, cell, side="right")) - 1

    def position(self, slide: str, row: int, column: int) -> int:
        """Return the position of a cell in :attr:`vectors`.

        Raises
        ------
        KeyError
            The index has no such slide, or its grid no embedding at this cell.
        """
        number = self.slides["slide"].index_of(slide)
        if number is None:
            raise KeyError(f"slide '{slide}' has no grid in the index")
        start = int(self.starts[number])
        places = self.places[start : self.starts[number + 1]]
        found = np.flatnonzero((places == (row, column)).all(axis=1))
        if not len(found):
            raise KeyError(f"slide '{slide}': no embedding at row {row}, column {column}")
        return start + int(found[0])


@dataclass(frozen=True)
class SimilarCell:
    """A cell that a search found.

    Attributes
    ----------
    slide : str
    row, column : int
        Its place in the slide's grid.
    x, y : float
        Its centre, level-0 px.
    size : float
        Side of its patch, level-0 px. The patch has the cell's centre.
    similarity : float
        -1 to 1.
    """

    slide: str
    row: int
    column: int
    x: float
    y: float
    size: float
    similarity: float


def write_index(folder: Path, key: str, grids: Mapping[str, Path]) -> None:
    """Write the index of grids atomically; an existing one is replaced.

    The grids are read twice, one chunk at a time: for the mean, and for the vectors.

    Parameters
    ----------
    key : str
        States what the index is made of; :func:`open_index` compares it.
    grids : mapping of str to Path
        Slide id to grid store, at least one. All grids are of one encoder and have cells.

    Raises
    ------
    GridError
        A grid cannot be opened, or grids are of different weights, patches or strides.
    ValueError
        A grid has no cell.
    ChunkError
        A grid is damaged.
    StoreError
        The folder cannot be written.
    """
    opened = {slide: open_grid(path) for slide, path in grids.items()}
    first = next(iter(opened.values()))
    for slide, grid in opened.items():
        if _made_by(grid) != _made_by(first):
            raise GridError(
                f"{grids[slide]}: has other weights, patches or strides than the grid of slide "
                f"'{first.provenance.slide}'; compress both slides with one encoder"
            )
    counts = {slide: int(grid.valid.sum()) for slide, grid in opened.items()}
    mean = _mean(opened)
    total = sum(counts.values())
    with atomic_folder(folder) as new:
        vectors = np.lib.format.open_memmap(
            new / VECTORS, mode="w+", dtype=np.float32, shape=(total, first.shape[0])
        )
        places = np.empty((total, 2), np.int32)
        at = 0
        for grid in opened.values():
            for place, unit in _unit_vectors(grid, mean):
                vectors[at : at + len(unit)], places[at : at + len(unit)] = unit, place
                at += len(unit)
        vectors.flush()
        np.save(new / PLACES, places)
        rows = [
            (slide, counts[slide], grid.provenance.cell, *grid.provenance.origin)
            for slide, grid in opened.items()
        ]
        pl.DataFrame(rows, SLIDES_SCHEMA, orient="row").write_parquet(new / SLIDES)
        about = _About(
            format=INDEX_FORMAT,
            key=key,
            patch=first.provenance.patch,
            stride=first.provenance.stride,
        )
        (new / ABOUT).write_text(about.model_dump_json() + "\n")


def open_index(folder: Path, key: str) -> CellIndex | None:
    """Open the index in a folder; None if there is none for this key and format.

    Raises
    ------
    GridError
        The index is damaged.
    """
    if not (folder / ABOUT).exists():
        return None
    try:
        about = _About.model_validate_json((folder / ABOUT).read_bytes())
        if (about.format, about.key) != (INDEX_FORMAT, key):
            return None
        vectors = np.load(folder / VECTORS, mmap_mode="r")
        places = np.load(folder / PLACES)
        slides = pl.read_parquet(folder / SLIDES, glob=False)
        starts = np.concatenate([[0], slides["cells"].to_numpy().cumsum()])
        if not len(vectors) == len(places) == starts[-1]:
            raise ValueError(f"{len(vectors)} vectors, {len(places)} places, {starts[-1]} cells")
    except (OSError, ValueError, ValidationError, pl.exceptions.PolarsError) as error:
        raise GridError(
            f"{folder}: the index of cells is damaged ({error}); delete the folder, and it is made "
            "again"
        ) from error
    return CellIndex(vectors, places, slides, starts, about.patch, about.stride)


def similar_cells(
    index: CellIndex,
    cell: int,
    *,
    count: int,
    per_slide: int = PER_SLIDE,
    apart: int | None = None,
) -> list[SimilarCell]:
    """Find the cells that are most similar to one cell.

    Cells are taken by descending similarity, of equal ones in the order of the index. A cell is
    left out if its slide already has ``per_slide`` cells, or if it is near a cell of its slide that
    was taken, or near the given cell. Otherwise the neighbours of the best cells, which show nearly
    the same, would fill the list.

    Parameters
    ----------
    cell : int
        Position in the index (:meth:`CellIndex.position`).
    count : int
        Cells to return; fewer if the rules leave fewer.
    per_slide : int
        Cells of one slide at most.
    apart : int, optional
        Least distance, in rows or in columns, of two cells of one slide. Default
        :attr:`CellIndex.apart`; 0 leaves out only the given cell itself.

    Raises
    ------
    ValueError
        The embedding of the cell equals the mean of all cells, so it has no direction.
    """
    query = np.asarray(index.vectors[cell])
    if not query.any():
        raise ValueError("the embedding of this cell is the mean of all cells; choose another cell")
    apart = index.apart if apart is None else apart
    similarity = index.vectors @ query
    similarity[cell] = -np.inf
    _leave_out_near(index, similarity, cell, apart)
    # only the slide of the cell that was taken is searched again
    best = np.maximum.reduceat(similarity, index.starts[:-1])
    found: list[SimilarCell] = []
    taken: Counter[int] = Counter()
    for _ in range(count):
        number = int(best.argmax())
        if best[number] == -np.inf:
            break
        of_slide = similarity[index.starts[number] : index.starts[number + 1]]
        nearest = int(index.starts[number]) + int(of_slide.argmax())
        found.append(_found(index, nearest, number, float(best[number])))
        taken[number] += 1
        if taken[number] == per_slide:
            best[number] = -np.inf
            continue
        similarity[nearest] = -np.inf
        _leave_out_near(index, similarity, nearest, apart)
        best[number] = of_slide.max()
    return found


def _made_by(grid: Grid) -> tuple[object, ...]:
    about = grid.provenance
    return about.weights_hash, about.patch, about.stride, about.mpp, grid.shape[0]


def _mean(grids: Mapping[str, Grid]) -> NDArray[np.float64]:
    """Mean embedding (C,) of all cells."""
    moments = [grid_moments(slide, g.embeddings, g.valid) for slide, g in grids.items()]
    return reduce(add, moments).mean


def _unit_vectors(
    grid: Grid, mean: NDArray[np.float64]
) -> Iterator[tuple[NDArray[np.int32], Vectors]]:
    """Yield places (n, 2) and unit vectors (n, C) of the cells of each chunk."""
    for (rows, columns), inside, embeddings in tissue_blocks(grid.embeddings, grid.valid):
        centred = embeddings.T.astype(np.float64) - mean
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        # of the mean itself only rounding errors remain, which have no direction
        same = length <= np.finfo(np.float32).eps * max(float(np.linalg.norm(mean)), 1e-30)
        unit = np.where(same, 0, centred / np.where(same, 1, length))
        places = np.argwhere(inside) + (rows.start, columns.start)
        yield places.astype(np.int32), unit.astype(np.float32)


def _leave_out_near(index: CellIndex, similarity: Vectors, cell: int, apart: int) -> None:
    """Set the similarity of cells that are near a cell of their slide to -inf."""
    number = index.slide_of(cell)
    of_slide = slice(index.starts[number], index.starts[number + 1])
    distance = np.abs(index.places[of_slide] - index.places[cell]).max(axis=1)
    similarity[of_slide][distance < apart] = -np.inf


def _found(index: CellIndex, cell: int, number: int, similarity: float) -> SimilarCell:
    about = index.slides.row(number, named=True)
    row, column = map(int, index.places[cell])
    side = about["cell"]
    return SimilarCell(
        about["slide"],
        row,
        column,
        about["x"] + (column + 0.5) * side,
        about["y"] + (row + 0.5) * side,
        side * index.patch / index.stride,
        similarity,
    )

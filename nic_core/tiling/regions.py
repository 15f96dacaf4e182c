"""Regions of a slide: rasterise them, label the cells of a grid, find regions inside regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import polars as pl
import shapely
from numpy.typing import NDArray

from nic_core.tiling.tissue import TissueMask

Ring = NDArray[np.float64]

_POINTS = 16  # sample points per side of a cell
_SAMPLES = 256  # sample points along the longer side of a region, for its fraction of tissue
_EDGE = 1e-6  # of a cell's side: regions that only share an edge with a cell do not touch it

_COVERED_SCHEMA: dict[str, pl.DataType] = {
    "inner": pl.Int64(),
    "inner_label": pl.String(),
    "outer": pl.Int64(),
    "outer_label": pl.String(),
    "inner_area": pl.Float64(),
    "outer_area": pl.Float64(),
    "covered_area": pl.Float64(),
    "share": pl.Float64(),
}


class _Scaled(Protocol):
    @property
    def mpp(self) -> float: ...


@dataclass(frozen=True)
class Region:
    """An annotated area.

    Attributes
    ----------
    label : str
        Empty if the area has no class.
    rings : tuple of float64 (n, 2)
        Vertices (x, y), level-0 px. A point is inside the area if an odd number of rings contains
        it, so a hole is a ring inside another, and a ring may cross itself.
    feature : int
        Position of its feature in the annotation file, from 1; 0 if it is from no file.
    """

    label: str
    rings: tuple[Ring, ...]
    feature: int = 0

    @cached_property
    def shape(self) -> shapely.Geometry:
        """The area as a valid (multi)polygon, by the even-odd rule."""
        first, *others = (_ring_shape(ring) for ring in self.rings)
        for other in others:
            first = shapely.symmetric_difference(first, other)
        return first

    @cached_property
    def area(self) -> float:
        """Area, level-0 px squared."""
        return float(shapely.area(self.shape))

    def shifted(self, x: float, y: float) -> Region:
        """Return the region moved by ``x`` and ``y``, level-0 px."""
        return Region(self.label, tuple(ring + (x, y) for ring in self.rings), self.feature)


def _ring_shape(ring: Ring) -> shapely.Geometry:
    if len(ring) < 3:  # a point or a line has no area
        return shapely.Polygon()
    valid = shapely.make_valid(shapely.Polygon(ring), method="linework")
    # where a ring touches itself, it may leave lines and points
    parts = shapely.get_parts(shapely.get_parts(valid))
    return shapely.MultiPolygon(list(parts[shapely.get_type_id(parts) == 3]))


def region_mask(
    regions: Sequence[Region], slide: _Scaled, shape: tuple[int, int], mpp: float
) -> NDArray[np.bool_]:
    """Rasterise regions to a mask.

    Parameters
    ----------
    slide
        Only its um/px at level 0 (``mpp``) is used.
    shape : (int, int)
        Rows and columns of the mask, which starts at the slide's top-left corner.
    mpp : float
        um/px of the mask.

    Returns
    -------
    bool (rows, columns)
        True where the centre of a mask px is inside one of the regions.
    """
    mask = np.zeros(shape, np.bool_)
    for region in regions:
        box, inside = _rasterised(region, slide.mpp / mpp, shape)
        mask[box] |= inside
    return mask


def _rasterised(
    region: Region, scale: float, shape: tuple[int, int]
) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """The region's bounding box in a mask, and the px in it whose centres are inside.

    Only the box is filled, since slides may have many small regions. ``scale`` is mask px per
    level-0 px.
    """
    rings = [ring * scale for ring in region.rings]
    corners = np.concatenate(rings)
    low = np.clip(np.floor(corners.min(axis=0)), 0, shape[::-1]).astype(np.int64)
    high = np.clip(np.ceil(corners.max(axis=0)), low, shape[::-1]).astype(np.int64)
    return (slice(low[1], high[1]), slice(low[0], high[0])), _fill(rings, low, high)


def _fill(
    rings: Sequence[Ring], low: NDArray[np.int64], high: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Fill the box from ``low`` to ``high`` (x, y) by the even-odd rule, at px centres.

    A centre on an edge belongs to the area to the right or below, so that adjacent areas neither
    share a px nor leave a gap. The cost is linear in the number of edges and px rows they cross;
    scikit-image tests every px against every edge, which takes seconds to minutes for an outline
    drawn by hand.
    """
    ends = [np.stack([ring, np.roll(ring, -1, axis=0)], axis=1) for ring in rings]
    edges = np.concatenate(ends)  # (n, 2 ends, x and y)
    # orient all edges downwards, so that rounding does not depend on the drawing direction
    down = edges[:, 0, 1] <= edges[:, 1, 1]
    (x0, y0), (x1, y1) = np.where(down[:, None, None], edges, edges[:, ::-1]).transpose(1, 2, 0)
    # rows whose centre is in [y0, y1): a vertex counts once, a horizontal edge never
    first, end = (np.clip(np.ceil(y - 0.5), low[1], high[1]).astype(np.int64) for y in (y0, y1))
    count = end - first
    edge = np.repeat(np.arange(len(edges)), count)
    row = np.arange(len(edge)) - (np.cumsum(count) - count - first)[edge]
    along = (row + 0.5 - y0[edge]) / (y1 - y0)[edge]
    x = x0[edge] + along * (x1 - x0)[edge]
    column = np.clip(np.ceil(x - 0.5), low[0], high[0]).astype(np.int64)
    crossed = np.zeros((high[1] - low[1], high[0] - low[0] + 1), np.bool_)
    np.logical_xor.at(crossed, (row - low[1], column - low[0]), True)
    return np.logical_xor.accumulate(crossed, axis=1)[:, :-1]


def label_patches(
    table: pl.DataFrame, regions: Sequence[Region], *, min_coverage: float = 0.5
) -> pl.DataFrame:
    """Label cells by the regions that cover them.

    A cell gets the label with the largest coverage, if that exceeds ``min_coverage`` [choice].
    The coverage of a label is the fraction of the cell's area that has the label. Where regions
    overlap, an area has the label of the smallest of them; of regions of equal area, of the last:
    so a region inside another has its own label. Ties between labels go to the first in
    alphabetical order. Regions without a label give none, but they touch cells.

    Parameters
    ----------
    table : polars.DataFrame
        Patch table of the slide.
    min_coverage : float
        Fraction of a cell's area, measured at 16 x 16 points.

    Returns
    -------
    polars.DataFrame
        In the order of the table: ``row``, ``column``, ``label`` (null if no label exceeds
        ``min_coverage``), ``coverage`` (float32, of the label with the largest coverage) and
        ``touched`` (whether any region, with or without a label, shares an area with the cell).
    """
    labels = sorted({region.label for region in regions} - {""})
    rows, columns = (int(table[axis].to_numpy().max()) + 1 for axis in ("row", "column"))
    painted = np.zeros((rows * _POINTS, columns * _POINTS), np.min_scalar_type(len(labels)))
    scale = _POINTS / float(table["size"][0])
    number = {label: i for i, label in enumerate(labels, start=1)}
    # sorting is stable, so of equal areas the last in the file is painted last
    for region in sorted(regions, key=lambda region: -round(region.area, 3)):
        if region.label:
            box, inside = _rasterised(region, scale, painted.shape)
            painted[box][inside] = number[region.label]
    coverage = np.zeros((len(labels) + 1, rows * columns), np.float32)
    coverage[0] = min_coverage  # wins if no label exceeds it
    for i in number.values():
        down = (painted == i).reshape(rows, _POINTS, -1).sum(axis=1, dtype=np.uint8)
        points = down.reshape(rows, columns, _POINTS).sum(axis=2, dtype=np.uint16)
        coverage[i] = points.ravel() / _POINTS**2
    best = coverage.argmax(axis=0)
    return table.select("row", "column").with_columns(
        label=pl.Series([None, *labels], dtype=pl.String).gather(best),
        coverage=pl.Series(coverage[1:].max(axis=0, initial=0)),
        touched=pl.Series(_touched(table, regions)),
    )


def _touched(table: pl.DataFrame, regions: Sequence[Region]) -> NDArray[np.bool_]:
    """Whether each cell shares an area with any region; exact, also for the smallest regions."""
    x, y, size = (table[name].to_numpy() for name in ("x", "y", "size"))
    edge = _EDGE * size
    cells = shapely.box(x + edge, y + edge, x + size - edge, y + size - edge)
    touched = np.zeros(len(table), np.bool_)
    touched[shapely.STRtree(cells).query(_shapes(regions), predicate="intersects")[1]] = True
    return touched


def _shapes(regions: Sequence[Region]) -> NDArray[np.object_]:
    return np.array([region.shape for region in regions], dtype=object)


def covered_regions(regions: Sequence[Region]) -> pl.DataFrame:
    """List the pairs of regions that overlap: which covers how much of which.

    Returns
    -------
    polars.DataFrame
        A row for each pair with a common area, by ``inner`` then ``outer``. ``inner`` is the region
        whose label counts there (:func:`label_patches`): the smaller one, of equal areas the later
        one. ``inner`` and ``outer`` are positions of features in the file, from 1
        (:attr:`Region.feature`), with ``inner_label`` and ``outer_label``; ``inner_area``,
        ``outer_area`` and ``covered_area`` (common to both) are level-0 px squared; ``share`` is
        the covered fraction of the inner region.
    """
    shapes = _shapes(regions)
    first, second = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    common = shapely.area(shapely.intersection(shapes[first], shapes[second]))
    order = sorted(range(len(regions)), key=lambda i: (round(regions[i].area, 3), -i))
    rank = np.argsort(order)  # of equal areas the later one is the inner one
    rows = []
    for i, j, area in zip(first.tolist(), second.tolist(), common.tolist(), strict=True):
        inner, outer = regions[i], regions[j]
        if rank[i] < rank[j] and area > 1e-9 * inner.area:
            names = (inner.feature, inner.label, outer.feature, outer.label)
            rows.append((*names, inner.area, outer.area, area, area / inner.area))
    return pl.DataFrame(rows, schema=_COVERED_SCHEMA, orient="row").sort("inner", "outer")


def tissue_fraction(region: Region, mask: TissueMask, mpp: float) -> float:
    """Return the fraction of a region's area that is tissue; outside the mask there is none.

    Parameters
    ----------
    mask : TissueMask
        Of the slide.
    mpp : float
        um/px at level 0.
    """
    corners = np.concatenate(region.rings)
    low = corners.min(axis=0)
    step = float(np.ptp(corners, axis=0).max()) / _SAMPLES  # level-0 px
    rings = [(ring - low) / step for ring in region.rings]
    high = np.ceil((corners.max(axis=0) - low) / step).astype(np.int64)
    rows, columns = np.nonzero(_fill(rings, np.zeros(2, np.int64), high))
    points = low + (np.stack([columns, rows], axis=1) + 0.5) * step
    if not len(points):  # thinner than the distance of two sample points
        points = corners
    x, y = np.floor(points * (mpp / mask.mpp)).astype(np.int64).T
    inside = (x >= 0) & (y >= 0) & (x < mask.array.shape[1]) & (y < mask.array.shape[0])
    return float(mask.array[y[inside], x[inside]].sum() / len(points))

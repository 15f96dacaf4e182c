"""Annotated regions: read QuPath GeoJSON and ASAP XML, rasterise them, label patches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
from numpy.typing import NDArray

from nic_core.slides.errors import SlideError
from nic_core.slides.slide import Slide

Ring = NDArray[np.float64]

ANNOTATION_SUFFIXES = (".json", ".geojson", ".xml")
_NO_GROUP = "None"  # as ASAP writes it
_POINTS = 16  # sample points per side of a cell
_REMEDY = "give polygons as QuPath GeoJSON or ASAP XML, in level-0 px"


@dataclass(frozen=True)
class Region:
    """An annotated area.

    Attributes
    ----------
    label : str
        Empty if the area has no label.
    rings : tuple of float64 (n, 2)
        Vertices (x, y), level-0 px. A point is inside the area if an odd number of rings contains
        it, so a hole is a ring inside another.
    """

    label: str
    rings: tuple[Ring, ...]


def read_annotations(path: Path) -> list[Region]:
    """Read the polygons of a GeoJSON (``.json``, ``.geojson``) or ASAP (``.xml``) file.

    The label is the classification of QuPath or the group of ASAP. Points and lines are ignored,
    since they have no area.

    Raises
    ------
    SlideError
        The file cannot be read, or has neither format.
    """
    try:
        if path.suffix.lower() == ".xml":
            return _asap(ElementTree.parse(path).getroot())
        return _geojson(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ElementTree.ParseError, ValueError, KeyError, TypeError) as error:
        raise SlideError(path, f"the annotations cannot be read ({error!r})", _REMEDY) from error


def region_mask(
    regions: Sequence[Region], slide: Slide, shape: tuple[int, int], mpp: float
) -> NDArray[np.bool_]:
    """Rasterise regions to a mask.

    Parameters
    ----------
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
        rings = [ring * (slide.mpp / mpp) for ring in region.rings]
        corners = np.concatenate(rings)
        # fill only the bounding box: slides may have many small regions
        low = np.clip(np.floor(corners.min(axis=0)), 0, shape[::-1]).astype(np.int64)
        high = np.clip(np.ceil(corners.max(axis=0)), low, shape[::-1]).astype(np.int64)
        inside = _fill(rings, low, high)
        mask[low[1] : high[1], low[0] : high[0]] |= inside
    return mask


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
    table: pl.DataFrame, regions: Sequence[Region], slide: Slide, *, min_coverage: float = 0.5
) -> pl.DataFrame:
    """Label cells by the regions that cover them.

    A cell gets the label with the largest coverage, if that exceeds ``min_coverage`` [choice].
    The coverage of a label is the fraction of the cell's area inside any of its regions, also where
    regions of several labels overlap. Ties go to the first label in alphabetical order. Regions
    without a label are ignored.

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
        ``min_coverage``) and ``coverage`` (float32, of the label with the largest coverage).
    """
    labels = sorted({region.label for region in regions} - {""})
    rows, columns = (int(table[axis].to_numpy().max()) + 1 for axis in ("row", "column"))
    step = float(table["size"][0]) / _POINTS * slide.mpp  # um
    coverage = np.zeros((len(labels) + 1, rows * columns), np.float32)
    coverage[0] = min_coverage  # wins if no label exceeds it
    for i, label in enumerate(labels, start=1):
        labelled = [region for region in regions if region.label == label]
        mask = region_mask(labelled, slide, (rows * _POINTS, columns * _POINTS), step)
        down = mask.reshape(rows, _POINTS, -1).sum(axis=1, dtype=np.uint8)
        points = down.reshape(rows, columns, _POINTS).sum(axis=2, dtype=np.uint16)
        coverage[i] = points.ravel() / _POINTS**2
    best = coverage.argmax(axis=0)
    return table.select("row", "column").with_columns(
        label=pl.Series([None, *labels], dtype=pl.String).gather(best),
        coverage=pl.Series(coverage[1:].max(axis=0, initial=0)),
    )


def _geojson(data: Any) -> list[Region]:
    features = data["features"] if isinstance(data, dict) and "features" in data else data
    regions = []
    for feature in features if isinstance(features, list) else [features]:
        geometry = feature["geometry"]
        polygons = {"Polygon": lambda c: [c], "MultiPolygon": list}.get(geometry["type"])
        if polygons is None:
            continue
        properties = feature.get("properties") or {}
        label = str((properties.get("classification") or {}).get("name", ""))
        for polygon in polygons(geometry["coordinates"]):
            regions.append(Region(label, tuple(_ring(ring) for ring in polygon)))
    return regions


def _asap(root: ElementTree.Element) -> list[Region]:
    if root.tag != "ASAP_Annotations":
        raise ValueError(f"the root element is {root.tag}, not ASAP_Annotations")
    regions = []
    for annotation in root.iter("Annotation"):
        if annotation.get("Type") not in ("Polygon", "Spline", "Rectangle"):
            continue
        points = sorted(annotation.iter("Coordinate"), key=lambda c: int(c.get("Order", 0)))
        ring = _ring([(point.attrib["X"], point.attrib["Y"]) for point in points])
        group = annotation.get("PartOfGroup", _NO_GROUP)
        regions.append(Region("" if group == _NO_GROUP else group, (ring,)))
    return regions


def _ring(points: Sequence[Sequence[Any]]) -> Ring:
    ring = np.array([point[:2] for point in points], np.float64)
    if ring.ndim != 2 or len(ring) < 3 or not np.isfinite(ring).all():
        raise ValueError("a polygon needs at least three points, each of two finite numbers")
    return ring

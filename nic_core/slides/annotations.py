"""Regions drawn by people: QuPath GeoJSON and ASAP XML."""

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
from skimage import draw

from nic_core.slides.errors import SlideError
from nic_core.slides.resample import coverage
from nic_core.slides.slide import Slide

Ring = NDArray[np.float64]

ANNOTATION_SUFFIXES = (".json", ".geojson", ".xml")
_REMEDY = "give polygons as QuPath GeoJSON or ASAP XML, in level-0 px"


@dataclass(frozen=True)
class Region:
    """A labelled area: rings of vertices (x, y) in level-0 px, float64 (n, 2).

    A point lies inside if an odd number of rings holds it, so a hole is one more ring.
    """

    label: str
    rings: tuple[Ring, ...]


def read_annotations(path: Path) -> list[Region]:
    """Polygons of a GeoJSON (``.json``, ``.geojson``) or ASAP (``.xml``) file.

    The label is QuPath's classification or ASAP's group. Points and lines have no area and are
    left out.

    Raises
    ------
    SlideError
        The file cannot be read or is neither.
    """
    try:
        if path.suffix.lower() == ".xml":
            return _asap(ElementTree.parse(path).getroot())
        return _geojson(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ElementTree.ParseError, ValueError, KeyError, TypeError) as error:
        raise SlideError(path, f"no annotation that can be read ({error!r})", _REMEDY) from error


def region_mask(
    regions: Sequence[Region], slide: Slide, shape: tuple[int, int], mpp: float
) -> NDArray[np.bool_]:
    """Where a mask's px centres lie in any of the regions.

    Parameters
    ----------
    shape : (rows, columns)
        Of the mask, which covers the slide from its corner.
    mpp : float
        um/px of the mask.

    Returns
    -------
    bool (rows, columns)
    """
    mask = np.zeros(shape, np.bool_)
    for region in regions:
        inside = np.zeros(shape, np.bool_)
        for ring in region.rings:
            # skimage counts px centres as whole numbers; the slide's first px spans [0, 1)
            scaled = ring * slide.mpp / mpp - 0.5
            rows, columns = draw.polygon(  # type: ignore[no-untyped-call]
                scaled[:, 1], scaled[:, 0], shape
            )
            inside[rows, columns] ^= True
        mask |= inside
    return mask


def label_patches(
    table: pl.DataFrame, regions: Sequence[Region], slide: Slide, *, share: float = 0.5
) -> pl.DataFrame:
    """Label cells by the regions that cover them.

    Parameters
    ----------
    table : polars.DataFrame
        A patch table of the slide.
    share : float
        A cell has the label that covers most of it, if that is more than this share of its
        area; else none.

    Returns
    -------
    polars.DataFrame
        Columns row, column, label (null: none) and share (float32, of that label), in the
        table's order.
    """
    labels = sorted({region.label for region in regions})
    rows, columns = (int(table[axis].to_numpy().max()) + 1 for axis in ("row", "column"))
    size = float(table["size"][0])
    step = size / 16  # level-0 px: 256 points a cell
    shape = int(np.ceil(slide.height / step)), int(np.ceil(slide.width / step))
    down = coverage(0.0, size / step, rows, shape[0])
    across = coverage(0.0, size / step, columns, shape[1])
    shares = np.zeros((len(labels) + 1, rows * columns), np.float32)
    shares[0] = share  # what a label must exceed
    for i, label in enumerate(labels, start=1):
        own = [region for region in regions if region.label == label]
        mask = region_mask(own, slide, shape, step * slide.mpp).astype(np.float32)
        shares[i] = (across @ (down @ mask).T).T.ravel()
    best = shares.argmax(axis=0)
    return table.select("row", "column").with_columns(
        label=pl.Series([None, *labels], dtype=pl.String).gather(best),
        share=pl.Series(np.where(best > 0, shares.max(axis=0), shares[1:].max(axis=0, initial=0))),
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
        raise ValueError(f"root element {root.tag}, not ASAP_Annotations")
    regions = []
    for annotation in root.iter("Annotation"):
        if annotation.get("Type") not in ("Polygon", "Spline", "Rectangle"):
            continue
        points = sorted(annotation.iter("Coordinate"), key=lambda c: int(c.get("Order", 0)))
        ring = _ring([(point.attrib["X"], point.attrib["Y"]) for point in points])
        regions.append(Region(annotation.get("PartOfGroup") or "", (ring,)))
    return regions


def _ring(points: Sequence[Sequence[Any]]) -> Ring:
    ring = np.array([point[:2] for point in points], np.float64)
    if ring.ndim != 2 or len(ring) < 3 or not np.isfinite(ring).all():
        raise ValueError("a polygon needs three points or more, each of two finite numbers")
    return ring

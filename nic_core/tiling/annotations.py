"""Annotation files: read QuPath GeoJSON and ASAP XML, and place their regions on a slide.

Every feature of a file is used as a region, or listed with the reason why it is not. A file with a
feature that cannot be understood is refused.

Coordinates are px of level 0, but programs count them from different corners. QuPath crops a slide
to its scanned area (OpenSlide's bounds) and counts from there; ASAP counts from the corner of
level 0. GeoJSON does not state which, so the user must state it where the two differ.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args
from xml.etree import ElementTree

import numpy as np
import polars as pl

from nic_core.cohort.fields import normalise
from nic_core.slides.errors import SlideError
from nic_core.slides.slide import Slide
from nic_core.tiling.regions import Region, Ring
from nic_core.types import Origin

ANNOTATION_SUFFIXES = (".json", ".geojson", ".xml")
ORIGIN_MEMBER = "origin"
"""Member of a GeoJSON object that states what its coordinates count from."""
NO_CLASS = "without a class"

_REMEDY = "give regions as QuPath GeoJSON or ASAP XML, in level-0 px"
_NO_GROUP = "None"  # as ASAP writes it
_MAX_COORDINATE = 1e8  # px; the largest slides have 6 million px a side
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?", re.ASCII)
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+", re.ASCII)
# GeoJSON geometries without an area, and what QuPath and ASAP call them
_NO_AREA = {
    "Point": "a point",
    "MultiPoint": "points",
    "LineString": "a line",
    "MultiLineString": "lines",
}
_GEOMETRIES = (*_NO_AREA, "Polygon", "MultiPolygon", "GeometryCollection")
_ASAP_AREAS = ("Polygon", "Spline", "Rectangle")
_ASAP_NO_AREA = {"Dot": "a point", "PointSet": "points", "Measurement": "a line"}
# QuPath's objects that no person drew as a region, by its names of several versions
_NOT_DRAWN = {
    "detection": "detection",
    "pathdetectionobject": "detection",
    "cell": "cell",
    "pathcellobject": "cell",
    "tile": "tile",
    "pathtileobject": "tile",
    "tma_core": "TMA core",
    "tmacore": "TMA core",
    "tmacoreobject": "TMA core",
    "root": "root object",
    "pathrootobject": "root object",
}

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Unused:
    """A feature, or a part of one, that is not used as a region.

    Attributes
    ----------
    feature : int
        Position in the file, from 1.
    label : str
        Its class; empty if it has none.
    reason : str
    """

    feature: int
    label: str
    reason: str


@dataclass(frozen=True)
class Annotations:
    """What an annotation file contains.

    Attributes
    ----------
    path : Path
    features : int
        Number of features. Each has a region, an entry of ``unused`` or both.
    regions : tuple of Region
        In the order of the file; a multipolygon is a region for each of its polygons. Coordinates
        are as in the file (:func:`placed` moves them to level 0).
    unused : tuple of Unused
    origin : {"level0", "bounds"} or None
        What the coordinates count from, if the file states it; ASAP's do from level 0.
    """

    path: Path
    features: int
    regions: tuple[Region, ...]
    unused: tuple[Unused, ...]
    origin: Origin | None


class _FormatError(ValueError):
    """The content of the file is not of its format; the message says where."""


def is_annotation_file(path: Path) -> bool:
    """Whether the suffix is one of :data:`ANNOTATION_SUFFIXES`, also followed by ``.gz``."""
    name = path.name.lower().removesuffix(".gz")
    return name.endswith(ANNOTATION_SUFFIXES)


def read_annotations(path: Path) -> Annotations:
    """Read a GeoJSON or ASAP XML file; its content decides which, and it may be gzipped.

    The label of a region is QuPath's class (``Tumor: Positive`` of a derived one) or ASAP's group.
    Points, lines, polygons without an area, and QuPath's detections, cells, tiles and TMA cores
    are listed as unused. The area of an ASAP spline is that of the polygon of its points.

    Raises
    ------
    SlideError
        The file cannot be read, has neither format, or a feature cannot be understood.
    """
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        if data.lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(b"<"):
            return _asap(path, ElementTree.fromstring(data))
        return _geojson(path, json.loads(data, parse_constant=_refuse_constant))
    except RecursionError as error:
        raise SlideError(path, "the annotations are nested too deeply", _REMEDY) from error
    except (OSError, EOFError, zlib.error, LookupError, SyntaxError, ValueError) as error:
        # ElementTree's ParseError is a SyntaxError
        raise SlideError(path, f"the annotations cannot be read ({error})", _REMEDY) from error


def placed(
    annotations: Annotations,
    slide: Slide,
    use: Callable[[Sequence[Region]], _Result],
    same: Callable[[_Result, _Result], bool],
    *,
    origin: Origin | None = None,
    default: Origin | None = None,
) -> _Result:
    """Use the regions with coordinates that count from level 0 of the slide.

    Parameters
    ----------
    use
        Called with the regions, level-0 px. If it is not known what the coordinates count from,
        it is called for both possibilities.
    same
        Whether two results of ``use`` are equal.
    origin : {"level0", "bounds"}, optional
        What the coordinates of this file count from: the corner of level 0, or that of the slide's
        scanned area (:attr:`nic_core.slides.Slide.bounds`). Overrides what the file states.
    default : {"level0", "bounds"}, optional
        The same, for files that do not state it.

    Raises
    ------
    SlideError
        It is not known what the coordinates count from, and the results differ.
    """
    x, y = slide.bounds[:2]
    known = origin or annotations.origin or default
    if known == "level0" or (x, y) == (0, 0):
        return use(annotations.regions)
    result = use([region.shifted(x, y) for region in annotations.regions])
    if known is None and not same(result, use(annotations.regions)):
        raise SlideError(
            slide.path,
            f"its scanned area starts at x, y = {x}, {y} (level-0 px), and {annotations.path} does "
            "not state whether its coordinates count from there or from the corner of level 0",
            "set 'origin' to 'bounds' (as QuPath counts) or to 'level0': in the column 'origin' of "
            "the table that lists the file, in the entry 'slides' of a patch task, or by --origin",
        )
    return result


def unused_features(annotations: Annotations) -> pl.DataFrame:
    """List what is not used as a labelled region.

    Returns
    -------
    polars.DataFrame
        A row for each reason and label, in the order of the file: ``reason``, ``label`` (empty:
        none), ``count`` and ``features`` (list of positions in the file, from 1). Regions without
        a class are listed, too, with the reason :data:`NO_CLASS`.
    """
    unclassified = dict.fromkeys(r.feature for r in annotations.regions if not r.label)
    rows = [(number, "", NO_CLASS) for number in unclassified]
    rows += [(unused.feature, unused.label, unused.reason) for unused in annotations.unused]
    schema = {"features": pl.Int64(), "label": pl.String(), "reason": pl.String()}
    table = pl.DataFrame(sorted(rows), schema=schema, orient="row")
    return table.group_by("reason", "label", maintain_order=True).agg(
        pl.len().alias("count"), pl.col("features")
    )


# --- GeoJSON ---------------------------------------------------------------------------------


def _geojson(path: Path, data: Any) -> Annotations:
    features = _features(data)
    regions: list[Region] = []
    unused: list[Unused] = []
    for number, feature in enumerate(features, start=1):
        try:
            found, left = _feature(number, feature)
        except _FormatError as error:
            raise _FormatError(f"feature {number}: {error}") from error
        regions += found
        unused += left
    stated = data.get(ORIGIN_MEMBER) if isinstance(data, dict) else None
    origin = next((name for name in get_args(Origin) if name == stated), None)
    return Annotations(path, len(features), tuple(regions), tuple(unused), origin)


def _features(data: Any) -> list[dict[str, Any]]:
    """The features of a collection, of a list, a single feature, or a geometry alone."""
    waiting, features = [data], []
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict) and "features" in item:
            if "geometry" in item:
                raise _FormatError("an object has 'features' and 'geometry'; it may have one")
            item = _list(item["features"], "'features'")
        if isinstance(item, list):
            waiting += reversed(item)
        elif isinstance(item, dict) and (
            item.get("type") == "Feature" or "geometry" in item or item.get("type") in _GEOMETRIES
        ):
            features.append(item)
        else:
            raise _FormatError(f"neither a feature nor a geometry: {_short(item)}")
    return features


def _feature(number: int, feature: dict[str, Any]) -> tuple[list[Region], list[Unused]]:
    geometry, properties = feature.get("geometry"), feature.get("properties")
    if "geometry" not in feature and feature.get("type") in _GEOMETRIES:
        geometry = feature
    if properties is None:
        properties = {}
    if not isinstance(properties, dict):
        raise _FormatError(f"'properties' is not an object: {_short(properties)}")
    label = _class_name(properties.get("classification"))
    for name in (properties.get("objectType"), properties.get("object_type"), feature.get("id")):
        if isinstance(name, str) and (kind := _NOT_DRAWN.get(name.lower())):
            return [], [Unused(number, label, f"a {kind} of QuPath, not an annotation")]
    if geometry is None:
        return [], [Unused(number, label, "without a geometry")]
    regions, reasons = [], []
    for kind, coordinates in _parts(geometry):
        if kind != "Polygon":
            reasons.append(f"{_NO_AREA[kind]}, without an area")
            continue
        rings = [_ring(points) for points in _list(coordinates, "the coordinates of a polygon")]
        region = Region(label, tuple(ring for ring in rings if len(ring)), number)
        if region.rings and region.area > 0:
            regions.append(region)
        else:
            reasons.append("a polygon without an area")
    if not regions and not reasons:
        reasons.append("an empty geometry")
    return regions, [Unused(number, label, reason) for reason in reasons]


def _parts(geometry: Any) -> list[tuple[str, Any]]:
    """Type and coordinates of the polygons, points and lines in a geometry."""
    waiting, parts = [geometry], []
    while waiting:
        item = waiting.pop()
        kind = str(item.get("type")) if isinstance(item, dict) else ""
        if kind == "GeometryCollection":
            waiting += reversed(_list(item.get("geometries"), "'geometries'"))
        elif kind == "MultiPolygon":
            polygons = _list(item.get("coordinates"), "the coordinates of a multipolygon")
            parts += [("Polygon", polygon) for polygon in polygons]
        elif kind == "Polygon" or kind in _NO_AREA:
            parts.append((kind, item.get("coordinates")))
        else:
            raise _FormatError(f"not a geometry of GeoJSON: {_short(item)}")
    return parts


def _class_name(value: Any) -> str:
    """The class that QuPath's ``classification`` names; empty if it names none.

    Versions write an object with ``name`` (and ``colorRGB`` or ``color``), with ``names`` for a
    derived class, or a string.
    """
    if value is None:
        return ""
    if isinstance(value, list):
        return _label(": ".join(filter(None, map(_class_name, value))))
    if isinstance(value, dict):
        name, names = _class_name(value.get("name")), _class_name(value.get("names"))
        # of a derived class `name` may be the last part alone
        if name and names and name != names and not names.endswith(f": {name}"):
            raise _FormatError(f"'classification' names two classes: '{name}' and '{names}'")
        return names or name
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return _label(str(value))
    raise _FormatError(f"'classification' does not name a class: {_short(value)}")


def _label(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _FormatError(f"a class name is not valid Unicode: {text!a}") from error
    return normalise(text)


def _ring(points: Any) -> Ring:
    """The vertices (n, 2) of a ring, level-0 px; heights are left out."""
    corners = []
    for point in _list(points, "a ring"):
        if len(_list(point, "a position")) < 2:
            raise _FormatError(f"a position needs x and y: {_short(point)}")
        corners.append([_coordinate(value) for value in point[:2]])
    return np.array(corners, np.float64).reshape(-1, 2)


def _coordinate(value: Any) -> float:
    """A coordinate as a number, px."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not abs(value) <= _MAX_COORDINATE
    ):
        raise _FormatError(f"a coordinate is not a number of px: {_short(value)}")
    return float(value)


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise _FormatError(f"{what} must be a list: {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_constant(name: str) -> Any:
    raise _FormatError(f"{name} is not a number of JSON")


# --- ASAP ------------------------------------------------------------------------------------


def _asap(path: Path, root: ElementTree.Element) -> Annotations:
    if root.tag != "ASAP_Annotations":
        raise _FormatError(f"the root element is {root.tag}, not ASAP_Annotations")
    elements = list(root.iter("Annotation"))
    commas = _decimal_commas(c.get(axis, "") for c in root.iter("Coordinate") for axis in "XY")
    regions: list[Region] = []
    unused: list[Unused] = []
    for number, element in enumerate(elements, start=1):
        group = _label(element.get("PartOfGroup", _NO_GROUP))
        label = "" if group == _NO_GROUP else group
        kind = element.get("Type")
        if kind in _ASAP_NO_AREA:
            unused.append(Unused(number, label, f"{_ASAP_NO_AREA[kind]}, without an area"))
            continue
        try:
            if kind not in _ASAP_AREAS:
                raise _FormatError(f"not a type of ASAP: {_short(kind)}")
            region = Region(label, (_asap_ring(element, commas),), number)
        except _FormatError as error:
            raise _FormatError(f"annotation {number}: {error}") from error
        if region.area > 0:
            regions.append(region)
        else:
            unused.append(Unused(number, label, "a polygon without an area"))
    return Annotations(path, len(elements), tuple(regions), tuple(unused), "level0")


def _asap_ring(element: ElementTree.Element, commas: bool) -> Ring:
    """The vertices in their order: that of the attribute ``Order``, or of the file if none has it.

    ``commas``: numbers have decimal commas.
    """
    points = list(element.iter("Coordinate"))
    orders = [point.get("Order") for point in points]
    if any(order is not None for order in orders):
        if not all(order is not None and re.fullmatch(r"\d{1,9}", order) for order in orders):
            raise _FormatError("a coordinate has no 'Order', or one that is not a number")
        if len({int(order or 0) for order in orders}) < len(orders):
            raise _FormatError("two coordinates have the same 'Order'")
        points.sort(key=lambda point: int(point.get("Order", 0)))
    texts = [[point.get(axis) for axis in "XY"] for point in points]
    if commas:
        texts = [[text and text.replace(",", ".") for text in point] for point in texts]
    return _ring(texts)


def _decimal_commas(texts: Iterable[str]) -> bool:
    """Whether the numbers of a file have decimal commas, as in some languages.

    A number such as 1,234 may also be 1234. It has a decimal comma if another number of the file
    can have nothing else.
    """
    with_comma = [text.strip() for text in texts if "," in text]
    if not with_comma:
        return False
    other = next((text for text in with_comma if not _DECIMAL_COMMA.fullmatch(text)), None)
    if other is not None:
        raise _FormatError(f"a coordinate is not a number of px: {_short(other)}")
    if all(_THOUSANDS.fullmatch(text) for text in with_comma):
        raise _FormatError(
            f"the comma of {with_comma[0]} may be decimal or separate thousands; write a point"
        )
    return True

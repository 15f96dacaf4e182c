"""Read GeoJSON as QuPath 0.4 to 0.6 does, and refuse what it would not read as it is meant.

The rules are those of QuPath's ``PathIO.readObjects`` and its type adapters. This reader refuses
what QuPath tolerates: an object of unknown type, which becomes an annotation, or an id that is not
a UUID, which is ignored.
"""

from __future__ import annotations

import json
import math
import re
import uuid
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shapely

# PathClass.PATTERN_NAME of names, which QuPath splits at colons
CLASS_NAME = re.compile(r"[\w!-/;-@\[-`{-~ ]+")


@dataclass(frozen=True)
class QupathObject:
    id: str
    kind: str
    shape: shapely.Geometry
    name: str
    names: tuple[str, ...]  # of the class and those that it is derived from; empty: no class
    measurements: dict[str, float]


def read_qupath(path: Path) -> list[QupathObject]:
    if path.name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            (entry,) = archive.namelist()
            assert entry.endswith((".geojson", ".json"))
            text = archive.read(entry).decode()
    else:
        assert path.name.endswith((".geojson", ".json"))
        text = path.read_text("utf-8")
    collection = json.loads(text, parse_constant=_refuse)
    assert collection["type"] == "FeatureCollection"
    objects = [_object(feature) for feature in collection["features"]]
    assert len({item.id for item in objects}) == len(objects)
    return objects


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def _object(feature: dict[str, Any]) -> QupathObject:
    assert feature["type"] == "Feature"
    identifier = feature.get("id", str(uuid.uuid4()))  # QuPath makes up a missing one
    assert str(uuid.UUID(identifier)) == identifier
    properties = feature["properties"]
    assert properties["objectType"] in ("annotation", "detection", "tile")
    assert isinstance(properties["name"], str)
    return QupathObject(
        id=identifier,
        kind=properties["objectType"],
        shape=_shape(feature["geometry"]),
        name=properties["name"],
        names=_class(properties.get("classification")),
        measurements=_measurements(properties.get("measurements", {})),
    )


def _shape(geometry: dict[str, Any]) -> shapely.Geometry:
    assert geometry["type"] in ("Polygon", "MultiPolygon")
    polygons = geometry["coordinates"]
    for polygon in [polygons] if geometry["type"] == "Polygon" else polygons:
        for number, ring in enumerate(polygon):
            # JTS refuses a LinearRing that is open, or of fewer than four points
            assert len(ring) >= 4
            assert ring[0] == ring[-1]
            assert all(math.isfinite(value) for point in ring for value in point)
            assert shapely.LinearRing(ring).is_ccw == (number == 0)  # RFC 7946
    shape = shapely.from_geojson(json.dumps(geometry))
    assert shape.is_valid, shapely.is_valid_reason(shape)
    assert shape.area > 0
    return shape


def _class(classification: Any) -> tuple[str, ...]:
    if classification is None:
        return ()
    assert set(classification) == {"name", "color"}  # QuPath fails at a class without a colour
    assert len(classification["color"]) == 3
    assert all(type(c) is int and 0 <= c <= 255 for c in classification["color"])
    names = tuple(name.strip() for name in classification["name"].split(":"))
    assert all(names)
    assert all(CLASS_NAME.fullmatch(name) for name in names)
    return names


def _measurements(measurements: Any) -> dict[str, float]:
    # the value null ends QuPath's import with an error
    assert all(type(value) in (int, float) for value in measurements.values())
    return dict(measurements)

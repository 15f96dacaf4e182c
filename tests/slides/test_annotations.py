"""Annotation files of QuPath and ASAP: classes, features that are not used, origins."""

from __future__ import annotations

import copy
import gzip
import json
import tempfile
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nic_core.slides import SlideError
from nic_core.tiling.annotations import (
    NO_CLASS,
    Annotations,
    placed,
    read_annotations,
    unused_features,
)
from nic_core.tiling.regions import region_mask


def rectangle(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def geojson(*features: tuple[str | None, str, list]) -> str:
    return json.dumps(
        {
            "type": "FeatureCollection",
            "features": [
                {
                    "type": "Feature",
                    "geometry": {"type": kind, "coordinates": coordinates},
                    "properties": {"classification": {"name": name}} if name else {},
                }
                for name, kind, coordinates in features
            ],
        }
    )


ASAP = """<?xml version="1.0"?>
<ASAP_Annotations><Annotations>
<Annotation Name="a" Type="Polygon" PartOfGroup="tumor"><Coordinates>
<Coordinate Order="2" X="100" Y="50"/><Coordinate Order="0" X="0" Y="0"/>
<Coordinate Order="1" X="100" Y="0"/><Coordinate Order="3" X="0" Y="50"/>
</Coordinates></Annotation>
<Annotation Name="d" Type="Dot" PartOfGroup="tumor"><Coordinates>
<Coordinate Order="0" X="5" Y="5"/></Coordinates></Annotation>
<Annotation Name="r" Type="Rectangle" PartOfGroup="None"><Coordinates>
<Coordinate Order="0" X="0" Y="0"/><Coordinate Order="1" X="9" Y="0"/>
<Coordinate Order="2" X="9" Y="9"/></Coordinates></Annotation>
</Annotations><AnnotationGroups/></ASAP_Annotations>"""


seeds = st.integers(0, 2**32 - 1)


class PlainSlide:
    """The attributes of a slide that annotations use."""

    width, height, mpp = 900, 700, 0.25


def test_qupath_polygons_holes_and_multipolygons_are_read(tmp_path):
    path = tmp_path / "a.geojson"
    outer, hole = rectangle(0, 0, 400, 400), rectangle(100, 100, 200, 200)
    path.write_text(
        geojson(
            ("Tumor", "Polygon", [outer, hole]),
            (
                "Stroma",
                "MultiPolygon",
                [[rectangle(500, 0, 600, 100)], [rectangle(700, 0, 800, 9)]],
            ),
            ("Tumor", "Point", [3, 4]),
            (None, "Polygon", [outer]),
        )
    )
    found = read_annotations(path)
    regions = found.regions
    assert [region.label for region in regions] == ["Tumor", "Stroma", "Stroma", ""]
    assert len(regions[0].rings) == 2
    mask = region_mask(regions[:1], PlainSlide(), (700, 900), 0.25)
    expected = np.zeros((700, 900), bool)
    expected[:400, :400] = True
    expected[100:200, 100:200] = False
    np.testing.assert_array_equal(mask, expected)


def test_asap_coordinates_are_read_by_their_order(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(ASAP)
    found, no_group = read_annotations(path).regions
    assert no_group.label == ""
    assert found.label == "tumor"
    np.testing.assert_array_equal(found.rings[0], [[0, 0], [100, 0], [100, 50], [0, 50]])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.xml", "<Aperio/>"),
        ("a.xml", "<ASAP_Annotations>"),
        ("a.geojson", "{}"),
        ("a.geojson", "no json"),
        ("a.geojson", geojson(("T", "Polygon", [[[0, 0], [1, None], [2, 2]]]))),
    ],
)
def test_an_invalid_annotation_file_is_refused(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SlideError, match="the annotations cannot be read"):
        read_annotations(path)


def test_a_missing_annotation_file_is_refused(tmp_path):
    with pytest.raises(SlideError, match=r"gone.xml"):
        read_annotations(tmp_path / "gone.xml")


def feature(classification: object, *, geometry: object = None, **members: object) -> dict:
    """A QuPath annotation of 100 x 100 px."""
    geometry = geometry or {"type": "Polygon", "coordinates": [rectangle(0, 0, 100, 100)]}
    properties = {"objectType": "annotation", "classification": classification}
    return {"type": "Feature", "geometry": geometry, "properties": properties} | members


def read(tmp_path: Path, content: object, name: str = "a.geojson") -> Annotations:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_annotations(path)


@pytest.mark.parametrize(
    ("classification", "label"),
    [
        ({"name": "Tumor", "colorRGB": -3670016}, "Tumor"),  # 0.2, 0.3
        ({"name": "Tumor", "color": [200, 0, 0]}, "Tumor"),  # 0.4
        ({"name": "Tumor: Positive", "colorRGB": -1}, "Tumor: Positive"),
        ({"names": ["Tumor", "Positive"], "color": [1, 2, 3]}, "Tumor: Positive"),  # 0.5, 0.6
        ({"names": ["Tumor"]}, "Tumor"),
        ({"name": "Positive", "names": ["Tumor", "Positive"]}, "Tumor: Positive"),
        ({"name": "Tumor", "names": []}, "Tumor"),
        ("Tumor", "Tumor"),
        (["Tumor", "Positive"], "Tumor: Positive"),
        (" Tumor\u200b ", "Tumor"),
        ("e\u0301", "\xe9"),
        ("None", "None"),
        (3, "3"),
        (None, ""),
        ("", ""),
        ({}, ""),
        ({"name": None}, ""),
        ({"colorRGB": -3670016}, ""),
    ],
)
def test_each_way_in_which_qupath_names_a_class_is_read(tmp_path, classification, label):
    found = read(tmp_path, {"type": "FeatureCollection", "features": [feature(classification)]})
    assert [region.label for region in found.regions] == [label]


@pytest.mark.parametrize(
    "classification",
    [True, 1.5, {"name": ["a"], "names": ["b"]}, "\ud800", {"name": [[{"x": 1}, 0.5]]}],
)
def test_a_classification_that_names_no_class_is_refused(tmp_path, classification):
    with pytest.raises(SlideError, match="feature 2: .*class"):
        read(tmp_path, [feature("Tumor"), feature(classification)])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: {"type": "FeatureCollection", "features": [f]},
        lambda f: {"features": [f]},
        lambda f: [f],
        lambda f: [{"type": "FeatureCollection", "features": [f]}],
        lambda f: f,
        lambda f: f["geometry"],
        lambda f: {"type": "GeometryCollection", "geometries": [f["geometry"]]},
        lambda f: f | {"properties": None},
        lambda f: {"geometry": f["geometry"]},
    ],
)
def test_a_collection_a_list_a_feature_and_a_geometry_are_read(tmp_path, wrap):
    found = read(tmp_path, wrap(feature("Tumor")))
    assert (found.features, len(found.regions), found.unused) == (1, 1, ())
    np.testing.assert_array_equal(found.regions[0].rings[0], rectangle(0, 0, 100, 100))


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: gzip.compress(text.encode()),
        lambda text: b"\n " + text.encode(),
    ],
)
@pytest.mark.parametrize("kind", ["geojson", "asap"])
def test_encodings_and_gzip_are_read_by_content(tmp_path, encode, kind):
    text = json.dumps(feature("tumor")) if kind == "geojson" else ASAP.partition("?>")[2].strip()
    # the suffix does not decide
    found = read(tmp_path, encode(text), "a.xml.gz" if kind == "geojson" else "a.json")
    assert found.regions[0].label == "tumor"


def test_points_lines_detections_and_empty_features_are_listed(tmp_path):
    square = {"type": "Polygon", "coordinates": [rectangle(0, 0, 9, 9)]}
    point, line = ({"type": kind, "coordinates": [[1, 2]]} for kind in ("MultiPoint", "LineString"))
    cell = feature("Tumor", nucleusGeometry=square)
    cell["properties"]["objectType"] = "cell"
    old = feature(None, id="PathDetectionObject")
    del old["properties"]["objectType"]
    flat = {"type": "Polygon", "coordinates": [[[0, 0], [5, 5], [0, 0]]]}
    found = read(
        tmp_path,
        [
            feature("Tumor", geometry=point),
            feature(
                "Tumor", geometry={"type": "GeometryCollection", "geometries": [line, square, line]}
            ),
            cell,
            old,
            feature("Tumor", geometry=flat),
            feature("Tumor") | {"geometry": None},
            feature("Tumor", geometry={"type": "MultiPolygon", "coordinates": []}),
            feature(None),
            feature("Tumor"),
        ],
    )
    assert [region.feature for region in found.regions] == [2, 8, 9]
    assert unused_features(found).rows() == [
        ("points, without an area", "Tumor", 1, [1]),
        ("a line, without an area", "Tumor", 2, [2, 2]),
        ("a cell of QuPath, not an annotation", "Tumor", 1, [3]),
        ("a detection of QuPath, not an annotation", "", 1, [4]),
        ("a polygon without an area", "Tumor", 1, [5]),
        ("without a geometry", "Tumor", 1, [6]),
        ("an empty geometry", "Tumor", 1, [7]),
        (NO_CLASS, "", 1, [8]),
    ]


def test_heights_strings_open_and_crossing_rings_are_read(tmp_path):
    rings = [
        [[0, 0, 7], [100, 0, 7], [100, 100, 7], [0, 100, 7]],
        [["0", "0.0"], ["1e2", "0"], ["100", "100.00"], [" 0", "+100"]],
        [[0, 0], [100, 100], [100, 0], [0, 100]],
    ]
    shapes = [{"type": "Polygon", "coordinates": [ring]} for ring in rings]
    found = read(tmp_path, [feature("T", geometry=shape) for shape in shapes])
    assert [region.area for region in found.regions] == [10_000, 10_000, 5_000]


@pytest.mark.parametrize(
    "bad",
    ["NaN", "Infinity", '"nan"', '"1,5"', "true", "null", "[1]", "1e9", "1" + "0" * 400, '"1_0"'],
)
def test_a_coordinate_that_is_not_a_number_of_px_is_refused(tmp_path, bad):
    text = json.dumps([feature("T"), feature("T")])
    text = text[::-1].replace("0", bad[::-1], 1)[::-1]  # the last coordinate
    with pytest.raises(SlideError, match=r"a\.geojson: .*number"):
        read(tmp_path, text.encode())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"type": "FeatureCollection"}, "neither a feature nor a geometry"),
        ({"features": {}}, "'features' must be a list"),
        ([feature("T"), 3], "neither a feature nor a geometry"),
        (feature("T") | {"features": []}, "it may have one"),
        (feature("T") | {"properties": []}, "'properties' is not an object"),
        (feature("T", geometry={"type": "polygon", "coordinates": []}), "not a geometry"),
        (feature("T", geometry={"type": "Polygon", "coordinates": [[1, 2], [3, 4]]}), "a position"),
        (feature("T", geometry={"type": "Polygon", "coordinates": [[[1]]]}), "needs x and y"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\x1f\x8b\x08nothing", "cannot be read"),
        (gzip.compress(b"{}" * 999, mtime=0)[:-9], "cannot be read"),
        (b"", "cannot be read"),
        (b"<Annotations MicronsPerPixel='0.5'/>", "root element is Annotations"),
        (b"<?xml version='1.0' encoding='none'?><a/>", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_understood_is_refused(tmp_path, content, reason):
    with pytest.raises(SlideError, match=reason):
        read(tmp_path, content)


# --- ASAP ------------------------------------------------------------------------------------


def asap(*annotations: tuple[str, str, list]) -> bytes:
    """Annotations of (type, group, coordinates): attributes of each, or x and y."""
    root = ElementTree.Element("ASAP_Annotations")
    parent = ElementTree.SubElement(root, "Annotations")
    for kind, group, points in annotations:
        about = {"Name": "Annotation 0", "Type": kind, "PartOfGroup": group, "Color": "#F4FA58"}
        places = ElementTree.SubElement(
            ElementTree.SubElement(parent, "Annotation", about), "Coordinates"
        )
        for i, point in enumerate(points):
            if not isinstance(point, dict):
                point = {"Order": str(i), "X": str(point[0]), "Y": str(point[1])}
            ElementTree.SubElement(places, "Coordinate", point)
    return ElementTree.tostring(root)


SQUARE = rectangle(0, 0, 10, 10)[:4]


def test_asap_types_and_groups_are_read_or_listed(tmp_path):
    found = read(
        tmp_path,
        asap(
            ("Polygon", "metastases", SQUARE),
            ("Spline", " normal ", SQUARE),
            ("Rectangle", "None", SQUARE),
            ("Dot", "metastases", SQUARE[:1]),
            ("PointSet", "None", SQUARE),
            ("Polygon", "metastases", SQUARE[:1]),  # an accidental click
            ("Polygon", "metastases", []),
        ),
        "a.xml",
    )
    assert [region.label for region in found.regions] == ["metastases", "normal", ""]
    assert found.origin == "level0"
    assert unused_features(found).rows() == [
        (NO_CLASS, "", 1, [3]),
        ("a point, without an area", "metastases", 1, [4]),
        ("points, without an area", "", 1, [5]),
        ("a polygon without an area", "metastases", 2, [6, 7]),
    ]


def test_decimal_commas_are_read_unless_they_may_separate_thousands(tmp_path):
    points = [["0", "0"], ["10,5", "0"], ["10,125", "4"]]
    (region,) = read(tmp_path, asap(("Polygon", "T", points)), "a.xml").regions
    np.testing.assert_array_equal(region.rings[0], [[0, 0], [10.5, 0], [10.125, 4]])
    for wrong, reason in (
        ("10,125", "may be decimal or separate thousands"),
        ("1,234,567", "not a number"),
        ("1,234.5", "not a number"),
    ):
        with pytest.raises(SlideError, match=reason):
            read(tmp_path, asap(("Polygon", "T", [["0", "0"], [wrong, "0"], ["4", "4"]])), "a.xml")


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ([{"X": "0", "Y": "0"}, {"Order": "1", "X": "9", "Y": "0"}], "has no 'Order'"),
        ([{"Order": "1", "X": "0", "Y": "0"}, {"Order": "1", "X": "9", "Y": "0"}], "the same"),
        ([{"Order": "1.5", "X": "0", "Y": "0"}], "not a number"),
        ([{"Order": "0", "X": "0"}], "not a number of px: None"),
        ([{"Order": "0", "X": "nan", "Y": "0"}], "not a number of px"),
    ],
)
def test_asap_coordinates_without_a_clear_order_or_value_are_refused(tmp_path, points, reason):
    with pytest.raises(SlideError, match=f"annotation 2: .*{reason}"):
        read(tmp_path, asap(("Polygon", "T", SQUARE), ("Polygon", "T", points)), "a.xml")


def test_without_order_coordinates_are_read_in_the_order_of_the_file(tmp_path):
    points = [{"X": str(x), "Y": str(y)} for x, y in SQUARE]
    (region,) = read(tmp_path, asap(("Polygon", "T", points)), "a.xml").regions
    np.testing.assert_array_equal(region.rings[0], SQUARE)


def test_an_unknown_type_of_asap_is_refused(tmp_path):
    with pytest.raises(SlideError, match="annotation 1: not a type of ASAP: 'Blob'"):
        read(tmp_path, asap(("Blob", "T", SQUARE)), "a.xml")


# --- origins ---------------------------------------------------------------------------------


class Scanned(PlainSlide):
    """A slide whose scanned area does not start at its corner."""

    path = Path("scan.mrxs")
    bounds = (200, 300, 500, 400)


def corners(found: Annotations, slide: PlainSlide, **origins: str) -> list[list[float]]:
    """The top-left corner of each region on the slide."""
    return placed(
        found,
        slide,
        lambda regions: [region.rings[0].min(axis=0).tolist() for region in regions],
        lambda one, other: one == other,
        **origins,
    )


@pytest.mark.parametrize(
    ("stated", "origins", "corner"),
    [
        (None, {"origin": "bounds"}, [200, 300]),
        (None, {"origin": "level0"}, [0, 0]),
        (None, {"default": "bounds"}, [200, 300]),
        ("bounds", {}, [200, 300]),
        ("level0", {"default": "bounds"}, [0, 0]),
        ("level0", {"origin": "bounds"}, [200, 300]),
    ],
)
def test_regions_count_from_the_origin_that_is_set_or_stated(tmp_path, stated, origins, corner):
    collection = {"type": "FeatureCollection", "features": [feature("T")]}
    found = read(tmp_path, collection | ({"origin": stated} if stated else {}))
    assert corners(found, Scanned(), **origins) == [corner]


def test_asap_counts_from_level_0_also_beside_files_that_do_not(tmp_path):
    found = read(tmp_path, asap(("Polygon", "T", SQUARE)), "a.xml")
    assert corners(found, Scanned(), default="bounds") == [[0, 0]]


def test_an_unknown_origin_is_refused_only_where_it_matters(tmp_path):
    found = read(tmp_path, [feature("T")])
    with pytest.raises(SlideError, match="starts at x, y = 200, 300 .* set 'origin' to 'bounds'"):
        corners(found, Scanned())
    whole = Scanned()
    whole.bounds = (0, 0, 500, 400)
    assert corners(found, whole) == [[0, 0]]
    assert corners(read(tmp_path, []), Scanned()) == []
    same = placed(found, Scanned(), len, lambda one, other: one == other)  # either way 1 region
    assert same == 1


# --- mutated files ---------------------------------------------------------------------------

_VALUES = [None, True, -1, 1e12, "", "x", "12", "NaN", [], {}, [[]], [[1, 2]], "Point", "Polygon"]


def mutated(data: object, random: Random) -> object:
    """A copy of JSON data with one member replaced, removed, repeated or wrapped."""
    data = copy.deepcopy(data)
    places = []
    waiting = [data]
    while waiting:
        item = waiting.pop()
        keys = item if isinstance(item, dict) else range(len(item))
        places += [(item, key) for key in keys]
        waiting += [item[key] for key in keys if isinstance(item[key], dict | list)]
    parent, key = random.choice(places)
    action = random.randrange(5)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif action == 2:
        parent[key] = [parent[key]]
    else:
        parent[key] = copy.deepcopy(random.choice(_VALUES))
    return data


def assert_accounted(found: Annotations, features: int) -> None:
    """Each feature is a region with an area or listed with a reason."""
    assert found.features == features
    used = {region.feature for region in found.regions}
    listed = {unused.feature for unused in found.unused}
    assert used | listed == set(range(1, features + 1))
    assert all(region.area > 0 for region in found.regions)
    assert all(unused.reason for unused in found.unused)
    assert set(unused_features(found).explode("features")["features"]) >= listed


def read_or_refuse(path: Path) -> Annotations | None:
    try:
        return read_annotations(path)
    except SlideError:
        return None


def count_features(data: object) -> int:
    if isinstance(data, list):
        return sum(map(count_features, data))
    return count_features(data["features"]) if "features" in data else 1


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(seed=seeds, steps=st.integers(1, 4))
def test_mutated_geojson_is_refused_or_accounted_for(seed, steps):
    random = Random(seed)
    cell = feature({"name": "Cell"}, nucleusGeometry=feature("x")["geometry"])
    cell["properties"]["objectType"] = "cell"
    lines = {"type": "GeometryCollection", "geometries": [{"type": "Point", "coordinates": [1, 2]}]}
    pieces = [[rectangle(0, 0, 9, 9), rectangle(2, 2, 4, 4)], [rectangle(20, 0, 29, 9)]]
    valid: object = {
        "type": "FeatureCollection",
        "features": [
            feature({"names": ["Tumor", "Positive"]}, id="PathAnnotationObject"),
            feature("Stroma", geometry={"type": "MultiPolygon", "coordinates": pieces}),
            cell,
            feature(None, geometry=lines),
        ],
    }
    for _ in range(10):  # files for each seed
        data = valid
        for _ in range(steps):
            data = mutated(data, random) if data else data
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a.geojson")
            path.write_text(json.dumps(data))
            found = read_or_refuse(path)
        if found is not None:
            assert_accounted(found, count_features(data))
            region_mask(found.regions, PlainSlide(), (70, 90), 2.5)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(seed=seeds, steps=st.integers(1, 4))
def test_mutated_asap_xml_is_refused_or_accounted_for(seed, steps):
    random = Random(seed)
    text = asap(
        ("Polygon", "tumor", SQUARE),
        ("Spline", "None", SQUARE[:3]),
        ("Dot", "tumor", SQUARE[:1]),
        ("Rectangle", "_2", SQUARE),
    )
    for _ in range(10):
        root = ElementTree.fromstring(text)
        for _ in range(steps):
            parents = [element for element in root.iter() if len(element)]
            if not parents:
                break
            parent = random.choice(parents)
            child = random.choice(list(parent))
            action = random.randrange(4)
            if action == 0:
                parent.remove(child)
            elif action == 1:
                parent.append(copy.deepcopy(child))
            elif child.attrib:
                name = random.choice(list(child.attrib))
                values = ["", "x", "1,5", "-3", "1e99", "nan", "Dot", "None", "Polygon", "7"]
                child.set(name, random.choice(values))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a.xml")
            path.write_bytes(ElementTree.tostring(root))
            found = read_or_refuse(path)
        if found is not None:
            assert_accounted(found, len(list(root.iter("Annotation"))))


@settings(max_examples=300, deadline=None)
@given(seed=seeds, kind=st.sampled_from(["geojson", "xml"]))
def test_damaged_bytes_raise_no_other_error(seed, kind):
    random = Random(seed)
    text = json.dumps([feature("T")]).encode() if kind == "geojson" else ASAP.encode()
    data = bytearray(random.choice([text, gzip.compress(text), text.decode().encode("utf-16")]))
    for _ in range(random.randint(1, 6)):
        data[random.randrange(len(data))] = random.randrange(256)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a.{kind}")
        path.write_bytes(data[: random.randint(1, len(data))])
        found = read_or_refuse(path)
    if found is not None:
        assert_accounted(found, found.features)

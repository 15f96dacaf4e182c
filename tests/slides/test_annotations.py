"""Polygons of QuPath and ASAP, and the labels they give to cells."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nic_core.patches import patch_table
from nic_core.slides import SlideError, open_slide
from nic_core.slides.annotations import Region, label_patches, read_annotations, region_mask
from nic_core.tissue import TissueMask


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
</Annotations><AnnotationGroups/></ASAP_Annotations>"""


class Plain:
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
    regions = read_annotations(path)
    assert [region.label for region in regions] == ["Tumor", "Stroma", "Stroma", ""]
    assert len(regions[0].rings) == 2
    mask = region_mask(regions[:1], Plain(), (700, 900), 0.25)
    expected = np.zeros((700, 900), bool)
    expected[:400, :400] = True
    expected[100:200, 100:200] = False
    assert (mask != expected).mean() < 0.002  # points on an edge may fall to either side


def test_asap_polygons_are_read_in_their_order(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(ASAP)
    (region,) = read_annotations(path)
    assert region.label == "tumor"
    np.testing.assert_array_equal(region.rings[0], [[0, 0], [100, 0], [100, 50], [0, 50]])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.xml", "<Aperio/>"),
        ("a.xml", "<ASAP_Annotations>"),
        ("a.geojson", "{}"),
        ("a.geojson", "no json"),
        ("a.geojson", geojson(("T", "Polygon", [[[0, 0], [1, 1]]]))),
        ("a.geojson", geojson(("T", "Polygon", [[[0, 0], [1, None], [2, 2]]]))),
    ],
)
def test_what_is_no_annotation_is_refused(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SlideError, match="no annotation"):
        read_annotations(path)


def test_a_missing_annotation_is_refused(tmp_path):
    with pytest.raises(SlideError, match=r"gone.xml"):
        read_annotations(tmp_path / "gone.xml")


@given(x=st.integers(0, 500), y=st.integers(0, 400), w=st.integers(20, 300), h=st.integers(20, 300))
def test_a_rectangle_covers_its_area(x, y, w, h):
    region = Region("a", (np.array(rectangle(x, y, x + w, y + h)),))
    mask = region_mask([region], Plain(), (700, 900), 0.25)
    assert abs(mask.sum() - w * h) <= w + h + 2


def test_cells_have_the_label_of_most_of_their_area(files):
    with open_slide(files["tiff"]) as slide:
        table = patch_table(
            "s",
            slide,
            TissueMask(np.ones((22, 29), bool), 8.0),
            patch=32,
            mpp=0.5,
            tissue=0.6,
        )
        regions = [  # cells of 64 level-0 px
            Region("tumor", (np.array(rectangle(0, 0, 64, 64)),)),
            Region("stroma", (np.array(rectangle(64, 0, 64 + 40, 64)),)),
            Region("tumor", (np.array(rectangle(64 + 40, 0, 128, 64)),)),
            Region("tumor", (np.array(rectangle(128, 0, 128 + 20, 64)),)),
        ]
        labels = label_patches(table, regions, slide)
        strict = label_patches(table, regions, slide, share=0.7)
    assert labels["label"].head(4).to_list() == ["tumor", "stroma", None, None]
    np.testing.assert_allclose(labels["share"].head(4), [1, 0.625, 0.3125, 0], atol=0.07)
    assert strict["label"].head(4).to_list() == ["tumor", None, None, None]
    assert labels.height == table.height


def test_without_regions_no_cell_has_a_label(files):
    with open_slide(files["tiff"]) as slide:
        mask = TissueMask(np.ones((22, 29), bool), 8.0)
        table = patch_table("s", slide, mask, patch=32, mpp=0.5, tissue=0.6)
        labels = label_patches(table, [], slide)
    assert labels["label"].is_null().all()

"""Annotations of QuPath and ASAP, their masks, and the labels of cells."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage import draw

from nic_core.slides import SlideError, open_slide
from nic_core.tiling.annotations import Region, label_patches, read_annotations, region_mask
from nic_core.tiling.patches import patch_table
from nic_core.tiling.tissue import TissueMask


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
    regions = read_annotations(path)
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
    found, no_group = read_annotations(path)
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
        ("a.geojson", geojson(("T", "Polygon", [[[0, 0], [1, 1]]]))),
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


corner = st.floats(-300, 1200, allow_subnormal=False)
seeds = st.integers(0, 2**32 - 1)


def mask_of(region: Region, mpp: float = 0.25) -> np.ndarray:
    return region_mask([region], PlainSlide(), (round(175 / mpp), round(225 / mpp)), mpp)


@given(
    x=st.tuples(corner, corner).map(sorted),
    y=st.tuples(corner, corner).map(sorted),
    mpp=st.sampled_from([0.25, 1.0, 2.5]),
)
def test_a_rectangle_is_filled_at_px_centres(x, y, mpp):
    mask = mask_of(Region("a", (np.array(rectangle(x[0], y[0], x[1], y[1])),)), mpp)
    across, down = ((np.arange(n) + 0.5) * mpp / 0.25 for n in mask.shape[::-1])
    expected = np.outer((down >= y[0]) & (down < y[1]), (across >= x[0]) & (across < x[1]))
    # within 1e-5 px of an edge the result depends on rounding
    on_row, on_column = (
        (abs(centres[:, None] - edges) < 1e-5).any(axis=1)
        for centres, edges in ((down, y), (across, x))
    )
    near = on_row[:, None] | on_column
    np.testing.assert_array_equal(mask | near, expected | near)


@given(seed=seeds, corners=st.integers(3, 40))
def test_polygons_are_filled_as_by_scikit_image(seed, corners):
    ring = np.random.default_rng(seed).uniform(-100, 1000, (corners, 2))
    expected = draw.polygon2mask((70, 90), ring[:, ::-1] / 10 - 0.5)
    np.testing.assert_array_equal(mask_of(Region("a", (ring,)), 2.5), expected)
    # the same ring with another start, the other direction and a repeated end
    reversed_ring = np.roll(ring[::-1], 2, axis=0)
    reversed_ring = np.concatenate([reversed_ring, reversed_ring[:1]])
    np.testing.assert_array_equal(mask_of(Region("a", (reversed_ring,)), 2.5), expected)


@given(seed=seeds, whole=st.booleans())
def test_adjacent_areas_neither_overlap_nor_leave_a_gap(seed, whole):
    # if whole, vertices are on px centres
    rng = np.random.default_rng(seed)
    seam = rng.uniform(100, 600, (8, 2))
    if whole:
        seam = np.floor(seam) + 0.5
    first = np.concatenate([[[50, 50]], [[300, 50]], seam, [[300, 650]], [[50, 650]]])
    second = np.concatenate([[[850, 650]], [[300, 650]], seam[::-1], [[300, 50]], [[850, 50]]])
    one, other = (mask_of(Region("a", (ring,))) for ring in (first, second))
    both = mask_of(Region("a", (np.array(rectangle(50, 50, 850, 650)),)))
    # xor, because a seam that crosses itself or the frame swaps sides
    np.testing.assert_array_equal(one ^ other, both)


def test_regions_outside_the_slide_give_an_empty_mask():
    for x, y in ((-500, 0), (950, 0), (0, -500), (0, 750)):
        assert not mask_of(Region("a", (np.array(rectangle(x, y, x + 40, y + 40)),))).any()


def cells_of(columns: int, rows: int) -> pl.DataFrame:
    """A patch table with cells of 64 level-0 px."""
    slide = PlainSlide()
    slide.width, slide.height = 64 * columns, 64 * rows
    mask = TissueMask(np.ones((1, 1), bool), 8.0)
    return patch_table("s", slide, mask, patch=32, mpp=0.5, tissue=0.6)


@given(
    x=st.tuples(st.integers(-20, 84), st.integers(-20, 84)).map(sorted),
    y=st.tuples(st.integers(-20, 68), st.integers(-20, 68)).map(sorted),
)
def test_the_coverage_of_a_rectangle_is_exact(x, y):
    # vertices on sixteenths of a cell, the resolution of the sample points
    ring = np.array(rectangle(4 * x[0], 4 * y[0], 4 * x[1], 4 * y[1]))
    labels = label_patches(cells_of(4, 3), [Region("a", (ring,))], PlainSlide(), min_coverage=0.5)
    across, down = (
        np.clip(np.minimum(edges[1], at + 16) - np.maximum(edges[0], at), 0, None) / 16
        for edges, at in ((x, 16 * np.arange(4)), (y, 16 * np.arange(3)))
    )
    expected = np.outer(down, across).ravel()
    np.testing.assert_array_equal(labels["coverage"], expected.astype(np.float32))
    assert labels["label"].to_list() == ["a" if area > 0.5 else None for area in expected]


@given(seed=seeds)
def test_the_coverage_of_a_triangle_is_close_to_its_area(seed):
    ring = np.random.default_rng(seed).uniform(0, 64, (3, 2))
    (a, b), (c, d) = ring[1:] - ring[0]
    labels = label_patches(cells_of(1, 1), [Region("a", (ring,))], PlainSlide())
    assert labels["coverage"][0] == pytest.approx(abs(a * d - b * c) / 2 / 64**2, abs=0.05)


def region(label: str, *corners: float) -> Region:
    return Region(label, (np.array(rectangle(*corners)),))


@pytest.mark.parametrize(
    ("regions", "label", "coverage"),
    [
        # regions of the same label that overlap count once
        ([region("a", 0, 0, 40, 64), region("a", 0, 0, 40, 64)], "a", 0.625),
        ([region("a", 0, 0, 40, 64), region("a", 20, 0, 60, 64)], "a", 0.9375),
        # regions of two labels that overlap count for both
        ([region("a", 0, 0, 40, 64), region("b", 0, 0, 60, 64)], "b", 0.9375),
        # a tie goes to the first label in alphabetical order
        ([region("b", 0, 0, 40, 64), region("a", 24, 0, 64, 64)], "a", 0.625),
        # the coverage must exceed min_coverage
        ([region("a", 0, 0, 32, 64)], None, 0.5),
        # regions without a label are ignored
        ([region("", 0, 0, 64, 64)], None, 0.0),
        ([region("", 0, 0, 64, 64), region("a", 0, 0, 40, 64)], "a", 0.625),
    ],
)
def test_overlaps_ties_and_unlabelled_regions_follow_the_rule(regions, label, coverage):
    labels = label_patches(cells_of(1, 1), regions, PlainSlide(), min_coverage=0.5)
    assert labels.row(0) == (0, 0, label, coverage)
    assert dict(labels.schema)["coverage"] == pl.Float32


def test_a_cell_gets_the_label_with_the_largest_coverage(files):
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
        strict = label_patches(table, regions, slide, min_coverage=0.7)
    assert labels["label"].head(4).to_list() == ["tumor", "stroma", None, None]
    np.testing.assert_array_equal(labels["coverage"].head(4), [1, 0.625, 0.3125, 0])
    assert strict["label"].head(4).to_list() == ["tumor", None, None, None]
    assert labels.height == table.height


def test_without_regions_no_cell_gets_a_label(files):
    with open_slide(files["tiff"]) as slide:
        mask = TissueMask(np.ones((22, 29), bool), 8.0)
        table = patch_table("s", slide, mask, patch=32, mpp=0.5, tissue=0.6)
        labels = label_patches(table, [], slide)
    assert labels["label"].is_null().all()

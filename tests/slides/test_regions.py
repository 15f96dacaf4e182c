"""Regions: their masks, the labels of cells, regions inside regions."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from skimage import draw

from nic_core.cohort import Geometry
from nic_core.slides import open_slide
from nic_core.tiling.patches import patch_table
from nic_core.tiling.regions import (
    Region,
    covered_regions,
    label_patches,
    region_mask,
    tissue_fraction,
)
from nic_core.tiling.tissue import TissueMask


def rectangle(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


class PlainSlide:
    """The attributes of a slide that regions use."""

    width, height, mpp = 900, 700, 0.25


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
    return patch_table("s", slide, mask, Geometry(32, 0.5, 32), tissue=0.6)


@given(
    x=st.tuples(st.integers(-20, 84), st.integers(-20, 84)).map(sorted),
    y=st.tuples(st.integers(-20, 68), st.integers(-20, 68)).map(sorted),
)
def test_the_coverage_of_a_rectangle_is_exact(x, y):
    # vertices on sixteenths of a cell, the resolution of the sample points
    ring = np.array(rectangle(4 * x[0], 4 * y[0], 4 * x[1], 4 * y[1]))
    labels = label_patches(cells_of(4, 3), [Region("a", (ring,))], min_coverage=0.5)
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
    labels = label_patches(cells_of(1, 1), [Region("a", (ring,))])
    assert labels["coverage"][0] == pytest.approx(abs(a * d - b * c) / 2 / 64**2, abs=0.05)


def region(label: str, *corners: float) -> Region:
    return Region(label, (np.array(rectangle(*corners)),))


@pytest.mark.parametrize(
    ("regions", "label", "coverage"),
    [
        # regions of the same label that overlap count once
        ([region("a", 0, 0, 40, 64), region("a", 0, 0, 40, 64)], "a", 0.625),
        ([region("a", 0, 0, 40, 64), region("a", 20, 0, 60, 64)], "a", 0.9375),
        # where two labels overlap, the smaller region counts
        ([region("a", 0, 0, 40, 64), region("b", 0, 0, 60, 64)], "a", 0.625),
        ([region("b", 0, 0, 60, 64), region("a", 0, 0, 20, 64)], "b", 0.625),
        # of equal regions the last one counts
        ([region("b", 0, 0, 40, 64), region("a", 0, 0, 40, 64)], "a", 0.625),
        ([region("a", 0, 0, 40, 64), region("b", 0, 0, 40, 64)], "b", 0.625),
        # a tie goes to the first label in alphabetical order
        ([region("b", 0, 0, 32, 64), region("a", 32, 0, 64, 64)], None, 0.5),
        ([region("b", 0, 0, 64, 32), region("a", 0, 32, 64, 64)], None, 0.5),
        # the coverage must exceed min_coverage
        ([region("a", 0, 0, 32, 64)], None, 0.5),
        # regions without a label give none, even inside another
        ([region("a", 0, 0, 64, 64), region("", 0, 0, 40, 64)], "a", 1.0),
        ([region("", 0, 0, 64, 64)], None, 0.0),
        ([region("", 0, 0, 64, 64), region("a", 0, 0, 40, 64)], "a", 0.625),
    ],
)
def test_overlaps_and_unlabelled_regions_follow_the_rule(regions, label, coverage):
    labels = label_patches(cells_of(1, 1), regions, min_coverage=0.5)
    assert labels.row(0)[:4] == (0, 0, label, coverage)
    assert labels["touched"].all()
    assert dict(labels.schema)["coverage"] == pl.Float32


def test_a_cell_gets_the_label_with_the_largest_coverage(files):
    with open_slide(files["tiff"]) as slide:
        table = patch_table(
            "s",
            slide,
            TissueMask(np.ones((22, 29), bool), 8.0),
            Geometry(32, 0.5, 32),
            tissue=0.6,
        )
        regions = [  # cells of 64 level-0 px
            Region("tumor", (np.array(rectangle(0, 0, 64, 64)),)),
            Region("stroma", (np.array(rectangle(64, 0, 64 + 40, 64)),)),
            Region("tumor", (np.array(rectangle(64 + 40, 0, 128, 64)),)),
            Region("tumor", (np.array(rectangle(128, 0, 128 + 20, 64)),)),
        ]
        labels = label_patches(table, regions)
        strict = label_patches(table, regions, min_coverage=0.7)
    assert labels["label"].head(4).to_list() == ["tumor", "stroma", None, None]
    np.testing.assert_array_equal(labels["coverage"].head(4), [1, 0.625, 0.3125, 0])
    assert strict["label"].head(4).to_list() == ["tumor", None, None, None]
    assert labels.height == table.height


def test_without_regions_no_cell_gets_a_label(files):
    with open_slide(files["tiff"]) as slide:
        mask = TissueMask(np.ones((22, 29), bool), 8.0)
        table = patch_table("s", slide, mask, Geometry(32, 0.5, 32), tissue=0.6)
        labels = label_patches(table, [])
    assert labels["label"].is_null().all()


@pytest.mark.parametrize("seam", [[region("a", 0, 0, 64, 32), region("b", 0, 32, 64, 64)], []])
def test_a_tie_of_labels_goes_to_the_first_in_alphabetical_order(seam):
    labels = label_patches(cells_of(1, 1), seam, min_coverage=0.4)
    assert labels["label"].to_list() == (["a"] if seam else [None])


def test_a_region_inside_another_has_its_own_label():
    outer, inner, innermost = (
        region("tumour", 0, 0, 640, 640),
        region("necrosis", 128, 128, 384, 384),
        region("tumour", 192, 192, 256, 256),
    )
    cells = cells_of(10, 10)
    for regions in ([outer, inner, innermost], [innermost, inner, outer]):
        grid = label_patches(cells, regions)["label"].to_numpy().reshape(10, 10)
        expected = np.full((10, 10), "tumour", object)
        expected[2:6, 2:6] = "necrosis"
        expected[3, 3] = "tumour"
        np.testing.assert_array_equal(grid, expected)


def test_a_bow_tie_is_not_smaller_than_a_region_inside_it():
    # its two halves turn in opposite directions, so their signed areas cancel
    bow_tie = Region("tumour", (np.array([[0, 0], [640, 640], [640, 0], [0, 640.0]]),))
    labels = label_patches(cells_of(10, 10), [bow_tie, region("stroma", 0, 256, 128, 384)])
    assert labels.filter(row=5, column=0)["label"].item() == "stroma"
    assert labels.filter(row=5, column=2)["label"].item() == "tumour"


def test_cells_are_touched_by_areas_of_any_size_but_not_by_edges():
    cells = cells_of(3, 2)
    # between the sample points, on a whole cell, outside
    for corners, touched in (
        ((65, 1, 65.5, 1.5), [1]),
        ((64, 0, 128, 64), [1]),
        ((63, 63, 65, 65), [0, 1, 3, 4]),
        ((-9, -9, 0, 0), []),
    ):
        for label in ("", "a"):
            found = label_patches(cells, [region(label, *corners)])["touched"]
            assert found.arg_true().to_list() == touched


@given(seed=seeds)
def test_covered_areas_are_those_of_shapely(seed):
    random = np.random.default_rng(seed)
    hulls = [shapely.MultiPoint(p).convex_hull for p in random.uniform(0, 100, (5, 6, 2))]
    regions = [
        Region(f"c{i}", (np.array(hull.exterior.coords),), i)
        for i, hull in enumerate(hulls, start=1)
    ]
    table = covered_regions(regions)
    expected = {
        (i, j): hulls[i - 1].intersection(hulls[j - 1]).area
        for i in range(1, 6)
        for j in range(1, 6)
        if hulls[i - 1].area < hulls[j - 1].area
    }
    found = {(row["inner"], row["outer"]): row for row in table.to_dicts()}
    assert {pair for pair, area in expected.items() if area > 1e-6} <= set(found)
    for (i, j), row in found.items():
        assert row["covered_area"] == pytest.approx(expected[i, j])
        assert row["share"] == pytest.approx(expected[i, j] / hulls[i - 1].area)
        assert (row["inner_area"], row["outer_area"]) == pytest.approx(
            (hulls[i - 1].area, hulls[j - 1].area)
        )
        assert (row["inner_label"], row["outer_label"]) == (f"c{i}", f"c{j}")


def test_of_equal_regions_the_later_one_is_the_inner_one():
    one, other = region("a", 0, 0, 9, 9), region("b", 0, 0, 9, 9)
    (row,) = covered_regions([one, other]).to_dicts()
    assert (row["inner_label"], row["outer_label"], row["share"]) == ("b", "a", 1.0)
    assert covered_regions([]).is_empty()
    assert covered_regions([one, region("b", 9, 0, 18, 9)]).is_empty()  # a common edge


@pytest.mark.parametrize(
    ("corners", "fraction"),
    [
        ((0, 0, 400, 700), 1.0),
        ((0, 0, 900, 700), 4 / 9),
        ((400, 0, 900, 700), 0.0),
        ((-400, 0, 400, 100), 0.5),  # half of it is outside the slide
        ((1e6, 1e6, 2e6, 2e6), 0.0),
        ((10, 10, 11, 11), 1.0),  # smaller than a px of the mask
        ((390, 0, 390.5, 600), 1.0),  # thinner than the distance of two sample points
    ],
)
def test_the_tissue_fraction_of_a_region_is_that_of_its_area(corners, fraction):
    mask = np.zeros((175, 225), bool)
    mask[:, :100] = True  # 1 um/px: the left 400 px of level 0
    found = tissue_fraction(region("a", *corners), TissueMask(mask, 1.0), 0.25)
    assert found == pytest.approx(fraction, abs=0.01)

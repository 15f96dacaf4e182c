"""Heatmaps: files as other programs read them, areas, pictures, scores."""

from __future__ import annotations

import json

import numpy as np
import ome_zarr.io
import ome_zarr.reader
import openslide
import pytest
import pyvips
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from ome_zarr_models.v05.image import Image

from nic_core.grids import GridError
from nic_core.maps.heatmaps import (
    EXTREMES,
    GEOJSON,
    OVERLAY,
    PATCHES,
    TIFF,
    ZARR,
    colour_limits,
    extreme_patches,
    heat_overlay,
    hot_areas,
    outlines,
    patch_sheet,
    read_heatmap,
    score_heat,
    write_heatmap,
)
from nic_core.slides import SlideError, content_identity, open_slide
from nic_core.tiling.annotations import placed, read_annotations
from nic_core.tiling.regions import Region, region_mask
from tests.provenance import provenance
from tests.slides.conftest import paint
from tests.slides.vendors import write_mirax

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slide(files):
    with open_slide(files["tiff"]) as opened:
        yield opened


@pytest.fixture(scope="module")
def about(files):
    """Provenance of a grid of 7 x 9 cells of 100 level-0 px."""
    return provenance(slide_identity=content_identity(files["tiff"]), patch=50, stride=50)


@pytest.fixture
def heat():
    random = np.random.default_rng(0)
    values = random.normal(size=(7, 9)).astype(np.float32)
    values[random.random((7, 9)) < 0.3] = np.nan
    return values


@pytest.fixture
def folder(tmp_path, heat, about, slide):
    write_heatmap(tmp_path / "s1", heat, about, slide, name="growth", caption="growth")
    return tmp_path / "s1"


def test_a_heatmap_is_written_atomically_and_read_back(folder, heat, about, slide):
    names = {TIFF, ZARR, GEOJSON, OVERLAY, PATCHES, EXTREMES}
    assert {path.name for path in folder.iterdir()} == names
    np.testing.assert_array_equal(read_heatmap(folder), heat)
    with pytest.raises(ValueError, match="slide 's1': no cell has heat"):
        write_heatmap(folder, heat * np.nan, about, slide, name="growth", caption="growth")
    beyond = about.model_copy(update={"patch": 10**6})  # a picture larger than memory
    with pytest.raises(MemoryError):
        write_heatmap(folder, heat, beyond, slide, name="growth", caption="growth")
    np.testing.assert_array_equal(read_heatmap(folder), heat)
    assert list(folder.parent.iterdir()) == [folder]
    write_heatmap(folder, heat, about, slide, name="growth", caption="growth", pictures=False)
    assert {path.name for path in folder.iterdir()} == {TIFF, ZARR, GEOJSON}


def test_a_missing_heatmap_is_an_error(tmp_path):
    with pytest.raises(GridError, match="cannot be read"):
        read_heatmap(tmp_path / "gone")


def test_a_heatmap_of_another_slide_is_refused(tmp_path, heat, about, files):
    with open_slide(files["svs"]) as other, pytest.raises(SlideError, match="not the slide 's1'"):
        write_heatmap(tmp_path / "s1", heat, about, other, name="growth", caption="growth")
    assert not list(tmp_path.iterdir())


def test_the_tiff_is_tiled_and_states_its_resolution(folder, heat):
    with tifffile.TiffFile(folder / TIFF) as file:
        page = file.pages[0]
        np.testing.assert_array_equal(page.asarray(), heat)
        assert page.is_tiled
        assert page.dtype == np.float32
        per_cm = [n / d for n, d in (page.tags[f"{a}Resolution"].value for a in "XY")]
        assert page.tags["ResolutionUnit"].value == tifffile.RESUNIT.CENTIMETER
    # 25 um per cell
    np.testing.assert_allclose(per_cm, [400, 400], rtol=1e-6)


def test_the_tiff_of_a_large_slide_is_a_pyramid(tmp_path, slide, about):
    heat = np.hypot(*np.mgrid[-300:300, -350:350]).astype(np.float32)
    write_heatmap(tmp_path / "s1", heat, about, slide, name="growth", caption="growth")
    assert pyvips.Image.new_from_file(str(tmp_path / "s1" / TIFF)).get("n-pages") == 3
    with tifffile.TiffFile(tmp_path / "s1" / TIFF) as file:
        half = heat.reshape(300, 2, 350, 2).mean((1, 3))
        np.testing.assert_allclose(file.pages[1].asarray(), half, rtol=1e-6)


def test_openslide_and_libvips_read_levels_and_resolution(tmp_path, slide, about):
    heat = np.hypot(*np.mgrid[-300:300, -350:350]).astype(np.float32)
    write_heatmap(
        tmp_path / "s1",
        heat,
        about,
        slide,
        name="growth",
        caption="growth",
        pictures=False,
    )
    path = tmp_path / "s1" / TIFF
    with openslide.OpenSlide(path) as opened:
        assert opened.properties["openslide.vendor"] == "generic-tiff"
        assert opened.level_dimensions == ((700, 600), (350, 300), (175, 150))
        assert opened.level_downsamples == (1, 2, 4)
        for axis in "xy":
            assert float(opened.properties[f"openslide.mpp-{axis}"]) == pytest.approx(25)
    for level, (width, height) in enumerate(((700, 600), (350, 300), (175, 150))):
        page = pyvips.Image.new_from_file(str(path), page=level)
        assert (page.width, page.height, page.format, page.bands) == (width, height, "float", 1)
        assert (page.get("tile-width"), page.get("tile-height")) == (256, 256)
        assert page.get("resolution-unit") == "cm"
    # levels are pages; all but the first are marked as reduced copies
    with tifffile.TiffFile(path) as file:
        assert [page.is_reduced for page in file.pages] == [False, True, True]
        assert not any("SubIFDs" in page.tags for page in file.pages)
        assert [level.shape for level in file.series[0].levels] == [
            (600, 700),
            (300, 350),
            (150, 175),
        ]


def test_ome_zarr_reads_the_position_on_the_slide(folder, heat):
    location = ome_zarr.io.parse_url(folder / ZARR)
    (node,) = list(ome_zarr.reader.Reader(location)())[:1]
    np.testing.assert_array_equal(np.asarray(node.data[0]), heat)
    (transforms,) = node.metadata["coordinateTransformations"]
    assert transforms[0]["scale"] == [25, 25]
    assert transforms[1]["translation"] == [12.375, 12.375]
    image = Image.from_zarr(zarr.open_group(folder / ZARR, mode="r"))
    (multiscale,) = image.ome_attributes.multiscales
    assert [axis.name for axis in multiscale.axes] == ["y", "x"]
    assert [axis.unit for axis in multiscale.axes] == ["micrometer", "micrometer"]


class Frame:
    """The attribute of a slide that region_mask uses; a cell is 40 px of 0.25 um."""

    mpp = 0.25


@settings(max_examples=80, deadline=None)
@given(
    mask=arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))),
    fill=st.booleans(),
)
def test_outlines_contain_exactly_the_centres_of_the_mask(mask, fill):
    if fill:  # masks with many holes
        mask = ~mask
    polygons = outlines(mask, 40)
    regions = [Region("", tuple(np.array(ring) for ring in polygon)) for polygon in polygons]
    # one region per polygon, so that rings of two polygons do not cancel
    np.testing.assert_array_equal(region_mask(regions, Frame(), mask.shape, 10), mask)
    for polygon in polygons:
        for i, ring in enumerate(polygon):
            assert ring[0] == ring[-1]
            assert len(ring) >= 4
            x, y = np.array(ring).T
            area = np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]) / 2
            assert (area > 0) == (i == 0)


@given(
    mask=arrays(bool, st.tuples(st.integers(1, 8), st.integers(1, 8))),
    x=st.integers(-500, 500),
    y=st.integers(-500, 500),
)
def test_outlines_of_other_cells_lie_at_the_same_place(mask, x, y):
    plain = outlines(mask, 40)
    moved = outlines(mask, 40, (x, y))
    for polygon, other in zip(plain, moved, strict=True):
        for ring, its in zip(polygon, other, strict=True):
            np.testing.assert_allclose(np.array(ring) + (x, y), its)
    if mask.any():
        halved = outlines(mask.repeat(2, 0).repeat(2, 1), 20, (x, y))
        ends = [
            [point(points, axis=0) for point in (np.min, np.max)]
            for polygons in (moved, halved)
            for points in [np.concatenate([ring for polygon in polygons for ring in polygon])]
        ]
        np.testing.assert_allclose(ends[0], ends[1])


OTHER_CELLS = {
    "plain": {},
    "half the stride": {"stride": 25},
    "another patch and um/px": {"patch": 40, "mpp": 0.625, "stride": 20},
    "an origin inside the slide": {"stride": 25, "origin": (100.0, 50.0)},
    "an origin outside the slide": {"stride": 25, "origin": (-100.0, -150.0)},
}


@pytest.mark.parametrize("changes", OTHER_CELLS.values(), ids=OTHER_CELLS)
def test_heat_of_any_grid_lies_at_its_place_on_the_slide(tmp_path, slide, pixels, about, changes):
    grid = about.model_copy(update=changes)
    x, y = ((np.arange(24) + 0.5) * grid.cell + corner for corner in grid.origin)
    hot = ((y > 200) & (y < 400))[:, None] & ((x > 300) & (x < 500))
    write_heatmap(
        tmp_path / "heat",
        hot.astype(np.float32),
        grid,
        slide,
        name="g",
        caption="g",
        quantiles=[0.998],
    )

    (area,) = read_annotations(tmp_path / "heat" / GEOJSON).regions
    corners = np.concatenate(area.rings)
    np.testing.assert_allclose([corners.min(0), corners.max(0)], [(300, 200), (500, 400)])

    location = ome_zarr.io.parse_url(tmp_path / "heat" / ZARR)
    (node,) = list(ome_zarr.reader.Reader(location)())[:1]
    ((scale, translation),) = node.metadata["coordinateTransformations"]
    step, start = np.array(scale["scale"]), np.array(translation["translation"])
    # um of the centres of the first and last hot pixel; the slide's first pixel centre is at 0
    ends = np.argwhere(np.asarray(node.data[0]))[[0, -1]] * step + start
    np.testing.assert_allclose(
        ends + 0.125, [(50 + step[0] / 2, 75 + step[1] / 2), (100 - step[0] / 2, 125 - step[1] / 2)]
    )

    only = np.where(hot, 1, np.nan).astype(np.float32)
    drawn = heat_overlay(slide, only, grid)
    coloured = (drawn != pixels).any(-1)[:660]  # without the scale bar
    rows, columns = np.nonzero(coloured)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (200, 399, 300, 499)

    sheet = patch_sheet(slide, extreme_patches(only, grid), grid)
    row, column = np.argwhere(hot)[0]
    side = grid.patch * grid.mpp / grid.slide_mpp
    first = slide.read(x[column] - side / 2, y[row] - side / 2, grid.patch, grid.patch, grid.mpp)
    np.testing.assert_array_equal(sheet[: grid.patch, : grid.patch], first)


def test_a_hole_is_a_second_ring():
    mask = np.ones((3, 3), bool)
    mask[1, 1] = False
    ((outer, hole),) = outlines(mask, 100)
    assert np.ptp(outer, axis=0).tolist() == [300, 300]
    assert np.mean(hole[:-1], axis=0).tolist() == [150, 150]


def test_an_area_contains_the_cells_that_reach_its_quantile(folder, heat, slide):
    regions = read_annotations(folder / GEOJSON).regions
    for quantile in (0.5, 0.75, 0.9):
        areas = [region for region in regions if region.label == f"growth q{quantile:g}"]
        mask = region_mask(areas, slide, heat.shape, 25)
        np.testing.assert_array_equal(mask, heat >= np.nanquantile(heat, quantile))
    features = json.loads((folder / GEOJSON).read_text())["features"]
    assert [f["properties"]["objectType"] for f in features] == ["annotation"] * 3


def test_areas_are_qupath_annotations_in_level_0_px(folder, heat, slide):
    areas = json.loads((folder / GEOJSON).read_text())
    assert set(areas) == {"type", "origin", "features"}
    assert areas["origin"] == "bounds"
    assert areas["type"] == "FeatureCollection"
    for feature in areas["features"]:
        assert set(feature) == {"type", "geometry", "properties"}
        assert feature["type"] == "Feature"
        properties = feature["properties"]
        assert properties["objectType"] == "annotation"
        assert isinstance(properties["name"], str)
        assert set(properties["classification"]) == {"name", "color"}
        colour = properties["classification"]["color"]
        assert len(colour) == 3
        assert all(isinstance(c, int) and 0 <= c <= 255 for c in colour)
        assert feature["geometry"]["type"] == "MultiPolygon"
        for polygon in feature["geometry"]["coordinates"]:
            for ring in polygon:
                assert len(ring) >= 4
                assert ring[0] == ring[-1]
                # a cell is 100 level-0 px
                x, y = np.array(ring).T
                assert 0 <= x.min() <= x.max() <= 900
                assert 0 <= y.min() <= y.max() <= 700
    every = [p for f in areas["features"] for q in f["geometry"]["coordinates"] for p in q[0]]
    assert np.ptp(every, axis=0).min() > 300  # coordinates are px, not cells


def test_areas_of_a_scanned_area_return_to_their_cells(tmp_path, about):
    levels = [paint(512 // 2**n, 512 // 2**n) for n in range(3)]
    outside = [i for i in range(16) if i < 4 or i % 4 == 0]
    path = write_mirax(tmp_path / "a.mrxs", levels, 0.25, picture=levels[2], missing=outside)
    heat = np.random.default_rng(1).random((6, 6)).astype(np.float32)
    of_slide = about.model_copy(update={"slide_identity": content_identity(path)})
    with open_slide(path) as scanned:
        assert scanned.bounds[:2] == (128, 128)
        write_heatmap(
            tmp_path / "heat",
            heat,
            of_slide,
            scanned,
            name="g",
            caption="g",
            pictures=False,
        )
        annotations = read_annotations(tmp_path / "heat" / GEOJSON)
        # QuPath shows the scanned area alone: the first cell is up and left of it
        assert min(ring.min() for area in annotations.regions for ring in area.rings) < 0
        for quantile in (0.5, 0.9):
            mask = placed(
                annotations,
                scanned,
                lambda regions, q=quantile: region_mask(
                    [region for region in regions if region.label == f"g q{q:g}"],
                    scanned,
                    heat.shape,
                    25,
                ),
                np.array_equal,
            )
            np.testing.assert_array_equal(mask, heat >= np.quantile(heat, quantile))


def test_uniform_heat_gives_one_area():
    (feature,) = hot_areas(np.ones((2, 2), np.float32), 10, name="x", quantiles=[0.9])["features"]
    assert len(feature["geometry"]["coordinates"]) == 1


def test_the_overlay_colours_only_cells_with_heat(slide, pixels, about):
    heat = np.full((7, 9), np.nan, np.float32)
    heat[2, 3], heat[2, 4] = -1, 1
    drawn = heat_overlay(slide, heat, about).astype(int)
    assert drawn.shape == pixels.shape
    blue, red = (drawn[200:300, x : x + 100].mean((0, 1)) for x in (300, 400))
    tissue = pixels[200:300, 300:500].mean((0, 1))
    assert blue[2] - blue[0] > tissue[2] - tissue[0] + 40
    assert red[0] - red[2] > tissue[0] - tissue[2] + 40
    np.testing.assert_array_equal(drawn[:200], pixels[:200])


def test_the_scale_bar_has_the_length_of_its_label(slide, about):
    heat = np.full((7, 9), np.nan, np.float32)
    heat[0, 0], heat[0, 1] = 0, 1
    drawn = heat_overlay(slide, heat, about)
    # a fifth of the width of 225 um is 45 um; the bar of 20 um has 80 px
    black = (drawn[-14] == 0).all(-1)
    assert black.sum() == 80
    assert black[12:92].all()


def test_the_sheet_shows_the_hottest_and_coldest_patches(slide, about, heat):
    sheet = patch_sheet(slide, extreme_patches(heat, about), about)
    rows, columns = np.nonzero(np.isfinite(heat))
    order = np.argsort(-heat[rows, columns])
    assert sheet.shape == (104, 8 * 54 - 4, 3)
    for line, cell in ((0, order[0]), (1, order[-1])):
        patch = slide.read(columns[cell] * 100, rows[cell] * 100, 50, 50, 0.5)
        np.testing.assert_array_equal(sheet[54 * line :][:50, :50], patch)


def test_score_heat_gives_known_scores():
    truth = np.array([[1, 1, 0, 0, -1]], np.int8)
    assert score_heat(np.array([[4, 3, 2, 1, 9]], np.float32), truth) == (1.0, True)
    assert score_heat(np.array([[4, 1, 5, 2, 9]], np.float32), truth) == (0.25, False)
    assert score_heat(np.array([[np.nan, 1, 0, 2, 9]], np.float32), truth) == (0.5, False)
    assert score_heat(np.array([[np.nan, np.nan, 0, 2, 9]], np.float32), truth) is None


@given(arrays(np.float32, (3, 4), elements=st.floats(-1e3, 1e3, width=32)))
def test_the_colours_of_heat_are_centred_at_zero(heat):
    low, high = colour_limits(heat)
    assert high > 0
    assert low == -high
    assert np.count_nonzero(np.abs(heat) <= high) >= 0.9 * heat.size or high == 1


def test_cells_that_speak_against_are_never_drawn_in_red(slide, pixels, about):
    heat = np.linspace(-1, -0.1, 63, dtype=np.float32).reshape(7, 9)  # none speaks for
    drawn = heat_overlay(slide, heat, about)[:600].astype(int)
    change = drawn - pixels[:600]
    assert (change[..., 2] - change[..., 0]).min() >= 0

"""Quality of cells, compared with plain reference implementations."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from nic_core.cohort import Geometry
from nic_core.slides import SlideError, open_slide
from nic_core.tiling.patches import MEASURED, check_patch_table, patch_table
from nic_core.tiling.quality import cell_statistics, measure_quality, summarize
from nic_core.tiling.tissue import TissueMask, tissue_mask
from tests.slides.conftest import GLASS, paint, write_tiff


def table_of(slide, mask=None, patch=32, tissue=0.6) -> pl.DataFrame:
    shape = round(slide.height * slide.mpp / 8) + 1, round(slide.width * slide.mpp / 8) + 1
    if mask is None:
        mask = np.random.default_rng(0).random(shape) < 0.7
    elif isinstance(mask, bool):
        mask = np.full(shape, mask)
    return patch_table(
        "s", slide, TissueMask(mask, 8.0), Geometry(patch, 0.5, patch), tissue=tissue
    )


def reference(pixels: np.ndarray) -> np.ndarray:
    """Focus and mean colour of one patch, computed with scipy."""
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    laplacian = ndimage.laplace(grey)[1:-1, 1:-1]
    return np.array([laplacian.var(), *pixels.reshape(-1, 3).mean(0)])


@pytest.mark.parametrize(("kind", "mpp"), [("tiff", 0.25), ("single", 0.2498), ("ome", 0.3)])
@pytest.mark.parametrize("patch", [32, 30, 33])
def test_kept_cells_are_measured_at_twice_their_mpp(files, kind, mpp, patch):
    with open_slide(files[kind], mpp=mpp) as slide:
        table = table_of(slide, patch=patch)
        measured = measure_quality(table, slide, workers=3)
        check_patch_table(measured, kind)
        assert measured.drop(MEASURED).equals(table.drop(MEASURED))
        assert 0 < measured["kept"].sum() < len(measured)
        side = round(patch / 2)
        for row in measured.filter("kept").iter_rows(named=True):
            if row["x"] + row["size"] > slide.width or row["y"] + row["size"] > slide.height:
                continue
            pixels = slide.read(row["x"], row["y"], side, side, patch * 0.5 / side)
            # coordinates computed in another order may round px values differently
            np.testing.assert_allclose([row[name] for name in MEASURED], reference(pixels), 2e-3)


def test_quality_does_not_depend_on_the_number_of_threads(files):
    with open_slide(files["tiff"]) as slide:
        table = table_of(slide)
        one, many = (measure_quality(table, slide, workers=n) for n in (1, 4))
    assert one.equals(many)


@given(arrays(np.uint8, st.tuples(*[st.integers(n, 9) for n in (1, 3, 3)], st.just(3))))
def test_statistics_equal_the_reference_in_any_orientation(pixels):
    found = cell_statistics(pixels)
    np.testing.assert_allclose(found, [reference(p) for p in pixels], rtol=1e-4, atol=1e-2)
    turned = cell_statistics(np.rot90(pixels, axes=(1, 2))[:, ::-1])
    np.testing.assert_allclose(turned, found, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (5, 2)])
def test_patches_without_inner_px_have_focus_0_and_a_colour(shape):
    found = cell_statistics(np.full((2, *shape, 3), (10, 20, 30), np.uint8))
    np.testing.assert_array_equal(found, [[0, 10, 20, 30]] * 2)


def test_blur_lowers_the_focus_of_every_cell(tmp_path):
    sharp = paint(512, 512)
    focus = []
    for sigma in (0, 1, 2, 4):
        blurred = ndimage.gaussian_filter(sharp, (sigma, sigma, 0))
        with open_slide(write_tiff(tmp_path / f"{sigma}.tif", blurred, mpp=1.0)) as slide:
            focus.append(measure_quality(table_of(slide, True), slide)["focus"].to_numpy())
    assert (np.diff(focus, axis=0) < 0).all()


def test_area_beyond_the_slide_affects_neither_focus_nor_colour(tmp_path):
    # half of the last row and column of cells is outside the slide
    path = write_tiff(tmp_path / "s.tif", np.full((112, 112, 3), (90, 40, 120), np.uint8), mpp=0.5)
    with open_slide(path) as slide:
        measured = measure_quality(table_of(slide, True, tissue=0.2), slide)
    assert measured["kept"].all()
    assert measured["focus"].max() == 0
    for name, value in (("red", 90), ("green", 40), ("blue", 120)):
        assert measured[name].unique().to_list() == [value]


def test_undecodable_cells_are_not_kept(damaged):
    with open_slide(damaged("tile")) as slide:
        table = table_of(slide, True)
        measured = measure_quality(table, slide, max_unreadable=0.1)
    check_patch_table(measured, "s")
    unreadable = measured.filter(reason="unreadable")
    # tile 5 of 4 x 4 covers cells 4 to 7 of 16 in both axes
    assert unreadable.height == 16
    assert set(unreadable["row"]) == set(unreadable["column"]) == {4, 5, 6, 7}
    assert not unreadable["kept"].any()
    assert unreadable["tissue"].to_list() == [1.0] * 16
    assert measured["kept"].sum() == 256 - 16
    assert summarize(measured) == {
        "kept": 240,
        "background": 0,
        "unreadable": 16,
        "unreadable_share": 16 / 256,
        "median_focus": pytest.approx(measured.filter("kept")["focus"].median()),
    }


def test_a_slide_with_too_many_undecodable_cells_is_refused(damaged):
    with (
        open_slide(damaged("middle")) as slide,
        pytest.raises(SlideError, match=r"16 of 256 patches cannot be decoded \(allowed: 5%\)"),
    ):
        measure_quality(table_of(slide, True), slide)


def test_background_cells_are_not_read(files, monkeypatch):
    with open_slide(files["tiff"]) as slide:
        table = table_of(slide, False)
        monkeypatch.setattr(slide, "read", None)
        measured = measure_quality(table, slide)
    check_patch_table(measured, "s")
    assert not measured["kept"].any()
    assert measured["reason"].unique().to_list() == ["background"]
    assert summarize(measured)["median_focus"] is None


@pytest.mark.parametrize("colour", [GLASS, (150, 70, 140)], ids=["glass", "stained"])
def test_a_slide_of_one_pixel_has_a_table_of_one_cell(tmp_path, colour):
    path = write_tiff(tmp_path / "s.tif", np.full((1, 1, 3), colour, np.uint8), mpp=0.5)
    with open_slide(path) as slide:
        mask = tissue_mask(slide)
        measured = measure_quality(
            patch_table("s", slide, mask, Geometry(128, 0.5, 128), tissue=0.6), slide
        )
    check_patch_table(measured, "s")
    assert measured["reason"].to_list() == ["background"]


def test_a_slide_full_of_tissue_keeps_every_cell(files):
    with open_slide(files["tiff"]) as slide:
        measured = measure_quality(table_of(slide, True, tissue=0.1), slide)
    assert measured["kept"].all()

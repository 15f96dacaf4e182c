"""Objects for QuPath: place, classes, measurements, and the command that writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import ome_zarr.io
import ome_zarr.reader
import openslide
import polars as pl
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from typer.testing import CliRunner

from nic_core import steps
from nic_core.cli import app
from nic_core.cohort import (
    ClassificationTarget,
    Cohort,
    CohortError,
    RegressionTarget,
    SurvivalTarget,
    load_cohort,
)
from nic_core.grids import (
    GridError,
    embedding_components,
    open_grid,
    read_colours,
)
from nic_core.maps.heatmaps import (
    hot_areas,
    outlines,
    read_cell_image,
    read_heatmap,
    write_cell_image,
    write_heatmap,
)
from nic_core.maps.qupath import (
    CellClass,
    cell_objects,
    class_area,
    heat_classes,
    map_class,
    tissue_area,
    write_objects,
)
from nic_core.slides import SlideError, open_slide
from nic_core.steps import probability_maps, qupath
from nic_core.steps.predictions import HEATMAP, PREDICTION
from nic_core.steps.probability_maps import CELLS, PROBABILITY
from nic_core.steps.qupath import encoders_with_grid, export_qupath
from nic_core.steps.slide_index import open_indexed
from nic_core.store import GridKey, MapKey, ModelKey, PatchTableKey, PredictionKey, Store
from nic_core.tiling.tissue import TissueMask
from nic_core.types import Origin
from tests.provenance import provenance
from tests.qupath_files import read_qupath
from tests.slides.conftest import paint
from tests.slides.vendors import write_mirax

SLIDE, ENCODER = "demo-01-1", "mean-rgb"
GROWTH = ClassificationTarget(
    name="growth", kind="classification", column="growth", classes=("replacement", "desmoplastic")
)

masks = arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))
places = st.fixed_dictionaries(
    {
        "slide_mpp": st.sampled_from([0.25, 0.2273, 0.4991, 1.0]),
        "mpp": st.sampled_from([0.5, 0.4999, 2.0]),
        "stride": st.sampled_from([128, 64, 34]),
        "origin": st.tuples(st.floats(-500, 500), st.floats(0, 9_000)),
    }
)


def written(tmp_path: Path, features, **changes):
    path = tmp_path / "objects.geojson"
    count = write_objects(path, features, origin="bounds", **changes)
    objects = read_qupath(path)
    assert len(objects) == count
    return objects


@settings(max_examples=60, deadline=None)
@given(mask=masks, changes=places, corner=st.tuples(st.integers(0, 999), st.integers(0, 999)))
def test_cells_are_tiles_at_their_place(tmp_path_factory, mask, changes, corner):
    about = provenance(**changes)
    values = np.arange(mask.size, dtype=np.float32).reshape(mask.shape)
    features = cell_objects(about, mask, {"value": values}, [], corner=corner)
    objects = written(tmp_path_factory.mktemp("t"), features)
    rows, columns = np.nonzero(mask)
    for item, row, column in zip(objects, rows, columns, strict=True):
        assert (item.kind, item.names) == ("tile", ())
        assert item.name == f"row {row}, column {column}"
        assert item.measurements == {"value": values[row, column]}
        left, top = (
            start + number * about.cell - moved
            for start, number, moved in zip(about.origin, (column, row), corner, strict=True)
        )
        bounds = (left, top, left + about.cell, top + about.cell)
        np.testing.assert_allclose(item.shape.bounds, bounds, atol=0.00501)
    shapes = [item.shape for item in objects]
    # neighbours touch: their corners are rounded alike, and no area is counted twice
    area = shapely.union_all(shapes).area
    np.testing.assert_allclose(area, sum(shape.area for shape in shapes), rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(mask=masks, changes=places, fill=st.booleans())
def test_areas_are_valid_and_cover_their_cells(tmp_path_factory, mask, changes, fill):
    about, mask = provenance(**changes), mask ^ fill
    found = class_area(about, CellClass("growth: high", (1, 2, 3), mask), corner=(7, 5))
    assert (found is None) == (not mask.any())
    if found is None:
        return
    (area,) = written(tmp_path_factory.mktemp("t"), [found])
    assert (area.kind, area.names) == ("annotation", ("growth", "high"))
    for row, column in np.ndindex(mask.shape):
        x, y = (
            start + (number + 0.5) * about.cell - moved
            for start, number, moved in zip(about.origin, (column, row), (7, 5), strict=True)
        )
        assert area.shape.contains(shapely.Point(x, y)) == mask[row, column]
    np.testing.assert_allclose(area.shape.area, mask.sum() * about.cell**2, rtol=1e-3)


@settings(max_examples=60, deadline=None)
@given(mask=masks, fill=st.booleans())
def test_outlines_are_valid_and_as_large_as_their_cells(mask, fill):
    mask = mask ^ fill
    area = shapely.MultiPolygon([(rings[0], rings[1:]) for rings in outlines(mask, 40)])
    assert area.is_valid
    assert area.area == mask.sum() * 40**2


@settings(max_examples=30, deadline=None)
@given(
    heat=arrays(np.float32, (6, 7), elements=st.floats(-2, 2, width=16)),
    name=st.sampled_from(["growth", "a.b-c_1", "größe"]),
)
def test_heat_areas_are_read_by_the_rules_of_qupath(tmp_path_factory, heat, name):
    path = tmp_path_factory.mktemp("t") / "heat.geojson"
    path.write_text(json.dumps(hot_areas(heat, 96.3, name=name, origin=(-20.5, 3))))
    assert [item.kind for item in read_qupath(path)] == ["annotation"] * 3


@settings(max_examples=30, deadline=None)
@given(mask=masks, mpp=st.sampled_from([8.0, 8.1, 16.0]))
def test_the_tissue_is_simplified_by_less_than_two_px(tmp_path_factory, mask, mpp):
    mask = mask.repeat(3, 0).repeat(3, 1)
    about = provenance(slide_mpp=0.25)
    found = tissue_area(about, TissueMask(mask, mpp), corner=(100, 50))
    assert (found is None) == (not mask.any())
    if found is None:
        return
    (area,) = written(tmp_path_factory.mktemp("t"), [found])
    px = mpp / 0.25
    polygons = outlines(mask, px, (-100, -50))
    exact = shapely.MultiPolygon([(rings[0], rings[1:]) for rings in polygons])
    assert area.names == ("Tissue",)
    assert area.shape.hausdorff_distance(exact) < 2 * px


def test_ids_are_equal_again_and_differ_by_slide_and_encoder(tmp_path):
    def ids(**changes):
        about = provenance(**changes)
        return {
            item["id"] for item in cell_objects(about, np.ones((3, 4), bool), {}, [], corner=(0, 0))
        }

    assert ids() == ids(software="another version")
    found = [ids(), ids(slide="s2"), ids(encoder="other")]
    assert len(set.union(*found)) == 3 * 12


def test_values_that_are_not_finite_are_left_out(tmp_path):
    values = np.array([[np.nan, np.inf, 1e-9, 1 / 3]])
    features = cell_objects(provenance(), np.ones((1, 4), bool), {"v": values}, [], corner=(0, 0))
    found = [item.measurements for item in written(tmp_path, features)]
    assert found == [{}, {}, {"v": 1e-9}, {"v": 0.333333}]


def test_a_cell_has_the_first_class_that_contains_it(tmp_path):
    one, two = np.array([[True, False, False]]), np.array([[True, True, False]])
    classes = [CellClass("a", (1, 1, 1), one), CellClass("b", (2, 2, 2), two)]
    features = cell_objects(provenance(), np.ones((1, 3), bool), {}, classes, corner=(0, 0))
    assert [item.names for item in written(tmp_path, features)] == [("a",), ("b",), ()]


# --- classes ---------------------------------------------------------------------------------


def test_the_top_tenth_of_the_cells_speaks_for_the_last_class():
    heat = np.linspace(-1, 1, 40, dtype=np.float32).reshape(5, 8)
    heat = np.concatenate([heat, np.full((5, 8), np.nan, np.float32)])
    top, following, low = heat_classes(heat, GROWTH)
    assert top.name == "growth: speaks for desmoplastic, top 10 %"
    assert following.name == "growth: speaks for desmoplastic, top 10 to 25 %"
    assert low.name == "growth: speaks for replacement, top 10 %"
    order = np.argsort(heat, axis=None)[:40]
    for of_class, expected in ((top, order[-4:]), (following, order[-10:-4]), (low, order[:4])):
        assert sorted(np.flatnonzero(of_class.cells)) == sorted(expected)


@given(heat=arrays(np.float32, (5, 6), elements=st.floats(-2, 2, width=16) | st.just(np.nan)))
def test_classes_of_heat_do_not_overlap_and_have_its_sign(heat):
    top, following, low = heat_classes(heat, GROWTH)
    assert (top.cells.astype(int) + following.cells + low.cells).max() <= 1
    assert (heat[top.cells | following.cells] > 0).all()
    assert (heat[low.cells] < 0).all()
    assert max(top.cells.sum(), low.cells.sum()) <= 0.1 * np.isfinite(heat).sum()


def test_equal_heat_has_no_class():
    for found in heat_classes(np.ones((9, 9), np.float32), GROWTH):
        assert not found.cells.any()


@pytest.mark.parametrize(
    ("target", "names"),
    [
        (
            GROWTH.model_copy(update={"classes": ("a", "b", "c")}),
            ("speaks for c", "speaks against c"),
        ),
        (
            GROWTH.model_copy(update={"classes": ("Tumor: Negative", "Tumor: Positive")}),
            ("speaks for Tumor - Positive", "speaks for Tumor - Negative"),
        ),
        (
            RegressionTarget(name="growth", kind="regression", column="g"),
            ("speaks for a high value", "speaks for a low value"),
        ),
        (
            SurvivalTarget(name="growth", kind="survival", time="t", event="e", unit="days"),
            ("speaks for a high risk", "speaks for a low risk"),
        ),
    ],
    ids=["three classes", "derived classes", "regression", "survival"],
)
def test_classes_name_what_heat_speaks_for(target, names):
    heat = np.linspace(-1, 1, 40, dtype=np.float32).reshape(5, 8)
    found = heat_classes(heat, target)
    assert (found[0].name, found[2].name) == tuple(f"growth: {n}, top 10 %" for n in names)


def test_a_map_class_is_a_probability_of_half_or_more():
    found = map_class("tumour", "tumor", np.array([[0.5, 0.49, np.nan]], np.float32))
    assert found.cells.tolist() == [[True, False, False]]


# --- from the store --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(mean_rgb_study, tmp_path_factory) -> tuple[Cohort, Store]:
    """A copy of the study with a heatmap of growth and a map of its first slide."""
    cohort, original = mean_rgb_study
    root = tmp_path_factory.mktemp("qupath") / "store"
    shutil.copytree(original.root, root)
    store = Store(root)
    grid = open_grid(store.grid(GridKey(encoder=ENCODER, slide=SLIDE)))
    heat = np.random.default_rng(0).normal(size=grid.valid.shape).astype(np.float32)
    heat[~grid.valid] = np.nan
    key = ModelKey(encoder=ENCODER, target="growth")
    with open_indexed(store, SLIDE) as slide:
        folder = store.explanation(key) / SLIDE
        write_heatmap(
            folder,
            heat,
            grid.provenance,
            slide,
            name="growth",
            caption="",
            pictures=False,
        )
    (entry,) = cohort.maps
    cohort = cohort.model_copy(update={"maps": (entry.model_copy(update={"encoder": ENCODER}),)})
    rows, columns = np.nonzero(grid.valid)
    folder = store.probability_map(MapKey(map=entry.name, slide=SLIDE))
    folder.mkdir(parents=True)
    probability = np.linspace(0, 1, len(rows), dtype=np.float32)
    pl.DataFrame({"row": rows, "column": columns, "probability": probability}).write_parquet(
        folder / CELLS
    )
    return cohort, store


@pytest.mark.slow
def test_the_cells_of_a_slide_have_what_the_store_has(study, tmp_path):
    cohort, store = study
    made = export_qupath(cohort, store, SLIDE, ENCODER, tmp_path)
    assert made.path == tmp_path / f"{SLIDE}.{ENCODER}.geojson"
    assert made.missing == ("heat of target 'proliferation'", "heat of target 'survival'")
    assert made.classified_by == "growth"
    objects = read_qupath(made.path)
    tiles = [item for item in objects if item.kind == "tile"]
    assert (made.cells, made.annotations) == (len(tiles), len(objects) - len(tiles))

    grid = open_grid(store.grid(GridKey(encoder=ENCODER, slide=SLIDE)))
    cells = np.argwhere(grid.valid)
    assert [item.name for item in tiles] == [f"row {r}, column {c}" for r, c in cells]
    patches = pl.read_parquet(store.patch_table(PatchTableKey(geometry="128px-0.5um", slide=SLIDE)))
    heat = read_heatmap(store.explanation(ModelKey(encoder=ENCODER, target="growth")) / SLIDE)
    components = embedding_components(grid, read_colours(store.embedding_colours(ENCODER)))
    expected = {
        "tissue fraction": patches.filter("kept")["tissue"],
        "focus": patches.filter("kept")["focus"],
        "growth: heat": heat[grid.valid],
        "tumour: probability of tumor": np.linspace(0, 1, len(tiles)),
        **{f"component {k + 1}": components[grid.valid][:, k] for k in range(3)},
    }
    assert made.measurements == tuple(expected)
    for name, values in expected.items():
        found = [item.measurements[name] for item in tiles]
        np.testing.assert_allclose(found, np.asarray(values, float), rtol=1e-5)
    names = {item.name.partition(" (")[0] for item in objects if item.kind == "annotation"}
    assert {"tissue", "tumour: tumor, probability 0.5 or more"} <= names


@pytest.mark.slow
def test_a_map_classifies_cells_and_the_others_are_left_out(study, tmp_path):
    cohort, store = study
    made = export_qupath(
        cohort, store, SLIDE, ENCODER, tmp_path, classify_by="tumour", cells="classified"
    )
    tiles = [item for item in read_qupath(made.path) if item.kind == "tile"]
    assert {item.names for item in tiles} == {("tumour", "tumor, probability 0.5 or more")}
    assert min(item.measurements["tumour: probability of tumor"] for item in tiles) >= 0.5
    none = export_qupath(cohort, store, SLIDE, ENCODER, tmp_path, cells="none", zipped=True)
    assert none.cells == 0
    assert {item.kind for item in read_qupath(none.path)} == {"annotation"}


@pytest.mark.slow
def test_heat_without_an_explanation_is_that_of_the_prediction(study, tmp_path):
    cohort, original = study
    shutil.copytree(original.root, tmp_path / "store")
    store = Store(tmp_path / "store")
    explained = store.explanation(ModelKey(encoder=ENCODER, target="growth")) / SLIDE
    folder = store.prediction(PredictionKey(champion="growth", slide=SLIDE))
    shutil.copytree(explained, folder / HEATMAP)
    expected = read_heatmap(explained)
    shutil.rmtree(explained)
    for encoder in (ENCODER, "another"):
        pl.DataFrame({"encoder": [encoder]}).write_parquet(folder / PREDICTION)
        made = export_qupath(cohort, store, SLIDE, ENCODER, tmp_path)
        if encoder == ENCODER:
            tiles = [item for item in read_qupath(made.path) if item.kind == "tile"]
            found = [item.measurements["growth: heat"] for item in tiles]
            np.testing.assert_allclose(found, expected[np.isfinite(expected)], rtol=1e-5)
        else:
            assert "heat of target 'growth'" in made.missing


@pytest.mark.slow
def test_the_same_export_gives_the_same_file(study, tmp_path):
    cohort, store = study
    for zipped in (False, True):
        first, second = (
            export_qupath(cohort, store, SLIDE, ENCODER, tmp_path / name, zipped=zipped).path
            for name in "ab"
        )
        assert first.read_bytes() == second.read_bytes()
    plain, archive = (tmp_path / "a" / f"{SLIDE}.{ENCODER}.geojson{end}" for end in ("", ".zip"))
    assert read_qupath(plain) == read_qupath(archive)


@pytest.mark.slow
def test_products_of_another_grid_are_refused(study, tmp_path):
    cohort, original = study
    shutil.copytree(original.root, tmp_path / "store")
    store, out = Store(tmp_path / "store"), tmp_path / "out"
    grid = open_grid(store.grid(GridKey(encoder=ENCODER, slide=SLIDE)))
    heat = store.explanation(ModelKey(encoder=ENCODER, target="growth")) / SLIDE / "heat.zarr"
    shutil.rmtree(heat)
    values = np.where(grid.valid, 1, np.nan).astype(np.float32)
    other = grid.provenance.model_copy(update={"weights_hash": "ee" * 16})
    write_cell_image(heat, values, other)
    with pytest.raises(GridError, match="of another grid .* materialize 'explanation' again"):
        export_qupath(cohort, store, SLIDE, ENCODER, out)
    shutil.rmtree(heat.parent)

    cells = store.probability_map(MapKey(map="tumour", slide=SLIDE)) / CELLS
    pl.read_parquet(cells).head(3).write_parquet(cells)
    with pytest.raises(GridError, match="materialize 'probability_map' again"):
        export_qupath(cohort, store, SLIDE, ENCODER, out)
    assert not out.exists()


@pytest.mark.slow
def test_a_probability_map_is_an_image_at_the_place_of_its_grid(study, tmp_path, monkeypatch):
    cohort, original = study
    shutil.copytree(original.root, tmp_path / "store")
    store, key = Store(tmp_path / "store"), MapKey(map="tumour", slide=SLIDE)
    cells = pl.read_parquet(store.probability_map(key) / CELLS)
    monkeypatch.setattr(probability_maps, "load_encoder", lambda folder: None)
    monkeypatch.setattr(probability_maps, "probability_map", lambda *arguments: cells)
    steps.make_probability_map(cohort, store, key)
    image = store.probability_map(key) / PROBABILITY
    grid = open_grid(store.grid(GridKey(encoder=ENCODER, slide=SLIDE)))
    values = read_cell_image(image)
    np.testing.assert_array_equal(np.isfinite(values), grid.valid)
    np.testing.assert_array_equal(values[grid.valid], cells["probability"])
    (node,) = list(ome_zarr.reader.Reader(ome_zarr.io.parse_url(image))())
    ((scale, translation),) = node.metadata["coordinateTransformations"]
    # a cell is 64 um; the centre of the slide's first pixel, which has 0.5 um, is at 0
    assert scale["scale"] == [64, 64]
    assert translation["translation"] == [31.75, 31.75]


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused(study, tmp_path, monkeypatch):
    cohort, store = study
    with pytest.raises(CohortError, match="slide 'nope' is not in the cohort"):
        encoders_with_grid(cohort, store, "nope")
    with pytest.raises(CohortError, match="'x' is neither a target nor a map of the cohort"):
        export_qupath(cohort, store, SLIDE, ENCODER, tmp_path, classify_by="x")
    with pytest.raises(CohortError, match="has no heat and no map 'survival'"):
        export_qupath(cohort, store, SLIDE, ENCODER, tmp_path, classify_by="survival")
    monkeypatch.setattr(qupath, "MOST_CELLS", 3)
    with pytest.raises(CohortError, match="too many for QuPath.*--cells classified"):
        export_qupath(cohort, store, SLIDE, ENCODER, tmp_path)
    export_qupath(cohort, store, SLIDE, ENCODER, tmp_path, cells="none")


@pytest.mark.slow
def test_the_command_exports_slides_and_names_those_that_failed(
    study, tiny_cohort, tmp_path, monkeypatch
):
    monkeypatch.setenv("NIC_COHORT", str(tiny_cohort))
    monkeypatch.setenv("NIC_STORE", str(study[1].root))
    arguments = ["export", "qupath", SLIDE, "nope", "--out", str(tmp_path), "--zip"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert f"{tmp_path / SLIDE}.{ENCODER}.geojson.zip: " in result.stdout
    assert "classes of cells: growth" in result.stdout
    assert "not in the store: heat of target 'proliferation'" in result.stdout
    assert "slide 'nope' is not in the cohort" in result.stdout
    read_qupath(tmp_path / f"{SLIDE}.{ENCODER}.geojson.zip")


@pytest.mark.slow
def test_tiles_lie_where_qupath_shows_their_cells(tmp_path):
    levels = [paint(1024 // 2**n, 1024 // 2**n) for n in range(3)]
    missing = [i for i in range(64) if i < 8 or i % 8 == 0]
    path = write_mirax(tmp_path / "s.mrxs", levels, 0.25, picture=levels[2], missing=missing)
    study = tmp_path / "cohort.yaml"
    study.write_text(
        f"name: t\nslides: {{folders: [{{path: '{path.parent}', pattern: '*.mrxs'}}]}}\n"
        f"encoders: [{{name: {ENCODER}, objective: mean_rgb, patch: 34, stride: 20}}]\n"
    )
    cohort, store = load_cohort(study), Store(tmp_path / "store")
    steps.make_slide_index(cohort, store)
    steps.make_slide(store, "s")
    (geometry,) = cohort.geometries
    steps.make_patch_table(cohort, store, PatchTableKey(geometry=geometry, slide="s"))
    steps.make_encoder(cohort, store, ENCODER)
    steps.make_grid(cohort, store, steps.prepare_encoder(cohort, store, ENCODER), "s")
    tiles = {}
    for origin in get_args(Origin):
        made = export_qupath(cohort, store, "s", ENCODER, tmp_path / origin, origin=origin)
        tiles[origin] = [item for item in read_qupath(made.path) if item.kind == "tile"]
    compared = 0
    with openslide.OpenSlide(path) as opened, open_slide(path) as slide:
        # QuPath adds OpenSlide's bounds to the coordinates of what it reads
        bounds = [int(opened.properties[f"openslide.bounds-{axis}"]) for axis in "xy"]
        assert bounds == [128, 128]
        for item, uncropped in zip(tiles["bounds"], tiles["level0"], strict=True):
            left, top, right, bottom = (int(value) for value in item.shape.bounds)
            assert (right - left, bottom - top) == (40, 40)
            assert uncropped.shape.bounds[:2] == (left + bounds[0], top + bounds[1])
            shown = np.asarray(opened.read_region((left + bounds[0], top + bounds[1]), 0, (40, 40)))
            row, column = (int(part.split()[1]) for part in item.name.split(", "))
            if (shown[..., 3] == 255).all():  # elsewhere the file has no image
                cell = slide.read(column * 40, row * 40, 40, 40, 0.25)
                np.testing.assert_array_equal(shown[..., :3], cell)
                compared += 1
    assert compared > 100


@pytest.mark.slow
def test_another_file_in_the_place_of_the_slide_is_refused(study, tmp_path, monkeypatch):
    cohort, store = study
    other = Path(pl.read_parquet(store.slide_index)["path"][1])
    monkeypatch.setattr(qupath, "open_indexed", lambda store, slide: open_slide(other))
    with pytest.raises(SlideError, match=f"is not the slide '{SLIDE}' of the grid"):
        export_qupath(cohort, store, SLIDE, ENCODER, tmp_path)

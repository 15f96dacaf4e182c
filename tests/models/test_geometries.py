"""A study whose encoders have other cells: models, explanations, report, predictions."""

from __future__ import annotations

import io
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zarr
from rich.console import Console

from nic_core import steps
from nic_core.cohort import Cohort, CohortError
from nic_core.cohort.index import row_source
from nic_core.encoders import load_encoder
from nic_core.grids import open_grid, write_grid
from nic_core.maps.heatmaps import ZARR, read_heatmap
from nic_core.models.files import load_model, read_model_card
from nic_core.models.prediction import ModelMismatchError, predict_grids, predict_slides
from nic_core.reports import encoders_table
from nic_core.slides import open_slide
from nic_core.steps.evaluation_report import ENCODERS
from nic_core.steps.slide_models import PREDICTIONS
from nic_core.store import GridKey, ModelKey, PatchTableKey, Store

pytestmark = pytest.mark.slow

PLAIN, FINE, COARSE = (
    ModelKey(encoder=name, target="growth") for name in ("mean-rgb", "fine", "coarse")
)


@pytest.fixture(scope="module")
def study(mean_rgb_study, tmp_path_factory) -> tuple[Cohort, Store, str]:
    """The study of mean colours with three encoders, and a slide that the second has no grid of.

    They are: 128 px at 0.5 um/px; the same with half the stride; and 112 px at 1 um/px.
    """
    cohort, original = mean_rgb_study
    store = Store(tmp_path_factory.mktemp("geometries") / "store")
    shutil.copytree(original.root, store.root)
    entry = cohort.encoder(PLAIN.encoder)
    fine = entry.model_copy(update={"name": FINE.encoder, "stride": 64})
    coarse = entry.model_copy(update={"name": COARSE.encoder, "patch": 112, "mpp": 1.0})
    cohort = cohort.model_copy(update={"encoders": (entry, fine, coarse)})
    units = pl.read_parquet(store.target_folds(FINE.target))
    lacking = units.filter(split="cv")["slides"][0][0]
    for key in (FINE, COARSE):
        steps.make_encoder(cohort, store, key.encoder)
        encoder = steps.prepare_encoder(cohort, store, key.encoder)
        for slide in steps.read_slide_index(store)["slide"]:
            if slide != lacking or key != FINE:
                geometry = cohort.geometry(key.encoder).name
                table = PatchTableKey(geometry=geometry, slide=slide)
                steps.make_patch_table(cohort, store, table)
                steps.make_grid(cohort, store, encoder, slide)
        steps.make_grid_manifest(store, key.encoder)
        steps.make_target_grids(store, key)
        steps.make_slide_model(cohort, store, key)
    return cohort, store, lacking


def test_the_card_has_the_geometry_of_the_grids(study):
    _, store, _ = study
    cards = [read_model_card(store.slide_model(key)) for key in (PLAIN, FINE, COARSE)]
    assert [(card.patch, card.mpp, card.stride, card.crop, card.crop_um) for card in cards] == [
        (128, 0.5, 128, 8, 512),
        (128, 0.5, 64, 16, 512),
        (112, 1.0, 112, 5, 560),
    ]


def test_the_report_compares_encoders_and_states_their_geometry(study):
    cohort, store, lacking = study
    report = steps.make_evaluation_report(cohort, store)
    assert report.encoders.rows() == [
        ("mean-rgb", 128, 0.5, 128, 64.0, 3),
        ("fine", 128, 0.5, 64, 32.0, 3),
        ("coarse", 112, 1.0, 112, 112.0, 3),
    ]
    assert pl.read_parquet(store.evaluation_report / ENCODERS).equals(report.encoders)
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(encoders_table(report.encoders))
    assert "fine 128 0.5 64 32 3" in " ".join(console.export_text().split())
    pair = report.comparisons.filter(
        target="growth",
        part="cross-validated",
        first="mean-rgb: network",
        second="fine: network",
    )
    predicted = pl.read_parquet(store.slide_model(FINE) / PREDICTIONS).filter(
        model="network", split="cv"
    )
    assert lacking not in predicted["slides"].explode()
    assert set(pair["n"]) == {predicted.height}
    ((only, other),) = set(pair.select("only_first", "other_slides").rows())
    assert only + other == 1
    assert any(f"compared on {predicted.height} units" in note for note in report.notes)
    assert (
        "target 'growth': the models differ in more than the encoder: side of a crop 512 um "
        "(mean-rgb), 512 um (fine), 560 um (coarse)"
    ) in report.notes


def test_heatmaps_of_all_encoders_lie_on_the_tissue(study):
    cohort, store, _ = study
    slide = pl.read_parquet(store.slide_model(FINE) / PREDICTIONS)["slides"][0][0]
    ends = []
    for key in (PLAIN, FINE, COARSE):
        steps.make_explanation(cohort, store, key)
        heat = read_heatmap(store.explanation(key) / slide)
        grid = open_grid(store.grid(GridKey(encoder=key.encoder, slide=slide)))
        np.testing.assert_array_equal(np.isfinite(heat), grid.valid)
        ome = zarr.open_group(store.explanation(key) / slide / ZARR, mode="r").attrs["ome"]
        scale, start = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
        cells, side = np.argwhere(grid.valid), np.array(scale["scale"])
        centres = cells * side + start["translation"]
        ends.append([centres.min(0) - side / 2, centres.max(0) + side / 2])
    # um; the edge of the tissue is where a cell of 112 um is kept or not
    np.testing.assert_allclose(ends[0], ends[1], atol=64)
    np.testing.assert_allclose(ends[0], ends[2], atol=112)


@pytest.mark.parametrize("key", [FINE, COARSE], ids=["half the stride", "other patch and um/px"])
def test_a_new_slide_is_compressed_with_the_geometry_of_the_model(study, tmp_path, key):
    _, store, lacking = study
    model, encoder = load_model(store.slide_model(key)), load_encoder(store.encoder(key.encoder))
    row = steps.read_slide_index(store).row(by_predicate=pl.col("slide") == lacking, named=True)
    found = predict_slides(model, encoder, {lacking: row_source(row)}, tmp_path, heatmaps=True)
    assert found.slides["status"].to_list() == ["compressed"]
    about = open_grid(tmp_path / "grids" / f"{lacking}.zarr").provenance
    assert (about.patch, about.mpp, about.stride) == (
        model.card.patch,
        model.card.mpp,
        model.card.stride,
    )
    heat = read_heatmap(tmp_path / "heatmaps" / "growth" / lacking)
    with open_slide(Path(row["path"])) as slide:
        shape = [math.ceil(side / about.cell - 1e-3) for side in (slide.height, slide.width)]
    assert list(heat.shape) == shape


def test_a_grid_of_another_stride_is_refused(study):
    _, store, lacking = study
    model = load_model(store.slide_model(FINE))
    units = pl.DataFrame({"unit": ["u"], "patient": ["p"], "slides": [[lacking]]})
    plain = open_grid(store.grid(GridKey(encoder=PLAIN.encoder, slide=lacking)))
    with pytest.raises(ModelMismatchError, match="stride 128, not 64"):
        predict_grids(model, units, lambda _: plain)


def test_grids_of_several_geometries_are_refused(study, tmp_path):
    cohort, original, _ = study
    store = Store(tmp_path / "store")
    shutil.copytree(original.root, store.root)
    slide = pl.read_parquet(store.slide_model(FINE) / PREDICTIONS)["slides"][0][0]
    path = store.grid(GridKey(encoder=FINE.encoder, slide=slide))
    grid = open_grid(path)
    other = grid.provenance.model_copy(update={"mpp": 0.25})
    write_grid(path, replace(grid, embeddings=np.asarray(grid.embeddings[:]), provenance=other))
    steps.make_grid_manifest(store, FINE.encoder)
    steps.make_target_grids(store, FINE)
    with pytest.raises(CohortError, match="more than one geometry .*128px-0.25um-stride64 for"):
        steps.make_slide_model(cohort, store, FINE)


def test_a_crop_that_the_network_cannot_take_names_the_encoder_and_the_um(study):
    cohort, store, _ = study
    models = cohort.settings.models.model_copy(update={"network": "published", "crop_um": 25_600})
    settings = cohort.settings.model_copy(update={"models": models})
    with pytest.raises(
        CohortError,
        match="encoder 'fine': crop_um 25600 is 800 cells of 32 um: .* from 12256 to 14272",
    ):
        steps.make_slide_model(cohort.model_copy(update={"settings": settings}), store, FINE)

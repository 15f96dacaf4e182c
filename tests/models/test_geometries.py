"""A study whose encoders have other cells: models, explanations, report, predictions."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import zarr
from rich.console import Console

from nic_core import steps
from nic_core.cohort import Cohort, CohortError
from nic_core.grids import Grid, open_grid, write_grid
from nic_core.maps.heatmaps import ZARR, read_heatmap
from nic_core.models.files import load_model, read_model_card
from nic_core.models.prediction import ModelMismatchError, predict_grids
from nic_core.reports import encoders_table
from nic_core.steps.evaluation_report import ENCODERS
from nic_core.steps.slide_models import PREDICTIONS
from nic_core.store import GridKey, ModelKey, Store

pytestmark = pytest.mark.slow

PLAIN, FINE = (ModelKey(encoder=name, target="growth") for name in ("mean-rgb", "fine"))


def halve_cells(grid: Grid, encoder: str) -> Grid:
    """The same content in cells of half the side, as by an encoder with half the stride."""
    about = grid.provenance.model_copy(update={"encoder": encoder, "stride": 64})
    embeddings = np.asarray(grid.embeddings[:]).repeat(2, 1).repeat(2, 2)
    return Grid(embeddings, grid.valid.repeat(2, 0).repeat(2, 1), about)


@pytest.fixture(scope="module")
def study(mean_rgb_study, tmp_path_factory) -> tuple[Cohort, Store, str]:
    """The study of mean colours, a second encoder with half the stride, and a slide it lacks."""
    cohort, original = mean_rgb_study
    store = Store(tmp_path_factory.mktemp("geometries") / "store")
    shutil.copytree(original.root, store.root)
    entry = cohort.encoder(PLAIN.encoder)
    fine = entry.model_copy(update={"name": FINE.encoder})
    cohort = cohort.model_copy(update={"encoders": (entry, fine)})
    shutil.copytree(store.encoder(PLAIN.encoder), store.encoder(FINE.encoder))
    units = pl.read_parquet(store.target_folds(FINE.target))
    lacking = units.filter(split="cv")["slides"][0][0]
    for slide in steps.read_slide_index(store)["slide"]:
        plain = store.grid(GridKey(encoder=PLAIN.encoder, slide=slide))
        if plain.exists() and slide != lacking:
            grid = halve_cells(open_grid(plain), FINE.encoder)
            write_grid(store.grid(GridKey(encoder=FINE.encoder, slide=slide)), grid)
    steps.make_grid_manifest(store, FINE.encoder)
    steps.make_slide_model(cohort, store, FINE)
    return cohort, store, lacking


def test_the_card_has_the_geometry_of_the_grids(study):
    _, store, _ = study
    cards = [read_model_card(store.slide_model(key)) for key in (PLAIN, FINE)]
    assert [(card.patch, card.mpp, card.stride) for card in cards] == [
        (128, 0.5, 128),
        (128, 0.5, 64),
    ]
    assert [(card.crop, card.crop_um) for card in cards] == [(8, 512), (16, 512)]


def test_the_report_compares_encoders_and_states_their_geometry(study):
    cohort, store, lacking = study
    report = steps.make_evaluation_report(cohort, store)
    assert report.encoders.rows() == [
        ("mean-rgb", 128, 0.5, 128, 64.0, 3),
        ("fine", 128, 0.5, 64, 32.0, 3),
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


def test_heatmaps_of_both_encoders_lie_at_the_same_place(study):
    cohort, store, lacking = study
    for key in (PLAIN, FINE):
        steps.make_explanation(cohort, store, key)
    slide = next(
        path.name
        for path in sorted(store.explanation(FINE).iterdir())
        if path.is_dir() and path.name != lacking
    )
    ends = []
    for key in (PLAIN, FINE):
        heat = read_heatmap(store.explanation(key) / slide)
        ome = zarr.open_group(store.explanation(key) / slide / ZARR, mode="r").attrs["ome"]
        scale, translation = (
            np.array(next(iter(part.values())))
            for part in (
                {name: values for name, values in transform.items() if name != "type"}
                for transform in ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
            )
        )
        cells = np.argwhere(np.isfinite(heat))
        ends.append(
            (
                cells.min(0) * scale + translation - scale / 2,
                cells.max(0) * scale + translation + scale / 2,
            )
        )
    np.testing.assert_allclose(ends[0], ends[1])


def test_a_grid_of_another_stride_is_refused(study):
    _, store, lacking = study
    model = load_model(store.slide_model(FINE))
    units = pl.DataFrame({"unit": ["u"], "patient": ["p"], "slides": [[lacking]]})
    plain = open_grid(store.grid(GridKey(encoder=PLAIN.encoder, slide=lacking)))
    with pytest.raises(ModelMismatchError, match="stride 128, not 64"):
        predict_grids(model, units, lambda _: plain)
    halved = halve_cells(plain, FINE.encoder)
    assert predict_grids(model, units, lambda _: halved).height == 1


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

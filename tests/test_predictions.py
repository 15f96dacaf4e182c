"""Champions, plans, predictions and their report in the store, without Dagster and MLflow."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from nic_core import steps
from nic_core.cohort import Cohort, CohortError, load_cohort
from nic_core.grids import open_grid
from nic_core.maps.heatmaps import EXTREMES, read_heatmap
from nic_core.models.explanation import explain
from nic_core.models.files import load_model
from nic_core.models.prediction import predict_grids
from nic_core.steps.predictions import HEATMAP, PREDICTION
from nic_core.store import GridKey, ModelKey, PredictionKey, Store

pytestmark = pytest.mark.slow

SLIDE = "demo-01-1"


def key(target: str, slide: str = SLIDE) -> PredictionKey:
    return PredictionKey(champion=target, slide=slide)


@pytest.fixture
def study(mean_rgb_study: tuple[Cohort, Store], tmp_path: Path) -> tuple[Cohort, Store]:
    """A copy of the store in which each target's mean-RGB model is version 3, the champion."""
    cohort, original = mean_rgb_study
    shutil.copytree(original.root, tmp_path / "store")
    store = Store(tmp_path / "store")
    for target in cohort.targets:
        version = steps.ChampionVersion(
            name=f"model-{target.name}", version=3, run="r", encoder="mean-rgb"
        )
        model = store.slide_model(ModelKey(encoder="mean-rgb", target=target.name))
        steps.make_champion(store, target.name, version, model)
    return cohort, store


def predict(cohort: Cohort, store: Store, target: str, slide: str = SLIDE) -> steps.Prediction:
    champion = steps.load_champion(cohort, store, target)
    assert champion is not None
    planned = steps.planned(store, key(target, slide))
    return steps.make_prediction(cohort, store, champion, key(target, slide), planned)


def edited(cohort: Path, tmp_path: Path, targets: dict[str, dict[str, object]]) -> Cohort:
    """The cohort with fields of its targets changed."""
    data = yaml.safe_load(cohort.read_text())
    for entry in data["targets"]:
        entry |= targets.get(entry["name"], {})
    folder = cohort.parent
    data["labels"] = str(folder / data["labels"])
    data["slides"] = {"table": str(folder / "slides.csv")}
    for task in data["patch_tasks"]:
        task["table"] = str(folder / task["table"])
    path = tmp_path / "cohort.yaml"
    path.write_text(yaml.safe_dump(data))
    return load_cohort(path)


def test_every_slide_of_the_index_is_planned(study):
    cohort, store = study
    for target in cohort.targets:
        plan = steps.make_prediction_plan(cohort, store, target.name)
        assert plan.problem is None
        assert plan.table["slide"].to_list() == steps.read_slide_index(store)["slide"].to_list()
        assert plan.table["reason"].null_count() == plan.table.height
        assert plan.table["version"].n_unique() == plan.table.height


def test_a_patient_is_predicted_from_all_slides(study):
    cohort, store = study
    table = steps.make_prediction_plan(cohort, store, "survival").table
    index = steps.read_slide_index(store)
    for unit, slides in table.select("unit", "slides").rows():
        assert slides == index.filter(patient=unit)["slide"].to_list()
    several = table.filter(pl.col("slides").list.len() > 1)
    first, second = (predict(cohort, store, "survival", slide) for slide in several["slide"][:2])
    assert first.row.equals(second.row)
    assert first.version != second.version  # each slide has its own heatmap


def test_the_prediction_is_that_of_the_model(study):
    cohort, store = study
    steps.make_prediction_plan(cohort, store, "growth")
    made = predict(cohort, store, "growth")
    model = load_model(store.slide_model(ModelKey(encoder="mean-rgb", target="growth")))
    grid = open_grid(store.grid(GridKey(encoder="mean-rgb", slide=SLIDE)))
    unit = pl.DataFrame({"unit": [SLIDE], "patient": ["p"], "slides": [[SLIDE]]})
    expected = predict_grids(model, unit, lambda _: grid)
    assert made.row.select(expected.columns).drop("patient").equals(expected.drop("patient"))
    stored = pl.read_parquet(store.prediction(key("growth")) / PREDICTION)
    assert stored.equals(made.row)
    assert stored["model_version"].to_list() == [3]


def test_a_training_patient_is_explained_by_the_network_that_held_them_out(study):
    cohort, store = study
    steps.make_prediction_plan(cohort, store, "growth")
    folds = pl.read_parquet(store.target_folds("growth"))
    model = load_model(store.champion("growth"))
    for split, networks in (("cv", 1), ("test", 4)):
        slide, fold = folds.filter(split=split).select("unit", "fold").row(0)
        made = predict(cohort, store, "growth", slide)
        assert made.fold == fold
        assert made.row["in_training"].item() == (split == "cv")
        used = model.networks if fold is None else model.networks[fold : fold + 1]
        assert len(used) == networks
        grid = open_grid(store.grid(GridKey(encoder="mean-rgb", slide=slide)))
        heat = explain(used, grid, model.card.target, crop=model.card.crop)
        np.testing.assert_array_equal(
            read_heatmap(store.prediction(key("growth", slide)) / HEATMAP), heat
        )


def test_contributing_patches_are_the_extremes_of_the_heat(study):
    cohort, store = study
    steps.make_prediction_plan(cohort, store, "growth")
    predict(cohort, store, "growth")
    folder = store.prediction(key("growth")) / HEATMAP
    heat, patches = read_heatmap(folder), pl.read_parquet(folder / EXTREMES)
    ends = patches.filter(rank=1).sort("end")
    assert ends["heat"].to_list() == [np.nanmax(heat), np.nanmin(heat)]
    for value, row, column in patches.select("heat", "row", "column").rows():
        assert heat[row, column] == value
    cell = open_grid(store.grid(GridKey(encoder="mean-rgb", slide=SLIDE))).provenance.cell
    assert (patches["x"] == patches["column"] * cell).all()


def test_survival_is_predicted_at_the_times_of_the_target(study, tiny_cohort, tmp_path):
    cohort, store = study
    before = steps.make_prediction_plan(cohort, store, "survival").table
    cohort = edited(tiny_cohort, tmp_path, {"survival": {"times": [365, 730]}})
    after = steps.make_prediction_plan(cohort, store, "survival").table
    assert set(before["version"]).isdisjoint(after["version"])
    row = predict(cohort, store, "survival").row
    assert {"survival_365", "survival_730", "fold_0_survival_365"} <= set(row.columns)


def test_repeated_times_are_refused(tiny_cohort, tmp_path):
    with pytest.raises(CohortError, match="times"):
        edited(tiny_cohort, tmp_path, {"survival": {"times": [365, 365.0]}})


def test_excluded_slides_are_not_predicted(study):
    cohort, store = study
    index = steps.read_slide_index(store)
    shared = index.filter(pl.col("patient").is_duplicated())["slide"][0]
    exclude = pl.when(slide=shared).then(pl.lit("folded")).otherwise("exclude").alias("exclude")
    index.with_columns(exclude).write_parquet(store.slide_index)
    steps.make_grid_manifest(store, "mean-rgb")
    table = steps.make_prediction_plan(cohort, store, "survival").table
    row = table.filter(slide=shared).row(0, named=True)
    assert row["reason"] == "the slide is excluded: folded"
    assert row["version"] is not None
    assert not table.filter(pl.col("slides").list.contains(shared)).height
    with pytest.raises(CohortError, match="excluded: folded"):
        predict(cohort, store, "survival", shared)


def test_a_slide_without_a_grid_waits_and_is_listed_as_failed(study):
    cohort, store = study
    index = steps.read_slide_index(store)
    first, second, *_ = index.filter(pl.col("patient").is_duplicated()).sort("patient")["slide"]
    shutil.rmtree(store.grid(GridKey(encoder="mean-rgb", slide=first)))
    steps.make_grid_manifest(store, "mean-rgb")
    table = steps.make_prediction_plan(cohort, store, "survival").table
    assert table.filter(slide=first)["version"].item() is None
    assert table.filter(slide=second).select("slides", "failed").row(0) == ([second], [first])


def test_a_champion_of_other_weights_is_named_and_nothing_changes(study):
    cohort, store = study
    card = store.encoder("mean-rgb") / "card.json"
    text = card.read_text()
    weights = load_model(store.champion("growth")).card.weights_hash
    card.write_text(text.replace(weights, weights[::-1]))
    plan = steps.make_prediction_plan(cohort, store, "growth")
    assert plan.problem is not None
    assert "version 3 of model-growth" in plan.problem
    assert "set the alias 'champion'" in plan.problem
    assert plan.table["version"].null_count() == plan.table.height


def test_a_target_without_champion_is_planned_with_the_reason(study):
    cohort, store = study
    before = steps.make_prediction_plan(cohort, store, "growth").table
    steps.remove_champion(store, "growth")
    plan = steps.make_prediction_plan(cohort, store, "growth")
    assert plan.problem is not None
    assert "no champion" in plan.problem
    assert plan.table["version"].null_count() == 0
    assert set(before["version"]).isdisjoint(plan.table["version"])


def test_a_champion_of_another_definition_of_the_target_is_refused(study, tiny_cohort, tmp_path):
    cohort, store = study
    cohort = edited(tiny_cohort, tmp_path, {"growth": {"level": "patient"}})
    problem = steps.make_prediction_plan(cohort, store, "growth").problem
    assert problem is not None
    assert "another definition" in problem


def test_a_model_of_another_target_does_not_become_champion(study):
    _, store = study
    version = steps.ChampionVersion(name="model-growth", version=4, run="r", encoder="mean-rgb")
    other = store.slide_model(ModelKey(encoder="mean-rgb", target="survival"))
    with pytest.raises(CohortError, match=r"predicts target 'survival', not 'growth'"):
        steps.make_champion(store, "growth", version, other)
    found = steps.read_champion_version(store, "growth")
    assert found is not None
    assert found.version == 3


def test_the_report_has_one_row_for_each_unit_and_target(study):
    cohort, store = study
    assert steps.make_predictions_report(cohort, store).is_empty()
    index = steps.read_slide_index(store)
    for target in ("growth", "survival"):
        steps.make_prediction_plan(cohort, store, target)
        for slide in index["slide"]:
            predict(cohort, store, target, slide)
    report = steps.make_predictions_report(cohort, store)
    counts = dict(report["target"].value_counts().rows())
    assert counts == {"growth": index.height, "survival": index["patient"].n_unique()}
    assert pl.read_parquet(store.predictions_report).equals(report)
    table = pl.read_csv(store.predictions_report.with_suffix(".csv"))
    assert table.height == report.height
    several = report.filter(pl.col("slides").list.len() > 1)["slides"][0]
    assert ";".join(several) in table["slides"].to_list()

"""Folds of sites and published folds, from the tables to the report, as Dagster makes them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import yaml

from nic_assets.build import build_defs
from nic_assets.orchestration.internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)
from nic_core.cohort import load_cohort
from nic_core.store import Store

pytestmark = pytest.mark.slow

# patients of both classes in each site
SITES = dict(zip("14253687", "AABBCCDD", strict=True))
SCORES = ("cross_validated_auc", "cross_validated_auc_folds_mean")


class Study:
    """A study of mean-RGB grids in a copy of another study's store."""

    def __init__(self, cohort: Path, store: Store, root: Path, folds: object) -> None:
        data = yaml.safe_load(cohort.read_text())
        slides = pl.read_csv(cohort.parent / "slides.csv", infer_schema=False)
        number = pl.col("patient").str.strip_prefix("patient-0")
        slides.with_columns(
            path=f"{cohort.parent}/" + pl.col("path"),
            truth=f"{cohort.parent}/" + pl.col("truth"),
            site=number.replace_strict(SITES, default=None),
        ).write_csv(root / "slides.csv")
        labels = pl.read_csv(cohort.parent / "labels.csv", infer_schema=False)
        fold = number.replace_strict(SITES, default=None).replace({"A": "10", "B": "2"})
        labels.with_columns(fold=fold).write_csv(root / "labels.csv")
        data |= {
            "slides": {"table": "slides.csv"},
            "labels": "labels.csv",
            "encoders": [{"name": "mean-rgb", "objective": "mean_rgb"}],
            "targets": [t for t in data["targets"] if t["name"] == "growth"],
            "patch_tasks": [],
            "maps": [],
        }
        data["settings"]["models"]["folds"] = folds
        (root / "cohort.yaml").write_text(yaml.safe_dump(data))
        shutil.copytree(store.root, root / "store")
        self.store = Store(root / "store")
        (root / "dagster").mkdir()
        self.instance = dg.DagsterInstance.local_temp(str(root / "dagster"))
        self.defs = build_defs(load_cohort(root / "cohort.yaml"), self.store)

    def make(self, asset: str, first: str = "", last: str = "") -> Mapping[str, Any]:
        """Materialize an asset; return the metadata of its last materialization."""
        partitions = {ASSET_PARTITION_RANGE_START_TAG: first, ASSET_PARTITION_RANGE_END_TAG: last}
        job = self.defs.resolve_implicit_global_asset_job_def()
        made = job.execute_in_process(
            instance=self.instance,
            asset_selection=[dg.AssetKey(asset)],
            tags=partitions if first else {},
        )
        event = made.get_asset_materialization_events()[-1]
        return {name: item.value for name, item in event.materialization.metadata.items()}


def test_models_of_folds_by_site_are_reported_by_site(tiny_cohort, mean_rgb_study, tmp_path):
    study = Study(tiny_cohort, mean_rgb_study[1], tmp_path, "site")
    study.make("slide_index")
    assert set(pl.read_parquet(study.store.slide_index)["site"]) == {None, *"ABCD"}
    made = study.make("target_folds", "growth", "growth")
    assert made["number_of_folds"] == 4
    sites = [row.data for row in made["sites"].records]
    assert [(row["site"], row["fold_name"]) for row in sites] == [(s, s) for s in "ABCD"]
    model = study.make("slide_model", "mean-rgb|growth", "mean-rgb|growth")
    assert [row.data["fold_name"] for row in model["folds"].records] == list("ABCD")
    assert set(SCORES) <= set(model)
    report = study.make("evaluation_report")
    assert {row.data["fold_name"] for row in report["folds"].records} == set("ABCD")
    folder = study.store.evaluation_report
    assert Path(report["report"]) == folder / "report.html"
    assert "each site was a fold" in Path(report["report"]).read_text()
    folds = pl.read_parquet(folder / "fold_metrics.parquet")
    network = folds.filter(~pl.col("model").str.contains("linear"), about="growth", metric="AUC")
    results = pl.read_parquet(folder / "results.parquet").filter(
        ~pl.col("model").str.contains("linear"), about="growth", metric="AUC"
    )
    (row,) = results.filter(part="cross-validated").to_dicts()
    assert row["folds_mean"] == pytest.approx(network["value"].mean())
    assert row["folds_undefined"] == network["value"].null_count()
    assert results.filter(part="test")["folds_mean"].to_list() == [None]
    compared = pl.read_parquet(folder / "comparisons.parquet").drop_nulls("p")
    assert (compared["p_holm"] >= compared["p"]).all()


def test_published_folds_keep_their_names(tiny_cohort, mean_rgb_study, tmp_path):
    study = Study(tiny_cohort, mean_rgb_study[1], tmp_path, "given")
    study.make("slide_index")
    made = study.make("target_folds", "growth", "growth")
    names = [row.data["fold_name"] for row in made["folds"].records]
    assert names == ["2", "10", "C", "D", None]
    # sites are shown although the folds are not made from them
    assert {row.data["site"] for row in made["sites"].records} == set("ABCD")
    given = dict(zip("14253687", ["10", "10", "2", "2", "C", "C", "D", "D"], strict=True))
    folds = pl.read_parquet(study.store.target_folds("growth")).drop_nulls("fold")
    assert folds.height == 10
    for patient, name in folds.select("patient", "fold_name").iter_rows():
        assert name == given[patient.removeprefix("patient-0")]

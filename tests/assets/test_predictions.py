"""Predictions as assets: champions from MLflow, new slides, moved aliases, the example sensor."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import dagster as dg
import mlflow
import polars as pl
import pytest
import tifffile
import yaml
from rich.console import Console

from nic_assets.assets import checks
from nic_assets.assets.inputs import REGISTERED_CHAMPION, known_versions
from nic_assets.build import build_defs
from nic_assets.operations.refresh import refresh
from nic_assets.tracking import Tracking, TrackingUnavailableError
from nic_assets.tracking.champions import champion_versions, find_predicting_version
from nic_core.cohort import load_cohort
from nic_core.models.files import TrainingCohort
from nic_core.store import PredictionKey, Store

pytestmark = pytest.mark.slow

TARGETS = ("growth", "survival")
EXAMPLE = Path(__file__).parents[2] / "examples" / "prediction_sensor" / "definitions.py"


class Study:
    """A study of one encoder on a copy of the tiny cohort's slides, with its MLflow client."""

    def __init__(self, cohort: Path, root: Path) -> None:
        shutil.copytree(cohort.parent, root / "demo")
        data = yaml.safe_load((root / "demo" / "cohort.yaml").read_text())
        data["targets"] = [entry for entry in data["targets"] if entry["name"] in TARGETS]
        data |= {
            "encoders": [{"name": "rgb", "objective": "mean_rgb"}],
            "patch_tasks": [],
            "maps": [],
        }
        (root / "demo" / "cohort.yaml").write_text(yaml.safe_dump(data))
        self.root = root
        self.cohort = load_cohort(root / "demo" / "cohort.yaml")
        self.store = Store(root / "store")
        self.defs = build_defs(self.cohort, self.store)
        (root / "dagster").mkdir()
        self.instance = dg.DagsterInstance.local_temp(str(root / "dagster"))

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(f"sqlite:///{self.store.mlflow / 'mlflow.db'}")

    def refresh(self) -> list[str]:
        return refresh(self.defs, self.instance, Console(quiet=True))

    def records(self, asset: str) -> dict[str, dg.EventLogRecord]:
        """The latest record of every partition of an asset."""
        found = self.instance.fetch_materializations(dg.AssetKey(asset), limit=1000).records
        return {str(record.partition_key): record for record in reversed(found)}

    def made_since(self, before: dict[str, dg.EventLogRecord], asset: str) -> set[str]:
        now = self.records(asset)
        return {
            k for k, r in now.items() if k not in before or r.storage_id != before[k].storage_id
        }


@pytest.fixture(scope="module")
def study(tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A refreshed study whose models have no champion."""
    study = Study(tiny_cohort, tmp_path_factory.mktemp("predictions"))
    assert study.refresh() == []
    for target in TARGETS:
        study.client.delete_registered_model_alias(f"model-{target}", "champion")
    assert study.refresh() == []
    return study


def test_without_a_champion_the_slides_are_not_predicted(study):
    for key, record in study.records("prediction").items():
        reason = record.asset_materialization.metadata["not_predicted"].value
        assert "has no champion" in reason, key
    assert not [p for p in study.store.products() if p.asset in ("champion", "prediction")]
    assert pl.read_parquet(study.store.predictions_report).is_empty()
    (result,) = study.instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(dg.AssetKey("champion"), "champion_exists"), limit=1
    )
    assert not result.evaluation.passed


def test_a_champion_predicts_every_slide_and_nothing_is_repeated(study):
    before = study.records("prediction")
    study.client.set_registered_model_alias("model-growth", "champion", "1")
    assert study.refresh() == []
    slides = study.instance.get_dynamic_partitions("slides")
    assert study.made_since(before, "prediction") == {f"growth|{slide}" for slide in slides}
    metadata = study.records("prediction")[f"growth|{slides[0]}"].asset_materialization.metadata
    assert {"prediction", "heat", "patches", "patch_places", "distance"} <= metadata.keys()
    assert metadata["model"].value == "version 1 of model-growth"
    page = f"http://127.0.0.1:8765/slide/{slides[0]}#layers=champion.growth:0.6"
    assert metadata["look"].value == page
    assert set(metadata["checks"].value) == {c.name for c in checks.OF_SLIDES["prediction"]}
    report = pl.read_parquet(study.store.predictions_report)
    assert report["unit"].to_list() == slides
    runs = study.instance.get_runs_count()
    assert study.refresh() == []
    (run,) = study.instance.get_runs(limit=study.instance.get_runs_count() - runs)
    assert run.asset_selection == {dg.AssetKey("slide_index")}


def test_a_new_slide_without_label_is_predicted_and_no_other(study):
    study.client.set_registered_model_alias("model-growth", "champion", "1")
    assert study.refresh() == []
    demo, before = study.root / "demo", study.records("prediction")
    models = study.records("slide_model")
    table = pl.read_csv(demo / "slides.csv", infer_schema=False)
    first = table.row(0, named=True)
    pixels = tifffile.imread(demo / first["path"])
    tifffile.imwrite(
        demo / "slides" / "new.tif",
        pixels[::-1],
        photometric="rgb",
        tile=(256, 256),
        resolution=(20_000, 20_000),
        resolutionunit="CENTIMETER",
    )
    new = first | {"slide": "new", "path": "slides/new.tif", "patient": "new patient"}
    added = pl.DataFrame([new], schema=table.schema).with_columns(truth=pl.lit(None, pl.String))
    pl.concat([table, added]).write_csv(demo / "slides.csv")
    assert study.refresh() == []
    assert study.made_since(before, "prediction") == {"growth|new", "survival|new"}
    assert study.made_since(models, "slide_model") == set()
    metadata = study.records("prediction")["growth|new"].asset_materialization.metadata
    assert metadata["in_training"].value is False
    assert metadata["model"].value == "version 1 of model-growth"
    assert "new" in pl.read_parquet(study.store.predictions_report)["unit"].to_list()


def test_a_moved_alias_makes_the_predictions_of_its_target_again(study):
    client = study.client
    client.set_registered_model_alias("model-survival", "champion", "1")
    assert study.refresh() == []
    before, source = study.records("prediction"), client.get_model_version("model-survival", "1")
    artifacts = client.get_run(source.run_id).info.artifact_uri
    other = client.create_model_version(
        "model-survival", f"{artifacts}/product", source.run_id, tags=source.tags
    )
    client.set_registered_model_alias("model-survival", "champion", other.version)
    assert study.refresh() == []
    slides = study.instance.get_dynamic_partitions("slides")
    assert study.made_since(before, "prediction") == {f"survival|{slide}" for slide in slides}
    rows = pl.read_parquet(study.store.predictions_report).filter(target="survival")
    assert set(rows["model_version"]) == {int(other.version)}


def test_the_sensor_of_the_example_reacts_to_new_predictions(study, capsys, monkeypatch):
    monkeypatch.setenv("NIC_COHORT", str(study.root / "demo" / "cohort.yaml"))
    monkeypatch.setenv("NIC_STORE", str(study.store.root))
    monkeypatch.delitem(sys.modules, "nic_assets.definitions", raising=False)
    spec = importlib.util.spec_from_file_location("prediction_sensor", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.delitem(sys.modules, "nic_assets.definitions")
    defs = example.defs
    context = dg.build_sensor_context(
        study.instance, resources={"store": study.store}, definitions=defs
    )
    result = defs.resolve_sensor_def("announce_predictions").evaluate_tick(context)
    assert result.run_requests == []
    assert "units" in capsys.readouterr().out


def test_a_named_version_predicts_instead_of_the_champion(study):
    pinned = study.cohort.target("growth").model_copy(update={"predict_with": 1})
    tracking = Tracking.in_store(study.store)
    study.client.delete_registered_model_alias("model-growth", "champion")
    assert find_predicting_version(tracking, study.cohort.target("growth")) is None
    assert str(find_predicting_version(tracking, pinned).version) == "1"
    missing = pinned.model_copy(update={"predict_with": 99})
    assert find_predicting_version(tracking, missing) is None
    assert "has no version 99" in checks.champion_exists(missing, None)


def test_without_mlflow_the_known_champions_stay(study):
    away, warnings = Tracking("http://127.0.0.1:9", None, "http://127.0.0.1:9"), []
    known = known_versions(study.instance, REGISTERED_CHAMPION, TARGETS)
    assert set(known) == set(TARGETS)
    assert champion_versions(away, study.cohort, warnings.append, known) == {}
    assert len(warnings) == len(TARGETS)
    assert set(champion_versions(away, study.cohort, warnings.append, [])) == set(TARGETS)
    with pytest.raises(TrackingUnavailableError):
        find_predicting_version(away, study.cohort.target("growth"))


def test_predictions_of_removed_slides_are_not_needed(study):
    key = PredictionKey(champion="growth", slide="gone")
    study.store.prediction(key).mkdir(parents=True)
    assert [p.key for p in study.store.products() if p.asset == "prediction"].count(key) == 1
    graph = study.defs.resolve_asset_graph()
    definition = graph.get(dg.AssetKey("prediction")).partitions_def
    partitions = definition.get_partition_keys(dynamic_partitions_store=study.instance)
    assert str(key) not in partitions
    study.store.prediction(key).rmdir()


TRAINING = TrainingCohort(
    name="c",
    patients=1,
    units=1,
    slides=("a",),
    digest="d",
    mpp=(0.25, 0.5),
    scanners=("Aperio SS1302",),
    without_scanner=2,
)


@pytest.mark.parametrize(("mpp", "passed"), [(0.2526, True), (0.23, False), (0.51, True)])
def test_um_per_px_unlike_all_training_slides_is_reported(mpp, passed):
    assert (checks.mpp_as_in_training(mpp, TRAINING) is None) == passed


def test_another_scanner_is_reported_and_an_unknown_one_is_not():
    found = checks.scanner_as_in_training("Leica SCN400", TRAINING)
    assert found == (
        "scanner 'Leica SCN400'; the training slides have Aperio SS1302 "
        "(2 of their files state none)"
    )
    assert checks.scanner_as_in_training("Aperio SS1302", TRAINING) is None
    assert checks.scanner_as_in_training(None, TRAINING) is None
    unknown = TRAINING.model_copy(update={"scanners": (), "without_scanner": 3})
    assert checks.scanner_as_in_training("Leica SCN400", unknown) is None

"""An encoder that starts from the weights of another one, by Dagster's API and command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import dagster as dg
import mlflow
import polars as pl
import pytest
import yaml
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)

from nic_assets.assets.inputs import ENCODER_ENTRY, known_versions
from nic_assets.build import build_defs
from nic_assets.orchestration.staleness import StaleAsset, stale_assets
from nic_assets.tracking import Tracking
from nic_core.cohort import load_cohort
from nic_core.encoders.files import read_card
from nic_core.steps import encoder_versions
from tests.assets.test_study import Study, edited

pytestmark = pytest.mark.slow

TASK = "128px-0.5um|colorectal"
ENCODER = dg.AssetKey("encoder")


def entries(**start: object) -> list[dict[str, object]]:
    """Encoder b, which starts from other weights, before encoder a."""
    common = {"objective": "supervised", "patches_seen": 64, "batch": 32}
    return [
        {"name": "b", **common, "tasks": ["colorectal"], "initial_weights": start},
        {"name": "a", **common, "tasks": ["colorectal"], "learning_rate": 3e-3}
        | {"embedding": "both"},
    ]


def small(cohort: Path, root: Path, encoders: list[dict[str, object]]) -> Path:
    """Write a cohort of the encoders, one patch task and one slide."""
    task = next(
        task
        for task in yaml.safe_load(cohort.read_text())["patch_tasks"]
        if task["name"] == "colorectal"
    )
    path = edited(cohort, root, {"encoders": encoders, "targets": [], "maps": []})
    slides = pl.read_csv(cohort.parent / "slides.csv", infer_schema=False).head(1)
    slides.select("slide", "patient", path=f"{cohort.parent}/" + pl.col("path")).write_csv(
        root / "slide.csv"
    )
    data = yaml.safe_load(path.read_text()) | {"slides": {"table": "slide.csv"}}
    task["table"] = str(cohort.parent / task["table"])
    path.write_text(yaml.safe_dump(data | {"patch_tasks": [task]}))
    return path


def times(study: Study, encoder: str) -> int:
    """How often an encoder was materialized."""
    records = study.instance.fetch_materializations(
        dg.AssetRecordsFilter(ENCODER, asset_partitions=[encoder]), limit=20
    )
    return len(records.records)


def test_a_refresh_makes_an_encoder_after_the_one_it_starts_from(tiny_cohort, tmp_path):
    study = Study(small(tiny_cohort, tmp_path, entries(encoder="a")), tmp_path)
    assert study.refresh() == []
    first, second = (read_card(study.store.encoder(name)) for name in ("a", "b"))
    assert second.initial_weights.weights_hash == first.weights_hash
    assert second.initial_weights.heads == ("colorectal",)
    assert study.refresh() == []
    assert (times(study, "a"), times(study, "b")) == (1, 1)
    client = mlflow.MlflowClient(study.defs.resources["tracking"].uri)
    version = client.get_model_version("encoder-b", "1")
    assert version.tags["initial_weights"] == "encoder 'a'"
    assert version.tags["initial_weights_hash"] == first.weights_hash
    settings = client.get_run(version.run_id).data.params
    assert settings["initial_weights_hash"] == first.weights_hash

    # a new start makes the second encoder stale, and a refresh makes each once
    other = entries(encoder="a")
    other[1]["seed"] = 5
    cohort = small(tiny_cohort, tmp_path, other)
    (tmp_path / "again").mkdir()
    again = Study(cohort, tmp_path / "again")
    again.instance, again.store = study.instance, study.store
    again.defs = build_defs(again.cohort, study.store)
    assert again.refresh() == []
    assert (times(study, "a"), times(study, "b")) == (2, 2)
    assert read_card(study.store.encoder("b")).initial_weights.weights_hash == (
        read_card(study.store.encoder("a")).weights_hash
    )
    assert again.refresh() == []
    assert (times(study, "a"), times(study, "b")) == (2, 2)


def test_one_run_makes_an_encoder_after_the_one_it_starts_from(tiny_cohort, tmp_path):
    study = Study(small(tiny_cohort, tmp_path, entries(encoder="a")), tmp_path)
    graph = study.defs.resolve_asset_graph()
    job = study.defs.resolve_implicit_global_asset_job_def()

    def make(asset: str, **arguments: object) -> None:
        job.execute_in_process(
            instance=study.instance, asset_selection=[dg.AssetKey(asset)], **arguments
        )

    make("slide_index")
    make("patch_task", partition_key=TASK)
    for only in ({ENCODER}, None):
        found = stale_assets(study.instance, graph, only=only)[ENCODER]
        assert (found.ready, found.blocked_by_upstream) == ({"a"}, {"b"})
    make(
        "encoder",
        tags={ASSET_PARTITION_RANGE_START_TAG: "b", ASSET_PARTITION_RANGE_END_TAG: "a"},
    )
    found = stale_assets(study.instance, graph, only={ENCODER})[ENCODER]
    assert found == StaleAsset(frozenset(), frozenset(), frozenset())
    assert (times(study, "a"), times(study, "b")) == (1, 1)


def test_a_failed_start_is_reported_and_stops_what_starts_from_it(
    tiny_cohort, tmp_path, monkeypatch
):
    broken = entries(encoder="a")
    broken[1]["learning_rate"] = 1e30
    study = Study(small(tiny_cohort, tmp_path, broken), tmp_path)
    problems = study.refresh()
    assert "lower the encoder's learning_rate" in problems[0]
    assert "encoder: b waits for a, which is not up to date" in problems
    assert not study.store.encoder("b").exists()


def test_the_command_line_makes_a_start_then_what_starts_from_it(
    materialize, tiny_cohort, tmp_path
):
    cohort = small(tiny_cohort, tmp_path, entries(encoder="a"))
    assert materialize(cohort, "slide_index").returncode == 0
    assert materialize(cohort, "patch_task", "--partition", TASK).returncode == 0
    early = materialize(cohort, "encoder", "--partition", "b")
    assert early.returncode != 0
    assert "encoder 'b' starts from encoder 'a', which is not in the store" in early.stderr
    assert "Traceback" not in early.stderr
    for asset in ("encoder --partition a", "slide_index", "encoder --partition b"):
        done = materialize(cohort, *asset.split())
        assert done.returncode == 0, done.stderr


def test_a_start_in_the_registry_is_followed_by_its_alias(tiny_cohort, tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    teacher = Study(
        small(tiny_cohort, tmp_path / "one", entries(encoder="a")[1:]), tmp_path / "one"
    )
    assert teacher.refresh() == []
    shutil.copy(teacher.store.mlflow / "mlflow.db", tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (tmp_path / "two").mkdir()
    start = entries(version="encoder-a@champion")[:1]
    study = Study(small(tiny_cohort, tmp_path / "two", start), tmp_path / "two")
    assert "set the alias 'champion' on a version of 'encoder-a'" in study.refresh()[0]
    client = mlflow.MlflowClient(uri)
    client.set_registered_model_alias("encoder-a", "champion", "1")
    assert study.refresh() == []
    card = read_card(study.store.encoder("b"))
    assert card.initial_weights.origin == "encoder-a@champion"
    assert card.initial_weights.weights_hash == read_card(teacher.store.encoder("a")).weights_hash
    assert study.refresh() == []
    assert times(study, "b") == 1
    tracking: Tracking = study.defs.resources["tracking"]
    before = tracking.registered_versions(study.cohort, pytest.fail, set())
    client.set_model_version_tag("encoder-a", "1", "weights_hash", "other")
    assert tracking.registered_versions(study.cohort, pytest.fail, set()) != before


def test_a_start_that_is_trained_elsewhere_changes_the_entry(tiny_cohort, tmp_path):
    study = Study(small(tiny_cohort, tmp_path, entries(encoder="a")), tmp_path)
    assert study.refresh() == []
    folder = study.store.encoder("a")
    card = folder / "card.json"
    card.write_text(card.read_text().replace(read_card(folder).weights_hash, "0" * 64))
    assert (
        encoder_versions(load_cohort(tmp_path / "cohort.yaml"), study.store)["b"]
        != (known_versions(study.instance, ENCODER_ENTRY, ["b"])["b"])
    )

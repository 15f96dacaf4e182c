"""A whole study on a tiny cohort, through Dagster's own API and command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
import mlflow
import numpy as np
import polars as pl
import pytest
import torch
import yaml
from rich.console import Console

from nic_assets.build import build_defs
from nic_assets.inputs import SLIDE_FILE
from nic_assets.refresh import refresh
from nic_core.cohort import load_cohort
from nic_core.encoders.probes import KNN, LINEAR
from nic_core.grids import open_grid
from nic_core.heatmaps import read_heatmap
from nic_core.models.files import ensemble_module, load_model
from nic_core.reports import RESULT_SCHEMA
from nic_core.store import Store

LAYERS = {
    "encoders": {"patch_task_source", "encoder_entry", "patch_task", "encoder", "encoder_probe"},
    "grids": {"grid", "encoded_cohort"},
    "models": {"target_entry", "target_folds", "task_model", "explanation"},
    "reports": {"probability_map", "map_scores", "evaluation_report"},
    "slides": {"slide_file", "slide_index", "slide", "patch_table"},
}


class Study:
    """Definitions, store and instance of a cohort."""

    def __init__(self, cohort: Path, root: Path) -> None:
        self.cohort = load_cohort(cohort)
        self.store = Store(root / "store")
        self.defs = build_defs(self.cohort, self.store)
        (root / "dagster").mkdir()
        self.instance = dg.DagsterInstance.local_temp(str(root / "dagster"))

    def refresh(self) -> list[str]:
        return refresh(self.defs, self.instance, Console(quiet=True))

    def runs(self) -> int:
        return self.instance.get_runs_count()


@pytest.fixture(scope="module")
def study(tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study(tiny_cohort, tmp_path_factory.mktemp("study"))
    assert study.refresh() == []
    return study


def test_every_layer_declares_its_assets(study):
    graph = study.defs.resolve_asset_graph()
    groups: dict[str, set[str]] = {}
    for key in graph.get_all_asset_keys():
        groups.setdefault(graph.get(key).group_name, set()).add(key.to_user_string())
    assert groups == LAYERS


def test_every_asset_says_what_it_is_and_whose(study):
    graph = study.defs.resolve_asset_graph()
    for key in graph.materializable_asset_keys:
        node = graph.get(key)
        assert node.description, key
        assert node.owners, key
        assert node.code_version, key


def test_gpu_bound_work_is_tagged_and_takes_turns(study):
    graph = study.defs.resolve_asset_graph()
    for name in ("encoder", "grid", "task_model"):
        definition = graph.get(dg.AssetKey(name)).assets_def
        assert definition.op.tags["nic/device"] == "gpu"
        assert definition.op.pool == "gpu"


def test_every_partition_of_every_asset_is_materialized(study):
    graph = study.defs.resolve_asset_graph()
    for key in graph.materializable_asset_keys:
        definition = graph.get(key).partitions_def
        if definition is None:
            assert study.instance.get_latest_materialization_event(key) is not None
        else:
            expected = set(definition.get_partition_keys(dynamic_partitions_store=study.instance))
            assert study.instance.get_materialized_partitions(key) == expected, key


def test_a_grid_has_a_code_at_every_kept_cell(study):
    for slide in study.instance.get_dynamic_partitions("slides"):
        cells = pl.read_parquet(study.store.patch_table(slide)).filter("kept")
        grid = open_grid(study.store.grid("mtl-4", slide))
        assert grid.shape[0] == 128
        assert int(grid.valid.sum()) == cells.height > 0


def test_every_slide_of_every_model_is_explained_where_it_has_a_code(study):
    for target in study.cohort.targets:
        tested = pl.read_parquet(study.store.folds(target.name))["slides"].explode().to_list()
        for encoder in study.cohort.encoders:
            folder = study.store.explanations(target.name, encoder.name)
            assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == sorted(tested)
            for slide in tested:
                valid = open_grid(study.store.grid(encoder.name, slide)).valid
                np.testing.assert_array_equal(np.isfinite(read_heatmap(folder / slide)), valid)
            scores = pl.read_parquet(folder / "scores.parquet")
            assert scores["auc"].is_between(0, 1).all()
            assert set(scores["map"]) <= {item.name for item in study.cohort.maps}


def test_the_report_holds_every_target_encoder_and_task(study):
    results = pl.read_parquet(study.store.reports / "results.parquet")
    assert results.schema == RESULT_SCHEMA
    models = results.filter(kind="target").select("about", "encoder").unique()
    assert models.height == 6
    assert set(results.filter(kind="patch task")["about"]) == {
        task.name for task in study.cohort.patch_tasks
    }
    assert results.filter(kind="map").height == 1
    assert set(results["part"]) >= {"cross-validated", "test"}


def test_mlflow_holds_a_version_of_every_encoder_and_model_with_its_origin(study):
    mlflow.set_tracking_uri(f"sqlite:///{study.store.mlflow / 'mlflow.db'}")
    client = mlflow.MlflowClient()
    names = {model.name for model in client.search_registered_models()}
    assert names == {"encoder-mean-rgb", "encoder-mtl-4"} | {
        f"model-{target.name}-{encoder.name}"
        for target in study.cohort.targets
        for encoder in study.cohort.encoders
    }
    version = client.get_model_version_by_alias("encoder-mtl-4", "candidate")
    assert version.tags["dagster/asset_key"] == "encoder"
    assert version.tags["dagster/partition"] == "mtl-4"
    assert study.instance.get_run_by_id(version.tags["dagster/run_id"]) is not None
    run = client.get_run(version.run_id)
    assert run.data.params["patches_seen"] == "256"
    tasks = [task.name for task in study.cohort.patch_tasks]
    pictures = {"augmented_patches", "training_curves", *(f"confusion_{task}" for task in tasks)}
    assert {*(f"{name}.png" for name in pictures), "validation_confusion.json", "card.json"} <= {
        item.path for item in client.list_artifacts(version.run_id)
    }
    epochs = [metric.step for metric in client.get_metric_history(version.run_id, "loss")]
    assert epochs == list(range(1, len(epochs) + 1))
    for task in tasks:
        for score in ("balanced_accuracy", "f1"):
            name = f"validation/{task}/{score}"
            assert len(client.get_metric_history(version.run_id, name)) == len(epochs)
    event = study.instance.fetch_materializations(
        dg.AssetRecordsFilter(dg.AssetKey("encoder"), asset_partitions=["mtl-4"]), limit=1
    ).records[0]
    assert event.asset_materialization is not None
    assert pictures | {"test_scores"} <= set(event.asset_materialization.metadata)


def test_a_registered_model_gives_the_numbers_of_the_one_in_the_store(study):
    mlflow.set_tracking_uri(f"sqlite:///{study.store.mlflow / 'mlflow.db'}")
    registered = mlflow.pytorch.load_model("models:/model-survival-mtl-4@candidate")
    model = load_model(study.store.model("survival", "mtl-4"))
    crops = torch.randn(3, 128, 8, 8)
    torch.testing.assert_close(registered(crops), ensemble_module(model.networks)(crops))


def test_a_second_refresh_only_looks(study):
    before = study.runs()
    events = len(study.instance.all_logs(study.instance.get_runs()[0].run_id))
    assert events > 0
    assert study.refresh() == []
    (run,) = study.instance.get_runs(limit=study.runs() - before)
    assert run.asset_selection == {dg.AssetKey("slide_index")}


def test_a_changed_slide_is_compressed_again_and_no_other(
    study, tiny_cohort, tmp_path, monkeypatch
):
    shutil.copytree(tiny_cohort.parent, tmp_path / "demo")
    shutil.copytree(study.store.root, tmp_path / "store")
    changed = Study(tmp_path / "demo" / "cohort.yaml", tmp_path)
    first, second = sorted((tmp_path / "demo" / "slides").iterdir())[:2]
    changed.refresh()
    before = {p.name: p.stat().st_ino for p in (tmp_path / "store/grids/mtl-4").iterdir()}
    shutil.copy(second, first)
    assert changed.refresh() == []
    after = {p.name: p.stat().st_ino for p in (tmp_path / "store/grids/mtl-4").iterdir()}
    assert [name for name in before if before[name] != after[name]] == [f"{first.stem}.zarr"]
    grids = [open_grid(changed.store.grid("mtl-4", s.stem)) for s in (first, second)]
    np.testing.assert_array_equal(grids[0].codes[:], grids[1].codes[:])
    assert changed.instance.get_materialized_partitions(SLIDE_FILE)


def test_the_report_holds_both_probes_of_every_encoder_and_task(study):
    probes = pl.read_parquet(study.store.reports / "results.parquet").filter(
        pl.col("model").is_in([LINEAR, KNN]), metric="balanced accuracy"
    )
    assert set(probes.select("encoder", "about", "model").rows()) == {
        (encoder.name, task.name, model)
        for encoder in study.cohort.encoders
        for task in study.cohort.patch_tasks
        for model in (LINEAR, KNN)
    }
    event = study.instance.get_latest_materialization_event(dg.AssetKey("encoder_probe"))
    assert {"codes", "nearest_patches", "scores"} <= set(event.asset_materialization.metadata)


# --- encoders from elsewhere -----------------------------------------------------------------


def scripted(path: Path, factor: float) -> None:
    """A network from elsewhere: means of three channels over quarters of the patch."""
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    example = torch.rand(1, 3, 32, 32)
    torch.jit.trace(torch.nn.Sequential(Scale(factor), network), example).save(path)


class Scale(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels * self.factor


def test_a_network_from_elsewhere_is_an_encoder_like_any_other(tiny_cohort, tmp_path):
    scripted(tmp_path / "means.pt", 1.0)
    slides = pl.read_csv(tiny_cohort.parent / "slides.csv", infer_schema=False).head(1)
    slides = slides.select("slide", "patient", path=f"{tiny_cohort.parent}/" + pl.col("path"))
    slides.write_csv(tmp_path / "slides.csv")
    settings = load_cohort(tiny_cohort).settings
    network = {
        "patch": settings.patch,
        "mpp": settings.mpp,
        "code": 12,
        "preprocess": {"mean": [0.5] * 3, "std": [0.25] * 3, "resize": 32},
    }
    encoder = {"name": "means", "objective": "imported", "file": "means.pt", "network": network}
    cohort = {
        "name": "elsewhere",
        "slides": {"table": "slides.csv"},
        "encoders": [encoder],
        "settings": {"patch": settings.patch, "mpp": settings.mpp},
    }
    (tmp_path / "cohort.yaml").write_text(yaml.safe_dump(cohort))
    study = Study(tmp_path / "cohort.yaml", tmp_path)
    assert study.refresh() == []
    grid = open_grid(study.store.grid("means", slides["slide"][0]))
    assert grid.shape[0] == 12
    assert grid.valid.any()
    mlflow.set_tracking_uri(f"sqlite:///{study.store.mlflow / 'mlflow.db'}")
    assert mlflow.MlflowClient().search_registered_models() == []

    def versions(asset: str) -> list[str]:
        events = study.instance.fetch_materializations(dg.AssetKey(asset), limit=100).records
        return [e.asset_materialization.tags["dagster/data_version"] for e in events]

    scripted(tmp_path / "means.pt", 2.0)
    assert study.refresh() == []
    made = {asset: versions(asset) for asset in ("encoder", "grid", "patch_table")}
    assert [len(set(made[asset])) for asset in made] == [2, 2, 1]
    assert len(made["patch_table"]) == 1
    (tmp_path / "means.pt").unlink()
    assert study.refresh() == [f"encoder: 1 of 1 failed: means: encoder 'means': "
                               f"{tmp_path / 'means.pt'} does not exist"]  # fmt: skip


# --- the command line ------------------------------------------------------------------------


def dagster(cohort: Path, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Dagster command as a CI job calls it: all it knows comes from the environment."""
    home = root / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "dagster", *arguments, "-m", "nic_assets.definitions"],
        env=os.environ
        | {
            "NIC_COHORT": str(cohort),
            "NIC_STORE": str(root / "store"),
            "DAGSTER_HOME": str(home),
            "DAGSTER_TELEMETRY_ENABLED": "false",
        },
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )


def materialize(cohort: Path, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return dagster(cohort, root, "asset", "materialize", "--select", *arguments)


def edited(cohort: Path, root: Path, edit: dict[str, object]) -> Path:
    """The cohort file with some fields replaced, beside a link to nothing else."""
    data = yaml.safe_load(cohort.read_text())
    for name in ("labels",):
        data[name] = str(cohort.parent / data[name])
    data["slides"] = {"table": str(cohort.parent / "slides.csv")}
    for task in data["patch_tasks"]:
        task["table"] = str(cohort.parent / task["table"])
    path = root / "cohort.yaml"
    path.write_text(yaml.safe_dump(data | edit))
    return path


def test_the_command_line_materializes_a_partition_and_a_range(tiny_cohort, tmp_path):
    assert materialize(tiny_cohort, tmp_path, "slide_index").returncode == 0
    one = materialize(tiny_cohort, tmp_path, "slide,patch_table", "--partition", "demo-01-1")
    assert one.returncode == 0, one.stderr
    tables = tmp_path / "store" / "patch_tables"
    assert [path.stem for path in tables.iterdir()] == ["demo-01-1"]
    some = materialize(
        tiny_cohort, tmp_path, "slide,patch_table", "--partition-range", "demo-02-1...demo-03-1"
    )
    assert some.returncode == 0, some.stderr
    assert len(list(tables.iterdir())) > 2


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            {"slides": {"folders": [{"path": "/nowhere"}]}},
            "/nowhere is no folder",
        ),
        ({"labels": "/nowhere/labels.csv"}, "cannot be read"),
        ({"encoders": [{"name": "x", "objective": "magic"}]}, "encoders.0.objective"),
    ],
)
def test_a_wrong_cohort_fails_with_one_clear_error_and_writes_nothing(
    tiny_cohort, tmp_path, edit, message
):
    result = materialize(edited(tiny_cohort, tmp_path, edit), tmp_path, "slide_index")
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert not (tmp_path / "store" / "slides").exists()


def test_a_missing_slide_file_is_named(tiny_cohort, tmp_path):
    table = pl.read_csv(tiny_cohort.parent / "slides.csv", infer_schema=False)
    gone = table.with_columns(
        pl.when(pl.int_range(pl.len()) == 0)
        .then(pl.lit("gone.tif"))
        .otherwise(pl.lit(f"{tiny_cohort.parent}/") + pl.col("path"))
        .alias("path"),
        truth=pl.lit(None, pl.String),
    )
    gone.write_csv(tmp_path / "slides.csv")
    cohort = edited(tiny_cohort, tmp_path, {"slides": {"table": "slides.csv"}})
    result = materialize(cohort, tmp_path, "slide_index")
    assert result.returncode != 0
    assert "gone.tif does not exist" in result.stdout + result.stderr


def test_an_unknown_partition_fails(tiny_cohort, tmp_path):
    result = materialize(tiny_cohort, tmp_path, "encoder", "--partition", "no-such-encoder")
    assert result.returncode != 0
    assert "no-such-encoder" in result.stdout + result.stderr


def test_the_definitions_validate(tiny_cohort, tmp_path):
    result = dagster(tiny_cohort, tmp_path, "definitions", "validate")
    assert result.returncode == 0, result.stderr

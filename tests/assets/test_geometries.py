"""A study whose encoders take patches of different sizes, um/px and strides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import mlflow
import numpy as np
import polars as pl
import pytest
import torch
import yaml
from rich.console import Console

from nic_assets.build import build_defs
from nic_assets.operations.refresh import refresh
from nic_core import steps
from nic_core.cohort import Cohort, load_cohort
from nic_core.encoders.files import read_card
from nic_core.grids import open_grid
from nic_core.models.files import load_model
from nic_core.store import GridKey, ModelKey, PatchTaskKey, Store

pytestmark = pytest.mark.slow

SLIDES = 9
PREPROCESS = {"mean": [0.5] * 3, "std": [0.25] * 3}
# the slides have 512 um a side
ENCODERS: list[dict[str, Any]] = [
    {"name": "rgb", "objective": "mean_rgb"},
    {
        "name": "mtl",
        "objective": "mtl",
        "tasks": ["breast_mitosis", "lymph_node"],
        "patch": 64,
        "patches_seen": 64,
        "batch": 16,
    },
    {"name": "mtl-1um", "objective": "reused", "encoder": "mtl", "mpp": 1.0},
    {
        "name": "means",
        "objective": "imported",
        "file": "means.pt",
        "stride": 32,
        "network": {"patch": 96, "mpp": 0.5, "embedding_size": 12, "preprocess": PREPROCESS},
    },
]


class Means(torch.nn.Module):
    """The means of three channels over the quarters of a patch."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)


@dataclass(frozen=True)
class Study:
    folder: Path
    instance: dg.DagsterInstance

    @property
    def cohort(self) -> Cohort:
        return load_cohort(self.folder / "cohort.yaml")

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")

    def refresh(self) -> list[str]:
        return refresh(build_defs(self.cohort, self.store), self.instance, Console(quiet=True))

    def made(self, asset: str) -> set[str]:
        return self.instance.get_materialized_partitions(dg.AssetKey(asset))

    def change(self, encoder: str, **fields: object) -> None:
        path = self.folder / "cohort.yaml"
        data = yaml.safe_load(path.read_text())
        for entry in data["encoders"]:
            if entry["name"] == encoder:
                entry |= fields
        path.write_text(yaml.safe_dump(data))

    def counts(self, asset: str) -> dict[str, int]:
        records = self.instance.fetch_materializations(dg.AssetKey(asset), limit=1000).records
        return dict(pl.Series([r.partition_key for r in records]).value_counts().iter_rows())


@pytest.fixture(scope="module")
def study(tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("geometries")
    source = tiny_cohort.parent
    slides = pl.read_csv(source / "slides.csv", infer_schema=False)
    slides.select("slide", "patient", path=f"{source}/" + pl.col("path")).head(SLIDES).write_csv(
        folder / "slides.csv"
    )
    data = yaml.safe_load(tiny_cohort.read_text())
    tasks = {task["name"]: task for task in data["patch_tasks"]}
    tasks = {name: tasks[name] for name in ("breast_mitosis", "lymph_node")}
    for task in tasks.values():
        task["table"] = str(source / task["table"])
    tasks["lymph_node"]["train_mpp"] = 1.0
    data |= {
        "slides": {"table": "slides.csv"},
        "labels": str(source / "labels.csv"),
        "patch_tasks": list(tasks.values()),
        "encoders": ENCODERS,
        "targets": [t for t in data["targets"] if t["name"] == "proliferation"],
        "maps": [data["maps"][0] | {"encoder": "mtl-1um"}],
    }
    data["settings"]["models"] |= {"folds": 3, "epochs": 1, "bootstrap": 20, "crop_um": 256}
    (folder / "cohort.yaml").write_text(yaml.safe_dump(data))
    torch.jit.script(Means()).save(folder / "means.pt")
    (folder / "dagster").mkdir()
    instance = dg.DagsterInstance.local_temp(str(folder / "dagster"))
    made = Study(folder, instance)
    assert made.refresh() == []
    return made


def test_a_slide_has_a_patch_table_of_each_geometry(study):
    slides = study.instance.get_dynamic_partitions("slides")
    names = ["128px-0.5um", "64px-0.5um", "64px-1um", "96px-0.5um-stride32"]
    assert list(study.cohort.geometries) == names
    assert study.made("patch_table") == {f"{name}|{slide}" for name in names for slide in slides}


def test_grids_have_the_cells_of_their_encoder(study):
    shapes = {}
    for encoder in study.cohort.encoders:
        grid = open_grid(study.store.grid(GridKey(encoder=encoder.name, slide="demo-01-1")))
        shapes[encoder.name] = grid.shape
        about = grid.provenance
        geometry = study.cohort.geometry(encoder.name)
        assert (about.patch, about.mpp, about.stride) == (
            geometry.patch,
            geometry.mpp,
            geometry.stride,
        )
    assert shapes == {
        "rgb": (3, 8, 8),
        "mtl": (128, 16, 16),
        "mtl-1um": (128, 8, 8),
        "means": (12, 32, 32),
    }


def test_a_task_is_trained_at_its_own_resolution(study):
    card = read_card(study.store.encoder("mtl"))
    assert card.task_mpp == {"breast_mitosis": 0.5, "lymph_node": 1.0}
    assert {"64px-0.5um|breast_mitosis", "64px-1um|lymph_node"} <= study.made("patch_task")
    assert "64px-0.5um|lymph_node" not in study.made("patch_task")
    key = PatchTaskKey(geometry="64px-1um", task="lymph_node")
    assert study.store.patch_task(key).is_dir()


def test_a_reused_encoder_has_the_weights_at_another_resolution(study):
    first, second = (read_card(study.store.encoder(name)) for name in ("mtl", "mtl-1um"))
    assert (second.weights_hash, second.tasks) == (first.weights_hash, first.tasks)
    assert (first.mpp, second.mpp) == (0.5, 1.0)
    # the map of the task that was seen at 1 um/px is made from its grids
    assert {key.split("|")[0] for key in study.made("probability_map")} == {"tumour"}


def test_probes_see_every_task_at_the_resolution_of_training(study):
    probes = pl.read_parquet(study.store.encoder_probe("mtl"))
    seen = dict(probes.select("task", "mpp").unique().iter_rows())
    assert seen == {"breast_mitosis": 0.5, "lymph_node": 1.0}


def test_models_of_all_encoders_are_compared_on_the_same_units(study):
    names = [encoder.name for encoder in study.cohort.encoders]
    crops, units = {}, {}
    for name in names:
        folder = study.store.slide_model(ModelKey(encoder=name, target="proliferation"))
        card = load_model(folder).card
        crops[name] = card.crop * study.cohort.geometry(name).cell_um
        found = pl.read_parquet(folder / "predictions.parquet")
        units[name] = found.filter(split="cv").select("unit", "fold").unique().sort("unit")
    assert all(units[name].equals(units["rgb"]) for name in names)
    assert set(crops.values()) == {256}
    compared = pl.read_parquet(study.store.evaluation_report / "comparisons.parquet")
    pairs = set(compared.select("first", "second").iter_rows())
    assert {("mtl: network", "means: network"), ("rgb: network", "mtl: network")} <= pairs
    assert set(compared.select("only_first", "only_second", "other_slides").iter_rows()) == {
        (0, 0, 0)
    }


def test_the_report_and_the_registry_state_the_geometry_of_encoders(study):
    event = study.instance.get_latest_materialization_event(dg.AssetKey("evaluation_report"))
    encoders = event.asset_materialization.metadata["encoders"].records
    assert {record.data["encoder"]: record.data["cell_um"] for record in encoders} == {
        "rgb": 64.0,
        "mtl": 32.0,
        "mtl-1um": 64.0,
        "means": 16.0,
    }
    client = mlflow.MlflowClient(f"sqlite:///{study.store.mlflow / 'mlflow.db'}")
    versions = client.search_model_versions("name='model-proliferation'")
    assert {version.tags["encoder"]: version.tags["geometry"] for version in versions} == {
        "rgb": "128 px at 0.5 um/px, stride 128 px",
        "mtl": "64 px at 0.5 um/px, stride 64 px",
        "mtl-1um": "64 px at 1 um/px, stride 64 px",
        "means": "96 px at 0.5 um/px, stride 32 px",
    }
    assert {version.tags["crop_um"] for version in versions} == {"256"}


def test_another_stride_makes_only_its_encoder_stale(study):
    before = {asset: study.counts(asset) for asset in ("patch_table", "grid", "encoder")}
    study.change("means", stride=48)
    assert study.refresh() == []
    after = {asset: study.counts(asset) for asset in ("patch_table", "grid", "encoder")}
    new = {key for key, count in after["grid"].items() if count > before["grid"][key]}
    assert {key.split("|")[0] for key in new} == {"means"}
    tables = {key for key in after["patch_table"] if key not in before["patch_table"]}
    assert {key.split("|")[0] for key in tables} == {"96px-0.5um-stride48"}
    assert all(after["patch_table"][key] == n for key, n in before["patch_table"].items())
    changed = {key for key, count in after["encoder"].items() if count > before["encoder"][key]}
    assert changed == {"means"}


def test_new_weights_reach_the_encoder_that_reuses_them(study):
    old = read_card(study.store.encoder("mtl-1um")).weights_hash
    study.change("mtl", seed=5)
    assert study.refresh() == []
    first, second = (read_card(study.store.encoder(name)) for name in ("mtl", "mtl-1um"))
    assert second.weights_hash == first.weights_hash != old
    cells = steps.read_cells(
        study.cohort, study.store, GridKey(encoder="mtl-1um", slide="demo-01-1")
    )
    grid = open_grid(study.store.grid(GridKey(encoder="mtl-1um", slide="demo-01-1")))
    assert grid.provenance.weights_hash == second.weights_hash
    assert int(grid.valid.sum()) == cells["kept"].sum()
    assert np.isfinite(np.asarray(grid.embeddings[:])).all()

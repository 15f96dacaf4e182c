"""``nic store gc``: products that are not needed are listed and removed on request."""

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import dagster as dg
import mlflow
import polars as pl
import pytest
import typer
import yaml
from typer.testing import CliRunner

from nic_assets.assets.inputs import add_slides
from nic_assets.build import build_defs
from nic_assets.cli import register
from nic_assets.operations.retention import RetentionError, registered_tags, unneeded
from nic_assets.tracking import Tracking
from nic_core import steps
from nic_core.cohort import Cohort, load_cohort
from nic_core.encoders.files import read_card
from nic_core.store import Store

pytestmark = pytest.mark.slow

ENCODER = "mean-rgb"


@dataclass
class World:
    """A study with every product of one encoder, and its Dagster instance."""

    cohort: Cohort
    store: Store
    instance: dg.DagsterInstance

    @property
    def slides(self) -> list[str]:
        return steps.read_slide_index(self.store)["slide"].to_list()

    @property
    def weights(self) -> str:
        return read_card(self.store.encoder(ENCODER)).weights_hash

    def with_entries(self, **entries: tuple) -> "World":
        """The same study with other entries in the cohort file."""
        return replace(self, cohort=self.cohort.model_copy(update=entries))

    def unneeded(self, *tags: dict[str, str]) -> set[str]:
        defs = build_defs(self.cohort, self.store)
        return {str(item) for item in unneeded(self.store, defs, self.instance, tags)}


@pytest.fixture
def world(mean_rgb_study) -> World:
    cohort, store = mean_rgb_study
    instance = dg.DagsterInstance.ephemeral()
    add_slides(instance, steps.read_slide_index(store)["slide"].to_list())
    return World(cohort, store, instance)


def test_every_product_of_the_cohort_is_needed(world):
    assert world.unneeded() == set()


def test_products_of_a_removed_slide_are_not_needed(world):
    slide = world.slides[3]
    world.instance.delete_dynamic_partition("slides", slide)
    assert world.unneeded() == {
        f"slide {slide}",
        f"patch_table 128px-0.5um|{slide}",
        f"grid {ENCODER}|{slide}",
        f"grid_preview {ENCODER}|{slide}",
    }


def no_encoder(world: World) -> World:
    kept = tuple(entry for entry in world.cohort.encoders if entry.name != ENCODER)
    return world.with_entries(encoders=kept)


def everything_of_the_encoder(world: World) -> set[str]:
    return {
        f"encoder {ENCODER}",
        *(f"grid {ENCODER}|{slide}" for slide in world.slides),
        *(f"target_grids {ENCODER}|{target.name}" for target in world.cohort.targets),
        *(f"slide_model {ENCODER}|{target.name}" for target in world.cohort.targets),
        f"grid_manifest {ENCODER}",
        f"embedding_colours {ENCODER}",
        *(f"grid_preview {ENCODER}|{slide}" for slide in world.slides),
    }


def test_products_of_a_removed_encoder_are_not_needed(world):
    assert no_encoder(world).unneeded() == everything_of_the_encoder(world)


def test_a_registered_encoder_is_needed(world):
    tags = {"weights_hash": world.weights}
    expected = everything_of_the_encoder(world) - {f"encoder {ENCODER}"}
    assert no_encoder(world).unneeded(tags) == expected
    other = {"weights_hash": "00" * 32}
    assert no_encoder(world).unneeded(other) == everything_of_the_encoder(world)


def test_the_encoder_and_training_grids_of_a_registered_model_are_needed(world):
    tags = {"target": "growth", "encoder": ENCODER, "weights_hash": world.weights}
    left = no_encoder(world).unneeded(tags)
    assert f"slide_model {ENCODER}|growth" not in left
    assert f"target_grids {ENCODER}|growth" not in left
    assert f"slide_model {ENCODER}|survival" in left
    assert f"encoder {ENCODER}" not in left
    table = pl.read_parquet(world.store.target_folds("growth"))
    trained_on = set(table.filter(split="cv")["slides"].explode())
    held_out = set(world.slides) - trained_on
    assert held_out
    assert {name.partition("|")[2] for name in left if name.startswith("grid ")} == held_out


def test_folds_and_models_of_a_removed_target_are_not_needed(world):
    kept = tuple(target for target in world.cohort.targets if target.name != "growth")
    smaller = world.with_entries(targets=kept)
    assert smaller.unneeded() == {
        "target_folds growth",
        f"target_grids {ENCODER}|growth",
        f"slide_model {ENCODER}|growth",
    }
    tags = {"target": "growth", "encoder": ENCODER, "weights_hash": world.weights}
    assert smaller.unneeded(tags) == set()


def test_an_instance_without_slides_is_refused(world):
    with pytest.raises(RetentionError, match="the Dagster instance has no slide.*DAGSTER_HOME"):
        replace(world, instance=dg.DagsterInstance.ephemeral()).unneeded()


def test_an_unreadable_product_is_needed(world, tmp_path):
    shutil.copytree(world.store.root, tmp_path / "store")
    damaged = replace(world, store=Store(tmp_path / "store"))
    card = damaged.store.encoder(ENCODER) / "card.json"
    card.write_text("{")
    left = unneeded(
        damaged.store, build_defs(no_encoder(damaged).cohort, damaged.store), world.instance, []
    )
    assert f"encoder {ENCODER}" not in {str(item) for item in left}


def test_reading_the_registry_does_not_create_a_database(tmp_path):
    tracking = Tracking.in_store(Store(tmp_path))
    assert registered_tags(tracking) == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mlflow").mkdir()
    client = mlflow.MlflowClient(tracking.uri)
    client.create_registered_model("encoder-x")
    for number in range(2):
        client.create_model_version("encoder-x", f"file://{tmp_path}", tags={"n": str(number)})
    assert sorted(tags["n"] for tags in registered_tags(tracking)) == ["0", "1"]


def test_the_command_lists_and_removes_on_request(world, tiny_cohort, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a folder without .env
    shutil.copytree(world.store.root, tmp_path / "store")
    entries = yaml.safe_load(tiny_cohort.read_text())
    entries["encoders"] = [e for e in entries["encoders"] if e["name"] != ENCODER]
    cohort = tiny_cohort.with_name("smaller.yaml")
    cohort.write_text(yaml.safe_dump(entries))
    assert ENCODER not in [entry.name for entry in load_cohort(cohort).encoders]
    home = tmp_path / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}")
    variables = {
        "DAGSTER_HOME": str(home),
        "NIC_STORE": str(tmp_path / "store"),
        "NIC_COHORT": str(cohort),
        "COLUMNS": "200",
    }
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        with dg.DagsterInstance.get() as instance:
            add_slides(instance, world.slides)
    notes = tmp_path / "store" / "grids" / ENCODER / "notes.txt"
    notes.write_text("of the user")

    def gc(*arguments: str):
        monkeypatch.delitem(sys.modules, "nic_assets.definitions", raising=False)
        app = typer.Typer()
        register(app)
        return CliRunner().invoke(app, ["store", "gc", *arguments], env=variables)

    def products() -> set[str]:
        return {str(item) for item in Store(tmp_path / "store").products()}

    before = products()
    listed = gc()
    assert listed.exit_code == 0, listed.output
    assert f"{len(everything_of_the_encoder(world))} products" in listed.output
    assert "nothing was removed" in listed.output
    assert products() == before
    assert gc("--delete").exit_code == 0
    assert products() == before - everything_of_the_encoder(world)
    assert notes.read_text() == "of the user"
    assert "every product is needed" in gc().output


def test_a_product_behind_a_symbolic_link_is_not_listed(world, tmp_path):
    outside = tmp_path / "elsewhere"
    shutil.copytree(world.store.root, tmp_path / "store")
    shutil.move(tmp_path / "store" / "encoders" / ENCODER, outside)
    link = tmp_path / "store" / "encoders" / ENCODER
    link.symlink_to(outside)
    assert Path(link) not in [item.path for item in Store(tmp_path / "store").products()]

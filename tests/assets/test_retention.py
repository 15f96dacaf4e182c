"""``nic store gc``: what nobody needs goes, what anybody needs stays."""

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import dagster as dg
import mlflow
import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from nic_assets.assets.inputs import add_slides
from nic_assets.build import build_defs
from nic_assets.cli import app
from nic_assets.operations.retention import RetentionError, registered_tags, unneeded
from nic_assets.tracking import Tracking
from nic_core import steps
from nic_core.cohort import Cohort, load_cohort
from nic_core.encoders.files import read_card
from nic_core.store import Store

ENCODER = "mean-rgb"


@dataclass
class World:
    """A study with everything of one encoder, and what Dagster knows of it."""

    cohort: Cohort
    store: Store
    instance: dg.DagsterInstance

    @property
    def slides(self) -> list[str]:
        return steps.read_slide_index(self.store)["slide"].to_list()

    @property
    def weights(self) -> str:
        return read_card(self.store.encoder(ENCODER)).weights_hash

    def without(self, **left: tuple) -> "World":
        """The same with a poorer cohort file."""
        return replace(self, cohort=self.cohort.model_copy(update=left))

    def unneeded(self, *tags: dict[str, str]) -> set[str]:
        defs = build_defs(self.cohort, self.store)
        return {str(item) for item in unneeded(self.store, defs, self.instance, tags)}


@pytest.fixture
def world(mean_rgb_study) -> World:
    cohort, store = mean_rgb_study
    instance = dg.DagsterInstance.ephemeral()
    add_slides(instance, steps.read_slide_index(store)["slide"].to_list())
    return World(cohort, store, instance)


def test_everything_of_the_cohort_is_needed(world):
    assert world.unneeded() == set()


def test_a_slide_that_left_the_cohort_takes_its_products_with_it(world):
    slide = world.slides[3]
    world.instance.delete_dynamic_partition("slides", slide)
    assert world.unneeded() == {
        f"slide {slide}",
        f"patch_table {slide}",
        f"grid {ENCODER}|{slide}",
    }


def no_encoder(world: World) -> World:
    kept = tuple(entry for entry in world.cohort.encoders if entry.name != ENCODER)
    return world.without(encoders=kept)


def everything_of_the_encoder(world: World) -> set[str]:
    return {
        f"encoder {ENCODER}",
        *(f"grid {ENCODER}|{slide}" for slide in world.slides),
        *(f"model {target.name}|{ENCODER}" for target in world.cohort.targets),
    }


def test_an_encoder_that_left_the_cohort_file_takes_its_grids_and_models_with_it(world):
    assert no_encoder(world).unneeded() == everything_of_the_encoder(world)


def test_a_registered_encoder_stays(world):
    tags = {"weights_hash": world.weights}
    expected = everything_of_the_encoder(world) - {f"encoder {ENCODER}"}
    assert no_encoder(world).unneeded(tags) == expected
    other = {"weights_hash": "00" * 32}
    assert no_encoder(world).unneeded(other) == everything_of_the_encoder(world)


def test_a_registered_model_keeps_its_encoder_and_the_grids_that_it_learned_from(world):
    tags = {"target": "growth", "encoder": ENCODER, "weights_hash": world.weights}
    left = no_encoder(world).unneeded(tags)
    assert f"model growth|{ENCODER}" not in left
    assert f"model survival|{ENCODER}" in left
    assert f"encoder {ENCODER}" not in left
    table = pl.read_parquet(world.store.target_folds("growth"))
    learned = set(table.filter(split="cv")["slides"].explode())
    held_out = set(world.slides) - learned
    assert held_out
    assert {name.partition("|")[2] for name in left if name.startswith("grid")} == held_out


def test_a_target_that_left_the_cohort_file_takes_its_folds_and_models_with_it(world):
    kept = tuple(target for target in world.cohort.targets if target.name != "growth")
    poorer = world.without(targets=kept)
    assert poorer.unneeded() == {"folds growth", f"model growth|{ENCODER}"}
    tags = {"target": "growth", "encoder": ENCODER, "weights_hash": world.weights}
    assert poorer.unneeded(tags) == set()


def test_a_home_that_knows_no_slide_is_refused(world):
    with pytest.raises(RetentionError, match="Dagster knows no slide.*DAGSTER_HOME"):
        replace(world, instance=dg.DagsterInstance.ephemeral()).unneeded()


def test_what_cannot_be_read_stays(world, tmp_path):
    shutil.copytree(world.store.root, tmp_path / "store")
    damaged = replace(world, store=Store(tmp_path / "store"))
    card = damaged.store.encoder(ENCODER) / "card.json"
    card.write_text("{")
    left = unneeded(
        damaged.store, build_defs(no_encoder(damaged).cohort, damaged.store), world.instance, []
    )
    assert f"encoder {ENCODER}" not in {str(item) for item in left}


def test_the_registry_is_read_and_not_made(tmp_path):
    tracking = Tracking.in_store(Store(tmp_path))
    assert registered_tags(tracking) == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mlflow").mkdir()
    client = mlflow.MlflowClient(tracking.uri)
    client.create_registered_model("encoder-x")
    for number in range(2):
        client.create_model_version("encoder-x", f"file://{tmp_path}", tags={"n": str(number)})
    assert sorted(tags["n"] for tags in registered_tags(tracking)) == ["0", "1"]


def test_the_command_lists_first_and_removes_on_request(world, tiny_cohort, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # there is no .env here
    shutil.copytree(world.store.root, tmp_path / "store")
    entries = yaml.safe_load(tiny_cohort.read_text())
    entries["encoders"] = [e for e in entries["encoders"] if e["name"] != ENCODER]
    cohort = tiny_cohort.with_name("poorer.yaml")
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
    mine = tmp_path / "store" / "grids" / ENCODER / "notes.txt"
    mine.write_text("mine")

    def gc(*arguments: str):
        monkeypatch.delitem(sys.modules, "nic_assets.definitions", raising=False)
        return CliRunner().invoke(app, ["store", "gc", *arguments], env=variables)

    def there() -> set[str]:
        return {str(item) for item in Store(tmp_path / "store").products()}

    before = there()
    listed = gc()
    assert listed.exit_code == 0, listed.output
    assert "16 products" in listed.output
    assert "nothing was removed" in listed.output
    assert there() == before
    assert gc("--delete").exit_code == 0
    assert there() == before - everything_of_the_encoder(world)
    assert mine.read_text() == "mine"
    assert "everything is needed" in gc().output


def test_a_product_behind_a_link_stays(world, tmp_path):
    outside = tmp_path / "elsewhere"
    shutil.copytree(world.store.root, tmp_path / "store")
    shutil.move(tmp_path / "store" / "encoders" / ENCODER, outside)
    link = tmp_path / "store" / "encoders" / ENCODER
    link.symlink_to(outside)
    assert Path(link) not in [item.path for item in Store(tmp_path / "store").products()]

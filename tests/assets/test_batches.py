"""Batch runs through Dagster: outcome, data version and staleness of each partition."""

import os

import dagster as dg
import pytest
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)
from rich.console import Console

from nic_assets.assets.inputs import SLIDE_FILE, add_slides, report_versions
from nic_assets.operations.refresh import refresh
from nic_assets.orchestration.batches import (
    Events,
    Product,
    batch_asset,
    materialize_each,
    materialize_in_parallel,
)
from nic_assets.partitions import SLIDES
from nic_core.slides import SlideError

pytestmark = pytest.mark.slow

KEYS = ["s1", "s2", "s3", "s4"]


class BadSlideError(Exception):
    pass


class World:
    """Slides with their content, the bad ones among them, and a log of the work."""

    def __init__(self) -> None:
        self.content = dict.fromkeys(KEYS, "v1")
        self.bad: set[str] = set()
        self.done: list[str] = []
        self.instance = dg.DagsterInstance.ephemeral()
        add_slides(self.instance, KEYS)
        self.scan()

    def scan(self) -> None:
        report_versions(self.instance, SLIDE_FILE, self.content)

    def definitions(self) -> dg.Definitions:
        @batch_asset(partitions_def=SLIDES, deps=[SLIDE_FILE], code_version="1")
        def mask(context: dg.AssetExecutionContext) -> Events:
            def make(key: str) -> Product:
                if key in self.bad:
                    raise BadSlideError(f"{key} is cut short")
                self.done.append(f"mask {key}")
                # the mask depends only on the first letter of the content
                return Product(self.content[key][0], {"key": key})

            yield from materialize_each(context, make, parse=str, expected=(BadSlideError,))

        @batch_asset(partitions_def=SLIDES, deps=[mask], code_version="1")
        def grid(context: dg.AssetExecutionContext) -> Events:
            def make(key: str) -> Product:
                self.done.append(f"grid {key}")
                return Product(self.content[key])

            yield from materialize_each(context, make, parse=str, expected=(BadSlideError,))

        return dg.Definitions(assets=[dg.AssetSpec(SLIDE_FILE, partitions_def=SLIDES), mask, grid])

    def run(
        self, *assets: str, parent: str | None = None, **tags: str
    ) -> dg.ExecuteInProcessResult:
        if parent is not None:  # `execute_in_process` has no argument for it
            create = self.instance.create_run_for_job
            self.instance.create_run_for_job = lambda *args, **kwargs: create(
                *args, **kwargs | {"parent_run_id": parent, "root_run_id": parent}
            )
        return (
            self.definitions()
            .resolve_implicit_global_asset_job_def()
            .execute_in_process(
                instance=self.instance,
                asset_selection=[dg.AssetKey(asset) for asset in assets],
                tags={
                    ASSET_PARTITION_RANGE_START_TAG: KEYS[0],
                    ASSET_PARTITION_RANGE_END_TAG: KEYS[-1],
                    **{f"dagster/{name}": value for name, value in tags.items()},
                },
                raise_on_error=False,
            )
        )

    def refresh(self) -> list[str]:
        self.done.clear()
        return refresh(self.definitions(), self.instance, Console(quiet=True))

    def version(self, asset: str, key: str) -> str:
        [record] = self.instance.fetch_materializations(
            dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[key]), limit=1
        ).records
        return record.asset_materialization.tags["dagster/data_version"]


@pytest.fixture
def world() -> World:
    return World()


def test_each_partition_of_a_batch_has_its_own_version(world):
    world.content["s3"] = "v3"
    assert world.run("mask", "grid").success
    assert [world.version("grid", key) for key in KEYS] == ["v1", "v1", "v3", "v1"]


def test_a_bad_slide_fails_the_run_but_not_the_other_slides(world):
    world.bad = {"s2"}
    result = world.run("mask")
    assert not result.success
    [failure] = result.get_step_failure_events()
    assert "s2 is cut short" in failure.step_failure_data.user_failure_data.description
    assert world.instance.get_materialized_partitions(dg.AssetKey("mask")) == {"s1", "s3", "s4"}


def test_an_unexpected_error_stops_the_batch(world):
    del world.content["s2"]
    result = world.run("mask")
    assert not result.success
    assert "mask s3" not in world.done


def test_children_in_the_same_run_are_materialized(world):
    assert world.run("mask", "grid").success
    assert world.done == [f"{asset} {key}" for asset in ("mask", "grid") for key in KEYS]


def test_refresh_makes_nothing_twice(world):
    assert world.refresh() == []
    assert len(world.done) == 8
    assert world.refresh() == []
    assert world.done == []


def test_refresh_makes_only_the_slide_that_changed(world):
    world.refresh()
    world.content["s2"] = "w"
    world.scan()
    world.refresh()
    assert world.done == ["mask s2", "grid s2"]


def test_an_equal_product_makes_nothing_downstream_stale(world):
    world.refresh()
    world.content["s2"] = "v9"
    world.scan()
    world.refresh()
    assert world.done == ["mask s2"]


def test_refresh_names_the_bad_slide_and_makes_the_others(world):
    world.bad = {"s2"}
    problems = world.refresh()
    assert len(problems) == 2
    assert "s2 is cut short" in problems[0]
    assert problems[1].startswith("grid: ")
    assert problems[1].endswith(": s2")
    assert world.instance.get_materialized_partitions(dg.AssetKey("grid")) == {"s1", "s3", "s4"}


def test_refresh_makes_only_the_bad_slide_once_it_is_fixed(world):
    world.bad = {"s2"}
    world.refresh()
    world.bad = set()
    assert world.refresh() == []
    assert world.done == ["mask s2", "grid s2"]


def process_of(key: str) -> int:
    """Return the id of the process that works on a slide; one slide is bad."""
    if key == "s3":
        raise SlideError("s3.tif", "it is cut short", "copy it again")
    return os.getpid()


def test_a_retried_run_makes_only_the_missing_partitions(world):
    world.bad = {"s3"}
    first = world.run("mask").run_id
    world.bad = set()
    world.done.clear()
    assert world.run("mask", parent=first, retry_number="1").success
    assert world.done == ["mask s3"]


def test_a_run_launched_again_by_a_person_makes_every_partition(world):
    first = world.run("mask").run_id
    world.done.clear()
    assert world.run("mask", parent=first).success
    assert world.done == [f"mask {key}" for key in KEYS]


def test_parallel_work_runs_in_other_processes(monkeypatch):
    monkeypatch.setattr("nic_core.parallel.ITEMS_PER_PROCESS", 1)
    monkeypatch.setattr("nic_core.parallel.cores", lambda: 2)
    world = World()

    @batch_asset(partitions_def=SLIDES, deps=[SLIDE_FILE], code_version="1")
    def mask(context: dg.AssetExecutionContext) -> Events:
        def describe(key: str, process: int) -> Product:
            return Product(key, {"process": process})

        yield from materialize_in_parallel(
            context, process_of, describe, parse=str, expected=(SlideError,)
        )

    world.definitions = lambda: dg.Definitions(
        [dg.AssetSpec(SLIDE_FILE, partitions_def=SLIDES), mask]
    )
    assert not world.run("mask").success
    assert world.instance.get_materialized_partitions(dg.AssetKey("mask")) == {"s1", "s2", "s4"}
    event = world.instance.get_latest_materialization_event(dg.AssetKey("mask"))
    assert event.asset_materialization.metadata["process"].value != os.getpid()

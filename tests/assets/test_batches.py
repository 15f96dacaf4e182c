"""A batch run through Dagster itself: outcomes, versions and staleness of each partition."""

import os
from collections.abc import Iterator

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
    Product,
    batch_asset,
    materialize_ahead,
    materialize_each,
)
from nic_assets.partitions import SLIDES
from nic_core.slides import SlideError

KEYS = ["s1", "s2", "s3", "s4"]


class BadSlideError(Exception):
    pass


class World:
    """What the slides hold, which are bad, and what was done to them."""

    def __init__(self) -> None:
        self.content = dict.fromkeys(KEYS, "v1")
        self.bad: set[str] = set()
        self.done: list[str] = []
        self.instance = dg.DagsterInstance.ephemeral()
        add_slides(self.instance, KEYS)
        self.look()

    def look(self) -> None:
        report_versions(self.instance, SLIDE_FILE, self.content)

    def definitions(self) -> dg.Definitions:
        common = {
            "partitions_def": SLIDES,
            "backfill_policy": dg.BackfillPolicy.single_run(),
            "output_required": False,
            "code_version": "1",
        }

        @dg.asset(
            deps=[SLIDE_FILE], check_specs=[dg.AssetCheckSpec("tidy", asset="mask")], **common
        )
        def mask(
            context: dg.AssetExecutionContext,
        ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
            def work(key: str) -> Product:
                if key in self.bad:
                    raise BadSlideError(f"{key} is cut short")
                self.done.append(f"mask {key}")
                # all slides look alike to the mask except for the first letter
                version = self.content[key][0]
                return Product(version, {"key": key}, {"tidy": None if key != "s2" else "a pen"})

            yield from materialize_each(context, work, expected=(BadSlideError,))

        @dg.asset(deps=[mask], **common)
        def grid(
            context: dg.AssetExecutionContext,
        ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
            def work(key: str) -> Product:
                self.done.append(f"grid {key}")
                return Product(self.content[key])

            yield from materialize_each(context, work, expected=(BadSlideError,))

        return dg.Definitions(assets=[dg.AssetSpec(SLIDE_FILE, partitions_def=SLIDES), mask, grid])

    def run(self, *assets: str, **tags: str) -> dg.ExecuteInProcessResult:
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


def test_each_slide_of_a_batch_has_its_own_version(world):
    world.content["s3"] = "v3"
    assert world.run("mask", "grid").success
    assert [world.version("grid", key) for key in KEYS] == ["v1", "v1", "v3", "v1"]


def test_one_bad_slide_fails_itself_and_the_run_but_not_its_batch(world):
    world.bad = {"s2"}
    result = world.run("mask")
    assert not result.success
    [failure] = result.get_step_failure_events()
    assert "s2 is cut short" in failure.step_failure_data.user_failure_data.description
    assert world.instance.get_materialized_partitions(dg.AssetKey("mask")) == {"s1", "s3", "s4"}


def test_a_fault_of_ours_is_not_taken_for_a_bad_slide(world):
    del world.content["s2"]
    result = world.run("mask")
    assert not result.success
    assert "mask s3" not in world.done


def test_children_in_the_same_run_are_materialized_too(world):
    assert world.run("mask", "grid").success
    assert world.done == [f"{asset} {key}" for asset in ("mask", "grid") for key in KEYS]


def test_a_check_lists_the_slides_that_it_finds(world):
    [evaluation] = world.run("mask").get_asset_check_evaluations()
    assert not evaluation.passed
    assert evaluation.metadata["problems"].value == {"s2": "a pen"}


def test_refresh_does_nothing_twice(world):
    assert world.refresh() == []
    assert len(world.done) == 8
    assert world.refresh() == []
    assert world.done == []


def test_refresh_redoes_just_the_slide_that_changed(world):
    world.refresh()
    world.content["s2"] = "w"
    world.look()
    world.refresh()
    assert world.done == ["mask s2", "grid s2"]


def test_an_input_whose_content_stayed_makes_nothing_downstream_stale(world):
    world.refresh()
    world.content["s2"] = "v9"
    world.look()
    world.refresh()
    assert world.done == ["mask s2"]


def test_refresh_names_the_bad_slide_and_goes_on_with_the_others(world):
    world.bad = {"s2"}
    problems = world.refresh()
    assert len(problems) == 2
    assert "s2 is cut short" in problems[0]
    assert problems[1] == "grid: waits for a missing input: s2"
    assert world.instance.get_materialized_partitions(dg.AssetKey("grid")) == {"s1", "s3", "s4"}


def test_once_mended_only_the_bad_slide_is_left_to_do(world):
    world.bad = {"s2"}
    world.refresh()
    world.bad = set()
    assert world.refresh() == []
    assert world.done == ["mask s2", "grid s2"]


def process_of(key: str) -> int:
    """In which process a slide is worked on; one is bad."""
    if key == "s3":
        raise SlideError("s3.tif", "it is cut short", "copy it again")
    return os.getpid()


def test_a_run_that_takes_up_another_does_only_what_that_left(world):
    world.bad = {"s3"}
    first = world.run("mask").run_id
    world.bad = set()
    world.done.clear()
    assert world.run("mask", parent_run_id=first, root_run_id=first, retry_number="1").success
    assert world.done == ["mask s3"]


def test_a_run_that_a_person_runs_again_does_everything_again(world):
    first = world.run("mask").run_id
    world.done.clear()
    assert world.run("mask", parent_run_id=first, root_run_id=first).success
    assert world.done == [f"mask {key}" for key in KEYS]


def test_work_bound_by_the_cpu_is_done_ahead_by_other_processes(monkeypatch):
    monkeypatch.setattr("nic_core.parallel.ITEMS_PER_PROCESS", 1)
    monkeypatch.setattr("nic_core.parallel.cores", lambda: 2)
    world = World()

    @batch_asset(partitions_def=SLIDES, deps=[SLIDE_FILE], code_version="1")
    def mask(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
        def describe(key: str, process: int) -> Product:
            return Product(key, {"process": process})

        yield from materialize_ahead(context, process_of, describe, expected=(SlideError,))

    world.definitions = lambda: dg.Definitions(
        [dg.AssetSpec(SLIDE_FILE, partitions_def=SLIDES), mask]
    )
    assert not world.run("mask").success
    assert world.instance.get_materialized_partitions(dg.AssetKey("mask")) == {"s1", "s2", "s4"}
    event = world.instance.get_latest_materialization_event(dg.AssetKey("mask"))
    assert event.asset_materialization.metadata["process"].value != os.getpid()

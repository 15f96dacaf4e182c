"""Checks of partitioned assets through Dagster: what an asset's page shows after each run."""

from collections.abc import Callable

import dagster as dg
import pytest
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)

from nic_assets.assets import checks
from nic_assets.assets.inputs import add_slides, drop_slides
from nic_assets.orchestration import partition_checks
from nic_assets.orchestration.batches import Events, Product, batch_asset, materialize_each
from nic_assets.orchestration.partition_checks import Check, failed_checks, republish_checks
from nic_assets.partitions import SLIDES
from nic_core.steps import FailedCheck
from nic_core.store import ModelKey

pytestmark = pytest.mark.slow

MASK, MODEL = dg.AssetKey("mask"), dg.AssetKey("slide_model")
MODELS = dg.MultiPartitionsDefinition(
    {
        "encoder": dg.StaticPartitionsDefinition(["mtl"]),
        "target": dg.StaticPartitionsDefinition(["growth", "subtype", "survival"]),
    }
)


@Check
def tidy(problem: str | None) -> str | None:
    """The slide has no pen marks."""
    return problem


@Check
def sharp(problem: str | None) -> str | None:
    """The slide is in focus."""
    return problem


class BadSlideError(Exception):
    pass


class World:
    """Two assets, the problems of their products, and a real instance on disk."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.problems: dict[str, str] = {}
        self.results: Callable[[str], dict[Check, str | None]] = lambda key: {
            tidy: tidy(self.problems.get(key)),
            sharp: sharp(None),
        }
        # called after the first product of a run
        self.meanwhile: Callable[[], object] = lambda: None
        add_slides(instance, ["s1", "s2", "s3"])

        @batch_asset(checks=[tidy, sharp], partitions_def=SLIDES, code_version="1")
        def mask(context: dg.AssetExecutionContext) -> Events:
            def make(key: str) -> Product:
                meanwhile, self.meanwhile = self.meanwhile, lambda: None
                meanwhile()
                return Product(f"v {self.problems.get(key)}", checks=self.results(key))

            yield from materialize_each(context, make, parse=str, expected=(BadSlideError,))

        @batch_asset(
            checks=[checks.above_permutation_control], partitions_def=MODELS, code_version="1"
        )
        def slide_model(context: dg.AssetExecutionContext) -> Events:
            def make(key: ModelKey) -> Product:
                problem = self.problems.get(key.target)
                return Product("v", checks={checks.above_permutation_control: problem})

            yield from materialize_each(context, make, parse=ModelKey.parse, expected=())

        @dg.asset(
            partitions_def=SLIDES, deps=[mask], backfill_policy=dg.BackfillPolicy.single_run()
        )
        def child() -> None:
            pass

        self.defs = dg.Definitions(assets=[mask, slide_model, child])

    def run(self, assets: str, first: str, last: str | None = None) -> dg.ExecuteInProcessResult:
        return self.defs.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=self.instance,
            asset_selection=[dg.AssetKey(asset) for asset in assets.split()],
            tags={
                ASSET_PARTITION_RANGE_START_TAG: first,
                ASSET_PARTITION_RANGE_END_TAG: last or first,
            },
            raise_on_error=False,
        )

    def republish(self) -> None:
        republish_checks(self.instance, MASK, SLIDES, [tidy, sharp])

    def shown(self, check: Check = tidy, asset: dg.AssetKey = MASK) -> dg.AssetCheckEvaluation:
        """The result that the UI shows: the latest one, if it is of the latest materialization."""
        key = dg.AssetCheckKey(asset, check.name)
        [record] = self.instance.event_log_storage.get_latest_asset_check_execution_by_key(
            [key]
        ).values()
        assert isinstance(record.evaluation, dg.AssetCheckEvaluation), record.status
        [newest] = self.instance.fetch_materializations(asset, limit=1).records
        assert record.evaluation.target_materialization_data.storage_id == newest.storage_id
        return record.evaluation

    def problems_shown(self, check: Check = tidy, asset: dg.AssetKey = MASK) -> dict[str, str]:
        result = self.shown(check, asset)
        problems = result.metadata["problems"].value
        assert result.passed is not bool(problems)
        assert result.metadata["failed"].value == len(problems)
        return problems


@pytest.fixture
def world(tmp_path) -> World:
    return World(dg.DagsterInstance.local_temp(str(tmp_path)))


def test_a_check_fails_until_every_partition_passes(world):
    world.problems = {"s2": "a pen mark"}
    assert world.run("mask", "s1", "s2").success
    assert world.problems_shown() == {"s2": "a pen mark"}
    assert world.run("mask", "s1").success
    result = world.shown()
    assert not result.passed
    assert result.description == "1 of 2 partitions failed: s2: a pen mark"
    assert world.problems_shown(sharp) == {}
    world.problems = {}
    assert world.run("mask", "s2").success
    assert world.problems_shown() == {}
    assert world.shown().description == "2 of 2 partitions passed"


def test_failed_checks_are_counted_for_the_report(world):
    specs = [spec for asset in world.defs.assets for spec in asset.check_specs]
    assert failed_checks(world.instance, specs) == []
    world.problems = {"s2": "a pen mark", "growth": "0.1 is within chance"}
    assert world.run("mask", "s1", "s3").success
    assert world.run("slide_model", "mtl|growth").success
    control = checks.above_permutation_control
    assert failed_checks(world.instance, specs) == [
        FailedCheck("mask", "tidy", tidy.description, 1, 3),
        FailedCheck("slide_model", control.name, control.description, 1, 1),
    ]
    world.problems = {}
    assert world.run("mask", "s2").success
    assert [check.asset for check in failed_checks(world.instance, specs)] == ["slide_model"]


def test_models_that_fail_their_permutation_control_stay_failed(world):
    world.problems = {"growth": "0.1 is within chance", "survival": "0.2 is within chance"}
    for target in ("growth", "subtype", "survival"):
        assert world.run("slide_model", f"mtl|{target}").success
    assert world.run("slide_model", "mtl|subtype").success
    assert world.problems_shown(checks.above_permutation_control, MODEL) == {
        "mtl|growth": "0.1 is within chance",
        "mtl|survival": "0.2 is within chance",
    }
    assert world.shown(checks.above_permutation_control, MODEL).metadata["partitions"].value == 3


def test_each_partition_records_the_results_of_its_checks(world):
    world.problems = {"s2": "a pen mark"}
    world.run("mask", "s2")
    event = world.instance.get_latest_materialization_event(MASK)
    results = event.asset_materialization.metadata["checks"].value
    assert results == {"tidy": "a pen mark", "sharp": "passed"}


def test_a_removed_partition_leaves_the_result_and_returns_to_it(world, monkeypatch):
    monkeypatch.setattr(partition_checks, "_OVERLAP", 1)  # do not read its record again
    world.problems = {"s2": "a pen mark"}
    world.run("mask", "s1", "s2")
    drop_slides(world.instance, ["s1", "s3"])
    world.republish()
    assert world.problems_shown() == {}
    world.run("mask", "s1")
    assert world.shown().metadata["partitions"].value == 1
    add_slides(world.instance, ["s1", "s2", "s3"])
    world.republish()
    assert world.problems_shown() == {"s2": "a pen mark"}


def test_an_unchanged_result_is_not_published_again(world):
    world.run("mask", "s1", "s2")
    world.republish()
    history = world.instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(MASK, "tidy"), limit=9
    )
    assert len(history) == 1


def test_a_result_covers_a_run_that_was_created_earlier_and_ends_later(world):
    world.problems = {"s2": "a pen mark"}
    world.meanwhile = lambda: world.run("mask", "s3")
    assert world.run("mask", "s1", "s2").success
    assert world.problems_shown() == {"s2": "a pen mark"}
    assert world.shown().metadata["partitions"].value == 3


def test_a_result_covers_what_is_recorded_while_it_is_published(world, monkeypatch):
    compute = partition_checks._evaluations
    bad = {"tidy": "a pen mark", "sharp": "passed"}

    def interrupted(*args):
        found = compute(*args)
        monkeypatch.setattr(partition_checks, "_evaluations", compute)
        world.instance.report_runless_asset_event(
            dg.AssetMaterialization(MASK, partition="s2", metadata={"checks": bad})
        )
        return found

    monkeypatch.setattr(partition_checks, "_evaluations", interrupted)
    world.run("mask", "s1")
    assert world.problems_shown() == {"s2": "a pen mark"}


def test_a_result_covers_partitions_of_a_run_that_was_stopped(world):
    def stop(key: str) -> dict[Check, str | None]:
        if key == "s2":
            raise RuntimeError("out of memory")
        return {tidy: "a pen mark", sharp: None}

    world.results, results = stop, world.results
    assert not world.run("mask", "s1", "s2").success
    world.results = results
    assert world.run("mask", "s3").success
    assert world.problems_shown() == {"s1": "a pen mark"}


def test_a_check_without_any_product_has_no_result(world):
    def stop(key: str) -> dict[Check, str | None]:
        raise BadSlideError("cut short")

    world.results = stop
    assert not world.run("mask", "s1").success
    [record] = world.instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(MASK, "tidy"), limit=9
    )
    assert record.status.value == "PLANNED"


def test_a_result_covers_partitions_whose_children_run_too(world):
    world.problems = {"s2": "a pen mark"}
    assert world.run("mask child", "s1", "s2").success
    assert world.problems_shown() == {"s2": "a pen mark"}


def test_a_partition_that_was_reported_by_hand_is_not_taken_as_checked(world):
    world.run("mask", "s1")
    world.instance.report_runless_asset_event(dg.AssetMaterialization(MASK, partition="s2"))
    world.run("mask", "s3")
    assert list(world.problems_shown()) == ["s2"]
    assert "materialize this partition again" in world.problems_shown()["s2"]


def test_many_partitions_are_read_in_pages(world, monkeypatch):
    monkeypatch.setattr(partition_checks, "_PAGE", 2)
    world.problems = {"s1": "a pen mark", "s3": "a pen mark"}
    world.run("mask", "s1", "s3")
    assert list(world.problems_shown()) == ["s1", "s3"]


def failure(result: dg.ExecuteInProcessResult) -> str:
    [event] = result.get_step_failure_events()
    return event.step_failure_data.user_failure_data.description


def test_a_declared_check_without_a_result_is_an_error(world):
    world.results = lambda key: {tidy: None}
    result = world.run("mask", "s1")
    assert not result.success
    assert "declares checks without a result: sharp" in failure(result)
    assert not world.instance.get_materialized_partitions(MASK)


def test_a_result_of_an_undeclared_check_is_an_error(world):
    @Check
    def tidi(problem: str | None) -> str | None:
        """A misspelt name."""
        return problem

    world.results = lambda key: {tidy: None, sharp: None, tidi: "a pen mark"}
    result = world.run("mask", "s1")
    assert not result.success
    assert "results of checks that it does not declare: tidi" in failure(result)
    assert not world.instance.get_materialized_partitions(MASK)


def test_a_check_has_the_name_and_description_of_its_function():
    spec = tidy.spec("mask")
    assert (spec.name, spec.description) == ("tidy", "The slide has no pen marks.")
    assert tidy("a pen mark") == "a pen mark"

"""Retries after transient errors, immediate failure after others, and concurrent runs."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
from sqlalchemy.exc import OperationalError

from nic_assets.build import build_defs
from nic_assets.orchestration.batches import Events, Product, materialize_each
from nic_assets.orchestration.internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)
from nic_assets.orchestration.partition_checks import Check
from nic_assets.orchestration.retries import RETRIES, is_transient, retry_transient_errors
from nic_assets.tags import HOST_TAG, RUN_OUTPUT_TAG
from nic_core.cohort import CohortError, load_cohort
from nic_core.store import Store, StoreBusyError, StoreError, atomic_file

KEYS = ["s1", "s2", "s3"]
SLIDES = dg.StaticPartitionsDefinition(KEYS)


class BadSlideError(Exception):
    pass


def disk(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (disk(errno.EIO), True),
        (disk(errno.ESTALE), True),
        (disk(errno.ETIMEDOUT), True),
        (ConnectionRefusedError(), True),
        (OperationalError("select 1", None, Exception("database is locked")), True),
        (StoreBusyError("p", "another process is at it", "run again later"), True),
        (caused(StoreError("p", "stale", "check the disk"), disk(errno.ESTALE)), True),
        (caused(BadSlideError(), caused(ValueError(), disk(errno.EIO))), True),
        (disk(errno.ENOSPC), False),
        (disk(errno.EROFS), False),
        (caused(StoreError("p", "full", "make room"), disk(errno.ENOSPC)), False),
        (FileNotFoundError("gone"), False),
        (ValueError(), False),
    ],
)
def test_transient_errors_are_recognized(error, transient):
    assert is_transient(error) is transient


@Check
def tidy(problem: str | None) -> str | None:
    """The slide has no pen marks."""
    return problem


def run(
    work: Callable[[str], Product], instance: dg.DagsterInstance, place: Path | None = None
) -> dg.ExecuteInProcessResult:
    """Materialize all keys in one run, with two retries of the step."""

    @dg.asset(
        partitions_def=SLIDES,
        backfill_policy=dg.BackfillPolicy.single_run(),
        output_required=False,
        retry_policy=dg.RetryPolicy(max_retries=2),
        check_specs=[tidy.spec("mask")],
        code_version="1",
    )
    def mask(
        context: dg.AssetExecutionContext,
    ) -> Events:
        yield from materialize_each(
            context,
            work,
            parse=str,
            expected=(BadSlideError,),
            path=None if place is None else lambda key: place / key,
        )

    @dg.asset(
        deps=[mask],
        partitions_def=SLIDES,
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def grid(context: dg.AssetExecutionContext) -> None:
        pass

    return (
        dg.Definitions(assets=[mask, grid])
        .resolve_implicit_global_asset_job_def()
        .execute_in_process(
            instance=instance,
            tags={
                ASSET_PARTITION_RANGE_START_TAG: KEYS[0],
                ASSET_PARTITION_RANGE_END_TAG: KEYS[-1],
            },
            raise_on_error=False,
        )
    )


def version(instance: dg.DagsterInstance, key: str) -> str:
    [record] = instance.fetch_materializations(
        dg.AssetRecordsFilter(dg.AssetKey("mask"), asset_partitions=[key]), limit=1
    ).records
    return record.asset_materialization.tags["dagster/data_version"]


class Faulty:
    """Work that raises an error for the second key a number of times."""

    def __init__(self, error: Exception, times: int = 1) -> None:
        self.error, self.times = error, times
        self.done: list[str] = []

    def __call__(self, key: str) -> Product:
        if key == "s2" and self.times:
            self.times -= 1
            raise self.error
        self.done.append(key)
        return Product(f"v-{key}", checks={tidy: tidy("a pen" if key == "s1" else None)})


def test_a_retry_continues_with_the_partitions_that_are_left():
    instance = dg.DagsterInstance.ephemeral()
    work = Faulty(disk(errno.EIO), times=2)
    result = run(work, instance)
    assert result.success
    assert work.done == KEYS
    assert [version(instance, key) for key in KEYS] == ["v-s1", "v-s2", "v-s3"]
    assert instance.get_materialized_partitions(dg.AssetKey("grid")) == set(KEYS)
    # the check includes slides of an earlier attempt
    [evaluation] = result.get_asset_check_evaluations()
    assert evaluation.metadata["problems"].value == {"s1": "a pen"}


def test_a_failed_slide_is_retried_only_after_a_disk_error():
    flaky = Faulty(caused(BadSlideError("cut short"), disk(errno.EIO)))
    assert run(flaky, dg.DagsterInstance.ephemeral()).success
    assert flaky.done == ["s1", "s3", "s2"]
    bad = Faulty(BadSlideError("cut short"))
    assert not run(bad, dg.DagsterInstance.ephemeral()).success
    assert bad.done == ["s1", "s3"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("wrong code"), "s2: ValueError: wrong code"),
        (
            caused(StoreError("p", "full", "make room"), disk(28)),
            "s2: p: cannot be written (full); make room",
        ),
    ],
)
def test_a_permanent_error_fails_the_run_at_once_with_its_message(error, message):
    work = Faulty(error)
    result = run(work, dg.DagsterInstance.ephemeral())
    assert not result.success
    assert work.done == ["s1"]
    [failure] = result.get_step_failure_events()
    description = failure.step_failure_data.user_failure_data.description
    assert description == message
    # the stack of a mistake of the user is of no use; that of a fault is kept
    assert (failure.step_failure_data.error.cause is None) == isinstance(error, StoreError)
    assert [e for e in result.all_events if e.event_type_value == "STEP_UP_FOR_RETRY"] == []


def test_retries_are_limited():
    work = Faulty(disk(errno.EIO), times=9)
    assert not run(work, dg.DagsterInstance.ephemeral()).success
    assert work.times == 6


def test_no_secret_of_the_environment_is_in_the_event_log(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hush-hush")
    instance = dg.DagsterInstance.ephemeral()
    run(Faulty(disk(errno.EIO)), instance)
    [record] = instance.get_runs()
    assert HOST_TAG in record.tags
    assert "hush-hush" not in str(record) + str(instance.all_logs(record.run_id))


@pytest.mark.parametrize(
    ("error", "attempts"), [(disk(errno.EIO), 2), (CohortError("labels.csv: no such column"), 1)]
)
def test_an_unpartitioned_step_is_retried_after_transient_errors_only(error, attempts):
    begun = []

    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=2))
    def index() -> None:
        begun.append(1)
        with retry_transient_errors():
            if len(begun) == 1:
                raise error

    result = dg.materialize([index], raise_on_error=False)
    assert len(begun) == attempts
    assert result.success == (attempts == 2)
    for failure in result.get_step_failure_events():
        description = failure.step_failure_data.user_failure_data.description
        assert description == "labels.csv: no such column"


@pytest.mark.slow
def test_every_asset_has_the_retry_policy(tiny_cohort, tmp_path):
    graph = build_defs(load_cohort(tiny_cohort), Store(tmp_path)).resolve_asset_graph()
    policies = {
        key.to_user_string(): graph.get(key).assets_def.op.retry_policy
        for key in graph.materializable_asset_keys
    }
    assert policies == dict.fromkeys(policies, RETRIES)
    assert len(policies) > 10


class Slow:
    """Work that announces its start and waits for permission to go on."""

    def __init__(self, folder: Path, version: str) -> None:
        self.folder, self.version = folder, version
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.done: list[str] = []

    def __call__(self, key: str) -> Product:
        self.begun.set()
        assert self.go_on.wait(60)
        with atomic_file(self.folder / key) as path:
            path.write_text(self.version)
        self.done.append(key)
        return Product(self.version, checks={tidy: None})


@pytest.fixture
def shared(tmp_path: Path) -> dg.DagsterInstance:
    (tmp_path / "home").mkdir()
    return dg.DagsterInstance.local_temp(str(tmp_path / "home"))


def test_a_record_of_a_batch_output_does_not_hide_the_partitions_own():
    """A concurrent run records its output for all partitions before each partition's record."""
    instance = dg.DagsterInstance.ephemeral()
    output = dg.AssetMaterialization("mask", partition="s1", tags={RUN_OUTPUT_TAG: "true"})

    class Interrupted(Faulty):
        def __call__(self, key: str) -> Product:
            if key == "s2" and self.times:
                instance.report_runless_asset_event(output)
            return super().__call__(key)

    work = Interrupted(disk(errno.EIO))
    result = run(work, instance)
    assert result.success
    assert work.done == KEYS
    [evaluation] = result.get_asset_check_evaluations()
    assert evaluation.metadata["problems"].value == {"s1": "a pen"}


@pytest.mark.slow
def test_a_concurrent_run_waits_and_reuses_the_products(tmp_path, shared):
    first, second = Slow(tmp_path, "one"), Slow(tmp_path, "two")
    outcomes = {}
    threads = {
        work: threading.Thread(
            target=lambda work=work: outcomes.update({work: run(work, shared, tmp_path)})
        )
        for work in (first, second)
    }
    threads[first].start()
    assert first.begun.wait(60)
    threads[second].start()
    second.go_on.set()
    while shared.get_runs_count(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])) < 2:
        time.sleep(0.05)
    time.sleep(2)  # the database stores whole seconds: products from now on are newer than the run
    assert second.done == []
    first.go_on.set()
    for thread in threads.values():
        thread.join()
    assert all(outcome.success for outcome in outcomes.values())
    # each partition is made once: s1 by the first run, the others by the run that is faster
    assert sorted(first.done + second.done) == KEYS
    assert "s1" in first.done
    versions = {key: work.version for work in (first, second) for key in work.done}
    assert {key: (tmp_path / key).read_text() for key in KEYS} == versions
    for outcome in outcomes.values():
        made = [e.partition for e in outcome.asset_materializations_for_node("mask")]
        assert set(made) == set(KEYS)


@pytest.mark.slow
def test_a_later_run_materializes_its_partitions_again(tmp_path, shared):
    first, second = Slow(tmp_path, "one"), Slow(tmp_path, "two")
    for work in (first, second):
        work.go_on.set()
        outcome = run(work, shared, tmp_path)
        assert outcome.success, outcome.all_events
        assert work.done == KEYS

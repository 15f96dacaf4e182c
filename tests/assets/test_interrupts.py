"""Ctrl-C and SIGTERM end a step, a run and a refresh; what was recorded is kept."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from nic_assets.orchestration.batches import Events, Product, batch_asset, materialize_each
from nic_assets.orchestration.retries import (
    EXIT_WHEN_INTERRUPTED,
    ends_when_interrupted,
    retried_asset,
    was_interrupted,
)

PROJECT = Path(__file__).parents[2]

# three partitions, of which the second takes ten minutes
PROGRAM = """
import signal, sys, time
import dagster as dg
from rich.console import Console
from nic_assets.operations.refresh import refresh
from nic_assets.orchestration.batches import Product, batch_asset, materialize_each

def make(key):
    print("begun", key, file=sys.stderr, flush=True)
    if key == "s2":
        time.sleep(600)
    return Product("v")

@batch_asset(partitions_def=dg.StaticPartitionsDefinition(["s1", "s2", "s3"]), code_version="1")
def mask(context: dg.AssetExecutionContext):
    yield from materialize_each(context, make, parse=str, expected=())

defs = dg.Definitions([mask], executor=dg.multiprocess_executor)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with dg.DagsterInstance.get() as instance:
        try:
            refresh(defs, instance, Console(stderr=True))
        except KeyboardInterrupt:
            sys.exit(130)
"""
MATERIALIZE = ("-m", "dagster", "asset", "materialize", "--select", "mask", "-f")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "dagster.yaml").write_text("telemetry: {enabled: false}")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("group", [True, False], ids=["group", "process"])
@pytest.mark.parametrize("command", ["refresh", "materialize"])
def test_one_signal_ends_a_run_and_keeps_what_is_recorded(home, tmp_path, command, number, group):
    """A terminal sends Ctrl-C to the group, systemd SIGTERM to all, a person to one process."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    arguments = [str(program)]
    if command == "materialize":
        arguments = [*MATERIALIZE, str(program), "--partition-range", "s1...s3"]
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        start_new_session=True,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "begun s2" in line:
            break
    (os.killpg if group else os.kill)(process.pid, number)
    lines += process.communicate()[1].splitlines(keepends=True)
    output = "".join(lines)
    assert process.returncode == (130 if command == "refresh" else 1), output
    assert output.count("begun s2") == 1
    assert "begun s3" not in output
    with dg.DagsterInstance.get() as instance:
        [run] = instance.get_runs()
        assert run.is_finished
        assert not run.is_success
        assert instance.get_materialized_partitions(dg.AssetKey("mask")) == {"s1"}
        kinds = [entry.dagster_event_type for entry in instance.all_logs(run.run_id)]
        assert dg.DagsterEventType.STEP_UP_FOR_RETRY not in kinds


@pytest.mark.parametrize("kind", [KeyboardInterrupt, dg.DagsterExecutionInterruptedError])
def test_an_interrupted_step_is_not_retried(kind):
    begun = []

    @retried_asset()
    def index() -> Events:
        begun.append(1)
        raise kind
        yield

    job = dg.Definitions([index]).resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(raise_on_error=False)
    assert not result.success
    assert begun == [1]
    assert was_interrupted(result.all_events)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, dg.DagsterExecutionInterruptedError])
def test_a_step_whose_executor_judges_signals_exits_without_a_record(monkeypatch, kind):
    class Exited(Exception):
        pass

    def leave(status: int):
        raise Exited(status)

    @ends_when_interrupted
    def body():
        raise kind
        yield

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setenv(EXIT_WHEN_INTERRUPTED, "1")
    with pytest.raises(Exited, match="143"):
        list(body())
    monkeypatch.delenv(EXIT_WHEN_INTERRUPTED)
    with pytest.raises(dg.Failure, match="interrupted"):
        list(body())


def test_other_failures_are_not_interruptions():
    @retried_asset()
    def index() -> Events:
        raise dg.Failure("no such column", allow_retries=False)
        yield

    job = dg.Definitions([index]).resolve_implicit_global_asset_job_def()
    assert not was_interrupted(job.execute_in_process(raise_on_error=False).all_events)


def test_an_interruption_of_a_partition_ends_the_batch():
    made = []

    def make(key: str) -> Product:
        if key == "s2":
            raise dg.DagsterExecutionInterruptedError
        made.append(key)
        return Product("v")

    @batch_asset(partitions_def=dg.StaticPartitionsDefinition(["s1", "s2", "s3"]))
    def mask(context: dg.AssetExecutionContext) -> Events:
        yield from materialize_each(context, make, parse=str, expected=(ValueError,))

    instance = dg.DagsterInstance.ephemeral()
    job = dg.Definitions([mask]).resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(
        instance=instance,
        tags={
            "dagster/asset_partition_range_start": "s1",
            "dagster/asset_partition_range_end": "s3",
        },
        raise_on_error=False,
    )
    assert made == ["s1"]
    assert instance.get_materialized_partitions(dg.AssetKey("mask")) == {"s1"}
    assert was_interrupted(result.all_events)

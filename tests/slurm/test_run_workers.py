"""The launcher of run workers: the state of a worker, and which process it interrupts."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from nic_assets.orchestration.internals import WorkerStatus
from nic_assets.orchestration.run_workers import ResumableRunLauncher
from nic_assets.tags import WORKER_TAG


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def launcher(instance: dg.DagsterInstance, tmp_path: Path) -> ResumableRunLauncher:
    launcher = ResumableRunLauncher(str(tmp_path))
    launcher.register_instance(instance)
    return launcher


@dg.job
def nothing() -> None:
    pass


def started(instance: dg.DagsterInstance, worker: dict[str, object] | None) -> dg.DagsterRun:
    tags = {} if worker is None else {WORKER_TAG: json.dumps(worker)}
    return instance.create_run_for_job(nothing, tags=tags, status=dg.DagsterRunStatus.STARTED)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is no run worker."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("host", "status"),
    [(socket.gethostname(), WorkerStatus.FAILED), ("another", WorkerStatus.RUNNING)],
)
def test_a_process_of_another_program_is_no_worker(instance, launcher, sleeper, host, status):
    run = started(instance, {"host": host, "pid": sleeper.pid})
    assert launcher.check_run_worker_health(run).status is status
    assert not launcher.terminate(run.run_id)
    assert sleeper.poll() is None
    assert instance.get_run_by_id(run.run_id).status is dg.DagsterRunStatus.CANCELING
    messages = [entry.message for entry in instance.all_logs(run.run_id)]
    assert f"Not interrupted: the worker of the run is on {host}, or has ended" in messages


def test_a_run_without_a_worker_is_not_interrupted(instance, launcher):
    run = started(instance, None)
    assert launcher.check_run_worker_health(run).status is WorkerStatus.NOT_FOUND
    assert not launcher.terminate(run.run_id)


def test_a_worker_is_interrupted(instance, launcher):
    run = started(instance, None)
    code = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)  # it may be ignored in the background\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, run.run_id]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout is not None
        assert p.stdout.readline() == "ready\n"
        instance.add_run_tags(
            run.run_id, {WORKER_TAG: json.dumps({"host": socket.gethostname(), "pid": p.pid})}
        )
        worker = instance.get_run_by_id(run.run_id)
        assert launcher.check_run_worker_health(worker).status is WorkerStatus.RUNNING
        assert launcher.terminate(run.run_id)
        assert p.wait(60) == -signal.SIGINT
    assert launcher.check_run_worker_health(worker).status is WorkerStatus.FAILED

"""Steps on Celery workers that are started by the example's Procfile."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.reconstruct import ReconstructableRepository

from nic_assets.build import build_defs
from nic_assets.orchestration.internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)
from nic_core import steps
from nic_core.cohort import load_cohort
from nic_core.grids import open_grid
from nic_core.store import GridKey, Store

ROOT = Path(__file__).parents[2]
PROCFILE = ROOT / "examples" / "celery" / "Procfile"
SLIDES = ("demo-01-1", "demo-03-1")


@pytest.fixture
def broker() -> Iterator[str]:
    """The URL of a Redis server that runs during the test."""
    pytest.importorskip("dagster_celery", reason="the extra 'celery' is not installed")
    redis = pytest.importorskip("redis", reason="the extra 'celery' is not installed")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
    )
    try:
        client = redis.Redis(port=port)
        while server.poll() is None:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.05)
        assert server.poll() is None, "redis-server did not start"
        yield f"redis://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def environment(broker: str, executor_environment: Callable[..., dict[str, str]]) -> dict[str, str]:
    """The environment variables of runs and workers."""
    return executor_environment(
        "celery", NIC_CELERY_BROKER=f"{broker}/0", NIC_CELERY_BACKEND=f"{broker}/1"
    )


@pytest.fixture
def workers(environment: dict[str, str], tmp_path: Path) -> Iterator[None]:
    """Start the workers of the example's Procfile."""
    started = []
    # create Dagster's tables before several processes would create them at once
    dg.DagsterInstance.get().get_runs_count()
    try:
        for line in PROCFILE.read_text().splitlines():
            name, _, command = line.partition(": ")
            if name.startswith("#"):
                continue
            log = tmp_path / f"{name}.log"
            with log.open("w") as output:
                worker = subprocess.Popen(
                    shlex.split(command),
                    cwd=ROOT,
                    env=environment,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            started.append((worker, log))
        for worker, log in started:
            while " ready." not in log.read_text():
                assert worker.poll() is None, log.read_text()
                time.sleep(0.1)
        yield
    finally:
        for worker, _ in started:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


def materialize(instance: dg.DagsterInstance, assets: Sequence[str], first: str, last: str) -> None:
    """Start a run of a range of partitions as Dagster's daemon does."""
    definitions = ReconstructableRepository.for_module("nic_assets.definitions", "defs")
    with dg.execute_job(
        definitions.get_reconstructable_job("__ASSET_JOB"),
        instance,
        asset_selection=[dg.AssetKey(name) for name in assets],
        tags={ASSET_PARTITION_RANGE_START_TAG: first, ASSET_PARTITION_RANGE_END_TAG: last},
    ) as result:
        assert result.success


def ran_on(instance: dg.DagsterInstance) -> dict[str, str]:
    """Return the worker of every step, from the event log."""
    events = (
        entry.dagster_event
        for run in instance.get_runs()
        for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
    )
    return {
        event.step_key: event.engine_event_data.metadata["Celery worker"].value.partition("@")[0]
        for event in events
        if event is not None and "Celery worker" in event.engine_event_data.metadata
    }


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_steps_run_on_the_worker_of_their_device(tiny_cohort, tmp_path):
    cohort, store = load_cohort(tiny_cohort), Store(tmp_path / "store")
    instance = dg.DagsterInstance.get()
    job = build_defs(cohort, store).resolve_implicit_global_asset_job_def()
    job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey("slide_index")])
    steps.make_encoder(cohort, store, "mean-rgb")
    first, last = SLIDES

    materialize(instance, ["slide"], first, last)
    materialize(instance, ["patch_table"], f"128px-0.5um|{first}", f"128px-0.5um|{last}")
    materialize(instance, ["grid"], f"mean-rgb|{first}", f"mean-rgb|{last}")

    assert ran_on(instance) == {"slide": "cpu", "patch_table": "cpu", "grid": "gpu"}
    made = sorted(path.stem for path in (tmp_path / "store/grids/mean-rgb").iterdir())
    assert (made[0], made[-1]) == SLIDES
    assert all(
        open_grid(store.grid(GridKey(encoder="mean-rgb", slide=slide))).valid.any()
        for slide in made
    )

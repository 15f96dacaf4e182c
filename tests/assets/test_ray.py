"""Steps as jobs of a Ray cluster of one machine, which the test starts with `ray start`."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
import pytest
from dagster._core.definitions.reconstruct import ReconstructableRepository

from nic_assets.build import build_defs
from nic_core import steps
from nic_core.cohort import load_cohort
from nic_core.grids import open_grid
from nic_core.store import GridKey, Store
from tests.ports import free_ports

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

ROOT = Path(__file__).parents[2]
SLIDE = "demo-01-1"
# options of `ray start` whose default is the same port for every cluster
AGENT_PORTS = (
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "ray-client-server-port",
    "runtime-env-agent-port",
)


@pytest.fixture
def environment(executor_environment: Callable[..., dict[str, str]]) -> dict[str, str]:
    """The environment variables of the cluster and of the runs; Ray is not asked for yet."""
    pytest.importorskip("dagster_ray", reason="the extra 'ray' is not installed")
    pytest.importorskip("ray.job_submission", reason="the extra 'ray' is not installed")
    return executor_environment("ray", RAY_USAGE_STATS_ENABLED="0")


@pytest.fixture
def job_server(
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """The address of Ray's job server; the cluster has two logical CPUs and one logical GPU."""
    # sockets are in this folder, and their paths may have 107 bytes
    folder = Path(f"/tmp/ray-{os.getpid()}")
    port, dashboard, *others = free_ports(7)
    log = tmp_path_factory.mktemp("ray") / "head.log"
    command = [
        *("ray", "start", "--head", "--block", "--num-cpus=2", "--num-gpus=1"),
        *(f"--port={port}", f"--dashboard-port={dashboard}"),
        *("--include-dashboard=true", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"),
        *map("--{}={}".format, AGENT_PORTS, others),
    ]
    with log.open("w") as output:
        head = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    address = f"http://127.0.0.1:{dashboard}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    try:
        wait_for_job_server(address, head, log)
        yield address
    finally:
        head.terminate()  # with --block it ends the cluster's processes first
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_job_server(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    from ray.job_submission import JobSubmissionClient

    for _ in range(600):
        assert head.poll() is None, log.read_text()
        try:
            JobSubmissionClient(address).list_jobs()
            return
        except (ConnectionError, RuntimeError):  # the job server starts after its port is open
            time.sleep(0.2)
    raise AssertionError(f"Ray's job server did not start: {log.read_text()}")


def materialize(instance: dg.DagsterInstance, asset: str, partition: str) -> None:
    """Start a run of one partition as Dagster's daemon does."""
    definitions = ReconstructableRepository.for_module("nic_assets.definitions", "defs")
    with dg.execute_job(
        definitions.get_reconstructable_job("__ASSET_JOB"),
        instance,
        asset_selection=[dg.AssetKey(asset)],
        tags={"dagster/partition": partition},
    ) as result:
        assert result.success


def finished_jobs(address: str) -> list[JobDetails]:
    """Return all jobs; a job ends a moment after Dagster has recorded the end of its step."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)
    for _ in range(300):
        jobs = client.list_jobs()
        if all(job.status.is_terminal() for job in jobs):
            return jobs
        time.sleep(0.1)
    raise AssertionError(f"still running: {jobs}")


def reserved(address: str) -> dict[str, dict[str, float]]:
    """Return the resources that each job reserved, by its submission id."""
    from ray.util.state import list_actors

    prefix = "_ray_internal_job_actor_"
    return {
        actor.name.removeprefix(prefix): actor.required_resources
        for actor in list_actors(address, detail=True)
        if actor.name.startswith(prefix)
    }


@pytest.mark.integration
@pytest.mark.slow
def test_steps_run_as_ray_jobs_with_their_devices(job_server, tiny_cohort, tmp_path):
    from ray.job_submission import JobStatus

    cohort, store = load_cohort(tiny_cohort), Store(tmp_path / "store")
    with dg.DagsterInstance.get() as instance:
        definitions = build_defs(cohort, store).resolve_implicit_global_asset_job_def()
        definitions.execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey("slide_index")]
        )
        steps.make_encoder(cohort, store, "mean-rgb")
        steps.make_slide(store, SLIDE)
        materialize(instance, "patch_table", f"128px-0.5um|{SLIDE}")
        materialize(instance, "grid", f"mean-rgb|{SLIDE}")

    jobs = finished_jobs(job_server)
    assert sorted((job.metadata["dagster/op"], job.status) for job in jobs) == [
        ("grid", JobStatus.SUCCEEDED),
        ("patch_table", JobStatus.SUCCEEDED),
    ]
    by_step = {job.metadata["dagster/op"]: job for job in jobs}
    resources = reserved(job_server)
    assert "GPU" not in resources[by_step["patch_table"].submission_id]
    assert resources[by_step["grid"].submission_id]["GPU"] == 1
    assert open_grid(store.grid(GridKey(encoder="mean-rgb", slide=SLIDE))).valid.any()

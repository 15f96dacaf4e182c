"""Steps on a Slurm of two nodes that this file starts: where they run, and how they survive."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.definitions.reconstruct import ReconstructableJob, ReconstructableRepository
from dagster._core.launcher.base import LaunchRunContext, WorkerStatus
from dagster._daemon.monitoring.run_monitoring import monitor_started_run

from nic_assets.build import build_defs
from nic_assets.orchestration.internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)
from nic_assets.orchestration.slurm.executor import job_name
from nic_assets.tags import WORKER_TAG
from nic_core import steps
from nic_core.cohort import load_cohort
from nic_core.grids import open_grid
from nic_core.store import GridKey, Store
from tests.slurm.cluster import Cluster, running_cluster
from tests.slurm.waiting import FOLDER_VARIABLE

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SETTINGS = """\
gpu: {partition: gpu, memory: 100M, time: "10"}
cpu: {partition: cpu, cpus: 2}
poll_seconds: 1
"""
SLIDES = ("demo-01-1", "demo-03-1")
LONGEST_WAIT = 600  # s; a busy machine takes a tenth of it


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


@pytest.fixture
def instance(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dg.DagsterInstance]:
    """An instance with the run launcher of the example, and the environment of its processes."""
    home = tmp_path / "home"
    home.mkdir()
    configuration = yaml.safe_load((ROOT / "dagster.yaml").read_text())
    example = yaml.safe_load((ROOT / "examples" / "slurm" / "dagster.yaml").read_text())
    for part in ("run_launcher", "run_monitoring"):
        configuration[part] = example[part]
    (home / "dagster.yaml").write_text(yaml.safe_dump(configuration))
    (home / "slurm.yaml").write_text(SETTINGS)
    for name, value in {
        "SLURM_CONF": cluster.environment["SLURM_CONF"],
        "NIC_EXECUTOR": "slurm",
        "NIC_SLURM": str(home / "slurm.yaml"),
        "NIC_STORE": str(tmp_path / "store"),
        "NIC_DAGSTER_STORAGE": str(tmp_path / "store" / "dagster"),
        "DAGSTER_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        FOLDER_VARIABLE: str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    for module in ("nic_assets.definitions", "tests.slurm.waiting"):
        # the loaded definitions belong to another environment
        monkeypatch.delitem(sys.modules, module, raising=False)
    with dg.DagsterInstance.get() as instance:
        yield instance


def wait_for(what: str, condition: Callable[[], object], run: Callable[[], str]) -> None:
    """Wait until a condition holds; fail with the run's log if it never does."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() > begun + LONGEST_WAIT:
            pytest.fail(f"no {what}; {run()}")
        time.sleep(0.1)


class Run:
    """A run of the waiting step, whose worker the instance's launcher starts."""

    def __init__(self, instance: dg.DagsterInstance, cluster: Cluster, folder: Path) -> None:
        self.instance, self.cluster, self.folder = instance, cluster, folder
        repository = ReconstructableRepository.for_module("tests.slurm.waiting", "defs")
        job: ReconstructableJob = repository.get_reconstructable_job("__ASSET_JOB")
        run = instance.create_run_for_job(
            job.get_definition(), job_code_origin=job.get_python_origin()
        )
        self.id = run.run_id
        instance.run_launcher.launch_run(LaunchRunContext(run, None))

    @property
    def run(self) -> dg.DagsterRun:
        found = self.instance.get_run_by_id(self.id)
        assert found is not None
        return found

    def log(self) -> str:
        return "\n".join(entry.message for entry in self.instance.all_logs(self.id))

    def errors(self) -> str:
        """Return the errors of failed and repeated attempts of the step."""
        return "\n".join(
            entry.dagster_event.event_specific_data.error.message
            for entry in self.instance.all_logs(
                self.id,
                of_type={dg.DagsterEventType.STEP_FAILURE, dg.DagsterEventType.STEP_UP_FOR_RETRY},
            )
        )

    def wait(self, what: str, condition: Callable[[], object]) -> None:
        wait_for(what, condition, self.log)

    def jobs(self) -> list[str]:
        """Return node and state of the job of each attempt."""
        return self.cluster.states(job_name(self.id, "waiting"))

    def started(self) -> list[str]:
        """Return the ids of the jobs whose step has begun."""
        names = (path.name for path in self.folder.glob("started-*"))
        return sorted((name.removeprefix("started-") for name in names), key=int)

    def worker_status(self) -> WorkerStatus:
        return self.instance.run_launcher.check_run_worker_health(self.run).status


def test_steps_run_on_the_node_of_their_device(instance, tiny_cohort, tmp_path, monkeypatch):
    monkeypatch.setenv("NIC_COHORT", str(tiny_cohort))
    cohort, store = load_cohort(tiny_cohort), Store(tmp_path / "store")
    job = build_defs(cohort, store).resolve_implicit_global_asset_job_def()
    job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey("slide_index")])
    steps.make_encoder(cohort, store, "mean-rgb")
    first, last = SLIDES
    definitions = ReconstructableRepository.for_module("nic_assets.definitions", "defs")

    for assets, start, end in (
        (["slide"], first, last),
        (["patch_table"], f"128px-0.5um|{first}", f"128px-0.5um|{last}"),
        (["grid"], f"mean-rgb|{first}", f"mean-rgb|{last}"),
    ):
        with dg.execute_job(
            definitions.get_reconstructable_job("__ASSET_JOB"),
            instance,
            asset_selection=[dg.AssetKey(name) for name in assets],
            tags={ASSET_PARTITION_RANGE_START_TAG: start, ASSET_PARTITION_RANGE_END_TAG: end},
        ) as result:
            assert result.success, [event.message for event in result.all_events]

    pages = {}
    for run in instance.get_runs():
        for entry in instance.all_logs(run.run_id):
            data = getattr(entry.dagster_event, "event_specific_data", None)
            if entry.step_key and "Slurm job" in (getattr(data, "metadata", None) or {}):
                page = pages.setdefault(entry.step_key, {})
                page |= {name: str(value.value) for name, value in data.metadata.items()}
    assert {step: page["node"] for step, page in pages.items()} == {
        "slide": "cpu1",
        "patch_table": "cpu1",
        "grid": "gpu1",
    }
    for step, page in pages.items():
        text = Path(page["log"]).read_text()
        assert text.startswith(f"job {page['Slurm job']} on {page['node']}"), step
    assert "CUDA_VISIBLE_DEVICES=0" in Path(pages["grid"]["log"]).read_text()
    grids = [store.grid(GridKey(encoder="mean-rgb", slide=slide)) for slide in SLIDES]
    assert all(open_grid(grid).valid.any() for grid in grids)


def test_a_new_run_worker_finds_the_job_and_can_cancel_it(instance, cluster, tmp_path):
    run = Run(instance, cluster, tmp_path)
    run.wait("step", run.started)

    os.kill(json.loads(run.run.tags[WORKER_TAG])["pid"], signal.SIGKILL)
    run.wait("dead worker", lambda: run.worker_status() is WorkerStatus.FAILED)
    assert run.jobs() == ["gpu1 RUNNING"]

    [record] = instance.get_run_records(dg.RunsFilter(run_ids=[run.id]))
    monitor_started_run(instance, None, record, logging.getLogger())  # as the daemon does
    run.wait("resumed run", lambda: "Checking on status of in-progress step waiting" in run.log())
    assert run.worker_status() is WorkerStatus.RUNNING
    time.sleep(2)  # two checks of the step
    assert run.jobs() == ["gpu1 RUNNING"]

    assert instance.run_launcher.terminate(run.id)
    run.wait("cancelled run", lambda: run.run.status is dg.DagsterRunStatus.CANCELED)
    run.wait("end of the job", lambda: run.jobs() == ["gpu1 CANCELLED"])


def test_a_preempted_step_and_one_of_a_lost_node_are_retried(instance, cluster, tmp_path):
    run = Run(instance, cluster, tmp_path)
    run.wait("first attempt", lambda: len(run.started()) == 1)

    urgent = cluster.run(
        "sbatch", "--parsable", "-p", "urgent", "--gres=gpu:1", "-o/dev/null", "--wrap=sleep 100"
    )
    run.wait("retry", lambda: "was pre-empted" in run.errors())
    cluster.run("scancel", urgent)
    run.wait("second attempt", lambda: len(run.started()) == 2)

    cluster.lose_node("gpu1", run.started()[-1])
    run.wait("retry", lambda: "its node failed" in run.errors())
    cluster.start_node("gpu1")
    run.wait("third attempt", lambda: len(run.started()) == 3)

    (tmp_path / "go").touch()
    run.wait("success", lambda: run.run.status is dg.DagsterRunStatus.SUCCESS)
    ends = ["gpu1 PREEMPTED", "gpu1 NODE_FAIL", "gpu1 COMPLETED"]
    run.wait("end of the job", lambda: run.jobs() == ends)
    [record] = instance.fetch_materializations(dg.AssetKey("waiting"), limit=9).records
    assert record.asset_materialization.metadata["gpus"].value == "0"


def test_a_job_that_a_person_cancels_fails_its_step_at_once(instance, cluster, tmp_path):
    run = Run(instance, cluster, tmp_path)
    run.wait("job", run.jobs)
    cluster.run("scancel", f"--name={job_name(run.id, 'waiting')}")
    run.wait("failed run", lambda: run.run.status is dg.DagsterRunStatus.FAILURE)
    assert "was cancelled in Slurm" in run.errors()
    assert len(run.jobs()) == 1

"""``nic doctor`` on what it is for: each fault made for real, found, explained and mended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.storage.dagster_run import DagsterRun
from dagster._core.utils import make_new_run_id
from dagster._daemon.types import DaemonHeartbeat
from typer.testing import CliRunner

from nic_assets.cli import app
from nic_assets.operations.doctor import Finding, examine, release
from nic_assets.tags import HOST_TAG
from nic_core.store import GridKey, Store

HOME = """
telemetry: {enabled: false}
concurrency: {pools: {granularity: op, default_limit: 1}}
run_monitoring: {enabled: true}
"""
# a run that holds a slot and says nothing more
HELD = """
import sys, time
import dagster as dg

@dg.asset(pool="gpu")
def training():
    print("training", flush=True)
    time.sleep(600)

with dg.DagsterInstance.get() as instance:
    dg.materialize([training], instance=instance, run_config={"loggers": {"console": {"config":
        {"log_level": "ERROR"}}}})
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A Dagster home of one's own."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "dagster.yaml").write_text(HOME)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # there is no .env here
    return tmp_path / "home"


@pytest.fixture
def instance(home):
    with dg.DagsterInstance.get() as instance:
        yield instance


@pytest.fixture
def store(tmp_path):
    (tmp_path / "store").mkdir()
    return Store(tmp_path / "store")


@pytest.fixture
def training(instance):
    """Another process in the middle of a run."""
    process = subprocess.Popen([sys.executable, "-c", HELD], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "training\n"
    yield process
    process.kill()
    process.wait()


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def names(findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings]


def mend(findings: list[Finding]) -> None:
    for finding in findings:
        finding.mend()


def test_nothing_is_wrong_where_nothing_happened(instance, store):
    assert examine(instance, store) == []


def test_a_run_at_work_and_its_slot_are_left_alone(instance, store, training):
    assert examine(instance, store) == []
    assert release(instance) == []
    [run] = instance.get_runs()
    assert run.status is dg.DagsterRunStatus.STARTED
    assert instance.event_log_storage.get_concurrency_info("gpu").claimed_slots


def test_a_run_whose_process_was_killed_is_ended_and_its_slot_given_back(instance, store, training):
    kill(training)
    [found] = examine(instance, store)
    assert found.what == "lost run"
    assert "its process is gone" in found.meaning
    assert ", STARTED" in found.where
    mend([found])
    [run] = instance.get_runs()
    assert run.status is dg.DagsterRunStatus.FAILURE
    assert not instance.event_log_storage.get_concurrency_info("gpu").claimed_slots
    assert examine(instance, store) == []


def test_a_killed_run_of_another_machine_is_told_and_left_alone(instance, store, training):
    [run] = instance.get_runs()
    instance.add_run_tags(run.run_id, {HOST_TAG: "elsewhere"})
    kill(training)
    [found] = examine(instance, store)
    assert found.mend is None
    assert "on the machine that ran it" in found.remedy
    assert release(instance) == []


def test_a_number_that_another_process_got_is_not_the_run(instance, store, training, monkeypatch):
    kill(training)
    monkeypatch.setattr("nic_assets.operations.doctor.os.kill", lambda pid, number: None)
    monkeypatch.setattr("nic_assets.operations.doctor._started", lambda pid: time.time() + 3600)
    assert names(examine(instance, store)) == ["lost run"]


def add_run(instance: dg.DagsterInstance, status: dg.DagsterRunStatus) -> str:
    run = DagsterRun(job_name="train", run_id=make_new_run_id(), status=status)
    instance.add_run(run)
    return run.run_id


def test_a_slot_of_a_run_that_has_ended_is_given_back(instance, store):
    storage = instance.event_log_storage
    storage.set_concurrency_slots("gpu", 1)
    run = add_run(instance, dg.DagsterRunStatus.FAILURE)
    assert storage.claim_concurrency_slot("gpu", run, "encoder").is_claimed
    [found] = examine(instance, store)
    assert found.what == "pool slot held by a run that has ended"
    assert f"step encoder of run {run[:8]}, FAILURE" in found.where
    mend([found])
    assert examine(instance, store) == []


def test_a_run_that_never_came_up_is_lost_after_a_while(instance, store, monkeypatch):
    add_run(instance, dg.DagsterRunStatus.STARTING)
    assert examine(instance, store) == []
    monkeypatch.setattr("nic_assets.operations.doctor.SILENT", -1)
    [found] = examine(instance, store)
    assert "no process of it is known" in found.meaning


def test_half_made_files_are_removed_and_those_of_a_writer_are_not(instance, store):
    grids = store.grid(GridKey(encoder="mtl", slide="s1")).parent
    (grids / ".new.s1.zarr").mkdir(parents=True)
    (grids / ".lock.s1.zarr").touch()
    [found] = examine(instance, store)
    assert found.what == "half-made files"
    assert "grids/mtl/.new.s1.zarr" in found.where
    mend([found])
    assert list(grids.iterdir()) == []
    assert examine(instance, store) == []


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked up in /proc")
def test_of_two_daemons_on_one_home_the_newest_stays(home, instance, store, tmp_path):
    def start(home: Path, *, stubborn: bool = False) -> subprocess.Popen:
        ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" if stubborn else ""
        program = f"import time; {ignore} print('up', flush=True); time.sleep(600)"
        process = subprocess.Popen(
            [sys.executable, "-c", program, "dagster._daemon", "run"],
            env=os.environ | {"DAGSTER_HOME": str(home)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "up\n"
        return process

    other, first, second = start(tmp_path), start(home), start(home)
    try:
        [found] = examine(instance, store)
        assert found.what == "two daemons on one home"
        assert str(other.pid) not in found.where
        mend([found])
        assert first.wait(30) == -signal.SIGTERM
        assert second.poll() is None
        assert examine(instance, store) == []
    finally:
        for process in (other, first, second):
            kill(process)


def test_daemons_that_speak_in_turns_are_two(instance, store):
    for kind, daemon in (("SENSOR", "one"), ("SCHEDULER", "other")):
        instance.add_daemon_heartbeat(DaemonHeartbeat(time.time(), kind, daemon))
    [found] = examine(instance, store)
    assert found.what == "two daemons on one home"
    assert found.mend is None


def test_queued_runs_without_a_daemon_are_told(instance, store, monkeypatch):
    monkeypatch.setattr(instance, "get_runs_count", lambda wanted: 3)
    assert names(examine(instance, store)) == ["no daemon"]


def test_a_pool_without_limit_gets_one_and_missing_monitoring_is_told(home, store):
    (home / "dagster.yaml").write_text(
        "telemetry: {enabled: false}\nrun_monitoring: {enabled: false}"
    )
    with dg.DagsterInstance.get() as instance:
        pool, monitoring = examine(instance, store)
        assert pool.what == "pool without a limit"
        assert monitoring.what == "runs are not monitored"
        mend([pool])
        assert names(examine(instance, store)) == ["runs are not monitored"]


def doctor(*arguments: str, **variables: str):
    return CliRunner().invoke(app, ["doctor", *arguments], env=variables | {"COLUMNS": "200"})


def test_the_command_explains_mends_on_request_and_tells_by_its_status(
    instance, store, tiny_cohort, monkeypatch
):
    monkeypatch.delitem(sys.modules, "nic_assets.definitions", raising=False)
    variables = {"NIC_COHORT": str(tiny_cohort), "NIC_STORE": str(store.root)}
    lock = store.root / "reports" / ".lock.x"
    lock.parent.mkdir()
    lock.touch()
    found = doctor(**variables)
    assert found.exit_code == 1
    assert "half-made files" in found.output
    assert "nic doctor --mend" in found.output
    assert lock.exists()
    mended = doctor("--mend", **variables)
    assert mended.exit_code == 0, mended.output
    assert not lock.exists()
    assert doctor(**variables).output.strip() == "nothing is wrong"


def test_no_home_and_no_cohort_are_told(home, store, tmp_path, monkeypatch):
    nowhere = doctor(DAGSTER_HOME=str(tmp_path))
    assert nowhere.exit_code == 1
    assert "no Dagster home" in nowhere.output
    monkeypatch.delitem(sys.modules, "nic_assets.definitions", raising=False)
    without = doctor(NIC_COHORT=str(tmp_path / "none.yaml"), NIC_STORE=str(store.root))
    assert without.exit_code == 1
    assert "none.yaml" in without.output

"""``nic doctor``: each problem is caused for real, found, explained and fixed."""

import os
import re
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import dagster as dg
import pytest
import typer
from dagster._daemon.types import DaemonHeartbeat
from typer.testing import CliRunner

from nic_assets.cli import register
from nic_assets.operations.doctor import Finding, end_dead_runs, examine, slot_holders
from nic_assets.operations.port import port_problem
from nic_assets.tags import HOST_TAG
from nic_core.store import GridKey, Store

HOME = """
telemetry: {enabled: false}
concurrency: {pools: {granularity: op, default_limit: 1}}
run_monitoring: {enabled: true}
"""
# a run that holds a slot and records no further event
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
    """An empty Dagster home."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "dagster.yaml").write_text(HOME)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # a folder without .env
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
    """Another process that executes a step."""
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


def fix(findings: list[Finding]) -> None:
    for finding in findings:
        assert finding.fix is not None
        finding.fix()


def test_a_new_instance_and_store_have_no_problem(instance, store):
    assert examine(instance, store) == []


@pytest.mark.integration
def test_a_live_run_and_its_slot_are_not_changed(instance, store, training):
    assert examine(instance, store) == []
    assert end_dead_runs(instance) == []
    [run] = instance.get_runs()
    assert run.status is dg.DagsterRunStatus.STARTED
    assert instance.event_log_storage.get_concurrency_info("gpu").claimed_slots


@pytest.mark.integration
def test_a_killed_run_is_marked_as_failed_and_its_slot_freed(instance, store, training):
    kill(training)
    [found] = examine(instance, store)
    assert found.what == "dead run"
    assert "its process has ended" in found.meaning
    assert ", STARTED" in found.where
    fix([found])
    [run] = instance.get_runs()
    assert run.status is dg.DagsterRunStatus.FAILURE
    assert not instance.event_log_storage.get_concurrency_info("gpu").claimed_slots
    assert examine(instance, store) == []


@pytest.mark.integration
def test_a_killed_run_of_another_machine_is_reported_only(instance, store, training):
    [run] = instance.get_runs()
    instance.add_run_tags(run.run_id, {HOST_TAG: "elsewhere"})
    kill(training)
    [found] = examine(instance, store)
    assert found.fix is None
    assert "on the machine of the run" in found.remedy
    assert end_dead_runs(instance) == []


@pytest.mark.integration
def test_a_younger_process_with_the_same_id_is_not_the_run(instance, store, training, monkeypatch):
    kill(training)
    monkeypatch.setattr("nic_assets.operations.doctor.os.kill", lambda pid, number: None)
    monkeypatch.setattr("nic_assets.operations.doctor._started", lambda pid: time.time() + 3600)
    assert names(examine(instance, store)) == ["dead run"]


def add_run(instance: dg.DagsterInstance, status: dg.DagsterRunStatus) -> str:
    run = dg.DagsterRun(job_name="train", run_id=str(uuid.uuid4()), status=status)
    instance.add_run(run)
    return run.run_id


def test_the_slot_of_an_ended_run_is_freed(instance, store):
    storage = instance.event_log_storage
    storage.set_concurrency_slots("gpu", 1)
    run = add_run(instance, dg.DagsterRunStatus.FAILURE)
    assert storage.claim_concurrency_slot("gpu", run, "encoder").is_claimed
    [found] = examine(instance, store)
    assert found.what == "pool slot held by an ended run"
    assert f"step encoder of run {run[:8]}, FAILURE" in found.where
    fix([found])
    assert examine(instance, store) == []


def test_a_run_without_any_process_is_dead_after_a_while(instance, store, monkeypatch):
    add_run(instance, dg.DagsterRunStatus.STARTING)
    assert examine(instance, store) == []
    monkeypatch.setattr("nic_assets.operations.doctor.SILENT", -1)
    [found] = examine(instance, store)
    assert "no process of the run is known" in found.meaning


def test_temporary_files_of_killed_processes_are_removed(instance, store):
    grids = store.grid(GridKey(encoder="mtl", slide="s1")).parent
    (grids / ".new.s1.zarr").mkdir(parents=True)
    (grids / ".lock.s1.zarr").touch()
    [found] = examine(instance, store)
    assert found.what == "temporary files"
    assert "grids/mtl/.new.s1.zarr" in found.where
    fix([found])
    assert list(grids.iterdir()) == []
    assert examine(instance, store) == []


@pytest.fixture
def daemon():
    """Start processes that look like daemons; they end with the test."""
    started = []

    def start(folder: Path, **variables: str) -> subprocess.Popen:
        program = "import time; print('up', flush=True); time.sleep(600)"
        names = ("DAGSTER_HOME", "NIC_DAGSTER_STORAGE", "NIC_DAGSTER_POSTGRES")
        others = {name: value for name, value in os.environ.items() if name not in names}
        process = subprocess.Popen(
            [sys.executable, "-c", program, "dagster._daemon", "run"],
            env=others | variables,
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        kill(process)


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked up in /proc")
def test_two_daemons_on_one_home_are_reported_and_live_on(home, instance, store, tmp_path, daemon):
    first = daemon(tmp_path, DAGSTER_HOME=str(home))
    daemon(tmp_path, DAGSTER_HOME=str(tmp_path))
    assert examine(instance, store) == []
    second = daemon(tmp_path, DAGSTER_HOME="home")
    [found] = examine(instance, store)
    assert found.what == "two daemons on one Dagster home"
    assert re.findall(r"process (\d+)", found.where) == [str(first.pid), str(second.pid)]
    assert found.fix is None
    assert first.poll() is second.poll() is None


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked up in /proc")
def test_daemons_of_two_studies_in_one_home_are_accepted(
    home, instance, store, tmp_path, daemon, monkeypatch
):
    monkeypatch.setenv("NIC_DAGSTER_STORAGE", str(tmp_path / "one"))
    for study in ("one", "other"):
        daemon(tmp_path, DAGSTER_HOME=str(home), NIC_DAGSTER_STORAGE=study)
    assert examine(instance, store) == []
    daemon(tmp_path, DAGSTER_HOME=str(home), NIC_DAGSTER_STORAGE=str(tmp_path / "one"))
    assert names(examine(instance, store)) == ["two daemons on one Dagster home"]


@pytest.mark.integration
def test_the_holder_of_a_full_pool_is_named(instance, training):
    [holder] = slot_holders(instance, "gpu")
    assert re.match(r"step training of run \w{8} \(process ", holder)
    assert str(training.pid) in holder
    kill(training)
    end_dead_runs(instance)
    assert slot_holders(instance, "gpu") == []


@pytest.mark.integration
def test_a_port_in_use_or_invalid_is_refused():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        program = [sys.executable, "-m", "nic_assets.operations.port"]
        done = subprocess.run([*program, str(port)], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(f"port {port} on 127.0.0.1 cannot be used")
        assert f"PORT={port + 1}" in done.stderr
    assert port_problem(str(port)) is None
    assert "give a number" in port_problem("http")
    assert "give a number" in port_problem("70000")


def test_heartbeats_of_two_daemons_are_reported(instance, store):
    for kind, daemon in (("SENSOR", "one"), ("SCHEDULER", "other")):
        instance.add_daemon_heartbeat(DaemonHeartbeat(time.time(), kind, daemon))
    [found] = examine(instance, store)
    assert found.what == "two daemons on one Dagster home"
    assert found.fix is None


def test_queued_runs_without_a_daemon_are_reported(instance, store, monkeypatch):
    monkeypatch.setattr(instance, "get_runs_count", lambda wanted: 3)
    assert names(examine(instance, store)) == ["no daemon"]


def test_a_missing_pool_limit_and_run_monitoring_are_reported(home, store):
    (home / "dagster.yaml").write_text(
        "telemetry: {enabled: false}\nrun_monitoring: {enabled: false}"
    )
    with dg.DagsterInstance.get() as instance:
        pool, monitoring = examine(instance, store)
        assert pool.what == "pool without a limit"
        assert monitoring.what == "run monitoring is disabled"
        fix([pool])
        assert names(examine(instance, store)) == ["run monitoring is disabled"]


def test_locks_of_one_machine_are_reported_if_steps_run_on_several(instance, store, monkeypatch):
    monkeypatch.setattr("nic_assets.operations.doctor.lock_problem", lambda folder: "/nas is local")
    assert examine(instance, store) == []
    monkeypatch.setenv("NIC_EXECUTOR", "slurm")
    [finding] = examine(instance, store)
    assert finding.what == "locks of one machine only"
    assert "/nas is local" in finding.meaning


def doctor(*arguments: str, **variables: str):
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["doctor", *arguments], env=variables | {"COLUMNS": "200"})


@pytest.mark.slow
def test_the_command_reports_problems_and_fixes_them_on_request(
    instance, store, tiny_cohort, monkeypatch
):
    monkeypatch.delitem(sys.modules, "nic_assets.definitions", raising=False)
    variables = {"NIC_COHORT": str(tiny_cohort), "NIC_STORE": str(store.root)}
    lock = store.root / "reports" / ".lock.x"
    lock.parent.mkdir()
    lock.touch()
    found = doctor(**variables)
    assert found.exit_code == 1
    assert "temporary files" in found.output
    assert "nic doctor --fix" in found.output
    assert lock.exists()
    fixed = doctor("--fix", **variables)
    assert fixed.exit_code == 0, fixed.output
    assert not lock.exists()
    assert doctor(**variables).output.strip() == "no problem found"


def test_a_missing_home_and_a_missing_cohort_are_reported(home, store, tmp_path, monkeypatch):
    nowhere = doctor(DAGSTER_HOME=str(tmp_path))
    assert nowhere.exit_code == 1
    assert "is not a Dagster home" in nowhere.output
    monkeypatch.delitem(sys.modules, "nic_assets.definitions", raising=False)
    without = doctor(NIC_COHORT=str(tmp_path / "none.yaml"), NIC_STORE=str(store.root))
    assert without.exit_code == 1
    assert "none.yaml" in without.output

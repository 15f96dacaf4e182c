"""Slurm's answers as commands gave them: states of jobs, why they ended, and errors."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from nic_assets.orchestration.slurm import jobs
from nic_assets.orchestration.slurm.jobs import (
    Job,
    SlurmError,
    cancel,
    ending,
    find_job,
    jobs_named,
    parse_job,
    submit,
)

# `scontrol show job --oneliner` of Slurm 22.05.8
LINE = (
    "JobId={id} JobName=nic-1234-grid UserId=root(0) GroupId=root(0) MCS_label=N/A "
    "Priority=4294901759 Nice=0 Account=(null) QOS=(null) JobState={state} Reason={reason} "
    "Dependency=(null) Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode={exit_code} "
    "RunTime=00:00:04 TimeLimit=UNLIMITED TimeMin=N/A SubmitTime=2026-11-28T12:01:15 "
    "Partition=gpu AllocNode:Sid=localhost:29488 ReqNodeList=(null) ExcNodeList=(null) "
    "NodeList={node} {host}NumNodes=1 NumCPUs=1 NumTasks=1 CPUs/Task=1 TRES=cpu=1,node=1,billing=1 "
    "Command=/tmp/h.sh WorkDir=/tmp Comment=a JobState=FAKE b=c  StdErr=/tmp/1.log "
    "StdIn=/dev/null StdOut=/tmp/1.log Power= TresPerNode=gres:gpu:1 \n"
)


def described(state: str, *, reason="None", exit_code="0:0", node="gpu1") -> str:
    host = f"BatchHost={node} " if node else ""
    return LINE.format(id=7, state=state, reason=reason, exit_code=exit_code, node=node, host=host)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (described("RUNNING"), Job("7", "RUNNING", node="gpu1")),
        (described("PENDING", reason="Resources", node=""), Job("7", "PENDING", "Resources")),
        (described("PREEMPTED", exit_code="0:15"), Job("7", "PREEMPTED", node="gpu1", signal=15)),
        (
            described("FAILED", reason="NonZeroExitCode", exit_code="2:0"),
            Job("7", "FAILED", "NonZeroExitCode", "gpu1", exit_status=2),
        ),
        (described("NODE_FAIL", node="(null)"), Job("7", "NODE_FAIL")),
    ],
)
def test_the_description_of_a_job_is_read(text, expected):
    assert parse_job(text) == expected


@pytest.mark.parametrize(
    ("job", "message", "retry"),
    [
        (Job("7", "PREEMPTED", node="gpu1"), "job 7 on gpu1 was pre-empted", True),
        (Job("7", "NODE_FAIL", node="gpu1"), "its node failed", True),
        (Job("7", "BOOT_FAIL"), "did not boot", True),
        (Job("7", "TIMEOUT", node="gpu1"), "reached its time limit; raise `time`", False),
        (Job("7", "OUT_OF_MEMORY", node="gpu1"), "ran out of memory; raise `memory`", False),
        (Job("7", "CANCELLED"), r"job 7 was cancelled in Slurm \(scancel\)", False),
        (Job("7", "COMPLETED", node="gpu1"), "ended without a result", True),
        (Job("7", "FAILED", exit_status=1), "failed with exit status 1", True),
        (Job("7", "FAILED", exit_status=127), "same path on every node", False),
        (
            Job("7", "FAILED", exit_status=137),
            r"killed \(signal 9\), often because .* memory",
            True,
        ),
        (Job("7", "FAILED", signal=9), r"killed \(signal 9\)", True),
        (Job("7", "FAILED", signal=11), "ended by signal 11", True),
    ],
)
def test_the_ways_a_job_ends_are_told_apart(job, message, retry):
    end = ending(job)
    assert end is not None
    assert end.retry is retry
    assert re.search(message, end.message)


@pytest.mark.parametrize(
    "state", ["PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUE_HOLD"]
)
def test_a_job_that_waits_or_runs_has_no_ending(state):
    assert ending(Job("7", state)) is None


# --- commands --------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a command with a given answer first in the path; it writes down its arguments."""

    def make(name: str, output: str = "", error: str = "", status: int = 0) -> Path:
        calls = tmp_path / f"{name}.calls"
        for stream, text in (("out", output), ("err", error)):
            (tmp_path / f"{name}.{stream}").write_text(text)
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\necho "$@" >> {calls}\ncat {tmp_path}/{name}.out\n'
            f"cat {tmp_path}/{name}.err >&2\nexit {status}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return calls

    return make


def test_the_id_of_a_submitted_job_is_returned(command):
    calls = command("sbatch", "12;cluster\n")
    assert submit("#!/bin/sh\n", ["--partition=gpu"]) == "12"
    assert calls.read_text() == "--parsable --partition=gpu\n"


def test_a_refused_job_is_an_error_with_the_words_of_slurm(command):
    error = (
        "sbatch: error: invalid partition specified: nope\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified\n"
    )
    command("sbatch", error=error, status=1)
    with pytest.raises(SlurmError, match="invalid partition specified: nope") as caught:
        submit("", [])
    assert not caught.value.transient


@pytest.mark.parametrize(
    "error",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "sbatch: error: Batch job submission failed: Resource temporarily unavailable",
    ],
)
def test_a_controller_that_does_not_answer_is_transient(command, error):
    command("scontrol", error=error, status=1)
    with pytest.raises(SlurmError) as caught:
        find_job("7")
    assert caught.value.transient


def test_a_command_that_hangs_is_transient(command, monkeypatch, tmp_path):
    command("squeue")
    (tmp_path / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(jobs, "COMMAND_SECONDS", 0.1)
    with pytest.raises(SlurmError, match="squeue: no answer") as caught:
        jobs_named("nic-1-grid")
    assert caught.value.transient


def test_a_machine_without_slurm_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="sbatch is not installed on this machine"):
        submit("", [])


def test_a_forgotten_job_is_none(command):
    command("scontrol", error="slurm_load_jobs error: Invalid job id specified\n", status=1)
    assert find_job("999") is None


def test_the_jobs_of_names_are_listed_and_active_ones_cancelled(command):
    asked = command(
        "squeue", "3 nic-1-grid CANCELLED\n9 nic-1-grid RUNNING\n10 nic-2-grid PENDING\n"
    )
    cancelled = command("scancel")
    found = jobs_named("nic-1-grid", "nic-2-grid")
    assert [(job.id, job.state) for job in found] == [
        ("3", "CANCELLED"),
        ("9", "RUNNING"),
        ("10", "PENDING"),
    ]
    assert "--name=nic-1-grid,nic-2-grid" in asked.read_text()
    assert [job.id for job in cancel(found)] == ["9", "10"]
    assert cancelled.read_text() == "9 10\n"


def test_nothing_is_cancelled_without_active_jobs(command):
    cancelled = command("scancel")
    assert cancel([Job("3", "COMPLETED")]) == []
    assert not cancelled.exists()

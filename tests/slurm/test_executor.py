"""The executor with stand-ins of Slurm's commands: what a run does when Slurm refuses a job."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.reconstruct import ReconstructableRepository

pytestmark = pytest.mark.slow


@pytest.fixture
def failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[str, int]]:
    """Run the waiting step with an ``sbatch`` that fails; return error and number of attempts."""
    programs, home = tmp_path / "programs", tmp_path / "home"
    programs.mkdir()
    home.mkdir()
    for name in ("squeue", "scancel"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    (home / "slurm.yaml").write_text("poll_seconds: 1\n")
    for name, value in {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "NIC_EXECUTOR": "slurm",
        "NIC_SLURM": str(home / "slurm.yaml"),
        "NIC_STORE": str(tmp_path / "store"),
        "DAGSTER_HOME": str(home),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NIC_DAGSTER_STORAGE", raising=False)
    monkeypatch.delitem(sys.modules, "tests.slurm.waiting", raising=False)

    def run(error: str) -> tuple[str, int]:
        calls = programs / "calls"
        (programs / "sbatch").write_text(
            f"#!/bin/sh\necho call >> {calls}\necho '{error}' >&2\nexit 1\n"
        )
        (programs / "sbatch").chmod(0o755)
        repository = ReconstructableRepository.for_module("tests.slurm.waiting", "defs")
        job = repository.get_reconstructable_job("__ASSET_JOB")
        with dg.DagsterInstance.get() as instance, dg.execute_job(job, instance) as result:
            assert not result.success
            [event] = instance.all_logs(result.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
        return event.dagster_event.step_failure_data.error.message, len(calls.read_text().split())

    return run


def test_a_job_that_slurm_refuses_fails_its_step_at_once(failure):
    message, attempts = failure("sbatch: error: invalid partition specified: nope")
    assert "invalid partition specified: nope" in message
    assert attempts == 1


def test_a_step_is_retried_while_slurm_does_not_answer(failure):
    message, attempts = failure("sbatch: error: Unable to contact slurm controller")
    assert "could not be submitted: sbatch: sbatch: error: Unable to contact" in message
    assert attempts == 3

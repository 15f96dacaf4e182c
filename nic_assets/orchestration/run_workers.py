"""A launcher of runs whose workers can be replaced: ``run_launcher`` of a Dagster instance.

A run worker is the process that hands the steps of a run to the engine. Dagster's own launcher
makes it a child of the code server, and a run whose worker ends has failed. Here it is a process of
its own on the daemon's machine. It goes on while daemon and webserver restart; if it ends itself,
Dagster's run monitoring (``max_resume_run_attempts``) starts another, which finds the steps that
still run. The engine must be one whose steps run elsewhere, as with ``NIC_EXECUTOR=slurm``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from nic_assets.orchestration.internals import (
    CheckRunHealthResult,
    ConfigurableClass,
    ExecuteRunArgs,
    ResumeRunArgs,
    RunLauncher,
    WorkerStatus,
    dagster_command,
)
from nic_assets.tags import WORKER_TAG

if TYPE_CHECKING:
    from nic_assets.orchestration.internals import (
        ConfigurableClassData,
        LaunchRunContext,
        ResumeRunContext,
    )


class ResumableRunLauncher(RunLauncher[dg.DagsterInstance], ConfigurableClass):
    """Starts, resumes and interrupts run workers on this machine.

    The tag :data:`~nic_assets.tags.WORKER_TAG` of a run holds host and process id of its worker.
    What a worker prints is in ``<base_dir>/run_workers/<run id>.log``.
    """

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        self._logs = Path(base_dir) / "run_workers"
        self._inst_data = inst_data
        # a worker that this process started remains in the process table until it is polled
        self._children: list[subprocess.Popen[bytes]] = []
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        """Where the class was named, for Dagster."""
        return self._inst_data

    @classmethod
    def config_type(cls) -> Mapping[str, Any]:
        """Return the fields below ``config`` in ``dagster.yaml``."""
        return {"base_dir": dg.Field(dg.StringSource, description="Above the workers' logs.")}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> ResumableRunLauncher:
        """Return a launcher with this configuration."""
        return cls(**config_value, inst_data=inst_data)

    @property
    def supports_resume_run(self) -> bool:
        """Whether a run can get another worker."""
        return True

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Whether the state of a worker can be told."""
        return True

    def launch_run(self, context: LaunchRunContext) -> None:
        """Start the worker of a run."""
        self._start(context.dagster_run, ExecuteRunArgs)

    def resume_run(self, context: ResumeRunContext) -> None:
        """Start another worker for a run whose worker has ended."""
        self._start(context.dagster_run, ResumeRunArgs)

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Return whether the worker of a run exists; one on another machine counts as running."""
        self._children = [child for child in self._children if child.poll() is None]
        host, pid = _worker(run)
        if pid is None:
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "the run has no worker")
        if host != socket.gethostname():
            return CheckRunHealthResult(WorkerStatus.RUNNING, f"its worker is on {host}")
        if _is_worker(pid, run.run_id):
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(WorkerStatus.FAILED, f"its worker, process {pid}, has ended")

    def terminate(self, run_id: str) -> bool:
        """Interrupt the worker of a run, which cancels the run's steps; False if it has ended."""
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        self._instance.report_run_canceling(run)
        host, pid = _worker(run)
        if pid is None or host != socket.gethostname() or not _is_worker(pid, run_id):
            reason = f"the worker of the run is on {host}" if pid else "the run has no worker"
            self._instance.report_engine_event(f"Not interrupted: {reason}, or has ended", run)
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
        return True

    def _start(self, run: dg.DagsterRun, kind: type[ExecuteRunArgs] | type[ResumeRunArgs]) -> None:
        origin = run.job_code_origin
        if origin is None:
            raise dg.DagsterInvariantViolationError(f"run {run.run_id} names no code location")
        arguments = kind(
            job_origin=origin,
            run_id=run.run_id,
            instance_ref=self._instance.get_ref(),
            set_exit_code_on_failure=None,
        ).get_command_args()
        self._logs.mkdir(parents=True, exist_ok=True)
        worker = _process(dagster_command(arguments), self._logs / f"{run.run_id}.log")
        self._children.append(worker)
        tag = json.dumps({"host": socket.gethostname(), "pid": worker.pid})
        self._instance.add_run_tags(run.run_id, {WORKER_TAG: tag})
        self._instance.report_engine_event(f"Run worker: process {worker.pid}", run)


def _process(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process that the end of this one does not end."""
    with log.open("ab") as output:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _worker(run: dg.DagsterRun) -> tuple[str, int | None]:
    """Return host and process id of a run's worker; no id if it has none."""
    tag = run.tags.get(WORKER_TAG)
    if tag is None:
        return "", None
    found = json.loads(tag)
    return found["host"], found["pid"]


def _is_worker(pid: int, run_id: str) -> bool:
    """Return whether a process is a worker of a run; its command line holds the run's id."""
    try:
        return run_id.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return False

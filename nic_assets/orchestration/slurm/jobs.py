"""Jobs of Slurm: submit, find, describe and cancel them by Slurm's commands.

The commands are those of every Slurm: ``sbatch``, ``squeue``, ``scontrol`` and ``scancel``. An
accounting database (``sacct``) is not needed. Slurm forgets a job some minutes after its end
(``MinJobAge``, 300 s by default).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

COMMAND_SECONDS = 60.0  # a command without an answer for this long has failed

# parts of messages of commands that could not reach the controller: a later attempt may succeed
_UNREACHABLE = (
    "unable to contact slurm controller",
    "socket timed out",
    "connection refused",
    "connection timed out",
    "communication connection failure",
    "zero bytes were transmitted or received",
    "temporarily unavailable",
    "slurm backup controller in standby mode",
)


class SlurmError(Exception):
    """A command of Slurm failed.

    Attributes
    ----------
    transient
        The controller did not answer: the same command may succeed later.
    """

    def __init__(self, message: str, *, transient: bool) -> None:
        super().__init__(message)
        self.transient = transient


@dataclass(frozen=True)
class Job:
    """A job, as Slurm describes it.

    Attributes
    ----------
    id
        Its number.
    state
        Slurm's word: ``PENDING``, ``RUNNING``, ``NODE_FAIL``, ...
    reason
        Why it waits, or more about its end; ``None`` if Slurm says nothing.
    node
        The node it runs or ran on; empty before it starts.
    exit_status, signal
        Of its process, after its end.
    """

    id: str
    state: str
    reason: str = "None"
    node: str = ""
    exit_status: int = 0
    signal: int = 0


@dataclass(frozen=True)
class Ending:
    """Why a job ended without a result of its step.

    Attributes
    ----------
    message
        What happened and, where a person can do something, what.
    retry
        Whether the step's retry policy applies: the fault is one of the cluster, not of the step.
    """

    message: str
    retry: bool


# state -> text after "job N on NODE", and whether the step is retried
_ENDINGS = {
    "COMPLETED": ("ended without a result of its step; see its log", True),
    "PREEMPTED": ("was pre-empted by a job of higher priority", True),
    "NODE_FAIL": ("was lost: its node failed", True),
    "BOOT_FAIL": ("was lost: its node did not boot", True),
    "LAUNCH_FAILED": ("could not be started by its node", True),
    "RECONFIG_FAIL": ("was lost: its node could not be configured", True),
    "REVOKED": ("was revoked: another cluster of the federation has it", True),
    "TIMEOUT": (
        "reached its time limit; raise `time` in the settings file, or make batches smaller with "
        "`partitions_per_job`",
        False,
    ),
    "DEADLINE": ("reached its deadline", False),
    "OUT_OF_MEMORY": ("ran out of memory; raise `memory` in the settings file", False),
    "CANCELLED": ("was cancelled in Slurm (scancel), not by this run", False),
}


def ending(job: Job) -> Ending | None:
    """Return why a job ended; None while it waits or runs."""
    where = f"job {job.id} on {job.node}" if job.node else f"job {job.id}"
    if job.state in _ENDINGS:
        text, retry = _ENDINGS[job.state]
        return Ending(f"{where} {text}", retry)
    if job.state != "FAILED":
        return None
    # a shell's exit status above 128 is a signal as well
    number = job.signal or max(0, job.exit_status - 128)
    if job.exit_status in (126, 127):
        return Ending(
            f"{where} found no program (exit status {job.exit_status}): the Python environment "
            "must have the same path on every node; see its log",
            retry=False,
        )
    if number == 9:
        text = "was killed (signal 9), often because the node's memory was full; see its log"
    elif number:
        text = f"was ended by signal {number}; see its log"
    else:
        text = f"failed with exit status {job.exit_status} before its step did; see its log"
    return Ending(f"{where} {text}", retry=True)


def parse_job(text: str) -> Job:
    """Read the output of ``scontrol show job --oneliner``."""
    fields: dict[str, str] = {}
    for name, value in re.findall(r"(?:^|\s)([A-Z]\w*)=(\S*)", text):
        fields.setdefault(name, value)  # a comment or command behind may look like a field
    status, _, number = fields["ExitCode"].partition(":")
    return Job(
        id=fields["JobId"],
        state=fields["JobState"],
        reason=fields["Reason"],
        node="" if fields["NodeList"] == "(null)" else fields["NodeList"],
        exit_status=int(status),
        signal=int(number),
    )


def submit(script: str, arguments: Sequence[str]) -> str:
    """Submit a batch script; return the id of its job.

    Raises
    ------
    SlurmError
        Slurm refused it, or did not answer. In the second case it may have the job nevertheless.
    """
    answer = _run(["sbatch", "--parsable", *arguments], script)
    return answer.strip().partition(";")[0]  # the rest is the name of the cluster


def find_job(job: str) -> Job | None:
    """Return a job by its id; None if Slurm does not know it any more.

    Raises
    ------
    SlurmError
        Slurm did not answer.
    """
    try:
        return parse_job(_run(["scontrol", "show", "job", "--oneliner", job]))
    except SlurmError as error:
        if "invalid job id" in str(error).lower():
            return None
        raise


def jobs_named(*names: str) -> list[Job]:
    """Return the jobs of these names that Slurm still knows, oldest first; without exit status.

    Raises
    ------
    SlurmError
        Slurm did not answer.
    """
    command = ["squeue", "--noheader", "--states=all", "--format=%i %j %T", "--sort=i"]
    lines = _run([*command, f"--name={','.join(names)}"]).splitlines()
    return [Job(id=words[0], state=words[2]) for words in map(str.split, lines)]


def cancel(jobs: Sequence[Job]) -> list[Job]:
    """Cancel those of the jobs that wait or run; return them.

    Raises
    ------
    SlurmError
        Slurm did not answer.
    """
    active = [job for job in jobs if ending(job) is None]
    if active:
        _run(["scancel", *(job.id for job in active)])
    return active


def _run(command: Sequence[str], given: str | None = None) -> str:
    """Return the output of a command."""
    try:
        done = subprocess.run(
            command,
            input=given,
            stdin=subprocess.DEVNULL if given is None else None,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_SECONDS,
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"{command[0]} is not installed on this machine: runs start on a machine that can "
            "submit jobs",
            transient=False,
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{command[0]}: no answer for {COMMAND_SECONDS:.0f} s", transient=True
        ) from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        message = "; ".join(lines) or f"exit status {done.returncode}"
        transient = any(text in message.lower() for text in _UNREACHABLE)
        raise SlurmError(f"{command[0]}: {message}", transient=transient)
    return done.stdout

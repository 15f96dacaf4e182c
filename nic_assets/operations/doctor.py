"""What breaks when processes are killed, found from what they left: ``nic doctor``.

A run that is alive is never touched. Whether one is alive is asked of its processes, whose numbers
are in its events; a run is left alone unless all that it had here are gone and nothing says that it
had any on another machine.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import dagster as dg
from dagster._core.events import EngineEventData
from dagster._core.storage.dagster_run import FINISHED_STATUSES
from dagster._core.storage.runs import SqliteRunStorage

from nic_assets.orchestration.executors import GPU_POOL, chosen_engine, set_gpu_slots
from nic_assets.tags import HOST_TAG
from nic_core.store import Store

SILENT = 300  # s without an event after which a run of which no process is known counts as lost
HEARTBEAT = 60  # s within which every daemon says that it is there
PATIENCE = 10  # s that a daemon gets to end by itself


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes
    ----------
    what, where
        In a few words.
    meaning
        Why it matters.
    remedy
        What ``mend`` does or, without it, what a person must do.
    """

    what: str
    where: str
    meaning: str
    remedy: str
    mend: Callable[[], None] | None = None


def examine(instance: dg.DagsterInstance, store: Store) -> list[Finding]:
    """Everything that is wrong with an instance and a store; changes nothing."""
    return [
        *_daemons(instance),
        *_lost_runs(instance),
        *_held_slots(instance),
        *_settings(instance),
        *_leftovers(store),
    ]


def release(instance: dg.DagsterInstance) -> list[Finding]:
    """End what has no process any more, so that nothing waits for it; returns what that was."""
    found = [*_lost_runs(instance), *_held_slots(instance)]
    mended = []
    for finding in found:
        if finding.mend is not None:
            finding.mend()
            mended.append(finding)
    return mended


# --- runs and their slots --------------------------------------------------------------------


def _lost_runs(instance: dg.DagsterInstance) -> Iterator[Finding]:
    """Runs that are going on for ever, since nobody is left to say that they ended."""
    under_way = [
        dg.DagsterRunStatus.STARTING,
        dg.DagsterRunStatus.STARTED,
        dg.DagsterRunStatus.CANCELING,
    ]
    for record in instance.get_run_records(dg.RunsFilter(statuses=under_way)):
        run = record.dagster_run
        processes, spoke = _processes(instance, run.run_id)
        silent = time.time() - (spoke or record.create_timestamp.timestamp())
        if any(_is_alive(pid, since) for pid, since in processes):
            continue
        if not processes and silent < SILENT:
            continue
        gone = "its process is gone" if processes else "no process of it is known"
        assets = ", ".join(sorted(key.to_user_string() for key in run.asset_selection or ()))
        where = f"run {run.run_id[:8]} ({assets or run.job_name}), {run.status.value}"
        meaning = (
            f"{gone}; it last spoke {_ago(silent)} ago. It will never end, and holds its slots"
        )
        if _was_here(instance, run):
            yield Finding(
                "lost run",
                where,
                meaning,
                "marked as failed; then materialize again what it was to make",
                partial(_fail, instance, run.run_id),
            )
        else:
            yield Finding(
                "lost run",
                where,
                f"{gone.replace('gone', 'not on this machine')}; it last spoke {_ago(silent)} ago",
                "run this on the machine that ran it, or end it in the UI: Terminate, "
                "force termination",
            )


def _processes(
    instance: dg.DagsterInstance, run: str
) -> tuple[list[tuple[int, float]], float | None]:
    """The processes that a run had, each with the time at which it was there, and when the run
    last spoke."""
    found = []
    last = 0.0
    for entry in instance.all_logs(run):
        last = max(last or 0.0, entry.timestamp)
        event = entry.dagster_event
        data = event.event_specific_data if event is not None else None
        pid = data.metadata.get("pid") if isinstance(data, EngineEventData) else None
        if pid is not None:
            found.append((int(str(pid.value)), entry.timestamp))
    return found, last


def _was_here(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether this is the machine of all of a run's processes."""
    hosts = run.tags.get(HOST_TAG)
    if hosts is not None:
        return hosts == socket.gethostname()
    return isinstance(instance.run_storage, SqliteRunStorage)  # one machine's alone


def _fail(instance: dg.DagsterInstance, run_id: str) -> None:
    run = instance.get_run_by_id(run_id)
    if run is None or run.status in FINISHED_STATUSES:
        return
    if run.status is dg.DagsterRunStatus.CANCELING:
        instance.report_run_canceled(run)
    else:
        instance.report_run_failed(run, "nic doctor: its process is gone")
    instance.event_log_storage.free_concurrency_slots_for_run(run_id)


def _held_slots(instance: dg.DagsterInstance) -> Iterator[Finding]:
    """Slots of pools that a run which has ended still holds or waits for."""
    storage = instance.event_log_storage
    for pool in sorted(storage.get_concurrency_keys()):
        info = storage.get_concurrency_info(pool)
        holders = {
            *((slot.run_id, slot.step_key) for slot in info.claimed_slots),
            *((step.run_id, step.step_key) for step in info.pending_steps),
        }
        for run_id, step in sorted(holders):
            run = instance.get_run_by_id(run_id)
            if run is not None and run.status not in FINISHED_STATUSES:
                continue
            ended = run.status.value if run is not None else "deleted"
            yield Finding(
                "pool slot held by a run that has ended",
                f"pool {pool}: step {step} of run {run_id[:8]}, {ended}",
                f"of the pool's {info.slot_count} slot(s) it takes one: steps wait for it in vain",
                "given back",
                partial(storage.free_concurrency_slots_for_run, run_id),
            )


def _settings(instance: dg.DagsterInstance) -> Iterator[Finding]:
    """What ``dagster.yaml`` must say."""
    storage = instance.event_log_storage
    limits = {limit.name: limit.limit for limit in storage.get_pool_limits()}
    default = instance.get_concurrency_config().pool_config.default_pool_limit
    # the engines of several machines hand out the steps: there it has none
    if chosen_engine() == "local" and limits.get(GPU_POOL, default) is None:
        yield Finding(
            "pool without a limit",
            f"pool {GPU_POOL}",
            "any number of trainings runs at once, on one device",
            "a slot for each GPU, one where there is none",
            partial(set_gpu_slots, instance),
        )
    if not instance.run_monitoring_enabled:
        yield Finding(
            "runs are not monitored",
            "dagster.yaml",
            "a killed run is not noticed and its pool slot not given back",
            "take over run_monitoring from the project's dagster.yaml",
        )


# --- daemons ---------------------------------------------------------------------------------


def _daemons(instance: dg.DagsterInstance) -> Iterator[Finding]:
    """More than one daemon on this home, or none where runs wait for it."""
    heard = [
        beat.daemon_id
        for beat in instance.get_daemon_heartbeats().values()
        if time.time() - beat.timestamp < HEARTBEAT
    ]
    here = _daemon_processes(Path(instance.root_directory))
    meaning = "each starts what the other has started: runs and sensor ticks come twice"
    if len(here) > 1:
        *older, kept = here
        yield Finding(
            "two daemons on one home",
            f"processes {', '.join(map(str, here))}",
            meaning,
            f"the newest ({kept}) stays, the others are ended",
            partial(_end, older),
        )
    elif len(set(heard)) > 1:
        yield Finding(
            "two daemons on one home",
            f"{len(set(heard))} have spoken within {HEARTBEAT} s, {len(here)} of them from here",
            meaning,
            "if none was restarted in the last minute, another machine has one: stop it there",
        )
    waiting = instance.get_runs_count(dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED]))
    if waiting and not heard and not here:
        yield Finding(
            "no daemon",
            f"{waiting} run(s) queued",
            "nobody starts them; sensors and schedules stand still",
            "make ui, or dagster-daemon run",
        )


def _daemon_processes(home: Path) -> list[int]:
    """The daemons of a home on this machine, oldest first; none where there is no ``/proc``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or somebody else's
            words = (process / "cmdline").read_bytes().split(b"\0")
            if not any(
                word == b"dagster._daemon" or word.endswith(b"/dagster-daemon") for word in words
            ):
                continue
            variables = (process / "environ").read_bytes().split(b"\0")
            its = next((v[13:] for v in variables if v.startswith(b"DAGSTER_HOME=")), None)
            if its is not None and Path(os.fsdecode(its)).resolve() == home.resolve():
                found.append(int(process.name))
    return sorted(found, key=lambda pid: (_started(pid) or 0.0, pid))


def _end(pids: list[int]) -> None:
    """Ask processes to end, and end those that do not. What a daemon was doing is in its storage:
    the next one goes on with it."""
    asked = time.time()
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            if _is_alive(pid, asked):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit and any(_is_alive(pid, asked) for pid in pids):
            time.sleep(0.1)


# --- the store -------------------------------------------------------------------------------


def _leftovers(store: Store) -> Iterator[Finding]:
    for item in store.leftovers():
        if not item.locked:
            yield Finding(
                "half-made files",
                ", ".join(str(file.relative_to(store.root)) for file in item.files),
                "a writer was killed; the product beside them is whole, or was never there",
                "removed, as the product's next writer would",
                item.remove,
            )


# --- processes -------------------------------------------------------------------------------


def _is_alive(pid: int, since: float) -> bool:
    """Whether a process that was there at the time ``since`` still is: not just its number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's: it is there
        pass
    started = _started(pid)
    return started is None or started < since + 2  # the clocks' ticks


def _started(pid: int) -> float | None:
    """When a process started, s since the epoch; None where that cannot be told.

    One that has ended and that its parent has not noticed yet (a zombie) started at no time.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = next(
            line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime")
        )
    except OSError:
        return None
    if fields[0] in "ZX":
        return float("inf")
    return int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"

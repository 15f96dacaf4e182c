"""Find the damage that killed processes and wrong settings leave, for ``nic doctor``.

A live run is never changed. Dagster's events hold the ids of a run's processes; a run counts as
dead only if all of them on this machine have ended and it had no process on another machine.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import dagster as dg

from nic_assets.orchestration.executors import GPU_POOL, chosen_engine, set_gpu_slots
from nic_assets.orchestration.internals import process_id, records_are_local
from nic_assets.orchestration.metadata import duration
from nic_assets.tags import HOST_TAG
from nic_core.store import Store, lock_problem

SILENT = 300  # s without an event, after which a run without any known process counts as dead
HEARTBEAT = 60  # s within which a live daemon records a heartbeat


@dataclass(frozen=True)
class Finding:
    """A problem, and how to solve it.

    Attributes
    ----------
    what
        The kind of problem, in a few words.
    where
        The run, pool, process or file.
    meaning
        The cause and the consequence.
    remedy
        What ``fix`` does, or without ``fix`` what a person has to do.
    fix
        Solves the problem; None if this program cannot.
    """

    what: str
    where: str
    meaning: str
    remedy: str
    fix: Callable[[], None] | None = None


def examine(instance: dg.DagsterInstance, store: Store) -> list[Finding]:
    """Return every problem of an instance and a store; change nothing."""
    return [
        *_daemons(instance),
        *_dead_runs(instance),
        *_held_slots(instance),
        *_settings(instance),
        *_locks(store),
        *_leftovers(store),
    ]


def end_dead_runs(instance: dg.DagsterInstance) -> list[Finding]:
    """Mark dead runs as failed and free the pool slots of ended runs; return what was fixed."""
    fixed = []
    for finding in [*_dead_runs(instance), *_held_slots(instance)]:
        if finding.fix is not None:
            finding.fix()
            fixed.append(finding)
    return fixed


# --- runs and their slots --------------------------------------------------------------------


def _dead_runs(instance: dg.DagsterInstance) -> Iterator[Finding]:
    """Yield the unfinished runs whose processes have ended: nothing else would end them."""
    unfinished = [
        dg.DagsterRunStatus.STARTING,
        dg.DagsterRunStatus.STARTED,
        dg.DagsterRunStatus.CANCELING,
    ]
    for record in instance.get_run_records(dg.RunsFilter(statuses=unfinished)):
        run = record.dagster_run
        processes, last_event = _processes(instance, run.run_id)
        silent = time.time() - (last_event or record.create_timestamp.timestamp())
        if any(_is_alive(pid, since) for pid, since in processes):
            continue
        if not processes and silent < SILENT:
            continue
        local = _ran_here(instance, run)
        if not processes:
            cause = "no process of the run is known"
        else:
            cause = f"its process {'has ended' if local else 'is not on this machine'}"
        meaning = f"{cause}; last event {duration(silent)} ago"
        assets = ", ".join(sorted(key.to_user_string() for key in run.asset_selection or ()))
        where = f"run {run.run_id[:8]} ({assets or run.job_name}), {run.status.value}"
        if local:
            yield Finding(
                "dead run",
                where,
                f"{meaning}. The run keeps its status and its pool slots until it is ended",
                "marks the run as failed; then materialize its partitions again",
                partial(_fail, instance, run.run_id),
            )
        else:
            yield Finding(
                "dead run",
                where,
                meaning,
                "run nic doctor on the machine of the run, or end the run in Dagster's UI "
                "(Terminate, force termination)",
            )


def _processes(
    instance: dg.DagsterInstance, run: str
) -> tuple[list[tuple[int, float]], float | None]:
    """Return a run's process ids, each with the time of its event, and the last event's time."""
    found = []
    last = None
    for entry in instance.all_logs(run):
        last = max(last or 0.0, entry.timestamp)
        pid = process_id(entry.dagster_event) if entry.dagster_event is not None else None
        if pid is not None:
            found.append((pid, entry.timestamp))
    return found, last


def _ran_here(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Return whether all processes of a run were on this machine."""
    hosts = run.tags.get(HOST_TAG)
    return records_are_local(instance) if hosts is None else hosts == socket.gethostname()


def _fail(instance: dg.DagsterInstance, run_id: str) -> None:
    """Mark a run as failed (as canceled if that was requested) and free its pool slots."""
    run = instance.get_run_by_id(run_id)
    if run is None or run.is_finished:
        return
    if run.status is dg.DagsterRunStatus.CANCELING:
        instance.report_run_canceled(run)
    else:
        instance.report_run_failed(run, "nic doctor: the process of the run has ended")
    instance.event_log_storage.free_concurrency_slots_for_run(run_id)


def _held_slots(instance: dg.DagsterInstance) -> Iterator[Finding]:
    """Yield the pool slots that a finished or deleted run still holds or waits for."""
    storage = instance.event_log_storage
    for pool in sorted(storage.get_concurrency_keys()):
        info = storage.get_concurrency_info(pool)
        holders = {
            *((slot.run_id, slot.step_key) for slot in info.claimed_slots),
            *((step.run_id, step.step_key) for step in info.pending_steps),
        }
        for run_id, step in sorted(holders):
            run = instance.get_run_by_id(run_id)
            if run is not None and not run.is_finished:
                continue
            status = run.status.value if run is not None else "deleted"
            yield Finding(
                "pool slot held by an ended run",
                f"pool {pool}: step {step} of run {run_id[:8]}, {status}",
                f"the slot is one of {info.slot_count}; other steps wait for it",
                "frees the slot",
                partial(storage.free_concurrency_slots_for_run, run_id),
            )


def slot_holders(instance: dg.DagsterInstance, pool: str) -> list[str]:
    """Describe the steps that hold the slots of a full pool; empty if a slot is free."""
    info = instance.event_log_storage.get_concurrency_info(pool)
    if len(info.claimed_slots) < info.slot_count:
        return []
    found = []
    for slot in info.claimed_slots:
        record = instance.get_run_record_by_id(slot.run_id)
        if record is None:
            continue  # deleted: end_dead_runs frees its slots
        processes, _ = _processes(instance, slot.run_id)
        pids = ", ".join(sorted({str(pid) for pid, _ in processes})) or "unknown"
        host = record.dagster_run.tags.get(HOST_TAG, "an unknown machine")
        found.append(
            f"step {slot.step_key} of run {slot.run_id[:8]} (process {pids} on {host}, since "
            f"{_clock(record.start_time)})"
        )
    return found


def _settings(instance: dg.DagsterInstance) -> Iterator[Finding]:
    """Yield the settings of ``dagster.yaml`` that are missing."""
    storage = instance.event_log_storage
    limits = {limit.name: limit.limit for limit in storage.get_pool_limits()}
    default = instance.get_concurrency_config().pool_config.default_pool_limit
    # an engine that distributes steps over several machines needs no limit
    if chosen_engine() == "local" and limits.get(GPU_POOL, default) is None:
        yield Finding(
            "pool without a limit",
            f"pool {GPU_POOL}",
            "any number of trainings may run at once on one device",
            "sets the limit to one slot per GPU, at least one",
            partial(set_gpu_slots, instance),
        )
    if not instance.run_monitoring_enabled:
        yield Finding(
            "run monitoring is disabled",
            "dagster.yaml",
            "Dagster does not notice killed runs and does not free their pool slots",
            "copy run_monitoring from this project's dagster.yaml",
        )


def _locks(store: Store) -> Iterator[Finding]:
    """Yield a finding if the store's locks do not hold between the machines of the steps."""
    if chosen_engine() != "local" and (problem := lock_problem(store.root)):
        yield Finding(
            "locks of one machine only",
            str(store.root),
            f"{problem}. Runs are refused: two machines could write one product at the same time",
            "mount it so, or move the store",
        )


# --- daemons ---------------------------------------------------------------------------------


def _daemons(instance: dg.DagsterInstance) -> Iterator[Finding]:
    """Yield a finding if several daemons use these records, or if none does and runs are queued.

    Daemons are reported only: systemd would start a killed one again, and under ``dagster dev``
    the other services end with it.
    """
    heard = [
        beat.daemon_id
        for beat in instance.get_daemon_heartbeats().values()
        if time.time() - beat.timestamp < HEARTBEAT
    ]
    here = _daemon_processes()
    meaning = "each daemon starts every queued run and evaluates every sensor: runs start twice"
    if len(here) > 1:
        yield Finding(
            "two daemons on one Dagster home",
            "; ".join(f"process {pid}, since {_clock(_started(pid))}" for pid in here),
            meaning,
            "stop all but one: end the make ui, dagster dev or systemd service that started it",
        )
    elif len(set(heard)) > 1:
        yield Finding(
            "two daemons on one Dagster home",
            f"{len(set(heard))} with a heartbeat within {HEARTBEAT} s, {len(here)} on this machine",
            meaning,
            "if no daemon was restarted within the last minute, stop the one on another machine",
        )
    waiting = instance.get_runs_count(dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED]))
    if waiting and not heard and not here:
        yield Finding(
            "no daemon",
            f"{waiting} queued run(s)",
            "queued runs do not start; sensors and schedules are not evaluated",
            "start one: make ui, or dagster-daemon run",
        )


def _daemon_processes() -> list[int]:
    """Return the daemons on this machine with this process's records, oldest first.

    Empty without ``/proc``.
    """
    own = {os.fsencode(name): os.fsencode(value) for name, value in os.environ.items()}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended, or belongs to another user
            words = (process / "cmdline").read_bytes().split(b"\0")
            if not any(
                word == b"dagster._daemon" or word.endswith(b"/dagster-daemon") for word in words
            ):
                continue
            lines = (process / "environ").read_bytes().split(b"\0")
            variables = dict(line.split(b"=", 1) for line in lines if b"=" in line)
            if _same_records(variables, (process / "cwd").readlink(), own, Path.cwd()):
                found.append(int(process.name))
    return sorted(found, key=lambda pid: (_started(pid) or 0.0, pid))


def _same_records(
    one: Mapping[bytes, bytes], one_folder: Path, other: Mapping[bytes, bytes], other_folder: Path
) -> bool:
    """Return whether the environments of two processes name the same Dagster records.

    One home serves several studies, each with its records in its store, so the records decide. A
    process whose environment does not name them read them from ``.env``: then the home decides.
    """
    url = b"NIC_DAGSTER_POSTGRES"
    if one.get(url) and other.get(url):
        return one[url] == other[url]
    for variable in (b"NIC_DAGSTER_STORAGE", b"DAGSTER_HOME"):
        if one.get(variable) and other.get(variable):
            first = one_folder / os.fsdecode(one[variable])
            return first.resolve() == (other_folder / os.fsdecode(other[variable])).resolve()
    return False


# --- the store -------------------------------------------------------------------------------


def _leftovers(store: Store) -> Iterator[Finding]:
    """Yield the temporary files and locks of killed processes."""
    for item in store.leftovers():
        if not item.locked:
            yield Finding(
                "temporary files",
                ", ".join(str(file.relative_to(store.root)) for file in item.files),
                "a process was killed while it wrote a product; the product itself is complete or "
                "absent",
                "removes them, as the next write of the product would",
                item.remove,
            )


# --- processes -------------------------------------------------------------------------------


def _is_alive(pid: int, since: float) -> bool:
    """Return whether the process that had the id ``pid`` at time ``since`` still runs.

    A younger process with the same id does not count.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process runs as another user
        pass
    started = _started(pid)
    return started is None or started < since + 2  # s; start times are rounded


def _clock(moment: float | None) -> str:
    """Return a time in s since the epoch as local time."""
    if moment is None:
        return "an unknown time"
    return datetime.fromtimestamp(moment).isoformat(sep=" ", timespec="seconds")


def _started(pid: int) -> float | None:
    """Return the start time of a process in s since the epoch; None without ``/proc``.

    Infinity for a zombie, which has ended but is still listed.
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

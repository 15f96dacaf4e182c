"""Bring a study up to date, for ``nic refresh``.

Each asset's missing and stale partitions are materialized in this process, from the slides to the
report, in as few runs as their ranges allow. A failure stops only what depends on it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import dagster as dg
import polars as pl
from rich.console import Console

from nic_assets.operations.doctor import end_dead_runs, slot_holders
from nic_assets.orchestration.executors import set_gpu_slots
from nic_assets.orchestration.internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)
from nic_assets.orchestration.retries import was_interrupted
from nic_assets.orchestration.staleness import Partition, stale_assets
from nic_assets.tags import EARLIER_PARTITIONS, REFRESH_TAG
from nic_core.cohort import CohortError
from nic_core.reports import comparisons_table, encoders_table, results_table
from nic_core.steps.evaluation_report import COMPARISONS, ENCODERS, NOTES, RESULTS
from nic_core.store import Store

SHOWN = 3  # partitions that a message lists


def refresh(defs: dg.Definitions, instance: dg.DagsterInstance, console: Console) -> list[str]:
    """Materialize what is missing or stale; return one line per failure.

    Raises
    ------
    KeyboardInterrupt
        SIGINT or SIGTERM ended a run; what was recorded before is kept.
    """
    problems: list[str] = []
    graph = defs.resolve_asset_graph()
    for keys in graph.toposorted_asset_keys_by_level:
        for key in sorted(keys & graph.materializable_asset_keys):
            problems += _refresh_asset(defs, instance, key, console)
            if problems and graph.get(key).tags.get(REFRESH_TAG) == "always":
                return problems  # the inputs are unknown, so staleness is unknown
    return problems


def _refresh_asset(
    defs: dg.Definitions, instance: dg.DagsterInstance, key: dg.AssetKey, console: Console
) -> list[str]:
    """Materialize the stale partitions of one asset; return one line per failure."""
    name = key.to_user_string()
    stale, waiting = _stale_and_waiting(defs, instance, key)
    problems: list[str] = []
    if waiting:
        keys = ", ".join(partition for partition in waiting[:SHOWN] if partition is not None)
        more = f" and {len(waiting) - SHOWN} more" if len(waiting) > SHOWN else ""
        problems.append(f"{name}: an input is missing: {keys or 'all'}{more}")
    if not stale:
        console.print(f"[dim]{name}: {'an input is missing' if waiting else 'up to date'}[/dim]")
        return problems
    started = time.monotonic()
    count = "" if stale == [None] else f": {len(stale)} partitions"
    console.print(f"[bold]{name}[/bold]{count}")
    made: set[Partition] = set()
    while stale:
        problems += _run_partitions(defs, instance, key, stale, console)
        made |= set(stale)
        stale = _unblocked(defs, instance, key, made)
    problems += [f"{name}: {reason}" for reason in _still_blocked(defs, instance, key)]
    console.print(f"{name}: {time.monotonic() - started:.1f} s")
    return problems


def _run_partitions(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    key: dg.AssetKey,
    partitions: list[Partition],
    console: Console,
) -> list[str]:
    """Materialize partitions of one asset; return one line per failure."""
    name, problems = key.to_user_string(), []
    pool = defs.resolve_asset_graph().get(key).assets_def.op.pool
    for tags in _run_tags(defs, instance, key, partitions):
        if pool is not None and (holders := slot_holders(instance, pool)):
            console.print(
                f"{name}: waiting for a slot of pool {pool}, held by {'; '.join(holders)}",
                style="yellow",
                markup=False,
            )
        job = defs.resolve_implicit_global_asset_job_def()
        result = job.execute_in_process(
            instance=instance,
            asset_selection=[key],
            tags=tags,
            run_config={"loggers": {"console": {}}},
            raise_on_error=False,
        )
        if was_interrupted(result.all_events):
            raise KeyboardInterrupt
        problems += [f"{name}: {_reason(event)}" for event in result.get_step_failure_events()]
    return problems


def _unblocked(
    defs: dg.Definitions, instance: dg.DagsterInstance, key: dg.AssetKey, made: set[Partition]
) -> list[Partition]:
    """Return the stale partitions that are made from those just made, without the latter."""
    graph = defs.resolve_asset_graph()
    if EARLIER_PARTITIONS not in graph.get(key).metadata:
        return []
    return list(stale_assets(instance, graph, only={key})[key].ready - made)


def _still_blocked(
    defs: dg.Definitions, instance: dg.DagsterInstance, key: dg.AssetKey
) -> list[str]:
    """Return a line for each partition that waits for another one of its asset, which failed."""
    graph = defs.resolve_asset_graph()
    earlier = graph.get(key).metadata.get(EARLIER_PARTITIONS, {})
    if not earlier:
        return []
    blocked = stale_assets(instance, graph, only={key})[key].blocked_by_upstream
    return [
        f"{partition} waits for {earlier[partition]}, which is not up to date"
        for partition in sorted(blocked, key=str)
        if partition is not None
    ]


def _stale_and_waiting(
    defs: dg.Definitions, instance: dg.DagsterInstance, key: dg.AssetKey
) -> tuple[list[Partition], list[Partition]]:
    """Return the partitions to materialize, and those with a missing input."""
    graph = defs.resolve_asset_graph()
    if graph.get(key).tags.get(REFRESH_TAG) == "always":
        return [None], []
    stale = stale_assets(instance, graph, only={key})[key]
    return list(stale.ready), sorted(stale.missing_inputs, key=str)


def _run_tags(
    defs: dg.Definitions, instance: dg.DagsterInstance, key: dg.AssetKey, stale: list[Partition]
) -> Iterator[dict[str, str]]:
    """Yield the tags of one run per range of neighbouring partitions.

    The partitions of a range differ only in the last dimension of their keys.
    """
    definition = defs.resolve_asset_graph().get(key).partitions_def
    if definition is None:
        yield {}
        return
    order = definition.get_partition_keys(dynamic_partitions_store=instance)
    position = {partition: number for number, partition in enumerate(order)}
    ranges: list[list[str]] = []
    for partition in sorted((p for p in stale if p is not None), key=position.__getitem__):
        last = ranges[-1][-1] if ranges else None
        if (
            last is not None
            and position[partition] == position[last] + 1
            and partition.rpartition("|")[0] == last.rpartition("|")[0]
        ):
            ranges[-1].append(partition)
        else:
            ranges.append([partition])
    for keys in ranges:
        yield {
            ASSET_PARTITION_RANGE_START_TAG: keys[0],
            ASSET_PARTITION_RANGE_END_TAG: keys[-1],
        }


def _reason(event: dg.DagsterEvent) -> str:
    """Return the description of a step's failure, or the message of its first cause."""
    failure = event.step_failure_data
    if failure.user_failure_data is not None:
        return str(failure.user_failure_data.description)
    error = failure.error
    while error is not None and error.cause is not None:
        error = error.cause
    return error.message.strip() if error is not None else "failed without a message"


def main() -> int:
    """Refresh the study of the environment, print the report's tables; return the exit status.

    0: everything is up to date. 1: something failed. 2: the cohort file or a setting is invalid.
    130: interrupted by SIGINT or SIGTERM.
    """
    console = Console(stderr=True)
    try:
        from nic_assets.definitions import defs  # depends on the environment
    except (CohortError, dg.DagsterInvalidDefinitionError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 2
    try:
        found = dg.DagsterInstance.get()
    except dg.DagsterInvalidConfigError as error:  # for example a variable that is not set
        problem = str(error).partition("Stack Trace:")[0]
        home = os.environ["DAGSTER_HOME"]
        console.print(
            f"{home}/dagster.yaml: {' '.join(problem.split())} Run nic in the project's folder, "
            "whose .env sets the variables, or set them",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        return 2
    with found as instance:
        set_gpu_slots(instance)
        for finding in end_dead_runs(instance):  # else this refresh waits for their pool slots
            console.print(f"fixed: {finding.what}, {finding.where}", style="yellow", markup=False)
        try:
            problems = refresh(defs, instance, console)
        except KeyboardInterrupt:
            console.print("interrupted; what was recorded is kept, nic refresh continues from it")
            return 130
    reports = Store.from_environment().evaluation_report
    for name, table in (
        (RESULTS, results_table),
        (ENCODERS, encoders_table),
        (COMPARISONS, comparisons_table),
    ):
        if (reports / name).exists() and (
            rows := pl.read_parquet(reports / name, glob=False)
        ).height:
            Console().print(table(rows))
    if (notes := reports / NOTES).exists():
        console.print(notes.read_text(), style="yellow", markup=False, end="")
    for problem in problems:
        console.print(problem, style="red", markup=False, soft_wrap=True)
    return 1 if problems else 0

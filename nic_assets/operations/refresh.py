"""Bring a study up to date: ``python -m nic_assets.operations.refresh``.

Asks Dagster which partitions are missing or stale, layer by layer from the slides to the
report, and materializes just those, in this process and in as few runs as their ranges allow.
A failure stops what depends on it and nothing else; the exit status tells.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import dagster as dg
import polars as pl
from dagster._core.execution.plan.objects import StepFailureData
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)
from rich.console import Console

from nic_assets.operations.doctor import release
from nic_assets.operations.environment import read_environment
from nic_assets.orchestration.executors import set_gpu_slots
from nic_assets.orchestration.staleness import Partition, due
from nic_assets.tags import REFRESH_TAG
from nic_core.cohort import CohortError
from nic_core.reports import comparisons_table, results_table
from nic_core.steps.evaluation_report import COMPARISONS, RESULTS
from nic_core.store import Store


def refresh(defs: dg.Definitions, instance: dg.DagsterInstance, console: Console) -> list[str]:
    """Materialize whatever is missing or stale; returns what failed, one line each."""
    problems: list[str] = []
    graph = defs.resolve_asset_graph()
    for keys in graph.toposorted_asset_keys_by_level:
        for key in sorted(keys & graph.materializable_asset_keys):
            problems += _refresh_asset(defs, instance, key, console)
            if problems and graph.get(key).tags.get(REFRESH_TAG) == "always":
                return problems  # without knowing the inputs nothing can be called up to date
    return problems


def _refresh_asset(
    defs: dg.Definitions, instance: dg.DagsterInstance, key: dg.AssetKey, console: Console
) -> list[str]:
    name = key.to_user_string()
    to_do, blocked = _due_and_blocked(defs, instance, key)
    problems = []
    if blocked:
        keys = ", ".join(partition for partition in blocked[:3] if partition is not None)
        more = f" and {len(blocked) - 3} more" if len(blocked) > 3 else ""
        problems.append(f"{name}: waits for a missing input: {keys or 'all'}{more}")
    if not to_do:
        console.print(f"[dim]{name}: {'waits' if blocked else 'up to date'}[/dim]")
        return problems
    started = time.monotonic()
    console.print(f"[bold]{name}[/bold]" + ("" if to_do == [None] else f": {len(to_do)} to do"))
    for tags in _run_tags(defs, instance, key, to_do):
        job = defs.resolve_implicit_global_asset_job_def()
        result = job.execute_in_process(
            instance=instance,
            asset_selection=[key],
            tags=tags,
            run_config={"loggers": {"console": {}}},
            raise_on_error=False,
        )
        problems += [
            f"{name}: {_reason(event.step_failure_data)}"
            for event in result.get_step_failure_events()
        ]
    console.print(f"{name}: {time.monotonic() - started:.1f} s")
    return problems


def _due_and_blocked(
    defs: dg.Definitions, instance: dg.DagsterInstance, key: dg.AssetKey
) -> tuple[list[Partition], list[Partition]]:
    """The partitions to materialize, and those that wait for a missing input."""
    graph = defs.resolve_asset_graph()
    if graph.get(key).tags.get(REFRESH_TAG) == "always":
        return [None], []
    judged = due(instance, graph, only={key})[key]
    return list(judged.ready), sorted(judged.waiting, key=str)


def _run_tags(
    defs: dg.Definitions, instance: dg.DagsterInstance, key: dg.AssetKey, to_do: list[Partition]
) -> Iterator[dict[str, str]]:
    """One run a range: neighbouring partitions that share all dimensions but the last."""
    definition = defs.resolve_asset_graph().get(key).partitions_def
    if definition is None:
        yield {}
        return
    order = definition.get_partition_keys(dynamic_partitions_store=instance)
    place = {partition: number for number, partition in enumerate(order)}
    ranges: list[list[str]] = []
    for partition in sorted((p for p in to_do if p is not None), key=place.__getitem__):
        last = ranges[-1][-1] if ranges else None
        if (
            last is not None
            and place[partition] == place[last] + 1
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


def _reason(failure: StepFailureData) -> str:
    """What went wrong, in the words of whoever raised it."""
    if failure.user_failure_data is not None:
        return str(failure.user_failure_data.description)
    error = failure.error
    while error is not None and error.cause is not None:
        error = error.cause
    return error.message.strip() if error is not None else "failed"


def main() -> int:
    """Refresh the cohort and store that the environment names; print the report's tables."""
    argparse.ArgumentParser(
        prog="python -m nic_assets.operations.refresh", description=__doc__
    ).parse_args()
    console = Console(stderr=True)
    read_environment()
    try:
        from nic_assets.definitions import defs  # the environment decides what they declare
    except (CohortError, dg.DagsterInvalidDefinitionError) as error:
        console.print(str(error), style="red", markup=False)
        return 2
    with dg.DagsterInstance.get() as instance:
        set_gpu_slots(instance)
        for finding in release(instance):  # else a killed refresh's slot would be waited for
            console.print(f"[yellow]{finding.what}, {finding.remedy}: {finding.where}[/yellow]")
        problems = refresh(defs, instance, console)
    reports = Store.from_environment().evaluation_report
    for name, table in ((RESULTS, results_table), (COMPARISONS, comparisons_table)):
        if (reports / name).exists() and (rows := pl.read_parquet(reports / name)).height:
            Console(width=max(120, console.width)).print(table(rows))
    for problem in problems:
        console.print(f"[red]{problem}[/red]")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

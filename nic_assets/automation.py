"""What is done without being asked: looking for new inputs, and making what is missing or stale.

``watch_inputs`` looks at the files every minute (``automation.poll_seconds``) and asks for ``slide_index``
when they have changed; that asset finds out what is new. ``rebuild`` asks, while the cohort's hours
are open, for whatever is missing or stale by Dagster's own rule, in the order of the graph.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, TypeAlias

import dagster as dg
from dagster._core.definitions.asset_key import AssetOrCheckKey
from dagster._core.definitions.declarative_automation.automation_condition import (
    BuiltinAutomationCondition,
)
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from dagster._utils.schedules import is_valid_cron_schedule

from nic_assets.assets.inputs import ScanConfig
from nic_assets.orchestration.staleness import Graph, StaleAsset, due
from nic_assets.tags import REFRESH_TAG
from nic_core.cohort import Automation, Cohort, CohortError
from nic_core.cohort.scan import scan_files
from nic_core.steps import digest, read_file_snapshot
from nic_core.store import Store

AC = dg.AutomationCondition
Condition: TypeAlias = dg.AutomationCondition[dg.AssetKey]


class Due(dg.AutomationCondition[dg.AssetKey]):
    """Missing or stale, and all its inputs are there.

    With ``above`` also: nothing above it is still to be made, or it would be made twice.
    """

    def __init__(self, *, above: bool) -> None:
        self.above = above

    @property
    def name(self) -> str:
        return "due, nothing above it to be made" if self.above else "due"

    @property
    def description(self) -> str:
        return f"Missing or stale, its inputs are there: {self.name}"

    def evaluate(
        self, context: dg.AutomationContext[dg.AssetKey]
    ) -> dg.AutomationResult[dg.AssetKey]:
        view = context.asset_graph_view
        judged = _of_tick(view.instance, view.asset_graph, view.effective_dt)[context.key]
        found = judged.ready if self.above else judged.ready | judged.early
        definition = view.asset_graph.get(context.key).partitions_def
        if definition is None:
            everything = view.get_full_subset(key=context.key)
            subset = everything if found else view.get_empty_subset(key=context.key)
        else:
            subset = view.get_subset_from_partition_keys(
                context.key, definition, {key for key in found if key is not None}
            )
        return dg.AutomationResult(context, context.candidate_subset.compute_intersection(subset))


@lru_cache(maxsize=1)
def _of_tick(
    instance: dg.DagsterInstance, graph: Graph, tick: datetime
) -> dict[dg.AssetKey, StaleAsset]:
    """All assets of one tick are judged by the same reading of the events."""
    return due(instance, graph)


def rebuild(hours: Automation) -> Condition:
    """Ask for what is due, layer by layer: once in the open hours, and once more for every change
    of what it is made from. What has failed is tried again when they next open."""
    asked = _asked(hours)
    if hours.closes is None:
        return ~asked & ~AC.in_progress() & Due(above=True)
    closes = AC.cron_tick_passed(hours.closes, hours.timezone)
    within = _opens(hours).since(closes).with_label("within the hours")
    return within & ~asked & ~AC.in_progress() & Due(above=True)


def eager(hours: Automation) -> Condition:
    """Ask for what sums up a layer as soon as that has changed, at any hour: it takes a second,
    and what depends on it shows as stale only then."""
    waits = AC.any_deps_in_progress()
    return ~_asked(hours) & ~AC.in_progress() & ~waits & Due(above=False)


def rescan(hours: Automation) -> dg.AutomationCondition[AssetOrCheckKey]:
    """Look at every input when the hours open, also at those that nobody watches."""
    return _opens(hours) & ~AC.in_progress()


def _opens(hours: Automation) -> BuiltinAutomationCondition[AssetOrCheckKey]:
    return AC.cron_tick_passed(hours.opens, hours.timezone)


def _asked(hours: Automation) -> BuiltinAutomationCondition[dg.AssetKey]:
    news = AC.any_deps_match(AC.data_version_changed()) | AC.code_version_changed()
    return AC.newly_requested().since(_opens(hours) | news).with_label("asked for already")


def automate(
    assets: Sequence[dg.AssetsDefinition], hours: Automation | None
) -> Sequence[dg.AssetsDefinition]:
    """Give every asset its condition.

    Raises
    ------
    CohortError
        A cron schedule that says no time.
    """
    if hours is None:
        return assets
    for name, cron in (("opens", hours.opens), ("closes", hours.closes)):
        if cron is not None and not is_valid_cron_schedule(cron):
            raise CohortError(f"automation.{name}: '{cron}' is no cron schedule")
    conditions: Mapping[str, dg.AutomationCondition[Any]] = {
        "always": rescan(hours),
        "eager": eager(hours),
    }

    def with_condition(spec: dg.AssetSpec) -> dg.AssetSpec:
        condition = conditions.get(spec.tags.get(REFRESH_TAG, ""), rebuild(hours))
        return spec.replace_attributes(automation_condition=condition)

    return dg.map_asset_specs(with_condition, assets)


def study_sensors(
    cohort: Cohort, make_slide_index: UnresolvedAssetJobDefinition
) -> Sequence[dg.SensorDefinition]:
    """Both sensors, running from the start; none for a cohort with ``automation: null``."""
    if cohort.automation is None:
        return []
    rebuilding = dg.AutomationConditionSensorDefinition(
        "rebuild",
        target=dg.AssetSelection.all(),
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=cohort.automation.poll_seconds,
        # our condition is code of this project
        use_user_code_server=True,
        description="Makes what is missing or stale, within the cohort's hours.",
    )
    return [watch_inputs(cohort, cohort.automation, make_slide_index), rebuilding]


def watch_inputs(
    cohort: Cohort, hours: Automation, make_slide_index: UnresolvedAssetJobDefinition
) -> dg.SensorDefinition:
    """The sensor that looks at the files."""

    @dg.sensor(
        job=make_slide_index,
        minimum_interval_seconds=hours.poll_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Looks at the slides and tables, one stat a file; asks for slide_index when "
        "two looks in a row found the same change.",
    )
    def watch_inputs(
        context: dg.SensorEvaluationContext, store: dg.ResourceParam[Store]
    ) -> dg.RunRequest | dg.SkipReason:
        snapshot = read_file_snapshot(store)
        try:
            scan = scan_files(cohort, snapshot, json.loads(context.cursor or "[]"))
        except CohortError as error:
            return dg.SkipReason(str(error))
        context.update_cursor(json.dumps(scan.fingerprints))
        if not scan.stable:
            written = f", {len(scan.changing)} still being written" if scan.changing else ""
            return dg.SkipReason(f"nothing new among {scan.files} files{written}")
        return dg.RunRequest(
            # once for what differs from what was taken in, however often it is seen
            run_key=digest(snapshot.rows(), scan.stable, scan.fingerprints),
            run_config=dg.RunConfig(
                ops={"slide_index": ScanConfig(ignore_paths=list(scan.changing), rehash=False)}
            ),
        )

    return watch_inputs

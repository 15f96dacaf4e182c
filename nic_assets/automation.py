"""Automation: find new inputs, and materialize what is missing or stale.

The sensor ``watch_inputs`` scans the input files every minute (``automation.poll_seconds``) and
requests ``slide_index`` when they have changed; that asset records the new versions. The sensor
``rebuild`` evaluates the automation conditions of this module. Within the cohort's hours they
request every missing or stale partition, upstream assets first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import dagster as dg

from nic_assets.assets.inputs import ScanConfig
from nic_assets.orchestration.staleness import StaleAsset, stale_assets
from nic_assets.tags import REFRESH_TAG
from nic_core.cohort import Automation, Cohort, CohortError
from nic_core.cohort.scan import scan_files
from nic_core.store import Store

if TYPE_CHECKING:
    from nic_assets.orchestration.internals import AssetGraph, AssetJob

AC = dg.AutomationCondition
Condition: TypeAlias = dg.AutomationCondition[dg.AssetKey]


class ReadyToMaterialize(dg.AutomationCondition[dg.AssetKey]):
    """True for partitions that are missing or stale and whose inputs exist.

    With ``wait_for_upstream``, true only if also no upstream partition remains to be materialized.
    """

    def __init__(self, *, wait_for_upstream: bool) -> None:
        self.wait_for_upstream = wait_for_upstream

    @property
    def name(self) -> str:
        return "missing or stale"

    @property
    def description(self) -> str:
        upstream = ", and no upstream partition remains to be materialized"
        return f"Missing or stale, all inputs exist{upstream if self.wait_for_upstream else ''}"

    def evaluate(
        self, context: dg.AutomationContext[dg.AssetKey]
    ) -> dg.AutomationResult[dg.AssetKey]:
        view = context.asset_graph_view
        stale = _stale_at(view.effective_dt, view.instance, view.asset_graph)[context.key]
        found = stale.ready if self.wait_for_upstream else stale.ready | stale.blocked_by_upstream
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
def _stale_at(
    tick: datetime, instance: dg.DagsterInstance, graph: AssetGraph
) -> dict[dg.AssetKey, StaleAsset]:
    """Return the stale assets of a tick, read once for the conditions of all assets."""
    return stale_assets(instance, graph)


def materialize_within_hours(hours: Automation) -> Condition:
    """Request missing and stale partitions within the hours, upstream assets first.

    A partition is requested once per opening of the hours, and again whenever an input changes.
    A failed partition is requested again at the next opening.
    """
    ready = ReadyToMaterialize(wait_for_upstream=True)
    if hours.closes is None:
        return ~_requested_already(hours) & ~AC.in_progress() & ready
    closes = AC.cron_tick_passed(hours.closes, hours.timezone)
    within_hours = _hours_open(hours).since(closes).with_label("within the hours")
    return within_hours & ~_requested_already(hours) & ~AC.in_progress() & ready


def materialize_after_inputs(hours: Automation) -> Condition:
    """Request stale summaries of a layer right after their inputs change, at any hour.

    A summary takes a second, and assets downstream of it become stale only with its new version.
    """
    ready = ReadyToMaterialize(wait_for_upstream=False)
    return ~_requested_already(hours) & ~AC.in_progress() & ~AC.any_deps_in_progress() & ready


def materialize_hourly(hours: Automation) -> Condition:
    """Request what is missing or stale at any hour, and again every hour after a failure.

    It takes seconds and depends on a server that may not answer.
    """
    retry = AC.cron_tick_passed("0 * * * *", hours.timezone) | _inputs_changed()
    requested = AC.newly_requested().since(retry).with_label("already requested")
    ready = ReadyToMaterialize(wait_for_upstream=True)
    return ~requested & ~AC.in_progress() & ~AC.any_deps_in_progress() & ready


def materialize_on_opening(hours: Automation) -> dg.AutomationCondition[dg.AssetOrCheckKey]:
    """Request an asset at each opening of the hours: it reads inputs that no sensor watches."""
    return _hours_open(hours) & ~AC.in_progress()


def _hours_open(hours: Automation) -> dg.AutomationCondition[dg.AssetOrCheckKey]:
    return AC.cron_tick_passed(hours.opens, hours.timezone)


def _requested_already(hours: Automation) -> Condition:
    return (
        AC.newly_requested()
        .since(_hours_open(hours) | _inputs_changed())
        .with_label("already requested")
    )


def _inputs_changed() -> Condition:
    return AC.any_deps_match(AC.data_version_changed()) | AC.code_version_changed()


def automate(
    assets: Sequence[dg.AssetsDefinition], hours: Automation | None
) -> Sequence[dg.AssetsDefinition]:
    """Add to every asset its automation condition; without ``hours`` return the assets unchanged.

    Raises
    ------
    CohortError
        A cron schedule is invalid.
    """
    if hours is None:
        return assets
    for name, cron in (("opens", hours.opens), ("closes", hours.closes)):
        if cron is not None:
            try:
                dg.ScheduleDefinition(name=name, cron_schedule=cron, job_name="slide_index")
            except dg.DagsterInvalidDefinitionError as error:
                raise CohortError(
                    f"automation.{name}: '{cron}' is not a cron schedule; "
                    "write it like '0 20 * * *'"
                ) from error
    conditions: Mapping[str, dg.AutomationCondition[Any]] = {
        "always": materialize_on_opening(hours),
        "eager": materialize_after_inputs(hours),
        "hourly": materialize_hourly(hours),
    }

    def with_condition(spec: dg.AssetSpec) -> dg.AssetSpec:
        tag = spec.tags.get(REFRESH_TAG, "")
        return spec.replace_attributes(
            automation_condition=conditions.get(tag, materialize_within_hours(hours))
        )

    return dg.map_asset_specs(with_condition, assets)


def study_sensors(cohort: Cohort, make_slide_index: AssetJob) -> Sequence[dg.SensorDefinition]:
    """Return both sensors, which run from the start; none with ``automation: null``."""
    if cohort.automation is None:
        return []
    rebuild = dg.AutomationConditionSensorDefinition(
        "rebuild",
        target=dg.AssetSelection.all(),
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=cohort.automation.poll_seconds,
        # Dagster's own process cannot evaluate a condition that is defined in this package
        use_user_code_server=True,
        description="Materializes missing and stale partitions within the cohort's hours.",
    )
    return [watch_inputs(cohort, cohort.automation, make_slide_index), rebuild]


def watch_inputs(
    cohort: Cohort, hours: Automation, make_slide_index: AssetJob
) -> dg.SensorDefinition:
    """Return the sensor that scans the input files and requests ``slide_index``."""

    @dg.sensor(
        job=make_slide_index,
        minimum_interval_seconds=hours.poll_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Scans slides, masks, tables and initial weights (one stat per file) and "
        "requests slide_index when two scans in a row find the same change.",
    )
    def watch_inputs(
        context: dg.SensorEvaluationContext, store: dg.ResourceParam[Store]
    ) -> dg.RunRequest | dg.SkipReason:
        from nic_core.steps import digest, initial_weight_files, read_file_snapshot

        snapshot = read_file_snapshot(store)
        try:
            scan = scan_files(
                cohort,
                snapshot,
                json.loads(context.cursor or "[]"),
                further=initial_weight_files(cohort, store),
            )
        except CohortError as error:
            return dg.SkipReason(str(error))
        context.update_cursor(json.dumps(scan.fingerprints))
        if not scan.stable:
            waiting = f"{len(scan.changing)} may still be being written" if scan.changing else ""
            return dg.SkipReason(f"{scan.files} files scanned, {waiting or 'no change'}")
        return dg.RunRequest(
            # one run per difference from the snapshot, even if a tick is repeated
            run_key=digest(snapshot.rows(), scan.stable, scan.fingerprints),
            run_config=dg.RunConfig(
                ops={"slide_index": ScanConfig(ignore_paths=list(scan.changing), rehash=False)}
            ),
        )

    return watch_inputs

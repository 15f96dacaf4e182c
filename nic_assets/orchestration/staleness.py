"""Find the missing and stale partitions of all assets at once.

The rule is Dagster's own: code versions, data versions and the provenance of each
materialization. Dagster applies the rule to one partition at a time, with several queries each,
and ignores dependencies on 100 partitions or more. This module reads each materialization once
and keeps it in memory: ten thousand partitions take half a second, and a summary of a cohort
becomes stale with any of its slides.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeAlias

import dagster as dg

from nic_assets.orchestration.internals import DATA_VERSION_TAG, records_id
from nic_assets.tags import EARLIER_PARTITIONS, INPUTS_TAG

if TYPE_CHECKING:
    from nic_assets.orchestration.internals import AssetGraph

Partition: TypeAlias = str | None
Parents: TypeAlias = Mapping[dg.AssetKey, tuple[Partition, ...]]
Status: TypeAlias = Literal["FRESH", "STALE", "MISSING"]

_PAGE = 1000
# Databases assign storage ids before they commit: an event may appear after one with a larger id.
_OVERLAP = 200


@dataclass(frozen=True)
class StaleAsset:
    """The missing or stale partitions of one asset; an unpartitioned asset has partition None.

    Attributes
    ----------
    ready
        All inputs exist and no upstream partition remains to be materialized.
    blocked_by_upstream
        All inputs exist, but an upstream partition, or one of the same asset that this one is made
        from, remains to be materialized. Materialized now,
        these partitions would be stale again right after it.
    missing_inputs
        At least one input does not exist.
    """

    ready: frozenset[Partition]
    blocked_by_upstream: frozenset[Partition]
    missing_inputs: frozenset[Partition]


@dataclass
class _Events:
    """The materializations of one asset, by partition."""

    versions: dict[Partition, list[tuple[int, str]]] = field(
        default_factory=lambda: defaultdict(list)
    )  # (storage id, data version), oldest first
    provenance: dict[Partition, dg.DataProvenance | None] = field(default_factory=dict)
    last: int = 0

    def add(self, record: dg.EventLogRecord) -> None:
        known = self.versions[record.partition_key]
        materialization = record.asset_materialization
        tags = (materialization.tags if materialization is not None else None) or {}
        event = (record.storage_id, tags.get(DATA_VERSION_TAG, ""))
        if event in known:
            return
        insort(known, event)
        if known[-1] == event:
            self.provenance[record.partition_key] = dg.DataProvenance.from_tags(tags)
        self.last = max(self.last, record.storage_id)

    def version(self, partition: Partition, until: int | None = None) -> str | None:
        """Return the latest data version, or the latest up to event ``until``; None without one."""
        known = self.versions.get(partition, [])
        end = len(known) if until is None else bisect_right(known, (until, "\U0010ffff"))
        return known[end - 1][1] if end else None

    def latest(self, partition: Partition) -> int:
        """Return the storage id of the latest event; 0 without one."""
        known = self.versions.get(partition)
        return known[-1][0] if known else 0


class MaterializationHistory:
    """The data versions and provenance of all materializations of an instance, in memory."""

    def __init__(self) -> None:
        self._events: dict[dg.AssetKey, _Events] = defaultdict(_Events)
        self._parents: dict[dg.AssetKey, dict[Partition, Parents]] = defaultdict(dict)
        self._graph: AssetGraph | None = None
        self._wiped: dict[dg.AssetKey, float | None] = {}

    def update(self, instance: dg.DagsterInstance, graph: AssetGraph) -> None:
        """Read the materializations that were recorded since the last call."""
        if graph is not self._graph:
            self._graph = graph
            self._parents.clear()
        keys = list(graph.get_all_asset_keys())
        entries = {
            record.asset_entry.asset_key: record.asset_entry
            for record in instance.get_asset_records(keys)
        }
        for key in keys:
            entry = entries.get(key)
            if entry is None:  # never materialized, or wiped and not materialized since
                self._events.pop(key, None)
                continue
            wiped = entry.asset_details.last_wipe_timestamp if entry.asset_details else None
            if wiped != self._wiped.setdefault(key, wiped):
                self._events.pop(key, None)
                self._wiped[key] = wiped
            events = self._events[key]
            last = entry.last_materialization_storage_id
            if last is None or last == events.last:
                continue
            after = max(0, events.last - _OVERLAP)
            while True:
                page = instance.fetch_materializations(
                    dg.AssetRecordsFilter(asset_key=key, after_storage_id=after),
                    limit=_PAGE,
                    ascending=True,
                ).records
                for record in page:
                    events.add(record)
                if len(page) < _PAGE:
                    break
                after = page[-1].storage_id

    def status(self, graph: AssetGraph, key: dg.AssetKey, partition: Partition) -> Status:
        """Return the staleness of a partition by Dagster's rule.

        Unlike Dagster, an external asset without a recorded version is MISSING.
        """
        if self.is_missing(key, partition):
            return "MISSING"
        if graph.get(key).is_external:
            return "FRESH"
        return "STALE" if self._is_stale(graph, key, partition) else "FRESH"

    def is_missing(self, key: dg.AssetKey, partition: Partition) -> bool:
        """Return whether a partition was never materialized or, if external, never scanned.

        An asset made from an input without a version would become stale with the first scan.
        """
        return self._events[key].version(partition) is None

    def _is_stale(self, graph: AssetGraph, key: dg.AssetKey, partition: Partition) -> bool:
        node, events = graph.get(key), self._events[key]
        provenance = events.provenance[partition]
        parents = self.parents(graph, key, partition)
        # reported by hand: assumed to be made from the inputs of that moment
        if provenance is None:
            made = events.latest(partition)
            return any(
                self._events[parent].latest(p) > made and not graph.get(parent).is_external
                for parent, partitions in parents.items()
                for p in partitions
            )
        if node.code_version and node.code_version != provenance.code_version:
            return True
        if set(provenance.input_data_versions) - set(node.parent_keys):
            return True
        return any(
            not provenance.has_input_asset(parent)
            or any(self._has_changed(parent, p, provenance) for p in partitions)
            for parent, partitions in parents.items()
            if partitions
        )

    def _has_changed(
        self, parent: dg.AssetKey, partition: Partition, made_from: dg.DataProvenance
    ) -> bool:
        """Return whether the version of an input differs from the one in the provenance."""
        events = self._events[parent]
        now = events.version(partition)
        if partition is None:
            return now is not None and made_from.input_data_versions[parent] != dg.DataVersion(now)
        read = made_from.input_storage_ids[parent] or 0
        return events.latest(partition) > read and events.version(partition, read) != now

    def parents(self, graph: AssetGraph, key: dg.AssetKey, partition: Partition) -> Parents:
        """Return the upstream partitions of a partition, by asset."""
        known = self._parents[key]
        if partition not in known:
            found: dict[dg.AssetKey, list[Partition]] = {
                parent: [] for parent in graph.get(key).parent_keys
            }
            for each in graph.get_parents_partitions(key, partition).parent_partitions:
                found[each.asset_key].append(each.partition_key)
            parents = {parent: tuple(items) for parent, items in found.items()}
            if INPUTS_TAG in graph.get(key).tags:
                return parents  # not kept: the layer that it summarizes grows
            known[partition] = parents
        return known[partition]

    def latest_event(self, partitions: Parents) -> int:
        """Return the storage id of the latest event of any of these partitions; 0 without one."""
        return max(
            (self._events[key].latest(p) for key, items in partitions.items() for p in items),
            default=0,
        )


@lru_cache(maxsize=4)
def _history(records: str) -> MaterializationHistory:
    return MaterializationHistory()


def materialization_history(instance: dg.DagsterInstance) -> MaterializationHistory:
    """Return this process's history of an instance, shared by all objects on its records."""
    return _history(records_id(instance))


def stale_assets(
    instance: dg.DagsterInstance,
    graph: AssetGraph,
    only: Collection[dg.AssetKey] | None = None,
) -> dict[dg.AssetKey, StaleAsset]:
    """Return the missing and stale partitions of every asset, or of the assets in ``only``.

    An asset tagged with :data:`~nic_assets.tags.PARTIAL_INPUTS` needs at least one partition of
    each input, any other asset needs all. An upstream partition that failed since its own inputs
    last changed does not block the partitions downstream of it. With ``only``, no asset is
    blocked by another one.
    """
    history = materialization_history(instance)
    history.update(instance, graph)
    found: dict[dg.AssetKey, StaleAsset] = {}
    # partitions that are materialized now or have to be, including those further upstream
    pending: dict[dg.AssetKey, set[Partition]] = defaultdict(set)
    with dg.partition_loading_context(dynamic_partitions_store=instance):
        for key in graph.toposorted_asset_keys:
            node = graph.get(key)
            if node.is_external or (only is not None and key not in only):
                continue
            partitions = node.partitions_def.get_partition_keys() if node.partitions_def else [None]
            enough = any if INPUTS_TAG in node.tags else all
            stale: set[Partition] = set()
            missing_inputs: set[Partition] = set()
            blocked: set[Partition] = set()
            for partition in partitions:
                parents = history.parents(graph, key, partition)
                if any(p in pending[parent] for parent, items in parents.items() for p in items):
                    blocked.add(partition)
                if history.status(graph, key, partition) == "FRESH":
                    continue
                inputs_exist = all(
                    enough(not history.is_missing(parent, p) for p in items)
                    for parent, items in parents.items()
                )
                (stale if inputs_exist else missing_inputs).add(partition)
            running, failed = (
                (set(), set()) if only is not None else _attempts(instance, graph, history, key)
            )
            unmade = (stale - failed) | missing_inputs | running
            blocked |= _later(node.metadata.get(EARLIER_PARTITIONS, {}), unmade | blocked)
            found[key] = StaleAsset(
                ready=frozenset(stale - blocked),
                blocked_by_upstream=frozenset(stale & blocked),
                missing_inputs=frozenset(missing_inputs),
            )
            if only is None:
                pending[key] = (stale - failed) | blocked | running
    return found


def _later(earlier: Mapping[str, str], unmade: Collection[Partition]) -> set[Partition]:
    """Return the partitions that are made, in one or more steps, from those in ``unmade``."""
    later: set[Partition] = set()
    for partition in earlier:
        start = earlier.get(partition)
        while start is not None and start not in unmade:
            start = earlier.get(start)
        if start is not None:
            later.add(partition)
    return later


def _attempts(
    instance: dg.DagsterInstance,
    graph: AssetGraph,
    history: MaterializationHistory,
    key: dg.AssetKey,
) -> tuple[set[Partition], set[Partition]]:
    """Return the partitions in unfinished runs, and those failed since their inputs changed."""
    storage = instance.event_log_storage
    tried = storage.get_latest_asset_partition_materialization_attempts_without_materializations(
        key
    )
    runs = {run: instance.get_run_by_id(run) for run in {run for run, _ in tried.values()}}
    finished = {run for run, record in runs.items() if record is None or record.is_finished}
    running = {partition for partition, (run, _) in tried.items() if run not in finished}
    failed = {
        partition
        for partition, (run, event) in tried.items()
        if run in finished and event > history.latest_event(history.parents(graph, key, partition))
    }
    return set(running), set(failed)

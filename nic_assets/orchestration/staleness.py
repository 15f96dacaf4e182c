"""What is missing or stale, of all partitions of a study at once.

The rule is Dagster's own: code versions, data versions and the provenance of each
materialization. Dagster applies it a partition at a time, with several queries each, and not to
an asset that reads 100 partitions or more; here every event is read once and kept, so ten
thousand partitions are judged in half a second and a cohort by each of its slides.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import dagster as dg
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
from dagster._core.definitions.data_version import (
    DataProvenance,
    DataVersion,
    StaleStatus,
    extract_data_provenance_from_entry,
    extract_data_version_from_entry,
)
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.storage.dagster_run import FINISHED_STATUSES
from dagster._core.storage.runs import SqlRunStorage

from nic_assets.tags import INPUTS_TAG

Graph: TypeAlias = BaseAssetGraph[Any]
Partition: TypeAlias = str | None
Parents: TypeAlias = Mapping[dg.AssetKey, tuple[Partition, ...]]

_PAGE = 1000
# ids are dealt before their transactions are done: an event may appear behind a later one
_OVERLAP = 200


@dataclass(frozen=True)
class StaleAsset:
    """What is to be done for one asset.

    Attributes
    ----------
    ready
        Missing or stale, with all it needs, and nothing above it still to be done.
    early
        The same, but something above it is still to be done: it would be made twice.
    waiting
        Missing or stale, and an input is missing.
    """

    ready: frozenset[Partition]
    early: frozenset[Partition]
    waiting: frozenset[Partition]


@dataclass
class _Events:
    """The materializations of one asset, by partition."""

    versions: dict[Partition, list[tuple[int, str]]] = field(
        default_factory=lambda: defaultdict(list)
    )  # (storage id, data version), oldest first
    provenance: dict[Partition, DataProvenance | None] = field(default_factory=dict)
    last: int = 0

    def add(self, record: dg.EventLogRecord) -> None:
        known = self.versions[record.partition_key]
        version = extract_data_version_from_entry(record.event_log_entry)
        event = (record.storage_id, version.value if version else "")
        if event in known:
            return
        insort(known, event)
        if known[-1] == event:
            self.provenance[record.partition_key] = extract_data_provenance_from_entry(
                record.event_log_entry
            )
        self.last = max(self.last, record.storage_id)

    def version(self, partition: Partition, until: int | None = None) -> str | None:
        """The data version, now or when ``until`` was the last event; None where there was none."""
        known = self.versions.get(partition, [])
        end = len(known) if until is None else bisect_right(known, (until, "\U0010ffff"))
        return known[end - 1][1] if end else None

    def latest(self, partition: Partition) -> int:
        known = self.versions.get(partition)
        return known[-1][0] if known else 0


class MaterializationHistory:
    """All materializations of an instance as far as staleness asks for them, kept up to date."""

    def __init__(self) -> None:
        self._events: dict[dg.AssetKey, _Events] = defaultdict(_Events)
        self._parents: dict[dg.AssetKey, dict[Partition, Parents]] = defaultdict(dict)
        self._graph: Graph | None = None
        self._wiped: dict[dg.AssetKey, float | None] = {}

    def read(self, instance: dg.DagsterInstance, graph: Graph) -> None:
        """Take in what was recorded since the last call."""
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
            if entry is None:  # never made, or wiped and not made since
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

    def status(self, graph: Graph, key: dg.AssetKey, partition: Partition) -> StaleStatus:
        """Fresh, stale or missing, by Dagster's rule (which calls no external asset missing)."""
        if self.is_missing(key, partition):
            return StaleStatus.MISSING
        if graph.get(key).is_external:
            return StaleStatus.FRESH
        stale = self._is_stale(graph, key, partition)
        return StaleStatus.STALE if stale else StaleStatus.FRESH

    def is_missing(self, key: dg.AssetKey, partition: Partition) -> bool:
        """Never made; or an input nobody has looked at yet: its first version would be news."""
        return self._events[key].version(partition) is None

    def _is_stale(self, graph: Graph, key: dg.AssetKey, partition: Partition) -> bool:
        node, events = graph.get(key), self._events[key]
        provenance = events.provenance[partition]
        parents = self.parents(graph, key, partition)
        if provenance is None:  # reported by hand: it is of the inputs that were there
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
            or any(self._changed(parent, p, provenance) for p in partitions)
            for parent, partitions in parents.items()
            if partitions
        )

    def _changed(self, parent: dg.AssetKey, partition: Partition, made: DataProvenance) -> bool:
        """Whether an input's version differs from the one that was read."""
        events = self._events[parent]
        now = events.version(partition)
        if partition is None:
            return now is not None and made.input_data_versions[parent] != DataVersion(now)
        read = made.input_storage_ids[parent] or 0
        return events.latest(partition) > read and events.version(partition, read) != now

    def parents(self, graph: Graph, key: dg.AssetKey, partition: Partition) -> Parents:
        """The partitions that one partition is made from, by asset."""
        known = self._parents[key]
        if partition not in known:
            found: dict[dg.AssetKey, list[Partition]] = {
                parent: [] for parent in graph.get(key).parent_keys
            }
            for each in graph.get_parents_partitions(key, partition).parent_partitions:
                found[each.asset_key].append(each.partition_key)
            parents = {parent: tuple(items) for parent, items in found.items()}
            if INPUTS_TAG in graph.get(key).tags:
                return parents  # of a whole layer, which grows
            known[partition] = parents
        return known[partition]

    def newest(self, parents: Parents) -> int:
        """Storage id of the last event of any of these partitions."""
        return max(
            (
                self._events[key].latest(p)
                for key, partitions in parents.items()
                for p in partitions
            ),
            default=0,
        )


@lru_cache(maxsize=4)
def _ledger(storage: str) -> MaterializationHistory:
    return MaterializationHistory()


def ledger(instance: dg.DagsterInstance) -> MaterializationHistory:
    """The instance's ledger; one a process and storage, whichever object stands for it."""
    storage = instance.run_storage
    if not isinstance(storage, SqlRunStorage):
        raise TypeError(f"{type(storage).__name__}: only storages in a database are known")
    return _ledger(storage.get_run_storage_id())


def due(
    instance: dg.DagsterInstance,
    graph: Graph,
    only: Collection[dg.AssetKey] | None = None,
) -> dict[dg.AssetKey, StaleAsset]:
    """What is to be done, for every materializable asset that has inputs (or those of ``only``).

    An asset that gathers a layer (:data:`~nic_assets.assets.inputs.PARTIAL_INPUTS`) needs one partition of
    each parent, any other needs all. What has failed since its inputs last changed holds nothing
    below it back.
    """
    book = ledger(instance)
    book.read(instance, graph)
    found: dict[dg.AssetKey, StaleAsset] = {}
    busy: dict[dg.AssetKey, set[Partition]] = defaultdict(set)
    with partition_loading_context(dynamic_partitions_store=instance):
        for key in graph.toposorted_asset_keys:
            node = graph.get(key)
            if node.is_external or (only is not None and key not in only):
                continue
            partitions = node.partitions_def.get_partition_keys() if node.partitions_def else [None]
            enough = any if INPUTS_TAG in node.tags else all
            to_do: set[Partition] = set()
            waiting: set[Partition] = set()
            below: set[Partition] = set()
            for partition in partitions:
                parents = book.parents(graph, key, partition)
                if any(p in busy[parent] for parent, items in parents.items() for p in items):
                    below.add(partition)
                if book.status(graph, key, partition) is StaleStatus.FRESH:
                    continue
                there = all(
                    enough(not book.is_missing(parent, p) for p in items)
                    for parent, items in parents.items()
                )
                (to_do if there else waiting).add(partition)
            found[key] = StaleAsset(
                ready=frozenset(to_do - below),
                early=frozenset(to_do & below),
                waiting=frozenset(waiting),
            )
            if only is None:
                running, failed = _attempts(instance, graph, book, key)
                busy[key] = (to_do - failed) | below | running
    return found


def _attempts(
    instance: dg.DagsterInstance, graph: Graph, book: MaterializationHistory, key: dg.AssetKey
) -> tuple[set[Partition], set[Partition]]:
    """The partitions that a run is at, and those that failed since their inputs changed."""
    storage = instance.event_log_storage
    tried = storage.get_latest_asset_partition_materialization_attempts_without_materializations(
        key
    )
    finished = {
        run: record is None or record.dagster_run.status in FINISHED_STATUSES
        for run in {run for run, _ in tried.values()}
        for record in [instance.get_run_record_by_id(run)]
    }
    running = {partition for partition, (run, _) in tried.items() if not finished[run]}
    failed = {
        partition
        for partition, (run, event) in tried.items()
        if finished[run] and event > book.newest(book.parents(graph, key, partition))
    }
    return set(running), set(failed)

"""Batches: assets whose runs materialize many partitions, each with its own record.

A run takes seconds to start and a slide milliseconds to record, so a run takes many partitions.
Dagster gives all partitions of a run one data version and one outcome. This module does more:

* Each partition gets its own data version and provenance. A slide whose product did not change
  makes nothing downstream stale.
* A bad slide fails alone. The others are materialized, the run fails with a list of the bad ones,
  and a retry only makes those.
* A partition is recorded as soon as it is made. A run that is killed loses at most one slide, and
  neither its retry nor a concurrent run for the same partitions makes the others again.
* Checks cover all partitions (:mod:`nic_assets.orchestration.partition_checks`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import dagster as dg

from nic_assets.orchestration.executors import batch_policy
from nic_assets.orchestration.internals import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    MULTIDIMENSIONAL_PARTITION_PREFIX,
    RESUME_RETRY_TAG,
    RETRY_NUMBER_TAG,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)
from nic_assets.orchestration.metadata import OWNERS
from nic_assets.orchestration.mistakes import is_mistake, step_failure
from nic_assets.orchestration.partition_checks import (
    Check,
    Results,
    publish_checks,
    results_metadata,
)
from nic_assets.orchestration.retries import is_transient, retried_asset
from nic_assets.tags import HOST_TAG, RUN_OUTPUT_TAG
from nic_core.parallel import ahead
from nic_core.store import exclusive_lock

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")

# records among which the latest of a partition is looked for: each concurrent run may add one
# record of its output
_LATEST = 20

Events: TypeAlias = Iterator[dg.MaterializeResult[None] | dg.Output[None]]
"""What the body of an asset yields."""


@dataclass(frozen=True)
class Product:
    """The product of one partition, as its materialization records it.

    Attributes
    ----------
    version
        Data version: equal for equal content.
    metadata
        Shown in the UI.
    checks
        The result of every check that the asset declares: None, or the problem.
    """

    version: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    checks: Results = field(default_factory=dict)


def batch_asset(
    *, checks: Sequence[Check[Any]] = (), **arguments: Any
) -> Callable[[Callable[..., Events]], dg.AssetsDefinition]:
    """Return ``@dg.asset`` for an asset whose body is :func:`materialize_each`.

    Its steps are retried as :func:`~nic_assets.orchestration.retries.retried_asset` says.

    ``checks`` are the checks of each product; ``arguments`` are those of ``dg.asset``.
    """

    def declare(body: Callable[..., Events]) -> dg.AssetsDefinition:
        return retried_asset(
            check_specs=[check.spec(body.__name__) for check in checks],
            backfill_policy=batch_policy(),
            owners=OWNERS,
            # the body records its own materializations
            output_required=False,
            **arguments,
        )(body)

    return declare


def materialize_each(
    context: dg.AssetExecutionContext,
    make: Callable[[Key], Product],
    *,
    parse: Callable[[str], Key],
    expected: tuple[type[Exception], ...],
    path: Callable[[Key], Path] | None = None,
    earlier: Mapping[str, str] | None = None,
) -> Events:
    """Make and record every partition of the run, then publish the asset's checks.

    The asset must be declared with :func:`batch_asset`. An exception of a type in ``expected``
    fails its partition only; any other stops the run at once. The step is retried if the fault is
    transient (:mod:`nic_assets.orchestration.retries`).

    Parameters
    ----------
    make
        Makes the product of one key.
    parse
        Partition key to ``make``'s argument: ``GridKey.parse``, or ``str`` to leave it as it is.
    expected
        Exceptions that concern one partition.
    path
        Path of a product. Its lock is held while the product is made. A concurrent run that wants
        the same product waits for the lock and then takes over the record of the first.
    earlier
        Partition to the partition of the same asset that it is made from
        (:data:`~nic_assets.tags.EARLIER_PARTITIONS`); the latter is made first.

    Raises
    ------
    dagster.Failure
        After all partitions, if some failed; its metadata lists each with its reason. At once, for
        a fault that is neither expected nor transient.
    """
    _tag_host(context)
    provenance = _provenance(context)
    failed: dict[str, str] = {}
    retry = False
    events: list[dg.AssetMaterialization] = []
    keys = _in_order(context.partition_keys, earlier or {})
    for number, key in enumerate(keys, start=1):
        context.log.info(f"{context.asset_key.to_user_string()} {number}/{len(keys)}: {key}")
        if earlier and earlier.get(key) in keys:  # made in this run, which changed an input
            provenance = _provenance(context)
        try:
            parsed = parse(key)
            with exclusive_lock(path(parsed)) if path is not None else nullcontext():
                event, own = _recorded(context, key, provenance)
                if event is None:
                    event = _materialization(context, key, make(parsed), provenance)
                    context.log_event(event)
                elif not own:
                    context.log.info(f"{key}: a concurrent run has just made it")
                    context.log_event(event)
        except expected as error:
            failed[key] = str(error)
            retry |= is_transient(error)
            context.log.error(f"{key}: {error}")
            continue
        except Exception as error:
            if is_transient(error):
                raise
            if is_mistake(error):
                raise step_failure(f"{key}: {error}") from None
            raise dg.Failure(
                f"{key}: {type(error).__name__}: {error}", allow_retries=False
            ) from error
        events.append(event)
    if not failed and _children_run(context):
        # Without an output of this step the run skips its children. The output also records every
        # partition with the batch's data version, so each partition's own record must come later.
        yield dg.MaterializeResult(tags={RUN_OUTPUT_TAG: "true"})
        for event in events:
            context.log_event(event)
    yield from publish_checks(context)
    if failed:
        raise step_failure(
            f"{len(failed)} of {len(keys)} failed: "
            + "; ".join(f"{key}: {reason}" for key, reason in list(failed.items())[:5]),
            metadata={"failed": dg.MetadataValue.json(failed)},
            retry=retry,
        )


def _in_order(keys: Sequence[str], earlier: Mapping[str, str]) -> list[str]:
    """Return the keys sorted, but each after those that it is made from."""
    ordered: dict[str, None] = {}

    def add(key: str) -> None:
        if (before := earlier.get(key)) is not None:
            add(before)
        ordered[key] = None

    for key in sorted(keys):
        add(key)
    return [key for key in ordered if key in set(keys)]


def materialize_in_parallel(
    context: dg.AssetExecutionContext,
    make: Callable[[Key], Made],
    describe: Callable[[Key, Made], Product],
    *,
    parse: Callable[[str], Key],
    expected: tuple[type[Exception], ...],
) -> Events:
    """Like :func:`materialize_each`, but call ``make`` in one process for each core.

    For work that is bound by the CPU. ``make``, its keys, results and exceptions must be picklable;
    ``describe`` is called in the step's own process. Two concurrent runs may both make the same
    product; the store's writes are atomic.
    """
    provenance = _provenance(context)
    missing = [
        parse(key)
        for key in sorted(context.partition_keys)
        if _recorded(context, key, provenance)[0] is None
    ]
    with ahead(make, missing) as made:
        yield from materialize_each(
            context, lambda key: describe(key, made(key)), parse=parse, expected=expected
        )


def _tag_host(context: dg.AssetExecutionContext) -> None:
    """Add this machine's name to the run's tag."""
    run = context.instance.get_run_by_id(context.run.run_id)
    known = (run.tags.get(HOST_TAG) or "").split(",") if run is not None else []
    hosts = ",".join(sorted({*known, socket.gethostname()} - {""}))
    context.instance.add_run_tags(context.run.run_id, {HOST_TAG: hosts})


def _materialization(
    context: dg.AssetExecutionContext, key: str, product: Product, provenance: Mapping[str, str]
) -> dg.AssetMaterialization:
    return dg.AssetMaterialization(
        context.asset_key,
        partition=key,
        metadata={**product.metadata, **results_metadata(context.assets_def, product.checks)},
        tags={**provenance, **_dimension_tags(context, key), DATA_VERSION_TAG: product.version},
    )


def _recorded(
    context: dg.AssetExecutionContext, key: str, provenance: Mapping[str, str]
) -> tuple[dg.AssetMaterialization | None, bool]:
    """Return the record of a partition that this run need not make again, if there is one.

    Either an earlier attempt of this run recorded it (True), or a concurrent run did so from the
    same inputs after this run was created (False).
    """
    record = latest_record(context.instance, context.asset_key, key)
    event = record.asset_materialization if record is not None else None
    if record is None or event is None or event.tags is None:
        return None, False
    if DATA_VERSION_IS_USER_PROVIDED_TAG not in event.tags:
        return None, False
    if record.run_id in _attempts(context.run):
        return event, True
    run = context.instance.get_run_record_by_id(context.run.run_id)
    # SQLite stores the time of creation in whole seconds
    if run is None or record.timestamp < run.create_timestamp.timestamp() + 1:
        return None, False
    if not provenance.items() <= event.tags.items():
        return None, False
    return event, False


def latest_record(
    instance: dg.DagsterInstance, asset: dg.AssetKey, key: str
) -> dg.EventLogRecord | None:
    """Return the latest record of a partition, except those of a batch's output.

    A concurrent run may have recorded its output but not yet every partition after it.
    """
    records: Sequence[dg.EventLogRecord] = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset, asset_partitions=[key]), limit=_LATEST
    ).records
    for record in records:
        event = record.asset_materialization
        if event is not None and RUN_OUTPUT_TAG not in (event.tags or {}):
            return record
    return None


def _attempts(run: dg.DagsterRun) -> set[str]:
    """Return the ids of this run and, if it is a retry, of the runs that it continues.

    A run that a person launches again is not a retry: it makes every partition again.
    """
    is_retry = {RETRY_NUMBER_TAG, RESUME_RETRY_TAG} & run.tags.keys()
    before = {run.parent_run_id, run.root_run_id} - {None}
    return {run.run_id, *(before if is_retry else ())}


def _provenance(context: dg.AssetExecutionContext) -> dict[str, str]:
    """Return the tags by which Dagster judges staleness, read before any input is."""
    tags = {DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}
    code_version = context.assets_def.code_versions_by_key[context.asset_key]
    if code_version is not None:
        tags[CODE_VERSION_TAG] = code_version
    for dependency in context.assets_def.asset_deps[context.asset_key]:
        records = context.instance.fetch_materializations(dependency, limit=1).records
        materialization = records[0].asset_materialization if records else None
        version = (materialization.tags or {}).get(DATA_VERSION_TAG) if materialization else None
        tags[get_input_data_version_tag(dependency)] = version or "INITIAL"
        # Dagster reads a missing pointer as "the input as it is now", so an input that is recorded
        # later would make nothing stale. -1 is before every event.
        tags[get_input_event_pointer_tag(dependency)] = (
            str(records[0].storage_id) if records else "-1"
        )
    return tags


def _dimension_tags(context: dg.AssetExecutionContext, key: str) -> dict[str, str]:
    definition = context.assets_def.partitions_def
    if not isinstance(definition, dg.MultiPartitionsDefinition):
        return {}
    by_dimension = definition.get_partition_key_from_str(key).keys_by_dimension
    return {MULTIDIMENSIONAL_PARTITION_PREFIX + name: part for name, part in by_dimension.items()}


def _children_run(context: dg.AssetExecutionContext) -> bool:
    """Return whether this run also materializes assets that depend on this one."""
    layer = context.job_def.asset_layer
    return bool(layer.asset_graph.get(context.asset_key).child_keys & layer.selected_asset_keys)

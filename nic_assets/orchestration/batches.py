"""Many slides in one run, each with a materialization of its own.

A run costs seconds, a slide milliseconds, so a run takes a batch of partition keys. Three
things are then ours to do, since Dagster gives one data version and one outcome to all
partitions of a run:

* each partition gets its own data version and provenance, so that a slide whose product did
  not change makes nothing downstream stale;
* a bad slide fails itself, not its batch: the good ones are recorded, the bad ones listed, the
  run fails, and a retry has only the bad ones left to do;
* a partition is recorded as soon as it is done, so a killed run loses one slide at most, and
  neither a second attempt nor another run that was asked for the same does it again.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import dagster as dg

from nic_assets.orchestration.internals import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    MULTIDIMENSIONAL_PARTITION_PREFIX,
    PARENT_RUN_ID_TAG,
    RESUME_RETRY_TAG,
    RETRY_NUMBER_TAG,
    ROOT_RUN_ID_TAG,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)
from nic_assets.orchestration.metadata import OWNERS
from nic_assets.orchestration.retries import RETRIES, is_transient
from nic_assets.tags import HOST_TAG
from nic_core.parallel import ahead
from nic_core.store import exclusive_lock

Made = TypeVar("Made")

batch_asset = partial(
    dg.asset,
    backfill_policy=dg.BackfillPolicy.single_run(),
    retry_policy=RETRIES,
    owners=OWNERS,
    # the body records its own materializations
    output_required=False,
)
"""``@dg.asset`` for an asset whose body is :func:`materialize_each`."""

# metadata: name of a check to what it found, and to what it has to say either way
_PROBLEMS, _REMARKS = "problems", "remarks"

Events: TypeAlias = Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]
"""What the body of an asset of many partitions yields."""


@dataclass(frozen=True)
class Product:
    """What one partition's work made: its content's version, and what a person wants to see.

    ``checks`` maps a check's name to what is wrong, or to None where it passes; ``remarks`` to
    what it has to say either way.
    """

    version: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    checks: Mapping[str, str | None] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)


def materialize_each(
    context: dg.AssetExecutionContext,
    work: Callable[[str], Product],
    *,
    expected: tuple[type[Exception], ...],
    place: Callable[[str], Path] | None = None,
) -> Events:
    """Do ``work`` for every partition key of the run; yield the checks' results.

    The asset must be declared with :data:`batch_asset`. An exception of the ``expected``
    types fails its partition alone; any other stops the run at once. The step is tried again if
    a fault is transient (:mod:`nic_assets.orchestration.retries`).

    ``place`` is where a partition's product goes. Its lock is held while the partition is made, so
    another run that wants to make the same waits, and then takes what it finds.

    Raises
    ------
    dagster.Failure
        After all keys, when some failed; its metadata lists each with its reason. At once, for a
        fault that is neither expected nor transient.
    """
    _tag_host(context)
    provenance = _provenance(context)
    failed: dict[str, str] = {}
    again = False
    done: list[dg.AssetMaterialization] = []
    found: dict[str, dict[str, str]] = {check.name: {} for check in _check_specs(context)}
    remarks: dict[str, dict[str, str]] = {}
    keys = sorted(context.partition_keys)
    for number, key in enumerate(keys, start=1):
        context.log.info(f"{context.asset_key.to_user_string()} {number}/{len(keys)}: {key}")
        try:
            with exclusive_lock(place(key)) if place is not None else nullcontext():
                event, own = _recorded(context, key, provenance)
                if event is None:
                    event = _materialization(context, key, work(key), provenance)
                    context.log_event(event)
                elif not own:
                    context.log.info(f"{key}: another run has just made it")
                    context.log_event(event)
        except expected as error:
            failed[key] = str(error)
            again |= is_transient(error)
            context.log.error(f"{key}: {error}")
            continue
        except Exception as error:
            if is_transient(error):
                raise
            raise dg.Failure(
                f"{key}: {type(error).__name__}: {error}", allow_retries=False
            ) from error
        done.append(event)
        for check, problem in _of_checks(event, _PROBLEMS).items():
            if check in found:
                found[check][key] = problem
        for check, remark in _of_checks(event, _REMARKS).items():
            remarks.setdefault(check, {})[key] = remark
    yield from _check_results(context, found, remarks)
    if failed:
        raise dg.Failure(
            f"{len(failed)} of {len(keys)} failed: "
            + "; ".join(f"{key}: {reason}" for key, reason in list(failed.items())[:5]),
            metadata={"failed": dg.MetadataValue.json(failed)},
            allow_retries=again,
        )
    if _children_run(context):
        # A step that yields no output makes the run skip its children. Yielding it lets them go
        # on, but also records every partition with the batch's version: ours must be the later.
        yield dg.MaterializeResult()
        for event in done:
            context.log_event(event)


def _tag_host(context: dg.AssetExecutionContext) -> None:
    run = context.instance.get_run_by_id(context.run.run_id)
    known = (run.tags.get(HOST_TAG) or "").split(",") if run is not None else []
    hosts = ",".join(sorted({*known, socket.gethostname()} - {""}))
    context.instance.add_run_tags(context.run.run_id, {HOST_TAG: hosts})


def materialize_ahead(
    context: dg.AssetExecutionContext,
    make: Callable[[str], Made],
    describe: Callable[[str, Made], Product],
    *,
    expected: tuple[type[Exception], ...],
) -> Events:
    """As :func:`materialize_each`, for work that is bound by the CPU: by a process a core.

    ``make`` can be pickled, as what it gives and raises; ``describe`` is called in the step's own
    process. Two runs that are asked for the same may both make it: the store keeps it whole.
    """
    provenance = _provenance(context)
    to_do = [
        key
        for key in sorted(context.partition_keys)
        if _recorded(context, key, provenance)[0] is None
    ]
    with ahead(make, to_do) as made:
        yield from materialize_each(
            context, lambda key: describe(key, made(key)), expected=expected
        )


def _materialization(
    context: dg.AssetExecutionContext, key: str, product: Product, provenance: Mapping[str, str]
) -> dg.AssetMaterialization:
    problems = {check: problem for check, problem in product.checks.items() if problem is not None}
    return dg.AssetMaterialization(
        context.asset_key,
        partition=key,
        metadata={
            **product.metadata,
            **({_PROBLEMS: problems} if problems else {}),
            **({_REMARKS: dict(product.remarks)} if product.remarks else {}),
        },
        tags={**provenance, **_dimension_tags(context, key), DATA_VERSION_TAG: product.version},
    )


def _recorded(
    context: dg.AssetExecutionContext, key: str, provenance: Mapping[str, str]
) -> tuple[dg.AssetMaterialization | None, bool]:
    """What already stands for a partition: what an earlier attempt recorded (True), or another
    run, since this one was asked for, from the same inputs."""
    records = context.instance.fetch_materializations(
        dg.AssetRecordsFilter(context.asset_key, asset_partitions=[key]), limit=1
    ).records
    event: dg.AssetMaterialization | None = records[0].asset_materialization if records else None
    if event is None or event.tags is None or DATA_VERSION_IS_USER_PROVIDED_TAG not in event.tags:
        return None, False
    if records[0].run_id in _attempts(context.run):
        return event, True
    asked = context.instance.get_run_record_by_id(context.run.run_id)
    # SQLite keeps the whole seconds of that time
    if asked is None or records[0].timestamp < asked.create_timestamp.timestamp() + 1:
        return None, False
    if not provenance.items() <= event.tags.items():
        return None, False
    return event, False


def _attempts(run: dg.DagsterRun) -> set[str]:
    """This run, and those whose work it takes up: it was started since they failed or were
    killed. A person who runs a run again has everything done again."""
    taken_up = {RETRY_NUMBER_TAG, RESUME_RETRY_TAG} & run.tags.keys()
    before = [run.tags[tag] for tag in (PARENT_RUN_ID_TAG, ROOT_RUN_ID_TAG) if tag in run.tags]
    return {run.run_id, *(before if taken_up else ())}


def _of_checks(event: dg.AssetMaterialization, what: str) -> Mapping[str, str]:
    """What the checks found or remarked, as the partition's own record has it."""
    kept = event.metadata.get(what)
    return kept.value if isinstance(kept, dg.JsonMetadataValue) else {}  # type: ignore[return-value]


def _provenance(context: dg.AssetExecutionContext) -> dict[str, str]:
    """The tags by which Dagster judges staleness, as of now: before any input is read."""
    tags = {DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}
    code_version = context.assets_def.code_versions_by_key[context.asset_key]
    if code_version is not None:
        tags[CODE_VERSION_TAG] = code_version
    for dependency in context.assets_def.asset_deps[context.asset_key]:
        records = context.instance.fetch_materializations(dependency, limit=1).records
        materialization = records[0].asset_materialization if records else None
        version = (materialization.tags or {}).get(DATA_VERSION_TAG) if materialization else None
        tags[get_input_data_version_tag(dependency)] = version or "INITIAL"
        # Dagster's own "no event yet" is taken for "whatever is there now": an input that appears
        # later would make nothing stale. Before the first event is a place too.
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
    layer = context.job_def.asset_layer
    return bool(layer.asset_graph.get(context.asset_key).child_keys & layer.selected_asset_keys)


def _check_specs(context: dg.AssetExecutionContext) -> Sequence[dg.AssetCheckSpec]:
    return [
        spec
        for spec in context.assets_def.check_specs
        if spec.key in context.selected_asset_check_keys
    ]


def _check_results(
    context: dg.AssetExecutionContext,
    found: Mapping[str, Mapping[str, str]],
    remarks: Mapping[str, Mapping[str, str]],
) -> Iterator[dg.AssetCheckResult]:
    for name, problems in found.items():
        yield dg.AssetCheckResult(
            check_name=name,
            passed=not problems,
            severity=dg.AssetCheckSeverity.WARN,
            metadata={
                "checked": len(context.partition_keys),
                "problems": dict(problems),
                **({"remarks": dict(remarks[name])} if name in remarks else {}),
            },
        )

"""Checks of partitioned assets: one result that covers every recorded partition.

A check judges each product when it is made. The product's materialization records the results of
all checks (metadata ``checks``). The result that Dagster shows for a check covers all partitions:
it fails as long as the latest product of any partition fails, whichever partitions the last run
made.

Dagster can also keep a check's results by partition (``AssetCheckSpec(partitions_def=...)``,
preview in 1.13.27). It is not used here because of its cost in the webserver: each refresh of a
page looks up every dynamic partition with a query of its own and then merges the partitions one by
one. That took 2.5 s of CPU time for 1,000 slides, 7 s for 3,000, and 14 s a check for 32,000 grids,
where it grows with the square of their number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec

import dagster as dg

from nic_assets.orchestration.internals import AssetCheckEvaluationTargetMaterializationData
from nic_assets.tags import RUN_OUTPUT_TAG

if TYPE_CHECKING:
    from nic_core.steps import FailedCheck

Arguments = ParamSpec("Arguments")

PASSED = "passed"
SHOWN = 3  # problems that the description of a result names

# metadata of a materialization: check to PASSED or its problem
_RESULTS = "checks"
# metadata of a check's result: partition to problem, of partitions that exist and of others
_PROBLEMS, _REMOVED = "problems", "problems_of_removed_partitions"
# metadata of a check's result: storage id of the newest materialization that it covers
_NEWEST = "newest_materialization"
_UNCHECKED = "recorded without a result of this check; materialize this partition again"

_PAGE = 1000
_HISTORY = 20  # results among which the last published one is looked for
# ids are assigned before their transactions end, so an event may appear behind a later one
_OVERLAP = 200


@dataclass(frozen=True)
class Check(Generic[Arguments]):
    """A check: its name, its description and its judge are those of one function.

    Attributes
    ----------
    judge
        Returns the problem with a product, or None where the check passes. The first paragraph of
        its docstring is the description that the UI shows.
    """

    judge: Callable[Arguments, str | None]

    @property
    def name(self) -> str:
        return self.judge.__name__

    @property
    def description(self) -> str:
        return (inspect.getdoc(self.judge) or "").split("\n\n")[0].replace("\n", " ")

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> str | None:
        return self.judge(*args, **kwargs)

    def spec(self, asset: str) -> dg.AssetCheckSpec:
        """Return the declaration of this check on ``asset``."""
        return dg.AssetCheckSpec(self.name, asset=asset, description=self.description)

    def result(self, problem: str | None, **metadata: Any) -> dg.AssetCheckResult:
        """Return the result of this check on an asset without partitions."""
        return dg.AssetCheckResult(
            check_name=self.name,
            passed=problem is None,
            description=problem,
            severity=dg.AssetCheckSeverity.WARN,
            metadata=metadata,
        )


Results = Mapping[Check[Any], str | None]
"""Results of one product: check to problem, or None where it passed."""


def results_metadata(asset: dg.AssetsDefinition, results: Results) -> dict[str, dict[str, str]]:
    """Return the metadata by which a materialization records the results of its checks.

    Raises
    ------
    dagster.DagsterInvariantViolationError
        A declared check has no result, or an undeclared one has.
    """
    declared = {spec.name for spec in asset.check_specs}
    given = {check.name: problem or PASSED for check, problem in results.items()}
    if missing := sorted(declared - given.keys()):
        raise dg.DagsterInvariantViolationError(
            f"asset '{asset.key.to_user_string()}' declares checks without a result: "
            f"{', '.join(missing)}; add them to the product's checks"
        )
    if undeclared := sorted(given.keys() - declared):
        raise dg.DagsterInvariantViolationError(
            f"asset '{asset.key.to_user_string()}' has results of checks that it does not "
            f"declare: {', '.join(undeclared)}; add them to the asset's checks"
        )
    return {_RESULTS: given} if given else {}


def publish_checks(context: dg.AssetExecutionContext) -> Iterator[dg.Output[None]]:
    """Record the result of each selected check over all partitions of the asset.

    Dagster shows the result of the run that was created last. If that run ended earlier than this
    one, its result does not cover the partitions of this run, so the result is recorded once more,
    without a run. The same is done if other runs recorded partitions in the meantime.
    """
    instance, asset = context.instance, context.asset_key
    partitions = context.assets_def.partitions_def
    specs = {
        spec.name: spec
        for spec in context.assets_def.check_specs
        if spec.key in context.selected_asset_check_keys
    }
    if not specs:
        return
    for name, result in _evaluations(instance, asset, partitions, specs).items():
        # a check of no product has no result: Dagster shows that it did not run
        if result.metadata["partitions"].value:
            context.log_event(result)
        yield dg.Output(None, output_name=specs[name].get_python_identifier())
    for name, spec in specs.items():
        while not _is_current(instance, spec.key, context.run.run_id):
            [result] = _evaluations(instance, asset, partitions, [name]).values()
            instance.report_runless_asset_event(result)


def republish_checks(
    instance: dg.DagsterInstance,
    asset: dg.AssetKey,
    partitions: dg.PartitionsDefinition[str],
    checks: Sequence[Check[Any]],
) -> None:
    """Record the results again that change because partitions were removed or added."""
    keys = [dg.AssetCheckKey(asset, check.name) for check in checks]
    shown = instance.event_log_storage.get_latest_asset_check_execution_by_key(keys)
    published = {
        key.name: record.evaluation
        for key, record in shown.items()
        # a check that is only planned is recorded by its run
        if isinstance(record.evaluation, dg.AssetCheckEvaluation)
    }
    if not published:
        return
    for name, result in _evaluations(instance, asset, partitions, published).items():
        if result != published[name]:
            instance.report_runless_asset_event(result)


def failed_checks(
    instance: dg.DagsterInstance, specs: Iterable[dg.AssetCheckSpec]
) -> list[FailedCheck]:
    """Return the checks whose latest result is a failure, with the number of products concerned."""
    from nic_core.steps import FailedCheck

    declared = {spec.key: spec for spec in specs}
    shown = instance.event_log_storage.get_latest_asset_check_execution_by_key([*declared])
    found = []
    for key, spec in declared.items():
        result = shown[key].evaluation if key in shown else None
        # a check that is only planned has no result
        if not isinstance(result, dg.AssetCheckEvaluation) or result.passed:
            continue
        failed, products = (
            int(str(result.metadata[name].value)) if name in result.metadata else 1
            for name in ("failed", "partitions")
        )
        asset = key.asset_key.to_user_string()
        found.append(FailedCheck(asset, key.name, spec.description or "", failed, products))
    return found


def _evaluations(
    instance: dg.DagsterInstance,
    asset: dg.AssetKey,
    partitions: dg.PartitionsDefinition[str] | None,
    checks: Collection[str],
) -> dict[str, dg.AssetCheckEvaluation]:
    """Return the result of each check over the latest product of every partition.

    Starts from the last published result of each check and reads the materializations since.
    """
    if partitions is None:
        raise TypeError(f"asset '{asset.to_user_string()}' has no partitions")
    problems: dict[str, dict[str, str]] = {}
    after = None
    for check in checks:
        problems[check], newest = _last_published(instance, dg.AssetCheckKey(asset, check))
        after = newest if after is None else min(after, newest)
    target = None
    for record in _materializations(instance, asset, max(0, (after or 0) - _OVERLAP)):
        target = record
        event = record.asset_materialization
        if event is not None and RUN_OUTPUT_TAG in (event.tags or {}):
            continue
        results = _results(record)
        for check in checks:
            result = results.get(check, _UNCHECKED)
            if result == PASSED:
                problems[check].pop(str(record.partition_key), None)
            else:
                problems[check][str(record.partition_key)] = result
    recorded = instance.get_materialized_partitions(asset)
    existing = recorded & set(partitions.get_partition_keys(dynamic_partitions_store=instance))
    return {
        check: _evaluation(
            dg.AssetCheckKey(asset, check),
            {key: items[key] for key in sorted(items.keys() & existing)},
            {key: items[key] for key in sorted((items.keys() & recorded) - existing)},
            len(existing),
            target,
        )
        for check, items in problems.items()
    }


def _evaluation(
    key: dg.AssetCheckKey,
    problems: Mapping[str, str],
    removed: Mapping[str, str],
    partitions: int,
    newest: dg.EventLogRecord | None,
) -> dg.AssetCheckEvaluation:
    named = "; ".join(f"{key}: {problem}" for key, problem in list(problems.items())[:SHOWN])
    return dg.AssetCheckEvaluation(
        asset_key=key.asset_key,
        check_name=key.name,
        passed=not problems,
        severity=dg.AssetCheckSeverity.WARN,
        description=(
            f"{len(problems)} of {partitions} partitions failed: {named}"
            + ("; ..." if len(problems) > SHOWN else "")
            if problems
            else f"{partitions} of {partitions} partitions passed"
        ),
        metadata={
            "partitions": partitions,
            "failed": len(problems),
            _PROBLEMS: dict(problems),
            **({_REMOVED: dict(removed)} if removed else {}),
            _NEWEST: str(newest.storage_id if newest else 0),
        },
        target_materialization_data=AssetCheckEvaluationTargetMaterializationData(
            storage_id=newest.storage_id, run_id=newest.run_id, timestamp=newest.timestamp
        )
        if newest
        else None,
    )


def _last_published(
    instance: dg.DagsterInstance, key: dg.AssetCheckKey
) -> tuple[dict[str, str], int]:
    """Return the problems of a published result, and the newest materialization that it covers."""
    history = instance.event_log_storage.get_asset_check_execution_history(key, limit=_HISTORY)
    for record in history:
        result = record.evaluation
        if isinstance(result, dg.AssetCheckEvaluation) and _NEWEST in result.metadata:
            problems = {**_json(result.metadata, _PROBLEMS), **_json(result.metadata, _REMOVED)}
            return problems, _newest(result)
    return {}, 0


def _is_current(instance: dg.DagsterInstance, key: dg.AssetCheckKey, own: str) -> bool:
    """Return whether the result that Dagster shows covers this run and all that are finished.

    A run that is not finished records its result later.
    """
    shown = instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
    result = shown.evaluation
    if not isinstance(result, dg.AssetCheckEvaluation):  # only planned
        return _is_unfinished(instance, shown.run_id)
    if _NEWEST not in result.metadata:  # reported by hand
        return False
    later = {
        record.run_id for record in _materializations(instance, key.asset_key, _newest(result))
    }
    return all(run != own and _is_unfinished(instance, run) for run in later)


def _is_unfinished(instance: dg.DagsterInstance, run_id: str) -> bool:
    run = instance.get_run_by_id(run_id)
    return run is not None and not run.is_finished


def _materializations(
    instance: dg.DagsterInstance, asset: dg.AssetKey, after: int
) -> Iterator[dg.EventLogRecord]:
    while True:
        page = instance.fetch_materializations(
            dg.AssetRecordsFilter(asset, after_storage_id=after), limit=_PAGE, ascending=True
        ).records
        yield from page
        if len(page) < _PAGE:
            return
        after = page[-1].storage_id


def _results(record: dg.EventLogRecord) -> Mapping[str, str]:
    event = record.asset_materialization
    return _json(event.metadata, _RESULTS) if event else {}


def _newest(result: dg.AssetCheckEvaluation) -> int:
    return int(str(result.metadata[_NEWEST].value))


def _json(metadata: Mapping[str, dg.MetadataValue[Any]], name: str) -> dict[str, str]:
    value = metadata.get(name)
    return dict(value.value) if isinstance(value, dg.JsonMetadataValue) else {}  # type: ignore[arg-type]

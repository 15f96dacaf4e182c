"""Dagster's private interfaces: imported in one module only, and tested by their use."""

from __future__ import annotations

import ast
import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import dagster as dg
import pytest

import nic_assets
from nic_assets.orchestration import internals

PACKAGE = Path(nic_assets.__file__).parent
INTERNALS = PACKAGE / "orchestration" / "internals.py"
Check: TypeAlias = Callable[[Any, Path], None]


def private_imports(path: Path) -> list[str]:
    """Return the private names of Dagster that a file imports, as ``module.name``."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return sorted(name for name in names if name.startswith(("dagster._", "dagster_shared")))


def interface(name: str) -> Any:
    """Import one private name; the module ``internals`` fails as a whole if any is missing."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        pytest.fail(f"Dagster {dg.__version__} has no {name}; {INTERNALS.name} says what it is for")


# --- the uses --------------------------------------------------------------------------------

SLIDES = dg.StaticPartitionsDefinition(["s1", "s2", "s3"])
DATA_VERSION = "dagster._core.definitions.data_version"
TAGS = "dagster._core.storage.tags"
RUNS = "dagster._core.storage.runs"
DELEGATING = "dagster._core.executor.step_delegating"
EXECUTION = "dagster._core.execution"
LAUNCHERS = "dagster._core.launcher.base"


@dg.asset(code_version="1")
def first() -> dg.MaterializeResult[None]:
    return dg.MaterializeResult(data_version=dg.DataVersion("of first"))


@dg.asset(deps=[first], code_version="2")
def second() -> dg.MaterializeResult[None]:
    return dg.MaterializeResult(data_version=dg.DataVersion("of second"))


@dg.asset(partitions_def=SLIDES, backfill_policy=dg.BackfillPolicy.single_run())
def ranged() -> None: ...


@dg.asset(partitions_def=dg.MultiPartitionsDefinition({"slide": SLIDES, "encoder": SLIDES}))
def crossed() -> None: ...


def is_tag_of_materialization(value: str) -> Check:
    def check(tag: Any, _: Path) -> None:
        name = tag(first.key) if callable(tag) else tag
        [event] = dg.materialize([first, second]).asset_materializations_for_node("second")
        assert event.tags is not None
        assert event.tags[name] == value if value else event.tags[name].isdecimal()

    return check


def starts_a_run_of_a_range(_: str, __: Path) -> None:
    start, end = (
        interface(f"{TAGS}.ASSET_PARTITION_RANGE_{edge}_TAG") for edge in ("START", "END")
    )
    result = dg.materialize([ranged], tags={start: "s2", end: "s3"})
    events = result.asset_materializations_for_node("ranged")
    assert {event.partition for event in events} == {"s2", "s3"}


def starts_the_tag_of_a_dimension(prefix: str, _: Path) -> None:
    key = dg.MultiPartitionKey({"slide": "s1", "encoder": "s2"})
    result = dg.materialize([crossed], partition_key=key)
    [event] = result.asset_materializations_for_node("crossed")
    assert event.tags is not None
    assert {f"{prefix}slide": "s1", f"{prefix}encoder": "s2"}.items() <= event.tags.items()


def has_the_value(value: str) -> Check:
    # in the tags of runs that existing databases hold
    def check(tag: str, _: Path) -> None:
        assert tag == value

    return check


def has_an_id_per_database(kind: type, folder: Path) -> None:
    ids = []
    for name in ("one", "one", "other"):
        (folder / name).mkdir(exist_ok=True)
        with dg.DagsterInstance.local_temp(str(folder / name)) as instance:
            assert isinstance(instance.run_storage, kind)
            ids.append(instance.run_storage.get_run_storage_id())  # type: ignore[attr-defined]
    assert ids[0] == ids[1] != ids[2]


def is_the_storage_in_local_files(kind: type, folder: Path) -> None:
    with dg.DagsterInstance.local_temp(str(folder)) as instance:
        assert isinstance(instance.run_storage, kind)
    postgres = pytest.importorskip("dagster_postgres", reason="extra 'postgres' is not installed")
    assert not issubclass(postgres.PostgresRunStorage, kind)


def has_the_process_id(kind: type, _: Path) -> None:
    data = [event.event_specific_data for event in dg.materialize([first]).all_events]
    found = [each.metadata for each in data if isinstance(each, kind)]  # type: ignore[attr-defined]
    assert {m["pid"].value for m in found if "pid" in m} == {str(os.getpid())}


def is_the_type_of_an_asset_graph(kind: type, _: Path) -> None:
    graph = dg.Definitions([first]).resolve_asset_graph()
    assert isinstance(graph, kind)


def is_the_type_of_an_asset_job(kind: type, _: Path) -> None:
    assert isinstance(dg.define_asset_job("job", selection="*"), kind)


def names_the_materialization(kind: Any, _: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        run_id = dg.materialize([first], instance=instance).run_id
        target = kind(storage_id=1, run_id=run_id, timestamp=0.0)
        evaluation = dg.AssetCheckEvaluation(
            asset_key=first.key,
            check_name="check",
            passed=True,
            metadata={},
            target_materialization_data=target,
        )
        instance.report_runless_asset_event(evaluation)
        [record] = instance.event_log_storage.get_asset_check_execution_history(
            dg.AssetCheckKey(first.key, "check"), limit=1
        )
        assert record.evaluation is not None
        assert record.evaluation.target_materialization_data == target


def is_raised_by_failed_checks(kind: type[Exception], _: Path) -> None:
    with pytest.raises(kind):
        dg.AssetsDefinition.from_op("no op")  # type: ignore[arg-type]


# --- executors -------------------------------------------------------------------------------


@functools.cache
def objects_of_a_handler() -> dict[str, Any]:
    """Run a job with a handler that fails its step; return the objects that Dagster gave to it."""
    seen: dict[str, Any] = {}

    class Handler(internals.StepHandler):
        name = "handler"

        def launch_step(self, step_handler_context):
            [step] = step_handler_context.execute_step_args.step_keys_to_execute
            context = step_handler_context.get_step_context(step)
            seen.update(StepHandlerContext=step_handler_context, IStepContext=context)
            error = internals.SerializableErrorInfo("no node", stack=[], cls_name=None)
            data = internals.StepFailureData(error, user_failure_data=None)
            yield dg.DagsterEvent.step_failure_event(context, data)

        def check_step_health(self, step_handler_context):
            return internals.CheckStepHealthResult.healthy()

        def terminate_step(self, step_handler_context):
            yield from ()

    class Executor(internals.StepDelegatingExecutor):
        def execute(self, plan_context, execution_plan):
            seen.update(PlanOrchestrationContext=plan_context, ExecutionPlan=execution_plan)
            yield from super().execute(plan_context, execution_plan)

    _EXECUTORS[:] = [
        Executor(Handler(), internals.RetryMode.ENABLED, sleep_seconds=0.01)  # type: ignore[abstract]
    ]
    with (
        dg.instance_for_test() as instance,
        dg.execute_job(dg.reconstructable(handled_job), instance) as result,
    ):
        [failure] = [event for event in result.all_events if event.is_step_failure]
        assert failure.step_failure_data.error_display_string.strip() == "no node"
    return seen


_EXECUTORS: list[dg.Executor] = []


@dg.executor(name="handled")
def handled(_: dg.InitExecutorContext) -> dg.Executor:
    return _EXECUTORS[0]


@dg.op
def failing() -> None: ...


@dg.job(executor_def=handled)
def handled_job() -> None:
    failing()


def is_the_type_of_an_object_for_a_handler(kind: type, _: Path) -> None:
    assert isinstance(objects_of_a_handler()[kind.__name__], kind)


def serves_a_step_delegating_executor(kind: Any, _: Path) -> None:
    assert objects_of_a_handler()
    assert kind is getattr(internals, kind.__name__)


# --- launchers -------------------------------------------------------------------------------


def serves_a_run_launcher(kind: Any, folder: Path) -> None:
    launcher = {
        "module": "nic_assets.orchestration.run_workers",
        "class": "ResumableRunLauncher",
        "config": {"base_dir": str(folder)},
    }
    with dg.instance_for_test(overrides={"run_launcher": launcher}) as instance:
        made: Any = instance.run_launcher
        run = instance.create_run_for_job(handled_job)
        health = made.check_run_worker_health(run)
        assert health.status.name == "NOT_FOUND"
        assert any(isinstance(each, kind) for each in (made, made.inst_data, health, health.status))


def holds_a_run(kind: Any, _: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        run = instance.create_run_for_job(handled_job)
        assert kind(run, None).dagster_run is run


def has_the_command(name: str) -> Check:
    def check(kind: Any, _: Path) -> None:
        origin = dg.reconstructable(handled_job).get_python_origin()
        arguments = kind(
            job_origin=origin, run_id="1234", instance_ref=None, set_exit_code_on_failure=None
        ).get_command_args()
        assert arguments[arguments.index("api") + 1] == name
        assert "1234" in arguments[-1]

    return check


USES: dict[str, Check] = {
    "dagster._core.definitions.asset_checks.asset_check_evaluation"
    ".AssetCheckEvaluationTargetMaterializationData": names_the_materialization,
    f"{DATA_VERSION}.CODE_VERSION_TAG": is_tag_of_materialization("2"),
    f"{DATA_VERSION}.DATA_VERSION_IS_USER_PROVIDED_TAG": is_tag_of_materialization("true"),
    f"{DATA_VERSION}.DATA_VERSION_TAG": is_tag_of_materialization("of second"),
    f"{DATA_VERSION}.get_input_data_version_tag": is_tag_of_materialization("of first"),
    f"{DATA_VERSION}.get_input_event_pointer_tag": is_tag_of_materialization(""),
    "dagster_shared.check.CheckError": is_raised_by_failed_checks,
    "dagster._core.events.EngineEventData": has_the_process_id,
    f"{DELEGATING}.CheckStepHealthResult": serves_a_step_delegating_executor,
    f"{DELEGATING}.StepDelegatingExecutor": serves_a_step_delegating_executor,
    f"{DELEGATING}.StepHandler": serves_a_step_delegating_executor,
    f"{DELEGATING}.StepHandlerContext": is_the_type_of_an_object_for_a_handler,
    f"{EXECUTION}.retries.RetryMode": serves_a_step_delegating_executor,
    f"{EXECUTION}.plan.objects.StepFailureData": serves_a_step_delegating_executor,
    "dagster_shared.error.SerializableErrorInfo": serves_a_step_delegating_executor,
    f"{EXECUTION}.context.system.IStepContext": is_the_type_of_an_object_for_a_handler,
    f"{EXECUTION}.context.system.PlanOrchestrationContext": is_the_type_of_an_object_for_a_handler,
    f"{EXECUTION}.plan.plan.ExecutionPlan": is_the_type_of_an_object_for_a_handler,
    f"{LAUNCHERS}.CheckRunHealthResult": serves_a_run_launcher,
    f"{LAUNCHERS}.RunLauncher": serves_a_run_launcher,
    f"{LAUNCHERS}.WorkerStatus": serves_a_run_launcher,
    f"{LAUNCHERS}.LaunchRunContext": holds_a_run,
    f"{LAUNCHERS}.ResumeRunContext": holds_a_run,
    "dagster._serdes.ConfigurableClass": serves_a_run_launcher,
    "dagster._serdes.ConfigurableClassData": serves_a_run_launcher,
    "dagster._grpc.types.ExecuteRunArgs": has_the_command("execute_run"),
    "dagster._grpc.types.ResumeRunArgs": has_the_command("resume_run"),
    f"{RUNS}.SqliteRunStorage": is_the_storage_in_local_files,
    f"{RUNS}.SqlRunStorage": has_an_id_per_database,
    f"{TAGS}.ASSET_PARTITION_RANGE_END_TAG": starts_a_run_of_a_range,
    f"{TAGS}.ASSET_PARTITION_RANGE_START_TAG": starts_a_run_of_a_range,
    f"{TAGS}.MULTIDIMENSIONAL_PARTITION_PREFIX": starts_the_tag_of_a_dimension,
    f"{TAGS}.RESUME_RETRY_TAG": has_the_value("dagster/is_resume_retry"),
    f"{TAGS}.RETRY_NUMBER_TAG": has_the_value("dagster/retry_number"),
    "dagster._core.definitions.assets.graph.base_asset_graph.BaseAssetGraph": (
        is_the_type_of_an_asset_graph
    ),
    "dagster._core.definitions.unresolved_asset_job_definition.UnresolvedAssetJobDefinition": (
        is_the_type_of_an_asset_job
    ),
}


@pytest.mark.parametrize("name", private_imports(INTERNALS))
def test_a_private_interface_does_what_it_is_used_for(name, tmp_path):
    found = interface(name)
    try:
        USES[name](found, tmp_path)
    except Exception as error:
        raise AssertionError(
            f"Dagster {dg.__version__} changed {name}; {INTERNALS.name} says what it is for"
        ) from error


def test_every_private_interface_has_a_test():
    assert set(private_imports(INTERNALS)) == set(USES)


def test_no_other_module_imports_a_private_interface():
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != INTERNALS and (names := private_imports(path))
    }
    assert found == {}, f"import these names in {INTERNALS.relative_to(PACKAGE.parent)} only"


def test_a_missing_interface_is_named():
    with pytest.raises(pytest.fail.Exception, match=r"has no dagster\._core\.events\.NoSuchName;"):
        interface("dagster._core.events.NoSuchName")


def test_a_file_is_searched_for_every_way_to_import(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import dagster as dg\n"
        "import dagster._utils\n"
        "from dagster import asset\n"
        "def late():\n"
        "    from dagster_shared.check import CheckError\n"
    )
    assert private_imports(path) == ["dagster._utils", "dagster_shared.check.CheckError"]

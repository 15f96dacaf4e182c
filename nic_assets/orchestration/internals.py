"""The private interfaces of Dagster that this project uses, each with the reason.

No other module of ``nic_assets`` imports a private name of Dagster. A release may change these
names without notice, so Dagster is pinned, and ``tests/assets/test_internals.py`` tests each of
them by its use and names the one that a release breaks.

Importing this module silences Dagster's beta and preview warnings. Backfill policies and checks
of partitions cause them, and each process of a run would repeat them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import dagster as dg

# The materialization that a check's result belongs to: a result that a step does not yield itself
# (`partition_checks` publishes one for all partitions) has to name it.
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData,
)

# The tags of a materialization that Dagster's staleness reads. Dagster writes one set for all
# partitions of a run; `batches` writes one for each partition.
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)

# The data of the events that carry process ids (see `process_id`), and of those about a Slurm job.
from dagster._core.events import EngineEventData

# The failure of a step that the executor records because its job cannot.
from dagster._core.execution.plan.objects import StepFailureData
from dagster._core.execution.retries import RetryMode

# Dagster's base for executors that hand steps to another system, and for launchers of runs. Its own
# integrations (dagster-k8s, dagster-docker) import them from here.
from dagster._core.executor.step_delegating import (
    CheckStepHealthResult,
    StepDelegatingExecutor,
    StepHandler,
)
from dagster._core.launcher.base import CheckRunHealthResult, RunLauncher, WorkerStatus

# Storage classes; see `records_id` and `records_are_local`.
from dagster._core.storage.runs import SqliteRunStorage, SqlRunStorage

# Tags of a run. A run of a range of partitions in this process is asked for by its two tags: no
# public function has an argument for it. The prefix tags a partition's dimensions. By the others
# `batches` recognizes a run that continues an earlier one.
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    MULTIDIMENSIONAL_PARTITION_PREFIX,
    RESUME_RETRY_TAG,
    RETRY_NUMBER_TAG,
)

# The commands of run workers, which launchers start.
from dagster._grpc.types import ExecuteRunArgs, ResumeRunArgs

# What an instance makes of the class that `run_launcher` in dagster.yaml names.
from dagster._serdes import ConfigurableClass

# What `dg launch` raises if its arguments about partitions are wrong; see `mistakes`.
from dagster_shared.check import CheckError

# The error in the failure of a step.
from dagster_shared.error import SerializableErrorInfo

if TYPE_CHECKING:
    # Types of what public functions return (`Definitions.resolve_asset_graph` and
    # `define_asset_job`), and of what Dagster gives to an executor and to a launcher.
    from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
    from dagster._core.definitions.unresolved_asset_job_definition import (
        UnresolvedAssetJobDefinition,
    )
    from dagster._core.execution.context.system import IStepContext as IStepContext
    from dagster._core.execution.context.system import (
        PlanOrchestrationContext as PlanOrchestrationContext,
    )
    from dagster._core.execution.plan.plan import ExecutionPlan as ExecutionPlan
    from dagster._core.executor.step_delegating import StepHandlerContext as StepHandlerContext
    from dagster._core.launcher.base import LaunchRunContext as LaunchRunContext
    from dagster._core.launcher.base import ResumeRunContext as ResumeRunContext
    from dagster._serdes import ConfigurableClassData as ConfigurableClassData

    AssetGraph: TypeAlias = BaseAssetGraph[Any]
    AssetJob: TypeAlias = UnresolvedAssetJobDefinition

__all__ = [
    "ASSET_PARTITION_RANGE_END_TAG",
    "ASSET_PARTITION_RANGE_START_TAG",
    "CODE_VERSION_TAG",
    "DATA_VERSION_IS_USER_PROVIDED_TAG",
    "DATA_VERSION_TAG",
    "MULTIDIMENSIONAL_PARTITION_PREFIX",
    "RESUME_RETRY_TAG",
    "RETRY_NUMBER_TAG",
    "AssetCheckEvaluationTargetMaterializationData",
    "CheckError",
    "CheckRunHealthResult",
    "CheckStepHealthResult",
    "ConfigurableClass",
    "EngineEventData",
    "ExecuteRunArgs",
    "ResumeRunArgs",
    "RetryMode",
    "RunLauncher",
    "SerializableErrorInfo",
    "StepDelegatingExecutor",
    "StepFailureData",
    "StepHandler",
    "WorkerStatus",
    "dagster_command",
    "get_input_data_version_tag",
    "get_input_event_pointer_tag",
    "process_id",
    "records_are_local",
    "records_id",
]

warnings.filterwarnings("ignore", category=dg.BetaWarning)
warnings.filterwarnings("ignore", category=dg.PreviewWarning)


def records_id(instance: dg.DagsterInstance) -> str:
    """Return the id of an instance's records: the same for every object that reads them.

    Private, since Dagster has no public id: a process builds several instance objects, and only
    this id tells that they share one history.

    Raises
    ------
    TypeError
        The records are not in a SQL database.
    """
    storage = instance.run_storage
    if not isinstance(storage, SqlRunStorage):
        raise TypeError(f"{type(storage).__name__}: Dagster's records must be in a SQL database")
    return storage.get_run_storage_id()


def records_are_local(instance: dg.DagsterInstance) -> bool:
    """Return whether only this machine can have written the records (SQLite files).

    Private, since Dagster has no public name for the kind of storage.
    """
    return isinstance(instance.run_storage, SqliteRunStorage)


def dagster_command(arguments: Sequence[str]) -> list[str]:
    """Return a command of Dagster's API (``ExecuteStepArgs.get_command_args()``) for this Python.

    As it is, the command begins with ``dagster`` where the code location has no other program, and
    the ``PATH`` of a node may have none or another one.
    """
    return [sys.executable, "-m", "dagster", *arguments[arguments.index("api") :]]


def process_id(event: dg.DagsterEvent) -> int | None:
    """Return the id of the process that an event announces; None if it announces none.

    Private, since Dagster records the processes of runs and steps in no other place.
    """
    data = event.event_specific_data
    pid = data.metadata.get("pid") if isinstance(data, EngineEventData) else None
    return None if pid is None else int(str(pid.value))

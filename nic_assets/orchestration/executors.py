"""Where steps run: the tags of CPU- and GPU-bound assets, and the executor by ``NIC_EXECUTOR``.

Every asset is tagged as GPU-bound or CPU-bound for all engines; each engine reads its own tag and
ignores the others. What limits the number of GPU-bound steps depends on the engine:

``local``
    One process per step on this machine. The pool ``gpu`` has one slot per GPU (one slot without
    a GPU), and each step in it leases a device (:func:`nic_core.devices.leased_device`).
``celery``, ``ray``, ``kubernetes``, ``slurm``
    Processes on several machines. The engine sends a step to a worker with the resources of its
    tags, so the pool has no limit. With ``slurm``, large batches are split into several runs, each
    with a job of its own (:func:`batch_policy`).

The variable is read when the definitions load. It is not part of the run config: workers load the
same definitions, whichever executor started the run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import dagster as dg
from dagster import multiple_process_executor_requirements
from sqlalchemy.exc import IntegrityError

from nic_assets.orchestration.slurm.settings import load_slurm_settings
from nic_core.parallel import cores
from nic_core.store import Store, lock_problem
from nic_core.version import DISTRIBUTION

EXECUTOR_VARIABLE = "NIC_EXECUTOR"

DEVICE_TAG = "nic/device"
GPU_POOL = "gpu"
GPU_TAGS: Mapping[str, Any] = {
    DEVICE_TAG: "gpu",
    "dagster-celery/queue": "gpu",
    "dagster-ray/config": {"num_gpus": 1, "num_cpus": 1},
    "dagster-k8s/config": {"container_config": {"resources": {"limits": {"nvidia.com/gpu": "1"}}}},
}
CPU_TAGS: Mapping[str, Any] = {
    DEVICE_TAG: "cpu",
    "dagster-celery/queue": "cpu",
    "dagster-ray/config": {"num_cpus": 1},
    "dagster-k8s/config": {"container_config": {"resources": {"requests": {"cpu": "1"}}}},
}

# PyTorch, BLAS and nic_core read the first, polars reads the second.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "POLARS_MAX_THREADS")

# the only step of a run imports what it needs itself, which is less
_ONE_STEP: Mapping[str, Any] = {
    "start_method": {"forkserver": {"preload_modules": ["nic_assets.definitions"]}}
}

# engine -> module, attribute and configuration of its executor; a package that is not installed is
# in the extra of the engine's name
_ENGINES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "local": (
        "dagster",
        "multiprocess_executor",
        {
            # steps are forked from a server process that has done the slow imports
            "start_method": {
                "forkserver": {
                    "preload_modules": [
                        "torch",
                        "mlflow",
                        "nic_assets.definitions",
                        "nic_assets.tracking.runs",
                        "nic_core.steps.evaluation_report",
                        "nic_core.steps.predictions",
                    ]
                }
            }
        },
    ),
    "celery": (
        "dagster_celery",
        "celery_executor",
        {
            "broker": {"env": "NIC_CELERY_BROKER"},
            "backend": {"env": "NIC_CELERY_BACKEND"},
            "config_source": {"task_default_queue": "cpu"},
        },
    ),
    "ray": ("dagster_ray", "ray_executor", {"ray": {}}),
    "kubernetes": ("dagster_k8s", "k8s_job_executor", {}),
    "slurm": ("nic_assets.orchestration.slurm.executor", "slurm_executor", {}),
}


def chosen_executor() -> dg.ExecutorDefinition:
    """Return the configured executor that ``$NIC_EXECUTOR`` names; by default ``local``.

    Raises
    ------
    dagster.DagsterInvalidDefinitionError
        The name is unknown, the engine's extra is not installed, or the settings file of Slurm is
        wrong.
    """
    name = chosen_engine()
    package, attribute, config = _ENGINES[name]
    try:
        engine: dg.ExecutorDefinition = getattr(importlib.import_module(package), attribute)
    except ModuleNotFoundError as error:
        raise dg.DagsterInvalidDefinitionError(
            f"{EXECUTOR_VARIABLE} is '{name}', but the package {error.name} is not installed; "
            f"install the extra: pip install '{DISTRIBUTION}[{name}]'"
        ) from error
    create_engine = engine.executor_creation_fn
    assert create_engine is not None

    def create(context: dg.InitExecutorContext) -> dg.Executor:
        # called in the run's process, before its first step
        nodes = context.job.get_definition().nodes
        gpu_bound = any(node.definition.tags.get(DEVICE_TAG) == "gpu" for node in nodes)
        if gpu_bound:
            set_gpu_slots(context.instance)
        if name == "local":
            _share_cores(context.instance, gpu_bound=gpu_bound)
            if len(nodes) == 1:
                context = context._replace(executor_config={**context.executor_config, **_ONE_STEP})
        elif problem := lock_problem(Store.from_environment().root):
            raise dg.DagsterInvariantViolationError(
                f"steps on several machines need locks between them, but the store is on {problem}"
            )
        return create_engine(context)

    return dg.ExecutorDefinition(
        engine.name,
        engine.config_schema.as_field(),
        multiple_process_executor_requirements(),
        create,
    ).configured(config)


def batch_policy() -> dg.BackfillPolicy:
    """Return how many runs Dagster makes of a request for many partitions of an asset: one.

    With ``slurm``, one for each ``partitions_per_job`` partitions, so that a batch uses as many
    nodes as are free: a run has one job for each of its steps.

    Raises
    ------
    dagster.DagsterInvalidDefinitionError
        The settings file of Slurm is wrong.
    """
    if chosen_engine() == "slurm":
        return dg.BackfillPolicy.multi_run(load_slurm_settings().partitions_per_job)
    return dg.BackfillPolicy.single_run()


def set_gpu_slots(instance: dg.DagsterInstance) -> None:
    """Set the limit of the pool ``gpu``: one slot per GPU of this machine, at least one.

    Remove the limit if the engine distributes steps over several machines.
    """
    if chosen_engine() == "local":
        # if the first two runs of an instance insert the pool's row at once, one insert fails
        with suppress(IntegrityError):
            instance.event_log_storage.set_concurrency_slots(GPU_POOL, _local_slots())
    else:
        instance.event_log_storage.delete_concurrency_limit(GPU_POOL)


def threads_per_step(*, gpu_bound: bool, gpus: int, runs: int) -> int:
    """Return the number of threads of each step of a run, so that parallel steps share the cores.

    GPU-bound steps get the cores divided by ``gpus``, the slots of the pool. The number does not
    depend on other runs: a training on the CPU gives the same weights only with the same number
    of threads. CPU-bound steps give the same result with any number; they get the cores divided by
    ``runs``, the number of unfinished runs at the start of theirs, including it. A run keeps its
    number, so the first of several runs has more threads.
    """
    return max(1, cores() // (gpus if gpu_bound else max(1, runs)))


def chosen_engine() -> str:
    """Return the engine that ``$NIC_EXECUTOR`` names; by default ``local``.

    Raises
    ------
    dagster.DagsterInvalidDefinitionError
        The name is unknown.
    """
    name = os.environ.get(EXECUTOR_VARIABLE) or "local"
    if name not in _ENGINES:
        raise dg.DagsterInvalidDefinitionError(
            f"{EXECUTOR_VARIABLE} is '{name}'; set it to one of {', '.join(_ENGINES)}"
        )
    return name


def _local_slots() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _share_cores(instance: dg.DagsterInstance, *, gpu_bound: bool) -> None:
    """Set the number of threads of a run's steps, unless the environment sets it already."""
    if THREAD_VARIABLES[0] in os.environ:
        return
    threads = threads_per_step(
        gpu_bound=gpu_bound,
        gpus=_local_slots() if gpu_bound else 1,
        runs=instance.get_runs_count(
            dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED])
        ),
    )
    if threads < cores():
        # processes of steps inherit the variables before they import libraries
        os.environ |= dict.fromkeys(THREAD_VARIABLES, str(threads))

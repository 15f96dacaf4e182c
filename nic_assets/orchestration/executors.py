"""Where steps run: one vocabulary of tags, and the executor that ``NIC_EXECUTOR`` names.

Every asset says whether it is GPU- or CPU-bound, once for all engines: each reads its own tag and
ignores the others. Who sees to it that GPU-bound steps take turns depends on where they run:

``local``
    A process a step, on this machine. The pool ``gpu`` has a slot for each of its GPUs (one where
    there is none), and a step in it leases a device (:func:`nic_core.devices.leased_device`).
``celery``, ``ray``, ``kubernetes``
    Processes on several machines. The engine gives a step to a worker that has what the tags ask
    for, so the pool has no limit.

The setting is read when the definitions load and never comes from run config: workers load the
same definitions and need not know which executor started a run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import dagster as dg
import torch
from dagster import multiple_process_executor_requirements
from sqlalchemy.exc import IntegrityError

from nic_core.parallel import cores

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

# PyTorch, BLAS and our own readers obey the first, polars the second
THREAD_VARIABLES = ("OMP_NUM_THREADS", "POLARS_MAX_THREADS")

# engine, which is also its extra -> where its executor is, and what it is told
_ENGINES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "local": (
        "dagster",
        "multiprocess_executor",
        {
            # forked from a server that has the slow imports behind it
            "start_method": {
                "forkserver": {"preload_modules": ["torch", "mlflow", "nic_assets.definitions"]}
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
}


def chosen_executor() -> dg.ExecutorDefinition:
    """The executor that ``$NIC_EXECUTOR`` names, ready configured; by default ``local``.

    Raises
    ------
    dagster.DagsterInvalidDefinitionError
        There is none of that name, or its extra is not installed.
    """
    name = chosen_engine()
    package, attribute, config = _ENGINES[name]
    try:
        engine: dg.ExecutorDefinition = getattr(importlib.import_module(package), attribute)
    except ModuleNotFoundError as error:
        raise dg.DagsterInvalidDefinitionError(
            f"{EXECUTOR_VARIABLE} is '{name}', but {error.name} is not installed; "
            f"its extra brings it: pip install -e '.[{name}]'"
        ) from error
    create_engine = engine.executor_creation_fn
    assert create_engine is not None

    def create(context: dg.InitExecutorContext) -> dg.Executor:
        # in the process of a run, before its first step
        set_gpu_slots(context.instance)
        if name == "local":
            _share_cores(context)
        return create_engine(context)

    return dg.ExecutorDefinition(
        engine.name,
        engine.config_schema.as_field(),
        multiple_process_executor_requirements(),
        create,
    ).configured(config)


def set_gpu_slots(instance: dg.DagsterInstance) -> None:
    """Give the pool ``gpu`` its slots: one a GPU of this machine, or one where it has none.

    Where an engine of several machines hands out the steps, the pool has no limit.
    """
    if chosen_engine() == "local":
        # the first two runs of an instance may both be about to make its row: one has
        with suppress(IntegrityError):
            instance.event_log_storage.set_concurrency_slots(GPU_POOL, _local_slots())
    else:
        instance.event_log_storage.delete_concurrency_limit(GPU_POOL)


def threads_a_step(*, gpu_bound: bool, gpus: int, runs: int) -> int:
    """Threads for each step of a run, so that steps beside each other do not fight for the cores.

    GPU-bound steps divide the cores by the pool's slots, whatever else runs: the same training
    has the same number of threads each time, and so gives the same weights on a CPU. CPU-bound
    steps, whose results do not depend on it, divide them by the ``runs`` under way when theirs
    starts, itself included; a run keeps that share, so the first of several has more.
    """
    return max(1, cores() // (gpus if gpu_bound else max(1, runs)))


def chosen_engine() -> str:
    """The name in ``$NIC_EXECUTOR``; raises as :func:`chosen_executor` for one that is none."""
    name = os.environ.get(EXECUTOR_VARIABLE) or "local"
    if name not in _ENGINES:
        raise dg.DagsterInvalidDefinitionError(
            f"{EXECUTOR_VARIABLE} is '{name}'; give one of {', '.join(_ENGINES)}"
        )
    return name


def _local_slots() -> int:
    return max(1, torch.cuda.device_count())


def _share_cores(context: dg.InitExecutorContext) -> None:
    """Tell the processes of a run's steps how many threads they may have, unless somebody has."""
    if THREAD_VARIABLES[0] in os.environ:
        return
    nodes = context.job.get_definition().nodes
    threads = threads_a_step(
        gpu_bound=any(node.definition.tags.get(DEVICE_TAG) == "gpu" for node in nodes),
        gpus=_local_slots(),
        runs=context.instance.get_runs_count(
            dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED])
        ),
    )
    if threads < cores():
        # they inherit it before their libraries look
        os.environ |= dict.fromkeys(THREAD_VARIABLES, str(threads))

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
from collections.abc import Callable, Mapping
from typing import Any

import dagster as dg
import torch
from dagster import multiple_process_executor_requirements

from nic_core.slides.blocks import cores

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
    name = os.environ.get(EXECUTOR_VARIABLE) or "local"
    if name not in _ENGINES:
        raise dg.DagsterInvalidDefinitionError(
            f"{EXECUTOR_VARIABLE} is '{name}'; give one of {', '.join(_ENGINES)}"
        )
    package, attribute, config = _ENGINES[name]
    try:
        engine = getattr(importlib.import_module(package), attribute)
    except ModuleNotFoundError as error:
        raise dg.DagsterInvalidDefinitionError(
            f"{EXECUTOR_VARIABLE} is '{name}', but {error.name} is not installed; "
            f"its extra brings it: pip install -e '.[{name}]'"
        ) from error
    prepare = _prepare_local_run if name == "local" else _prepare_remote_run
    return _prepared(engine, prepare).configured(config)


def gpu_slots() -> int:
    """GPU-bound steps that this machine can run beside each other."""
    return max(1, torch.cuda.device_count())


def set_gpu_slots(instance: dg.DagsterInstance) -> None:
    """Give the pool ``gpu`` as many slots as this machine has GPUs, one where it has none."""
    instance.event_log_storage.set_concurrency_slots(GPU_POOL, gpu_slots())


def threads_a_step(*, gpu_bound: bool, gpus: int, runs: int) -> int:
    """This machine's cores for each step of a run, so that the steps together have as many
    threads as there are cores.

    GPU-bound steps are as many as the pool's slots, whatever else runs: the same training has the
    same number of threads each time, and so gives the same weights. CPU-bound steps share with
    the ``runs`` under way, which their results do not depend on.
    """
    return max(1, cores() // (gpus if gpu_bound else max(1, runs)))


def _prepare_local_run(context: dg.InitExecutorContext) -> None:
    set_gpu_slots(context.instance)
    if THREAD_VARIABLES[0] in os.environ:
        return  # the operator's word
    nodes = context.job.get_definition().nodes
    threads = threads_a_step(
        gpu_bound=any(node.definition.tags.get(DEVICE_TAG) == "gpu" for node in nodes),
        gpus=gpu_slots(),
        runs=context.instance.get_runs_count(
            dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED])
        ),
    )
    if threads < cores():
        # the processes of this run's steps inherit it, before their libraries look
        os.environ |= dict.fromkeys(THREAD_VARIABLES, str(threads))


def _prepare_remote_run(context: dg.InitExecutorContext) -> None:
    context.instance.event_log_storage.delete_concurrency_limit(GPU_POOL)


def _prepared(
    engine: dg.ExecutorDefinition, prepare: Callable[[dg.InitExecutorContext], None]
) -> dg.ExecutorDefinition:
    """The same engine, which first does ``prepare`` in the process of every run."""
    create_engine = engine.executor_creation_fn
    assert create_engine is not None

    def create(context: dg.InitExecutorContext) -> dg.Executor:
        prepare(context)
        return create_engine(context)

    return dg.ExecutorDefinition(
        engine.name,
        engine.config_schema.as_field(),
        multiple_process_executor_requirements(),
        create,
    )

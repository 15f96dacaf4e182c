"""The executor by environment variable, the slots of the GPU pool, the threads of a step."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg
import pytest
import torch
from dagster._core.definitions.job_base import InMemoryJob

from nic_assets.build import build_defs
from nic_assets.orchestration import executors
from nic_assets.orchestration.executors import (
    CPU_TAGS,
    GPU_POOL,
    GPU_TAGS,
    chosen_executor,
    threads_per_step,
)
from nic_core import steps
from nic_core.cohort import load_cohort
from nic_core.encoders import EncoderError
from nic_core.store import Store


@dg.asset(op_tags=GPU_TAGS)
def training() -> None: ...


@dg.asset(op_tags=CPU_TAGS)
def tissue() -> None: ...


@pytest.fixture
def instance(tmp_path):
    return dg.DagsterInstance.local_temp(str(tmp_path))


@pytest.fixture(autouse=True)
def _without_settings(monkeypatch):
    monkeypatch.delenv(executors.EXECUTOR_VARIABLE, raising=False)
    for name in executors.THREAD_VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores the variable after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(executors, "cores", lambda: 8)


def start(instance: dg.DagsterInstance, asset: dg.AssetsDefinition) -> None:
    """Create the executor of a run, as Dagster does before the first step."""
    executor = chosen_executor()
    job = dg.Definitions([asset]).resolve_implicit_global_asset_job_def()
    assert executor.executor_creation_fn is not None
    config = executor.apply_config_mapping({}).value["config"]
    executor.executor_creation_fn(
        dg.InitExecutorContext(InMemoryJob(job), executor, config, instance)
    )


def add_unfinished_runs(instance: dg.DagsterInstance, runs: int) -> None:
    job = dg.Definitions([tissue]).resolve_implicit_global_asset_job_def()
    for _ in range(runs):
        instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)


def slots(instance: dg.DagsterInstance) -> int | None:
    limits = {pool.name: pool.limit for pool in instance.event_log_storage.get_pool_limits()}
    return limits.get(GPU_POOL)


# --- the setting -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "local"])
def test_the_default_executor_is_local(monkeypatch, name):
    monkeypatch.setenv("NIC_EXECUTOR", name)
    assert chosen_executor().name == "multiprocess"


@pytest.mark.parametrize(
    ("name", "package"), [("celery", "dagster_celery"), ("ray", "dagster_ray")]
)
def test_the_variable_selects_the_engine(monkeypatch, name, package):
    pytest.importorskip(package, reason=f"the extra '{name}' is not installed")
    monkeypatch.setenv("NIC_EXECUTOR", name)
    assert chosen_executor().name == name


def test_an_unknown_engine_is_refused_with_a_list(monkeypatch):
    monkeypatch.setenv("NIC_EXECUTOR", "sellery")
    with pytest.raises(dg.DagsterInvalidDefinitionError, match="'sellery'; set it to one of local"):
        chosen_executor()


@pytest.mark.parametrize(
    ("name", "package"),
    [("celery", "dagster_celery"), ("ray", "dagster_ray"), ("kubernetes", "dagster_k8s")],
)
def test_a_missing_package_of_an_engine_names_its_extra(monkeypatch, name, package):
    monkeypatch.setenv("NIC_EXECUTOR", name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(dg.DagsterInvalidDefinitionError, match=rf"pip install '.*\[{name}\]'"):
        chosen_executor()


@pytest.mark.slow
def test_every_asset_has_consistent_tags_for_all_engines(tiny_cohort, tmp_path):
    graph = build_defs(load_cohort(tiny_cohort), Store(tmp_path)).resolve_asset_graph()
    for key in graph.materializable_asset_keys:
        operation = graph.get(key).assets_def.op
        device = operation.tags["nic/device"]
        assert operation.tags["dagster-celery/queue"] == device
        assert ("num_gpus" in operation.tags["dagster-ray/config"]) == (device == "gpu")
        assert ("nvidia.com/gpu" in operation.tags["dagster-k8s/config"]) == (device == "gpu")
        assert (operation.pool == GPU_POOL) == (device == "gpu"), key


# --- the device ------------------------------------------------------------------------------


@contextmanager
def _eighth_gpu() -> Iterator[str]:
    yield "cuda:7"


@pytest.mark.slow
def test_gpu_bound_assets_use_the_leased_device(tiny_cohort, tmp_path, monkeypatch):
    monkeypatch.setattr("nic_core.devices.leased_device", _eighth_gpu)
    cohort, store = load_cohort(tiny_cohort), Store(tmp_path / "store")
    job = build_defs(cohort, store).resolve_implicit_global_asset_job_def()
    steps.make_encoder(cohort, store, "mean-rgb")

    def trained_on(*_: object, device: str, **__: object) -> None:
        raise EncoderError(f"trained on {device}")

    monkeypatch.setattr("nic_core.steps.encoders.load_patch_task", lambda folder: folder)
    monkeypatch.setattr("nic_core.steps.encoders.train_encoder", trained_on)
    monkeypatch.setattr(steps, "make_slide_model", trained_on)
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("slides", ["s1"])

        def failure(asset: str, partition: str) -> str:
            result = job.execute_in_process(
                instance=instance,
                asset_selection=[dg.AssetKey(asset)],
                partition_key=partition,
                raise_on_error=False,
            )
            [event] = result.get_step_failure_events()
            return event.step_failure_data.error_display_string

        assert "trained on cuda:7" in failure("encoder", "mtl-4")
        assert "device 'cuda:7' is not available" in failure("grid", "mean-rgb|s1")
        assert "trained on cuda:7" in failure("slide_model", f"mean-rgb|{cohort.targets[0].name}")


# --- the pool --------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "expected"), [(0, 1), (1, 1), (4, 4)])
def test_the_pool_has_one_slot_per_gpu_and_at_least_one(instance, monkeypatch, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    start(instance, training)
    assert slots(instance) == expected


def test_a_run_without_gpu_bound_steps_leaves_the_pool(instance, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    start(instance, training)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    start(instance, tissue)
    assert slots(instance) == 4


def test_the_pool_limit_follows_the_number_of_gpus(instance, monkeypatch):
    for gpus in (4, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        start(instance, training)
    assert slots(instance) == 2


def test_the_pool_has_no_limit_on_several_machines(instance, monkeypatch):
    pytest.importorskip("dagster_celery", reason="the extra 'celery' is not installed")
    start(instance, training)
    assert slots(instance) == 1
    monkeypatch.setenv("NIC_EXECUTOR", "celery")
    monkeypatch.setenv("NIC_CELERY_BROKER", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("NIC_CELERY_BACKEND", "redis://127.0.0.1:1/1")
    start(instance, training)
    assert slots(instance) is None


def test_a_run_on_several_machines_needs_locks_between_them(instance, monkeypatch, tmp_path):
    monkeypatch.setattr(executors, "lock_problem", lambda folder: "/nas keeps locks to itself")
    start(instance, training)
    (tmp_path / "slurm.yaml").touch()
    monkeypatch.setenv("NIC_EXECUTOR", "slurm")
    monkeypatch.setenv("NIC_SLURM", str(tmp_path / "slurm.yaml"))
    with pytest.raises(
        dg.DagsterInvariantViolationError, match="need locks between them, but the store is on /nas"
    ):
        start(instance, training)
    monkeypatch.setattr(executors, "lock_problem", lambda folder: None)
    start(instance, training)


# --- threads ---------------------------------------------------------------------------------


def test_cpu_bound_steps_share_the_cores_with_other_runs(instance):
    add_unfinished_runs(instance, 4)
    start(instance, tissue)
    assert [os.environ[name] for name in executors.THREAD_VARIABLES] == ["2", "2"]


def test_gpu_bound_steps_share_the_cores_by_gpus_only(instance, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    add_unfinished_runs(instance, 4)
    start(instance, training)
    assert os.environ["OMP_NUM_THREADS"] == "4"


def test_a_single_run_gets_no_thread_limit(instance):
    add_unfinished_runs(instance, 1)
    start(instance, tissue)
    add_unfinished_runs(instance, 3)
    start(instance, training)
    assert not set(executors.THREAD_VARIABLES) & set(os.environ)


def test_a_thread_limit_in_the_environment_is_kept(instance, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    add_unfinished_runs(instance, 4)
    start(instance, tissue)
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_all_steps_together_have_at_most_one_thread_per_core():
    for runs in range(12):
        each = threads_per_step(gpu_bound=False, gpus=1, runs=runs)
        assert each >= 1
        assert each * runs <= 8 or each == 1

"""Kubernetes without a cluster: the configuration schemas, and the pod of a step."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest
from dagster._config import process_config, resolve_to_config_type
from dagster._core.instance.ref import InstanceRef

from nic_assets.orchestration.executors import CPU_TAGS, GPU_TAGS, chosen_executor

EXAMPLE = Path(__file__).parents[2] / "examples" / "kubernetes"
REASON = "the extra 'kubernetes' is not installed"

launcher = pytest.importorskip("dagster_k8s.launcher", reason=REASON)
pods = pytest.importorskip("dagster_k8s.job", reason=REASON)


@pytest.mark.parametrize(
    ("tags", "limits", "requests"),
    [(GPU_TAGS, {"nvidia.com/gpu": "1"}, None), (CPU_TAGS, None, {"cpu": "1"})],
)
def test_the_pod_of_a_step_has_the_resources_of_its_tags(tags, limits, requests):
    @dg.asset(op_tags=tags)
    def work() -> None: ...

    job = pods.construct_dagster_k8s_job(
        pods.DagsterK8sJobConfig(job_image="nic", dagster_home="/home"),
        args=["dagster", "api", "execute_step"],
        job_name="step",
        user_defined_k8s_config=pods.get_user_defined_k8s_config(work.op.tags),
    )
    [container] = job.spec.template.spec.containers
    assert container.resources.limits == limits
    assert container.resources.requests == requests


def test_the_variable_selects_kubernetes(monkeypatch):
    monkeypatch.setenv("NIC_EXECUTOR", "kubernetes")
    assert chosen_executor().name == "k8s"


def test_the_example_matches_the_schemas_of_instance_and_launcher():
    found = InstanceRef.from_dir(str(EXAMPLE)).run_launcher_data
    assert found is not None
    schema = resolve_to_config_type(launcher.K8sRunLauncher.config_type())
    checked = process_config(schema, found.config_dict)
    assert checked.success, checked.errors

"""The settings file of Slurm: fields, errors with their line, a step's own tag, batches."""

from __future__ import annotations

import json
from pathlib import Path

import dagster as dg
import pytest

from nic_assets.orchestration.executors import batch_policy, chosen_executor
from nic_assets.orchestration.slurm.settings import SlurmSettings, load_slurm_settings

EXAMPLE = Path(__file__).parents[2] / "examples" / "slurm" / "slurm.yaml"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Read settings from a text."""

    def read(text: str) -> SlurmSettings:
        (tmp_path / "slurm.yaml").write_text(text)
        monkeypatch.setenv("NIC_SLURM", str(tmp_path / "slurm.yaml"))
        return load_slurm_settings()

    return read


def test_the_example_is_valid_and_complete():
    settings = load_slurm_settings({"NIC_SLURM": str(EXAMPLE)})
    assert settings.resources(gpu_bound=True).arguments() == [
        "--partition=gpu",
        "--gres=gpu:1",
        "--cpus-per-task=8",
        "--mem=32G",
        "--time=1-00:00:00",
    ]
    assert settings.resources(gpu_bound=False).arguments() == [
        "--partition=cpu",
        "--cpus-per-task=4",
        "--mem=8G",
        "--time=12:00:00",
    ]


def test_gpu_bound_steps_ask_for_a_gpu_in_an_empty_file(load):
    settings = load("")
    assert settings.resources(gpu_bound=True).arguments() == ["--gres=gpu:1", "--cpus-per-task=1"]
    assert settings.resources(gpu_bound=False).arguments() == ["--cpus-per-task=1"]


def test_the_account_of_a_kind_of_step_replaces_the_common_one(load):
    settings = load("account: all\ngpu: {account: gpus}\n")
    assert settings.resources(gpu_bound=True).account == "gpus"
    assert settings.resources(gpu_bound=False).account == "all"


def test_the_tag_of_a_step_replaces_single_fields(load):
    settings = load("gpu: {partition: gpu, memory: 8G}\n")
    own = json.dumps({"memory": "64G", "options": ["--qos=long"]})
    assert settings.resources(gpu_bound=True, tag=own).arguments() == [
        "--partition=gpu",
        "--gres=gpu:1",
        "--cpus-per-task=1",
        "--mem=64G",
        "--qos=long",
    ]


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("64G", "tag nic/slurm: not JSON"),
        ('"64G"', "tag nic/slurm: write keys with values"),
        ('{"memroy": "64G"}', "memroy: unknown key 'memroy'; did you mean 'memory'"),
        ('{"cpus": 0}', "cpus: Input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_tag_is_an_error_that_names_the_field(load, tag, message):
    with pytest.raises(ValueError, match=message):
        load("").resources(gpu_bound=True, tag=tag)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu: {partitoin: gpu}", r"slurm.yaml:1: gpu.partitoin: unknown key .* 'partition'"),
        ("cpu:\n  memory: 32", r"slurm.yaml:2: cpu.memory: Input should be a valid string, not 32"),
        ("cpu:\n  memory: 32 GB", r"slurm.yaml:2: cpu.memory: .*not '32 GB'"),
        ("cpu:\n  time: 12:00:00", r"slurm.yaml:2: cpu.time: write it in quotes"),
        ("cpu: {time: tomorrow}", r"slurm.yaml:1: cpu.time: .*not 'tomorrow'"),
        ("gpu: {cpus: -1}", r"gpu.cpus: .*greater than or equal to 1, not -1"),
        ("partitions_per_job: 0", "partitions_per_job: .*greater than or equal to 1"),
        ("gpu: 3", "slurm.yaml:1: gpu: write keys with values"),
        ("gpu: {}\ngpu: {}", "slurm.yaml:2: gpu: the key is also in line 1"),
        ("- gpu", "slurm.yaml:1: settings: write keys with values"),
        ("gpu: [", "slurm.yaml:.*: not valid YAML"),
    ],
)
def test_a_wrong_field_is_an_error_with_its_line(load, text, message):
    with pytest.raises(dg.DagsterInvalidDefinitionError, match=message):
        load(text)


@pytest.mark.parametrize(
    "time", ["10", "90:00", "12:00:00", "1-0", "1-12:30", "2-00:00:00", "infinite"]
)
def test_the_time_limits_of_sbatch_are_accepted(load, time):
    assert load(f'cpu: {{time: "{time}"}}').cpu.time == time


@pytest.mark.parametrize("named", [None, "/nowhere/slurm.yaml"])
def test_a_missing_file_is_an_error_that_names_the_variable(monkeypatch, named):
    monkeypatch.setenv("NIC_EXECUTOR", "slurm")
    if named is None:
        monkeypatch.delenv("NIC_SLURM", raising=False)
    else:
        monkeypatch.setenv("NIC_SLURM", named)
    with pytest.raises(dg.DagsterInvalidDefinitionError, match="NIC_SLURM"):
        batch_policy()


def test_relative_logs_are_beside_the_settings_file(load, tmp_path):
    assert load("logs: logs").logs == tmp_path / "logs"


def test_default_logs_are_beside_the_records_of_dagster(load, tmp_path, monkeypatch):
    monkeypatch.setenv("NIC_DAGSTER_STORAGE", str(tmp_path / "records"))
    assert load("").logs == tmp_path / "records" / "slurm"
    monkeypatch.delenv("NIC_DAGSTER_STORAGE")
    monkeypatch.setenv("NIC_STORE", str(tmp_path / "store"))
    assert load("").logs == tmp_path / "store" / "dagster" / "slurm"


def test_a_batch_is_split_into_runs_of_the_set_size(load, monkeypatch):
    monkeypatch.setenv("NIC_EXECUTOR", "slurm")
    load("partitions_per_job: 3")
    assert batch_policy() == dg.BackfillPolicy.multi_run(3)
    monkeypatch.setenv("NIC_EXECUTOR", "local")
    assert batch_policy() == dg.BackfillPolicy.single_run()


def test_the_variable_selects_slurm(monkeypatch):
    monkeypatch.setenv("NIC_EXECUTOR", "slurm")
    assert chosen_executor().name == "slurm"

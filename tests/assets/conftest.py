"""Fixtures of the tests of the assets: Dagster's commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def dagster(commands: Path, tmp_path: Path) -> Command:
    """Runs a Dagster command as a CI job does, configured by the environment."""
    home = tmp_path / "home"
    home.mkdir()

    def run(cohort: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [commands / "dagster", *arguments, "-m", "nic_assets.definitions"],
            env=os.environ
            | {
                "NIC_COHORT": str(cohort),
                "NIC_STORE": str(tmp_path / "store"),
                "DAGSTER_HOME": str(home),
                "DAGSTER_TELEMETRY_ENABLED": "false",
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def materialize(dagster: Command) -> Command:
    return lambda cohort, *arguments: dagster(
        cohort, "asset", "materialize", "--select", *arguments
    )


@pytest.fixture
def executor_environment(
    tiny_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, str]]:
    """Sets the variables of runs and workers with an executor and some others; returns them all."""

    def set_variables(executor: str, **others: str) -> dict[str, str]:
        home = tmp_path / "home"
        home.mkdir()
        shutil.copy(ROOT / "dagster.yaml", home)
        variables = {
            "NIC_COHORT": str(tiny_cohort),
            "NIC_STORE": str(tmp_path / "store"),
            "NIC_DAGSTER_STORAGE": str(tmp_path / "store" / "dagster"),
            "NIC_EXECUTOR": executor,
            "DAGSTER_HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            **others,
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        # the loaded definitions may belong to another environment
        monkeypatch.delitem(sys.modules, "nic_assets.definitions", raising=False)
        return {**os.environ, **variables}

    return set_variables

"""Fixtures of the tests of the assets: Dagster's commands."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

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

"""``dg``, Dagster's command line for projects, beside ``dagster``."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

pytest.importorskip("dagster_dg_cli", reason="dagster-dg-cli is not installed")
pytestmark = pytest.mark.integration

PROJECT = Path(__file__).parents[2]

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the project's instance settings, whose records lie beside it."""
    folder = tmp_path_factory.mktemp("dg")
    (folder / "dagster.yaml").write_bytes((PROJECT / "dagster.yaml").read_bytes())
    return folder


@pytest.fixture(scope="module")
def command(home: Path, tiny_cohort: Path, commands: Path) -> Command:
    """Runs ``dg`` in the project's folder on the tiny cohort."""
    environment = {
        **os.environ,
        "DAGSTER_HOME": str(home),
        "NIC_COHORT": str(tiny_cohort),
        "NIC_STORE": str(home / "store"),
        "NIC_DAGSTER_STORAGE": str(home / "store" / "dagster"),
        # this checkout, also where another one is installed
        "PYTHONPATH": str(PROJECT),
        "PYTHONWARNINGS": "ignore",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [commands / "dg", *arguments],
            cwd=PROJECT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def test_the_project_file_is_valid(command):
    done = command("check", "toml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_definitions_are_valid(command):
    done = command("check", "defs")
    assert done.returncode == 0, done.stdout + done.stderr


def test_definitions_are_listed(command):
    done = command("list", "defs", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    listed = json.loads(done.stdout[done.stdout.index("{") :])
    assert "slide_index" in {asset["asset_key"] for asset in listed["assets"]}


def test_an_asset_is_materialized_and_recorded(command, home, monkeypatch):
    done = command("launch", "--assets", "slide_index")
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.setenv("NIC_DAGSTER_STORAGE", str(home / "store" / "dagster"))
    with dg.DagsterInstance.from_config(str(home)) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("slide_index"))
    assert event is not None


def test_a_failed_launch_has_a_status(command):
    assert command("launch", "--assets", "no_such_asset").returncode != 0

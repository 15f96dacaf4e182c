"""What Dagster's commands and ``nic`` show of a user's mistake: one line, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("dagster_dg_cli", reason="dagster-dg-cli is not installed")
pytestmark = pytest.mark.integration

PROJECT = Path(__file__).parents[2]
DAGSTER, DG = ["-m", "dagster"], ["-m", "dagster_dg_cli.cli"]
NIC = ["-c", "from nic_core.cli import main; main()"]

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Dagster's settings and an empty file for a slide."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "dagster.yaml").write_bytes((PROJECT / "dagster.yaml").read_bytes())
    (folder / "slides.csv").write_text("slide,path,patient\na,a.tif,p\n")
    (folder / "labels.csv").write_text("slide,score\na,1\n")
    (folder / "a.tif").write_text("no slide")
    return folder


@pytest.fixture(scope="module")
def command(study: Path, commands: Path) -> Command:
    """Runs a Python module in the project's folder on a cohort file with the given text."""

    def run(cohort: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        (study / "cohort.yaml").write_text(cohort)
        environment = {
            **os.environ,
            "DAGSTER_HOME": str(study),
            "NIC_COHORT": str(study / "cohort.yaml"),
            "NIC_STORE": str(study / "store"),
            "NIC_DAGSTER_STORAGE": str(study / "store" / "dagster"),
            # this checkout, also where another one is installed
            "PYTHONPATH": str(PROJECT),
            "PYTHONWARNINGS": "ignore",
            # as in an activated environment; without it, dg warns
            "VIRTUAL_ENV": sys.prefix,
            "COLUMNS": "80",
        }
        return subprocess.run(
            [commands / "python", *arguments],
            cwd=PROJECT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run


def shown(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines on the console, without empty ones and terminal codes alone."""
    lines = (done.stderr + done.stdout).splitlines()
    return [line for line in lines if line.replace("\x1b[0m", "").strip()]


VALID = """\
name: study
slides: {table: slides.csv}
encoders: [{name: rgb, objective: mean_rgb}]
"""
UNKNOWN_KEY = VALID.replace("table:", "tabel:")
KEY_LINE = "cohort.yaml:2: slides.tabel: unknown key 'tabel'; did you mean 'table'?"
UNKNOWN_TASK = VALID + "maps: [{name: m, encoder: rbg, task: t, label: x}]\n"
TASK_LINE = "cohort.yaml:4: maps.0.encoder: encoder 'rbg' is not defined; did you mean 'rgb'?"
UNKNOWN_COLUMN = VALID + (
    "labels: labels.csv\ntargets:\n  - {name: t, kind: regression, column: skore}\n"
)
COLUMN_LINE = "cohort.yaml:6: targets.0.column: label table"


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ([*DG, "launch", "--assets", "slide_index"], 1),
        ([*DG, "list", "defs"], 2),
        ([*DG, "check", "defs"], 4),
        ([*NIC, "refresh"], 1),
    ],
    ids=["dg launch", "dg list defs", "dg check defs", "nic refresh"],
)
def test_an_invalid_cohort_file_is_one_line(command, arguments, lines):
    done = command(UNKNOWN_KEY, *arguments)
    assert done.returncode != 0
    assert len(shown(done)) == lines
    assert sum(KEY_LINE in line for line in shown(done)) == 1


def test_dagster_shows_the_line_of_a_reference(command):
    module = ["-m", "nic_assets.definitions"]
    done = command(UNKNOWN_TASK, *DAGSTER, "asset", "materialize", *module, "--select", "slide")
    assert done.returncode == 1
    assert len(shown(done)) == 1
    assert TASK_LINE in shown(done)[0]
    done = command(UNKNOWN_TASK, *DAGSTER, "definitions", "validate")
    assert done.returncode == 1
    assert len(shown(done)) <= 4
    assert sum(TASK_LINE in line for line in shown(done)) == 1


def test_a_failed_step_shows_its_reason_without_a_traceback(command):
    assert command(UNKNOWN_COLUMN, *DG, "launch", "--assets", "slide_index").returncode == 0
    done = command(UNKNOWN_COLUMN, *DG, "launch", "--assets", "target_folds", "--partition", "t")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert "Stack Trace" not in done.stderr + done.stdout
    # two lines of the log; then the failure of the step, of the run, and of the command
    assert len(shown(done)) == 7
    assert sum(COLUMN_LINE in line for line in shown(done)) == 3
    done = command(UNKNOWN_COLUMN, *NIC, "refresh")
    assert done.returncode == 1
    words = "".join((done.stderr + done.stdout).split())  # without the line breaks of the terminal
    assert "".join(COLUMN_LINE.split()) in words
    assert "Traceback" not in words


def test_wrong_arguments_are_one_line(command):
    assert command(VALID, *DG, "launch", "--assets", "slide_index").returncode == 0
    for arguments, message in (
        (["--assets", "slide", "--partition", "b"], "partition 'b' does not exist; there are a"),
        (["--assets", "grid", "--partition", "rgb|b"], "partition 'rgb|b' does not exist"),
        (["--assets", "slid"], 'did you mean one of the following? ["slide"]'),
        (["--assets", "slide"], "no '--partition' option was provided"),
    ):
        done = command(VALID, *DG, "launch", *arguments)
        assert done.returncode == 1
        assert len(shown(done)) == 1
        assert message in shown(done)[0]


def test_a_fault_of_the_program_keeps_its_traceback(command):
    done = command(VALID, "-c", "import nic_assets.definitions; {}['key']")
    assert "Traceback" in done.stderr
    assert "KeyError: 'key'" in done.stderr


def test_a_variable_that_the_settings_lack_is_one_line(study, command):
    settings = study / "dagster.yaml"
    kept = settings.read_text()
    settings.write_text(kept.replace("NIC_DAGSTER_STORAGE", "NIC_IS_NOT_SET"))
    try:
        done = command(
            "name: s\nslides: {table: slides.csv}\nencoders: [{name: e, objective: mean_rgb}]\n",
            *NIC,
            "refresh",
        )
    finally:
        settings.write_text(kept)
    assert done.returncode == 2
    [line] = shown(done)
    assert line.startswith(f"{settings}: ")
    assert 'the environment variable "NIC_IS_NOT_SET" which is not set' in line

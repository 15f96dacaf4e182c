"""The container image, as far as it can be checked without building it."""

from __future__ import annotations

import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KUBERNETES = ROOT / "examples" / "kubernetes" / "dagster.yaml"


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and argument of each instruction, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(n, a.strip()) for n, _, a in (li.partition(" ") for li in joined.splitlines()) if n]


TEXT = (ROOT / "Containerfile").read_text()
INSTRUCTIONS = instructions(TEXT)


def arguments(name: str) -> list[str]:
    return [argument for found, argument in INSTRUCTIONS if found == name]


def last_stage() -> list[tuple[str, str]]:
    begins = max(i for i, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM")
    return INSTRUCTIONS[begins:]


def copied() -> list[str]:
    """What is copied from the project's folder."""
    found = []
    for argument in arguments("COPY"):
        words = shlex.split(argument)
        if not words[0].startswith("--from="):
            found += words[:-1]
    return found


def test_the_instructions_are_known():
    known = {"ARG", "FROM", "ENV", "WORKDIR", "RUN", "COPY", "USER", "EXPOSE", "CMD"}
    assert {name for name, _ in INSTRUCTIONS} <= known


def test_what_is_copied_exists_and_is_not_ignored():
    lines = (ROOT / ".dockerignore").read_text().split()
    admitted = [line[1:] for line in lines if line.startswith("!")]
    assert lines[0] == "*"
    for source in copied():
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source.rstrip("/"), pattern) for pattern in admitted), source


def test_what_it_installs_from_exists():
    runs = " ".join(arguments("RUN"))
    files = re.findall(r"(?:--requirement|--(?:build-)?constraint) (\S+)", runs)
    assert "requirements/image.txt" in files
    for file in set(files) - {"torch.txt"}:  # written in the build from the line of the constraints
        assert (ROOT / file).is_file(), file
    constraints = (ROOT / "requirements" / "constraints.txt").read_text()
    assert len(re.findall(r"^torch==", constraints, re.M)) == 1


def test_it_installs_extras_that_the_project_has():
    [extras] = re.findall(r'"\.\[([\w,]+)\]"', " ".join(arguments("RUN")))
    assert set(extras.split(",")) == {"platform", "kubernetes", "postgres"}
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


def test_the_base_has_no_host_and_the_python_of_the_project():
    [base] = re.findall(r"^ARG PYTHON=(\S+)$", TEXT, re.M)
    assert "/" not in base
    assert re.fullmatch(r"python:(3\.\d+)-slim", base)
    lowest = PROJECT["requires-python"].removeprefix(">=")
    version = re.findall(r"\d+\.\d+", base)[0]
    assert tuple(map(int, version.split("."))) >= tuple(map(int, lowest.split(".")))
    assert "://" not in TEXT


def test_it_does_not_run_as_root():
    users = [argument for name, argument in last_stage() if name == "USER"]
    assert users
    assert users[-1] not in {"0", "root"}


def test_nothing_of_the_build_but_the_environment_is_in_it():
    copies = [argument for name, argument in last_stage() if name == "COPY"]
    assert copies == ["--from=build /opt/nic /opt/nic"]


def test_its_command_loads_the_definitions():
    [command] = arguments("CMD")
    words = yaml.safe_load(command)
    assert words[0] == "dagster-webserver"
    module = words[words.index("-m") + 1]
    assert (ROOT / Path(*module.split("."))).with_suffix(".py").is_file()
    # as in every other place that says what Dagster loads
    workspace = yaml.safe_load((ROOT / "workspace.yaml").read_text())
    assert workspace["load_from"][0]["python_module"]["module_name"] == module


def test_the_example_for_kubernetes_uses_it():
    launcher = yaml.safe_load(KUBERNETES.read_text())["run_launcher"]["config"]
    image = f"nic:{PROJECT['version']}"
    assert launcher["job_image"].rpartition("/")[2] == image
    assert f"--tag {image} ." in TEXT
    assert "Containerfile" in KUBERNETES.read_text()


def test_dagster_has_its_home_where_the_example_mounts_it():
    environment = dict(
        pair.split("=", 1) for argument in arguments("ENV") for pair in shlex.split(argument)
    )
    launcher = yaml.safe_load(KUBERNETES.read_text())["run_launcher"]["config"]
    assert environment["DAGSTER_HOME"] == launcher["dagster_home"]


@pytest.mark.parametrize("name", ["slides.csv", ".env", ".git", "data", ".venv", "tests"])
def test_the_build_is_not_given(name):
    admitted = [line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"]
    assert not any(fnmatch(name, pattern) for pattern in admitted)

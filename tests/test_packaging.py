"""The distribution and the files that say what it needs: metadata, lock files, citation."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "requirements"
HASHED = ("platform.txt", "image.txt", "dev.txt")
# distribution -> what is imported, where the names differ
IMPORTED = {
    "pillow": "PIL",
    "python-dotenv": "dotenv",
    "pyyaml": "yaml",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "scikit-survival": "sksurv",
    "openslide-python": "openslide",
}
# needed, and imported by a dependency or run as a command alone
NOT_IMPORTED = {"openslide-bin", "dagster-webserver", "dagster-dg-cli"}

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def required(requirements: list[str]) -> dict[str, Requirement]:
    parsed = map(Requirement, requirements)
    return {canonicalize_name(r.name): r for r in parsed}


def group(name: str) -> list[str]:
    """The requirements of a dependency group and of those that it includes."""
    found: list[str] = []
    for entry in PYPROJECT["dependency-groups"][name]:
        found += group(entry["include-group"]) if isinstance(entry, dict) else [entry]
    return found


def locked(file: str) -> dict[str, Requirement]:
    lines = (LOCKS / file).read_text().splitlines()
    pins = [line.removesuffix("\\").strip() for line in lines if re.match(r"[a-z0-9]", line)]
    return required([pin for pin in pins if applies(pin)])


def applies(pin: str) -> bool:
    marker = Requirement(pin).marker
    environment = {**default_environment(), "python_full_version": "3.11.7"}
    return marker is None or marker.evaluate(environment)


def imported(package: str) -> set[str]:
    """The top-level modules that the files of a package import, wherever in the file."""
    modules: set[str] = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                modules.add(node.module.partition(".")[0])
    return modules


def module(distribution: str) -> str:
    return IMPORTED.get(distribution, distribution.replace("-", "_"))


CORE = required(PROJECT["dependencies"])
PLATFORM = required(PROJECT["optional-dependencies"]["platform"])
VIEW = required(PROJECT["optional-dependencies"]["view"])


def test_the_library_needs_neither_dagster_nor_mlflow():
    assert not {name for name in CORE if name.startswith(("dagster", "mlflow"))}
    assert not imported("nic_core") & {"nic_assets", *map(module, PLATFORM)}


@pytest.mark.parametrize(
    ("package", "needs"), [("nic_core", CORE), ("nic_assets", PLATFORM)], ids=["core", "platform"]
)
def test_every_dependency_is_used(package, needs):
    used = imported(package)
    assert not {n for n in needs if n not in NOT_IMPORTED and module(n) not in used}


def test_everything_imported_is_a_dependency():
    # the error without it names the extra; anndata brings pandas, spatialdata geopandas
    optional = {"timm", "pylibCZIrw", "anndata", "pandas", "spatialdata", "geopandas"}
    optional |= {"weasyprint", "obstore"}
    optional |= {module(name) for name in VIEW}
    engines = {"dagster_celery", "dagster_k8s", "dagster_postgres", "dagster_ray", "psycopg2"}
    known = set(sys.stdlib_module_names) | {"nic_core", *map(module, CORE)}
    # what a dependency is made of, in the same version
    known |= {"pydantic_core"}
    assert imported("nic_core") - known <= optional
    # mlflow gives tables of pandas to the models that it calls
    known |= {"nic_assets", "dagster_shared", "pandas", *map(module, PLATFORM)}
    assert imported("nic_assets") - known <= engines


@pytest.mark.parametrize("extra", ["celery", "ray", "kubernetes", "postgres"])
def test_an_engine_brings_the_platform(extra):
    requirements = required(PROJECT["optional-dependencies"][extra])
    assert requirements[PROJECT["name"]].extras == {"platform"}


def without_platform(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``nic`` in a process where Dagster and MLflow cannot be imported."""
    script = f"""
import importlib.util, sys
absent = {("dagster", "dagster_shared", "mlflow", "sqlalchemy")}
sys.modules |= dict.fromkeys(absent)
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in absent else real(name, *rest)
sys.argv = ["nic", *{arguments}]
from nic_core.cli import main
main()
"""
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, text=True
    )


@pytest.mark.integration
def test_the_command_works_without_the_platform():
    done = without_platform("--help")
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout


@pytest.mark.integration
@pytest.mark.parametrize("command", [("doctor",), ("refresh",), ("store", "gc")])
def test_platform_commands_say_what_to_install(command):
    done = without_platform(*command)
    assert done.returncode == 1, done.stderr
    assert f"pip install '{PROJECT['name']}[platform]'" in done.stdout
    assert "Traceback" not in done.stderr


def test_packages_of_dagster_are_of_one_release():
    release = str(PLATFORM["dagster"].specifier).removeprefix("==")
    of_engines = f"0.{int(release.split('.')[1]) + 16}.{release.split('.')[2]}"
    extras = [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    for requirement in map(Requirement, [*extras, *group("test")]):
        if requirement.name.startswith("dagster") and requirement.name != "dagster-ray":
            assert str(requirement.specifier) in {f"=={release}", f"=={of_engines}"}


def test_both_packages_are_typed():
    for package in ("nic_core", "nic_assets"):
        assert (ROOT / package / "py.typed").read_bytes() == b""
        assert PYPROJECT["tool"]["setuptools"]["package-data"][package][0] == "py.typed"


def test_the_version_is_stated_in_one_place():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == PROJECT["version"]


def test_the_installed_distribution_is_this_one():
    try:
        found = importlib.metadata.version(PROJECT["name"])
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{PROJECT['name']} is not installed")
    assert found == PROJECT["version"]


def test_the_lock_admits_what_the_project_asks_for():
    pins = locked("constraints.txt")
    extras = [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    for name, requirement in required(
        [*PROJECT["dependencies"], *extras, *group("dev"), *group("lock")]
    ).items():
        if name == PROJECT["name"]:
            continue
        [pin] = pins[name].specifier
        assert requirement.specifier.contains(pin.version, prereleases=True), name


@pytest.mark.parametrize(
    ("file", "needs"),
    [
        ("platform.txt", [*CORE.values(), *PLATFORM.values(), *VIEW.values()]),
        ("dev.txt", list(required(group("dev")).values())),
    ],
)
def test_the_hashed_files_hold_what_is_installed_from_them(file, needs):
    pins = locked("platform.txt") | locked(file)
    assert {canonicalize_name(r.name) for r in needs} - set(pins) <= {"torch"}


@pytest.mark.parametrize("file", HASHED)
def test_every_package_of_a_hashed_file_has_hashes_and_the_version_of_the_lock(file):
    constraints = locked("constraints.txt")
    for block in re.split(r"\n(?=\S)", (LOCKS / file).read_text().strip()):
        if block.startswith(("#", "-r ")):
            continue
        assert "--hash=sha256:" in block, block
        pin = block.splitlines()[0].removesuffix("\\").strip()
        if applies(pin):
            name = canonicalize_name(Requirement(pin).name)
            assert Requirement(pin).specifier == constraints[name].specifier
            assert not name.startswith(("torch", "nvidia-", "cuda-", "triton"))


@pytest.mark.parametrize("file", [*HASHED, "constraints.txt", "lowest.txt"])
def test_no_lock_names_a_host(file):
    text = (LOCKS / file).read_text()
    assert not re.search(r"://|--(extra-)?index-url|--find-links|@ ", text)


def test_the_lowest_versions_are_those_of_the_project():
    # pydantic: that of Dagster is higher; torch: lower ones were never tested
    higher = {"pydantic", "torch"}
    pins = locked("lowest.txt")
    for name, requirement in (CORE | PLATFORM).items():
        [floor] = [s.version for s in requirement.specifier if s.operator in {">=", "=="}]
        [pin] = pins[name].specifier
        assert requirement.specifier.contains(pin.version), name
        assert name in higher or f"{pin.version}.".startswith(f"{floor}."), name


def test_the_tests_that_the_makefile_names_exist():
    text = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?<![\w/])tests/[\w/]+(?:\.py)?(?=[\s\\])", text))
    assert len(named) > 10
    assert not {path for path in named if not (ROOT / path).exists()}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    named = set(re.findall(r"`((?:nic_core|nic_assets|tests|docs|requirements)/[\w./-]*)`", text))
    assert not {path for path in named if not (ROOT / path).exists()}


def test_a_module_that_should_be_absent_is_reported():
    script = [sys.executable, str(ROOT / ".ci" / "absent.py")]
    assert subprocess.run([*script, "no_such_module"], check=False).returncode == 0
    done = subprocess.run([*script, "json"], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "json" in done.stderr

"""What commands and Dagster's definitions import before they do any work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# each takes from a tenth of a second to several seconds to import
HEAVY = {"captum", "matplotlib", "mlflow", "pandas", "skimage", "sklearn", "sksurv", "torch"}
HEAVY |= {"obstore", "zarr"}


def imported(code: str, **environment: str) -> set[str]:
    """The packages that a new process has imported after it ran some code."""
    script = f"""
import sys
try:
    {code}
except SystemExit as end:
    assert end.code in (0, None), end.code
print("imported:", *{{name.partition(".")[0] for name in sys.modules}})
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("imported:")[2].split())


def nic(*arguments: str) -> set[str]:
    run = f"sys.argv = {['nic', *arguments]!r}; from nic_core.cli import main; main()"
    return imported(run)


@pytest.mark.integration
def test_help_imports_only_what_draws_it():
    packages = nic("--help")
    assert "typer" in packages
    assert not packages & (HEAVY | {"numpy", "polars", "pydantic", "pyvips", "scipy", "dagster"})


@pytest.mark.integration
def test_inspect_imports_only_what_opens_slides(tiny_cohort):
    slide = next(iter(sorted((tiny_cohort.parent / "slides").glob("*.tif"))))
    packages = nic("inspect", str(slide))
    assert "tifffile" in packages
    assert not packages & (HEAVY | {"dagster", "polars"})


@pytest.mark.integration
def test_definitions_import_no_package_of_the_steps(tiny_cohort, tmp_path):
    packages = imported(
        "import nic_assets.definitions", NIC_COHORT=str(tiny_cohort), NIC_STORE=str(tmp_path)
    )
    assert {"dagster", "polars"} <= packages
    assert not packages & (HEAVY | {"pyvips", "scipy"})

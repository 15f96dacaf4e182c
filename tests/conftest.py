"""What several tests share: a tiny demo cohort, painted once a session, and faulty disks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from nic_core.demo.cohort import make_demo

# no test is timed: a busy machine is no fault of the code
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort file of a dozen small slides and a few patches, with quick settings."""
    root = tmp_path_factory.mktemp("demo")
    cohort = make_demo(root, slides=12, patches_per_task=60, side=1024, workers=1)
    text = cohort.read_text()
    for old, new in (
        ("patches_seen: 32000", "patches_seen: 256\n  batch: 32"),
        ("crop: 24", "crop: 8"),
        ("epochs: 50", "epochs: 2\n    bootstrap: 50"),
    ):
        assert old in text
        text = text.replace(old, new)
    cohort.write_text(text)
    return cohort


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system with options, such as ``ro`` or ``size=64k``."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        folder = tmp_path / f"mounted-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"file systems cannot be mounted here ({done.stderr.strip()})")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)

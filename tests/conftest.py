"""What several tests share: a tiny demo cohort, painted once a session, and faulty disks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from nic_core import steps
from nic_core.cohort import Cohort, load_cohort
from nic_core.demo.cohort import make_demo
from nic_core.store import ModelKey, Store

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


@pytest.fixture(scope="session")
def mean_rgb_study(
    tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Cohort, Store]:
    """The tiny cohort up to its models, on grids of mean colours; not to be changed."""
    cohort, store = load_cohort(tiny_cohort), Store(tmp_path_factory.mktemp("study"))
    steps.make_slide_index(cohort, store)
    for slide in steps.read_slide_index(store)["slide"]:
        steps.make_slide(store, slide)
        steps.make_patch_table(cohort, store, slide)
    steps.make_encoder(cohort, store, "mean-rgb")
    encoder = steps.prepare_encoder(cohort, store, "mean-rgb")
    for slide in steps.read_slide_index(store)["slide"]:
        steps.make_grid(cohort, store, encoder, slide)
    for target in cohort.targets:
        steps.make_target_folds(cohort, store, target.name)
        steps.make_slide_model(cohort, store, ModelKey(encoder="mean-rgb", target=target.name))
    return cohort, store


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
        # lazily: a failed test may have left a file open
        subprocess.run(["umount", "--lazy", str(folder)], check=True)

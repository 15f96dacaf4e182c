"""Fixtures that several test folders use: a small demo cohort, a study on it, small file systems.

Heavy packages (torch, matplotlib, scikit-survival) are imported inside the fixtures, so that a test
that needs none of them starts in a second.
"""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from nic_core.cohort import Cohort
    from nic_core.store import Store

# no test has a time limit: a slow machine is not a failure
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
# the processes of xdist have it, and rich's console would keep it for the widths that tests set
os.environ.pop("COLUMNS", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with many slow tests first: processes that take file by file end together."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort file of twelve small slides and a few patches, with fast settings."""
    from nic_core.demo.cohort import make_demo

    root = tmp_path_factory.mktemp("demo")
    cohort = make_demo(root, slides=12, patches_per_task=60, side=1024, workers=1)
    text = cohort.read_text()
    for old, new in (
        ("patches_seen: 32000", "patches_seen: 256\n  batch: 32"),
        ("crop_um: 1536", "crop_um: 512"),
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
    """The tiny cohort and a store with its mean-RGB slide models; tests must not change it."""
    from nic_core import steps
    from nic_core.cohort import load_cohort
    from nic_core.store import GridKey, ModelKey, PatchTableKey, Store

    cohort, store = load_cohort(tiny_cohort), Store(tmp_path_factory.mktemp("study"))
    steps.make_slide_index(cohort, store)
    slides = steps.read_slide_index(store)["slide"]
    for slide in slides:
        steps.make_slide(store, slide)
        steps.make_patch_table(cohort, store, PatchTableKey(geometry="128px-0.5um", slide=slide))
    steps.make_encoder(cohort, store, "mean-rgb")
    encoder = steps.prepare_encoder(cohort, store, "mean-rgb")
    for slide in slides:
        steps.make_grid(cohort, store, encoder, slide)
    steps.make_grid_manifest(store, "mean-rgb")
    steps.make_embedding_colours(store, "mean-rgb")
    for slide in slides:
        steps.make_grid_preview(store, GridKey(encoder="mean-rgb", slide=slide))
    for target in cohort.targets:
        steps.make_target_folds(cohort, store, target.name)
        key = ModelKey(encoder="mean-rgb", target=target.name)
        steps.make_target_grids(store, key)
        steps.make_slide_model(cohort, store, key)
    return cohort, store


@pytest.fixture(scope="session")
def commands() -> Iterator[Path]:
    """A folder with ``nic``, ``dagster``, ``dg`` and ``python``, which start in a moment."""
    from tests.command_server import command_server

    with command_server() as folder:
        yield folder


@pytest.fixture
def can_run_int8() -> None:
    """Skip a test where precision int8 cannot be used."""
    from nic_core.torch_internals import cpu_has_vnni

    if find_spec("openvino") is None:
        pytest.skip("needs the extra openvino")
    if not cpu_has_vnni():
        pytest.skip("this processor has no int8 dot products (AVX512-VNNI)")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount small file systems with options such as ``ro`` or ``size=64k``."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        folder = tmp_path / f"mounted-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this user cannot mount file systems ({done.stderr.strip()})")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        # lazily, since a failed test may have left a file open
        subprocess.run(["umount", "--lazy", str(folder)], check=True)

"""Killed processes and failing disks: the next refresh gives the same results."""

import random
import subprocess
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
import yaml
from rich.console import Console

from benchmarks.kills import Study, compare, kill_refresh
from nic_assets.build import build_defs
from nic_assets.operations.doctor import examine
from nic_assets.operations.refresh import refresh
from nic_assets.orchestration import batches
from nic_core.cohort import load_cohort
from nic_core.store import exclusive_lock

SLIDES = 6


@pytest.fixture(scope="module")
def cohort(tiny_cohort: Path) -> Path:
    """The tiny cohort reduced to six slides and one mean-RGB encoder."""
    entries = yaml.safe_load(tiny_cohort.read_text())
    table = pl.read_csv(tiny_cohort.with_name("slides.csv"), infer_schema=False).head(SLIDES)
    table.write_csv(tiny_cohort.with_name("some_slides.csv"))
    entries |= {"slides": {"table": "some_slides.csv"}}
    entries |= {"patch_tasks": [], "maps": [], "targets": [], "labels": None}
    entries["encoders"] = [e for e in entries["encoders"] if e["name"] == "mean-rgb"]
    path = tiny_cohort.with_name("grids.yaml")
    path.write_text(yaml.safe_dump(entries))
    return path


@pytest.fixture(scope="module")
def undisturbed(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, float]:
    """A study without interruption, and its duration in s."""
    study = Study(cohort, tmp_path_factory.mktemp("undisturbed"))
    with study.instance():
        return study, study.refresh()


def made(instance: dg.DagsterInstance, asset: str) -> Counter[str]:
    """Return the number of materializations of each partition."""
    records = instance.fetch_materializations(dg.AssetKey(asset), limit=1000).records
    return Counter(record.partition_key for record in records)


@pytest.mark.integration
@pytest.mark.slow
def test_a_refresh_after_random_kills_gives_the_same_results(cohort, undisturbed, tmp_path):
    reference, seconds = undisturbed
    study, chance = Study(cohort, tmp_path), random.Random(1)
    with study.instance():
        pass
    kills = 0
    while kills < 2 and kill_refresh(study, chance.uniform(0.2, 0.8) * seconds):
        kills += 1
    study.refresh()
    compare(study, reference.results())
    with study.instance() as instance:
        assert examine(instance, study.store) == []
        for asset in ("slide", "patch_table", "grid"):
            counts = made(instance, asset)
            assert len(counts) == SLIDES
            # no recorded partition was materialized again
            assert counts.total() == SLIDES


@pytest.mark.integration
@pytest.mark.slow
def test_two_concurrent_refreshes_give_the_same_results(cohort, undisturbed, tmp_path):
    study = Study(cohort, tmp_path)
    with study.instance():
        pass
    both = [study.start_refresh() for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0], study.log
    compare(study, undisturbed[0].results())


def fill(folder: Path) -> Callable[[], None]:
    """Fill a disk; return a function that frees the space."""
    blocker = folder / "blocker"
    with blocker.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    return blocker.unlink


def protect(folder: Path) -> Callable[[], None]:
    """Make a file system read-only; return a function that makes it writable again."""

    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(folder)], check=True)

    remount("ro")
    return lambda: remount("rw")


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fail", "reason"),
    [(fill, "No space left on device"), (protect, "Read-only file system")],
)
def test_a_refresh_continues_after_a_disk_failure(
    cohort, undisturbed, mount, tmp_path, monkeypatch, fail, reason
):
    # an open database file would keep the file system from becoming read-only
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    study = Study(cohort, tmp_path)
    (tmp_path / "store").symlink_to(mount("size=40m"))
    defs = build_defs(load_cohort(cohort), study.store)
    calls, repair = [], []

    def failing(place: Path) -> AbstractContextManager[None]:
        if place.is_relative_to(study.store.root / "grids"):
            calls.append(place.stem)
            if len(calls) == 4:
                repair.append(fail(study.store.root.resolve()))
        return exclusive_lock(place)

    monkeypatch.setattr(batches, "exclusive_lock", failing)
    with study.instance() as instance:
        [problem, *others] = refresh(defs, instance, Console(quiet=True))
        assert problem.startswith(f"grid: mean-rgb|{calls[-1]}: ")
        assert reason in problem
        # the manifest of the remaining grids cannot be written either, and previews wait for it
        waiting = ": an input is missing: "
        assert all(reason in other or waiting in other for other in others), others
        assert len(calls) == 4
        assert study.broken() == []
        assert made(instance, "grid").total() == 3
        [restore] = repair
        restore()
        assert refresh(defs, instance, Console(quiet=True)) == []
        assert len(calls) == 4 + SLIDES - 3
        assert examine(instance, study.store) == []
    compare(study, undisturbed[0].results())

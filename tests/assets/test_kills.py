"""A study whose processes are killed and whose disk fails ends like one that was left alone."""

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
    """The tiny cohort with nothing but grids of mean colours."""
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
    """A study that was left alone, and the seconds that it took."""
    study = Study(cohort, tmp_path_factory.mktemp("undisturbed"))
    with study.instance():
        return study, study.refresh()


def made(instance: dg.DagsterInstance, asset: str) -> Counter[str]:
    """How often each partition was recorded."""
    records = instance.fetch_materializations(dg.AssetKey(asset), limit=1000).records
    return Counter(record.partition_key for record in records)


def test_after_kills_at_random_moments_the_next_refresh_goes_on_to_the_same_end(
    cohort, undisturbed, tmp_path
):
    left_alone, seconds = undisturbed
    study, chance = Study(cohort, tmp_path), random.Random(1)
    with study.instance():
        pass
    kills = 0
    while kills < 2 and kill_refresh(study, chance.uniform(0.2, 0.8) * seconds):
        kills += 1
    study.refresh()
    compare(study, left_alone.results())
    with study.instance() as instance:
        assert examine(instance, study.store) == []
        for asset in ("slide", "patch_table", "grid"):
            counts = made(instance, asset)
            assert len(counts) == SLIDES
            # at a kill one was made and not yet recorded: no recorded one was made again
            assert counts.total() == SLIDES


def test_two_refreshes_at_once_end_like_one(cohort, undisturbed, tmp_path):
    study = Study(cohort, tmp_path)
    with study.instance():
        pass
    both = [study.start_refresh() for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0], study.log
    compare(study, undisturbed[0].results())


def fill(folder: Path) -> Callable[[], None]:
    """Fill a disk; returns what makes room again."""
    blocker = folder / "blocker"
    with blocker.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    return blocker.unlink


def protect(folder: Path) -> Callable[[], None]:
    """Make a mounted file system read-only; returns what makes it writable again."""

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)

    remount("ro")
    return lambda: remount("rw")


@pytest.mark.parametrize(
    ("fail", "reason"),
    [(fill, "No space left on device"), (protect, "Read-only file system")],
)
def test_a_disk_that_fails_in_the_middle_stops_the_run_and_the_next_one_goes_on(
    cohort, undisturbed, mount, tmp_path, monkeypatch, fail, reason
):
    # the database would keep a file open there for writing, and so the disk from being protected
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    study = Study(cohort, tmp_path)
    (tmp_path / "store").symlink_to(mount("size=40m"))
    defs = build_defs(load_cohort(cohort), study.store)
    calls, mend = [], []

    def failing(place: Path) -> AbstractContextManager[None]:
        if place.suffix == ".zarr":
            calls.append(place.stem)
            if len(calls) == 4:
                mend.append(fail(study.store.root.resolve()))
        return exclusive_lock(place)

    monkeypatch.setattr(batches, "exclusive_lock", failing)
    with study.instance() as instance:
        [problem, *waiting] = refresh(defs, instance, Console(quiet=True))
        assert f"grid: mean-rgb|{calls[-1]}: StoreError: " in problem
        assert reason in problem
        assert waiting == []
        assert len(calls) == 4
        assert study.broken() == []
        assert made(instance, "grid").total() == 3
        [mended] = mend
        mended()
        assert refresh(defs, instance, Console(quiet=True)) == []
        assert len(calls) == 4 + SLIDES - 3
        assert examine(instance, study.store) == []
    compare(study, undisturbed[0].results())

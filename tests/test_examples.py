"""The example on real tissue: its script, patch tasks and slides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from nic_core.cohort import load_cohort
from nic_core.cohort.index import slide_index
from nic_core.encoders import build_patch_task
from nic_core.slides import open_slide

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[1]
REAL = Path(os.environ.get("NIC_REAL_DATA") or PROJECT.parent / "shared" / "real-data")
needs_real_data = pytest.mark.skipif(
    not (REAL / "MANIFEST.csv").exists(), reason=f"real patches and slides not found at {REAL}"
)


@pytest.fixture
def cohort(tmp_path):
    script = PROJECT / "examples" / "idc" / "make_cohort.py"
    subprocess.run([sys.executable, script, REAL, "--out", tmp_path], check=True)
    return load_cohort(tmp_path / "cohort.yaml")


@needs_real_data
def test_the_held_out_patient_is_in_the_split_test_only(cohort):
    settings = cohort.settings
    dataset = build_patch_task(
        cohort.patch_task("idc"), patch=settings.patch, mpp=settings.mpp, seed=0
    )
    by_split = {split: set(rows["group"]) for (split,), rows in dataset.table.group_by("split")}
    assert by_split["test"] == {"8863"}
    assert "8863" not in by_split["train"] | by_split["validation"]


@needs_real_data
@pytest.mark.parametrize("task", ["lc25000", "nct_crc", "osteosarcoma"])
def test_every_other_task_has_three_splits(cohort, task):
    settings = cohort.settings
    dataset = build_patch_task(
        cohort.patch_task(task), patch=settings.patch, mpp=settings.mpp, seed=0
    )
    assert set(dataset.table["split"]) == {"train", "validation", "test"}


@needs_real_data
def test_the_slides_are_listed_with_their_truth_images(cohort):
    index = slide_index(cohort)
    assert index.height == 4
    assert index.filter(pl.col("truth").is_not_null())["patient"].to_list() == [
        "8863",
        "8865",
        "8913",
    ]


@needs_real_data
def test_two_encoders_of_different_geometry_share_slides_and_target(tmp_path):
    script = PROJECT / "examples" / "geometries" / "make_cohort.py"
    weights = tmp_path / "weights.bin"  # of the published network; only its name is used here
    arguments = [REAL, "--out", tmp_path / "study", "--preset", "uni", "--weights", weights]
    subprocess.run([sys.executable, script, *arguments], check=True)
    cohort = load_cohort(tmp_path / "study" / "cohort.yaml")
    assert list(cohort.geometries) == ["128px-0.5um", "224px-0.5um"]
    seen = {task.name: cohort.task_geometry("mtl-4", task.name).mpp for task in cohort.patch_tasks}
    assert seen == {"idc": 1.5625, "lc25000": 1.0, "nct_crc": 0.5, "osteosarcoma": 1.0}
    index = slide_index(cohort)
    assert index.height == 167
    assert index["patient"].n_unique() == 18
    with open_slide(Path(index.filter(slide="P10___train_9")["path"].item())) as slide:
        assert (slide.width, slide.height) == (775, 522)
        assert slide.mpp == pytest.approx(0.62005, rel=1e-4)

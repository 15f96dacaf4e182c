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

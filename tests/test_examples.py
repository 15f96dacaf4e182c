"""The examples on real tissue: scripts, patch tasks and slides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from PIL import Image

from examples.idc import leave_one_out
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


@pytest.fixture
def red_carcinoma(tmp_path) -> Path:
    """A cohort whose carcinoma is red, except that of one patient; another has one class only."""
    rng = np.random.default_rng(0)
    rows = []
    for patient, classes in {"1": "10", "2": "10", "inverted": "10", "single": "1"}.items():
        for label in classes:
            for number in range(8):
                red = (label == "1") != (patient == "inverted")
                colour = np.array([170, 90, 90] if red else [90, 90, 170])
                pixels = colour + rng.integers(-30, 30, (64, 64, 3))
                path = tmp_path / f"{patient}-{label}-{number}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
                rows.append((path.name, "idc" if label == "1" else "non_idc", patient))
    columns = ["path", "label", "group"]
    pl.DataFrame(rows, columns, orient="row").write_csv(tmp_path / "idc.csv")
    cohort = {
        "name": "red",
        "slides": {"table": "slides.csv"},
        "patch_tasks": [{"name": "idc", "organ": "breast", "mpp": 1.0, "table": "idc.csv"}],
        "encoders": [
            {"name": "tiny", "objective": "supervised", "tasks": ["idc"]}
            | {"patches_seen": 512, "batch": 16}
        ],
        "settings": {"patch": 64, "mpp": 1.0, "embedding_size": 8},
    }
    (tmp_path / "slides.csv").write_text("slide,path,patient\n")
    (tmp_path / "cohort.yaml").write_text(yaml.safe_dump(cohort))
    return tmp_path


def run_leave_one_out(monkeypatch, folder: Path, *options: str) -> pl.DataFrame:
    arguments = ["", str(folder / "cohort.yaml"), "--out", str(folder / "out"), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    leave_one_out.main()
    return pl.read_parquet(sorted((folder / "out" / "rows").glob("[!.]*.parquet")))


def test_each_patient_is_classified_by_what_others_taught(red_carcinoma, monkeypatch, capsys):
    found = run_leave_one_out(monkeypatch, red_carcinoma, "--patches", "64")
    assert set(found["patient"]) == {"1", "2", "inverted", "single"}
    counts = found.group_by("classifier").len()
    assert set(counts["classifier"]) == {"head of tiny", "mean RGB", "colour and texture"}
    assert set(counts["len"]) == {56}
    correct = (
        found.filter(classifier="mean RGB")
        .group_by("patient")
        .agg(((pl.col("probability") > 0.5) == pl.col("carcinoma")).mean())
    )
    shares = dict(correct.rows())
    assert min(shares["1"], shares["2"]) > 0.7
    assert shares["inverted"] == 0
    printed = capsys.readouterr().out
    assert "- / 1.00" in printed  # one class has no AUC
    assert "0.00 / 0.00" in printed  # the inverted patient


def test_a_finished_leave_one_out_is_not_repeated(red_carcinoma, monkeypatch):
    run_leave_one_out(monkeypatch, red_carcinoma, "--patches", "16")
    monkeypatch.setattr(leave_one_out, "train_encoder", None)  # would fail if it were called
    run_leave_one_out(monkeypatch, red_carcinoma, "--patches", "16")
    with pytest.raises(SystemExit, match="was made with {'encoder'"):
        run_leave_one_out(monkeypatch, red_carcinoma, "--patches", "32")


def test_the_only_patient_of_a_class_cannot_be_held_out(red_carcinoma, monkeypatch):
    table = pl.read_csv(red_carcinoma / "idc.csv")
    table = table.filter((pl.col("label") == "idc") | (pl.col("group") == "1"))
    table.write_csv(red_carcinoma / "idc.csv")
    with pytest.raises(SystemExit, match="'idc' without patient 1: class number 1 occurs in test"):
        run_leave_one_out(monkeypatch, red_carcinoma, "--patches", "16")


def test_the_interval_of_a_summary_resamples_patients():
    rows = pl.DataFrame(
        {
            "patient": ["a"] * 4 + ["b"] * 4,
            "carcinoma": [True, False] * 4,
            "probability": [0.9, 0.1] * 2 + [0.1, 0.9] * 2,
        }
    )
    patients, _, accuracy, correct = leave_one_out.summary(rows)
    assert patients == "2"
    # all right in one patient, all wrong in the other
    assert accuracy == correct == "0.50 [0.00, 1.00]"


def test_the_difference_of_aucs_is_paired_by_patch_and_patient():
    random = np.random.default_rng(0)
    rows = pl.DataFrame(
        {
            "patient": [f"p{i % 5}" for i in range(100)],
            "source": [f"image {i:03d}" for i in range(100)],
            "carcinoma": random.random(100) < 0.5,
            "probability": random.random(100),
        }
    )
    assert leave_one_out.auc_difference(rows, rows.reverse()) == "0.00 [0.00, 0.00]"
    perfect = rows.with_columns(probability=pl.col("carcinoma").cast(pl.Float64))
    inverted = rows.with_columns(probability=1 - pl.col("carcinoma").cast(pl.Float64))
    assert leave_one_out.auc_difference(perfect, inverted) == "1.00 [1.00, 1.00]"

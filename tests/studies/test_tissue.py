"""Tests of the study on real tissue: arms, tables and what counts as unseen."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import yaml

from studies import tissue
from studies.encoders import arms, painted_dataset, read_configuration, with_patients
from studies.protocol import UNIT_SCHEMA
from studies.tissue_tasks import TissueTask, dataset

CONFIGURATION = read_configuration(tissue.CONFIGURATION)


@pytest.mark.parametrize("file", ["tissue.yaml", "tissue-gpu.yaml"])
def test_arms_have_unique_names_and_start_from_earlier_arms(file):
    found = list(arms(read_configuration(tissue.CONFIGURATION.with_name(file))))
    names = [arm.name for arm in found]
    assert len(set(names)) == len(names)
    for place, arm in enumerate(found):
        assert arm.start is None or arm.start in names[:place]


def test_no_encoder_is_trained_on_the_unseen_tasks():
    for arm in arms(CONFIGURATION):
        assert not set(arm.real) & set(CONFIGURATION.unseen)


@pytest.mark.parametrize(
    ("unseen", "trained"),
    [(("glas_gland",), ("idc", "glas_grade")), (("idc",), ("glas_gland", "glas_grade"))],
)
def test_trainings_on_images_of_another_judged_task_are_refused(unseen, trained):
    places = pl.DataFrame(
        {"source": "image", "x": 0, "y": 0, "row": 0, "column": range(6), "label": "a"}
    ).with_columns(group=pl.format("patient {}", "column"))
    data = dataset("t", "colon", ("a",), 0.5, np.zeros((6, 128, 128, 3), np.uint8), places, 0)
    images = {"glas_grade": "glas", "glas_gland": "glas"}
    tasks = {
        name: TissueTask(data, "patch", images.get(name, name))
        for name in (*CONFIGURATION.unseen, *CONFIGURATION.real_tasks)
    }
    tissue.check_images(CONFIGURATION, tasks)
    other = CONFIGURATION.model_copy(update={"unseen": unseen, "real_tasks": trained})
    with pytest.raises(SystemExit, match="the images of glas belong"):
        tissue.check_images(other, tasks)


@pytest.mark.parametrize("group", ["real", "painted", "single", "variety", "mixed", "tuned"])
def test_encoders_of_a_group_see_equally_many_patches(group):
    seen = {a.patches_seen for a in arms(CONFIGURATION) if a.group == group}
    assert seen == {CONFIGURATION.budgets[group].patches_seen}


@pytest.mark.parametrize("task", CONFIGURATION.real_tasks)
def test_each_real_task_is_left_out_of_some_training(task):
    without = [arm for arm in arms(CONFIGURATION) if arm.group == "real" and task not in arm.real]
    assert len(without) >= CONFIGURATION.budgets["real"].seeds


def units(task: str, right: int) -> pl.DataFrame:
    """Ten units of five groups, of which the first ``right`` are classified correctly."""
    return pl.DataFrame(
        {
            "task": task,
            "division": 0,
            "unit": range(10),
            "group": [f"g{i % 5}" for i in range(10)],
            "class": [i // 5 for i in range(10)],
            "predicted": [i // 5 if i < right else 1 - i // 5 for i in range(10)],
        },
        UNIT_SCHEMA,
    )


@pytest.fixture
def folder(tmp_path):
    """A folder in which three encoders are finished."""
    tissue._settings(tmp_path, None)
    (tmp_path / "rows").mkdir()
    tasks = (*CONFIGURATION.unseen, *CONFIGURATION.real_tasks)
    for name, right in (("colour_and_texture", 8), ("real-vae-0", 7), ("real-mtl-6-0", 9)):
        rows = pl.concat([units(task, right) for task in tasks])
        rows.write_parquet(tmp_path / "rows" / f"{name}.parquet")
    return tmp_path


def test_scores_on_trained_tasks_are_left_out(folder):
    kinds, _ = tissue.finished(folder)
    mtl = next(kind for kind in kinds if kind.supervised)
    assert all(mtl.units[task] for task in CONFIGURATION.unseen)
    assert not any(mtl.units[task] for task in CONFIGURATION.real_tasks)


def test_tables_compare_with_the_best_encoder_without_labels(folder, capsys):
    tissue.main(["show", str(folder), "--picture", str(folder / "study.png")])
    shown = capsys.readouterr().out
    assert "| MTL, 6 real tasks | 1 | 0.90 [" in shown
    assert "| MTL, 6 real tasks | +0.20 [" in shown
    assert (
        "glas_grade minus VAE, real patches | glas_grade minus 44 colour and texture features"
        in shown
    )
    assert (folder / "study.png").stat().st_size > 10_000


def test_a_folder_of_another_configuration_is_refused(folder):
    other = tissue.CONFIGURATION.with_name("tissue-gpu.yaml")
    with pytest.raises(SystemExit, match="another configuration"):
        tissue._settings(folder, other)


def test_painted_patches_are_split_by_painted_patient(tmp_path):
    size = CONFIGURATION.painted.model_copy(update={"patches": 40, "patients": 5})
    task = painted_dataset("nucleus", "ordinary", size, tmp_path)
    splits = task.table.group_by("group").agg(pl.col("split").n_unique())
    assert splits["split"].to_list() == [1] * 5
    assert len(task.patches) == 40


def test_patients_are_left_out_of_the_training_only(tmp_path):
    size = CONFIGURATION.painted.model_copy(update={"patches": 60, "patients": 5})
    task = painted_dataset("nucleus", "ordinary", size, tmp_path)
    fewer = with_patients(task, 2)
    assert fewer.table.filter(split="train")["group"].n_unique() == 2
    for split in ("train", "validation", "test"):
        rows = fewer.table.filter(split=split)
        original = task.table.filter(split=split).join(
            rows, on=["source", "row", "column"], how="semi"
        )
        assert (fewer.patches[fewer.rows(split)] == task.patches[original["index"]]).all()
        assert split == "train" or len(original) == len(task.rows(split))
    with pytest.raises(ValueError, match="training patients, not 4"):
        with_patients(task, 4)


@pytest.mark.slow
def test_an_interrupted_study_continues_with_the_missing_encoder(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    places = pl.DataFrame(
        {
            "source": [f"image {i}" for i in range(40)],
            "x": 0,
            "y": 0,
            "row": 0,
            "column": 0,
            "label": ["dark", "bright"] * 20,
            "group": [f"patient {i // 2 % 10}" for i in range(40)],
        }
    )
    pixels = rng.integers(0, 60, (40, 128, 128, 3), np.uint8)
    pixels[1::2] += 150
    real = [
        TissueTask(
            dataset(name, "none", ("dark", "bright"), 0.5, pixels, places, seed=0), "patch", name
        )
        for name in ("seen", "unseen")
    ]
    monkeypatch.setattr(tissue, "tissue_tasks", lambda *_: real)
    budget = {"patches_seen": 64, "seeds": 1}
    configuration = CONFIGURATION.model_dump(mode="json") | {
        "unseen": ["unseen"],
        "real_tasks": ["seen"],
        "pairs": ["seen"],
        "painted": {"patches": 60, "patients": 5, "sets": [["nucleus", "gland_stroma"]]},
        "budgets": dict.fromkeys(CONFIGURATION.budgets, budget),
        "unsupervised_seeds": 0,
        "curve": [],
        "patients": [2],
    }
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(configuration))
    out = tmp_path / "out"
    arguments = ["run", "-", "--released", "-", "--out", str(out), "--threads", "1"]

    tissue.main([*arguments, "--config", str(file), "--groups", "painted", "patients"])
    rows = sorted(path.stem for path in (out / "rows").iterdir())
    assert rows == ["painted-mtl-2-0", "patients-mtl-2-2-0"]
    units = pl.read_parquet(out / "rows" / "painted-mtl-2-0.parquet")
    assert set(units["task"]) == {"seen", "unseen"}
    assert not list((out / "checkpoints").iterdir())

    capsys.readouterr()
    tissue.main([*arguments, "--groups", "painted", "single"])
    printed = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["single-nucleus-0", "single-gland_stroma-0"]

"""Tests of the study of encoders: averages, tables, subsets and settings."""

from __future__ import annotations

from argparse import Namespace
from math import comb

import polars as pl
import pytest

from nic_core.cohort import load_cohort
from studies import painted_slides as study

pytestmark = pytest.mark.slow

TASKS = ("a", "b", "c", "d")


def row(seed: int, tasks: str, on: str, value: float, **other: str) -> dict[str, object]:
    count = len(tasks.split("+")) if tasks else 0
    about = {"kind": "mtl", "measure": study.PROBE, "model": "linear probe", **other}
    trained_on = "labels" if on in tasks.split("+") else "nothing"
    return {
        "cohort": "demo",
        "seed": seed,
        "encoder": tasks,
        "tasks": tasks,
        "count": count,
        "on": on,
        "trained_on": trained_on,
        "value": value,
        **about,
    }


ROWS = pl.DataFrame(
    [
        row(0, "a", "c", 0.5),
        row(0, "b", "c", 0.7),
        row(1, "a", "c", 0.6),
        row(1, "b", "c", 1.0),
        row(0, "c", "c", 0.9),
        row(0, "a+b", "c", 0.8),
        row(0, "", "c", 0.4, kind="vae"),
    ],
    study.SCHEMA,
)


def test_deviations_are_over_seeds_of_means_over_task_sets():
    found = study.over_seeds(ROWS).filter(kind="mtl", count=1, trained_on="nothing")
    [one] = found.to_dicts()
    assert one["mean"] == pytest.approx((0.6 + 0.8) / 2)
    assert one["sd"] == pytest.approx(0.2 / 2**0.5)
    assert one["seeds"] == 2


def test_trained_tasks_are_reported_separately():
    found = study.over_seeds(ROWS).filter(kind="mtl", count=1)
    assert dict(found.select("trained_on", "mean").rows()) == pytest.approx(
        {"nothing": 0.7, "labels": 0.9}
    )
    assert found.filter(trained_on="labels")["sd"].to_list() == [None]


def test_tables_have_rows_by_kind_number_and_set_of_tasks():
    by_number, by_tasks = study.summary(ROWS, "demo"), study.by_tasks(ROWS, "demo")
    assert list(by_number.columns[0].cells) == ["vae", "mtl, 1 tasks", "mtl, 2 tasks"]
    assert list(by_tasks.columns[0].cells) == ["a", "b", "c", "a + b"]
    assert list(by_tasks.columns[1].cells) == ["0.55 (0.07)", "0.85 (0.21)", "0.90*", "0.80"]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_task_subsets_are_complete_or_seeded(size):
    every = study._subsets(TASKS, size, None, seed=0)
    assert len(every) == len(set(every)) == comb(4, size)
    some = study._subsets(TASKS, size, 2, seed=1)
    assert some == study._subsets(TASKS, size, 2, seed=1)
    assert len(some) == min(2, comb(4, size))
    assert set(some) <= set(every)


def test_a_folder_of_other_settings_is_refused(tiny_cohort, tmp_path):
    cohort = load_cohort(tiny_cohort)
    options = Namespace(out=tmp_path, patches=64, slides=False)
    study._check_settings(cohort, options)
    study._check_settings(cohort, options)
    options.patches = 640
    with pytest.raises(SystemExit, match=r"made with \{'patches': 64\}"):
        study._check_settings(cohort, options)


def test_tasks_with_held_out_patients_are_refused(tiny_cohort, tmp_path):
    cohort = load_cohort(tiny_cohort)
    task = cohort.patch_tasks[0].model_copy(update={"test_groups": ("P1",)})
    cohort = cohort.model_copy(update={"patch_tasks": (task, *cohort.patch_tasks[1:])})
    options = Namespace(out=tmp_path, patches=64, slides=True)
    with pytest.raises(SystemExit, match=task.name):
        study._check_settings(cohort, options)

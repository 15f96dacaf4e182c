"""Tests of the protocol of the studies: probes by patient, scores and intervals."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score

from nic_core.encoders.patch_tasks import PatchDataset
from studies.protocol import UNIT_SCHEMA, folds, paired_difference, probe_units, score
from studies.tissue_tasks import TissueTask, dataset

PATIENTS = 10


def brightness_task(unit: str = "patch", patches: int = 120) -> TissueTask:
    """A task whose classes differ in brightness; each image has three patches."""
    rng = np.random.default_rng(0)
    image = np.arange(patches) // 3
    label = image % 2
    pixels = rng.integers(0, 60, (patches, 128, 128, 3), np.uint8)
    pixels += (90 * label + 20).astype(np.uint8)[:, None, None, None]
    places = pl.DataFrame(
        {
            "source": [f"image {i:03d}" for i in image],
            "x": 0,
            "y": 0,
            "row": 0,
            "column": np.arange(patches) % 3,
            "label": np.array(["dark", "bright"])[label],
            "group": [f"patient {i % PATIENTS}" for i in image // 2],
        }
    )
    made = dataset("brightness", "none", ("dark", "bright"), 0.5, pixels, places, seed=0)
    return TissueTask(made, unit, "noise")


class Brightness:
    def embed(self, pixels):
        return pixels.mean((1, 2, 3))[:, None]


class Chance:
    def embed(self, pixels):
        return np.random.default_rng(1).normal(size=(len(pixels), 4))


@pytest.fixture(scope="module")
def task() -> TissueTask:
    return brightness_task()


def test_a_probe_finds_what_the_embedding_shows(task):
    value, low, high = score([probe_units(Brightness(), task)])
    assert value == low == high == 1


def test_noise_scores_at_chance(task):
    value, low, high = score([probe_units(Chance(), task)])
    assert low < 0.5 < high
    assert abs(value - 0.5) < 0.15


def test_each_unit_is_classified_once_in_each_division(task):
    units = probe_units(Brightness(), task)
    assert units.schema == UNIT_SCHEMA
    for _, found in units.group_by("division"):
        assert sorted(found["unit"]) == list(range(len(task.dataset.table)))


def test_regions_are_classified_as_a_whole():
    task = brightness_task("region")
    units = probe_units(Brightness(), task).filter(division=0)
    assert len(units) == task.dataset.table["source"].n_unique()


def test_no_group_is_on_both_sides_of_a_fold(task):
    table: PatchDataset = task.dataset
    groups = table.table["group"].to_numpy()
    for train, test in folds(table.labels, groups, 0):
        assert not set(groups[train]) & set(groups[test])


def units_of(classes, predicted, groups) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "task": "t",
            "division": 0,
            "unit": range(len(classes)),
            "group": groups,
            "class": classes,
            "predicted": predicted,
        },
        UNIT_SCHEMA,
    )


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from("abcd")),
        min_size=4,
        max_size=40,
    )
)
def test_scores_equal_those_of_scikit_learn(rows):
    classes, predicted, groups = zip(*rows, strict=True)
    expected = balanced_accuracy_score(classes, predicted)
    assert score([units_of(classes, predicted, groups)])[0] == pytest.approx(expected)


def test_an_encoder_does_not_differ_from_itself(task):
    units = probe_units(Chance(), task)
    assert paired_difference([units], [units, units]) == (0, 0, 0)


def test_differences_are_antisymmetric(task):
    one, other = ([probe_units(e, task)] for e in (Brightness(), Chance()))
    value, low, high = paired_difference(one, other)
    back, back_low, back_high = paired_difference(other, one)
    assert (value, low, high) == pytest.approx((-back, -back_high, -back_low))
    assert low > 0


def test_encoders_judged_on_other_groups_are_refused(task):
    units = probe_units(Brightness(), task)
    fewer = units.filter(pl.col("group") != "patient 0")
    with pytest.raises(ValueError, match="different groups"):
        paired_difference([units], [fewer])

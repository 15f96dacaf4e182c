"""Target kinds: what tables, terminal and figures show of each."""

import numpy as np
import polars as pl
import pytest
import torch

from nic_core.cohort import ClassificationTarget, RegressionTarget, SurvivalTarget
from nic_core.models.cox import BaselineHazard
from nic_core.models.kinds import Classification, Regression, Survival, kind_of, metric_name

SCORE = RegressionTarget(name="score", kind="regression", column="grade")
GROWTH = ClassificationTarget(
    name="growth", kind="classification", column="growth", classes=("a", "b")
)
DEATH = SurvivalTarget(name="death", kind="survival", time="t", event="e", unit="days")
TARGETS = (SCORE, GROWTH, DEATH)


def test_each_target_has_the_object_of_its_kind():
    assert [type(kind_of(target)) for target in TARGETS] == [Regression, Classification, Survival]
    assert [kind_of(target).target for target in TARGETS] == list(TARGETS)


def test_only_the_primary_metric_has_a_display_name():
    names = [
        [metric_name(kind_of(t), m) for m in ("auc", "spearman", "harrell_c")] for t in TARGETS
    ]
    assert names == [
        ["auc", "Spearman", "harrell_c"],
        ["AUC", "spearman", "harrell_c"],
        ["auc", "spearman", "Harrell's C"],
    ]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.kind)
def test_primary_metric_is_at_chance_level_for_random_predictions(target):
    random, kind = np.random.default_rng(0), kind_of(target)
    rows = pl.DataFrame(
        {
            "y": random.integers(0, 2, 4000),
            "time": random.random(4000),
            "event": random.random(4000) < 0.5,
        }
    )[:1000]
    prediction = random.random((1000, kind.outputs))
    value = kind.metrics(rows, prediction)[kind.primary_metric](np.ones((1, 1000)))[0]
    assert value == pytest.approx(kind.chance_level, abs=0.07)


def test_regression_predictions_have_the_unit_of_the_labels():
    kind = kind_of(SCORE)
    train = pl.DataFrame({"y": [1.0, 3.0]})
    shift, scale = map(torch.tensor, kind.output_scale(train))
    outputs = torch.tensor([[-1.0], [1.0]])
    assert kind.activate(outputs, shift, scale).flatten().tolist() == [1, 3]
    assert kind.loss(outputs, train, shift, scale).item() == 0


def test_conclusions_are_the_class_or_risk_group_and_median_survival():
    assert kind_of(SCORE).conclusions(np.zeros((2, 1, 1)), None, ()) == []
    probabilities = np.array([[[0.9, 0.1], [0.6, 0.4]], [[0.4, 0.6], [0.1, 0.9]]])
    (classes,) = kind_of(GROWTH).conclusions(probabilities, None, ())
    assert classes.to_list() == ["a", "b"]  # by the folds' mean
    hazard = BaselineHazard(scale=1, times=(5.0, 9.0), hazard=(0.1, 0.2))
    risks = np.array([[[3.0], [-3.0]]])
    group, median = kind_of(DEATH).conclusions(risks, 0.0, (hazard,))
    assert group.to_list() == ["high", "low"]
    assert median.to_list() == [5.0, None]


def test_terminal_shows_conclusions_under_their_headings():
    row = {"class": "b", "risk": 0.5, "risk_group": "high", "median_survival": None}
    shown = [
        dict(zip(kind.conclusion_headings(()), kind.conclusion_cells(row), strict=True))
        for kind in map(kind_of, TARGETS)
    ]
    assert shown == [
        {},
        {"class": "b"},
        {"risk group": "high", "median survival (days)": "not reached"},
    ]
    assert kind_of(DEATH).conclusion_headings([30])[-1] == "alive after 30 days"
    failed = dict.fromkeys(row)
    assert kind_of(GROWTH).conclusion_cells(failed) == [""]
    assert kind_of(DEATH).conclusion_cells(failed) == ["", "none"]


def test_legend_explains_the_risk_groups():
    assert [kind_of(target).legend(None) for target in (SCORE, GROWTH)] == ["", ""]
    assert "median risk of 0.25" in kind_of(DEATH).legend(0.25)

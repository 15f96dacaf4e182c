"""Reliability tables and decision curves equal closed forms and hand-computed values."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nic_core.cohort import ClassificationTarget, RegressionTarget, SurvivalTarget
from nic_core.models.decision_curves import (
    DECISION_SCHEMA,
    THRESHOLDS,
    decision_curve,
    net_benefit,
    survival_net_benefit,
)
from nic_core.models.reliability import (
    RELIABILITY_SCHEMA,
    quantile_groups,
    reliability,
    survival_at,
)
from nic_core.store import ModelKey

RIM = ClassificationTarget(name="rim", kind="classification", column="rim", classes=("none", "rim"))
SCORE = RegressionTarget(name="score", kind="regression", column="score")
DEATH = SurvivalTarget(name="death", kind="survival", time="t", event="e", unit="days")
PROBABILITIES = st.lists(st.floats(0, 1), min_size=1, max_size=40)


def rim_rows(y, p):
    p = np.asarray(p)
    return pl.DataFrame(
        {"model": "network", "y": y, "probability_none": 1 - p, "probability_rim": p}
    )


def test_net_benefit_equals_a_value_computed_by_hand():
    # at 0.2 three of five are treated: 2 true positives, 1 false: 2/5 - 1/5 * 0.2/0.8 = 0.35
    event, p = [1, 1, 0, 0, 1], [0.9, 0.2, 0.3, 0.1, 0.05]
    assert net_benefit(event, p, [0.2]) == pytest.approx([0.35])


@given(PROBABILITIES, st.integers(0, 10_000))
def test_net_benefit_at_threshold_zero_is_the_prevalence(p, seed):
    event = np.random.default_rng(seed).random(len(p)) < 0.4
    assert net_benefit(event, p, [0.0]) == pytest.approx([event.mean()])


def test_perfect_predictions_have_the_prevalence_at_every_threshold():
    y = np.array([0, 0, 0, 1])
    curve = decision_curve(RIM, rim_rows(y, y.astype(float)))
    assert curve.schema == DECISION_SCHEMA
    assert curve["threshold"].to_list() == THRESHOLDS.tolist()
    assert curve["net_benefit"].to_numpy() == pytest.approx(np.full(99, 0.25))
    assert curve["treat_all"].to_numpy() == pytest.approx(
        0.25 - 0.75 * THRESHOLDS / (1 - THRESHOLDS)
    )


def test_survival_net_benefit_without_censoring_is_that_of_classes():
    random = np.random.default_rng(0)
    time, risk = random.exponential(size=60), random.random(60)
    found = survival_net_benefit(time, np.ones(60, bool), risk, THRESHOLDS, 0.7)
    assert found == pytest.approx(net_benefit(time <= 0.7, risk, THRESHOLDS))


def test_survival_decision_curve_is_null_without_follow_up():
    rows = pl.DataFrame(
        {"model": "network", "time": [1.0, 2.0, 3.0], "event": [True, False, False]}
    ).with_columns(survival_2=pl.Series([0.1, 0.5, 0.8]), survival_9=pl.Series([0.1, 0.5, 0.8]))
    curve = decision_curve(DEATH, rows, [2.0, 9.0])
    early, late = curve.filter(time=2.0), curve.filter(time=9.0)
    # one event of three up to day 2
    assert early["treat_all"][0] == pytest.approx(1 / 3 - 2 / 3 * 0.01 / 0.99)
    assert late["treat_all"].null_count() == 99
    assert late["net_benefit"][0] is None


@given(PROBABILITIES, st.integers(1, 10))
def test_quantile_groups_partition_and_order_the_units(values, groups):
    values = np.array(values)
    found = quantile_groups(values, groups)
    assert set(found) == set(range(found.max() + 1))
    assert found.max() < groups
    order = np.argsort(values, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    for value in np.unique(values):
        assert len(set(found[values == value])) == 1


def test_reliability_of_classes_has_the_wilson_interval():
    random = np.random.default_rng(1)
    p = random.random(100)
    y = (random.random(100) < p).astype(int)
    table = reliability(RIM, rim_rows(y, p))
    assert table.schema == RELIABILITY_SCHEMA
    assert table["units"].sum() == 100
    assert table["outcome"].unique().to_list() == ["rim"]
    z, n, share = 1.959963984540054, table["units"].to_numpy(), table["observed"].to_numpy()
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    margin = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert table["low"].to_numpy() == pytest.approx(centre - margin, abs=1e-9)
    assert table["high"].to_numpy() == pytest.approx(centre + margin, abs=1e-9)


def test_reliability_of_three_classes_has_a_curve_for_each():
    three = RIM.model_copy(update={"classes": ("a", "b", "c")})
    p = np.random.default_rng(2).dirichlet([1, 1, 1], 30)
    rows = pl.DataFrame(
        {"model": "network", "y": p.argmax(1)}
        | {f"probability_{name}": p[:, i] for i, name in enumerate("abc")}
    )
    table = reliability(three, rows)
    assert table.group_by("outcome").agg(pl.col("units").sum()).sort("outcome").rows() == [
        ("a", 30),
        ("b", 30),
        ("c", 30),
    ]


def test_reliability_of_numbers_is_null_for_the_interval_of_one_unit():
    rows = pl.DataFrame({"model": "network", "y": [1.0, 2.0, 4.0], "prediction": [0.0, 0.0, 9.0]})
    table = reliability(SCORE, rows, groups=2)
    assert table["observed"].to_list() == [1.5, 4.0]
    margin = 12.706204736432095 * 0.5  # t of one degree of freedom times the standard error
    assert table["low"][0] == pytest.approx(1.5 - margin)
    assert table["high"].to_list() == [pytest.approx(1.5 + margin), None]


def test_kaplan_meier_interval_equals_the_closed_form():
    # day 2: 4 of 5 live, Greenwood: 1 / (5 * 4); on the log-log scale divided by log(4/5)^2
    time, event = np.array([1.0, 3, 4, 5, 6]), np.array([True, True, False, True, False])
    half = 1.959963984540054 * np.sqrt(1 / 20) / abs(np.log(0.8))
    expected = 0.8, 0.8 ** np.exp(half), 0.8 ** np.exp(-half)
    assert survival_at(time, event, 2.0) == pytest.approx(expected)
    assert np.isnan(survival_at(time, event, 7.0)).all()
    assert survival_at(time, event, 0.5)[0] == 1


def test_model_folders_hold_the_curves_of_every_model(mean_rgb_study):
    cohort, store = mean_rgb_study
    for target in cohort.targets:
        folder = store.slide_model(ModelKey(encoder="mean-rgb", target=target.name))
        held_out = pl.read_parquet(folder / "predictions.parquet").filter(split="cv")
        units = dict(held_out.group_by("model").len().iter_rows())
        table = pl.read_parquet(folder / "reliability.parquet")
        for (model, _, _), rows in table.group_by("model", "outcome", "time"):
            assert rows["units"].sum() == units[model]
        assert set(table["model"]) == set(units)
        curve = folder / "decision_curve.parquet"
        assert curve.exists() == (target.kind != "regression")
        if curve.exists():
            assert set(pl.read_parquet(curve)["model"]) == set(units)

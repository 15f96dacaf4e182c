"""Calibration equals scikit-learn, scikit-survival and closed forms on every resample."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import linregress
from sklearn.linear_model import LogisticRegression
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.nonparametric import kaplan_meier_estimator
from sksurv.util import Surv

from nic_core.cohort import ClassificationTarget
from nic_core.models.calibration import (
    IN_THE_LARGE,
    OBSERVED_EXPECTED,
    SLOPE,
    linear_calibration,
    logistic_calibration,
    survival_calibration,
)
from nic_core.models.metrics import bootstrap_counts
from nic_core.models.subgroups import MISSING_GROUP, SMALLEST, subgroup_metrics

SEEDS = st.integers(0, 10_000)


def resamples(n, seed):
    """The sample itself and three resamples: counts (4, n), and the indices of each."""
    counts = np.vstack([np.ones(n), bootstrap_counts(np.arange(n), resamples=3, seed=seed)])
    return counts, [np.repeat(np.arange(n), row.astype(int)) for row in counts]


@given(SEEDS)
def test_logistic_calibration_equals_scikit_learn(seed):
    random = np.random.default_rng(seed)
    p = random.uniform(0.02, 0.98, 80)
    y = random.random(80) < expit(0.4 + 0.7 * logit(p))
    counts, rows = resamples(80, seed)
    found = {name: metric(counts) for name, metric in logistic_calibration(y, p).items()}
    for i, index in enumerate(rows):
        x = logit(p[index])
        fitted = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x[:, None], y[index])
        assert found[SLOPE][i] == pytest.approx(fitted.coef_[0, 0], rel=1e-3)
        shift = brentq(lambda a, x=x, t=y[index]: (expit(a + x) - t).sum(), -20, 20)
        assert found[IN_THE_LARGE][i] == pytest.approx(shift, abs=1e-6)


def test_calibrated_probabilities_have_slope_one():
    random = np.random.default_rng(0)
    p = random.uniform(0.02, 0.98, 50_000)
    metrics = logistic_calibration(random.random(50_000) < p, p)
    assert metrics[SLOPE](np.ones((1, 50_000)))[0] == pytest.approx(1, abs=0.03)
    assert metrics[IN_THE_LARGE](np.ones((1, 50_000)))[0] == pytest.approx(0, abs=0.03)


def test_slope_of_separated_classes_is_undefined():
    metrics = logistic_calibration([False] * 5 + [True] * 5, np.linspace(0.1, 0.9, 10))
    assert np.isnan(metrics[SLOPE](np.ones((2, 10)))).all()
    assert np.isfinite(metrics[IN_THE_LARGE](np.ones((2, 10)))).all()


def test_one_class_alone_has_no_calibration():
    for metric in logistic_calibration([True] * 4, [0.1, 0.2, 0.3, 1.0]).values():
        assert np.isnan(metric(np.ones((1, 4)))).all()


@given(SEEDS)
def test_linear_calibration_equals_scipy(seed):
    random = np.random.default_rng(seed)
    p = random.normal(size=30)
    y = 0.5 * p + random.normal(size=30) + 2
    counts, rows = resamples(30, seed)
    found = {name: metric(counts) for name, metric in linear_calibration(y, p).items()}
    for i, index in enumerate(rows):
        assert found[SLOPE][i] == pytest.approx(linregress(p[index], y[index]).slope)
        assert found[IN_THE_LARGE][i] == pytest.approx((y[index] - p[index]).mean())


def test_equal_predictions_have_no_slope():
    assert np.isnan(linear_calibration([1.0, 2.0], [0.1, 0.1])[SLOPE](np.ones((1, 2)))).all()


@given(SEEDS)
def test_survival_calibration_equals_scikit_survival(seed):
    random = np.random.default_rng(seed)
    x = random.normal(5, 2, 80)
    death, leaving = random.exponential(np.exp(-0.3 * (x - 5))), random.exponential(2, 80)
    time, event = np.round(np.minimum(death, leaving), 2) + 0.01, death <= leaving
    survival = np.exp(-0.5 * np.exp(0.3 * (x - 5)))
    metrics = survival_calibration(time, event, x, survival, 0.5)
    counts, rows = resamples(80, seed)
    found = {name: metric(counts) for name, metric in metrics.items()}
    for i, index in enumerate(rows):
        labels = Surv.from_arrays(event[index], time[index])
        fitted = CoxPHSurvivalAnalysis(ties="breslow", tol=1e-12).fit(x[index, None], labels)
        assert found[SLOPE][i] == pytest.approx(fitted.coef_[0], abs=1e-4)
        at, alive = kaplan_meier_estimator(event[index], time[index])
        observed = 1 - np.append(1.0, alive)[np.searchsorted(at, 0.5, side="right")]
        expected = (1 - survival[index]).mean()
        assert found[OBSERVED_EXPECTED][i] == pytest.approx(observed / expected)


def test_survival_calibration_beyond_follow_up_is_undefined():
    metrics = survival_calibration([1, 2, 3], [True, False, True], [0, 1, 2], [0.5] * 3, 4)
    assert np.isnan(metrics[OBSERVED_EXPECTED](np.ones((1, 3)))).all()


def test_slope_without_a_maximum_is_undefined():
    time = np.arange(1.0, 9)
    metrics = survival_calibration(time, np.ones(8, bool), -time, np.full(8, 0.5), 4)
    assert np.isnan(metrics[SLOPE](np.ones((1, 8)))).all()
    censored = survival_calibration(time, np.zeros(8, bool), -time, np.full(8, 0.5), 4)
    assert np.isnan(censored[SLOPE](np.ones((1, 8)))).all()


# --- subgroups -------------------------------------------------------------------------------

TARGET = ClassificationTarget(
    name="growth", kind="classification", column="growth", classes=("a", "b")
)


def predicted(n, *, seed=0):
    p = np.random.default_rng(seed).uniform(size=n)
    return pl.DataFrame(
        {
            "patient": [f"p{i}" for i in range(n)],
            "y": np.arange(n) % 2,
            "probability_a": 1 - p,
            "probability_b": p,
        }
    )


def test_a_subgroup_is_scored_as_if_it_were_alone():
    table = predicted(40)
    groups = ["north"] * 25 + ["south"] * 15
    found = subgroup_metrics(TARGET, table, groups, resamples=50, seed=3)
    alone = subgroup_metrics(TARGET, table[:25], groups[:25], resamples=50, seed=3)
    assert found.filter(group="north").equals(alone)
    assert found.filter(group="south", metric="auc")["patients"].to_list() == [15]


def test_small_subgroups_are_listed_without_values():
    groups = ["north"] * 20 + ["south"] * (SMALLEST - 1) + [None] * 1
    found = subgroup_metrics(TARGET, predicted(len(groups)), groups, resamples=20, seed=0)
    assert set(found["group"]) == {"north", "south", MISSING_GROUP}
    small = found.filter(group="south")
    assert small["value"].null_count() == small.height
    assert set(small["note"]) == {f"too small: {SMALLEST - 1} of at least {SMALLEST} patients"}
    assert found.filter(group="north")["value"].null_count() == 0


def test_a_subgroup_of_one_class_has_a_note():
    table = predicted(20).with_columns(y=pl.lit(1, pl.Int64))
    auc = subgroup_metrics(TARGET, table, ["x"] * 20, resamples=20, seed=0).filter(metric="auc")
    assert auc["value"].to_list() == [None]
    assert "one class" in auc["note"][0]


def test_every_prediction_needs_a_group():
    with pytest.raises(ValueError, match="4 predictions but 2 groups"):
        subgroup_metrics(TARGET, predicted(4), ["a", "b"], resamples=2, seed=0)

"""Metrics equal SciPy, scikit-learn and scikit-survival; intervals and p values are calibrated."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    log_loss,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
)
from sksurv.metrics import (
    concordance_index_censored,
    concordance_index_ipcw,
    cumulative_dynamic_auc,
    integrated_brier_score,
)
from sksurv.util import Surv

from nic_core.models.metrics import (
    bootstrap_counts,
    classification_metrics,
    compare,
    compare_cohorts,
    confusion,
    event_horizons,
    high_risk,
    log_rank,
    regression_metrics,
    score,
    survival_metrics,
)


def resample(random, n):
    """Return a resample as counts, and as the indices of its units."""
    index = np.sort(random.integers(0, n, n))
    return np.bincount(index, minlength=n)[None].astype(float), index


@pytest.mark.parametrize("seed", range(5))
def test_regression_metrics_equal_scipy_and_sklearn(seed):
    random = np.random.default_rng(seed)
    y, p = random.integers(0, 9, 40).astype(float), random.integers(0, 9, 40) / 3
    w, i = resample(random, 40)
    ours = {name: metric(w)[0] for name, metric in regression_metrics(y, p).items()}
    assert ours == pytest.approx(
        {
            "spearman": spearmanr(y[i], p[i]).statistic,
            "pearson": pearsonr(y[i], p[i]).statistic,
            "r2": r2_score(y[i], p[i]),
            "mae": mean_absolute_error(y[i], p[i]),
        },
        abs=1e-12,
    )


@pytest.mark.parametrize("seed", range(5))
def test_binary_metrics_equal_sklearn(seed):
    random = np.random.default_rng(seed)
    y = random.integers(0, 2, 40)
    p = np.round(random.random(40), 1)
    w, i = resample(random, 40)
    ours = {k: m(w)[0] for k, m in classification_metrics(y, np.stack([0.99 - p, p], 1)).items()}
    for name in ("calibration_error", "brier", "log_loss"):  # of probabilities with sum 1, below
        del ours[name]
    assert ours == pytest.approx(
        {
            "auc": roc_auc_score(y[i], p[i]),
            "average_precision": average_precision_score(y[i], p[i]),
            "balanced_accuracy": balanced_accuracy_score(y[i], (p > 0.99 - p)[i]),
        },
        abs=1e-12,
    )


@pytest.mark.parametrize("seed", range(3))
def test_brier_score_and_log_loss_equal_sklearn(seed):
    random = np.random.default_rng(seed)
    for classes in (2, 3):
        y, p = random.integers(0, classes, 60), random.dirichlet(np.ones(classes), 60)
        w, i = resample(random, 60)
        ours = classification_metrics(y, p)
        labels = range(classes)
        expected = log_loss(y[i], p[i], labels=labels)
        assert ours["log_loss"](w)[0] == pytest.approx(expected, abs=1e-12)
        if classes == 2:
            expected = brier_score_loss(y[i], p[i, 1], pos_label=1)
        else:  # the lowest scikit-learn has it for two classes only
            expected = ((p[i] - np.eye(classes)[y[i]]) ** 2).sum(1).mean()
        assert ours["brier"](w)[0] == pytest.approx(expected, abs=1e-12)


def reference_calibration_error(y, p):
    """Expected calibration error, computed from its definition."""
    total = 0.0
    for low in np.arange(10) / 10:
        inside = (p.max(1) >= low) & (p.max(1) < low + 0.1 if low < 0.9 else p.max(1) <= 1)
        if inside.any():
            right = (p.argmax(1) == y)[inside].mean()
            total += inside.mean() * abs(right - p.max(1)[inside].mean())
    return total


@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_equals_its_definition(seed):
    random = np.random.default_rng(seed)
    y, p = random.integers(0, 3, 60), random.dirichlet(np.ones(3), 60)
    w, i = resample(random, 60)
    ours = classification_metrics(y, p)["calibration_error"](w)[0]
    assert ours == pytest.approx(reference_calibration_error(y[i], p[i]), abs=1e-12)


def test_multiclass_metrics_equal_sklearn_macro_means():
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 60)
    p = random.dirichlet(np.ones(3), 60)
    ours = {k: m(np.ones((1, 60)))[0] for k, m in classification_metrics(y, p).items()}
    assert ours["auc"] == pytest.approx(roc_auc_score(y, p, multi_class="ovr", average="macro"))
    assert ours["average_precision"] == pytest.approx(
        average_precision_score(np.eye(3)[y], p, average="macro")
    )
    assert ours["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, p.argmax(1)))
    assert confusion(y, p).sum() == 60
    assert np.trace(confusion(y, p)) == (p.argmax(1) == y).sum()


@pytest.mark.parametrize("seed", range(5))
def test_concordance_equals_scikit_survival_with_ties(seed):
    random = np.random.default_rng(seed)
    n = 50
    t = random.integers(1, 15, n).astype(float)
    e = random.random(n) < 0.6
    e[t == t.max()] = True  # an event at the last time keeps Uno's weights finite
    r = np.round(random.normal(size=n), 1)
    metrics = survival_metrics(t, e, r)
    w, i = resample(random, n)
    assert metrics["harrell_c"](w)[0] == pytest.approx(
        concordance_index_censored(e[i], t[i], r[i])[0], abs=1e-12
    )
    y = Surv.from_arrays(e, t)
    assert metrics["uno_c"](np.ones((1, n)))[0] == pytest.approx(
        concordance_index_ipcw(y, y, r)[0], abs=1e-12
    )
    # in a resample, the censoring distribution is that of the original sample
    assert metrics["uno_c"](w)[0] == pytest.approx(concordance_index_ipcw(y, y[i], r[i])[0])


@pytest.mark.parametrize("seed", range(5))
def test_time_auc_and_brier_score_equal_scikit_survival(seed):
    random = np.random.default_rng(seed)
    n = 60
    t = random.integers(1, 30, n).astype(float)
    e = random.random(n) < 0.6
    e[t == t.max()] = True  # scikit-survival refuses infinite weights
    r = np.round(random.normal(size=n), 1)
    at = event_horizons(t, e)
    survival = np.exp(-np.exp(r)[:, None] * at / 20)
    metrics = survival_metrics(t, e, r, survival, at)
    y, once = Surv.from_arrays(e, t), np.ones((1, n))
    assert metrics["time_auc"](once)[0] == pytest.approx(
        cumulative_dynamic_auc(y, y, r, at)[1], abs=1e-12
    )
    assert metrics["integrated_brier"](once)[0] == pytest.approx(
        integrated_brier_score(y, y, survival, at), abs=1e-12
    )


def test_horizons_are_within_the_follow_up():
    assert event_horizons([1, 2, 3], [False] * 3).size == 0
    assert event_horizons([2, 2, 2], [True] * 3).size == 0
    at = event_horizons(np.arange(101), np.ones(101, bool))
    np.testing.assert_allclose(at, range(10, 100, 10))
    few = survival_metrics([1, 2], [True, False], [2, 1], np.ones((2, 1)), [1.0])
    assert few["time_auc"](np.ones((1, 2)))[0] == 1
    assert np.isnan(few["integrated_brier"](np.ones((1, 2)))[0])


def test_paired_comparison_is_sharper_than_two_intervals():
    random = np.random.default_rng(0)
    y = random.normal(size=60)
    noise = random.normal(size=60)
    patients = [str(i) for i in range(60)]
    better, worse = (regression_metrics(y, y + k * noise) for k in (1.0, 1.3))
    alone = [score(m, patients, resamples=400, seed=0)["pearson"] for m in (better, worse)]
    assert alone[0].low < alone[1].high  # the intervals overlap
    found = compare(better, worse, patients, resamples=400, seed=0)["pearson"]
    assert found.value == pytest.approx(alone[0].value - alone[1].value)
    assert 0 < found.low < found.value < found.high
    assert found.p == pytest.approx(2 / 401)
    turned = compare(worse, better, patients, resamples=400, seed=0)["pearson"]
    assert (turned.value, turned.low, turned.high) == pytest.approx(
        (-found.value, -found.high, -found.low)
    )
    assert turned.p == found.p
    same = compare(better, better, patients, resamples=400, seed=0)["pearson"]
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_p_values_are_calibrated_without_a_difference():
    found = []
    for trial in range(200):
        random = np.random.default_rng(trial)
        y = random.normal(size=40)
        a, b = (regression_metrics(y, y + random.normal(size=40)) for _ in range(2))
        patients = [str(i) for i in range(40)]
        found.append(compare(a, b, patients, resamples=200, seed=trial)["pearson"].p)
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.11


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=20), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_negative_risk_gives_one_minus_the_c_index(risk, seed):
    random = np.random.default_rng(seed)
    r = np.array(risk)
    t, e = random.random(len(r)), np.ones(len(r), bool)
    ones = np.ones((1, len(r)))
    forward = survival_metrics(t, e, r)["harrell_c"](ones)[0]
    assert survival_metrics(t, e, -r)["harrell_c"](ones)[0] == pytest.approx(1 - forward)


def test_undefined_metrics_are_nan():
    ones = np.ones((1, 4))
    assert np.isnan(regression_metrics([1, 2, 3, 4], [5, 5, 5, 5])["spearman"](ones)[0])
    assert np.isnan(classification_metrics([1, 1, 1, 1], np.full((4, 2), 0.5))["auc"](ones)[0])
    assert np.isnan(survival_metrics([1, 2, 3, 4], [False] * 4, [1, 2, 3, 4])["uno_c"](ones)[0])
    assert np.isnan(log_rank([1, 2, 3], [True] * 3, [1, 1, 1]))
    assert np.isnan(log_rank([1, 2, 3], [False] * 3, [1, 2, 3]))
    assert np.isnan(log_rank([5, 5, 5], [True] * 3, [1, 2, 3]))


def test_units_of_a_patient_are_resampled_together():
    patient = np.array([0, 1, 1, 2, 2, 2])
    counts = bootstrap_counts(patient, resamples=100, seed=0)
    assert (counts[:, 1] == counts[:, 2]).all()
    assert (counts[:, 3] == counts[:, 5]).all()
    assert (counts[:, [0, 1, 3]].sum(1) == 3).all()


def test_bootstrap_interval_has_its_nominal_coverage():
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        x = random.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 60)
        interval = score(
            {"pearson": regression_metrics(x[:, 0], x[:, 1])["pearson"]},
            [str(i) for i in range(60)],
            resamples=300,
            seed=trial,
        )["pearson"]
        assert interval.low <= interval.value <= interval.high
        covered += interval.low < 0.6 < interval.high
    assert 85 <= covered <= 100


def test_a_thousand_resamples_take_two_seconds_per_metric():
    random = np.random.default_rng(0)
    n = 300
    patients = [str(i) for i in range(n)]
    t, e, r = random.random(n), random.random(n) < 0.5, random.normal(size=n)
    start = time.process_time()
    score(survival_metrics(t, e, r), patients, resamples=1000, seed=0)
    score(regression_metrics(t, r), patients, resamples=1000, seed=0)
    score(classification_metrics(e, np.stack([-r, r], 1)), patients, resamples=1000, seed=0)
    assert time.process_time() - start < 2 * 9  # nine metrics


def test_log_rank_p_is_small_only_for_groups_that_differ():
    random = np.random.default_rng(1)
    risk = random.normal(size=100)
    t = random.exponential(np.exp(-1.5 * risk))
    assert log_rank(t, np.ones(100, bool), risk) < 1e-3
    assert log_rank(random.permutation(t), np.ones(100, bool), risk) > 0.05


def test_cohorts_are_compared_without_pairing():
    random = np.random.default_rng(0)
    y = random.normal(size=200)
    good = regression_metrics(y, y + random.normal(scale=0.5, size=200))
    poor = regression_metrics(y[:80], random.normal(size=80))
    patients = [str(i) for i in range(200)]
    found = compare_cohorts(poor, patients[:80], good, patients, resamples=300, seed=0)["spearman"]
    once = np.ones((1, 80)), np.ones((1, 200))
    assert found.value == pytest.approx(poor["spearman"](once[0])[0] - good["spearman"](once[1])[0])
    assert found.low < found.value < found.high < 0
    assert found.p < 0.01
    # the variance of a difference of independent values is the sum of theirs
    widths = [
        interval.high - interval.low
        for metrics, names in ((poor, patients[:80]), (good, patients))
        for interval in [score(metrics, names, resamples=300, seed=0)["spearman"]]
    ]
    assert found.high - found.low == pytest.approx(np.hypot(*widths), rel=0.25)


def test_risk_groups_are_divided_at_a_given_threshold():
    risk = [0.1, 0.2, 0.3, 0.9]
    assert high_risk(risk).tolist() == [False, False, True, True]
    assert high_risk(risk, 0.5).tolist() == [False, False, False, True]
    assert np.isnan(log_rank([1, 2, 3, 4], [True] * 4, risk, threshold=2.0))

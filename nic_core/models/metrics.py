"""Metrics of slide models, with bootstrap intervals over patients and paired comparisons.

A metric is a function of *counts* (B, n): how often each of n units occurs in each of B resamples.
A row of ones is the original sample. With this interface, a thousand resamples are a few matrix
products. Values equal those of SciPy, scikit-learn and scikit-survival on the resample that the
counts describe (tested); undefined values are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sksurv.compare import compare_survival
from sksurv.nonparametric import CensoringDistributionEstimator, SurvivalFunctionEstimator
from sksurv.util import Surv

Floats = NDArray[np.float64]
Metric = Callable[[Floats], Floats]  # counts (B, n) -> values (B,)

CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Interval:
    """A metric's value on the sample, and the bounds of its percentile bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Difference between two models' metrics, with interval and two-sided bootstrap p value."""

    value: float
    low: float
    high: float
    p: float


def regression_metrics(truth: ArrayLike, prediction: ArrayLike) -> dict[str, Metric]:
    """Return ``spearman``, ``pearson``, ``r2`` and ``mae`` (mean absolute error).

    Parameters
    ----------
    truth, prediction : float (n,)
    """
    y, p = _numbers(truth), _numbers(prediction)
    y_rank, p_rank = _Ranks(y), _Ranks(p)

    def r2(w: Floats) -> Floats:
        mean = _ratio(w @ y, w.sum(1))
        spread = (w * (y - mean[:, None]) ** 2).sum(1)
        return 1 - _ratio(w @ (y - p) ** 2, spread)

    return {
        "spearman": lambda w: _correlation(y_rank(w), p_rank(w), w),
        "pearson": lambda w: _correlation(y[None], p[None], w),
        "r2": r2,
        "mae": lambda w: _ratio(w @ np.abs(y - p), w.sum(1)),
    }


def classification_metrics(truth: ArrayLike, probability: ArrayLike) -> dict[str, Metric]:
    """Return AUC, average precision, balanced accuracy and measures of calibration.

    Names: ``auc``, ``average_precision``, ``balanced_accuracy``, ``calibration_error``, ``brier``
    and ``log_loss``.

    Of two classes the second is the positive one. For more classes, ``auc`` and
    ``average_precision`` are the unweighted means over classes, each against the rest.
    ``calibration_error`` is the expected calibration error of the most probable class: the mean
    difference between its probability and its accuracy over 10 bins of equal width, weighted by
    the number of units. With few units it is large by chance. ``brier`` is the squared error of
    the probability, for two classes of the second one, for more summed over classes. ``log_loss``
    is the mean negative log probability of the true class, which counts as at least 1e-15.

    Parameters
    ----------
    truth : int (n,)
        Positions of the classes.
    probability : float (n, classes)
    """
    y = np.asarray(truth, np.int64)
    p = np.asarray(probability, np.float64)
    classes = p.shape[1]
    scored = [1] if classes == 2 else list(range(classes))
    aucs = [_auc(y == c, p[:, c]) for c in scored]
    precisions = [_average_precision(y == c, p[:, c]) for c in scored]
    hit = p.argmax(1) == y
    bins = np.minimum((p.max(1) * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    square = (p - np.eye(classes)[y]) ** 2
    brier = square[:, 1] if classes == 2 else square.sum(1)
    surprise = -np.log(np.maximum(p[np.arange(len(y)), y], 1e-15))
    surplus = np.eye(CALIBRATION_BINS)[bins] * (hit - p.max(1))[:, None]

    def balanced_accuracy(w: Floats) -> Floats:
        recalls = [_ratio(w @ (hit & (y == c)), w @ (y == c)) for c in range(classes)]
        # as in scikit-learn, a class without units is left out
        present = np.array([(w @ (y == c)) > 0 for c in range(classes)])
        return _ratio(np.where(present, recalls, 0).sum(0), present.sum(0))

    return {
        "auc": lambda w: np.mean([auc(w) for auc in aucs], 0),
        "average_precision": lambda w: np.mean([ap(w) for ap in precisions], 0),
        "balanced_accuracy": balanced_accuracy,
        "calibration_error": lambda w: _ratio(np.abs(w @ surplus).sum(1), w.sum(1)),
        "brier": lambda w: _ratio(w @ brier, w.sum(1)),
        "log_loss": lambda w: _ratio(w @ surprise, w.sum(1)),
    }


def survival_metrics(
    time: ArrayLike,
    event: ArrayLike,
    risk: ArrayLike,
    survival: ArrayLike | None = None,
    horizons: ArrayLike | None = None,
) -> dict[str, Metric]:
    """Return ``harrell_c`` and ``uno_c``; a higher risk predicts an earlier event.

    With survival functions also ``time_auc``, the mean cumulative / dynamic AUC of the risk over
    ``horizons`` (weighted by the decrease of the Kaplan-Meier estimate), and ``integrated_brier``
    (lower is better; undefined with fewer than two horizons).

    Inverse censoring weights and the weights of the horizons are estimated once, on the original
    sample, and kept fixed in the resamples. Units whose weight would be infinite get weight 0.

    Parameters
    ----------
    time, risk : float (n,)
    event : bool (n,)
        True: event, false: censored.
    survival : float (n, times), optional
        Predicted survival probability at each horizon.
    horizons : float (times,), optional
        Ascending, in the unit of ``time``.
    """
    t, e, r = _numbers(time), np.asarray(event, bool), _numbers(risk)
    # a death is comparable to all who lived longer, including those censored at the same time
    later = (t[:, None] < t[None, :]) | ((t[:, None] == t[None, :]) & ~e[None, :])
    comparable = (e[:, None] & later).astype(np.float64)
    concordant = comparable * _order(r[:, None] - r[None, :], tolerance=1e-8)
    weight = _censoring_weights(t, e)

    def index(w: Floats, v: Floats) -> Floats:
        deaths = w * v
        return _ratio(((deaths @ concordant) * w).sum(1), ((deaths @ comparable) * w).sum(1))

    metrics: dict[str, Metric] = {
        "harrell_c": lambda w: index(w, np.ones_like(t)),
        "uno_c": lambda w: index(w, weight**2),
    }
    if survival is not None and horizons is not None:
        at = _numbers(horizons)
        metrics["time_auc"] = _time_auc(t, e, r, weight, at)
        brier = _integrated_brier(t, e, weight, _numbers(survival), at)
        metrics["integrated_brier"] = lambda w: _ratio(w @ brier, w.sum(1))
    return metrics


def event_horizons(time: ArrayLike, event: ArrayLike) -> Floats:
    """Return the 10th, 20th, ..., 90th percentiles of the times of events [choice], (times,).

    They depend on labels only, so that models are compared at the same times. Duplicates, and
    horizons that no unit outlives, are dropped.

    Parameters
    ----------
    time : float (n,)
    event : bool (n,)
    """
    t, e = _numbers(time), np.asarray(event, bool)
    if not e.any():
        return np.empty(0)
    at = np.unique(np.percentile(t[e], range(10, 100, 10)))
    return np.asarray(at[at < t.max()], np.float64)


def score(
    metrics: Mapping[str, Metric],
    patients: Sequence[str],
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Compute every metric with its percentile bootstrap interval over patients.

    Patients are drawn with replacement, all units of a patient together. Resamples in which a
    metric is undefined (one class only, no comparable pair) are left out of its interval.

    Parameters
    ----------
    metrics
        Name to metric, all of the same n units.
    patients
        The patient of each unit (n,).
    resamples
        Number of resamples.
    seed
        Seed of the resamples.
    level
        Coverage of the interval.
    """
    drawn = _Resamples.draw(patients, resamples, seed, level)
    return {name: drawn.interval(metric) for name, metric in metrics.items()}


def compare(
    first: Mapping[str, Metric],
    second: Mapping[str, Metric],
    patients: Sequence[str],
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> dict[str, Difference]:
    """Compute first minus second of every metric on the same units, by the paired bootstrap.

    Both are computed on the same resamples of patients. p is 2 (m + 1) / (B + 1), at most 1,
    where m is the smaller of the numbers of resamples, out of B, with a difference <= 0 and >= 0.

    Parameters
    ----------
    first, second
        Metrics of two models by name; ``second`` has every name of ``first``.
    patients, resamples, seed, level
        As in :func:`score`.
    """
    drawn = _Resamples.draw(patients, resamples, seed, level)
    result = {}
    for name, metric in first.items():
        difference = _minus(metric, second[name])
        result[name] = _difference(
            float(difference(drawn.once)[0]), difference(drawn.counts), level
        )
    return result


def compare_cohorts(
    first: Mapping[str, Metric],
    first_patients: Sequence[str],
    second: Mapping[str, Metric],
    second_patients: Sequence[str],
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> dict[str, Difference]:
    """Compute first minus second of every metric on two separate cohorts, by the bootstrap.

    The cohorts share no patient, so each is resampled by itself. p as in :func:`compare`.

    Parameters
    ----------
    first, second
        Metrics of the two cohorts by name; ``second`` has every name of ``first``.
    first_patients, second_patients
        The patient of each unit of the two cohorts.
    resamples, seed, level
        As in :func:`score`.
    """
    one = _Resamples.draw(first_patients, resamples, seed, level)
    # another seed: equal numbers of patients would give the same resamples of both
    other = _Resamples.draw(second_patients, resamples, seed + 1, level)
    return {
        name: _difference(
            float(metric(one.once)[0] - second[name](other.once)[0]),
            metric(one.counts) - second[name](other.counts),
            level,
        )
        for name, metric in first.items()
    }


def _minus(first: Metric, second: Metric) -> Metric:
    return lambda w: first(w) - second(w)


def _difference(value: float, resampled: Floats, level: float) -> Difference:
    """Interval and p of a difference, from its values (resamples,), of which NaN are left out."""
    resampled = resampled[np.isfinite(resampled)]
    if not len(resampled) or not np.isfinite(value):
        return Difference(value, np.nan, np.nan, np.nan)
    low, high = _percentiles(resampled, level)
    side = min((resampled <= 0).sum(), (resampled >= 0).sum())
    p = min(1.0, 2 * (side + 1) / (len(resampled) + 1))
    return Difference(value, low, high, float(p))


def _percentiles(values: Floats, level: float) -> tuple[float, float]:
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


@dataclass(frozen=True)
class _Resamples:
    """Counts of the bootstrap's resamples (resamples, n) and of the original sample (1, n)."""

    counts: Floats
    once: Floats
    level: float

    @classmethod
    def draw(cls, patients: Sequence[str], resamples: int, seed: int, level: float) -> _Resamples:
        _, patient = np.unique(np.asarray(patients), return_inverse=True)
        counts = bootstrap_counts(patient, resamples=resamples, seed=seed)
        return cls(counts, np.ones((1, len(patient))), level)

    def interval(self, metric: Metric) -> Interval:
        """Return the percentile interval of the finite values."""
        values = metric(self.counts)
        values = values[np.isfinite(values)]
        low, high = _percentiles(values, self.level) if len(values) else (np.nan, np.nan)
        return Interval(float(metric(self.once)[0]), low, high)


def bootstrap_counts(patient: NDArray[np.int64], *, resamples: int, seed: int) -> Floats:
    """Count how often each unit occurs in each resample of patients: (resamples, n).

    Equal patients and seeds give equal resamples, so two models can be compared in pairs.

    Parameters
    ----------
    patient : int (n,)
        Number of each unit's patient, from 0.
    """
    patients = int(patient.max()) + 1
    random = np.random.default_rng(seed)
    drawn = random.multinomial(patients, np.full(patients, 1 / patients), size=resamples)
    return drawn[:, patient].astype(np.float64)


def log_rank(
    time: ArrayLike, event: ArrayLike, risk: ArrayLike, *, threshold: float | None = None
) -> float:
    """Return p of the log-rank test between units above a risk and the others (paper A).

    ``threshold`` is as in :func:`high_risk`. NaN where the test is undefined: there is only one
    group, for example if all risks are equal; there is no event; or no event happens while both
    groups are under observation.
    """
    group, seen = high_risk(risk, threshold), np.asarray(event, bool)
    if group.all() or not group.any() or not seen.any():
        return float("nan")
    try:
        return float(compare_survival(Surv.from_arrays(seen, _numbers(time)), group)[1])
    except np.linalg.LinAlgError:  # the variance of the statistic is 0
        return float("nan")


def high_risk(risk: ArrayLike, threshold: float | None = None) -> NDArray[np.bool_]:
    """Return which units are above ``threshold``, bool (n,); default: above their median risk."""
    r = _numbers(risk)
    above: NDArray[np.bool_] = r > (np.median(r) if threshold is None else threshold)
    return above


def confusion(truth: ArrayLike, probability: ArrayLike) -> NDArray[np.int64]:
    """Count units by true class (rows) and most probable class (columns), (classes, classes)."""
    p = np.asarray(probability)
    matrix = np.zeros((p.shape[1], p.shape[1]), np.int64)
    np.add.at(matrix, (np.asarray(truth, np.int64), p.argmax(1)), 1)
    return matrix


class _Ranks:
    """Average ranks of values (n,) in all resamples at once."""

    def __init__(self, values: Floats) -> None:
        _, self.index = np.unique(values, return_inverse=True)
        self.distinct = np.eye(int(self.index.max()) + 1)[self.index]  # (n, distinct values)

    def __call__(self, w: Floats) -> Floats:
        mass = w @ self.distinct
        ranks: Floats = (np.cumsum(mass, axis=1) - (mass - 1) / 2)[:, self.index]
        return ranks


def _correlation(x: Floats, y: Floats, w: Floats) -> Floats:
    total = w.sum(1, keepdims=True)
    x = x - (w * x).sum(1, keepdims=True) / total
    y = y - (w * y).sum(1, keepdims=True) / total
    xx, yy = (w * x * x).sum(1), (w * y * y).sum(1)
    # differences as small as rounding errors count as 0
    tiny = 1e-24 * total[:, 0]
    spread = np.where((xx > tiny) & (yy > tiny), np.sqrt(xx * yy), 0)
    return _ratio((w * x * y).sum(1), spread)


def _auc(positive: NDArray[np.bool_], p: Floats) -> Metric:
    wins = _order(p[positive][:, None] - p[~positive][None, :])

    def auc(w: Floats) -> Floats:
        a, b = w[:, positive], w[:, ~positive]
        return _ratio(((a @ wins) * b).sum(1), a.sum(1) * b.sum(1))

    return auc


def _average_precision(positive: NDArray[np.bool_], p: Floats) -> Metric:
    order = np.argsort(-p, kind="stable")
    last = np.flatnonzero(np.append(np.diff(p[order]) != 0, True))  # last unit of each tie

    def average_precision(w: Floats) -> Floats:
        w = w[:, order]
        hits = np.cumsum(w * positive[order], axis=1)[:, last]
        seen = np.cumsum(w, axis=1)[:, last]
        gained = np.diff(hits, axis=1, prepend=0)
        precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
        return _ratio((gained * precision).sum(1), hits[:, -1])

    return average_precision


def _time_auc(
    time: Floats, event: NDArray[np.bool_], risk: Floats, weight: Floats, horizons: Floats
) -> Metric:
    """Return the mean AUC of scikit-survival's ``cumulative_dynamic_auc``."""
    if not len(horizons):
        return lambda w: np.full(len(w), np.nan)
    wins = _order(risk[:, None] - risk[None, :], tolerance=1e-8)
    alive = SurvivalFunctionEstimator().fit(Surv.from_arrays(event, time)).predict_proba(horizons)
    drops = -np.diff(np.append(1.0, alive))

    def time_auc(w: Floats) -> Floats:
        aucs = []
        for horizon in horizons:
            dead, living = w * (weight * (time <= horizon)), w * (time > horizon)
            aucs.append(_ratio(((dead @ wins) * living).sum(1), dead.sum(1) * living.sum(1)))
        if len(horizons) == 1:
            return aucs[0]
        return _ratio(drops @ np.array(aucs), drops.sum())

    return time_auc


def _integrated_brier(
    time: Floats,
    event: NDArray[np.bool_],
    weight: Floats,
    survival: Floats,
    horizons: Floats,
) -> Floats:
    """Return each unit's term of scikit-survival's ``integrated_brier_score``, (n,)."""
    if len(horizons) < 2:
        return np.full(len(time), np.nan)
    censoring = CensoringDistributionEstimator().fit(Surv.from_arrays(event, time))
    uncensored = np.asarray(censoring.predict_proba(horizons))
    living = np.divide(1, uncensored, out=np.zeros_like(uncensored), where=uncensored > 0)
    dead = (time[:, None] <= horizons) * weight[:, None]
    scores = survival**2 * dead + (1 - survival) ** 2 * (time[:, None] > horizons) * living
    part: Floats = np.trapezoid(scores, horizons, axis=1) / (horizons[-1] - horizons[0])
    return part


def _censoring_weights(time: Floats, event: NDArray[np.bool_]) -> Floats:
    """Return 1 / G(t) for deaths, 0 for others; G is the Kaplan-Meier estimate of censoring."""
    weights = np.zeros_like(time)
    if event.any():
        censoring = CensoringDistributionEstimator().fit(Surv.from_arrays(event, time))
        uncensored = np.asarray(censoring.predict_proba(time[event]))
        weights[event] = np.divide(
            1, uncensored, out=np.zeros_like(uncensored), where=uncensored > 0
        )
    return weights


def _order(difference: Floats, tolerance: float = 0.0) -> Floats:
    """Return 1 where the difference is positive, 1/2 where it is tied, else 0."""
    tied = np.abs(difference) <= tolerance
    return np.where(tied, 0.5, (difference > 0).astype(np.float64))


def _ratio(a: Any, b: Any) -> Floats:
    """Return a / b; NaN where b is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    ratio: Floats = np.divide(a, b, out=np.full(a.shape, np.nan), where=b != 0)
    return ratio


def _numbers(values: ArrayLike) -> Floats:
    return np.asarray(values, np.float64)

"""Calibration of predictions on units that the model was not trained on.

*Calibration in the large* asks whether predictions are right on average, the *calibration slope*
whether high and low predictions are as far apart as they should be: a slope below 1 means that
predictions are too extreme (Van Calster et al., BMC Medicine 17:230, 2019; for survival McLernon
et al., Annals of Internal Medicine 176:105, 2023). Every function returns metrics of counts
(:mod:`nic_core.models.metrics`), so :func:`nic_core.models.metrics.score` gives intervals over
patients. A value that does not exist is NaN: for example the slope if the predictions separate the
classes completely.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit

from nic_core.models.metrics import Metric

Floats = NDArray[np.float64]

IN_THE_LARGE = "calibration_in_the_large"
SLOPE = "calibration_slope"
OBSERVED_EXPECTED = "observed_expected_ratio"
NEWTON_STEPS, TOLERANCE, SINGULAR = 30, 1e-8, 1e-10
SMALLEST_PROBABILITY = 1e-6
"""Probabilities closer to 0 and 1 are set to this distance, so that their log odds are finite
[choice].
"""


def logistic_calibration(event: ArrayLike, probability: ArrayLike) -> dict[str, Metric]:
    """Return ``calibration_in_the_large`` and ``calibration_slope`` of the probability of a class.

    In the large: the intercept a of the logistic model logit(p') = a + logit(p), so 0 is perfect
    and a positive value means that the class is more frequent than predicted. Slope: the
    coefficient b of logit(p') = a + b logit(p).

    Parameters
    ----------
    event : bool (n,)
        Whether a unit has the class.
    probability : float (n,)
        Its predicted probability.
    """
    y = np.asarray(event, bool)
    margin = SMALLEST_PROBABILITY
    x = _log_odds(np.clip(np.asarray(probability, np.float64), margin, 1 - margin))

    def in_the_large(w: Floats) -> Floats:
        total, events = w.sum(1), w @ y
        found = np.full(len(w), np.nan)
        both = (events > 0) & (events < total)
        if not both.any():
            return found
        counts = w[both]

        def surplus(a: Floats) -> Floats:
            found: Floats = (counts * (_logistic(x + a[:, None]) - y)).sum(1)
            return found

        def derivative(a: Floats) -> Floats:
            p = _logistic(x + a[:, None])
            found: Floats = (counts * p * (1 - p)).sum(1)
            return found

        start = _log_odds(events[both] / total[both]) - counts @ x / total[both]
        found[both] = _roots(surplus, derivative, start)
        return found

    return {IN_THE_LARGE: in_the_large, SLOPE: lambda w: _logistic_slopes(w, y, x)}


def linear_calibration(truth: ArrayLike, prediction: ArrayLike) -> dict[str, Metric]:
    """Return ``calibration_in_the_large`` and ``calibration_slope`` of predicted numbers.

    In the large: the mean of label minus prediction, in the label's unit. Slope: the coefficient of
    the least-squares line of labels on predictions.

    Parameters
    ----------
    truth, prediction : float (n,)
    """
    y, p = np.asarray(truth, np.float64), np.asarray(prediction, np.float64)

    def slope(w: Floats) -> Floats:
        total = w.sum(1, keepdims=True)
        dy, dp = y - (w @ y)[:, None] / total, p - (w @ p)[:, None] / total
        spread = (w * dp**2).sum(1)
        # differences as small as rounding errors count as equal predictions
        defined = spread > 1e-20 * (w @ p**2)
        found = np.full(len(w), np.nan)
        np.divide((w * dy * dp).sum(1), spread, out=found, where=defined)
        return found

    return {IN_THE_LARGE: lambda w: (w @ (y - p)) / w.sum(1), SLOPE: slope}


def survival_calibration(
    time: ArrayLike,
    event: ArrayLike,
    log_hazard: ArrayLike,
    survival: ArrayLike,
    horizon: float,
) -> dict[str, Metric]:
    """Return ``observed_expected_ratio`` and ``calibration_slope`` of a survival model.

    Observed / expected: 1 minus the Kaplan-Meier estimate at ``horizon``, divided by the mean
    predicted probability of an event until then; NaN if no unit is observed as long. Slope: the
    coefficient of the predicted log hazard in a Cox model with no other covariate.

    Parameters
    ----------
    time : float (n,)
    event : bool (n,)
        True: event, false: censored.
    log_hazard : float (n,)
        Predicted log hazard relative to the baseline (the linear predictor).
    survival : float (n,)
        Predicted probability of no event until ``horizon``.
    horizon : float
        In the unit of ``time``.
    """
    t, e = np.asarray(time, np.float64), np.asarray(event, bool)
    x, s = np.asarray(log_hazard, np.float64), np.asarray(survival, np.float64)
    steps = np.unique(t[e & (t <= horizon)])

    def ratio(w: Floats) -> Floats:
        at_risk = w @ (t[:, None] >= steps).astype(np.float64)
        deaths = w @ ((t[:, None] == steps) & e[:, None]).astype(np.float64)
        falls = np.divide(deaths, at_risk, out=np.zeros_like(deaths), where=at_risk > 0)
        observed = 1 - np.prod(1 - falls, axis=1)
        expected = w @ (1 - s) / w.sum(1)
        followed = (w @ (t >= horizon) > 0) & (expected > 0)
        found = np.full(len(w), np.nan)
        np.divide(observed, expected, out=found, where=followed)
        return found

    return {OBSERVED_EXPECTED: ratio, SLOPE: lambda w: _cox_slopes(w, t, e, x)}


def _logistic(x: Floats) -> Floats:
    p: Floats = expit(x)
    return p


def _log_odds(p: Floats) -> Floats:
    x: Floats = logit(p)
    return x


def _logistic_slopes(w: Floats, y: NDArray[np.bool_], x: Floats) -> Floats:
    """Return the coefficient of x in a logistic model of each resample (resamples,).

    By Newton's method for all resamples at once: scikit-learn fits one at a time, which takes
    3 s for 1000 resamples. NaN where the likelihood has no maximum.
    """
    spread = float(x.std())
    found = np.full(len(w), np.nan)
    both = (w @ y > 0) & (w @ ~y > 0)
    if spread == 0 or not both.any():
        return found
    z, counts = (x - x.mean()) / spread, w[both]
    share = counts @ y / counts.sum(1)
    intercept, slope = _log_odds(share), np.zeros(len(counts))
    step = np.full(len(counts), np.inf)
    for _ in range(NEWTON_STEPS):
        p = _logistic(intercept[:, None] + slope[:, None] * z)
        gradient, weight = counts * (y - p), counts * p * (1 - p)
        g0, g1 = gradient.sum(1), gradient @ z
        h0, h1, h2 = weight.sum(1), weight @ z, weight @ z**2
        determinant = h0 * h2 - h1**2
        solvable = determinant > SINGULAR * (h0 * h2)
        first, step = (
            np.divide(change, determinant, out=np.full_like(change, np.nan), where=solvable)
            for change in (h2 * g0 - h1 * g1, h0 * g1 - h1 * g0)
        )
        intercept, slope = intercept + first, slope + step
        if np.all((np.abs(step) < TOLERANCE) | np.isnan(step)):
            break
    found[both] = np.where(np.abs(step) < TOLERANCE, slope / spread, np.nan)
    return found


def _cox_slopes(w: Floats, time: Floats, event: NDArray[np.bool_], x: Floats) -> Floats:
    """Return the coefficient of x in a Cox model of each resample (resamples,); Breslow's ties.

    The root of the score of the partial likelihood by Newton's method, for all resamples at once:
    scikit-survival fits one at a time, which takes 9 s for 1000 resamples of 60 units.
    NaN where the likelihood has no maximum.
    """
    spread = float(x.std())
    if not event.any() or spread == 0:
        return np.full(len(w), np.nan)
    z = (x - x.mean()) / spread
    at_risk = (time >= time[event][:, None]).T.astype(np.float64)  # (n, deaths)
    deaths = w[:, event]

    def moments(b: Floats) -> tuple[Floats, Floats]:
        """Weighted mean of z, and of its square, over the units at risk at each death."""
        exponent = b[:, None] * z
        hazard = w * np.exp(exponent - exponent.max(1, keepdims=True))
        total = hazard @ at_risk
        known = total > 0
        first = np.divide((hazard * z) @ at_risk, total, out=np.zeros_like(total), where=known)
        second = np.divide((hazard * z**2) @ at_risk, total, out=np.zeros_like(total), where=known)
        return first, second

    def score(b: Floats) -> Floats:
        found: Floats = (deaths * (z[event] - moments(b)[0])).sum(1)
        return found

    def derivative(b: Floats) -> Floats:
        first, second = moments(b)
        found: Floats = -(deaths * (second - first**2)).sum(1)
        return found

    return _roots(score, derivative, np.zeros(len(w))) / spread


def _roots(
    function: Callable[[Floats], Floats], derivative: Callable[[Floats], Floats], start: Floats
) -> Floats:
    """Return a root of each resample (resamples,) by Newton's method; NaN where it diverges.

    ``scipy.optimize.newton`` returns other values for one resample than for several.
    """
    at = start
    for _ in range(NEWTON_STEPS):
        slope = derivative(at)
        step = np.divide(function(at), slope, out=np.full_like(at, np.nan), where=slope != 0)
        at = at - step
        if np.all((np.abs(step) < TOLERANCE) | np.isnan(step)):
            break
    return np.where(np.abs(step) < TOLERANCE, at, np.nan)

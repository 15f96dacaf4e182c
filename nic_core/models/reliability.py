"""Reliability: predictions against what was observed, in groups of similar predictions.

The units of each model are divided at quantiles of the predicted value; equal predictions stay in
one group. Predictions of calibrated models equal the observed values in every group, up to chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, t
from sksurv.nonparametric import kaplan_meier_estimator

from nic_core.cohort import ClassificationTarget, SurvivalTarget, Target
from nic_core.models.kinds.base import survival_columns

Floats = NDArray[np.float64]

RELIABILITY_SCHEMA = pl.Schema(
    {
        "model": pl.String,
        "outcome": pl.String,
        "time": pl.Float64,
        "group": pl.Int64,
        "units": pl.Int64,
        "predicted": pl.Float64,
        "observed": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
    }
)
GROUPS = 5
"""Groups of a reliability table, fewer if predictions are equal [choice]."""


def reliability(
    target: Target, predictions: pl.DataFrame, times: ArrayLike = (), *, groups: int = GROUPS
) -> pl.DataFrame:
    """Compare mean predicted and observed values in groups of each model's predictions.

    Classification: probability and share of each class, of two classes only of the last one, with
    the Wilson 95 % interval. Survival: probability of survival and its Kaplan-Meier estimate, with
    the log-log 95 % interval. Regression: mean label with the 95 % t interval. The intervals take
    units as independent.

    Parameters
    ----------
    predictions
        Rows of :attr:`~nic_core.models.cross_validation.CrossValidation.predictions` of one split.
    times
        Survival: the times of the columns ``survival_<time>``, in the target's unit.

    Returns
    -------
    polars.DataFrame
        :data:`RELIABILITY_SCHEMA`: one row for each model, class (``outcome``) or time, and group.
        ``observed`` is null if a group is not followed up to the time, ``low`` and ``high`` are
        null where the interval does not exist.
    """
    rows: list[dict[str, Any]] = []
    for (model,), units in predictions.group_by("model", maintain_order=True):
        for outcome, time, predicted in _predicted(target, units, times):
            group = quantile_groups(predicted, groups)
            for number in range(group.max() + 1):
                inside = group == number
                observed, low, high = _observed(target, units.filter(inside), outcome, time)
                rows.append(
                    {
                        "model": model,
                        "outcome": outcome,
                        "time": time,
                        "group": number,
                        "units": int(inside.sum()),
                        "predicted": float(predicted[inside].mean()),
                        "observed": observed,
                        "low": low,
                        "high": high,
                    }
                )
    return pl.DataFrame(rows, schema=RELIABILITY_SCHEMA).with_columns(
        pl.col("observed", "low", "high").fill_nan(None)
    )


def quantile_groups(values: Floats, groups: int) -> NDArray[np.int64]:
    """Number the group of each value (n,) between quantiles; equal values share a group."""
    inner = np.quantile(values, np.arange(1, groups) / groups)
    return np.unique(np.searchsorted(inner, values, side="left"), return_inverse=True)[1]


def survival_at(time: Floats, event: NDArray[np.bool_], at: float) -> tuple[float, float, float]:
    """Return the Kaplan-Meier estimate at a time, with its log-log 95 % interval.

    All are NaN if no unit is followed up to the time and the estimate has not fallen to 0. The
    interval is NaN before the first event, and where the estimate is 0.
    """
    steps, survival, (low, high) = kaplan_meier_estimator(event, time, conf_type="log-log")
    last = int(np.searchsorted(steps, at, side="right")) - 1
    if at > steps[-1] and survival[-1] > 0:
        return np.nan, np.nan, np.nan
    if last < 0 or survival[last] == 1:
        return 1.0, np.nan, np.nan
    if survival[last] == 0:
        return 0.0, np.nan, np.nan
    return float(survival[last]), float(low[last]), float(high[last])


def _predicted(
    target: Target, units: pl.DataFrame, times: ArrayLike
) -> Iterator[tuple[str | None, float | None, Floats]]:
    """Yield class, time and predicted values (units,) of all that a model predicts."""
    if isinstance(target, ClassificationTarget):
        classes = target.classes[1:] if len(target.classes) == 2 else target.classes
        for name in classes:
            yield name, None, units[f"probability_{name}"].to_numpy()
    elif isinstance(target, SurvivalTarget):
        at = np.asarray(times, np.float64)
        for time, column in zip(at.tolist(), survival_columns(at), strict=True):
            yield None, time, units[column].to_numpy()
    else:
        yield None, None, units["prediction"].to_numpy()


def _observed(
    target: Target, units: pl.DataFrame, outcome: str | None, time: float | None
) -> tuple[float, float, float]:
    """Return the observed value of a group with the ends of its interval."""
    if time is not None:
        return survival_at(units["time"].to_numpy(), units["event"].to_numpy(), time)
    y = units["y"].to_numpy()
    if isinstance(target, ClassificationTarget) and outcome is not None:
        count = int((y == target.classes.index(outcome)).sum())
        interval = binomtest(count, len(y)).proportion_ci(method="wilson")
        return count / len(y), float(interval.low), float(interval.high)
    mean = float(y.mean())
    if len(y) < 2:
        return mean, np.nan, np.nan
    margin = float(t.ppf(0.975, len(y) - 1) * y.std(ddof=1) / np.sqrt(len(y)))
    return mean, mean - margin, mean + margin

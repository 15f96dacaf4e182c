"""Decision curves: the net benefit of treating units above a threshold of predicted probability.

Net benefit is the share of true positives less the share of false positives, weighted by the odds
of the threshold (Vickers & Elkin, Medical Decision Making 26:565, 2006). Of survival targets the
shares are estimated by Kaplan-Meier (Vickers et al., BMC Medical Informatics and Decision Making
8:53, 2008).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from nic_core.cohort import ClassificationTarget, SurvivalTarget
from nic_core.models.kinds.base import survival_columns
from nic_core.models.reliability import survival_at

Floats = NDArray[np.float64]

DECISION_SCHEMA = pl.Schema(
    {
        "model": pl.String,
        "outcome": pl.String,
        "time": pl.Float64,
        "threshold": pl.Float64,
        "net_benefit": pl.Float64,
        "treat_all": pl.Float64,
        "treat_none": pl.Float64,
    }
)
THRESHOLDS = np.arange(1, 100) / 100
"""Threshold probabilities of a decision curve."""


def decision_curve(
    target: ClassificationTarget | SurvivalTarget, predictions: pl.DataFrame, times: ArrayLike = ()
) -> pl.DataFrame:
    """Return each model's net benefit at :data:`THRESHOLDS`.

    Classification: of the last class against the others. Survival: of an event up to each time.

    Parameters
    ----------
    predictions
        Rows of :attr:`~nic_core.models.cross_validation.CrossValidation.predictions` of one split.
    times
        Survival: the times of the columns ``survival_<time>``, in the target's unit.

    Returns
    -------
    polars.DataFrame
        :data:`DECISION_SCHEMA`: one row for each model, time and threshold. ``net_benefit`` is null
        if the units above the threshold are not followed up to the time, ``treat_all`` if no unit
        is.
    """
    parts = [DECISION_SCHEMA.to_frame()]
    for (model,), units in predictions.group_by("model", maintain_order=True):
        for outcome, time, benefit, treat_all in _curves(target, units, times):
            curve = {"threshold": THRESHOLDS, "net_benefit": benefit, "treat_all": treat_all}
            parts.append(
                pl.DataFrame(curve)
                .with_columns(
                    model=pl.lit(model, pl.String),
                    outcome=pl.lit(outcome, pl.String),
                    time=pl.lit(time, pl.Float64),
                    treat_none=pl.lit(0.0),
                )
                .select(DECISION_SCHEMA.names())
            )
    return pl.concat(parts).with_columns(pl.col("net_benefit", "treat_all").fill_nan(None))


def _curves(
    target: ClassificationTarget | SurvivalTarget, units: pl.DataFrame, times: ArrayLike
) -> Iterator[tuple[str | None, float | None, Floats, Floats]]:
    """Yield class, time, and the net benefit of a model and of treating all (thresholds,)."""
    if isinstance(target, ClassificationTarget):
        name = target.classes[-1]
        event = units["y"].to_numpy() == len(target.classes) - 1
        benefit = net_benefit(event, units[f"probability_{name}"].to_numpy(), THRESHOLDS)
        yield name, None, benefit, _net_benefit(event.mean(), (~event).mean(), THRESHOLDS)
        return
    at = np.asarray(times, np.float64)
    followed, event = units["time"].to_numpy(), units["event"].to_numpy()
    for time, column in zip(at.tolist(), survival_columns(at), strict=True):
        risk = 1 - units[column].to_numpy()
        benefit = survival_net_benefit(followed, event, risk, THRESHOLDS, time)
        survival = survival_at(followed, event, time)[0]
        yield None, time, benefit, _net_benefit(1 - survival, survival, THRESHOLDS)


def _net_benefit(true: ArrayLike, false: ArrayLike, thresholds: Floats) -> Floats:
    """Return the net benefit of shares of true and false positives, (thresholds,) or a number."""
    benefit: Floats = np.asarray(true) - np.asarray(false) * thresholds / (1 - thresholds)
    return benefit


def net_benefit(event: ArrayLike, probability: ArrayLike, thresholds: ArrayLike) -> Floats:
    """Return the net benefit (thresholds,) of treating units at or above each threshold.

    Parameters
    ----------
    event : bool (n,)
        Whether a unit has the class.
    probability : float (n,)
        Its predicted probability.
    thresholds : float (thresholds,)
        From 0 to below 1.
    """
    y, at = np.asarray(event, bool), np.asarray(thresholds, np.float64)
    treated = np.asarray(probability, np.float64)[None] >= at[:, None]
    true, false = (treated & y).mean(1), (treated & ~y).mean(1)
    return _net_benefit(true, false, at)


def survival_net_benefit(
    time: Floats, event: NDArray[np.bool_], risk: Floats, thresholds: Floats, at: float
) -> Floats:
    """Return the net benefit (thresholds,) of treating units whose risk reaches each threshold.

    Parameters
    ----------
    time, event
        Follow-up (n,), in the target's unit, and whether it ended with the event.
    risk
        Predicted probability (n,) of an event up to the time ``at``.
    thresholds
        Threshold probabilities (thresholds,), from 0 to below 1.
    """
    true, false = np.zeros((2, len(thresholds)))
    for i, threshold in enumerate(thresholds):
        treated = risk >= threshold
        if treated.any():
            share, survival = treated.mean(), survival_at(time[treated], event[treated], at)[0]
            true[i], false[i] = share * (1 - survival), share * survival
    return _net_benefit(true, false, thresholds)

"""Decision curves: the net benefit of treating units above a threshold of predicted probability.

Net benefit is the share of true positives less the share of false positives, weighted by the odds
of the threshold (Vickers & Elkin, Medical Decision Making 26:565, 2006). Of survival targets the
shares are estimated by Kaplan-Meier (Vickers et al., BMC Medical Informatics and Decision Making
8:53, 2008).
"""

from __future__ import annotations

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
    parts = []
    for (model,), units in predictions.group_by("model", maintain_order=True):
        if isinstance(target, ClassificationTarget):
            name = target.classes[-1]
            event = units["y"].to_numpy() == len(target.classes) - 1
            probability = units[f"probability_{name}"].to_numpy()
            benefits = [net_benefit(event, probability, THRESHOLDS)]
            everyone = [net_benefit(event, np.ones(len(event)), THRESHOLDS)]
            keys: list[tuple[str | None, float | None]] = [(name, None)]
        else:
            at = np.asarray(times, np.float64)
            time, event = units["time"].to_numpy(), units["event"].to_numpy()
            keys = [(None, value) for value in at.tolist()]
            benefits, everyone = (
                [
                    survival_net_benefit(time, event, risk, THRESHOLDS, value)
                    for value, risk in zip(at.tolist(), risks, strict=True)
                ]
                for risks in (
                    [1 - units[column].to_numpy() for column in survival_columns(at)],
                    np.ones((len(at), units.height)),
                )
            )
        for (outcome, value), benefit, treat_all in zip(keys, benefits, everyone, strict=True):
            part = pl.DataFrame(
                {"threshold": THRESHOLDS, "net_benefit": benefit, "treat_all": treat_all}
            )
            parts.append(
                part.with_columns(
                    model=pl.lit(model, pl.String),
                    outcome=pl.lit(outcome, pl.String),
                    time=pl.lit(value, pl.Float64),
                    treat_none=pl.lit(0.0),
                ).select(DECISION_SCHEMA.names())
            )
    return pl.concat([DECISION_SCHEMA.to_frame(), *parts]).with_columns(
        pl.col("net_benefit", "treat_all").fill_nan(None)
    )


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
    benefit: Floats = true - false * at / (1 - at)
    return benefit


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
    benefit = np.zeros(len(thresholds))
    for i, threshold in enumerate(thresholds):
        treated = risk >= threshold
        if treated.any():
            share, survival = treated.mean(), survival_at(time[treated], event[treated], at)[0]
            benefit[i] = share * (1 - survival - survival * threshold / (1 - threshold))
    return benefit

"""From risks to survival: Breslow's estimate of the baseline hazard, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveFloat, model_validator
from sksurv.linear_model.coxph import BreslowEstimator

Floats = NDArray[np.float64]


class BaselineHazard(BaseModel):
    """Cumulative hazard of a fold's training units, as a step function.

    Attributes
    ----------
    scale
        Log hazard ratio of a difference of 1 in risk.
    times
        Of seen events, rising, in the target's unit.
    hazard
        From each time on, the cumulative hazard of a unit with risk 0; before the first, none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: PositiveFloat
    times: tuple[float, ...]
    hazard: tuple[float, ...]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.times) != len(self.hazard):
            raise ValueError(f"{len(self.times)} times for {len(self.hazard)} hazards")
        return self

    def survival(self, risk: Floats, times: Floats) -> Floats:
        """Probabilities (units, times) to live beyond each time, of risks (units,).

        1 before the first event; after the last one as at it, which for times beyond what was
        followed is no more than an upper bound.
        """
        hazard = np.append(0.0, self.hazard)[np.searchsorted(self.times, times, side="right")]
        with np.errstate(over="ignore", invalid="ignore"):
            cumulative = np.exp(risk * self.scale)[:, None] * hazard
        # no hazard yet, however high the risk
        return np.exp(-np.where(hazard > 0, cumulative, 0))


def fit_baseline(train: pl.DataFrame, risk: Floats, scale: float = 1.0) -> BaselineHazard:
    """Breslow's estimate on training units.

    Parameters
    ----------
    train
        ``time`` and ``event`` of the units.
    risk : float (n,)
        As the model gives it.
    scale
        Log hazard ratio of a difference of 1 in risk.
    """
    fitted = BreslowEstimator().fit(
        risk * scale, train["event"].to_numpy(), train["time"].to_numpy()
    )
    steps = fitted.cum_baseline_hazard_
    rises = np.diff(steps.y, prepend=0) > 0
    return BaselineHazard(
        scale=scale, times=tuple(steps.x[rises].tolist()), hazard=tuple(steps.y[rises].tolist())
    )


def median_survival(baselines: Sequence[BaselineHazard], risk: Floats) -> Floats:
    """The time at which the mean of the folds' survival functions falls to one half, (units,).

    Parameters
    ----------
    risk : float (folds, units)

    Returns
    -------
    In the target's unit; NaN where it does not fall so far before the last seen event.
    """
    times = np.unique([time for baseline in baselines for time in baseline.times])
    alive = np.mean([b.survival(r, times) for b, r in zip(baselines, risk, strict=True)], axis=0)
    fallen = alive <= 0.5
    return np.where(fallen.any(1), times[fallen.argmax(1)], np.nan)

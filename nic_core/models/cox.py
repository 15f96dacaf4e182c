"""Survival (paper A): Cox partial likelihood, baseline hazard, survival functions.

:func:`cox_loss` trains the networks. :func:`fit_baseline_hazard` estimates the baseline hazard
from the risks of training units by Breslow's method [choice]; survival functions and median
survival follow from it. Median split and log-rank test are in :mod:`nic_core.models.metrics`,
labels and tables of survival targets in :mod:`nic_core.models.kinds.survival`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveFloat, model_validator
from sksurv.linear_model.coxph import BreslowEstimator
from torch import Tensor

Floats = NDArray[np.float64]
Ties = Literal["breslow", "efron"]


def cox_loss(risk: Tensor, time: Tensor, event: Tensor, *, ties: Ties = "breslow") -> Tensor:
    """Return the negative log partial likelihood, averaged over deaths (paper A).

    The risk set of a death at time ``t`` holds all units with time >= ``t``, including the death
    itself. A higher risk means an earlier death. The paper does not say how ties are handled
    [choice]: Breslow's method compares each of the deaths at ``t`` with the whole risk set;
    Efron's removes the tied deaths from it in equal parts.

    Parameters
    ----------
    risk : float (n,)
        Log hazard ratios.
    time : float (n,)
        Time of death or censoring, in any unit.
    event : bool (n,)
        True: death, false: censored.

    Raises
    ------
    ValueError
        There is no event: the batch has no gradient.
    """
    event = event.bool()
    if not bool(event.any()):
        raise ValueError("Cox loss: the batch has no event; every batch needs at least one")
    deaths, death_times = risk[event], time[event]
    at_risk = _masked_logsumexp(risk, time[None, :] >= death_times[:, None])
    if ties == "efron":
        tied = death_times[None, :] == death_times[:, None]
        earlier = torch.ones_like(tied).tril(-1)
        # 0, 1/d, ..., (d-1)/d for d tied deaths, in the precision of the risks
        fraction = (tied & earlier).sum(1, dtype=risk.dtype) / tied.sum(1, dtype=risk.dtype)
        tied_deaths = _masked_logsumexp(deaths, tied)
        at_risk = at_risk + torch.log1p(-fraction * torch.exp(tied_deaths - at_risk))
    return (at_risk - deaths).mean()


def _masked_logsumexp(values: Tensor, mask: Tensor) -> Tensor:
    """Return the row-wise log of the sum of exp(values) where ``mask`` (rows, n) is true."""
    return values[None, :].masked_fill(~mask, -torch.inf).logsumexp(1)


class BaselineHazard(BaseModel):
    """Cumulative baseline hazard of a fold's training units, a step function of time.

    Attributes
    ----------
    scale
        Log hazard ratio of a difference of 1 in risk.
    times
        Times of observed events, ascending, in the target's unit.
    hazard
        Cumulative hazard of a unit with risk 0 from each of ``times`` on; 0 before the first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: PositiveFloat
    times: tuple[float, ...]
    hazard: tuple[float, ...]

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if len(self.times) != len(self.hazard):
            raise ValueError(
                f"baseline hazard: {len(self.times)} times but {len(self.hazard)} hazards"
            )
        return self

    def survival(self, risk: Floats, times: Floats) -> Floats:
        """Return survival probabilities (units, times) at ``times`` for risks (units,).

        The probability is 1 before the first observed event. After the last one it stays
        constant; beyond the follow-up of the training units it is an upper bound only.
        """
        hazard = np.append(0.0, self.hazard)[np.searchsorted(self.times, times, side="right")]
        with np.errstate(over="ignore", invalid="ignore"):
            cumulative = np.exp(risk * self.scale)[:, None] * hazard
        # inf * 0 is NaN: a hazard of 0 stays 0 however high the risk is
        return np.exp(-np.where(hazard > 0, cumulative, 0))


def fit_baseline_hazard(train: pl.DataFrame, risk: Floats, scale: float = 1.0) -> BaselineHazard:
    """Estimate the cumulative baseline hazard by Breslow's method.

    Parameters
    ----------
    train
        Columns ``time`` and ``event`` of the training units.
    risk : float (n,)
        Risks of the same units, as the model predicts them.
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


def median_event_time(hazards: Sequence[BaselineHazard]) -> float:
    """Return the median of the distinct times of events in training, in the target's unit."""
    return float(np.median(np.unique([time for hazard in hazards for time in hazard.times])))


def median_survival(hazards: Sequence[BaselineHazard], risk: Floats) -> Floats:
    """Return the time at which the folds' mean survival function falls to one half.

    Parameters
    ----------
    hazards
        Baseline hazard of each fold.
    risk : float (folds, units)

    Returns
    -------
    float64 (units,)
        In the target's unit; NaN where the function stays above one half up to the last
        observed event.
    """
    times = np.unique([time for hazard in hazards for time in hazard.times])
    survival = np.mean([h.survival(r, times) for h, r in zip(hazards, risk, strict=True)], axis=0)
    fallen = survival <= 0.5
    return np.where(fallen.any(1), times[fallen.argmax(1)], np.nan)

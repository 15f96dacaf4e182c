"""Recalibration of probabilities on the validation fold of the same network.

A network that fits its training units too well states probabilities that are too high or too low.
Its validation fold shows by how much: the network was not fitted on these units, though its epoch
was chosen on them. What each kind of target recalibrates is in :mod:`nic_core.models.kinds`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveFloat, model_validator
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression

Floats = NDArray[np.float64]

LOG_TEMPERATURE = (-3.0, 3.0)  # bounds of the search
PRIOR_DEVIATION = 1.0  # of the log temperature around 0 [choice]
LEAST = 1e-12  # probability, in logarithms


class IsotonicCurve(BaseModel):
    """A monotone function of a probability, linear between its points.

    Attributes
    ----------
    stated, observed
        Ascending probabilities of a network, and the frequencies that belong to them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stated: tuple[float, ...]
    observed: tuple[float, ...]

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if not self.stated or len(self.stated) != len(self.observed):
            raise ValueError(
                f"isotonic curve: {len(self.stated)} stated and {len(self.observed)} observed "
                "probabilities; they must be equally many, and at least one"
            )
        return self


class Recalibration(BaseModel):
    """How the predictions of one fold's network are recalibrated.

    Attributes
    ----------
    temperature
        Divisor of log probabilities of classes, or of log hazard ratios; None: isotonic.
    curves
        One per class; empty with a temperature.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: PositiveFloat | None = None
    curves: tuple[IsotonicCurve, ...] = ()

    def probabilities(self, p: Floats) -> Floats:
        """Recalibrate class probabilities (units, classes); rows have sum 1."""
        if self.temperature is not None:
            powers = np.maximum(p, LEAST) ** (1 / self.temperature)
            softened: Floats = powers / powers.sum(1, keepdims=True)
            return softened
        curves = [
            np.interp(p[:, k], curve.stated, curve.observed) for k, curve in enumerate(self.curves)
        ]
        raw = np.stack(curves, axis=1)
        total = raw.sum(1, keepdims=True)
        # no class is possible by its own curve: all are equally probable
        return np.where(total > 0, raw / np.where(total > 0, total, 1), 1 / raw.shape[1])


def fit_temperature(loss: Callable[[float], float]) -> float:
    """Return the temperature with the lowest loss and prior.

    A normal prior on the logarithm of the temperature keeps it finite where a few validation units
    are all predicted correctly [choice].

    Parameters
    ----------
    loss
        Temperature to negative log likelihood, summed over units.
    """

    def penalised(log_temperature: float) -> float:
        return loss(float(np.exp(log_temperature))) + (log_temperature / PRIOR_DEVIATION) ** 2 / 2

    return float(np.exp(minimize_scalar(penalised, bounds=LOG_TEMPERATURE, method="bounded").x))


def fit_class_temperature(p: Floats, y: NDArray[np.int64]) -> Recalibration:
    """Fit one temperature to class probabilities (Guo et al. 2017).

    Parameters
    ----------
    p : float (units, classes)
    y : int (units,)
        Positions of the true classes.
    """

    def loss(temperature: float) -> float:
        stated = Recalibration(temperature=temperature).probabilities(p)
        return -float(np.log(np.maximum(stated[np.arange(len(y)), y], LEAST)).sum())

    return Recalibration(temperature=fit_temperature(loss))


def fit_isotonic(p: Floats, y: NDArray[np.int64]) -> Recalibration:
    """Fit an isotonic regression to each class against the rest (Zadrozny and Elkan 2002).

    Parameters
    ----------
    p, y
        As in :func:`fit_class_temperature`.
    """
    curves = []
    for k in range(p.shape[1]):
        fitted = IsotonicRegression(y_min=0, y_max=1).fit(p[:, k], y == k)
        curves.append(
            IsotonicCurve(
                stated=tuple(fitted.X_thresholds_.tolist()),
                observed=tuple(fitted.y_thresholds_.tolist()),
            )
        )
    return Recalibration(curves=tuple(curves))

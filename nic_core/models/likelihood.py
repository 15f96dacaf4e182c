"""Linear, logistic and Cox models fitted by maximum likelihood, without a penalty.

They serve inference on a few covariates: coefficients with Wald intervals, and likelihood-ratio
tests of nested models. Predictions come from the penalised models of
:mod:`nic_core.models.clinical`. Units are treated as independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sksurv.linear_model.coxph import CoxPHOptimizer

Floats = NDArray[np.float64]
# negative log likelihood, gradient and Hessian of parameters (parameters,)
_Objective = Callable[[Floats], tuple[float, Floats, Floats]]

LARGEST_ERROR = 50.0  # of a coefficient over the range of its term, in log ratios [choice]


@dataclass(frozen=True)
class MaximumLikelihood:
    """A model fitted by maximum likelihood.

    Attributes
    ----------
    coefficients, errors
        Estimates and standard errors, (outcomes, terms): one outcome, except for a classification
        with more than two classes. Without the intercepts.
    log_likelihood
        Of the fit; for Cox the partial one.
    degrees
        Degrees of freedom of the t distribution of a coefficient; infinite: normal distribution.
    finite
        bool (outcomes, terms). False: the likelihood grows with the coefficient without a maximum,
        or hardly depends on it, so its estimate and error mean nothing. It is so if the term
        separates the labels. ``log_likelihood`` is then the limit.
    """

    coefficients: Floats
    errors: Floats
    log_likelihood: float
    degrees: float
    finite: NDArray[np.bool_]

    def interval(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """Return the bounds of the Wald intervals, (outcomes, terms) each."""
        width = stats.t.ppf((1 + level) / 2, self.degrees) * self.errors
        return self.coefficients - width, self.coefficients + width

    def p_values(self) -> Floats:
        """Return two-sided Wald p values, (outcomes, terms); null hypothesis: coefficient 0."""
        p: Floats = 2 * stats.t.sf(np.abs(self.coefficients / self.errors), self.degrees)
        return p


def likelihood_ratio(
    smaller: MaximumLikelihood, larger: MaximumLikelihood
) -> tuple[float, int, float]:
    """Test a model against a larger one that contains it, by the chi-squared distribution.

    Returns
    -------
    Twice the difference of the log likelihoods, its degrees of freedom, and p.
    """
    statistic = float(np.maximum(0, 2 * (larger.log_likelihood - smaller.log_likelihood)))
    degrees = larger.coefficients.size - smaller.coefficients.size
    return statistic, degrees, float(stats.chi2.sf(statistic, degrees))


def independent_terms(x: Floats) -> list[int]:
    """Return the columns that are no linear combination of a constant and of earlier columns.

    Parameters
    ----------
    x : float (n, terms)
    """
    kept: list[int] = []
    ones = np.ones((len(x), 1))
    scaled = _scaled(x)[0]
    for column in range(x.shape[1]):
        basis = np.hstack([ones, scaled[:, [*kept, column]]])
        if np.linalg.matrix_rank(basis, tol=1e-8 * np.sqrt(len(x))) == basis.shape[1]:
            kept.append(column)
    return kept


def fit_normal(x: Floats, y: Floats) -> MaximumLikelihood:
    """Fit a linear regression with normal errors.

    Parameters
    ----------
    x : float (n, terms)
        Independent terms (:func:`independent_terms`), without a constant.
    y : float (n,)
    """
    scaled, spread = _scaled(x)
    design = np.hstack([np.ones((len(y), 1)), scaled])
    beta = np.linalg.lstsq(design, y)[0]
    residual = float(((y - design @ beta) ** 2).sum())
    degrees = len(y) - design.shape[1]
    if degrees < 1 or residual <= 1e-20 * float((y - y.mean()) @ (y - y.mean())):
        return _undefined(1, x.shape[1])
    covariance = residual / degrees * np.linalg.inv(design.T @ design)
    errors = np.sqrt(np.diag(covariance))[1:]
    log_likelihood = -len(y) / 2 * (np.log(2 * np.pi * residual / len(y)) + 1)
    return MaximumLikelihood(
        beta[None, 1:] / spread,
        errors[None] / spread,
        log_likelihood,
        degrees,
        np.ones((1, x.shape[1]), bool),
    )


def fit_logistic(x: Floats, y: NDArray[np.int64], classes: int) -> MaximumLikelihood:
    """Fit a logistic regression; with more than two classes a multinomial one.

    A coefficient is the log odds ratio of a class against the first class.

    Parameters
    ----------
    x : float (n, terms)
        As in :func:`fit_normal`.
    y : int (n,)
        Positions of the classes.
    """
    scaled, spread = _scaled(x)
    design = np.hstack([np.ones((len(y), 1)), scaled])
    truth = np.eye(classes)[y]
    outcomes, columns = classes - 1, design.shape[1]

    def objective(parameters: Floats) -> tuple[float, Floats, Floats]:
        logits = np.hstack(
            [np.zeros((len(y), 1)), design @ parameters.reshape(outcomes, columns).T]
        )
        p = softmax(logits, axis=1)[:, 1:]
        value = -float((truth * log_softmax(logits, axis=1)).sum())
        gradient = (p - truth[:, 1:]).T @ design
        weights = p[:, :, None] * np.eye(outcomes) - p[:, :, None] * p[:, None, :]
        hessian = np.einsum("nij,nk,nl->ikjl", weights, design, design)
        return value, gradient.ravel(), hessian.reshape(outcomes * columns, outcomes * columns)

    if len(np.unique(y)) < classes:  # the intercept of an absent class is infinite
        return _undefined(outcomes, x.shape[1])
    fitted = _maximise(objective, outcomes * columns)
    if fitted is None:
        return _undefined(outcomes, x.shape[1])
    coefficients, errors, log_likelihood = fitted
    shape = (outcomes, columns)
    return _checked(
        coefficients.reshape(shape)[:, 1:], errors.reshape(shape)[:, 1:], log_likelihood, spread
    )


def fit_cox(x: Floats, time: Floats, event: NDArray[np.bool_]) -> MaximumLikelihood:
    """Fit a Cox proportional hazards model; Efron's method for ties [choice].

    A coefficient is a log hazard ratio.

    Parameters
    ----------
    x : float (n, terms)
        As in :func:`fit_normal`.
    time : float (n,)
    event : bool (n,)
        True: event, false: censored.
    """
    scaled, spread = _scaled(x)
    partial = CoxPHOptimizer(scaled, event, time, np.zeros(x.shape[1]), "efron")
    n = len(time)

    def objective(parameters: Floats) -> tuple[float, Floats, Floats]:
        partial.update(parameters)
        return n * partial.nlog_likelihood(parameters), n * partial.gradient, n * partial.hessian

    fitted = _maximise(objective, x.shape[1]) if event.any() else None
    if fitted is None:
        return _undefined(1, x.shape[1])
    coefficients, errors, log_likelihood = fitted
    return _checked(coefficients[None], errors[None], log_likelihood, spread)


def _scaled(x: Floats) -> tuple[Floats, Floats]:
    """Centre the columns and divide them by their range; return the ranges too (1 of constants)."""
    spread = np.ptp(x, axis=0) if len(x) else np.zeros(x.shape[1])
    spread = np.where(spread > 0, spread, 1.0)
    return (x - x.mean(0)) / spread, spread


def _maximise(objective: _Objective, parameters: int) -> tuple[Floats, Floats, float] | None:
    """Return estimates, standard errors and log likelihood; None without a curved maximum."""
    if not parameters:
        return np.empty(0), np.empty(0), -objective(np.empty(0))[0]
    found = minimize(
        lambda b: objective(b)[0],
        np.zeros(parameters),
        jac=lambda b: objective(b)[1],
        hess=lambda b: objective(b)[2],
        method="trust-exact",
        options={"gtol": 1e-8, "maxiter": 500},
    )
    value, _, hessian = objective(found.x)
    try:
        variances = np.diag(np.linalg.inv(hessian))
    except np.linalg.LinAlgError:
        return None
    if not np.isfinite(value) or (variances <= 0).any():
        return None
    return found.x, np.sqrt(variances), -value


def _checked(
    coefficients: Floats, errors: Floats, log_likelihood: float, spread: Floats
) -> MaximumLikelihood:
    """Return a fit in the unit of the terms, from one of terms divided by their ranges."""
    return MaximumLikelihood(
        coefficients / spread,
        errors / spread,
        log_likelihood,
        np.inf,
        errors < LARGEST_ERROR,
    )


def _undefined(outcomes: int, terms: int) -> MaximumLikelihood:
    nothing = np.full((outcomes, terms), np.nan)
    return MaximumLikelihood(nothing, nothing, np.nan, np.inf, np.isfinite(nothing))

"""What every network is held against: linear models that see no arrangement.

Two feature sets: the mean embedding over a unit's tissue cells, and the tissue area alone. Each goes
through the same linear model: ridge (regression), logistic (classification) or Cox regression
with a ridge penalty (survival), from scikit-learn and scikit-survival.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.util import Surv

from nic_core.cohort import Target
from nic_core.models.crops import GridMoments
from nic_core.models.training import primary_metric

BASELINES = ("mean_embedding", "tissue_area")
PENALTIES = tuple(10.0**i for i in range(-1, 5))  # weight of the sum of squared coefficients


def baseline_features(
    name: str, table: pl.DataFrame, moments: Mapping[str, GridMoments]
) -> NDArray[np.float64]:
    """Features (units, features) of the baseline of that name.

    Of a unit's slides the cells are pooled: the mean embedding of all their cells, and the number of
    cells of all.
    """
    rows = []
    for slides in table["slides"]:
        cells = sum(moments[slide].cells for slide in slides)
        if name == "tissue_area":
            rows.append(np.array([float(cells)]))
        else:
            rows.append(np.sum([moments[slide].total for slide in slides], axis=0) / cells)
    return np.stack(rows)


def fit_linear(
    target: Target,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    features: NDArray[np.float64],
    validation_features: NDArray[np.float64],
) -> Any:
    """A linear model trained on some units, its penalty chosen on others by the primary metric.

    The network uses the two sets alike, which keeps the comparison fair. Of penalties that do
    equally well the largest is taken.

    Returns
    -------
    A fitted scikit-learn pipeline for :func:`predict_linear`.
    """
    fitted = []
    for penalty in sorted(PENALTIES, reverse=True):
        model = _linear(target, penalty)
        model.fit(features, _labels(target, train))
        value = primary_metric(
            target, validation, predict_linear(target, model, validation_features)
        )
        fitted.append((value if np.isfinite(value) else -np.inf, model))
    return max(fitted, key=lambda pair: pair[0])[1]


def predict_linear(
    target: Target, model: Any, features: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Predictions (units, outputs) in the terms of :class:`nic_core.models.networks.FoldModel`."""
    if target.kind == "classification":
        probability: NDArray[np.float64] = model.predict_proba(features)
        return probability
    return np.asarray(model.predict(features), np.float64)[:, None]


def _linear(target: Target, penalty: float) -> Any:
    if target.kind == "regression":
        model: Any = Ridge(alpha=penalty)
    elif target.kind == "classification":
        model = LogisticRegression(C=1 / penalty, max_iter=1000)
    else:
        model = CoxPHSurvivalAnalysis(alpha=penalty)
    return make_pipeline(StandardScaler(), model)


def _labels(target: Target, table: pl.DataFrame) -> Any:
    if target.kind == "survival":
        return Surv.from_arrays(table["event"].to_numpy(), table["time"].to_numpy())
    return table["y"].to_numpy()

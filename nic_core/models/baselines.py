"""Linear baselines of slide models, which do not see the spatial arrangement of cells.

Two sets of features: the mean embedding of a unit's tissue cells, and its tissue area alone. Each
goes through the linear model of the target's kind with a ridge penalty: ridge regression,
logistic regression or Cox regression, from scikit-learn and scikit-survival.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nic_core.grids.moments import GridMoments
from nic_core.models.kinds import TargetKind, primary_value

BASELINE_NAMES = {"mean_embedding": "mean embedding, linear", "tissue_area": "tissue area, linear"}
BASELINES = tuple(BASELINE_NAMES)
PENALTIES = tuple(10.0**i for i in range(-1, 5))  # weights of the sum of squared coefficients


def baseline_features(
    name: str, table: pl.DataFrame, moments: Mapping[str, GridMoments]
) -> NDArray[np.float64]:
    """Return the features of a baseline, (units, features).

    The cells of all slides of a unit are pooled.

    Parameters
    ----------
    name
        ``mean_embedding``: mean embedding of the cells, C features; ``tissue_area``: number of
        cells, one feature.
    table
        Target table with the column ``slides``.
    moments
        Of every slide in ``table``.
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
    kind: TargetKind,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    features: NDArray[np.float64],
    validation_features: NDArray[np.float64],
) -> Any:
    """Fit a linear model on training units; choose its penalty on validation units.

    The penalty with the best primary metric is chosen, of equally good ones the largest. The
    networks use the two sets in the same way, so the comparison is fair.

    Returns
    -------
    A fitted scikit-learn pipeline for :meth:`TargetKind.linear_prediction`.
    """
    fitted = []
    for penalty in sorted(PENALTIES, reverse=True):
        model = make_pipeline(StandardScaler(), kind.linear_model(penalty))
        model.fit(features, kind.linear_labels(train))
        prediction = kind.linear_prediction(model, validation_features)
        value = primary_value(kind, validation, prediction)
        fitted.append((value if np.isfinite(value) else -np.inf, model))
    return max(fitted, key=lambda pair: pair[0])[1]

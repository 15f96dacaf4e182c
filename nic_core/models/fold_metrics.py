"""Metrics of each fold of a cross-validation, beside those of all folds together.

A fold's value is the metric of the units held out in it. Censoring weights and horizons of survival
metrics stay those of all folds together, as in a resample: a fold has too few units to estimate
them [choice].
"""

from __future__ import annotations

import numpy as np
import polars as pl

from nic_core.cohort import Target
from nic_core.models.kinds import TargetKind, kind_of, prediction_array

FOLD_METRIC_SCHEMA = pl.Schema(
    {
        "model": pl.String(),  # network or a baseline
        "metric": pl.String(),
        "fold": pl.Int64(),
        "fold_name": pl.String(),  # site, name of a published fold, or the number as text
        "value": pl.Float64(),  # null: undefined, for example with one class or no event
        "units": pl.Int64(),
        "patients": pl.Int64(),
    }
)


def fold_metrics(target: Target, predictions: pl.DataFrame) -> pl.DataFrame:
    """Return the metrics of every model in every fold.

    Parameters
    ----------
    predictions
        :attr:`nic_core.models.cross_validation.CrossValidation.predictions`.

    Returns
    -------
    polars.DataFrame
        :data:`FOLD_METRIC_SCHEMA`, a row per model, metric and fold.
    """
    kind = kind_of(target)
    cv = predictions.filter(pl.col("split") == "cv")
    parts = [
        fold_values(kind, rows).select(pl.lit(model).alias("model"), pl.all())
        for (model,), rows in cv.group_by("model", maintain_order=True)
    ]
    return pl.concat([FOLD_METRIC_SCHEMA.to_frame(), *parts])


def fold_values(kind: TargetKind, rows: pl.DataFrame) -> pl.DataFrame:
    """Return the metrics of one model's held-out predictions in every fold.

    Parameters
    ----------
    rows
        Its rows of the predictions in split ``cv``.

    Returns
    -------
    polars.DataFrame
        :data:`FOLD_METRIC_SCHEMA` without ``model``.
    """
    folds = (
        rows.group_by("fold", "fold_name")
        .agg(units=pl.len().cast(pl.Int64), patients=pl.col("patient").n_unique().cast(pl.Int64))
        .sort("fold")
    )
    held_out = folds["fold"].to_numpy()[:, None] == rows["fold"].to_numpy()[None, :]
    parts = [
        folds.select(
            pl.lit(name).alias("metric"),
            "fold",
            "fold_name",
            pl.Series("value", metric(held_out.astype(np.float64)), pl.Float64).fill_nan(None),
            "units",
            "patients",
        )
        for name, metric in kind.metrics(rows, prediction_array(kind, rows)).items()
    ]
    return pl.concat(parts)


def fold_summary(values: pl.DataFrame) -> pl.DataFrame:
    """Summarise :func:`fold_values` by metric.

    Returns
    -------
    polars.DataFrame
        ``metric``; ``folds_mean`` and ``folds_deviation``, the unweighted mean and the sample
        standard deviation over the folds in which the metric is defined (null with none, and with
        fewer than two); ``folds_undefined``, the number of the other folds.
    """
    return values.group_by("metric", maintain_order=True).agg(
        folds_mean=pl.col("value").mean(),
        folds_deviation=pl.col("value").std(),
        folds_undefined=pl.col("value").null_count().cast(pl.Int64),
    )

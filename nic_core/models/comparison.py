"""Comparisons of cross-validated models: with each other, with the champion, with chance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import polars as pl

from nic_core.cohort import Target
from nic_core.models.baselines import BASELINES
from nic_core.models.cross_validation import (
    NETWORK,
    CrossValidation,
    prediction_array,
    prediction_columns,
    rows_metrics,
)
from nic_core.models.labels import shuffle_labels
from nic_core.models.metrics import PRIMARY, compare
from nic_core.models.training import primary_metric

COMPARISON_SCHEMA = pl.Schema(
    {
        "target": pl.String(),
        "part": pl.String(),  # cross-validated or test
        "first": pl.String(),  # encoder and model
        "second": pl.String(),
        "metric": pl.String(),
        "difference": pl.Float64(),  # first minus second
        "low": pl.Float64(),  # bounds of the 95 % paired bootstrap interval over patients
        "high": pl.Float64(),
        "p": pl.Float64(),  # two-sided, of no difference
        "n": pl.Int64(),  # units that both predict
    }
)
CROSS_VALIDATED = "cross-validated"
BASELINE_NAMES = {"mean_embedding": "mean embedding, linear", "tissue_area": "tissue area, linear"}
METRIC_NAMES = {"spearman": "Spearman", "auc": "AUC", "harrell_c": "Harrell's C"}
PERMUTATIONS = 200


def compare_models(
    target: Target,
    predictions: Mapping[str, pl.DataFrame],
    *,
    resamples: int,
    seed: int,
) -> pl.DataFrame:
    """The networks of every two encoders, and each with its baselines (:data:`COMPARISON_SCHEMA`).

    On the units that both predict, by :func:`nic_core.models.metrics.compare`. p are not corrected for
    the number of comparisons.

    Parameters
    ----------
    predictions
        Encoder to :attr:`nic_core.models.cross_validation.CrossValidation.predictions`.
    """
    pairs = [((a, NETWORK), (b, NETWORK)) for a, b in combinations(predictions, 2)]
    pairs += [((name, NETWORK), (name, model)) for name in predictions for model in BASELINES]
    found = []
    for split, part in (("cv", CROSS_VALIDATED), ("test", "test")):
        for pair in pairs:
            one, other = (predictions[name].filter(model=m, split=split) for name, m in pair)
            one, other = common_units(target, one, other)
            if one.is_empty():
                continue
            first, second = (f"{name}: {BASELINE_NAMES.get(m, m)}" for name, m in pair)
            differences = compare(
                rows_metrics(target, one),
                rows_metrics(target, other),
                one["patient"].to_list(),
                resamples=resamples,
                seed=seed,
            )
            found += [
                (target.name, part, first, second, METRIC_NAMES.get(metric, metric))
                + (d.value, d.low, d.high, d.p, one.height)
                for metric, d in differences.items()
            ]
    return pl.DataFrame(found, schema=COMPARISON_SCHEMA, orient="row").fill_nan(None)


def common_units(
    target: Target, one: pl.DataFrame, other: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows of two models' predictions on the units of both, in one order."""
    one = one.join(other, on="unit", how="semi").sort("unit")
    other = other.join(one, on="unit", how="semi").sort("unit")
    if target.kind == "survival" and not one["horizons"].equals(other["horizons"]):
        # one of the cohorts lacked units, so functions are known at other times
        one, other = (rows.drop("survival", "horizons") for rows in (one, other))
    return one, other


def above_permutation_control(evaluated: CrossValidation) -> str | None:
    """The network's cross-validated figure is better than with patients' labels exchanged.

    A permutation test of the predictions; the full control, which trains on exchanged labels,
    is setting ``models.permute_labels``.
    """
    target = evaluated.target
    rows = evaluated.predictions.filter(model=NETWORK, split="cv").sort("unit")
    prediction = prediction_array(target, rows)
    labels = rows.select("unit", "patient", "split", *_labels(target))
    value = primary_metric(target, rows, prediction)
    control = [
        primary_metric(target, shuffle_labels(labels, seed=seed), prediction)
        for seed in range(PERMUTATIONS)
    ]
    bar = float(np.nanquantile(control, 0.95))
    if value > bar:
        return None
    return f"{value:.3f} is within what exchanged labels give (95 % of them below {bar:.3f})"


@dataclass(frozen=True)
class Champion:
    """The registered model to beat: what it is called, and its
    :attr:`~nic_core.models.cross_validation.CrossValidation.predictions` if the registry has them."""

    title: str
    predictions: pl.DataFrame | None


@dataclass(frozen=True)
class Verdict:
    """Whether a new model becomes the champion, and why, in words; ``compared`` is false where
    nobody can tell, so that a person must."""

    better: bool
    words: str
    compared: bool = True


def compare_with_champion(evaluated: CrossValidation, champion: Champion | None) -> Verdict:
    """A new model becomes champion if there is none, or if its primary metric is better.

    Better: the lower bound of the 95 % interval of the difference, by the paired bootstrap over
    patients, is above 0. On cross-validated predictions of the units of both, by today's labels.
    """
    target, settings = evaluated.target, evaluated.settings
    if settings.permute_labels is not None:
        return Verdict(False, "trained on exchanged labels: a control, never champion")
    if champion is None:
        return Verdict(True, "the first of its name: champion")

    def unknown(why: str) -> Verdict:
        words = f"cannot be compared with the champion, {champion.title}: {why}; set the alias"
        return Verdict(False, f"{words} by hand", compared=False)

    columns, labels = prediction_columns(target), _labels(target)
    held = champion.predictions
    if held is None or not {"model", "split", "unit", *columns} <= set(held.columns):
        return unknown("its run holds no predictions of this target")
    one = evaluated.predictions.filter(model=NETWORK, split="cv")
    other = held.filter(model=NETWORK, split="cv").drop(*labels, strict=False)
    one, other = common_units(target, one, other.join(one.select("unit", *labels), on="unit"))
    if one.is_empty():
        return unknown("no unit is predicted by both")
    name = PRIMARY[target.kind]
    difference = compare(
        {name: rows_metrics(target, one)[name]},
        {name: rows_metrics(target, other)[name]},
        one["patient"].to_list(),
        resamples=settings.bootstrap,
        seed=settings.seed,
    )[name]
    if not math.isfinite(difference.low):
        return unknown(f"{METRIC_NAMES[name]} is undefined on their {one.height} common units")
    new, old = (
        primary_metric(target, rows, prediction_array(target, rows)) for rows in (one, other)
    )
    figures = (
        f"{METRIC_NAMES[name]} {new:.3f} against {old:.3f}, difference {difference.value:+.3f} "
        f"[{difference.low:+.3f}, {difference.high:+.3f}] on {one.height} units of "
        f"{one['patient'].n_unique()} patients"
    )
    if difference.low > 0:
        return Verdict(True, f"takes the place of {champion.title}: {figures}")
    return Verdict(False, f"{champion.title} stays champion: {figures}")


def _labels(target: Target) -> list[str]:
    """Columns of a target's labels in a table of predictions."""
    return ["time", "event"] if target.kind == "survival" else ["y"]

"""Cross-validation of slide models by patient, with baselines and intervals.

Fold k is tested on, the next one validates (best epoch, penalty of the baselines), the others
train: of 4 folds 2 / 1 / 1, as in B. Metrics are computed once on the predictions of all hold-out
folds together ('All' in B). What folds predict must then be on one scale: values are in the
labels' unit and classes are probabilities; Cox risks are defined up to a constant in each fold,
so each fold's are brought to mean 0 and deviation 1 over its own training units [choice]. A model
that learned nothing predicts each fold's training mean, which is high where the hold-out labels
are low: together its predictions then score a little *below* chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from nic_core.cohort import CohortError, ModelSettings, Target
from nic_core.metrics import log_rank, score
from nic_core.models.baselines import BASELINES, baseline_features, fit_linear, predict_linear
from nic_core.models.crops import Crops, GridMoments, GridSource, all_moments
from nic_core.models.folds import check_folds, make_folds
from nic_core.models.labels import shuffle_labels
from nic_core.models.networks import FoldModel
from nic_core.models.training import fit_fold, fitting_threads, predict_units, target_metrics

if TYPE_CHECKING:
    from nic_core.tracker import Tracker

NETWORK = "network"

Floats = NDArray[np.float64]
Predictor = Callable[[pl.DataFrame], Floats]  # units -> predictions (units, outputs)
Progress = Callable[[int, int], None]  # folds done, of


@dataclass(frozen=True)
class Evaluated:
    """A cross-validated target.

    Attributes
    ----------
    predictions
        One row a unit and model: ``model`` (``network`` or a baseline), ``split``, ``unit``,
        ``patient``, ``fold`` (in which the unit was held out; null in split ``test``, which the
        mean of the folds scores), the labels, and :func:`prediction_columns`.
    metrics
        ``model``, ``split``, ``metric``, ``value``, ``low``, ``high`` (95 % percentile bootstrap
        over patients; null for ``log_rank_p``), ``units``, ``patients``.
    networks
        One a fold.
    history
        ``fold`` and the columns of :class:`nic_core.models.training.FittedFold`.
    best_epochs
        One a fold.
    """

    target: Target
    settings: ModelSettings
    predictions: pl.DataFrame
    metrics: pl.DataFrame
    networks: tuple[FoldModel, ...]
    history: pl.DataFrame
    best_epochs: tuple[int, ...]


def prediction_columns(target: Target) -> list[str]:
    """Columns of a prediction: ``prediction``, ``risk``, or ``probability_<class>`` each."""
    if target.kind == "classification":
        return [f"probability_{name}" for name in target.classes]
    return ["risk" if target.kind == "survival" else "prediction"]


def prediction_array(target: Target, predictions: pl.DataFrame) -> Floats:
    """Predictions (units, outputs) of one model out of their table."""
    return predictions.select(prediction_columns(target)).to_numpy()


def cross_validate(
    target: Target,
    table: pl.DataFrame,
    folds: pl.DataFrame,
    grids: GridSource,
    settings: ModelSettings,
    *,
    permutation: int | None = None,
    tracker: Tracker | None = None,
    progress: Progress | None = None,
) -> Evaluated:
    """Train and test the network and the baselines on every fold.

    Parameters
    ----------
    table
        Output of :func:`nic_core.models.labels.target_table`.
    folds
        Output of :func:`nic_core.models.folds.make_folds`, shared by the encoders to compare.
    grids
        Gives the grid of a slide; called whenever one is read.
    permutation
        A seed to exchange the labels between patients with, for the control that must come out
        at chance. Folds are then dealt anew, so that they are stratified as ever.

    Raises
    ------
    CohortError
        The network cannot take crops of ``settings.crop`` cells, or a grid has no tissue.
    TrainingError
        A loss is not finite.
    """
    if permutation is not None:
        table = shuffle_labels(table, seed=permutation)
        folds = make_folds(table, target=target, folds=settings.folds, seed=settings.seed)
    check_folds(folds, table)
    count = folds["fold"].n_unique()
    cv = table.filter(pl.col("split") == "cv").join(folds, on="patient").sort("unit")
    test = table.filter(pl.col("split") == "test").sort("unit")
    try:
        moments = all_moments(sorted(set(table["slides"].explode())), grids)
    except ValueError as error:
        raise CohortError(f"target '{target.name}': {error}") from error

    held_out: dict[str, list[pl.DataFrame]] = {name: [] for name in (NETWORK, *BASELINES)}
    external: dict[str, list[Floats]] = {name: [] for name in held_out}
    fits = []
    for fold in range(count):
        validating = (fold + 1) % count
        holdout = cv.filter(pl.col("fold") == fold)
        validation = cv.filter(pl.col("fold") == validating)
        train = cv.filter(~pl.col("fold").is_in([fold, validating]))
        with fitting_threads(settings):
            fitted = fit_fold(
                target,
                train,
                validation,
                grids,
                moments,
                settings,
                seed=int(np.random.SeedSequence([settings.seed, fold]).generate_state(1)[0]),
                tracker=tracker,
                name=f"fold_{fold}_",
            )
            predictors = {NETWORK: _network_predictor(target, fitted.model, train, grids, settings)}
            for name in BASELINES:
                predictors[name] = _linear_predictor(target, name, train, validation, moments)
            for name, predict in predictors.items():
                held_out[name].append(_rows(target, holdout, predict(holdout)))
                if test.height:
                    external[name].append(predict(test))
        fits.append(fitted)
        if progress is not None:
            progress(fold + 1, count)

    predictions, metrics = [], []
    for name in held_out:
        parts = [pl.concat(held_out[name]).sort("unit")]
        if test.height:
            mean = np.mean(external[name], axis=0)
            no_fold = test.with_columns(fold=pl.lit(None, pl.Int64))
            parts.append(_rows(target, no_fold, mean))
        for part in parts:
            predictions.append(part.select(pl.lit(name).alias("model"), pl.all()))
            metrics.append(_scores(target, name, part, settings))
    return Evaluated(
        target=target,
        settings=settings,
        predictions=pl.concat(predictions),
        metrics=pl.concat(metrics),
        networks=tuple(fit.model for fit in fits),
        history=pl.concat(
            fit.history.select(pl.lit(fold).alias("fold"), pl.all())
            for fold, fit in enumerate(fits)
        ),
        best_epochs=tuple(fit.best_epoch for fit in fits),
    )


def _network_predictor(
    target: Target,
    model: FoldModel,
    train: pl.DataFrame,
    grids: GridSource,
    settings: ModelSettings,
) -> Predictor:
    crops = Crops(grids, model.normalise, settings.crop)

    def predict(units: pl.DataFrame) -> Floats:
        return predict_units(model, units, crops, count=settings.crops_at_test, seed=settings.seed)

    if target.kind == "survival":
        mean, deviation = _standard(predict(train))
        model.shift.fill_(-mean / deviation)
        model.scale.fill_(1 / deviation)
    return predict


def _linear_predictor(
    target: Target,
    name: str,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    moments: Mapping[str, GridMoments],
) -> Predictor:
    x = baseline_features(name, train, moments)
    linear = fit_linear(target, train, validation, x, baseline_features(name, validation, moments))
    mean, deviation = 0.0, 1.0
    if target.kind == "survival":
        mean, deviation = _standard(predict_linear(target, linear, x))

    def predict(units: pl.DataFrame) -> Floats:
        values = predict_linear(target, linear, baseline_features(name, units, moments))
        return (values - mean) / deviation

    return predict


def _rows(target: Target, units: pl.DataFrame, values: Floats) -> pl.DataFrame:
    labels = ["time", "event"] if target.kind == "survival" else ["y"]
    columns = prediction_columns(target)
    return units.select("split", "unit", "patient", "fold", *labels).with_columns(
        **{name: pl.Series(values[:, i]) for i, name in enumerate(columns)}
    )


def _scores(
    target: Target, model: str, rows: pl.DataFrame, settings: ModelSettings
) -> pl.DataFrame:
    prediction = prediction_array(target, rows)
    intervals = score(
        target_metrics(target, rows, prediction),
        rows["patient"].to_list(),
        resamples=settings.bootstrap,
        seed=settings.seed,
    )
    table = [
        {"metric": name, "value": i.value, "low": i.low, "high": i.high}
        for name, i in intervals.items()
    ]
    if target.kind == "survival":
        p = log_rank(rows["time"].to_numpy(), rows["event"].to_numpy(), prediction[:, 0])
        table.append({"metric": "log_rank_p", "value": p, "low": None, "high": None})
    numbers = {"value": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    return pl.DataFrame(table, schema={"metric": pl.String, **numbers}).select(
        pl.lit(model).alias("model"),
        pl.lit(rows["split"][0]).alias("split"),
        pl.all(),
        units=pl.lit(rows.height, pl.Int64),
        patients=pl.lit(rows["patient"].n_unique(), pl.Int64),
    )


def _standard(risk: Floats) -> tuple[float, float]:
    """Mean and deviation; the deviation of equal risks counts as 1."""
    return float(risk.mean()), float(risk.std()) or 1.0

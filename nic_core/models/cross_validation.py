"""Cross-validation of slide models by patient, with baselines and intervals.

Fold k is tested on, the next one validates (best epoch, penalty of the baselines), the others
train: of 4 folds 2 / 1 / 1, as in B. Metrics are computed once on the predictions of all hold-out
folds together ('All' in B). What folds predict must then be on one scale: values are in the
labels' unit and classes are probabilities; Cox risks are defined up to a constant in each fold,
so each fold's are brought to mean 0 and deviation 1 over its own training units [choice]. A model
that learned nothing predicts each fold's training mean, which is high where the hold-out labels
are low: together its predictions then score a little *below* chance.

Survival functions, which the Brier score needs, follow from risks by Breslow's estimate of the
baseline hazard on each fold's training units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from nic_core.cohort import CohortError, ModelSettings, Target
from nic_core.models.baselines import BASELINES, baseline_features, fit_linear, predict_linear
from nic_core.models.crops import Crops, GridMoments, GridSource, all_moments
from nic_core.models.folds import check_folds, make_folds
from nic_core.models.labels import shuffle_labels
from nic_core.models.metrics import Metric, event_horizons, log_rank, score
from nic_core.models.networks import FoldModel
from nic_core.models.survival import BaselineHazard, fit_baseline
from nic_core.models.training import fit_fold, fitting_threads, predict_units, target_metrics

if TYPE_CHECKING:
    from nic_core.tracker import Tracker

NETWORK = "network"

Floats = NDArray[np.float64]
_Predictions = tuple[Floats, Floats]  # (units, outputs), probabilities to live (units, times)
_Predictor = Callable[[pl.DataFrame, Floats], _Predictions]  # of units, at times
Progress = Callable[[int, int], None]  # folds done, of


@dataclass(frozen=True)
class CrossValidation:
    """A cross-validated target.

    Attributes
    ----------
    predictions
        One row a unit and model: ``model`` (``network`` or a baseline), ``split``, ``unit``,
        ``patient``, ``fold`` (in which the unit was held out; null in split ``test``, which the
        mean of the folds scores), the labels, and :func:`prediction_columns`. Of survival also
        ``survival``, the probabilities to live beyond ``horizons`` (list columns, the same
        horizons in all of a split).
    metrics
        ``model``, ``split``, ``metric``, ``value``, ``low``, ``high`` (95 % percentile bootstrap
        over patients; null for ``log_rank_p``), ``units``, ``patients``; ``seeds_mean`` and
        ``seeds_deviation`` over the network's initialisations, null where there is one.
    networks
        One a fold: those of the first initialisation, whose predictions and intervals are given.
        To choose among initialisations by what they score would be to choose by the test labels.
    history
        ``fold`` and the columns of :class:`nic_core.models.training.FittedFold`.
    best_epochs
        One a fold.
    baselines
        Of survival: the baseline hazard of each of ``networks``.
    """

    target: Target
    settings: ModelSettings
    predictions: pl.DataFrame
    metrics: pl.DataFrame
    networks: tuple[FoldModel, ...]
    history: pl.DataFrame
    best_epochs: tuple[int, ...]
    baselines: tuple[BaselineHazard, ...] = ()


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
    device: str = "auto",
    tracker: Tracker | None = None,
    progress: Progress | None = None,
) -> CrossValidation:
    """Train and test the network and the baselines on every fold.

    With ``settings.permute_labels`` labels are exchanged between patients first, by that seed:
    the control that must come out at chance. Folds are then dealt anew, so that they are
    stratified as ever.

    Parameters
    ----------
    table
        Output of :func:`nic_core.models.labels.target_table`.
    folds
        Output of :func:`nic_core.models.folds.make_folds`, shared by the encoders to compare.
    grids
        Gives the grid of a slide; called whenever one is read.
    device
        For the networks: ``auto``, ``cpu`` or ``cuda``. Those that are given are on the CPU.

    Raises
    ------
    CohortError
        The network cannot take crops of ``settings.crop`` cells, or a grid has no tissue.
    TrainingError
        A loss is not finite.
    ValueError
        There is no such device.
    """
    if settings.permute_labels is not None:
        table = shuffle_labels(table, seed=settings.permute_labels)
        folds = make_folds(table, target=target, folds=settings.folds, seed=settings.seed)
    check_folds(folds, table)
    count = folds["fold"].n_unique()
    cv = table.filter(pl.col("split") == "cv").join(folds, on="patient").sort("unit")
    test = table.filter(pl.col("split") == "test").sort("unit")
    try:
        moments = all_moments(sorted(set(table["slides"].explode())), grids)
    except ValueError as error:
        raise CohortError(f"target '{target.name}': {error}") from error

    seeds = [NETWORK, *(f"{NETWORK} {seed}" for seed in range(1, settings.seeds))]
    held_out: dict[str, list[pl.DataFrame]] = {name: [] for name in (*seeds, *BASELINES)}
    external: dict[str, list[_Predictions]] = {name: [] for name in held_out}
    horizons = {part["split"][0]: _horizons(target, part) for part in (cv, test) if part.height}
    fits, hazards = [], []
    for fold in range(count):
        validating = (fold + 1) % count
        holdout = cv.filter(pl.col("fold") == fold)
        validation = cv.filter(pl.col("fold") == validating)
        train = cv.filter(~pl.col("fold").is_in([fold, validating]))
        with fitting_threads(settings):
            for seed, name in enumerate((*seeds, *BASELINES)):
                # one predictor at a time: it holds its slides' features
                if name in BASELINES:
                    predict = _linear_predictor(target, name, train, validation, moments)
                else:
                    entropy = [settings.seed, fold, *([seed] if seed else [])]
                    fitted = fit_fold(
                        target,
                        train,
                        validation,
                        grids,
                        moments,
                        settings,
                        seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]),
                        device=device,
                        tracker=None if seed else tracker,
                        name=f"fold_{fold}_",
                    )
                    predict, hazard = _network_predictor(
                        target, fitted.model, train, grids, settings
                    )
                    if not seed:
                        fits.append(fitted)
                        hazards += [hazard] if hazard is not None else []
                found = predict(holdout, horizons["cv"])
                held_out[name].append(_rows(target, holdout, found, horizons["cv"]))
                if test.height:
                    external[name].append(predict(test, horizons["test"]))
        fits[-1].model.cpu()
        if progress is not None:
            progress(fold + 1, count)

    predictions, metrics, repeats = [], [], []
    for name in held_out:
        parts = [pl.concat(held_out[name]).sort("unit")]
        if test.height:
            values, survival = zip(*external[name], strict=True)
            mean = np.mean(values, axis=0), np.mean(survival, axis=0)
            no_fold = test.with_columns(fold=pl.lit(None, pl.Int64))
            parts.append(_rows(target, no_fold, mean, horizons["test"]))
        for part in parts:
            if name in (NETWORK, *BASELINES):
                predictions.append(part.select(pl.lit(name).alias("model"), pl.all()))
                metrics.append(_scores(target, name, part, settings))
            if name in seeds and len(seeds) > 1:
                repeats += _values(target, part)
    return CrossValidation(
        target=target,
        settings=settings,
        predictions=pl.concat(predictions),
        metrics=_with_seeds(pl.concat(metrics), repeats),
        networks=tuple(fit.model for fit in fits),
        history=pl.concat(
            fit.history.select(pl.lit(fold).alias("fold"), pl.all())
            for fold, fit in enumerate(fits)
        ),
        best_epochs=tuple(fit.best_epoch for fit in fits),
        baselines=tuple(hazards),
    )


def _network_predictor(
    target: Target,
    model: FoldModel,
    train: pl.DataFrame,
    grids: GridSource,
    settings: ModelSettings,
) -> tuple[_Predictor, BaselineHazard | None]:
    """Brings a survival model's risks to mean 0 and deviation 1 over its training units."""
    pinned = model.device.type == "cuda"
    crops = Crops(grids, model.normalise, settings.crop, pinned=pinned)

    def predict(units: pl.DataFrame) -> Floats:
        return predict_units(model, units, crops, count=settings.crops_at_test, seed=settings.seed)

    if target.kind != "survival":
        return _without_survival(predict), None
    risk = predict(train)
    mean, deviation = _standard(risk)
    model.shift.fill_(-mean / deviation)
    model.scale.fill_(1 / deviation)
    baseline = fit_baseline(train, (risk[:, 0] - mean) / deviation, deviation)
    return _with_survival(predict, baseline), baseline


def _linear_predictor(
    target: Target,
    name: str,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    moments: Mapping[str, GridMoments],
) -> _Predictor:
    x = baseline_features(name, train, moments)
    linear = fit_linear(target, train, validation, x, baseline_features(name, validation, moments))

    def predict(units: pl.DataFrame) -> Floats:
        return predict_linear(target, linear, baseline_features(name, units, moments))

    if target.kind != "survival":
        return _without_survival(predict)
    risk = predict_linear(target, linear, x)
    mean, deviation = _standard(risk)
    baseline = fit_baseline(train, (risk[:, 0] - mean) / deviation, deviation)
    return _with_survival(lambda units: (predict(units) - mean) / deviation, baseline)


def _without_survival(predict: Callable[[pl.DataFrame], Floats]) -> _Predictor:
    return lambda units, horizons: (predict(units), np.empty((units.height, 0)))


def _with_survival(
    predict: Callable[[pl.DataFrame], Floats], baseline: BaselineHazard
) -> _Predictor:
    def both(units: pl.DataFrame, horizons: Floats) -> _Predictions:
        risk = predict(units)
        return risk, baseline.survival(risk[:, 0], horizons)

    return both


def rows_metrics(target: Target, rows: pl.DataFrame) -> dict[str, Metric]:
    """The target's metrics of one model's rows of :attr:`CrossValidation.predictions`, one split."""
    survival = horizons = None
    if "survival" in rows.columns:
        horizons = np.asarray(rows["horizons"][0].to_list(), np.float64)
        survival = np.array(rows["survival"].to_list()).reshape(rows.height, len(horizons))
    return target_metrics(target, rows, prediction_array(target, rows), survival, horizons)


def _horizons(target: Target, units: pl.DataFrame) -> Floats:
    if target.kind != "survival":
        return np.empty(0)
    return event_horizons(units["time"].to_numpy(), units["event"].to_numpy())


def _rows(
    target: Target, units: pl.DataFrame, found: _Predictions, horizons: Floats
) -> pl.DataFrame:
    values, survival = found
    labels = ["time", "event"] if target.kind == "survival" else ["y"]
    columns = prediction_columns(target)
    rows = units.select("split", "unit", "patient", "fold", *labels).with_columns(
        **{name: pl.Series(values[:, i]) for i, name in enumerate(columns)}
    )
    if target.kind != "survival":
        return rows
    numbers = pl.List(pl.Float64)
    return rows.with_columns(
        pl.Series("survival", survival.tolist(), numbers),
        pl.Series("horizons", [horizons.tolist()] * rows.height, numbers),
    )


def _values(target: Target, rows: pl.DataFrame) -> list[dict[str, Any]]:
    """Metrics of an initialisation, without intervals."""
    once = np.ones((1, rows.height))
    return [
        {
            "model": NETWORK,
            "split": rows["split"][0],
            "metric": name,
            "seed": float(metric(once)[0]),
        }
        for name, metric in rows_metrics(target, rows).items()
    ]


def _with_seeds(metrics: pl.DataFrame, repeats: list[dict[str, Any]]) -> pl.DataFrame:
    schema = {"model": pl.String, "split": pl.String, "metric": pl.String, "seed": pl.Float64}
    several = (
        pl.DataFrame(repeats, schema=schema)
        .group_by("model", "split", "metric")
        .agg(seeds_mean=pl.col("seed").mean(), seeds_deviation=pl.col("seed").std())
    )
    return metrics.join(several, on=["model", "split", "metric"], how="left", maintain_order="left")


def _scores(
    target: Target, model: str, rows: pl.DataFrame, settings: ModelSettings
) -> pl.DataFrame:
    prediction = prediction_array(target, rows)
    intervals = score(
        rows_metrics(target, rows),
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

"""Cross-validation of slide models by patient (paper B), with linear baselines and intervals.

Fold k is the test fold, fold k + 1 validates (best epoch, penalty of the baselines), and the
others train: with 4 folds 2 / 1 / 1, as in paper B. The split ``test`` is predicted by the mean of
the folds' networks. Metrics are computed once, on the predictions of all held-out folds together
('All' in paper B). This requires predictions on one scale: values have the labels' unit and
classes have probabilities, but Cox risks are defined up to a constant in each fold. Each fold's
risks are therefore standardised over its own training units [choice]. A model that learned nothing
predicts each fold's training mean, which is high where the held-out labels are low: its pooled
predictions score somewhat *below* chance.

Survival functions, which the Brier score needs, are computed from the risks and Breslow's estimate
of the baseline hazard on each fold's training units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from nic_core.cohort import CohortError, ModelSettings, Target
from nic_core.grids.moments import GridMoments
from nic_core.models.baselines import (
    BASELINE_NAMES,
    BASELINES,
    baseline_features,
    fit_linear,
)
from nic_core.models.checkpoints import Floats, FoldCheckpoints, FoldResult, Predictions
from nic_core.models.clinical import (
    CLINICAL,
    CLINICAL_IMAGE,
    CLINICAL_NAMES,
    CLINICAL_SCHEMA,
    clinical_table,
    fit_clinical,
    fit_clinical_image,
)
from nic_core.models.cox import BaselineHazard
from nic_core.models.crops import CohortMoments, Crops, GridSource, cohort_moments, normalise_for
from nic_core.models.fold_metrics import FOLD_METRIC_SCHEMA, fold_summary, fold_values
from nic_core.models.folds import check_folds, check_trainable, make_folds, split_fold
from nic_core.models.kinds import TargetKind, kind_of, prediction_array
from nic_core.models.kinds.base import RecalibrationMethod, named_series, survival_columns
from nic_core.models.labels import shuffle_labels
from nic_core.models.metrics import score
from nic_core.models.networks import FoldModel, component_count
from nic_core.models.recalibration import Recalibration
from nic_core.models.training import FittedFold, fit_fold, fitting_threads, predict_units

if TYPE_CHECKING:
    from nic_core.tracker import Tracker

NETWORK = "network"
UNCALIBRATED = "network_uncalibrated"
# value of the column `model` to its name in tables and figures
MODEL_NAMES = (
    {NETWORK: NETWORK, UNCALIBRATED: "network, before recalibration"}
    | BASELINE_NAMES
    | CLINICAL_NAMES
)

Progress = Callable[[int, int], None]  # epochs done, number of epochs of all networks


@dataclass(frozen=True)
class CrossValidation:
    """The result of a target's cross-validation.

    Attributes
    ----------
    crop
        Side of the networks' crops in cells.
    predictions
        One row per unit and model: ``model`` (``network``, a baseline, with covariates
        ``clinical`` and ``clinical_image``, with recalibration ``network_uncalibrated``),
        ``split``, ``unit``, ``patient``, ``slides`` (those that the unit is predicted from),
        ``fold`` and ``fold_name`` (the fold in which the unit was held out; null in split
        ``test``), the labels
        (:attr:`TargetKind.label_columns`) and the predictions
        (:attr:`TargetKind.prediction_columns`). For survival also ``survival``, the survival
        probabilities at ``horizons`` (list columns; the horizons are equal within a split), and
        ``survival_<time>`` for each of :meth:`TargetKind.times`.
    metrics
        ``model``, ``split``, ``metric``, ``value``, ``low``, ``high`` (95 % percentile bootstrap
        over patients; null for ``log_rank_p``), ``units``, ``patients``; ``folds_mean``,
        ``folds_deviation`` and ``folds_undefined``
        (:func:`nic_core.models.fold_metrics.fold_summary`; null in split ``test`` and for
        ``log_rank_p``); ``seeds_mean`` and ``seeds_deviation`` over the network's
        initialisations, null if there is only one.
    networks
        One per fold. With several initialisations they are those of the first, as are the
        predictions and intervals: choosing the best one by its score would use the test labels.
    history
        ``fold`` and the columns of :attr:`nic_core.models.training.FittedFold.history`.
    best_epochs
        One per fold.
    baseline_hazards
        For survival: the baseline hazard of each of ``networks``; else empty.
    clinical
        Coefficients and tests of the covariates (:data:`nic_core.models.clinical.CLINICAL_SCHEMA`);
        empty for a target without covariates.
    notes
        Models that could not be fitted, and why.
    recalibrations
        One for each of ``networks``; empty without recalibration.
    """

    target: Target
    settings: ModelSettings
    crop: int
    predictions: pl.DataFrame
    metrics: pl.DataFrame
    networks: tuple[FoldModel, ...]
    history: pl.DataFrame
    best_epochs: tuple[int, ...]
    baseline_hazards: tuple[BaselineHazard, ...] = ()
    clinical: pl.DataFrame = field(default_factory=CLINICAL_SCHEMA.to_frame)
    notes: tuple[str, ...] = ()
    recalibrations: tuple[Recalibration, ...] = ()

    @property
    def times(self) -> Floats:
        """The times of the columns ``survival_<time>``; empty unless the target is survival."""
        held_out = self.predictions.filter(model=NETWORK, split="cv")
        return kind_of(self.target).times(held_out)


@dataclass(frozen=True)
class _Predictor:
    """A fitted model of one fold: a network or a baseline."""

    predict: Callable[[pl.DataFrame], Floats]  # units to predictions (units, outputs)
    hazard: BaselineHazard | None

    def __call__(self, units: pl.DataFrame, horizons: Floats) -> Predictions:
        prediction = self.predict(units)
        if self.hazard is None:
            return prediction, np.empty((units.height, 0))
        return prediction, self.hazard.survival(prediction[:, 0], horizons)


def cross_validate(
    target: Target,
    table: pl.DataFrame,
    folds: pl.DataFrame,
    grids: GridSource,
    settings: ModelSettings,
    *,
    crop: int,
    device: str = "auto",
    tracker: Tracker | None = None,
    progress: Progress | None = None,
    groups: Mapping[str, str] | None = None,
    checkpoints: FoldCheckpoints | None = None,
) -> CrossValidation:
    """Train and test the network and the baselines on every fold.

    With ``settings.permute_labels``, labels are first exchanged between patients with that seed:
    a control whose metrics must be at chance level. If ``settings.folds`` is a number, new folds
    are then made, so that they are stratified by the exchanged labels; folds of sites and given
    folds are kept.

    Parameters
    ----------
    table
        Target table (:func:`nic_core.models.labels.target_table`).
    folds
        Output of :func:`nic_core.models.folds.make_folds`, or of another function of that module;
        shared by all encoders to compare.
    grids
        Opens the grid of a slide; called whenever one is read.
    crop
        Side of a crop in cells (:func:`nic_core.models.networks.crop_cells`).
    device
        Device of the training: ``auto``, ``cpu`` or ``cuda``. The returned networks are on the
        CPU.
    tracker
        Receives the training curves of the first initialisation.
    progress
        Called after each epoch of each network.
    checkpoints
        Keeps each finished fold. Folds that it has are not trained again: the result is that of an
        uninterrupted training.
    groups
        Patient to group, for the new folds: see :func:`nic_core.models.folds.make_folds`.

    Raises
    ------
    CohortError
        The network cannot process crops of ``crop`` cells, a grid has no tissue, or the units of a
        fold lack a class, an event or two different numbers to train on.
    TrainingError
        A loss is not finite.
    ValueError
        The device does not exist, or the folds do not fit the table.
    """
    kind = kind_of(target)
    if settings.permute_labels is not None:
        table = shuffle_labels(table, seed=settings.permute_labels)
        if isinstance(settings.folds, int):
            wanted, seed = folds["fold"].n_unique(), settings.seed
            folds = make_folds(table, target=target, folds=wanted, seed=seed, groups=groups)
    check_folds(folds, table)
    count = folds["fold"].n_unique()
    cv = table.filter(pl.col("split") == "cv").join(folds, on="patient").sort("unit")
    check_trainable(target, cv, count)
    test = table.filter(pl.col("split") == "test").sort("unit")
    try:
        moments = cohort_moments(
            pl.concat([cv, test], how="diagonal"),
            grids,
            components=component_count(settings.network),
        )
    except ValueError as error:
        raise CohortError(f"target '{target.name}': {error}") from error

    seeds = _seed_names(settings)
    parts_of_folds = [split_fold(cv, fold, count) for fold in range(count)]
    problem = validation_problem(kind, [validation for _, validation, _ in parts_of_folds])
    notes = []
    clinical: tuple[str, ...] = (CLINICAL, CLINICAL_IMAGE) if target.covariates else ()
    if target.covariates and problem is not None:
        clinical = (CLINICAL,)
        notes.append(
            f"target '{target.name}': clinical + image is not predicted, since it is fitted on "
            f"validation folds: {problem}; label more patients, or use fewer folds"
        )
    recalibrated: tuple[str, ...] = ()
    if settings.recalibration != "none" and kind.recalibrates:
        if problem is not None:
            raise CohortError(
                f"target '{target.name}': settings.models.recalibration cannot be fitted on "
                f"validation folds: {problem}; label more patients, use fewer folds, or set it to "
                "none"
            )
        recalibrated = (UNCALIBRATED,)
    models = (NETWORK, *recalibrated, *BASELINES, *clinical)
    held_out: dict[str, list[pl.DataFrame]] = {name: [] for name in (*seeds, *models[1:])}
    external: dict[str, list[Predictions]] = {name: [] for name in held_out}
    horizons = {part["split"][0]: kind.horizons(part) for part in (cv, test) if part.height}
    times = kind.times(cv)
    fits, hazards, recalibrations = [], [], []
    epochs, done = count * settings.seeds * settings.epochs, 0

    def count_epochs(number: int = 1) -> None:
        nonlocal done
        done += number
        if progress is not None:
            progress(done, epochs)

    for fold, (train, validation, test_fold) in enumerate(parts_of_folds):
        result = None
        if checkpoints is not None:
            result = checkpoints.load(fold, kind, settings.network, positions=settings.positions)
        if result is None:
            result = _fit_fold(
                target,
                fold,
                (train, validation, test_fold, test),
                horizons,
                times,
                grids,
                moments,
                settings,
                models,
                crop=crop,
                device=device,
                tracker=tracker,
                progress=count_epochs,
            )
            if checkpoints is not None:
                checkpoints.save(fold, result)
        else:
            count_epochs(settings.seeds * settings.epochs)
            if tracker is not None:
                _report_history(tracker, fold, result.fitted.history)
        fits.append(result.fitted)
        hazards += [] if result.hazard is None else [result.hazard]
        recalibrations += [] if result.recalibration is None else [result.recalibration]
        for name in held_out:
            held_out[name].append(result.held_out[name])
            if test.height:
                external[name].append(result.external[name])

    predictions, metrics, repeats = [], [], []
    for name in held_out:
        parts = [pl.concat(held_out[name]).sort("unit")]
        if test.height:
            values, survival = zip(*external[name], strict=True)
            mean = np.mean(values, axis=0), np.mean(survival, axis=0)
            without_fold = test.with_columns(
                fold=pl.lit(None, pl.Int64), fold_name=pl.lit(None, pl.String)
            )
            parts.append(_rows(kind, without_fold, mean, horizons["test"], times))
        for part in parts:
            if name in models:
                predictions.append(part.select(pl.lit(name).alias("model"), pl.all()))
                metrics.append(_metrics_with_intervals(kind, name, part, settings))
            if name in seeds and len(seeds) > 1:
                repeats += _metrics_of_seed(kind, part)
    every = pl.concat(predictions)
    return CrossValidation(
        target=target,
        settings=settings,
        crop=crop,
        predictions=every,
        metrics=_with_seeds(pl.concat(metrics), repeats),
        networks=tuple(fit.model for fit in fits),
        history=pl.concat(
            fit.history.select(pl.lit(fold).alias("fold"), pl.all())
            for fold, fit in enumerate(fits)
        ),
        best_epochs=tuple(fit.best_epoch for fit in fits),
        baseline_hazards=tuple(hazards),
        clinical=_clinical_table(kind, cv, every),
        notes=tuple(notes),
        recalibrations=tuple(recalibrations),
    )


def validation_problem(kind: TargetKind, folds: Sequence[pl.DataFrame]) -> str | None:
    """Say why no model can be fitted on the units of a validation fold; None: one can be."""
    for units in folds:
        if problem := kind.training_problem(units, units):
            return f"fold {units['fold'][0]}: {problem}"
    return None


def _clinical_table(kind: TargetKind, cv: pl.DataFrame, predictions: pl.DataFrame) -> pl.DataFrame:
    """Return :attr:`CrossValidation.clinical`."""
    if not kind.target.covariates:
        return CLINICAL_SCHEMA.to_frame()
    scores = predictions.filter(model=NETWORK, split="cv").select("unit", *kind.prediction_columns)
    return clinical_table(kind, kind.target.covariates, cv.join(scores, on="unit"))


def _report_history(tracker: Tracker, fold: int, history: pl.DataFrame) -> None:
    """Report the training curves of a finished fold, the rows of :attr:`FittedFold.history`."""
    for epoch, values in curves(history.select(pl.lit(fold).alias("fold"), pl.all())):
        tracker.metrics(values, step=epoch)


def curves(history: pl.DataFrame) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield epoch and metrics (``fold_0_loss``, ...) of :attr:`CrossValidation.history`."""
    for row in history.iter_rows(named=True):
        fold, epoch = row.pop("fold"), row.pop("epoch")
        yield epoch, {f"fold_{fold}_{name}": value for name, value in row.items()}


def _seed_names(settings: ModelSettings) -> list[str]:
    """Return the names of the networks of each initialisation; the first is :data:`NETWORK`."""
    return [NETWORK, *(f"{NETWORK} {seed}" for seed in range(1, settings.seeds))]


def _fit_fold(
    target: Target,
    fold: int,
    parts: tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, pl.DataFrame],
    horizons: Mapping[str, Floats],
    times: Floats,
    grids: GridSource,
    moments: CohortMoments,
    settings: ModelSettings,
    models: Sequence[str],
    *,
    crop: int,
    device: str,
    tracker: Tracker | None,
    progress: Callable[[], None],
) -> FoldResult:
    """Train the networks and baselines of one fold and predict its test fold and split ``test``.

    ``parts`` are the units that train, validate, are held out, and those of split ``test``;
    ``models`` are the values of column ``model``.
    """
    kind = kind_of(target)
    train, validation, test_fold, test = parts
    held_out: dict[str, pl.DataFrame] = {}
    external: dict[str, Predictions] = {}
    first: tuple[FittedFold, BaselineHazard | None, Recalibration | None] | None = None

    def predict(name: str, predictor: _Predictor) -> None:
        at = horizons["cv"]
        predicted = predictor(test_fold, np.concatenate([at, times]))
        held_out[name] = _rows(kind, test_fold, predicted, at, times)
        if test.height:
            external[name] = predictor(test, np.concatenate([horizons["test"], times]))

    uses_validation = not {UNCALIBRATED, CLINICAL_IMAGE}.isdisjoint(models)
    training_folds = sorted(set(train["fold"]))
    normalise = normalise_for(settings.network, [moments.groups[f] for f in training_folds])
    with fitting_threads(crop):
        for seed, name in enumerate(_seed_names(settings)):
            entropy = [settings.seed, fold, *([seed] if seed else [])]
            fitted = fit_fold(
                target,
                train,
                validation,
                grids,
                normalise,
                settings,
                crop=crop,
                seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]),
                device=device,
                tracker=None if seed else tracker,
                name=f"fold_{fold}_",
                progress=progress,
            )
            # one network's cache of crops at a time: all that is needed of it is predicted now
            network = _predicted(
                _network_predictor(kind, fitted.model, train, grids, settings, crop=crop),
                [test_fold, test, *([validation] if uses_validation else [])],
            )
            predictor, recalibration = network, None
            if settings.recalibration != "none":
                predictor, recalibration = _recalibrated(
                    kind, network, validation, settings.recalibration
                )
            predict(name, predictor)
            if first is None:
                first, image = (fitted, predictor.hazard, recalibration), network
        if UNCALIBRATED in models:
            predict(UNCALIBRATED, image)
        for name in BASELINES:
            predict(name, _linear_predictor(kind, name, train, validation, moments.slides))
        if CLINICAL in models:
            clinical = fit_clinical(kind, target.covariates, train)
            predict(CLINICAL, _with_hazard(kind, train, clinical))
        if CLINICAL_IMAGE in models:
            joined = fit_clinical_image(
                kind, validation, clinical(validation), image.predict(validation)
            )
            both = _with_hazard(
                kind, validation, lambda units: joined(clinical(units), image.predict(units))
            )
            predict(CLINICAL_IMAGE, both)
    assert first is not None  # at least one initialisation
    fitted, hazard, recalibration = first
    fitted.model.cpu()
    return FoldResult(fitted, hazard, held_out, external, recalibration)


def _predicted(predictor: _Predictor, parts: Sequence[pl.DataFrame]) -> _Predictor:
    """Predict units once, and return a predictor of these units alone."""
    known: dict[str, Floats] = {}
    for units in parts:
        if units.height:
            known |= zip(units["unit"], predictor.predict(units), strict=True)
    return _Predictor(lambda units: np.stack([known[u] for u in units["unit"]]), predictor.hazard)


def _recalibrated(
    kind: TargetKind, network: _Predictor, validation: pl.DataFrame, method: RecalibrationMethod
) -> tuple[_Predictor, Recalibration | None]:
    """Recalibrate a network on its validation units; None: its kind has no probabilities."""
    if not kind.recalibrates:
        return network, None
    recalibration, hazard = kind.recalibrate(
        validation, network.predict(validation), network.hazard, method
    )
    return (
        _Predictor(lambda units: kind.recalibrated(network.predict(units), recalibration), hazard),
        recalibration,
    )


def _network_predictor(
    kind: TargetKind,
    model: FoldModel,
    train: pl.DataFrame,
    grids: GridSource,
    settings: ModelSettings,
    *,
    crop: int,
) -> _Predictor:
    """Return a network's predictor; a survival model is changed to give standardised risks."""
    pinned = model.device.type == "cuda"
    crops = Crops(grids, model.normalise, crop, pinned=pinned)

    def predict(units: pl.DataFrame) -> Floats:
        return predict_units(model, units, crops, count=settings.crops_at_test, seed=settings.seed)

    calibration = kind.calibrate(train, predict)
    if calibration is None:
        return _Predictor(predict, None)
    mean, deviation, hazard = calibration
    model.shift.fill_(-mean / deviation)
    model.scale.fill_(1 / deviation)
    return _Predictor(predict, hazard)


def _linear_predictor(
    kind: TargetKind,
    name: str,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    moments: Mapping[str, GridMoments],
) -> _Predictor:
    """Fit a baseline and return its predictor."""
    linear = fit_linear(
        kind,
        train,
        validation,
        baseline_features(name, train, moments),
        baseline_features(name, validation, moments),
    )

    def predict(units: pl.DataFrame) -> Floats:
        return kind.linear_prediction(linear, baseline_features(name, units, moments))

    return _with_hazard(kind, train, predict)


def _with_hazard(
    kind: TargetKind, fitted: pl.DataFrame, predict: Callable[[pl.DataFrame], Floats]
) -> _Predictor:
    """Standardise risks on the units that a model was fitted on; estimate their baseline hazard."""
    calibration = kind.calibrate(fitted, predict)
    if calibration is None:
        return _Predictor(predict, None)
    mean, deviation, hazard = calibration
    return _Predictor(lambda units: (predict(units) - mean) / deviation, hazard)


def _rows(
    kind: TargetKind, units: pl.DataFrame, predicted: Predictions, horizons: Floats, times: Floats
) -> pl.DataFrame:
    """Return one model's rows of :attr:`CrossValidation.predictions`, without ``model``.

    The survival probabilities in ``predicted`` are those at ``horizons``, then those at ``times``.
    """
    prediction, survival = predicted
    return units.select(
        "split", "unit", "patient", "slides", "fold", "fold_name", *kind.label_columns
    ).with_columns(
        *kind.prediction_series(prediction, survival[:, : len(horizons)], horizons),
        *named_series(survival_columns(times), survival[:, len(horizons) :]),
    )


def _metrics_of_seed(kind: TargetKind, rows: pl.DataFrame) -> list[dict[str, Any]]:
    """Return the metrics of one initialisation, without intervals."""
    once = np.ones((1, rows.height))
    return [
        {
            "model": NETWORK,
            "split": rows["split"][0],
            "metric": name,
            "seed": float(metric(once)[0]),
        }
        for name, metric in kind.metrics(rows, prediction_array(kind, rows)).items()
    ]


def _with_seeds(metrics: pl.DataFrame, repeats: list[dict[str, Any]]) -> pl.DataFrame:
    """Add mean and standard deviation over initialisations to the metrics."""
    schema = {"model": pl.String, "split": pl.String, "metric": pl.String, "seed": pl.Float64}
    several = (
        pl.DataFrame(repeats, schema=schema)
        .group_by("model", "split", "metric")
        .agg(seeds_mean=pl.col("seed").mean(), seeds_deviation=pl.col("seed").std())
    )
    return metrics.join(several, on=["model", "split", "metric"], how="left", maintain_order="left")


def _metrics_with_intervals(
    kind: TargetKind, model: str, rows: pl.DataFrame, settings: ModelSettings
) -> pl.DataFrame:
    """Return one model's rows of :attr:`CrossValidation.metrics` in one split."""
    prediction = prediction_array(kind, rows)
    intervals = score(
        kind.metrics(rows, prediction),
        rows["patient"].to_list(),
        resamples=settings.bootstrap,
        seed=settings.seed,
    )
    table = [
        {"metric": name, "value": i.value, "low": i.low, "high": i.high}
        for name, i in intervals.items()
    ]
    table += [
        {"metric": name, "value": p, "low": None, "high": None}
        for name, p in kind.p_values(rows, prediction).items()
    ]
    numbers = {"value": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    cross_validated = rows["split"][0] == "cv"
    of_folds = fold_values(kind, rows) if cross_validated else FOLD_METRIC_SCHEMA.to_frame()
    return (
        pl.DataFrame(table, schema={"metric": pl.String, **numbers})
        .select(
            pl.lit(model).alias("model"),
            pl.lit(rows["split"][0]).alias("split"),
            pl.all(),
            units=pl.lit(rows.height, pl.Int64),
            patients=pl.lit(rows["patient"].n_unique(), pl.Int64),
        )
        .join(fold_summary(of_folds), on="metric", how="left", maintain_order="left")
    )

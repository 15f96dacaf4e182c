"""Evaluate the frozen model of a target on the cohort of another hospital.

Nothing of an external cohort is used for training or for a choice: its slides are compressed like
the model's training slides, the ensemble of the folds predicts them, and the predictions are
scored. A cohort that shares a patient or a slide with the study is refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from nic_core.cohort import Cohort, CohortError, ExternalCohort, Target
from nic_core.cohort.index import find_slides, row_source
from nic_core.cohort.tables import ROW, read_table, require_columns, to_text
from nic_core.compression.batch import Outcome
from nic_core.encoders import load_encoder
from nic_core.encoders.encoder import Encoder
from nic_core.grids import open_grid
from nic_core.models.cross_validation import NETWORK
from nic_core.models.files import (
    ModelCard,
    ModelFileError,
    SlideModel,
    load_model,
    metrics_frame,
)
from nic_core.models.kinds import TargetKind, kind_of, prediction_array
from nic_core.models.kinds.base import Floats
from nic_core.models.labels import LabelMatches, read_labels, target_table
from nic_core.models.metrics import Metric, compare_cohorts, score
from nic_core.models.plots import interval_figure
from nic_core.models.prediction import compress_for_model, predict_grids, usable_slides
from nic_core.models.subgroups import (
    SUBGROUP_SCHEMA,
    groups_of_units,
    subgroup_metrics,
    undefined_note,
)
from nic_core.pictures import save_figure
from nic_core.slides import SlideError, content_identity
from nic_core.slides.remote import slide_path
from nic_core.steps.predictions import encoder_of_champion, load_champion
from nic_core.steps.slide_index import (
    digest,
    excluded_slides,
    read_file_snapshot,
    read_slide_index,
    same_content,
    used_slides,
)
from nic_core.steps.slide_models import METRICS, PREDICTIONS
from nic_core.store import ExternalKey, Store, atomic_folder, remove_product

log = logging.getLogger(__name__)

SUBGROUPS, LEFT_OUT, ABOUT = "subgroups.parquet", "left_out.parquet", "about.json"
EXTERNAL_METRIC_SCHEMA = pl.Schema(
    {
        "metric": pl.String(),
        "value": pl.Float64(),  # on the external cohort; null where `note` says why
        "low": pl.Float64(),  # bounds of the 95 % bootstrap interval over patients
        "high": pl.Float64(),
        "cross_validated": pl.Float64(),  # on the training cohort; null: not computed there
        "difference": pl.Float64(),  # external minus cross-validated
        "difference_low": pl.Float64(),  # bounds of its 95 % bootstrap interval, unpaired
        "difference_high": pl.Float64(),
        "note": pl.String(),
    }
)
_LEFT_OUT_SCHEMA = pl.Schema({"slide": pl.String(), "reason": pl.String()})
_SHOWN = 3  # names in a message


class NoChampionError(CohortError):
    """A target has no champion that the study's encoders can be used with."""


class LeakError(CohortError):
    """An external cohort shares a patient or a slide with the study."""


@dataclass(frozen=True)
class StudySlides:
    """The patients and slides of a study, none of which an external cohort may have.

    Attributes
    ----------
    patients
        All patients of the slide index.
    slides
        Content identity to slide id.
    """

    patients: frozenset[str]
    slides: Mapping[str, str]


@dataclass(frozen=True)
class ExternalEvaluation:
    """The evaluation of a model on an external cohort.

    Attributes
    ----------
    card
        Card of the model.
    predictions
        A row per unit: the table of :func:`~nic_core.models.prediction.predict_grids`, the labels,
        and a column ``subgroup_<column>`` for each column of subgroups.
    metrics
        :data:`EXTERNAL_METRIC_SCHEMA`, the primary metric first.
    subgroups
        :data:`~nic_core.models.subgroups.SUBGROUP_SCHEMA` with ``column`` in front.
    left_out
        Slides that have no part in the metrics: ``slide`` and ``reason``.
    matches
        What became of every row of the label table.
    figures
        Name to figure: ``evaluation``, as for cross-validation, and ``comparison``, the primary
        metric of training cohort, external cohort and subgroups.
    """

    card: ModelCard
    predictions: pl.DataFrame
    metrics: pl.DataFrame
    subgroups: pl.DataFrame
    left_out: pl.DataFrame
    matches: LabelMatches
    figures: dict[str, Figure]


def remove_external_evaluation(store: Store, key: ExternalKey) -> None:
    """Remove the evaluation of a champion that cannot be evaluated any more."""
    if store.external_evaluation(key).exists():
        remove_product(store.external_evaluation(key))


def make_external_evaluation(
    cohort: Cohort, store: Store, key: ExternalKey, *, device: str = "auto"
) -> ExternalEvaluation:
    """Evaluate a target's champion on an external cohort; write and return the evaluation.

    Raises
    ------
    NoChampionError
        The target has no champion, or the study has no encoder that fits it.
    CohortError
        See :func:`evaluate_external`.
    EncoderError, ModelFileError, ModelMismatchError
        The model or its encoder cannot be used.
    """
    champion = load_champion(cohort, store, key.target)
    problem, encoder = encoder_of_champion(cohort, store, cohort.target(key.target), champion)
    if encoder is None:
        raise NoChampionError(f"external cohort '{key.cohort}' cannot be evaluated: {problem}")
    made = evaluate_external(
        store.champion(key.target),
        load_encoder(store.encoder(encoder)),
        cohort.external_cohort(key.cohort),
        grids=store.external_grids(key.cohort, encoder),
        study=study_slides(store),
        device=device,
    )
    write_external_evaluation(store.external_evaluation(key), made)
    return made


def study_slides(store: Store) -> StudySlides:
    """Return the patients and slides of the slide index; none before the first scan."""
    if not store.slide_index.exists():
        return StudySlides(frozenset(), {})
    index = read_slide_index(store)
    identity = dict(read_file_snapshot(store).select("path", "identity").iter_rows())
    return StudySlides(
        frozenset(index["patient"]),
        {identity[path]: slide for slide, path in index.select("slide", "path").iter_rows()},
    )


def external_versions(cohort: Cohort, snapshot: pl.DataFrame) -> dict[str, str]:
    """Return a version of every external cohort by name: of its entry, tables and slides.

    A cohort that cannot be read has a version too, of the problem: its evaluation reports it, and
    nothing else depends on it.

    Parameters
    ----------
    snapshot
        :data:`nic_core.cohort.scan.SNAPSHOT_SCHEMA`, with the files of the external cohorts.
    """
    identity = dict(snapshot.select("path", "identity").iter_rows())
    return {
        entry.name: digest(entry, _content_or_problem(entry, identity)) for entry in cohort.external
    }


def _content_or_problem(entry: ExternalCohort, identity: Mapping[str, str | None]) -> object:
    try:
        found = find_slides(entry)
        tables = [path for path in (entry.slides.table, entry.labels) if path is not None]
        return (
            [read_table(path, "table").rows() for path in tables],
            sorted(found.problems.items()),
            [
                (*row, identity.get(row[1]), identity.get(row[2]) if row[2] else None)
                for row in found.index.select("slide", "path", "mask", "mpp", "image").rows()
            ],
        )
    except CohortError as error:
        log.warning("external cohort '%s': %s", entry.name, error)
        return str(error)


def evaluate_external(
    folder: Path,
    encoder: Encoder,
    entry: ExternalCohort,
    *,
    grids: Path,
    study: StudySlides,
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> ExternalEvaluation:
    """Evaluate a model on an external cohort, without a store.

    A slide that cannot be used is left out with its reason.

    Parameters
    ----------
    folder
        Folder of the model, with its cross-validated predictions.
    encoder
        Encoder of the model.
    entry
        The external cohort; its label table has the columns of the model's target.
    grids
        Folder of the grids, which are reused while they are up to date.
    study
        Patients and slides that the cohort must not have.
    device
        Device of the encoder: ``auto``, ``cpu`` or ``cuda``.
    progress, on_outcome
        As in :func:`nic_core.compression.batch.compress_slides`.

    Raises
    ------
    LeakError
        The cohort has a patient or a slide of the study, or a slide that the model was trained on.
    CohortError
        Its tables are invalid, two of its slides are equal, or no labelled slide can be used.
    ModelFileError, ModelMismatchError
        The model or its encoder cannot be used.
    StoreError
        The grids cannot be written.
    """
    model = load_model(folder)
    card = model.card
    internal = _internal_predictions(folder)
    kind, settings = kind_of(card.target), card.settings
    try:
        index, labels, units, left_out = _labelled_units(entry, card.target)
        groups = {c: unit_subgroups(entry, c, units, index) for c in entry.subgroups}
        identities, unreadable = _identities(used_slides(index))
        refuse_leaks(used_slides(index), identities, study, card.training.slides)
        left_out |= unreadable
        sources = {
            row["slide"]: row_source(row)
            for row in index.iter_rows(named=True)
            if row["slide"] in set(units["slides"].explode()) and row["slide"] not in left_out
        }
        report = compress_for_model(
            card,
            encoder,
            sources,
            grids,
            device=device,
            progress=progress,
            on_outcome=on_outcome,
        )
        left_out |= {
            slide: f"{reason}; {remedy}"
            for slide, reason, remedy in report.drop_nulls("reason")
            .select("slide", "reason", "remedy")
            .iter_rows()
        }
        usable = pl.element().is_in(usable_slides(report).implode())
        units = units.with_columns(
            pl.col("slides").list.eval(pl.element().filter(usable)),
            *(pl.Series(f"subgroup_{c}", values, pl.String) for c, values in groups.items()),
        ).filter(pl.col("slides").list.len() > 0)
        if units.is_empty():
            slide, reason = next(iter(left_out.items()))
            raise CohortError(
                f"no labelled slide can be used, for example slide '{slide}': {reason}"
            )
    except CohortError as error:
        raise type(error)(f"external cohort '{entry.name}': {error}") from error
    predictions = predict_grids(model, units, lambda slide: open_grid(grids / f"{slide}.zarr"))
    predictions = predictions.join(units.drop("patient", "slides", "split"), on="unit")
    scored = _with_survival(kind, model, predictions)
    metrics = _metrics(kind, card, predictions, scored, internal)
    subgroups = [
        subgroup_metrics(
            card.target,
            scored,
            predictions[f"subgroup_{column}"].to_list(),
            resamples=settings.bootstrap,
            seed=settings.seed,
        ).select(pl.lit(column).alias("column"), pl.all())
        for column in entry.subgroups
    ]
    subgroup_table = pl.concat(
        [pl.DataFrame(schema={"column": pl.String(), **SUBGROUP_SCHEMA}), *subgroups]
    )
    return ExternalEvaluation(
        card=card,
        predictions=predictions,
        metrics=metrics,
        subgroups=subgroup_table,
        left_out=pl.DataFrame(sorted(left_out.items()), _LEFT_OUT_SCHEMA, orient="row"),
        matches=labels,
        figures=_figures(kind, card, entry.name, scored, metrics, subgroup_table),
    )


def write_external_evaluation(folder: Path, made: ExternalEvaluation) -> None:
    """Write tables, figures and ``about.json`` (model and counts) into a folder, atomically.

    Raises
    ------
    StoreError
        The folder cannot be written.
    """
    card = made.card
    about = {
        "target": card.target.name,
        "encoder": card.encoder,
        "weights_hash": card.weights_hash,
        "networks": card.networks,
        "training_cohort": card.training.name,
        "training_digest": card.training.digest,
        "median_risk": card.median_risk,
        "units": made.predictions.height,
        "patients": made.predictions["patient"].n_unique(),
        "slides": made.predictions["slides"].explode().n_unique(),
        "left_out": made.left_out.height,
    }
    with atomic_folder(folder) as new:
        made.predictions.write_parquet(new / PREDICTIONS)
        made.metrics.write_parquet(new / METRICS)
        made.subgroups.write_parquet(new / SUBGROUPS)
        made.left_out.write_parquet(new / LEFT_OUT)
        (new / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        for name, drawn in made.figures.items():
            save_figure(drawn, new / f"{name}.png")


def _internal_predictions(folder: Path) -> pl.DataFrame:
    """Read the network's cross-validated predictions of a model."""
    path = folder / PREDICTIONS
    if not path.exists():
        raise ModelFileError(
            f"{path} does not exist: the cross-validated predictions are compared with the "
            "external ones; give the whole folder of a slide model"
        )
    return pl.read_parquet(path, glob=False).filter(model=NETWORK, split="cv")


def _labelled_units(
    entry: ExternalCohort, target: Target
) -> tuple[pl.DataFrame, LabelMatches, pl.DataFrame, dict[str, str]]:
    """Return slide index, use of the label rows, labelled units, and slides that are left out."""
    found = find_slides(entry)
    # all slides test the model, whatever the table says about splits
    index = found.index.with_columns(split=pl.lit("test"))
    target = without_covariates(target)
    labels = read_labels(external_study(entry, target), target, index)
    units = target_table(target, labels, used_slides(index))
    left_out = {slide: f"excluded: {reason}" for slide, reason in excluded_slides(index).items()}
    left_out |= {
        unlabelled.name: f"no label of target '{target.name}'"
        for unlabelled in labels.matches.slides_without_label
    }
    return index, labels.matches, units, left_out | found.problems


def without_covariates(target: Target) -> Target:
    """Return a target without its covariates, which a network does not need."""
    return target.model_copy(update={"covariates": ()})


def external_study(entry: ExternalCohort, target: Target) -> Cohort:
    """Return the cohort of an external cohort's slides and labels, and of one target."""
    return Cohort.model_construct(
        name=entry.name, slides=entry.slides, labels=entry.labels, encoders=(), targets=(target,)
    )


def unit_subgroups(
    entry: ExternalCohort, column: str, units: pl.DataFrame, index: pl.DataFrame
) -> list[str | None]:
    """Return the subgroup of each unit by a column of the slide table or the label table.

    A patient whose slides have several values has the subgroup ``A + B``.

    Parameters
    ----------
    units
        Columns ``patient`` and ``slides``.
    index
        Slide index of the cohort: columns ``slide`` and ``patient``.

    Raises
    ------
    CohortError
        Neither table has the column, both have it, or a slide or patient has two values in one
        table.
    """
    tables = {"label table": entry.labels}
    if entry.slides.table is not None:
        tables["slide table"] = entry.slides.table
    read = {name: read_table(path, name, row_column=ROW) for name, path in tables.items()}
    having = [name for name, table in read.items() if column in table.columns]
    if not having:
        known = "; ".join(
            f"{name} {tables[name]}: {', '.join(c for c in table.columns if c != ROW)}"
            for name, table in read.items()
        )
        raise CohortError(f"subgroups: no table has the column '{column}' ({known})")
    if len(having) > 1:
        raise CohortError(
            f"subgroups: both the slide table and the label table have the column '{column}'; "
            "remove or rename one of them"
        )
    table, path = read[having[0]], tables[having[0]]
    key = "slide" if "slide" in table.columns else "patient"
    require_columns(table, (key, column), path, having[0])
    try:
        values = table.select(to_text(table[key]), to_text(table[column]).alias("value"))
    except TypeError as error:
        raise CohortError(f"{having[0]} {path}: column '{column}' or '{key}' {error}") from error
    values = values.drop_nulls().unique(maintain_order=True)
    twice = values.filter(pl.col(key).is_duplicated())
    if twice.height:
        name, *_ = twice.row(0)
        both = " and ".join(twice.filter(pl.col(key) == name)["value"])
        raise CohortError(
            f"{having[0]} {path}: {key} '{name}' has two values in column '{column}': {both}; "
            "correct one of them"
        )
    value_of = dict(values.iter_rows())
    patient_of = dict(index.select("slide", "patient").iter_rows())
    keys = (
        slides if key == "slide" else [patient_of[slide] for slide in slides]
        for slides in units["slides"]
    )
    return groups_of_units(keys, value_of)


def _identities(index: pl.DataFrame) -> tuple[dict[str, str], dict[str, str]]:
    """Return the content identity of each slide by id, and the slides that cannot be read."""
    identities: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    for slide, path in index.select("slide", "path").iter_rows():
        try:
            identities[slide] = content_identity(slide_path(path))
        except SlideError as error:
            unreadable[slide] = f"{error.reason}; {error.remedy}"
    return identities, unreadable


def refuse_leaks(
    index: pl.DataFrame,
    identities: Mapping[str, str],
    study: StudySlides,
    trained_on: Collection[str] = (),
) -> None:
    """Refuse an external cohort that shares patients or slides with the study.

    Parameters
    ----------
    index
        Its slides in use: columns ``slide``, ``path``, ``patient`` and ``image``.
    identities
        Slide id to content identity.
    trained_on
        Content identities of the slides that the model was trained on.

    Raises
    ------
    LeakError
        A patient or a slide is in the study too.
    CohortError
        Two of its slides have the same content.
    """
    shared = sorted(set(index["patient"]) & study.patients)
    if shared:
        raise LeakError(
            f"{len(shared)} of its patients are in the study too: {_few(shared)}; remove them, or "
            "give the patients of the other hospital other ids if they are other persons"
        )
    leaks = [
        f"'{slide}' is slide '{study.slides[identity]}'"
        if identity in study.slides
        else f"the model was trained on '{slide}'"
        for slide, identity in identities.items()
        if identity in study.slides or identity in trained_on
    ]
    if leaks:
        raise LeakError(
            f"{len(leaks)} of its slides are in the study too: {_few(leaks)}; remove or exclude "
            "them"
        )
    known = index.filter(pl.col("slide").is_in(list(identities)))
    contents = known.select("path", identity=pl.col("slide").replace_strict(identities))
    for equal in same_content(known, contents.unique()):
        raise CohortError(
            f"slides {', '.join(equal)} have the same content; exclude all but one of them"
        )


def _with_survival(kind: TargetKind, model: SlideModel, predictions: pl.DataFrame) -> pl.DataFrame:
    """Add the columns of survival functions that :meth:`TargetKind.metrics` reads, if any."""
    horizons = kind.horizons(predictions)
    survival = np.empty((predictions.height, len(horizons)))
    if kind.has_survival_functions:
        folds = _folds(kind, model.card, predictions)
        survival = np.mean(
            [
                hazard.survival(risk, horizons)
                for hazard, risk in zip(model.card.baseline_hazards, folds[..., 0], strict=True)
            ],
            axis=0,
        )
    series = kind.prediction_series(prediction_array(kind, predictions), survival, horizons)
    return predictions.with_columns(series)


def _folds(kind: TargetKind, card: ModelCard, predictions: pl.DataFrame) -> Floats:
    """Return the predictions of each fold, (folds, units, outputs)."""
    return np.stack(
        [
            predictions.select([f"fold_{k}_{c}" for c in kind.prediction_columns]).to_numpy()
            for k in range(len(card.networks))
        ]
    )


def _metrics(
    kind: TargetKind,
    card: ModelCard,
    predictions: pl.DataFrame,
    scored: pl.DataFrame,
    internal: pl.DataFrame,
) -> pl.DataFrame:
    """Return :data:`EXTERNAL_METRIC_SCHEMA`."""
    resamples, seed = card.settings.bootstrap, card.settings.seed
    patients, own_patients = scored["patient"].to_list(), internal["patient"].to_list()
    prediction, own_prediction = (prediction_array(kind, rows) for rows in (scored, internal))
    hazards = card.baseline_hazards
    metrics: dict[str, Metric] = {
        **kind.metrics(scored, prediction),
        **kind.calibration_metrics(scored, prediction, _folds(kind, card, predictions), hazards),
    }
    # metrics of survival functions depend on times that the labels of each cohort decide
    own = kind.metrics(internal.select(*kind.label_columns), own_prediction)
    if not kind.has_survival_functions:  # risks that were held out have no common baseline hazard
        own |= kind.calibration_metrics(internal, own_prediction, own_prediction[None], hazards)
    scores = score(metrics, patients, resamples=resamples, seed=seed)
    differences = compare_cohorts(
        {name: metrics[name] for name in own},
        patients,
        own,
        own_patients,
        resamples=resamples,
        seed=seed,
    )
    rows = []
    for name, found in scores.items():
        inner: tuple[float | None, ...] = (None,) * 4
        if name in own:
            d = differences[name]
            inner = (float(own[name](np.ones((1, internal.height)))[0]), d.value, d.low, d.high)
        rows.append((name, found.value, found.low, found.high, *inner, undefined_note(found.value)))
    own_p = kind.p_values(internal, own_prediction, median_risk=card.median_risk)
    for name, p in kind.p_values(scored, prediction, median_risk=card.median_risk).items():
        rows.append((name, p, None, None, own_p[name], None, None, None, undefined_note(p)))
    return pl.DataFrame(rows, EXTERNAL_METRIC_SCHEMA, orient="row").fill_nan(None)


def _figures(
    kind: TargetKind,
    card: ModelCard,
    cohort: str,
    scored: pl.DataFrame,
    metrics: pl.DataFrame,
    subgroups: pl.DataFrame,
) -> dict[str, Figure]:
    primary = metrics.row(by_predicate=pl.col("metric") == kind.primary_metric, named=True)
    value = "undefined" if primary["value"] is None else f"{primary['value']:.2f}"
    rows = [(f"{cohort} (n = {scored.height})", primary["value"], primary["low"], primary["high"])]
    own = metrics_frame(card).row(
        by_predicate=(pl.col("model") == NETWORK)
        & (pl.col("split") == "cv")
        & (pl.col("metric") == kind.primary_metric),
        named=True,
    )
    rows.insert(0, (f"cross-validated (n = {own['units']})", own["value"], own["low"], own["high"]))
    rows += [
        (f"{r['column']} {r['group']} (n = {r['units']})", r["value"], r["low"], r["high"])
        for r in subgroups.filter(metric=kind.primary_metric).iter_rows(named=True)
    ]
    return {
        "evaluation": kind.figure(
            {NETWORK: scored.with_columns(fold=pl.lit(None, pl.Int64))},
            f"{card.target.name}, {cohort}: {kind.primary_name} {value}",
            median_risk=card.median_risk,
        ),
        "comparison": interval_figure(
            rows, label=f"{kind.primary_name}, 95 % interval", chance=kind.chance_level
        ),
    }


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

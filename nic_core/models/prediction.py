"""Predictions for new slides: compress as the model's grids were, then ask every fold.

A unit is what the model was trained on: a slide, or a patient with all of their slides. As in the
cross-validation's split ``test``, each fold's network sees ``crops_at_test`` crops in 8
orientations, a patient's slides count alike, and the folds are averaged (``ensemble``). Where a
grid is larger than the crop, the places depend on the slide's id: a renamed file moves them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from nic_core.compression.batch import Outcome, compress_slides
from nic_core.encoders.encoder import Encoder
from nic_core.encoders.inference import Card
from nic_core.grids import Grid, open_grid
from nic_core.maps.heatmaps import write_heatmap
from nic_core.models.crops import Crops
from nic_core.models.cross_validation import prediction_columns
from nic_core.models.explanation import explain
from nic_core.models.files import ModelCard, SlideModel
from nic_core.models.survival import median_survival
from nic_core.models.training import fitting_threads, predict_units
from nic_core.slides import SlideError, open_slide
from nic_core.store import atomic_file

GRIDS, HEATMAPS = "grids", "heatmaps"


class ModelMismatchError(ValueError):
    """An encoder or a grid is not of the kind that the model was trained on."""


class PatientsError(ValueError):
    """A table of patients cannot be used, or lacks a slide."""


@dataclass(frozen=True)
class Predicted:
    """What :func:`predict_slides` gives.

    Attributes
    ----------
    predictions
        That of :func:`predict_grids`, with ``failed`` (list of the unit's slides that could not
        be used) after ``slides``. A unit without any usable slide has nulls.
    slides
        What became of each slide, ``nic_core.compression.batch.BATCH_SCHEMA``.
    """

    predictions: pl.DataFrame
    slides: pl.DataFrame


def check_encoder(model: ModelCard, encoder: Card) -> None:
    """Refuse an encoder whose embeddings the model does not know.

    Raises
    ------
    ModelMismatchError
        Its weights, patch, um/px or number of embeddings are not those of the model's card.
    """
    _same(
        f"encoder '{encoder.name}'",
        {
            "weights": (encoder.weights_hash, model.weights_hash),
            "patch": (encoder.patch, model.patch),
            "um/px": (encoder.mpp, model.mpp),
            "numbers a embedding": (encoder.embedding_size, model.embedding_size),
        },
        f"give encoder '{model.encoder}', or train the model on this one's grids",
    )


def check_times(model: ModelCard, times: Sequence[float]) -> None:
    """Refuse times of which the model has nothing to say.

    Raises
    ------
    ValueError
        The target is not survival, or a time is negative or there twice.
    """
    if len(times) and model.target.kind != "survival":
        raise ValueError(
            f"target '{model.target.name}' ({model.target.kind}) has no survival at a time; "
            "leave the times out"
        )
    if wrong := [time for time in times if not time >= 0]:
        raise ValueError(f"time {wrong[0]:g}: give times from 0 on")
    if len({f"{time:g}" for time in times}) < len(times):
        raise ValueError("a time is given twice (six digits count); leave one out")


def check_grid(model: ModelCard, grid: Grid) -> None:
    """Refuse a grid that was not made as the model's were.

    Raises
    ------
    ModelMismatchError
        The encoder's weights, patch, um/px, numbers a embedding, precision or reading differ.
    """
    about = grid.provenance
    _same(
        f"grid of slide '{about.slide}'",
        {
            "weights": (about.weights_hash, model.weights_hash),
            "patch": (about.patch, model.patch),
            "um/px": (about.mpp, model.mpp),
            "numbers a embedding": (grid.shape[0], model.embedding_size),
            "precision": (about.precision, model.grids.precision),
            "reading": (about.reading, model.grids.reading),
        },
        f"compress the slide with encoder '{model.encoder}' as the model's card says",
    )


def predict_grids(
    model: SlideModel,
    units: pl.DataFrame,
    grids: Callable[[str], Grid],
    *,
    times: Sequence[float] = (),
) -> pl.DataFrame:
    """Predict units from their slides' grids.

    Parameters
    ----------
    units
        ``unit``, ``patient`` and ``slides`` (list of at least one id).
    grids
        Gives the grid of a slide.
    times
        Of survival: when to give the probability to be alive, in the target's unit.

    Returns
    -------
    polars.DataFrame
        ``unit``, ``patient``, ``slides``; ``in_training``: the model was trained on one of the slides,
        so its prediction says nothing about how good the model is; the columns of
        :func:`nic_core.models.cross_validation.prediction_columns` for the ensemble, then for each
        fold with the prefix ``fold_<k>_``. After the ensemble's, of classification ``class``
        (the most probable one), of survival ``risk_group``: ``high`` above the training cohort's
        median risk, else ``low``; ``median_survival``, the time at which the mean of the folds'
        survival functions falls to one half (null where it does not before the last event in
        training); and ``survival_<time>`` for each of ``times``, the mean of the folds', which
        ``fold_<k>_survival_<time>`` are.

    Raises
    ------
    ModelMismatchError
        A grid does not fit the model.
    ValueError
        A grid has no tissue, or the target has no survival at ``times``.
    """
    card = model.card
    check_times(card, times)
    trained_on, in_training = set(card.training.slides), []
    for slides in units["slides"]:
        opened = [grids(slide) for slide in slides]
        for slide, grid in zip(slides, opened, strict=True):
            check_grid(card, grid)
            if not grid.valid.any():
                raise ValueError(f"slide '{slide}': its grid has no tissue cell; leave it out")
        in_training.append(any(grid.provenance.slide_identity in trained_on for grid in opened))
    columns = prediction_columns(card.target)
    if units.is_empty():
        folds = np.empty((len(model.networks), 0, len(columns)))
    else:
        with fitting_threads(card.settings):
            folds = np.stack(
                [
                    predict_units(
                        network,
                        units,
                        Crops(grids, network.normalise, card.settings.crop),
                        count=card.settings.crops_at_test,
                        seed=card.settings.seed,
                    )
                    for network in model.networks
                ]
            )
    ensemble = folds.mean(0)
    later = [f"survival_{time:g}" for time in times]
    alive = [
        baseline.survival(risk[:, 0], np.asarray(times, np.float64))
        for baseline, risk in zip(card.baselines, folds, strict=bool(card.baselines))
    ]
    return units.select("unit", "patient", "slides").with_columns(
        pl.Series("in_training", in_training, pl.Boolean),
        *_named(columns, ensemble),
        *_conclusion(card, ensemble),
        *_median(card, folds),
        *_named(later, np.mean(alive, axis=0) if alive else ensemble),
        *(s for k, fold in enumerate(folds) for s in _named(columns, fold, f"fold_{k}_")),
        *(s for k, fold in enumerate(alive) for s in _named(later, fold, f"fold_{k}_")),
    )


def predict_slides(
    model: SlideModel,
    encoder: Encoder,
    slides: Mapping[str, Path],
    out: Path | None = None,
    *,
    patients: Mapping[str, str] | None = None,
    times: Sequence[float] = (),
    mpp: float | None = None,
    device: str = "auto",
    heatmaps: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> Predicted:
    """Compress slides as the model's grids were and predict them.

    A slide that cannot be used does not stop the others; a patient is predicted from the slides
    that can.

    Parameters
    ----------
    slides
        Slide id to file, as of :func:`nic_core.compression.batch.slides_by_id`.
    out
        Folder to keep ``grids/<slide>.zarr`` in, which are used again while they are up to date,
        and ``heatmaps/<target>/<slide>/``. None: nothing is kept.
    patients
        Slide id to patient. None: of a model at patient level each slide counts as a patient of
        its own.
    times
        As in :func:`predict_grids`.
    mpp
        um/px at level 0 of all slides; overrides the files'.
    device
        For the encoder: ``auto``, ``cpu`` or ``cuda``. The networks work on the CPU.
    heatmaps
        Write what speaks for each slide's prediction; needs ``out``.
    progress, on_outcome
        As in :func:`nic_core.compression.batch.compress_slides`.

    Raises
    ------
    ModelMismatchError
        The encoder is not the model's.
    PatientsError
        ``patients`` lacks a slide.
    ValueError
        Heatmaps have no place, or the target has no survival at ``times``.
    StoreError
        ``out`` cannot be written.
    """
    card = model.card
    check_encoder(card, encoder.card)
    check_times(card, times)
    if heatmaps and out is None:
        raise ValueError("heatmaps are files: give a folder for them")
    wanted = _units(card, slides, patients)
    prepared = encoder.prepare(device, card.grids.precision, card.grids.reading)
    with ExitStack() as stack:
        place = out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        report = compress_slides(
            slides,
            prepared,
            place / GRIDS,
            mpp=mpp,
            tissue=card.grids.tissue,
            progress=progress,
            on_outcome=on_outcome,
        )
        report = _fail(
            report,
            report.filter(cells=0)["slide"].to_list(),
            "no cell of tissue",
            "look at its tissue with 'nic tissue'",
        )

        def grid(slide: str) -> Grid:
            return open_grid(place / GRIDS / f"{slide}.zarr")

        if heatmaps and out is not None:
            for slide in _usable(report):
                try:
                    _write_heat(
                        model,
                        grid(slide),
                        slides[slide],
                        out / HEATMAPS / card.target.name / slide,
                        mpp,
                    )
                except SlideError as error:
                    report = _fail(report, [slide], error.reason, error.remedy)
        good = pl.element().is_in(_usable(report).implode())
        parted = wanted.with_columns(
            pl.col("slides").list.eval(pl.element().filter(good)),
            pl.col("slides").list.eval(pl.element().filter(~good)).alias("failed"),
        )
        usable = parted.filter(pl.col("slides").list.len() > 0)
        found = predict_grids(model, usable, grid, times=times)
    predictions = parted.join(
        found.drop("patient", "slides"), on="unit", how="left", maintain_order="left"
    )
    return Predicted(predictions, report)


def write_predictions(folder: Path, target: str, predictions: pl.DataFrame) -> Path:
    """Write ``predictions-<target>.parquet``, and the same as CSV, lists of slides joined by ``;``.

    Returns
    -------
    The CSV.

    Raises
    ------
    StoreError
        They cannot be written.
    """
    table = folder / f"predictions-{target}.csv"
    with atomic_file(table.with_suffix(".parquet")) as path:
        predictions.write_parquet(path)
    with atomic_file(table) as path:
        predictions.with_columns(pl.col("slides", "failed").list.join(";")).write_csv(path)
    return table


def read_patients(path: Path) -> dict[str, str]:
    """Patients by slide, from a CSV table with the columns ``slide`` and ``patient``.

    Raises
    ------
    PatientsError
        It cannot be read, lacks a column, leaves a field empty or has a slide twice.
    """
    try:
        # as text: an id such as 007 must keep its zeros
        table = pl.read_csv(path, infer_schema=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise PatientsError(f"{path}: cannot be read ({error})") from error
    missing = [name for name in ("slide", "patient") if name not in table.columns]
    if missing:
        raise PatientsError(
            f"{path}: no column '{missing[0]}'; it has {', '.join(table.columns)}; "
            "give a table with the columns slide and patient"
        )
    table = table.select("slide", "patient")
    for bad, what in (
        (table.filter(pl.any_horizontal(pl.all().is_null())), "an empty field"),
        (table.filter(pl.col("slide").is_duplicated()), "more than one row"),
    ):
        if bad.height:
            raise PatientsError(f"{path}: slide '{bad['slide'][0]}' has {what}; keep one whole row")
    return dict(table.rows())


def _units(
    card: ModelCard, slides: Mapping[str, Path], patients: Mapping[str, str] | None
) -> pl.DataFrame:
    """``unit``, ``patient``, ``slides``, in the order of the slides."""
    if patients is not None and (unknown := [s for s in slides if s not in patients]):
        raise PatientsError(f"slide '{unknown[0]}' has no patient in the table of patients; add it")
    table = pl.DataFrame(
        {"slides": list(slides), "patient": [patients[s] if patients else None for s in slides]},
        schema={"slides": pl.String, "patient": pl.String},
    )
    by_patient = card.target.level == "patient" and patients is not None
    unit = pl.col("patient" if by_patient else "slides").alias("unit")
    return table.group_by(unit, maintain_order=True).agg(
        pl.col("patient").first(), pl.col("slides").sort()
    )


def _conclusion(card: ModelCard, ensemble: NDArray[np.float64]) -> list[pl.Series]:
    if card.target.kind == "classification":
        names = [card.target.classes[i] for i in ensemble.argmax(1)]
        return [pl.Series("class", names, pl.String)]
    if card.target.kind == "survival":
        groups = ["high" if risk > card.median_risk else "low" for risk in ensemble[:, 0]]
        return [pl.Series("risk_group", groups, pl.String)]
    return []


def _median(card: ModelCard, folds: NDArray[np.float64]) -> list[pl.Series]:
    """Of predictions (folds, units, outputs)."""
    if card.target.kind != "survival":
        return []
    median = median_survival(card.baselines, folds[..., 0])
    return [pl.Series("median_survival", median, pl.Float64).fill_nan(None)]


def _named(columns: list[str], values: NDArray[np.float64], prefix: str = "") -> list[pl.Series]:
    return [pl.Series(prefix + name, values[:, i], pl.Float64) for i, name in enumerate(columns)]


def _write_heat(model: SlideModel, grid: Grid, path: Path, folder: Path, mpp: float | None) -> None:
    card = model.card
    heat = explain(model.networks, grid, card.target, crop=card.settings.crop)
    with open_slide(path, mpp=mpp) as slide:
        write_heatmap(folder, heat, grid.provenance, slide, name=card.target.name)


def _usable(report: pl.DataFrame) -> pl.Series:
    return report.filter(pl.col("status").is_in(["compressed", "up to date"]))["slide"]


def _fail(report: pl.DataFrame, slides: list[str], reason: str, remedy: str) -> pl.DataFrame:
    def instead(column: str, value: str) -> pl.Expr:
        return pl.when(failed).then(pl.lit(value)).otherwise(column).alias(column)

    failed = pl.col("slide").is_in(slides)
    return report.with_columns(
        instead("status", "failed"), instead("reason", reason), instead("remedy", remedy)
    )


def _same(what: str, pairs: Mapping[str, tuple[object, object]], remedy: str) -> None:
    different = [
        f"{name} {_short(has)}, not {_short(needed)}"
        for name, (has, needed) in pairs.items()
        if has != needed
    ]
    if different:
        raise ModelMismatchError(f"{what} does not fit the model: {', '.join(different)}; {remedy}")


def _short(value: object) -> str:
    """A hash by its first digits."""
    return value[:12] if isinstance(value, str) else str(value)

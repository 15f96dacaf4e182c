"""Prediction of new slides: compress them like the training slides, then apply every fold.

A unit is a slide, or a patient with all of their slides, as in training. As for the split ``test``
of the cross-validation, each fold's network gets ``crops_at_test`` crops in 8 orientations, the
slides of a patient have equal weights, and the prediction is the mean of the folds (the ensemble).
Where a grid is larger than the crop, the centres of crops depend on the slide's id: renaming a file
changes them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from nic_core.cohort import CohortError
from nic_core.cohort.tables import read_table, require_columns
from nic_core.compression.batch import Outcome, compress_slides
from nic_core.encoders.encoder import Encoder
from nic_core.encoders.inference import Card
from nic_core.grids import Grid, open_grid
from nic_core.grids.moments import grid_moments
from nic_core.maps.heatmaps import write_heatmap
from nic_core.models.crops import Crops
from nic_core.models.explanation import explain, heat_caption
from nic_core.models.files import ModelCard, SlideModel
from nic_core.models.kinds import kind_of
from nic_core.models.kinds.base import named_series
from nic_core.models.training import fitting_threads, predict_units
from nic_core.slides import SlideError, SlideSource, open_slide
from nic_core.slides.remote import SlidePath
from nic_core.store import atomic_file

GRIDS, HEATMAPS = "grids", "heatmaps"


class ModelMismatchError(ValueError):
    """An encoder or a grid does not fit the model."""


class PatientsError(ValueError):
    """A table of patients is invalid or does not contain a slide."""


@dataclass(frozen=True)
class Predicted:
    """The result of :func:`predict_slides`.

    Attributes
    ----------
    predictions
        The table of :func:`predict_grids`, with ``failed`` (list of the unit's slides that could
        not be used) after ``slides``. A unit without a usable slide has nulls.
    slides
        Outcome of each slide, ``nic_core.compression.batch.BATCH_SCHEMA``.
    """

    predictions: pl.DataFrame
    slides: pl.DataFrame


def check_encoder(model: ModelCard, encoder: Card) -> None:
    """Check that an encoder is the one that the model was trained with.

    Raises
    ------
    ModelMismatchError
        Its weights, patch size, um/px or embedding size differ from the model's card.
    """
    _check_equal(
        f"encoder '{encoder.name}'",
        {
            "weights": (encoder.weights_hash, model.weights_hash),
            "patch": (encoder.patch, model.patch),
            "um/px": (encoder.mpp, model.mpp),
            "embedding size": (encoder.embedding_size, model.embedding_size),
        },
        f"use encoder '{model.encoder}', or train a model on grids of this encoder",
    )


def check_times(model: ModelCard, times: Sequence[float]) -> None:
    """Check the times at which survival probabilities are requested.

    Raises
    ------
    ValueError
        The target is not survival, a time is negative, or two times are equal.
    """
    if len(times) and not kind_of(model.target).has_survival_functions:
        raise ValueError(
            f"target '{model.target.name}' is not a survival target, so it has no survival "
            "probability at a time; leave the times out"
        )
    if wrong := [time for time in times if not time >= 0]:
        raise ValueError(f"time {wrong[0]:g} is negative; give times from 0 on")
    if len({f"{time:g}" for time in times}) < len(times):
        raise ValueError("two times are equal in their first six digits; leave one out")


def check_grid(model: ModelCard, grid: Grid) -> None:
    """Check that a grid was compressed like the model's training grids.

    Raises
    ------
    ModelMismatchError
        The encoder's weights, patch size, um/px, stride, embedding size, precision, reading or
        colours differ.
    """
    about = grid.provenance
    # features of other software: the um/px is that of each slide's patches, and differs a little
    mpp = {} if model.grids.precision is None else {"um/px": (about.mpp, model.mpp)}
    _check_equal(
        f"grid of slide '{about.slide}'",
        {
            "weights": (about.weights_hash, model.weights_hash),
            "patch": (about.patch, model.patch),
            **mpp,
            "stride": (about.stride, model.stride),
            "embedding size": (grid.shape[0], model.embedding_size),
            "precision": (about.precision, model.grids.precision),
            "reading": (about.reading, model.grids.reading),
            "colours": (about.colours, model.grids.colours),
        },
        f"compress the slide with encoder '{model.encoder}' and the settings of the model's card",
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
        Columns ``unit``, ``patient`` and ``slides`` (list of at least one id).
    grids
        Opens the grid of a slide.
    times
        For survival: times at which survival probabilities are predicted, in the target's unit.

    Returns
    -------
    polars.DataFrame
        In this order:

        - ``unit``, ``patient``, ``slides``;
        - ``in_training``: the model was trained on one of the slides, so the prediction does not
          show how accurate the model is;
        - ``distance``: distance of the slides to the training cohort
          (:mod:`nic_core.models.distance`), of several slides the largest, and
          ``distance_percentile``, its percentile among held-out training slides;
        - the ensemble's predictions (:attr:`TargetKind.prediction_columns`);
        - classification: ``class``, the most probable class;
        - survival: ``risk_group``, ``high`` above the training cohort's median risk, else
          ``low``; ``median_survival``, the time at which the folds' mean survival function falls
          to one half (null if it does not before the last event in training); and
          ``survival_<time>``, the mean of the folds' survival probabilities, for each of
          ``times``;
        - each fold's predictions with the prefix ``fold_<k>_``, and
          ``fold_<k>_survival_<time>``.

    Raises
    ------
    ModelMismatchError
        A grid does not fit the model.
    ValueError
        A grid has no tissue, or ``times`` are invalid (:func:`check_times`).
    """
    card, kind = model.card, kind_of(model.card.target)
    check_times(card, times)
    trained_on = dict(zip(card.training.slides, model.reference.held_out, strict=True))
    in_training: list[bool] = []
    distances: list[float] = []
    for slides in units["slides"]:
        opened = [grids(slide) for slide in slides]
        for slide, grid in zip(slides, opened, strict=True):
            check_grid(card, grid)
            if not grid.valid.any():
                raise ValueError(
                    f"slide '{slide}': its grid has no tissue cell; leave the slide out"
                )
        in_training.append(any(grid.provenance.slide_identity in trained_on for grid in opened))
        distances.append(
            max(
                float(trained_on[grid.provenance.slide_identity])
                if grid.provenance.slide_identity in trained_on
                else model.reference.distance(grid_moments(slide, grid.embeddings, grid.valid).mean)
                for slide, grid in zip(slides, opened, strict=True)
            )
        )
    columns = kind.prediction_columns
    if units.is_empty():
        folds = np.empty((len(model.networks), 0, len(columns)))
    else:
        with fitting_threads(card.crop):
            folds = np.stack(
                [
                    predict_units(
                        network,
                        units,
                        Crops(grids, network.normalise, card.crop),
                        count=card.settings.crops_at_test,
                        seed=card.settings.seed,
                    )
                    for network in model.networks
                ]
            )
        for fold, recalibration in enumerate(card.recalibrations):
            folds[fold] = kind.recalibrated(folds[fold], recalibration)
    time_columns = [f"survival_{time:g}" for time in times]
    survival = [
        hazard.survival(risk[:, 0], np.asarray(times, np.float64))
        for hazard, risk in zip(card.baseline_hazards, folds, strict=bool(card.baseline_hazards))
    ]
    mean_survival = np.mean(survival, axis=0) if survival else np.empty((units.height, 0))
    return units.select("unit", "patient", "slides").with_columns(
        pl.Series("in_training", in_training, pl.Boolean),
        pl.Series("distance", distances, pl.Float64),
        pl.Series("distance_percentile", map(model.reference.percentile, distances), pl.Float64),
        *named_series(columns, folds.mean(0)),
        *kind.conclusions(folds, card.median_risk, card.baseline_hazards),
        *named_series(time_columns, mean_survival),
        *(s for k, fold in enumerate(folds) for s in named_series(columns, fold, f"fold_{k}_")),
        *(
            s
            for k, fold in enumerate(survival)
            for s in named_series(time_columns, fold, f"fold_{k}_")
        ),
    )


def compress_for_model(
    model: ModelCard,
    encoder: Encoder,
    slides: Mapping[str, SlideSource],
    folder: Path,
    *,
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> pl.DataFrame:
    """Compress slides like the training slides of a model, into ``folder/<slide>.zarr``.

    Grids that exist are reused while they are up to date.

    Parameters
    ----------
    slides, progress, on_outcome
        As in :func:`nic_core.compression.batch.compress_slides`.
    device
        Device of the encoder: ``auto``, ``cpu`` or ``cuda``.

    Returns
    -------
    polars.DataFrame
        Outcome of each slide, ``nic_core.compression.batch.BATCH_SCHEMA``. A slide without a tissue
        cell has failed.

    Raises
    ------
    ModelMismatchError
        The encoder does not fit the model, or the model's grids are features of other software.
    """
    check_encoder(model, encoder.card)
    precision, reading, colours = model.grids.precision, model.grids.reading, model.grids.colours
    if precision is None or reading is None or colours is None:
        raise ModelMismatchError(
            f"the model of '{model.target.name}' was trained on features of other software "
            f"(encoder '{model.encoder}'), which cannot be computed for another slide"
        )
    report = compress_slides(
        slides,
        encoder.prepare(device, precision, reading),
        folder,
        colours=colours,
        tissue=model.grids.tissue,
        stride=model.stride,
        progress=progress,
        on_outcome=on_outcome,
    )
    return _fail(
        report,
        report.filter(cells=0)["slide"].to_list(),
        "no cell has tissue",
        "check the tissue mask with 'nic tissue'",
    )


def predict_slides(
    model: SlideModel,
    encoder: Encoder,
    slides: Mapping[str, SlideSource],
    out: Path | None = None,
    *,
    patients: Mapping[str, str] | None = None,
    times: Sequence[float] = (),
    device: str = "auto",
    heatmaps: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> Predicted:
    """Compress slides like the model's training slides, and predict them.

    A slide that cannot be used does not stop the others; a patient is predicted from the usable
    slides.

    Parameters
    ----------
    slides
        Slide id to the slide's file and how it is read, as from
        :func:`nic_core.compression.batch.slides_by_id`.
    out
        Folder for ``grids/<slide>.zarr``, which are reused while they are up to date, and
        ``heatmaps/<target>/<slide>/``. None: temporary files only.
    patients
        Slide id to patient. None: a model at patient level treats each slide as one patient.
    times
        As in :func:`predict_grids`.
    device
        Device of the encoder: ``auto``, ``cpu`` or ``cuda``. The networks run on the CPU.
    heatmaps
        Write the heatmap of each slide's prediction; requires ``out``.
    progress, on_outcome
        As in :func:`nic_core.compression.batch.compress_slides`.

    Raises
    ------
    ModelMismatchError
        The encoder does not fit the model.
    PatientsError
        ``patients`` does not contain a slide.
    ValueError
        ``heatmaps`` without ``out``, or ``times`` are invalid (:func:`check_times`).
    StoreError
        ``out`` cannot be written.
    """
    card = model.card
    check_times(card, times)
    if heatmaps and out is None:
        raise ValueError("heatmaps are files: give the folder 'out' too")
    units = _units(card, slides, patients)
    with ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        report = compress_for_model(
            card,
            encoder,
            slides,
            folder / GRIDS,
            device=device,
            progress=progress,
            on_outcome=on_outcome,
        )

        def grid(slide: str) -> Grid:
            return open_grid(folder / GRIDS / f"{slide}.zarr")

        if heatmaps and out is not None:
            for slide in usable_slides(report):
                try:
                    _write_explanation(
                        model,
                        grid(slide),
                        slides[slide].path,
                        out / HEATMAPS / card.target.name / slide,
                    )
                except SlideError as error:
                    report = _fail(report, [slide], error.reason, error.remedy)
        good = pl.element().is_in(usable_slides(report).implode())
        divided = units.with_columns(
            pl.col("slides").list.eval(pl.element().filter(good)),
            pl.col("slides").list.eval(pl.element().filter(~good)).alias("failed"),
        )
        usable = divided.filter(pl.col("slides").list.len() > 0)
        found = predict_grids(model, usable, grid, times=times)
    predictions = divided.join(
        found.drop("patient", "slides"), on="unit", how="left", maintain_order="left"
    )
    return Predicted(predictions, report)


def write_predictions(folder: Path, target: str, predictions: pl.DataFrame) -> Path:
    """Write ``predictions-<target>.parquet``, and the same table as CSV.

    In the CSV, lists of slides are joined by ``;``.

    Returns
    -------
    Path of the CSV file.

    Raises
    ------
    StoreError
        The files cannot be written.
    """
    table = folder / f"predictions-{target}.csv"
    with atomic_file(table.with_suffix(".parquet")) as path:
        predictions.write_parquet(path)
    with atomic_file(table) as path:
        predictions.with_columns(pl.col("slides", "failed").list.join(";")).write_csv(path)
    return table


def read_patients(path: Path) -> dict[str, str]:
    """Read a CSV table with the columns ``slide`` and ``patient``; return slide id to patient.

    Raises
    ------
    PatientsError
        The table cannot be read, a column is missing, a cell is empty, or a slide has two rows.
    """
    try:
        table = read_table(path, "table of patients")
        require_columns(table, ("slide", "patient"), path, "table of patients")
    except CohortError as error:
        raise PatientsError(str(error)) from error
    table = table.select("slide", "patient")
    for invalid, problem in (
        (table.filter(pl.any_horizontal(pl.all().is_null())), "an empty cell"),
        (table.filter(pl.col("slide").is_duplicated()), "more than one row"),
    ):
        if invalid.height:
            raise PatientsError(
                f"{path}: slide '{invalid['slide'][0]}' has {problem}; keep one complete row"
            )
    return dict(table.rows())


def _units(
    card: ModelCard, slides: Iterable[str], patients: Mapping[str, str] | None
) -> pl.DataFrame:
    """Return ``unit``, ``patient`` and ``slides`` of the units, in the order of the slides."""
    if patients is not None and (unknown := [s for s in slides if s not in patients]):
        raise PatientsError(f"slide '{unknown[0]}' is not in the table of patients; add a row")
    table = pl.DataFrame(
        {"slides": list(slides), "patient": [patients[s] if patients else None for s in slides]},
        schema={"slides": pl.String, "patient": pl.String},
    )
    by_patient = card.target.level == "patient" and patients is not None
    unit = pl.col("patient" if by_patient else "slides").alias("unit")
    return table.group_by(unit, maintain_order=True).agg(
        pl.col("patient").first(), pl.col("slides").sort()
    )


def _write_explanation(model: SlideModel, grid: Grid, path: SlidePath, folder: Path) -> None:
    """Write the heatmap of a slide, the file at ``path``."""
    card = model.card
    heat = explain(model.networks, grid, card.target, crop=card.crop)
    about = grid.provenance
    with open_slide(path, mpp=about.slide_mpp, image=about.slide_image) as slide:
        write_heatmap(
            folder,
            heat,
            grid.provenance,
            slide,
            name=card.target.name,
            caption=heat_caption(card.target),
        )


def usable_slides(report: pl.DataFrame) -> pl.Series:
    """Return the slides that have a grid."""
    return report.filter(pl.col("status").is_in(["compressed", "up to date"]))["slide"]


def _fail(report: pl.DataFrame, slides: list[str], reason: str, remedy: str) -> pl.DataFrame:
    """Mark slides as failed in the report of the compression."""

    def instead(column: str, value: str) -> pl.Expr:
        return pl.when(failed).then(pl.lit(value)).otherwise(column).alias(column)

    failed = pl.col("slide").is_in(slides)
    return report.with_columns(
        instead("status", "failed"), instead("reason", reason), instead("remedy", remedy)
    )


def _check_equal(what: str, pairs: Mapping[str, tuple[object, object]], remedy: str) -> None:
    """Raise ``ModelMismatchError`` unless each property has the value that the model requires."""
    different = [
        f"{name} {_short(found)}, not {_short(required)}"
        for name, (found, required) in pairs.items()
        if found != required
    ]
    if different:
        raise ModelMismatchError(f"{what} does not fit the model: {', '.join(different)}; {remedy}")


def _short(value: object) -> str:
    """Shorten a hash to its first digits."""
    return value[:12] if isinstance(value, str) else str(value)

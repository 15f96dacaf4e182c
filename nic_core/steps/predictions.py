"""Champions, prediction plans, predictions and their report: every slide scored by a target's
registered model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, ValidationError

from nic_core.cohort import Cohort, CohortError, Geometry, SurvivalTarget, Target
from nic_core.encoders.files import read_card
from nic_core.encoders.folder_names import CARD as ENCODER_CARD
from nic_core.grids import Grid, open_grid
from nic_core.maps.heatmaps import EXTREMES, OVERLAY, PATCHES, write_heatmap
from nic_core.models.cross_validation import NETWORK
from nic_core.models.explanation import explain, heat_caption, held_out_networks
from nic_core.models.files import ModelCard, ModelFileError, SlideModel, load_model
from nic_core.models.kinds import kind_of
from nic_core.models.prediction import predict_grids
from nic_core.pictures import read_picture
from nic_core.steps.grids import read_grid_manifest
from nic_core.steps.quality_report import SLIDES as QUALITY
from nic_core.steps.slide_index import digest, open_indexed, read_slide_index, used_slides
from nic_core.steps.slide_models import PREDICTIONS
from nic_core.store import (
    GridKey,
    PredictionKey,
    Store,
    atomic_file,
    atomic_folder,
    remove_product,
)
from nic_core.types import Pixels

VERSION, PREDICTION, HEATMAP = "version.json", "prediction.parquet", "heatmap"
PLAN_SCHEMA = pl.Schema(
    {
        "slide": pl.String(),
        "unit": pl.String(),  # of the target: the slide, or its patient
        "patient": pl.String(),
        "slides": pl.List(pl.String()),  # slides of the unit that it is predicted from
        "failed": pl.List(pl.String()),  # slides of the unit that cannot be used
        "encoder": pl.String(),  # encoder of the grids
        "problems": pl.String(),  # of the slide in the quality report; empty: none
        "reason": pl.String(),  # why the slide is not predicted; null: it is
        "version": pl.String(),  # digest of what the prediction depends on; null: unknown for now
    }
)


class ChampionVersion(BaseModel):
    """A registered model version: ``version.json`` in the folder of a champion."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str  # of the registered model
    version: int
    run: str  # MLflow run: numbers start again in a new registry
    encoder: str

    def __str__(self) -> str:
        return f"version {self.version} of {self.name}"


@dataclass(frozen=True)
class StoredChampion:
    """The registered model that predicts a target, loaded from the store.

    Attributes
    ----------
    folds
        Patient to the fold in which they were held out; empty if the model was trained on another
        cohort.
    """

    version: ChampionVersion
    model: SlideModel
    folds: Mapping[str, int]

    @property
    def digest(self) -> str:
        """Digest of the content of the model and of its version."""
        return digest(self.model.card.model_dump_json(), self.version)


@dataclass(frozen=True)
class PredictionPlan:
    """The result of :func:`make_prediction_plan`.

    Attributes
    ----------
    table
        One row per slide of the index, :data:`PLAN_SCHEMA`.
    problem
        Why no slide of the target can be predicted now, and the remedy; None: slides can be.
    """

    table: pl.DataFrame
    problem: str | None


@dataclass(frozen=True)
class Prediction:
    """The result of :func:`make_prediction`.

    Attributes
    ----------
    row
        The prediction of the slide's unit, one row: ``target``, ``model_version``, ``encoder``,
        and the columns of :func:`~nic_core.models.prediction.predict_grids` with ``failed`` after
        ``slides``. ``in_training`` is also true if the model was trained on another slide of the
        patient.
    fold
        The fold whose network gives the heatmap; None: the mean of all networks.
    overlay
        The heat over a thumbnail, uint8 (H, W, 3); None if the slide has no tissue cell.
    patches
        The patches of highest and of lowest heat, uint8 (H, W, 3); None as above.
    extremes
        Their places, :data:`nic_core.maps.heatmaps.EXTREME_SCHEMA`; None as above.
    problems
        Problems of the slide in the quality report; empty: none.
    version
        Digest of row and heatmap.
    """

    row: pl.DataFrame
    fold: int | None
    overlay: Pixels | None
    patches: Pixels | None
    extremes: pl.DataFrame | None
    problems: str
    version: str


def make_champion(store: Store, target: str, version: ChampionVersion, folder: Path) -> ModelCard:
    """Copy the folder of a registered model into the store; return the model's card.

    Raises
    ------
    CohortError
        The model predicts another target.
    ModelFileError
        The folder holds no model, or one of another format.
    """
    card = load_model(folder).card
    if card.target.name != target:
        raise CohortError(
            f"{version} predicts target '{card.target.name}', not '{target}'; set the alias "
            "'champion' on another version"
        )
    with atomic_folder(store.champion(target)) as new:
        shutil.copytree(folder, new, dirs_exist_ok=True)
        (new / VERSION).write_text(version.model_dump_json(indent=2) + "\n")
    return card


def remove_champion(store: Store, target: str) -> None:
    """Remove the champion of a target from the store, if there is one."""
    if store.champion(target).exists():
        remove_product(store.champion(target))


def read_champion_version(store: Store, target: str) -> ChampionVersion | None:
    """Return the version of the champion in the store; None without a champion.

    Raises
    ------
    ModelFileError
        The file of the version is missing or damaged.
    """
    folder = store.champion(target)
    if not folder.exists():
        return None
    try:
        return ChampionVersion.model_validate_json((folder / VERSION).read_bytes())
    except (OSError, ValidationError) as error:
        raise ModelFileError(
            f"{folder / VERSION} cannot be read; materialize 'champion' of '{target}' again"
        ) from error


def load_champion(cohort: Cohort, store: Store, target: str) -> StoredChampion | None:
    """Load the champion of a target from the store; None without a champion.

    Raises
    ------
    ModelFileError
        A file of the champion is missing or damaged.
    """
    version = read_champion_version(store, target)
    if version is None:
        return None
    folder = store.champion(target)
    model = load_model(folder)
    folds: dict[str, int] = {}
    if model.card.training.name == cohort.name:
        held_out = pl.read_parquet(folder / PREDICTIONS, glob=False).filter(model=NETWORK)
        folds = dict(held_out.drop_nulls("fold").select("patient", "fold").iter_rows())
    return StoredChampion(version, model, folds)


def make_prediction_plan(cohort: Cohort, store: Store, target: str) -> PredictionPlan:
    """List what each slide of the index is predicted from, or why it is not; write the list.

    A unit at patient level is predicted from all slides of the patient with a tissue cell, as in
    training. Excluded slides are not predicted. While the store's grids are not those of the
    champion's encoder, ``version`` is null, so present predictions stay as they are.

    Raises
    ------
    CohortError
        The slide index, or the grid manifest of the champion's encoder, does not exist yet.
    ModelFileError
        A file of the champion is missing or damaged.
    """
    index, entry = read_slide_index(store), cohort.target(target)
    champion = load_champion(cohort, store, target)
    problem, encoder = encoder_of_champion(cohort, store, entry, champion)
    hashes: dict[str, tuple[str | None, int]] = {}
    if encoder is not None:
        manifest = read_grid_manifest(store, encoder)
        hashes = {slide: (hash_, cells) for slide, hash_, cells in manifest.iter_rows()}
    problems, by_patient = _quality_problems(store), entry.level == "patient"
    slides_of: dict[str, list[str]] = {}
    for slide, patient in used_slides(index).select("slide", "patient").iter_rows():
        slides_of.setdefault(patient, []).append(slide)
    rows = []
    for slide, patient, exclude in index.select("slide", "patient", "exclude").iter_rows():
        unit = patient if by_patient else slide
        members = slides_of.get(patient, []) if by_patient else [slide]
        usable = [member for member in members if hashes.get(member, (None, 0))[1] > 0]
        hash_, _ = hashes.get(slide, (None, 0))
        reason, known = problem, champion is None
        if exclude is not None:
            reason, known = f"the slide is excluded: {exclude}", True
        elif problem is None and hash_ is None:
            reason, known = f"the slide has no grid of encoder '{encoder}'", False
        elif problem is None:
            reason, known = None if usable else "its grid has no tissue cell", True
        version = digest(
            champion.digest if champion is not None else None,
            [(member, hashes[member][0]) for member in usable],
            sorted(set(members) - set(usable)),
            (unit, slide, patient, reason, problems.get(slide, "")),
            prediction_times(entry),
        )
        rows.append(
            {
                "slide": slide,
                "unit": unit,
                "patient": patient,
                "slides": usable,
                "failed": sorted(set(members) - set(usable)),
                "encoder": encoder,
                "problems": problems.get(slide, ""),
                "reason": reason,
                "version": version if known else None,
            }
        )
    table = pl.DataFrame(rows, schema=PLAN_SCHEMA)
    with atomic_file(store.prediction_plan(target)) as path:
        table.write_parquet(path)
    return PredictionPlan(table, problem)


def prediction_times(target: Target) -> tuple[float, ...]:
    """Return the times at which a target's predictions state the probability of survival."""
    return target.times if isinstance(target, SurvivalTarget) else ()


def planned(store: Store, key: PredictionKey) -> dict[str, object]:
    """Return the row of a slide in the plan of a target.

    Raises
    ------
    CohortError
        The plan does not exist, or lacks the slide.
    """
    path = store.prediction_plan(key.champion)
    rows = (
        pl.read_parquet(path, glob=False).filter(slide=key.slide)
        if path.exists()
        else pl.DataFrame(schema=PLAN_SCHEMA)
    )
    if rows.is_empty():
        raise CohortError(
            f"slide '{key.slide}' is not in the prediction plan of target '{key.champion}'; "
            "materialize 'prediction_plan' again"
        )
    return rows.row(0, named=True)


def make_prediction(
    cohort: Cohort,
    store: Store,
    champion: StoredChampion,
    key: PredictionKey,
    row: Mapping[str, object],
) -> Prediction:
    """Predict the unit of a slide and compute the heatmap of the slide; write both.

    The heatmap is that of all networks, or, for a patient that the model was trained on, that of
    the network that was not trained on them.

    Parameters
    ----------
    row
        Row of the slide in the plan (:func:`planned`).

    Raises
    ------
    CohortError
        The plan says that the slide is not predicted.
    ModelMismatchError
        A grid does not fit the model.
    GridError, SlideError
        A grid or the slide cannot be read.
    """
    target = cohort.target(key.champion)
    if row["reason"] is not None:
        raise CohortError(f"slide '{key.slide}': {row['reason']}")

    def grid(slide: str) -> Grid:
        return open_grid(store.grid(GridKey(encoder=str(row["encoder"]), slide=slide)))

    card = champion.model.card
    unit = pl.DataFrame(
        [{name: row[name] for name in ("unit", "patient", "slides")}],
        schema_overrides={"slides": pl.List(pl.String)},
    )
    found = predict_grids(champion.model, unit, grid, times=prediction_times(target))
    fold = champion.folds.get(str(row["patient"]))
    found = found.select(
        pl.lit(key.champion).alias("target"),
        pl.lit(champion.version.version).alias("model_version"),
        pl.lit(card.encoder).alias("encoder"),
        "unit",
        "patient",
        "slides",
        pl.Series("failed", [row["failed"]], pl.List(pl.String)),
        pl.col("in_training") | pl.lit(fold is not None),
        pl.exclude("unit", "patient", "slides", "in_training"),
    )
    overlay = patches = extremes = None
    heat = np.empty((0, 0), np.float32)
    with atomic_folder(store.prediction(key)) as folder:
        found.write_parquet(folder / PREDICTION)
        if key.slide in row["slides"]:  # type: ignore[operator]
            own = grid(key.slide)
            networks = held_out_networks(champion.model.networks, fold)
            heat = explain(networks, own, card.target, crop=card.crop)
            with open_indexed(store, key.slide) as opened:
                predicted = kind_of(card.target).prediction_text(found.row(0, named=True))
                write_heatmap(
                    folder / HEATMAP,
                    heat,
                    own.provenance,
                    opened,
                    name=key.champion,
                    caption=f"{key.slide}, {predicted}\n{heat_caption(card.target)}",
                )
            overlay, patches = (
                read_picture(folder / HEATMAP / name) for name in (OVERLAY, PATCHES)
            )
            extremes = pl.read_parquet(folder / HEATMAP / EXTREMES, glob=False)
    return Prediction(
        row=found,
        fold=fold,
        overlay=overlay,
        patches=patches,
        extremes=extremes,
        problems=str(row["problems"]),
        version=digest(found.rows(), heat.shape, heat.tobytes()),
    )


def remove_prediction(store: Store, key: PredictionKey) -> None:
    """Remove the prediction of a slide, which is not predicted any more."""
    if store.prediction(key).exists():
        remove_product(store.prediction(key))


def make_predictions_report(cohort: Cohort, store: Store) -> pl.DataFrame:
    """Write all predictions as one table, in parquet and as CSV, and return it.

    In the CSV, lists of slides are joined by ``;``.

    Returns
    -------
    polars.DataFrame
        One row per target and unit, the columns of :attr:`Prediction.row`; null where a column
        belongs to another target.

    Raises
    ------
    CohortError
        The slide index does not exist yet.
    """
    slides = read_slide_index(store)["slide"]
    paths = [
        store.prediction(PredictionKey(champion=target.name, slide=slide)) / PREDICTION
        for target in cohort.targets
        for slide in slides
    ]
    found = [pl.read_parquet(path, glob=False) for path in paths if path.exists()]
    # the slides of a patient have the patient's prediction each
    report = pl.concat(found, how="diagonal") if found else pl.DataFrame(schema=_REPORT_START)
    report = report.unique(["target", "unit"], keep="first", maintain_order=True)
    with atomic_file(store.predictions_report) as path:
        report.write_parquet(path)
    with atomic_file(store.predictions_report.with_suffix(".csv")) as path:
        report.with_columns(pl.col("slides", "failed").list.join(";")).write_csv(path)
    return report


_REPORT_START = pl.Schema(
    {
        "target": pl.String(),
        "model_version": pl.Int64(),
        "encoder": pl.String(),
        "unit": pl.String(),
        "patient": pl.String(),
        "slides": pl.List(pl.String()),
        "failed": pl.List(pl.String()),
        "in_training": pl.Boolean(),
        "distance": pl.Float64(),
        "distance_percentile": pl.Float64(),
    }
)


def encoder_of_champion(
    cohort: Cohort, store: Store, target: Target, champion: StoredChampion | None
) -> tuple[str | None, str | None]:
    """Return why a champion cannot predict slides, and the study's encoder that it needs.

    One of the two is None.
    """
    if champion is None:
        wanted = target.predict_with
        version = "no version" if wanted == "champion" else f"no version {wanted}"
        return (
            f"target '{target.name}' has no champion: the registry has {version} of "
            f"model-{target.name}"
            + (" with the alias 'champion'; set it on one" if wanted == "champion" else ""),
            None,
        )
    card = champion.model.card
    if _meaning(card.target) != _meaning(target):
        return (
            f"{champion.version} was trained for another definition of target '{target.name}' "
            "(level, kind, classes or unit); train a model for the present one, or set the alias "
            "'champion' on a version for it",
            None,
        )
    wanted_geometry = Geometry(card.patch, card.mpp, card.stride)
    present = {
        encoder.name: read_card(store.encoder(encoder.name)).weights_hash
        for encoder in cohort.encoders
        if (store.encoder(encoder.name) / ENCODER_CARD).exists()
    }
    fitting = [
        name
        for name, weights in present.items()
        if weights == card.weights_hash and cohort.geometry(name) == wanted_geometry
    ]
    if not fitting:
        return (
            f"{champion.version} was trained on embeddings of encoder '{card.encoder}' with "
            f"weights {card.weights_hash[:12]} at {wanted_geometry.name}, which no encoder of the "
            "study has now; set the alias 'champion' on a version trained on the present encoder",
            None,
        )
    return None, card.encoder if card.encoder in fitting else fitting[0]


def _meaning(target: Target) -> dict[str, object]:
    """Return the fields of a target on which the meaning of a prediction depends."""
    return target.model_dump(include={"kind", "level", "classes", "unit"})


def _quality_problems(store: Store) -> dict[str, str]:
    """Return slide id to its problems in the quality report; empty before the first report."""
    path = store.quality_report / QUALITY
    if not path.exists():
        return {}
    slides = pl.read_parquet(path, glob=False).filter(pl.col("problems") != "")
    return dict(slides.select("slide", "problems").iter_rows())

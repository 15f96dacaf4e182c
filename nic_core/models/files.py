"""The model file: a folder with the networks, the reference of the training cohort and the card.

They are ``fold-<k>.safetensors``, ``distance.safetensors`` and ``card.json``. The folder
contains no pickled object, and none is ever loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import polars as pl
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nic_core.cohort import ModelSettings, Target
from nic_core.encoders.encoder import weights_hash as tensors_hash
from nic_core.models.cox import BaselineHazard
from nic_core.models.cross_validation import NETWORK, CrossValidation
from nic_core.models.distance import REFERENCE, TrainingReference, load_reference, save_reference
from nic_core.models.kinds import kind_of
from nic_core.models.networks import Ensemble, FoldModel, empty_fold_model
from nic_core.models.recalibration import Recalibration
from nic_core.types import Colours, GridPrecision, Reading
from nic_core.version import __version__

CARD = "card.json"


class ModelFileError(ValueError):
    """A model folder is missing, damaged, or of another format."""


class ModelMetric(BaseModel):
    """One row of :attr:`nic_core.models.cross_validation.CrossValidation.metrics`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    split: str
    metric: str
    value: float | None  # None: undefined on these units
    low: float | None
    high: float | None
    units: int
    patients: int
    folds_mean: float | None = None  # over the folds; None for split test
    folds_deviation: float | None = None
    folds_undefined: int | None = None  # folds in which the metric is undefined
    seeds_mean: float | None = None  # over the network's initialisations; None if there is one
    seeds_deviation: float | None = None


class GridSettings(BaseModel):
    """How the training grids were compressed, apart from the encoder.

    Attributes
    ----------
    precision, reading, colours
        As in :class:`nic_core.grids.GridProvenance`; None for features of other software.
    tissue
        A cell was kept if its tissue fraction exceeded this value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: GridPrecision | None
    reading: Reading | None
    colours: Colours | None
    tissue: float = Field(ge=0, le=1)


class TrainingCohort(BaseModel):
    """The training data of a model (split ``cv``), without names of patients or slides.

    Attributes
    ----------
    name
        Name of the cohort.
    patients, units
        Their numbers.
    slides
        Content identities of the slides.
    digest
        SHA-256 of units, patients, folds, labels and slide contents; equal digests mean equal
        training data.
    mpp
        The different um/px at level 0 of the slides, to four digits, ascending.
    scanners
        The different scanners that the slides' files state, in alphabetical order.
    without_scanner
        Number of slides whose files state none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    patients: int
    units: int
    slides: tuple[str, ...]
    digest: str
    mpp: tuple[PositiveFloat, ...]
    scanners: tuple[str, ...]
    without_scanner: NonNegativeInt


class ModelCard(BaseModel):
    """What a slide model is, what it was trained on, and its metrics.

    Attributes
    ----------
    encoder, weights_hash
        Encoder of the training grids. Grids of another encoder are refused; the hash decides, not
        the name.
    patch, mpp, stride, embedding_size
        Training grids: side of a patch and side of a cell in px at ``mpp`` um/px, and numbers per
        embedding.
    crop
        Side of the networks' crops in cells: ``settings.crop_um``, rounded to whole cells.
    grids
        How the training grids were compressed.
    settings
        Settings of the training.
    training
        The training data.
    data
        Table that the training read (``asset/partition``) -> digest of its rows.
    networks
        Hash of each fold's tensors.
    reference
        Hash of the reference of the training cohort, ``distance.safetensors``
        (:mod:`nic_core.models.distance`).
    best_epochs
        Kept epoch of each fold.
    median_risk
        For survival, else None: the median over the training cohort of the risk that each unit
        had when it was held out [choice]. A unit with a higher risk is in the high-risk group.
    baseline_hazards
        For survival, else empty: the baseline hazard of each fold's training units.
    metrics
        Cross-validated and test metrics of the network and the baselines.
    notes
        Models that could not be fitted, and why.
    recalibrations
        How the predictions of each fold's network are recalibrated; empty: they are not.
    software
        Versions of this project and PyTorch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[7] = 7
    target: Target
    encoder: str
    weights_hash: str
    patch: PositiveInt
    mpp: PositiveFloat
    stride: PositiveInt
    embedding_size: PositiveInt
    crop: PositiveInt
    grids: GridSettings
    settings: ModelSettings
    training: TrainingCohort
    data: dict[str, str]
    networks: tuple[str, ...] = Field(min_length=1)
    reference: str
    best_epochs: tuple[int, ...]
    median_risk: float | None
    baseline_hazards: tuple[BaselineHazard, ...]
    metrics: tuple[ModelMetric, ...]
    notes: tuple[str, ...]
    recalibrations: tuple[Recalibration, ...]
    software: dict[str, str]

    @property
    def crop_um(self) -> float:
        """Side of the networks' crops on the slide, um."""
        return self.crop * self.stride * self.mpp

    @model_validator(mode="after")
    def _fields_of_folds_fit(self) -> Self:
        survival = kind_of(self.target).has_survival_functions
        if survival != (self.median_risk is not None):
            raise ValueError("median_risk: required for survival, null for other targets")
        if len(self.baseline_hazards) != (len(self.networks) if survival else 0):
            raise ValueError(
                "baseline_hazards: one per network for survival, none for other targets"
            )
        wanted = self.settings.recalibration != "none" and kind_of(self.target).recalibrates
        if len(self.recalibrations) != (len(self.networks) if wanted else 0):
            raise ValueError(
                "recalibrations: one per network with settings.recalibration, none without it"
            )
        return self


def metrics_frame(card: ModelCard) -> pl.DataFrame:
    """Return the card's metrics as a table; see :attr:`CrossValidation.metrics`."""
    return pl.DataFrame(
        [metric.model_dump() for metric in card.metrics],
        schema_overrides=dict.fromkeys(
            (
                *("value", "low", "high", "folds_mean", "folds_deviation"),
                *("seeds_mean", "seeds_deviation"),
            ),
            pl.Float64,
        )
        | {"folds_undefined": pl.Int64},
    )


@dataclass(frozen=True)
class SlideModel:
    """A model that was loaded from its folder: the card, one network per fold, and the reference
    of the training cohort that slides are compared with."""

    card: ModelCard
    networks: tuple[FoldModel, ...]
    reference: TrainingReference


def training_cohort(
    name: str,
    table: pl.DataFrame,
    identities: Mapping[str, str],
    *,
    mpp: Mapping[str, float],
    scanners: Mapping[str, str | None],
) -> TrainingCohort:
    """Return the identity of a model's training data, and how its slides were scanned.

    Parameters
    ----------
    name
        Name of the cohort.
    table
        Target table (:func:`nic_core.models.labels.target_table`) with the column ``fold``.
    identities
        Slide id to content identity.
    mpp
        Slide id to um/px at level 0.
    scanners
        Slide id to the scanner that its file states, or None.
    """
    trained = table.filter(pl.col("split") == "cv").sort("unit")
    ids = trained["slides"].explode().unique().to_list()
    slides = sorted({identities[slide] for slide in ids})
    rows = [
        {**row, "slides": [(slide, identities[slide]) for slide in row["slides"]]}
        for row in trained.select(sorted(trained.columns)).to_dicts()
    ]
    return TrainingCohort(
        name=name,
        patients=trained["patient"].n_unique(),
        units=trained.height,
        slides=tuple(slides),
        digest=hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        mpp=tuple(sorted({round(mpp[slide], 4) for slide in ids})),
        scanners=tuple(sorted({scanners[slide] or "" for slide in ids} - {""})),
        without_scanner=sum(scanners[slide] is None for slide in ids),
    )


def save_model(
    folder: Path,
    result: CrossValidation,
    reference: TrainingReference,
    *,
    encoder: str,
    weights_hash: str,
    patch: int,
    mpp: float,
    stride: int,
    grids: GridSettings,
    training: TrainingCohort,
    data: Mapping[str, str],
) -> ModelCard:
    """Write networks, reference and card into ``folder``, which is created if missing.

    Parameters
    ----------
    folder
        Folder of the model.
    result
        The cross-validation whose networks are saved.
    reference
        Of the slides of split ``cv``.
    encoder, weights_hash, patch, mpp, stride, grids, training, data
        See :class:`ModelCard`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network, hashes = result.settings.network, []
    for k, model in enumerate(result.networks):
        tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
        save_file(tensors, folder / _fold_file(k))
        hashes.append(tensors_hash(network, tensors))
    rows = result.metrics.fill_nan(None).to_dicts()
    held_out = result.predictions.filter(model=NETWORK, split="cv")
    card = ModelCard(
        target=result.target,
        encoder=encoder,
        weights_hash=weights_hash,
        patch=patch,
        mpp=mpp,
        stride=stride,
        embedding_size=len(result.networks[0].normalise.mean),
        crop=result.crop,
        grids=grids,
        settings=result.settings,
        training=training,
        data=dict(data),
        networks=tuple(hashes),
        reference=save_reference(folder, reference),
        best_epochs=result.best_epochs,
        median_risk=kind_of(result.target).median_risk(held_out),
        baseline_hazards=result.baseline_hazards,
        metrics=tuple(ModelMetric(**row) for row in rows),
        notes=result.notes,
        recalibrations=result.recalibrations,
        software={"nic": __version__, "torch": torch.__version__},
    )
    (folder / CARD).write_text(json.dumps(card.model_dump(mode="json"), indent=2) + "\n")
    return card


def read_model_card(folder: Path) -> ModelCard:
    """Read the card of a model that :func:`save_model` wrote.

    Raises
    ------
    ModelFileError
        The card is missing, invalid, or of another format.
    """
    try:
        return ModelCard.model_validate_json((folder / CARD).read_bytes())
    except OSError as error:
        raise _no_model(folder, error) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or CARD
        raise ModelFileError(
            f"{folder}: not a model file of format {ModelCard.model_fields['format'].default} "
            f"({field}: {first['msg']}); train the model again, or give the folder of a model"
        ) from error


def model_files(card: ModelCard) -> tuple[str, ...]:
    """Return the names of the files that :func:`load_model` reads."""
    return CARD, REFERENCE, *(_fold_file(k) for k in range(len(card.networks)))


def load_model(folder: Path) -> SlideModel:
    """Load a model that :func:`save_model` wrote, on the CPU, in evaluation mode.

    Raises
    ------
    ModelFileError
        A file is missing or unreadable, the tensors do not fit the card, or their hashes differ
        from the card's.
    """
    card = read_model_card(folder)
    try:
        networks = tuple(
            _load_fold(card, folder / _fold_file(k), hash_) for k, hash_ in enumerate(card.networks)
        )
        reference, found = load_reference(folder)
    except OSError as error:
        raise _no_model(folder, error) from error
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ModelFileError(
            f"{folder}: not a model file: {error}; restore the folder, or train the model again"
        ) from error
    if found != card.reference:
        raise _other_hash(folder / REFERENCE)
    return SlideModel(card, networks, reference)


def ensemble_module(networks: Sequence[FoldModel]) -> Ensemble:
    """Return one module that computes the mean prediction of the folds.

    It maps crops of embeddings float32 (B, C, crop, crop), 0 in background, to predictions
    (B, outputs), and can be exported by ``torch.export`` with a dynamic batch.
    """
    module = Ensemble(networks)
    module.eval().requires_grad_(False)
    return module


def _fold_file(k: int) -> str:
    return f"fold-{k}.safetensors"


def _no_model(folder: Path, error: OSError) -> ModelFileError:
    return ModelFileError(
        f"{folder}: no model here ({error}); train one, or give the folder of a model"
    )


def _other_hash(path: Path) -> ModelFileError:
    return ModelFileError(
        f"{path}: the hash of its numbers differs from the card's; "
        "restore all files from one copy, or train the model again"
    )


def _load_fold(card: ModelCard, path: Path, expected: str) -> FoldModel:
    """Load one fold's network; check its hash."""
    tensors = load_file(path)
    if tensors_hash(card.settings.network, tensors) != expected:
        raise _other_hash(path)
    model = empty_fold_model(
        card.settings.network,
        kind_of(card.target),
        embedding_size=card.embedding_size,
        positions=card.settings.positions,
    )
    model.load_state_dict(tensors)
    model.eval().requires_grad_(False)
    return model

"""The model file: a folder with ``fold-<k>.safetensors`` and ``card.json``.

Nothing in it is a pickled object, and none is ever read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import polars as pl
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nic_core.cohort import ModelSettings, Target
from nic_core.encoders.encoder import weights_hash as tensors_hash
from nic_core.grids import nic_version
from nic_core.models.cross_validation import NETWORK, CrossValidation
from nic_core.models.networks import Ensemble, FoldModel, Normalise, build_network, component_count
from nic_core.models.survival import BaselineHazard
from nic_core.models.training import output_count
from nic_core.types import Reading

CARD = "card.json"


class ModelFileError(ValueError):
    """A model folder is missing, damaged or not one."""


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
    seeds_mean: float | None = None  # over initialisations, of the network where there are several
    seeds_deviation: float | None = None


class GridSettings(BaseModel):
    """How the grids were made that a model learned from, beside the encoder.

    ``precision`` and ``reading`` are those of :class:`nic_core.grids.GridProvenance`; a cell was
    kept if its tissue fraction exceeded ``tissue``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Literal["float32", "bfloat16"]
    reading: Reading
    tissue: float = Field(ge=0, le=1)


class TrainingCohort(BaseModel):
    """Whom a model learned from (split ``cv``), without their names.

    ``digest`` is the sha256 of units, patients, folds, labels and slide contents: two models with
    the same one learned from the same; ``slides`` are the content identities of the slides.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    patients: int
    units: int
    slides: tuple[str, ...]
    digest: str


class ModelCard(BaseModel):
    """What a slide model is and what it was measured to do.

    Attributes
    ----------
    encoder, weights_hash
        A grid of another encoder does not fit; the hash decides, not the name.
    patch, mpp, embedding
        Of the grids: side of a patch, px, at um/px; numbers of a cell.
    networks
        Hash of each fold's tensors.
    median_risk
        Of survival alone: the median over the training cohort of the risk that each unit had
        when it was held out [choice]. A higher risk means an earlier event, so a unit above it is
        of the high risk group.
    baselines
        Of survival alone: the baseline hazard of each fold's training units.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[3] = 3
    target: Target
    encoder: str
    weights_hash: str
    patch: PositiveInt
    mpp: PositiveFloat
    embedding_size: PositiveInt
    grids: GridSettings
    settings: ModelSettings
    training: TrainingCohort
    networks: tuple[str, ...] = Field(min_length=1)
    best_epochs: tuple[int, ...]
    median_risk: float | None
    baselines: tuple[BaselineHazard, ...]
    metrics: tuple[ModelMetric, ...]
    software: dict[str, str]

    @model_validator(mode="after")
    def _survival_has_what_it_needs(self) -> Self:
        if (self.target.kind == "survival") != (self.median_risk is not None):
            raise ValueError("median_risk: survival has one, other targets have none")
        if len(self.baselines) != (len(self.networks) if self.target.kind == "survival" else 0):
            raise ValueError("baselines: survival has one a network, other targets have none")
        return self


def metrics_frame(card: ModelCard) -> pl.DataFrame:
    """The card's metrics as the table that they were; see :class:`ModelMetric`."""
    return pl.DataFrame(
        [metric.model_dump() for metric in card.metrics],
        schema_overrides=dict.fromkeys(
            ("value", "low", "high", "seeds_mean", "seeds_deviation"), pl.Float64
        ),
    )


@dataclass(frozen=True)
class SlideModel:
    """A model as it lies in its folder."""

    card: ModelCard
    networks: tuple[FoldModel, ...]


def training_cohort(
    name: str, table: pl.DataFrame, identities: Mapping[str, str]
) -> TrainingCohort:
    """The identity of those a model learns from.

    Parameters
    ----------
    table
        Of :func:`nic_core.models.labels.target_table`, with ``fold``.
    identities
        Slide id to content identity.
    """
    learned = table.filter(pl.col("split") == "cv").sort("unit")
    slides = sorted({identities[slide] for slide in learned["slides"].explode()})
    rows = [
        {**row, "slides": [(slide, identities[slide]) for slide in row["slides"]]}
        for row in learned.select(sorted(learned.columns)).to_dicts()
    ]
    return TrainingCohort(
        name=name,
        patients=learned["patient"].n_unique(),
        units=learned.height,
        slides=tuple(slides),
        digest=hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    )


def save_model(
    folder: Path,
    evaluated: CrossValidation,
    *,
    encoder: str,
    weights_hash: str,
    patch: int,
    mpp: float,
    grids: GridSettings,
    training: TrainingCohort,
) -> ModelCard:
    """Write the folds' networks and the card into ``folder`` (made if missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    network, hashes = evaluated.settings.network, []
    for k, model in enumerate(evaluated.networks):
        tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
        save_file(tensors, folder / f"fold-{k}.safetensors")
        hashes.append(tensors_hash(network, tensors))
    rows = evaluated.metrics.fill_nan(None).to_dicts()
    held_out = evaluated.predictions.filter(model=NETWORK, split="cv")
    card = ModelCard(
        target=evaluated.target,
        encoder=encoder,
        weights_hash=weights_hash,
        patch=patch,
        mpp=mpp,
        embedding_size=len(evaluated.networks[0].normalise.mean),
        grids=grids,
        settings=evaluated.settings,
        training=training,
        networks=tuple(hashes),
        best_epochs=evaluated.best_epochs,
        median_risk=(
            float(np.median(held_out["risk"])) if evaluated.target.kind == "survival" else None
        ),
        baselines=evaluated.baselines,
        metrics=tuple(ModelMetric(**row) for row in rows),
        software={"nic": nic_version(), "torch": torch.__version__},
    )
    (folder / CARD).write_text(json.dumps(card.model_dump(mode="json"), indent=2) + "\n")
    return card


def read_model_card(folder: Path) -> ModelCard:
    """The card of a model that :func:`save_model` wrote.

    Raises
    ------
    ModelFileError
        It is missing, or no card.
    """
    try:
        return ModelCard.model_validate_json((folder / CARD).read_bytes())
    except OSError as error:
        raise _no_model(folder, error) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or CARD
        raise ModelFileError(
            f"{folder}: not a model file of this version ({where}: {first['msg']}); "
            "give a model's folder, or train it again"
        ) from error


def load_model(folder: Path) -> SlideModel:
    """Read a model that :func:`save_model` wrote, on the CPU, in evaluation mode.

    Raises
    ------
    ModelFileError
        A file is missing or unreadable, the tensors do not fit the card, or they are not those
        whose hashes the card holds.
    """
    card = read_model_card(folder)
    try:
        networks = tuple(
            _load_fold(card, folder / f"fold-{k}.safetensors", hash_)
            for k, hash_ in enumerate(card.networks)
        )
    except OSError as error:
        raise _no_model(folder, error) from error
    except (SafetensorError, RuntimeError) as error:
        raise ModelFileError(f"{folder}: not a model file: {error}") from error
    return SlideModel(card, networks)


def ensemble_module(networks: Sequence[FoldModel]) -> Ensemble:
    """One module from raw grid crops float32 (B, C, crop, crop) to the folds' mean prediction.

    Background cells are 0 in all C. Exports by ``torch.export`` with a dynamic batch.
    """
    module = Ensemble(networks)
    module.eval().requires_grad_(False)
    return module


def _no_model(folder: Path, error: OSError) -> ModelFileError:
    return ModelFileError(f"{folder}: no model here ({error}); train one")


def _load_fold(card: ModelCard, path: Path, expected: str) -> FoldModel:
    tensors = load_file(path)
    if tensors_hash(card.settings.network, tensors) != expected:
        raise ModelFileError(
            f"{path}: the weights are not those of the card (hash differs); "
            "restore all files from one source, or train again"
        )
    components = component_count(card.settings.network)
    shape = (
        (card.embedding_size,)
        if components is None
        else (min(components, card.embedding_size), card.embedding_size)
    )
    normalise = Normalise(torch.zeros(card.embedding_size), torch.zeros(shape))
    network = build_network(
        card.settings.network,
        normalise.channels,
        output_count(card.target),
        positions=card.settings.positions,
    )
    model = FoldModel(normalise, network, card.target.kind)
    model.load_state_dict(tensors)
    model.eval().requires_grad_(False)
    return model

"""The model file: a folder with ``fold-<k>.safetensors`` and ``card.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nic_core.cohort import ModelSettings, Target
from nic_core.models.networks import (
    Ensemble,
    FoldModel,
    Normalise,
    build_network,
    component_count,
)
from nic_core.models.training import output_count
from nic_core.models.validation import Evaluated

CARD = "card.json"


class ModelFileError(ValueError):
    """A model folder is missing, damaged or not one."""


class ModelMetric(BaseModel):
    """One row of :attr:`nic_core.models.validation.Evaluated.metrics`."""

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


class ModelCard(BaseModel):
    """What a slide model is and what it was measured to do.

    ``patch`` (px) and ``mpp`` (um/px) are those of the grids' patches, ``code`` the numbers of a
    cell; a grid of another encoder (``weights_hash``) does not fit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    target: Target
    encoder: str
    weights_hash: str
    patch: int
    mpp: float
    code: int
    settings: ModelSettings
    best_epochs: tuple[int, ...]
    metrics: tuple[ModelMetric, ...]


@dataclass(frozen=True)
class SlideModel:
    """A model as it lies in its folder."""

    card: ModelCard
    networks: tuple[FoldModel, ...]


def save_model(
    folder: Path,
    evaluated: Evaluated,
    *,
    encoder: str,
    weights_hash: str,
    patch: int,
    mpp: float,
) -> ModelCard:
    """Write the folds' networks and the card into ``folder`` (made if missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, network in enumerate(evaluated.networks):
        tensors = {name: t.contiguous() for name, t in network.state_dict().items()}
        save_file(tensors, folder / f"fold-{k}.safetensors")
    rows = evaluated.metrics.fill_nan(None).to_dicts()
    card = ModelCard(
        target=evaluated.target,
        encoder=encoder,
        weights_hash=weights_hash,
        patch=patch,
        mpp=mpp,
        code=len(evaluated.networks[0].normalise.mean),
        settings=evaluated.settings,
        best_epochs=evaluated.best_epochs,
        metrics=tuple(ModelMetric(**row) for row in rows),
    )
    (folder / CARD).write_text(json.dumps(card.model_dump(mode="json"), indent=2) + "\n")
    return card


def load_model(folder: Path) -> SlideModel:
    """Read a model that :func:`save_model` wrote, on the CPU, in evaluation mode.

    Raises
    ------
    ModelFileError
        A file is missing or unreadable, or the tensors do not fit the card.
    """
    try:
        card = ModelCard.model_validate_json((folder / CARD).read_bytes())
        networks = tuple(
            _load_fold(card, folder / f"fold-{k}.safetensors") for k in range(len(card.best_epochs))
        )
    except OSError as error:
        raise ModelFileError(f"{folder}: no model here ({error}); train one") from error
    except (ValidationError, SafetensorError, RuntimeError) as error:
        raise ModelFileError(f"{folder}: not a model file: {error}") from error
    return SlideModel(card, networks)


def ensemble_module(networks: Sequence[FoldModel]) -> Ensemble:
    """One module from raw grid crops float32 (B, C, crop, crop) to the folds' mean prediction.

    Background cells are 0 in all C. Exports by ``torch.export`` with a dynamic batch.
    """
    module = Ensemble(networks)
    module.eval().requires_grad_(False)
    return module


def _load_fold(card: ModelCard, path: Path) -> FoldModel:
    components = component_count(card.settings.network)
    shape = (card.code,) if components is None else (min(components, card.code), card.code)
    normalise = Normalise(torch.zeros(card.code), torch.zeros(shape))
    network = build_network(
        card.settings.network,
        normalise.channels,
        output_count(card.target),
        positions=card.settings.positions,
    )
    model = FoldModel(normalise, network, card.target.kind)
    model.load_state_dict(load_file(path))
    model.eval().requires_grad_(False)
    return model

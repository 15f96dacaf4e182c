"""Finished folds of a cross-validation that is not complete yet, so that it can continue.

A checkpoint is a folder with one folder per finished fold, written atomically. It contains no
pickled object.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import safetensors.numpy
import safetensors.torch
from numpy.typing import NDArray
from polars.exceptions import PolarsError
from safetensors import SafetensorError

from nic_core.cohort import NetworkName
from nic_core.models.cox import BaselineHazard
from nic_core.models.kinds import TargetKind
from nic_core.models.networks import empty_fold_model
from nic_core.models.recalibration import Recalibration
from nic_core.models.training import FittedFold, TrainingError
from nic_core.store import atomic_folder

FORMAT = 2
STATE, NETWORK_FILE, HISTORY = "fold.json", "network.safetensors", "history.parquet"
HELD_OUT, EXTERNAL = "held_out.parquet", "external.safetensors"

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Predictions = tuple[Floats, Floats]  # (units, outputs); survival probabilities (units, times)


@dataclass(frozen=True)
class FoldResult:
    """What a cross-validation keeps of one fold.

    Attributes
    ----------
    fitted
        The network of the first initialisation.
    hazard
        Its baseline hazard, for survival.
    held_out
        Model to the rows of its predictions of the test fold.
    external
        Model to its predictions of split ``test``; empty without that split.
    recalibration
        Of the network of the first initialisation; None without one.
    """

    fitted: FittedFold
    hazard: BaselineHazard | None
    held_out: dict[str, pl.DataFrame]
    external: dict[str, Predictions]
    recalibration: Recalibration | None = None


@dataclass(frozen=True)
class FoldCheckpoints:
    """Where finished folds are kept.

    Attributes
    ----------
    folder
        The caller deletes it once the model is saved.
    fingerprint
        Identifies inputs, settings and device of the training: folds with another one are not
        used.
    """

    folder: Path
    fingerprint: str

    def save(self, fold: int, result: FoldResult) -> None:
        """Write a finished fold, whose network is on the CPU."""
        model = result.fitted.model
        state = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "best_epoch": result.fitted.best_epoch,
            "embedding_size": len(model.normalise.mean),
            "hazard": None if result.hazard is None else result.hazard.model_dump(mode="json"),
            "recalibration": result.recalibration and result.recalibration.model_dump(mode="json"),
            "models": list(result.held_out),
        }
        with atomic_folder(self._path(fold)) as new:
            (new / STATE).write_text(json.dumps(state))
            tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
            safetensors.torch.save_file(tensors, new / NETWORK_FILE)
            result.fitted.history.write_parquet(new / HISTORY)
            pl.concat(
                rows.select(pl.lit(name).alias("model"), pl.all())
                for name, rows in result.held_out.items()
            ).write_parquet(new / HELD_OUT)
            arrays = {
                f"{name}/{part}": np.ascontiguousarray(array)
                for name, parts in result.external.items()
                for part, array in zip(("values", "survival"), parts, strict=True)
            }
            safetensors.numpy.save_file(arrays, new / EXTERNAL)

    def load(
        self, fold: int, kind: TargetKind, network: NetworkName, *, positions: bool
    ) -> FoldResult | None:
        """Read a finished fold; None if it is not finished, or belongs to another training.

        Raises
        ------
        TrainingError
            A file of the fold is damaged.
        """
        folder = self._path(fold)
        if not folder.exists():
            return None
        try:
            state = json.loads((folder / STATE).read_text())
            if (state["format"], state["fingerprint"]) == (FORMAT, self.fingerprint):
                return _read(folder, state, kind, network, positions=positions)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, PolarsError) as error:
            raise TrainingError(
                f"{folder}: not a finished fold of a training ({error}); delete this folder to "
                "train the fold again"
            ) from error
        log.warning(
            "fold %d is trained again: %s belongs to another training (inputs, settings or the "
            "version of PyTorch differ)",
            fold,
            folder,
        )
        return None

    def _path(self, fold: int) -> Path:
        return self.folder / f"fold-{fold}"


def _read(
    folder: Path,
    state: Mapping[str, Any],
    kind: TargetKind,
    network: NetworkName,
    *,
    positions: bool,
) -> FoldResult:
    model = empty_fold_model(
        network, kind, embedding_size=state["embedding_size"], positions=positions
    )
    model.load_state_dict(safetensors.torch.load_file(folder / NETWORK_FILE))
    model.eval().requires_grad_(False)
    rows = pl.read_parquet(folder / HELD_OUT, glob=False)
    arrays = safetensors.numpy.load_file(folder / EXTERNAL)
    hazard, recalibration = state["hazard"], state["recalibration"]
    return FoldResult(
        FittedFold(model, state["best_epoch"], pl.read_parquet(folder / HISTORY, glob=False)),
        None if hazard is None else BaselineHazard.model_validate(hazard),
        {name: rows.filter(model=name).drop("model") for name in state["models"]},
        {
            name: (arrays[f"{name}/values"], arrays[f"{name}/survival"])
            for name in state["models"]
            if f"{name}/values" in arrays
        },
        None if recalibration is None else Recalibration.model_validate(recalibration),
    )

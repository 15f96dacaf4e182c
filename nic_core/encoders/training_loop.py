"""Section 3, schedule: the training loop of every objective, with resumable checkpoints.

Published [B]: Adam, learning rate divided by 10 on a plateau of the validation value down to 1e-5,
weights with the best validation value kept.

[choice]: the budget is a number of patches instead of passes over data sets that differ in size,
and an epoch is a fixed share of the budget; the patience; the early stop, once the rate is at its
minimum and no epoch has improved for one epoch more than the patience; and the drop of the rate
at 60 % and at 85 % of the budget even without a plateau, because the noise of a high rate hides
plateaus and a short training would end with that noise. Without a budget, an epoch is a pass over
the training patches (at least 500 steps), the rate drops only at plateaus, and training ends at
the early stop or after the published 200,000 steps.

Also [choice] is a second training on the train and validation splits together (``refit: all``):
from the same start, for the steps up to the kept epoch, at the rates of these epochs, with the
weights of the end kept. The first training then serves to choose the schedule.
"""

from __future__ import annotations

import copy
import logging
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nic_core.cohort import EncoderSpec
from nic_core.encoders.errors import EncoderError
from nic_core.encoders.objectives.base import Objective, Validation
from nic_core.encoders.patch_tasks import PatchDataset
from nic_core.encoders.scores import TaskScores
from nic_core.store import atomic_file
from nic_core.tracker import Tracker
from nic_core.types import Precision

log = logging.getLogger(__name__)

EPOCHS = 24
CHECKPOINT_FORMAT = 3
STEPS = 200_000  # upper limit without a budget; [B] for the BiGAN
SHORTEST_EPOCH = 500  # steps, without a budget: keeps the cost of validation small
PATIENCE = 3  # epochs
REDUCTION = 0.1
LOWEST_RATE = 1e-5
# (share of the budget, upper limit of the rate from there on, as a fraction of the first rate)
CEILINGS = ((0.6, 1e-1), (0.85, 1e-2))
CONFUSION_SCHEMA = pl.Schema(
    {
        "epoch": pl.Int64(),
        "task": pl.String(),
        "true": pl.String(),
        "predicted": pl.String(),
        "patches": pl.Int64(),
    }
)
REFIT_SPLITS = ("train", "validation")
# attributes of a training that its checkpoint has as they are
_PROGRESS = (
    "kept", "kept_epoch", "done", "rows", "confusion", "best", "stale", "stopped", "schedule",
    "refitted",
)  # fmt: skip


def patches_per_epoch(spec: EncoderSpec, tasks: Sequence[PatchDataset]) -> int:
    """Return the number of training patches between two validations."""
    if spec.patches_seen is not None:
        return math.ceil(spec.patches_seen / EPOCHS)
    return max(sum(len(task.rows("train")) for task in tasks), SHORTEST_EPOCH * spec.batch)


def fit(
    objective: Objective,
    spec: EncoderSpec,
    *,
    learning_rate: float,
    precision: Precision = "float32",
    checkpoint: Path | None = None,
    fingerprint: str = "",
    tracker: Tracker | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Train ``objective.networks`` in place and leave them in evaluation mode.

    With ``spec.refit`` they are trained twice; see the description of this module.

    Parameters
    ----------
    objective : Objective
    spec : EncoderSpec
        Gives the seed, the budget and ``refit``.
    learning_rate : float
        Initial learning rate.
    precision : str
        Of the forward and backward pass (autocast); weights, losses, optimiser and validation
        are always float32.
    checkpoint : Path, optional
        File that is written after each epoch; the caller deletes it once the result is saved. If
        it exists with the same ``fingerprint``, training resumes from it and gives the same result
        on a CPU as an uninterrupted training. A completed training is not repeated.
    fingerprint : str
        Identifies the training that a checkpoint belongs to.
    tracker : Tracker, optional
        Receives the row of each epoch.
    progress : callable, optional
        Called with (patches seen, total patches) after each step.

    Returns
    -------
    history : polars.DataFrame
        One row per epoch: epoch, patches (seen so far), learning_rate, mean losses, validation
        values (null in a refit), phase (``training``, ``refit``), kept (whether the weights are
        those of the end of this epoch).
    confusion : polars.DataFrame
        Confusion matrices of the validation patches after each epoch, :data:`CONFUSION_SCHEMA`.

    Raises
    ------
    EncoderError
        A loss became NaN or infinite, or the checkpoint cannot be read.
    """
    run = _Run(objective, spec, learning_rate, precision)
    start = copy.deepcopy(run.networks.state_dict()) if spec.refit == "all" else None
    if checkpoint is not None and checkpoint.exists():
        run.restore(checkpoint, fingerprint)
    _report(tracker, run.rows)

    def train() -> None:
        while not run.finished:
            _report(tracker, [run.train_epoch(progress)])
            if checkpoint is not None:
                run.save(checkpoint, fingerprint)
        run.select()

    train()
    if start is not None and run.schedule is None:  # else it was resumed within the refit
        run.begin_refit(start)
        train()
    trained = pl.int_range(pl.len()) < len(run.rows) - len(run.schedule or ())
    history = pl.DataFrame(run.rows).with_columns(
        phase=pl.when(trained).then(pl.lit("training")).otherwise(pl.lit("refit")),
        kept=pl.col("epoch") == run.kept_epoch,
    )
    return history, pl.DataFrame(run.confusion, schema=CONFUSION_SCHEMA)


def _report(tracker: Tracker | None, rows: list[dict[str, float]]) -> None:
    if tracker is not None:
        for row in rows:
            tracker.metrics(row, step=int(row["epoch"]))


class _Run:
    """The complete state of one training, as stored in a checkpoint."""

    def __init__(
        self,
        objective: Objective,
        spec: EncoderSpec,
        learning_rate: float,
        precision: Precision,
    ) -> None:
        self.objective = objective
        self.spec = spec
        self.first_rate = learning_rate
        self.precision = precision
        self.networks = objective.networks
        self.device = next(self.networks.parameters()).device
        self._begin()
        self.plateau = None
        if objective.selection is not None:
            self.plateau = ReduceLROnPlateau(
                self.optimizer,
                objective.selection.mode,
                REDUCTION,
                PATIENCE,
                threshold=0.0,
                min_lr=LOWEST_RATE,
            )
        self.steps = STEPS
        self.ceilings: tuple[tuple[float, float], ...] = ()
        if spec.patches_seen is not None:
            self.steps = math.ceil(spec.patches_seen / objective.patches_per_step)
            self.ceilings = CEILINGS
        epoch = patches_per_epoch(spec, objective.tasks)
        self.steps_per_epoch = math.ceil(epoch / objective.patches_per_step)
        self.done = 0
        self.rows: list[dict[str, float]] = []
        self.confusion: list[dict[str, int | str]] = []
        self.best = -math.inf
        self.stale = 0  # epochs without improvement
        self.kept: dict[str, Any] | None = None
        self.kept_epoch = 0
        self.stopped = False
        # rate and steps of each epoch of the refit; None before it
        self.schedule: list[tuple[float, int]] | None = None
        self.refitted = 0  # epochs

    def _begin(self) -> None:
        """Start the optimiser and the generator of the batches anew."""
        self.generator = torch.Generator(self.device).manual_seed(self.spec.seed)
        trained = [weight for weight in self.networks.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=self.first_rate, fused=True)

    def begin_refit(self, start: Mapping[str, Tensor]) -> None:
        """Train again from ``start`` on train and validation splits, up to the kept epoch."""
        ends = [0, *(int(row["patches"]) // self.objective.patches_per_step for row in self.rows)]
        self.schedule = [
            (row["learning_rate"], end - before)
            for row, before, end in zip(self.rows, ends, ends[1:], strict=False)
        ][: self.kept_epoch]
        self.kept = None
        self.networks.load_state_dict(start)
        self._begin()
        self.objective.train_on(REFIT_SPLITS)

    @property
    def finished(self) -> bool:
        if self.schedule is not None:
            return self.refitted == len(self.schedule)
        return self.stopped or self.done >= self.steps

    @property
    def total(self) -> int:
        """Patches at the end of the training, or of the refit."""
        steps = self.steps
        if self.schedule is not None:
            left = sum(steps for _, steps in self.schedule[self.refitted :])
            steps = self.done + left
        return steps * self.objective.patches_per_step

    def train_epoch(self, progress: Callable[[int, int], None] | None) -> dict[str, float]:
        """Train one epoch, and return its row."""
        self.networks.train()
        steps, total = min(self.steps_per_epoch, self.steps - self.done), self.total
        if self.schedule is not None:
            rate, steps = self.schedule[self.refitted]
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        rate = float(self.optimizer.param_groups[0]["lr"])
        sums: dict[str, float] = {}
        for _ in range(steps):
            losses = self._losses(self.objective.batch(self.generator))
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(losses["loss"])
            self.optimizer.step()
            self.done += 1
            # one copy from the device, because each waits for it
            values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
            self._check_finite(values)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
            if progress is not None:
                progress(self.seen, total)
        self.networks.eval()
        # a refit has seen the validation patches
        validation = Validation({}) if self.schedule is not None else self.objective.validate()
        self._check_finite(validation.values)
        row = {
            "epoch": self.epoch,
            "patches": self.seen,
            "learning_rate": rate,
            **{name: value / steps for name, value in sums.items()},
            **validation.values,
        }
        self.confusion += _confusion_rows(self.epoch, self.objective.tasks, validation.scores)
        self.rows.append(row)
        if self.schedule is None:
            self._update_schedule(row)
        else:
            self.refitted += 1
            self.kept_epoch = len(self.rows)
        self._log(row)
        return row

    def _losses(self, batch: Any) -> dict[str, Tensor]:
        reduced = self.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, reduced):
            return self.objective.losses(batch)

    @property
    def epoch(self) -> int:
        """Number of the current epoch, from 1."""
        return len(self.rows) + 1

    @property
    def seen(self) -> int:
        """Patches seen so far."""
        return self.done * self.objective.patches_per_step

    def _check_finite(self, values: Mapping[str, float]) -> None:
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if not broken:
            return
        # the total is NaN if any part is NaN: name the part, which for MTL is a task
        name = broken[-1]
        where, _, part = name.partition("/")
        task = part.partition("/")[0]
        what = where if where == "validation" else "loss"
        if task in self.objective.heads:
            what = f"{what} of task '{task}'"
        elif part:
            what = f"{what} '{part}'"
        raise EncoderError(
            f"encoder '{self.spec.name}': the {what} became {values[name]} in epoch {self.epoch}, "
            f"after {self.seen} patches; lower the encoder's learning_rate (now "
            f"{self.optimizer.param_groups[0]['lr']:g})"
            + ("" if self.precision == "float32" else " or set precision: float32")
        )

    def _log(self, row: dict[str, float]) -> None:
        values = {
            name: value
            for name, value in row.items()
            if name == "loss" or (name.startswith("validation/") and name.count("/") == 1)
        }
        log.info(
            "encoder '%s', epoch %d%s, %s patches: %s",
            self.spec.name,
            row["epoch"],
            "" if self.schedule is None else " (refit on train and validation)",
            f"{self.seen:,}",
            ", ".join(f"{name} {value:.3g}" for name, value in values.items()),
        )

    def _update_schedule(self, row: dict[str, float]) -> None:
        """Keep the weights if they are the best so far; otherwise lower the rate or stop."""
        self.kept_epoch = len(self.rows) if self.kept is None else self.kept_epoch
        selection = self.objective.selection
        if selection is None or self.plateau is None:
            return
        value = row[selection.value]
        self.plateau.step(value)
        for share, part in self.ceilings:
            if self.done >= share * self.steps:
                for group in self.optimizer.param_groups:
                    group["lr"] = min(group["lr"], max(LOWEST_RATE, self.first_rate * part))
        score = value if selection.mode == "max" else -value
        self.stale += 1
        if score > self.best:
            self.best, self.stale = score, 0
            if selection.keep == "best":
                self.kept = copy.deepcopy(self.networks.state_dict())
                self.kept_epoch = len(self.rows)
        # repeated division by 10 misses the minimum by rounding
        at_minimum = row["learning_rate"] < 1.001 * LOWEST_RATE
        self.stopped = at_minimum and self.stale > PATIENCE

    def select(self) -> None:
        """Load the best weights, if the objective selects them."""
        if self.kept is not None:
            self.networks.load_state_dict(self.kept)
        self.networks.eval()

    def save(self, path: Path, fingerprint: str) -> None:
        state = {
            "format": CHECKPOINT_FORMAT,
            "fingerprint": fingerprint,
            "networks": self.networks.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict() if self.plateau is not None else None,
            "generator": self.generator.get_state(),
            "global_generator": torch.get_rng_state(),
            **{name: getattr(self, name) for name in _PROGRESS},
        }
        with atomic_file(path) as temporary:
            torch.save(state, temporary)

    def restore(self, path: Path, fingerprint: str) -> None:
        wrong = EncoderError(
            f"encoder '{self.spec.name}': {path} is not a checkpoint of this training; "
            "delete it to train from the start"
        )
        # weights_only reads tensors and plain values and runs no code of a pickle
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise wrong from error
        if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
            raise wrong
        if state["fingerprint"] != fingerprint:
            log.warning(
                "encoder '%s': training from the start, because the checkpoint %s belongs to "
                "another training (settings, data or the version of PyTorch differ)",
                self.spec.name,
                path,
            )
            return
        self.networks.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.plateau is not None:
            self.plateau.load_state_dict(state["plateau"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["global_generator"])
        for name in _PROGRESS:
            setattr(self, name, state[name])
        if self.schedule is not None:
            self.objective.train_on(REFIT_SPLITS)
        log.info("encoder '%s': resumed after %d patches", self.spec.name, self.seen)


def _confusion_rows(
    epoch: int, tasks: Sequence[PatchDataset], scores: Mapping[str, TaskScores]
) -> list[dict[str, int | str]]:
    """Return one row per cell of each task's confusion matrix (:data:`CONFUSION_SCHEMA`)."""
    return [
        {"epoch": epoch, "task": task.name, "true": true, "predicted": predicted, "patches": n}
        for task in tasks
        if task.name in scores
        for true, line in zip(task.classes, scores[task.name].confusion, strict=True)
        for predicted, n in zip(task.classes, line, strict=True)
    ]

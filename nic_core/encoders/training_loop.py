"""The training loop, the same for every objective; it can be killed and resumed.

Schedule (paper B): Adam, learning rate divided by 10 on a plateau of the validation value
down to 1e-5, weights with the best validation value kept. [choice]: the budget is a number
of patches, not of passes over data sets that differ in size, and an epoch is a fixed share of
it; the patience; the early stop, when the rate is at its floor and one epoch more than the patience
brought nothing better; and that the rate falls by 60 % and by 85 % of the budget even
without a plateau, because the noise of a high rate hides plateaus and a short training would
end in it. Without a budget an epoch is a pass over the training patches (500 steps at least), the
rate falls at plateaus alone, and training lasts until the early stop or for the published 200,000
steps.
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
from nic_core.encoders.encoder import EncoderError
from nic_core.encoders.objectives.base import Objective
from nic_core.encoders.patch_tasks import PatchDataset
from nic_core.encoders.scores import TaskScores
from nic_core.store import atomic_file
from nic_core.tracker import Tracker
from nic_core.types import Precision

log = logging.getLogger(__name__)

EPOCHS = 24
STEPS = 200_000  # of a training without a budget; paper B's number for the BiGAN
SHORTEST_EPOCH = 500  # steps of such a training; validation and checkpoint cost little beside
PATIENCE = 3
REDUCTION = 0.1
LOWEST_RATE = 1e-5
# after this share of the budget the rate is at most this part of the first one
CEILINGS = ((0.6, 1e-1), (0.85, 1e-2))
CONFUSION = "validation_confusion"


def patches_an_epoch(spec: EncoderSpec, tasks: Sequence[PatchDataset]) -> int:
    """How many patches training sees between two validations."""
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
) -> pl.DataFrame:
    """Train ``objective.networks`` in place; they end in evaluation mode.

    Parameters
    ----------
    precision
        Of the forward and backward pass (autocast); weights, losses, optimiser and
        validation are float32 either way.
    checkpoint
        A file that is written after each epoch; whoever keeps the result removes it. If it
        exists and was written under the same ``fingerprint``, training goes on from it, to the
        same result on a CPU as if it had never stopped; one that was done is not repeated.
    progress
        Called with (patches seen, patches in all) after each step.

    Returns
    -------
    One row an epoch: epoch, patches (seen so far), learning_rate, mean losses, validation
    values.

    Raises
    ------
    EncoderError
        A loss became NaN or infinite, or the checkpoint cannot be read.
    """
    run = _Run(objective, spec, learning_rate, precision)
    if checkpoint is not None and checkpoint.exists():
        run.restore(checkpoint, fingerprint)
    _report(tracker, run.rows, run.confusion)
    while not run.finished:
        row, confusion = run.train_epoch(progress)
        _report(tracker, [row], confusion)
        if checkpoint is not None:
            run.save(checkpoint, fingerprint)
    run.select()
    return pl.DataFrame(run.rows)


def _report(
    tracker: Tracker | None, rows: list[dict[str, float]], confusion: list[dict[str, int | str]]
) -> None:
    if tracker is None:
        return
    for row in rows:
        tracker.metrics(row, step=int(row["epoch"]))
    if confusion:
        tracker.table(CONFUSION, pl.DataFrame(confusion))


class _Run:
    """The state of one training: all that a checkpoint must hold."""

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
        self.generator = torch.Generator(self.device).manual_seed(spec.seed)
        self.optimizer = torch.optim.Adam(self.networks.parameters(), lr=learning_rate, fused=True)
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
            self.steps = math.ceil(spec.patches_seen / objective.patches_a_step)
            self.ceilings = CEILINGS
        epoch = patches_an_epoch(spec, objective.tasks)
        self.steps_an_epoch = math.ceil(epoch / objective.patches_a_step)
        self.done = 0
        self.rows: list[dict[str, float]] = []
        self.confusion: list[dict[str, int | str]] = []
        self.best = -math.inf
        self.stale = 0  # epochs since the best one
        self.kept: dict[str, Any] | None = None
        self.stopped = False

    @property
    def finished(self) -> bool:
        return self.stopped or self.done >= self.steps

    def train_epoch(
        self, progress: Callable[[int, int], None] | None
    ) -> tuple[dict[str, float], list[dict[str, int | str]]]:
        """Returns the epoch's row and its confusion matrices (:func:`_confusion_rows`)."""
        self.networks.train()
        rate = float(self.optimizer.param_groups[0]["lr"])
        sums: dict[str, float] = {}
        steps = min(self.steps_an_epoch, self.steps - self.done)
        for _ in range(steps):
            losses = self._losses(self.objective.batch(self.generator))
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(losses["loss"])
            self.optimizer.step()
            self.done += 1
            values = {name: loss.item() for name, loss in losses.items()}
            self._check_finite(values)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
            if progress is not None:
                progress(self.seen, self.steps * self.objective.patches_a_step)
        self.networks.eval()
        validation = self.objective.validate()
        self._check_finite(validation.values)
        row = {
            "epoch": self.epoch,
            "patches": self.seen,
            "learning_rate": rate,
            **{name: total / steps for name, total in sums.items()},
            **validation.values,
        }
        confusion = _confusion_rows(self.epoch, self.objective.tasks, validation.scores)
        self.rows.append(row)
        self.confusion += confusion
        self._judge(row)
        self._log(row)
        return row, confusion

    def _losses(self, batch: Any) -> dict[str, Tensor]:
        reduced = self.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, reduced):
            return self.objective.losses(batch)

    @property
    def epoch(self) -> int:
        """The number of the epoch that is being trained, from 1."""
        return len(self.rows) + 1

    @property
    def seen(self) -> int:
        return self.done * self.objective.patches_a_step

    def _check_finite(self, values: Mapping[str, float]) -> None:
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if not broken:
            return
        # the total breaks with any part of it: name the part, a task where there are tasks
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
            f"after {self.seen} patches; lower its learning_rate (now "
            f"{self.optimizer.param_groups[0]['lr']:g})"
            + ("" if self.precision == "float32" else " or set its precision to float32")
        )

    def _log(self, row: dict[str, float]) -> None:
        values = {
            name: value
            for name, value in row.items()
            if name == "loss" or (name.startswith("validation/") and name.count("/") == 1)
        }
        log.info(
            "encoder '%s', epoch %d, %s patches: %s",
            self.spec.name,
            row["epoch"],
            f"{self.seen:,}",
            ", ".join(f"{name} {value:.3g}" for name, value in values.items()),
        )

    def _judge(self, row: dict[str, float]) -> None:
        """Keep the weights if they are the best, lower the learning rate or stop if not."""
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
            self.kept = copy.deepcopy(self.networks.state_dict())
        # a tenth of a tenth ... is not the floor to the last bit
        at_floor = row["learning_rate"] < 1.001 * LOWEST_RATE
        self.stopped = at_floor and self.stale > PATIENCE

    def select(self) -> None:
        if self.kept is not None:
            self.networks.load_state_dict(self.kept)
        self.networks.eval()

    def save(self, path: Path, fingerprint: str) -> None:
        state = {
            "fingerprint": fingerprint,
            "networks": self.networks.state_dict(),
            "kept": self.kept,
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict() if self.plateau is not None else None,
            "generator": self.generator.get_state(),
            "chance": torch.get_rng_state(),
            "done": self.done,
            "rows": self.rows,
            "confusion": self.confusion,
            "best": self.best,
            "stale": self.stale,
            "stopped": self.stopped,
        }
        with atomic_file(path) as temporary:
            torch.save(state, temporary)

    def restore(self, path: Path, fingerprint: str) -> None:
        wrong = EncoderError(
            f"encoder '{self.spec.name}': {path} is not a checkpoint of its training; "
            "remove it to train anew"
        )
        # weights_only: tensors and plain values, no embedding of a pickle is run
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise wrong from error
        if not isinstance(state, dict) or "fingerprint" not in state:
            raise wrong
        if state["fingerprint"] != fingerprint:
            log.warning(
                "encoder '%s': the checkpoint %s is of another training (settings, data or "
                "version differ): starting anew",
                self.spec.name,
                path,
            )
            return
        self.networks.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.plateau is not None:
            self.plateau.load_state_dict(state["plateau"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["chance"])
        for name in ("kept", "done", "rows", "confusion", "best", "stale", "stopped"):
            setattr(self, name, state[name])
        log.info("encoder '%s': resumed after %d patches", self.spec.name, self.seen)


def _confusion_rows(
    epoch: int, tasks: Sequence[PatchDataset], scores: Mapping[str, TaskScores]
) -> list[dict[str, int | str]]:
    """A row a cell of each task's confusion matrix: epoch, task, true, predicted, patches."""
    return [
        {"epoch": epoch, "task": task.name, "true": true, "predicted": predicted, "patches": n}
        for task in tasks
        if task.name in scores
        for true, line in zip(task.classes, scores[task.name].confusion, strict=True)
        for predicted, n in zip(task.classes, line, strict=True)
    ]

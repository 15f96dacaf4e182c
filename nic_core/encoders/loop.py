"""The training loop, the same for every objective; it can be killed and resumed.

Schedule (paper B): Adam, learning rate divided by 10 on a plateau of the validation value
down to 1e-5, weights with the best validation value kept. [choice]: the budget is a number
of patches, not of passes over data sets that differ in size, and an epoch is a fixed share of
it; the patience; the early stop at the floor; and that the rate falls by 60 % and by 85 % of
the budget even without a plateau, because the noise of a high rate hides plateaus and a short
training would end in it.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nic_core.cohort import EncoderSpec
from nic_core.encoders.encoder import EncoderError
from nic_core.encoders.objectives.base import Objective
from nic_core.store import whole_file
from nic_core.tracker import Tracker

log = logging.getLogger(__name__)

EPOCHS = 24
PATIENCE = 3
REDUCTION = 0.1
LOWEST_RATE = 1e-5
# after this share of the budget the rate is at most this part of the first one
CEILINGS = ((0.6, 1e-1), (0.85, 1e-2))


def fit(
    objective: Objective,
    spec: EncoderSpec,
    *,
    learning_rate: float,
    checkpoint: Path | None = None,
    fingerprint: str = "",
    tracker: Tracker | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """Train ``objective.networks`` in place; they end in evaluation mode.

    Parameters
    ----------
    checkpoint
        A file that is written after each epoch and removed at the end. If it exists and was
        written under the same ``fingerprint``, training goes on from it, to the same result
        on a CPU as if it had never stopped.
    progress
        Called with (patches seen, patches in all) after each step.

    Returns
    -------
    One row an epoch: epoch, patches (seen so far), learning_rate, mean losses, validation
    values.

    Raises
    ------
    EncoderError
        A loss became NaN or infinite.
    """
    run = _Run(objective, spec, learning_rate)
    if checkpoint is not None and checkpoint.exists():
        run.restore(checkpoint, fingerprint)
    if tracker is not None:
        for row in run.rows:
            tracker.metrics(row, step=int(row["epoch"]))
    while not run.finished:
        row = run.train_epoch(progress)
        if tracker is not None:
            tracker.metrics(row, step=int(row["epoch"]))
        if checkpoint is not None:
            run.save(checkpoint, fingerprint)
    run.select()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return pl.DataFrame(run.rows)


class _Run:
    """The state of one training: all that a checkpoint must hold."""

    def __init__(self, objective: Objective, spec: EncoderSpec, learning_rate: float) -> None:
        self.objective = objective
        self.spec = spec
        self.first_rate = learning_rate
        self.networks = objective.networks
        device = next(self.networks.parameters()).device
        self.generator = torch.Generator(device).manual_seed(spec.seed)
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
        self.steps = math.ceil(spec.patches_seen / objective.patches_a_step)
        self.steps_an_epoch = math.ceil(self.steps / EPOCHS)
        self.done = 0
        self.rows: list[dict[str, float]] = []
        self.best = -math.inf
        self.stale = 0  # epochs since the best one
        self.kept: dict[str, Any] | None = None
        self.stopped = False

    @property
    def finished(self) -> bool:
        return self.stopped or self.done >= self.steps

    def train_epoch(self, progress: Callable[[int, int], None] | None) -> dict[str, float]:
        self.networks.train()
        rate = float(self.optimizer.param_groups[0]["lr"])
        sums: dict[str, float] = {}
        steps = min(self.steps_an_epoch, self.steps - self.done)
        for _ in range(steps):
            losses = self.objective.losses(self.objective.batch(self.generator))
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(losses["loss"])
            self.optimizer.step()
            self.done += 1
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + self._finite(name, loss.item())
            if progress is not None:
                progress(self.seen, self.steps * self.objective.patches_a_step)
        self.networks.eval()
        row = {
            "epoch": len(self.rows) + 1,
            "patches": self.seen,
            "learning_rate": rate,
            **{name: total / steps for name, total in sums.items()},
            **self.objective.validate(),
        }
        self.rows.append(row)
        self._judge(row)
        return row

    @property
    def seen(self) -> int:
        return self.done * self.objective.patches_a_step

    def _finite(self, name: str, value: float) -> float:
        if not math.isfinite(value):
            raise EncoderError(
                f"encoder '{self.spec.name}': {name} became {value} after {self.seen} patches; "
                f"lower its learning_rate (now {self.optimizer.param_groups[0]['lr']:g})"
            )
        return value

    def _judge(self, row: dict[str, float]) -> None:
        """Keep the weights if they are the best, lower the learning rate or stop if not."""
        selection = self.objective.selection
        if selection is None or self.plateau is None:
            return
        value = row[selection.value]
        self.plateau.step(value)
        for share, part in CEILINGS:
            if self.done >= share * self.steps:
                for group in self.optimizer.param_groups:
                    group["lr"] = min(group["lr"], max(LOWEST_RATE, self.first_rate * part))
        score = value if selection.mode == "max" else -value
        self.stale += 1
        if score > self.best:
            self.best, self.stale = score, 0
            self.kept = copy.deepcopy(self.networks.state_dict())
        self.stopped = row["learning_rate"] <= LOWEST_RATE and self.stale > PATIENCE

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
            "best": self.best,
            "stale": self.stale,
            "stopped": self.stopped,
        }
        with whole_file(path) as temporary:
            torch.save(state, temporary)

    def restore(self, path: Path, fingerprint: str) -> None:
        # weights_only: tensors and plain values, no code of a pickle is run
        state = torch.load(path, weights_only=True, map_location="cpu")
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
        for name in ("kept", "done", "rows", "best", "stale", "stopped"):
            setattr(self, name, state[name])
        log.info("encoder '%s': resumed after %d patches", self.spec.name, self.seen)

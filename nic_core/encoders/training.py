"""Training of encoders: one loop for every objective.

Schedule (paper B): Adam, learning rate divided by 10 on a plateau of the validation value
down to 1e-5, weights with the best validation value kept. What is an epoch, the patience and
the early stop at the floor are [choice]: the budget is a number of patches, not of passes
over data sets that differ in size, and an epoch is a fixed share of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl
import torch

from nic_core.cohort import EncoderSpec
from nic_core.encoders import pictures
from nic_core.encoders.encoder import (
    Encoder,
    EncoderCard,
    EncoderError,
    encoder_tensors,
    resolve_device,
    weights_hash,
)
from nic_core.encoders.networks import PatchEncoder, TellezEncoder, channels_last, pooled_side
from nic_core.encoders.objectives.base import Objective
from nic_core.encoders.objectives.mean_rgb import CODE, mean_rgb_module
from nic_core.encoders.objectives.mtl import Multitask, class_probabilities
from nic_core.encoders.patch_tasks import PatchDataset
from nic_core.encoders.scores import TaskScores, score_task
from nic_core.tracker import Tracker

EPOCHS = 24
PATIENCE = 2
REDUCTION = 0.1
LOWEST_RATE = 1e-5


@dataclass(frozen=True)
class Trained:
    """An encoder and how its training went.

    ``history`` has a row an epoch: epoch, patches (seen so far), learning_rate, mean losses
    and validation values; it is empty for mean-RGB.
    """

    encoder: Encoder
    history: pl.DataFrame


def train_encoder(
    spec: EncoderSpec,
    tasks: Sequence[PatchDataset],
    *,
    patch: int,
    mpp: float,
    code: int,
    device: str = "auto",
    tracker: Tracker | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train the encoder that ``spec`` describes and score it on each task's test split.

    The same spec, data and number of threads give the same weights on a CPU.

    Parameters
    ----------
    tasks
        Data sets of ``spec.tasks``, cut at ``patch`` px and ``mpp`` um/px.
    code
        Numbers a patch; mean-RGB always has 3.
    progress
        Called with (patches seen, patches in all) after each step.

    Raises
    ------
    EncoderError
        The data sets are not those of the spec, or the training diverged.
    """
    tasks = _matching_tasks(spec, tasks, patch, mpp)
    if spec.objective == "mean_rgb":
        module = mean_rgb_module()
        card = EncoderCard(
            name=spec.name,
            architecture="mean_rgb",
            objective=spec.objective,
            patch=patch,
            mpp=mpp,
            code=CODE,
            weights_hash=weights_hash("mean_rgb", encoder_tensors(module, {})),
            software=_software(),
        )
        return Trained(Encoder(card, module), pl.DataFrame())

    target = resolve_device(device)
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        encoder = PatchEncoder(TellezEncoder(code, pooled_side(patch))).to(target)
        channels_last(encoder)
        objective = Multitask(
            encoder,
            tasks,
            batch=spec.batch,
            # at most half an epoch in all, so validation costs little beside training
            validation=max(64, spec.patches_seen // EPOCHS // 2 // len(tasks)),
            seed=spec.seed,
        )
    if tracker is not None:
        tracker.params(
            {"encoder": spec.name, "objective": spec.objective, "tasks": ",".join(spec.tasks)}
            | _training_facts(spec)
        )
    history = _fit(spec, objective, target, tracker, progress)

    scores = {task.name: _test_scores(objective, task, target) for task in tasks}
    encoder = encoder.cpu().requires_grad_(False)
    heads = {name: head.cpu().requires_grad_(False) for name, head in objective.heads.items()}
    card = EncoderCard(
        name=spec.name,
        architecture="tellez2020",
        objective=spec.objective,
        tasks={task.name: task.classes for task in tasks},
        patch=patch,
        mpp=mpp,
        code=code,
        weights_hash=weights_hash("tellez2020", encoder_tensors(encoder, heads)),
        training=_training_facts(spec),
        data={task.name: task.identity for task in tasks},
        scores=scores,
        software=_software(),
    )
    if tracker is not None:
        _draw(tracker, history, card, tasks)
    return Trained(Encoder(card, encoder, heads), history)


def _fit(
    spec: EncoderSpec,
    objective: Objective,
    device: torch.device,
    tracker: Tracker | None,
    progress: Callable[[int, int], None] | None,
) -> pl.DataFrame:
    """Train ``objective.networks`` in place; leaves the selected weights, evaluation mode."""
    networks = objective.networks
    generator = torch.Generator(device).manual_seed(spec.seed)
    optimizer = torch.optim.Adam(networks.parameters(), lr=spec.learning_rate, fused=True)
    selection = objective.selection
    plateau = None
    if selection is not None:
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, selection.mode, REDUCTION, PATIENCE, threshold=0.0, min_lr=LOWEST_RATE
        )
    steps = math.ceil(spec.patches_seen / objective.patches_a_step)
    steps_an_epoch = math.ceil(steps / EPOCHS)
    total = steps * objective.patches_a_step
    best, kept, stale = -math.inf, networks.state_dict(), 0
    rows: list[dict[str, float]] = []

    for epoch in range(1, math.ceil(steps / steps_an_epoch) + 1):
        networks.train()
        first = (epoch - 1) * steps_an_epoch
        sums: dict[str, float] = {}
        last = min(first + steps_an_epoch, steps)
        for step in range(first + 1, last + 1):
            losses = objective.losses(objective.batch(generator))
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(losses["loss"])
            optimizer.step()
            seen = step * objective.patches_a_step
            for name, loss in losses.items():
                value = loss.item()
                if not math.isfinite(value):
                    raise EncoderError(
                        f"encoder '{spec.name}': {name} became {value} after {seen} patches; "
                        f"lower its learning_rate (now {spec.learning_rate})"
                    )
                sums[name] = sums.get(name, 0.0) + value
            if progress is not None:
                progress(seen, total)

        networks.eval()
        row = {
            "epoch": epoch,
            "patches": seen,
            "learning_rate": optimizer.param_groups[0]["lr"],
            **{name: value / (last - first) for name, value in sums.items()},
            **objective.validate(),
        }
        rows.append(row)
        if tracker is not None:
            tracker.metrics({k: v for k, v in row.items() if k != "epoch"}, step=epoch)
        if selection is None or plateau is None:
            continue
        value = row[selection.value]
        plateau.step(value)
        score = value if selection.mode == "max" else -value
        stale += 1
        if score > best:
            best, kept, stale = score, copy.deepcopy(networks.state_dict()), 0
        if row["learning_rate"] <= LOWEST_RATE and stale > PATIENCE:
            break

    if selection is not None:
        networks.load_state_dict(kept)
    networks.eval()
    return pl.DataFrame(rows)


def _test_scores(objective: Multitask, task: PatchDataset, device: torch.device) -> TaskScores:
    rows = task.rows("test")
    head = objective.heads[task.name]
    return score_task(
        task.labels[rows], class_probabilities(objective.encoder, head, task, rows, device)
    )


def _matching_tasks(
    spec: EncoderSpec, tasks: Sequence[PatchDataset], patch: int, mpp: float
) -> list[PatchDataset]:
    """The data sets in the spec's order, each checked for patch size and resolution."""
    by_name = {task.name: task for task in tasks}
    if sorted(by_name) != sorted(spec.tasks):
        raise EncoderError(
            f"encoder '{spec.name}' trains on {sorted(spec.tasks)}, not on {sorted(by_name)}"
        )
    for task in tasks:
        if task.patch != patch or task.mpp != mpp:
            raise EncoderError(
                f"encoder '{spec.name}' takes {patch} px at {mpp} um/px, but patch task "
                f"'{task.name}' has {task.patch} px at {task.mpp} um/px: make the task again"
            )
    return [by_name[name] for name in spec.tasks]


def _training_facts(spec: EncoderSpec) -> dict[str, int | float | str]:
    return spec.model_dump(include={"seed", "patches_seen", "batch", "learning_rate"})


def _software() -> dict[str, str]:
    return {"torch": torch.__version__}


def _draw(
    tracker: Tracker, history: pl.DataFrame, card: EncoderCard, tasks: Sequence[PatchDataset]
) -> None:
    tracker.figure("training_curves", pictures.training_curves(history))
    for task in tasks:
        tracker.figure(
            f"confusion_{task.name}",
            pictures.confusion_picture(task.name, task.classes, card.scores[task.name]),
        )
    tracker.figure("augmented_patches", pictures.augmentation_sheet(tasks))

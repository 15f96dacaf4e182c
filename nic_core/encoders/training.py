"""Training of encoders: from a spec and patch tasks to a scored encoder with its card."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch

from nic_core.cohort import EncoderSpec
from nic_core.devices import resolve_device, resolve_precision
from nic_core.encoders import figures as pictures
from nic_core.encoders.encoder import (
    Encoder,
    EncoderCard,
    EncoderError,
    build_encoder,
    encoder_tensors,
    weights_hash,
)
from nic_core.encoders.networks import channels_last
from nic_core.encoders.objectives.base import Objective
from nic_core.encoders.objectives.bigan import BidirectionalGAN
from nic_core.encoders.objectives.contrastive import Contrastive
from nic_core.encoders.objectives.mean_rgb import EMBEDDING_SIZE, mean_rgb_module
from nic_core.encoders.objectives.mtl import Multitask, class_probabilities
from nic_core.encoders.objectives.vae import VariationalAutoencoder
from nic_core.encoders.patch_tasks import PatchDataset, leaks
from nic_core.encoders.scores import TaskScores, score_task
from nic_core.encoders.training_loop import fit, patches_an_epoch
from nic_core.tracker import Tracker

log = logging.getLogger(__name__)

OBJECTIVES: dict[str, type[Multitask | VariationalAutoencoder | Contrastive | BidirectionalGAN]] = {
    "mtl": Multitask,
    "supervised": Multitask,
    "vae": VariationalAutoencoder,
    "contrastive": Contrastive,
    "bigan": BidirectionalGAN,
}
PUBLISHED_RATES = {
    "mtl": 1e-2,
    "supervised": 1e-2,
    "vae": 1e-3,
    "contrastive": 1e-2,
    "bigan": 2e-4,
}


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
    embedding_size: int,
    device: str = "auto",
    checkpoint: Path | None = None,
    tracker: Tracker | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train the encoder that ``spec`` describes and score it on each task's test split.

    The same spec, data and number of threads give the same weights on a CPU.

    Parameters
    ----------
    tasks
        Data sets of ``spec.tasks``, cut at ``patch`` px and ``mpp`` um/px.
    embedding
        Numbers a patch; mean-RGB always has 3.
    checkpoint
        File to go on from after a kill; written after each epoch, and left at the end to
        whoever keeps the encoder. One of another spec, data, version of torch or device is not
        used.
    progress
        Called with (patches seen, patches in all) after each step.

    What the validation says, each epoch and when the best weights are chosen, is of a seeded sample
    of at most half an epoch's patches, and 64 of a task at least [choice].

    Raises
    ------
    EncoderError
        The data sets are not those of the spec, its networks cannot take the patch, or the
        training diverged.
    """
    tasks = _matching_tasks(spec, tasks, patch, mpp)
    for leak in leaks(tasks, tasks):
        log.warning(
            "encoder '%s': %s; if they are the same patients, test scores tell less about others",
            spec.name,
            leak,
        )
    try:
        spec.check_patch(patch)
    except ValueError as error:
        raise EncoderError(str(error)) from error
    if spec.objective == "mean_rgb":
        module = mean_rgb_module()
        card = EncoderCard(
            name=spec.name,
            architecture="mean_rgb",
            objective=spec.objective,
            patch=patch,
            mpp=mpp,
            embedding_size=EMBEDDING_SIZE,
            weights_hash=weights_hash("mean_rgb", encoder_tensors(module, {})),
            software=_software(),
        )
        return Trained(Encoder(card, module), pl.DataFrame())

    target = resolve_device(device)
    rate = spec.learning_rate or PUBLISHED_RATES[spec.objective]
    precision = resolve_precision(spec.precision, target)
    facts: dict[str, int | float | str] = {
        "seed": spec.seed,
        "batch": spec.batch,
        "learning_rate": rate,
        "precision": precision,
    }
    if spec.task_weights != "equal":
        facts["task_weights"] = spec.task_weights
    data = {task.name: task.identity for task in tasks}
    software = _software()
    if tracker is not None:
        tracker.params(
            {
                "encoder": spec.name,
                "objective": spec.objective,
                "tasks": ",".join(spec.tasks),
                "patches_seen": spec.patches_seen or "as published",
                **facts,
            }
        )
        # first, so that it can be looked at while the training runs
        tracker.figure("augmented_patches", pictures.augmentation_sheet(tasks))
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        encoder = build_encoder(spec.architecture, patch=patch, embedding_size=embedding_size).to(
            target
        )
        objective = OBJECTIVES[spec.objective](
            encoder,
            tasks,
            batch=spec.batch,
            # at most half an epoch in all, so validation costs little beside training
            validation=max(64, patches_an_epoch(spec, tasks) // 2 // len(tasks)),
            seed=spec.seed,
            **({"task_weights": spec.task_weights} if spec.objective == "mtl" else {}),
        )
        channels_last(objective.networks)
        setting = repr((spec, patch, mpp, embedding_size, data, software, target.type, precision))
        history = fit(
            objective,
            spec,
            learning_rate=rate,
            precision=precision,
            checkpoint=checkpoint,
            fingerprint=hashlib.sha256(setting.encode()).hexdigest(),
            tracker=tracker,
            progress=progress,
        )

    scores = {
        task.name: _test_scores(objective, task, target)
        for task in tasks
        if task.name in objective.heads
    }
    encoder = encoder.cpu().requires_grad_(False)
    heads = {name: head.cpu().requires_grad_(False) for name, head in objective.heads.items()}
    card = EncoderCard(
        name=spec.name,
        architecture=spec.architecture,
        objective=spec.objective,
        tasks={task.name: task.classes for task in tasks if task.name in heads},
        patch=patch,
        mpp=mpp,
        embedding_size=embedding_size,
        weights_hash=weights_hash(spec.architecture, encoder_tensors(encoder, heads)),
        training=facts | {"patches_seen": int(history["patches"][-1])},
        data=data,
        scores=scores,
        software=software,
    )
    if tracker is not None:
        _draw_results(tracker, history, card, tasks)
    return Trained(Encoder(card, encoder, heads), history)


def _test_scores(objective: Objective, task: PatchDataset, device: torch.device) -> TaskScores:
    rows = task.rows("test")
    head = objective.heads[task.name]
    return score_task(
        task.labels[rows],
        class_probabilities(objective.encoder, head, task, rows, device),
        task.table["group"].gather(rows).to_list(),
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


def _software() -> dict[str, str]:
    return {"torch": torch.__version__}


def _draw_results(
    tracker: Tracker, history: pl.DataFrame, card: EncoderCard, tasks: Sequence[PatchDataset]
) -> None:
    tracker.figure("training_curves", pictures.training_curves(history))
    for task in tasks:
        if task.name not in card.scores:
            continue
        tracker.figure(
            f"confusion_{task.name}",
            pictures.confusion_picture(task.name, task.classes, card.scores[task.name]),
        )

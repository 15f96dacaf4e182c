"""Section 3, training of an encoder: from its spec and patch tasks to weights, card and scores."""

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
from nic_core.encoders.encoder import (
    Encoder,
    EncoderCard,
    build_encoder,
    encoder_tensors,
    weights_hash,
)
from nic_core.encoders.errors import EncoderError
from nic_core.encoders.figures import augmentation_sheet, confusion_matrix, training_curves
from nic_core.encoders.networks import channels_last
from nic_core.encoders.objectives.base import Objective
from nic_core.encoders.objectives.bigan import BidirectionalGAN
from nic_core.encoders.objectives.contrastive import Contrastive
from nic_core.encoders.objectives.mean_rgb import EMBEDDING_SIZE, mean_rgb_module
from nic_core.encoders.objectives.mtl import Multitask, class_probabilities
from nic_core.encoders.objectives.vae import VariationalAutoencoder
from nic_core.encoders.patch_tasks import PatchDataset, leaks
from nic_core.encoders.scores import TaskScores, score_task
from nic_core.encoders.training_loop import fit, patches_per_epoch
from nic_core.tracker import Tracker

log = logging.getLogger(__name__)

# the objective of each name in a cohort file; its class holds the published learning rate
OBJECTIVES: dict[str, type[Multitask | VariationalAutoencoder | Contrastive | BidirectionalGAN]] = {
    "mtl": Multitask,
    "supervised": Multitask,
    "vae": VariationalAutoencoder,
    "contrastive": Contrastive,
    "bigan": BidirectionalGAN,
}


@dataclass(frozen=True)
class Trained:
    """A trained encoder and the history of its training.

    ``history`` has one row per epoch: epoch, patches (seen so far), learning_rate, mean losses
    and validation values. It is empty for mean-RGB and for imported encoders.
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

    The same spec, data and number of threads give the same weights on a CPU. Validation values
    are computed on a seeded sample of at most half an epoch's patches, but at least 64 patches of
    each task [choice].

    Parameters
    ----------
    spec : EncoderSpec
        Entry of the cohort file.
    tasks : sequence of PatchDataset
        The patch tasks ``spec.tasks``, with patches of ``patch`` px. Their um/px may differ, as
        those of the published encoder's tasks did.
    patch : int
        Side of a patch, px.
    mpp : float
        um/px of the patches of slides that the encoder will be applied to.
    embedding_size : int
        Length of an embedding; mean-RGB always has 3.
    device : str
        ``auto`` (CUDA if available), ``cpu``, ``cuda`` or ``cuda:1``.
    checkpoint : Path, optional
        File that is written after each epoch and from which an interrupted training resumes. The
        caller deletes it once the encoder is saved. A checkpoint of another spec, other data,
        another version of PyTorch or another device is ignored.
    tracker : Tracker, optional
        Receives settings, metrics and figures.
    progress : callable, optional
        Called with (patches seen, total patches) after each step.

    Raises
    ------
    EncoderError
        The patch tasks do not match the spec, the networks do not support the patch size, or a
        loss became NaN or infinite.
    """
    tasks = _matching_tasks(spec, tasks, patch)
    for leak in leaks(tasks, tasks):
        log.warning(
            "encoder '%s': %s; if they are the same patients, test scores are too optimistic for "
            "new patients",
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
    rate = spec.learning_rate or OBJECTIVES[spec.objective].learning_rate
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
        # logged first, so that it is available during the training
        tracker.figure("augmented_patches", augmentation_sheet(tasks))
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        encoder = build_encoder(spec.architecture, patch=patch, embedding_size=embedding_size).to(
            target
        )
        objective = OBJECTIVES[spec.objective](
            encoder,
            tasks,
            batch=spec.batch,
            # at most half an epoch in total, so that validation costs little
            validation=max(64, patches_per_epoch(spec, tasks) // 2 // len(tasks)),
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
        task_mpp={task.name: task.mpp for task in tasks},
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
    spec: EncoderSpec, tasks: Sequence[PatchDataset], patch: int
) -> list[PatchDataset]:
    """Return the tasks in the spec's order, each checked for patch size."""
    by_name = {task.name: task for task in tasks}
    if sorted(by_name) != sorted(spec.tasks):
        raise EncoderError(
            f"encoder '{spec.name}' trains on the patch tasks {sorted(spec.tasks)}, but "
            f"{sorted(by_name)} were given; give one dataset for each task of the encoder"
        )
    for task in tasks:
        if task.patch != patch:
            raise EncoderError(
                f"encoder '{spec.name}' takes patches of {patch} px, but patch task '{task.name}' "
                f"has {task.patch} px; make the patch task again"
            )
    return [by_name[name] for name in spec.tasks]


def _software() -> dict[str, str]:
    return {"torch": torch.__version__}


def _draw_results(
    tracker: Tracker, history: pl.DataFrame, card: EncoderCard, tasks: Sequence[PatchDataset]
) -> None:
    tracker.figure("training_curves", training_curves(history))
    for task in tasks:
        if task.name not in card.scores:
            continue
        tracker.figure(
            f"confusion_{task.name}",
            confusion_matrix(task.name, task.classes, card.scores[task.name]),
        )

"""Section 3, training of an encoder: from its spec and patch tasks to weights, card and scores."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import torch

from nic_core.cohort import EncoderSpec
from nic_core.devices import resolve_device, resolve_precision
from nic_core.encoders.encoder import (
    Encoder,
    EncoderCard,
    InitialWeightsRecord,
    build_encoder,
    encoder_tensors,
    weights_hash,
    with_embedding,
)
from nic_core.encoders.errors import EncoderError
from nic_core.encoders.networks import PatchEncoder, channels_last
from nic_core.encoders.objectives.base import Objective
from nic_core.encoders.objectives.bigan import BidirectionalGAN
from nic_core.encoders.objectives.contrastive import Contrastive
from nic_core.encoders.objectives.mean_rgb import EMBEDDING_SIZE, mean_rgb_module
from nic_core.encoders.objectives.mtl import (
    FEWEST_TO_CHOOSE,
    Multitask,
    class_probabilities,
)
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


FINE_TUNING_RATE = 2e-4
"""Default learning rate of a training from initial weights [choice]."""


@dataclass(frozen=True)
class InitialEncoder:
    """An encoder whose weights a training starts from.

    Attributes
    ----------
    encoder : Encoder
    origin : str
        Where it is from, for the card: an encoder of the study, a file or a registered version.
    """

    encoder: Encoder
    origin: str


@dataclass(frozen=True)
class Trained:
    """A trained encoder and the history of its training.

    ``history`` has one row per epoch, ``confusion`` the confusion matrices of the validation
    patches (:func:`~nic_core.encoders.training_loop.fit`). Both are empty for mean-RGB and for
    imported encoders.
    """

    encoder: Encoder
    history: pl.DataFrame = field(default_factory=pl.DataFrame)
    confusion: pl.DataFrame = field(default_factory=pl.DataFrame)


def train_encoder(
    spec: EncoderSpec,
    tasks: Sequence[PatchDataset],
    *,
    patch: int,
    mpp: float,
    embedding_size: int,
    initial: InitialEncoder | None = None,
    device: str = "auto",
    checkpoint: Path | None = None,
    tracker: Tracker | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train the encoder that ``spec`` describes and score it on each task's test split.

    The same spec, data and number of threads give the same weights on a CPU. Validation values
    are computed on a seeded sample of at most half an epoch's patches, but at least 64 patches of
    each task [choice].

    From initial weights, the network starts from those of ``initial``. So does the head of each
    task that ``initial`` has with the same classes in the same order; other heads start from random
    weights [choice]. The um/px may differ.

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
        Length of the dense code; mean-RGB always has 3.
    initial : InitialEncoder, optional
        The encoder that ``spec.initial_weights`` names; required exactly if it names one.
    device : str
        ``auto`` (CUDA if available), ``cpu``, ``cuda`` or ``cuda:1``.
    checkpoint : Path, optional
        File that is written after each epoch and from which an interrupted training resumes. The
        caller deletes it once the encoder is saved. A checkpoint of another spec, other data,
        another version of PyTorch or another device is ignored.
    tracker : Tracker, optional
        Receives the metrics after each epoch.
    progress : callable, optional
        Called with (patches seen, total patches) after each step.

    Raises
    ------
    EncoderError
        The patch tasks do not match the spec, the networks do not support the patch size, the
        initial weights are those of another network, or a loss became NaN or infinite.
    """
    tasks = _matching_tasks(spec, tasks, patch)
    if (initial is None) != (spec.initial_weights is None):
        raise EncoderError(
            f"encoder '{spec.name}': 'initial_weights' and the encoder to start from belong "
            "together; give both or neither"
        )
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
        return Trained(Encoder(card, module))

    target = resolve_device(device)
    rate = spec.learning_rate or (
        OBJECTIVES[spec.objective].learning_rate if initial is None else FINE_TUNING_RATE
    )
    precision = resolve_precision(spec.precision, target)
    facts: dict[str, int | float | str] = {
        "seed": spec.seed,
        "batch": spec.batch,
        "learning_rate": rate,
        "precision": precision,
    }
    if spec.task_weights != "equal":
        facts["task_weights"] = spec.task_weights
    start = None if initial is None else _record(spec, tasks, initial, patch, embedding_size)
    if start is not None:
        facts |= {
            "initial_weights": start.origin,
            "initial_weights_hash": start.weights_hash,
            "frozen_blocks": start.frozen_blocks,
        }
    if spec.refit is not None:
        facts["refit"] = spec.refit
    data = {task.name: task.identity for task in tasks}
    software = _software()
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
        if initial is not None and start is not None:
            _load_initial_weights(objective, initial.encoder, start)
        channels_last(objective.networks)
        # the start counts by its weights: a download is in another folder each time
        own = spec.model_copy(update={"initial_weights": None})
        setting = repr(
            (own, start, patch, mpp, embedding_size, data, software, target.type, precision)
        )
        history, confusion = fit(
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
    kept = _kept_weights(objective, history)
    log.info("encoder '%s': kept the weights of %s", spec.name, kept)
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
        training=facts
        | {
            "patches_seen": int(history.filter(phase="training")["patches"][-1]),
            "kept_weights": kept,
        },
        initial_weights=start,
        data=data,
        scores=scores,
        software=software,
    )
    return Trained(
        with_embedding(Encoder(card, encoder, heads), spec.embedding), history, confusion
    )


def _record(
    spec: EncoderSpec,
    tasks: Sequence[PatchDataset],
    initial: InitialEncoder,
    patch: int,
    embedding_size: int,
) -> InitialWeightsRecord:
    """Return the record of the initial weights, after checking that they fit the network."""
    card = initial.encoder.card
    for what, found, wanted in (
        ("architecture", card.architecture, spec.architecture),
        ("patch size", f"{card.patch} px", f"{patch} px"),
        ("size of the dense code", card.code_size, embedding_size),
    ):
        if found != wanted:
            raise EncoderError(
                f"encoder '{spec.name}': its initial weights ({initial.origin}) have {what} "
                f"{found}, but its network has {wanted}; name other initial weights, or change "
                "the encoder's settings to theirs"
            )
    assert spec.initial_weights is not None
    with_heads = tasks if spec.objective in ("mtl", "supervised") else ()
    same = tuple(task.name for task in with_heads if card.tasks.get(task.name) == task.classes)
    for task in with_heads:
        if task.name in card.tasks and task.name not in same:
            log.warning(
                "encoder '%s': task '%s' of the initial weights (%s) has other classes, so its "
                "head starts from random weights",
                spec.name,
                task.name,
                initial.origin,
            )
    return InitialWeightsRecord(
        origin=initial.origin,
        weights_hash=card.weights_hash,
        mpp=card.mpp,
        training_recorded=card.training_recorded,
        frozen_blocks=spec.initial_weights.freeze,
        heads=same,
        data=card.seen_data,
    )


def _load_initial_weights(
    objective: Objective, initial: Encoder, start: InitialWeightsRecord
) -> None:
    assert isinstance(initial.module, PatchEncoder)  # its architecture is that of the objective
    objective.encoder.load_state_dict(initial.module.state_dict())
    objective.encoder.network.freeze(start.frozen_blocks)
    for task in start.heads:
        objective.heads[task].load_state_dict(initial.heads[task].state_dict())


def _kept_weights(objective: Objective, history: pl.DataFrame) -> str:
    """Say which weights were kept, and by what they were chosen."""
    selection = objective.selection
    epochs = history.filter(phase="training").height
    refitted = history.height - epochs
    epoch = refitted or history["epoch"].filter(history["kept"])[0]
    too_small = objective.too_small if isinstance(objective, Multitask) else ()
    few = f"{', '.join(too_small)}: fewer than {FEWEST_TO_CHOOSE} validation patches of a class"
    if selection is None:
        chosen = f"epoch {epoch} of {epochs}, the last"
    elif selection.keep == "last":
        chosen = f"epoch {epoch} of {epochs}, the last, because no task can choose ({few})"
    else:
        chosen = f"epoch {epoch} of {epochs}, chosen by {selection.value}" + (
            f" (without {few})" if too_small else ""
        )
    if not refitted:
        return chosen
    return f"the refit on train and validation, as many steps as up to {chosen}"


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

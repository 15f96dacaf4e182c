"""Section 3, multitask learning (MTL) [A]: one shared encoder, one head per task.

The paper specifies a shared encoder, one head per task and one combined loss. The heads and the
schedule follow the supervised encoder of paper B. Equal task weights, task-balanced batches,
class-balanced batches within a task and selection by the mean balanced accuracy are [choice], as
is the alternative weighting by learned uncertainty (Kendall, Gal & Cipolla, CVPR 2018).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from nic_core.encoders.networks import ClassHead, PatchEncoder
from nic_core.encoders.objectives.base import PatchObjective, Selection, Sizes, Validation
from nic_core.encoders.objectives.sampling import patch_tensor, training_inputs
from nic_core.encoders.patch_tasks import PatchDataset
from nic_core.encoders.scores import TaskScores, score_task

CHUNK = 128
SELECTION = "validation/balanced_accuracy"  # mean over the tasks that can choose
# validation patches of each class; with fewer, one patch moves the recall of a class by more than
# 0.1 [choice]
FEWEST_TO_CHOOSE = 10


@dataclass(frozen=True)
class MultitaskBatch:
    """Augmented network input (B, 3, S, S) in [-1, 1], and the labels of each task.

    The rows of ``inputs`` are in the order of the tasks, ``len(labels[t])`` rows for task ``t``.
    """

    inputs: Tensor
    labels: tuple[Tensor, ...]


class Multitask(PatchObjective):
    """The objective of T supervised tasks; with one task, the supervised encoder of paper B.

    Attributes
    ----------
    too_small : tuple of str
        Tasks with fewer than :data:`FEWEST_TO_CHOOSE` validation patches of a class. They have no
        part in the choice of the weights; if all tasks are such, the last weights are kept.
    """

    learning_rate = 1e-2  # [B] for one task; [choice] for several
    by_class = True

    def __init__(
        self,
        encoder: PatchEncoder,
        tasks: Sequence[PatchDataset],
        task_weights: Literal["equal", "uncertainty"] = "equal",
        **sizes: Unpack[Sizes],
    ) -> None:
        super().__init__(encoder, tasks, **sizes)
        embedding_size = encoder.network.embedding_size
        self.heads = {task.name: ClassHead(embedding_size, len(task.classes)) for task in tasks}
        # lists, because a task's name may be an attribute of a module dictionary, such as "type"
        self.add_networks(heads=nn.ModuleList(self.heads.values()))
        self.too_small = tuple(task.name for task in tasks if not can_choose(task))
        self.selection = Selection(
            SELECTION,
            "max",
            keep="last" if len(self.too_small) == len(self.tasks) else "best",
        )
        self.log_variances: dict[str, nn.Parameter] = {}
        if task_weights == "uncertainty":
            self.log_variances = {
                task.name: nn.Parameter(torch.zeros((), device=self.device)) for task in tasks
            }
            self.add_networks(log_variances=nn.ParameterList(self.log_variances.values()))

    def batch(self, generator: torch.Generator) -> MultitaskBatch:
        draws = list(zip(self.tasks, self.sampler.draw(generator), strict=True))
        inputs = training_inputs(draws, self.encoder.network.pooling, generator)
        labels = (torch.as_tensor(task.labels[rows], device=self.device) for task, rows in draws)
        return MultitaskBatch(inputs, tuple(labels))

    def losses(self, batch: MultitaskBatch) -> dict[str, Tensor]:
        embeddings = self.encoder.network(batch.inputs)
        parts = embeddings.split([len(labels) for labels in batch.labels])
        losses = {
            task.name: functional.cross_entropy(self.heads[task.name](part), labels)
            for task, part, labels in zip(self.tasks, parts, batch.labels, strict=True)
        }
        named = {f"loss/{name}": loss for name, loss in losses.items()}
        if not self.log_variances:
            return {"loss": torch.stack(list(losses.values())).mean(), **named}
        return {
            "loss": uncertainty_loss(losses, self.log_variances),
            **named,
            **{f"weight/{name}": (-self.log_variances[name].detach()).exp() for name in losses},
        }

    def validate(self) -> Validation:
        values: dict[str, float] = {}
        found: dict[str, TaskScores] = {}
        for task, rows in zip(self.tasks, self.validation_rows, strict=True):
            probabilities = class_probabilities(
                self.encoder, self.heads[task.name], task, rows, self.device
            )
            if not np.isfinite(probabilities).all():
                # scores are undefined; the NaN makes the training loop raise
                return Validation({f"validation/{task.name}/balanced_accuracy": math.nan})
            scores = score_task(task.labels[rows], probabilities)
            found[task.name] = scores
            values[f"validation/{task.name}/balanced_accuracy"] = scores.balanced_accuracy
            values[f"validation/{task.name}/f1"] = scores.f1
            if scores.auc is not None:
                values[f"validation/{task.name}/auc"] = scores.auc
        choosing = found.keys() - set(self.too_small) or found.keys()
        accuracies = [found[name].balanced_accuracy for name in found if name in choosing]
        values[SELECTION] = float(np.mean(accuracies))
        return Validation(values, found)


def can_choose(task: PatchDataset) -> bool:
    """Return whether the validation split has enough patches of each class to choose weights by."""
    counts = np.bincount(task.labels[task.rows("validation")], minlength=len(task.classes))
    return bool(counts.min() >= FEWEST_TO_CHOOSE)


def uncertainty_loss(losses: Mapping[str, Tensor], log_variances: Mapping[str, Tensor]) -> Tensor:
    """Return the mean over tasks of ``exp(-s) * loss + s / 2``; s is a learned log-variance.

    This is the classification term of Kendall et al. 2018 with s = log sigma^2. Their sum over
    tasks is a mean here, so that at the start (s = 0) it equals the equally weighted loss.
    """
    terms = [
        torch.exp(-log_variances[name]) * loss + log_variances[name] / 2
        for name, loss in losses.items()
    ]
    return torch.stack(terms).mean()


@torch.inference_mode()
def class_probabilities(
    encoder: nn.Module,
    head: nn.Module,
    task: PatchDataset,
    rows: NDArray[np.int64],
    device: torch.device,
) -> NDArray[np.float32]:
    """Return class probabilities (N, classes) of ``rows``, by modules in evaluation mode."""
    parts = [
        head(encoder(patch_tensor(task, rows[start : start + CHUNK], device))).softmax(1).cpu()
        for start in range(0, len(rows), CHUNK)
    ]
    probabilities: NDArray[np.float32] = torch.cat(parts).numpy()
    return probabilities

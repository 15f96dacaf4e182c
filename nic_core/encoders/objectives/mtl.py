"""Supervised multitask learning (paper A): one shared encoder, one head a task.

The paper gives the shared encoder, a head a task and one combined loss. Heads and schedule
are those of paper B's supervised encoder; equal task weights, task-balanced batches, batches
balanced by class within a task and selection by the mean balanced accuracy are [choice].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from nic_core.encoders.augmentation import augment
from nic_core.encoders.networks import ClassHead, PatchEncoder, pool_patches
from nic_core.encoders.objectives.base import Selection
from nic_core.encoders.objectives.sampling import Sampler, patch_tensor, validation_rows
from nic_core.encoders.patch_tasks import PatchDataset
from nic_core.encoders.scores import score_task

CHUNK = 128


@dataclass(frozen=True)
class MultitaskBatch:
    """Augmented network input (B, 3, S, S) in [-1, 1]; task ``t`` owns ``len(labels[t])`` rows."""

    inputs: Tensor
    labels: tuple[Tensor, ...]


class Multitask:
    """The objective of T supervised tasks; with one task, paper B's supervised encoder."""

    selection = Selection("validation/balanced_accuracy", "max")

    def __init__(
        self,
        encoder: PatchEncoder,
        tasks: Sequence[PatchDataset],
        *,
        batch: int,
        validation: int,
        seed: int,
    ) -> None:
        """``batch`` is shared equally by the tasks; ``validation``: most patches a task there."""
        device = next(encoder.parameters()).device
        self.encoder = encoder
        self.tasks = tuple(tasks)
        code = encoder.network.code
        self.heads = nn.ModuleDict(
            {task.name: ClassHead(code, len(task.classes)) for task in tasks}
        ).to(device)
        self.networks = nn.ModuleDict({"encoder": encoder, "heads": self.heads})
        # BatchNorm needs two rows of a task
        self.share = max(2, batch // len(self.tasks))
        self.patches_a_step = self.share * len(self.tasks)
        self.sampler = Sampler(self.tasks, self.share, by_class=True, device=device)
        self.validation_rows = validation_rows(self.tasks, validation, seed)
        self.device = device

    def batch(self, generator: torch.Generator) -> MultitaskBatch:
        pooled, labels = [], []
        for task, rows in zip(self.tasks, self.sampler.draw(generator), strict=True):
            patches = patch_tensor(task, rows, self.device)
            pooled.append(pool_patches(patches, self.encoder.network.pooling))
            labels.append(torch.as_tensor(task.labels[rows], device=self.device))
        variants = augment(torch.cat(pooled).div_(255), generator)
        return MultitaskBatch(variants.mul_(2).sub_(1), tuple(labels))

    def losses(self, batch: MultitaskBatch) -> dict[str, Tensor]:
        codes = self.encoder.network(batch.inputs)
        parts = codes.split([len(labels) for labels in batch.labels])
        losses = {
            f"loss/{task.name}": functional.cross_entropy(self.heads[task.name](part), labels)
            for task, part, labels in zip(self.tasks, parts, batch.labels, strict=True)
        }
        return {"loss": torch.stack(list(losses.values())).mean(), **losses}

    def validate(self) -> dict[str, float]:
        values: dict[str, float] = {}
        accuracies = []
        for task, rows in zip(self.tasks, self.validation_rows, strict=True):
            scores = score_task(
                task.labels[rows],
                class_probabilities(self.encoder, self.heads[task.name], task, rows, self.device),
            )
            accuracies.append(scores.balanced_accuracy)
            values[f"validation/{task.name}/balanced_accuracy"] = scores.balanced_accuracy
            if scores.auc is not None:
                values[f"validation/{task.name}/auc"] = scores.auc
        values[self.selection.value] = float(np.mean(accuracies))
        return values


@torch.inference_mode()
def class_probabilities(
    encoder: nn.Module,
    head: nn.Module,
    task: PatchDataset,
    rows: NDArray[np.int64],
    device: torch.device,
) -> NDArray[np.float32]:
    """Class probabilities (N, classes) of a task's patches; modules in evaluation mode."""
    parts = [
        head(encoder(patch_tensor(task, rows[start : start + CHUNK], device))).softmax(1).cpu()
        for start in range(0, len(rows), CHUNK)
    ]
    probabilities: NDArray[np.float32] = torch.cat(parts).numpy()
    return probabilities

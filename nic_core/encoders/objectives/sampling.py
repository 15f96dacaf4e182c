"""Drawing patches of several tasks, the same number of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nic_core.encoders.patch_tasks import PatchDataset


class Sampler:
    """Draws ``share`` training patches of each task, with replacement.

    With ``by_class`` every class of a task is drawn equally often, else every patch.
    """

    def __init__(
        self, tasks: Sequence[PatchDataset], share: int, *, by_class: bool, device: torch.device
    ) -> None:
        self.tasks = tuple(tasks)
        self.share = share
        self.rows = [task.rows("train") for task in tasks]
        self.weights = [
            (class_balance(task, rows) if by_class else torch.ones(len(rows))).to(device)
            for task, rows in zip(self.tasks, self.rows, strict=True)
        ]

    def draw(self, generator: torch.Generator) -> list[NDArray[np.int64]]:
        """Rows of each task's patches."""
        return [
            rows[torch.multinomial(weights, self.share, True, generator=generator).cpu().numpy()]
            for rows, weights in zip(self.rows, self.weights, strict=True)
        ]


def class_balance(task: PatchDataset, rows: NDArray[np.int64]) -> Tensor:
    """Weight of each row such that the classes among them have the same sum."""
    labels = task.labels[rows]
    counts = np.bincount(labels, minlength=len(task.classes))
    return torch.from_numpy(1 / counts[labels])


def validation_rows(tasks: Sequence[PatchDataset], most: int, seed: int) -> list[NDArray[np.int64]]:
    """Up to ``most`` validation patches of each task, the same at every call."""
    rng = np.random.default_rng(seed)
    return [np.sort(rng.permutation(task.rows("validation"))[:most]) for task in tasks]


def patch_tensor(task: PatchDataset, rows: NDArray[np.int64], device: torch.device) -> Tensor:
    """Patches as uint8 (B, 3, P, P) in channels-last layout."""
    return torch.from_numpy(task.patches[rows]).to(device).permute(0, 3, 1, 2)

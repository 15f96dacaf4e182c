"""From patch tasks to a batch: which patches, and what the network sees of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nic_core.encoders.augmentation import augment
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
        self.device = device
        self.rows = [task.rows("train") for task in tasks]
        # shares of the patches up to each one: a draw is a look-up, however many there are
        self.shares = [
            (class_balance(task, rows) if by_class else torch.ones(len(rows), dtype=torch.float64))
            .cumsum(0)
            .to(device)
            for task, rows in zip(self.tasks, self.rows, strict=True)
        ]

    def draw(self, generator: torch.Generator) -> list[NDArray[np.int64]]:
        """Rows of each task's patches."""
        drawn = []
        for rows, shares in zip(self.rows, self.shares, strict=True):
            chance = torch.rand(
                self.share, generator=generator, device=self.device, dtype=torch.float64
            )
            places = torch.searchsorted(shares, chance * shares[-1], right=True)
            drawn.append(rows[places.clamp(max=len(rows) - 1).cpu().numpy()])
        return drawn


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


def training_inputs(
    draws: Iterable[tuple[PatchDataset, NDArray[np.int64]]],
    pooling: int,
    generator: torch.Generator,
) -> Tensor:
    """Augmented patches of the drawn rows as the network sees them.

    float32 (B, 3, P / pooling, P / pooling) in [-1, 1], on the generator's device.
    """
    pooled = [
        pool_stored(torch.from_numpy(task.patches[rows]).to(generator.device), pooling)
        for task, rows in draws
    ]
    return augment(torch.cat(pooled).div_(255), generator).mul_(2).sub_(1)


def pool_stored(pixels: Tensor, pooling: int) -> Tensor:
    """:func:`~nic_core.encoders.networks.pool_patches` for patches as they are stored.

    uint8 (B, P, P, 3) to float32 (B, 3, P / pooling, P / pooling) in channels-last layout. Sums
    of whole rows in int16 are four times as fast on a CPU as pooling the converted pixels.
    """
    batch, side = len(pixels), pixels.shape[1] // pooling
    lines = pixels.view(batch, side, pooling, -1)
    sums = lines[:, :, 0].short()
    for line in range(1, pooling):
        sums += lines[:, :, line]
    columns = sums.view(batch, side, side, pooling, 3)
    total = columns[:, :, :, 0]
    for column in range(1, pooling):
        total = total + columns[:, :, :, column]
    return total.float().div_(pooling**2).permute(0, 3, 1, 2)

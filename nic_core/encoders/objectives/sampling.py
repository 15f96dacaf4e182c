"""Section 3, batches: draw patches of the patch tasks and augment them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nic_core.encoders.augmentation import augment
from nic_core.encoders.patch_tasks import PatchDataset


class Sampler:
    """Draws ``share`` patches of each task from ``splits``, with replacement.

    With ``by_class`` every class of a task has the same probability, otherwise every patch.
    """

    def __init__(
        self,
        tasks: Sequence[PatchDataset],
        share: int,
        *,
        by_class: bool,
        device: torch.device,
        splits: tuple[str, ...] = ("train",),
    ) -> None:
        self.tasks = tuple(tasks)
        self.share = share
        self.device = device
        self.rows = [np.concatenate([task.rows(split) for split in splits]) for task in tasks]
        # cumulative weights: a draw is a binary search
        self.cumulative = [
            (class_balance(task, rows) if by_class else torch.ones(len(rows), dtype=torch.float64))
            .cumsum(0)
            .to(device)
            for task, rows in zip(self.tasks, self.rows, strict=True)
        ]

    def draw(self, generator: torch.Generator) -> list[NDArray[np.int64]]:
        """Return the drawn rows of each task."""
        places = []
        for cumulative in self.cumulative:
            chance = torch.rand(
                self.share, generator=generator, device=self.device, dtype=torch.float64
            )
            found = torch.searchsorted(cumulative, chance * cumulative[-1], right=True)
            places.append(found.clamp(max=len(cumulative) - 1))
        # one copy from the device, because each waits for it
        drawn = torch.stack(places).cpu().numpy()
        return [rows[at] for rows, at in zip(self.rows, drawn, strict=True)]


def class_balance(task: PatchDataset, rows: NDArray[np.int64]) -> Tensor:
    """Return a weight for each row, such that every class has the same total weight."""
    labels = task.labels[rows]
    counts = np.bincount(labels, minlength=len(task.classes))
    return torch.from_numpy(1 / counts[labels])


def validation_rows(
    tasks: Sequence[PatchDataset], limit: int, seed: int
) -> list[NDArray[np.int64]]:
    """Return up to ``limit`` validation rows of each task, the same at every call."""
    rng = np.random.default_rng(seed)
    return [np.sort(rng.permutation(task.rows("validation"))[:limit]) for task in tasks]


def patch_tensor(task: PatchDataset, rows: NDArray[np.int64], device: torch.device) -> Tensor:
    """Return patches as uint8 (B, 3, P, P) in channels-last layout."""
    return torch.from_numpy(task.patches[rows]).to(device).permute(0, 3, 1, 2)


def training_inputs(
    draws: Iterable[tuple[PatchDataset, NDArray[np.int64]]],
    pooling: int,
    generator: torch.Generator,
) -> Tensor:
    """Return augmented network input of the drawn rows.

    It is float32 (B, 3, P / pooling, P / pooling) in [-1, 1], on the generator's device.
    """
    pooled = [
        pool_stored(torch.from_numpy(task.patches[rows]).to(generator.device), pooling)
        for task, rows in draws
    ]
    return augment(torch.cat(pooled).div_(255), generator).mul_(2).sub_(1)


def pool_stored(pixels: Tensor, pooling: int) -> Tensor:
    """Pool stored patches as :func:`~nic_core.encoders.networks.pool_patches` does, but faster.

    uint8 (B, P, P, 3) to float32 (B, 3, P / pooling, P / pooling) in channels-last layout. Sums
    of whole rows in int16 are four times as fast on a CPU as average pooling in float32.
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

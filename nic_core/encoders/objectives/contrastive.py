"""Contrastive training (paper B): do two patches show the same place?

A Siamese encoder; the two codes, concatenated, pass a dense layer of 256 to one logit. 'Same'
pairs are two heavy augmentations of one patch; of the others 75 % are adjacent,
non-overlapping patches of one image and 25 % patches of two groups (patients). As many 'same'
pairs as others, BatchNorm and LeakyReLU in the head are [choice].
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
from nic_core.encoders.encoder import EncoderError
from nic_core.encoders.networks import ClassHead, PatchEncoder, pool_patches
from nic_core.encoders.objectives.base import Selection
from nic_core.encoders.objectives.sampling import patch_tensor
from nic_core.encoders.patch_tasks import PatchDataset

ADJACENT_SHARE = 0.75


@dataclass(frozen=True)
class PairBatch:
    """Network inputs (B, 3, S, S) in [-1, 1] of each pair, and 1.0 where they are one place."""

    first: Tensor
    second: Tensor
    same: Tensor


class _Pairs:
    """The pairs that one split of a task offers."""

    def __init__(self, task: PatchDataset, split: str) -> None:
        self.task = task
        self.rows = task.rows(split)
        table = task.table[self.rows]
        self.groups = table["group"].to_numpy()
        places = table.select("source", "x", "y").iter_rows()
        at = dict(zip(places, self.rows, strict=True))
        steps = ((task.patch, 0), (-task.patch, 0), (0, task.patch), (0, -task.patch))
        self.adjacent = np.array(
            [
                (row, at[source, x + dx, y + dy])
                for (source, x, y), row in at.items()
                for dx, dy in steps
                if (source, x + dx, y + dy) in at
            ],
            dtype=np.int64,
        ).reshape(-1, 2)
        if not len(self.adjacent) or len(np.unique(self.groups)) < 2:
            raise EncoderError(
                f"patch task '{task.name}' cannot be trained on contrastively: its {split} split "
                "needs adjacent patches (images of several patches) and two groups or more"
            )

    def draw(
        self, count: int, generator: torch.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Rows (count, 2) of pairs and which of them are one place."""

        def chance(*shape: int) -> NDArray[np.float64]:
            draws: NDArray[np.float64] = (
                torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
                .cpu()
                .numpy()
            )
            return draws

        first = (chance(count) * len(self.rows)).astype(np.int64)
        pairs = np.stack([self.rows[first]] * 2, 1)
        same = chance(count) < 0.5
        adjacent = ~same & (chance(count) < ADJACENT_SHARE)
        place = (chance(count) * len(self.adjacent)).astype(np.int64)
        pairs[adjacent] = self.adjacent[place[adjacent]]
        pick = chance(count)
        for number in np.flatnonzero(~same & ~adjacent):
            others = self.rows[self.groups != self.groups[first[number]]]
            pairs[number, 1] = others[int(pick[number] * len(others))]
        return pairs, same


class Contrastive:
    """The contrastive objective. ``batch`` counts pairs; a step sees twice as many patches."""

    selection = Selection("validation/accuracy", "max")

    def __init__(
        self,
        encoder: PatchEncoder,
        tasks: Sequence[PatchDataset],
        *,
        batch: int,
        validation: int,
        seed: int,
    ) -> None:
        """Pairs come from the tasks in equal numbers, labels unused.

        Raises
        ------
        EncoderError
            A task has no adjacent patches or too few groups.
        """
        self.encoder = encoder
        self.tasks = tuple(tasks)
        self.device = next(encoder.parameters()).device
        self.judge = ClassHead(2 * encoder.network.code, 1).to(self.device)
        self.heads = nn.ModuleDict()
        self.networks = nn.ModuleDict({"encoder": encoder, "judge": self.judge})
        self.share = max(2, batch // len(self.tasks))
        self.patches_a_step = 2 * self.share * len(self.tasks)
        self.training_pairs = [_Pairs(task, "train") for task in self.tasks]
        self.validation_pairs = [_Pairs(task, "validation") for task in self.tasks]
        self.validation = max(2, validation // 2)
        self.seed = seed

    def batch(self, generator: torch.Generator) -> PairBatch:
        return self._draw(self.training_pairs, self.share, generator)

    def losses(self, batch: PairBatch) -> dict[str, Tensor]:
        return {
            "loss": functional.binary_cross_entropy_with_logits(self._logits(batch), batch.same)
        }

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Accuracy on pairs that are the same at every call."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        right, count = 0, 0
        for pairs in self.validation_pairs:
            for start in range(0, self.validation, 64):
                batch = self._draw([pairs], min(64, self.validation - start), generator)
                right += int(((self._logits(batch) > 0) == (batch.same > 0)).sum())
                count += len(batch.same)
        return {self.selection.value: right / count}

    def _logits(self, batch: PairBatch) -> Tensor:
        codes = self.encoder.network(torch.cat([batch.first, batch.second]))
        first, second = codes.chunk(2)
        logits: Tensor = self.judge(torch.cat([first, second], 1))
        return logits[:, 0]

    def _draw(self, sources: Sequence[_Pairs], count: int, generator: torch.Generator) -> PairBatch:
        firsts: list[Tensor] = []
        seconds: list[Tensor] = []
        same: list[Tensor] = []
        for source in sources:
            rows, equal = source.draw(count, generator)
            for part, column in ((firsts, 0), (seconds, 1)):
                pixels = patch_tensor(source.task, rows[:, column], self.device)
                part.append(pool_patches(pixels, self.encoder.network.pooling))
            same.append(torch.from_numpy(equal).float())
        variants = augment(torch.cat(firsts + seconds).div_(255), generator).mul_(2).sub_(1)
        first, second = variants.chunk(2)
        return PairBatch(first, second, torch.cat(same).to(self.device))

"""Contrastive training (paper B): do two patches show the same place?

A Siamese encoder; the two embeddings, concatenated, pass a dense layer of 256 to one logit. 'Same'
pairs are two heavy augmentations of one patch; of the others 75 % are adjacent,
non-overlapping patches and 25 % patches of two slides. As many 'same' pairs as others,
BatchNorm and LeakyReLU in the head are [choice], and so is what stands for the slide in a patch
task: adjacent are patches of one image that share an edge; where no image of a split holds
several patches, two patches of one group (patient), which share its stain as neighbours do;
another slide is another group.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from nic_core.encoders.encoder import EncoderError
from nic_core.encoders.networks import ClassHead, PatchEncoder
from nic_core.encoders.objectives.base import Selection, Validation
from nic_core.encoders.objectives.sampling import training_inputs
from nic_core.encoders.patch_tasks import PatchDataset

log = logging.getLogger(__name__)

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
        table = task.table.filter(pl.col("split") == split).sort("group", "index")
        self.rows = table["index"].to_numpy()
        # a group is a range of rows: from its first to before its last
        groups = table["group"].rle_id().to_numpy()
        self.start = np.searchsorted(groups, groups, "left")
        self.size = np.searchsorted(groups, groups, "right") - self.start
        self.adjacent = _adjacent(table)
        self.shared = np.flatnonzero(self.size > 1)  # places of rows that are not alone in a group
        if self.size.max(initial=0) == len(self.rows) or not len(self.adjacent) + len(self.shared):
            raise EncoderError(
                f"patch task '{task.name}' cannot be trained on contrastively: its {split} split "
                "needs two groups (patients) or more, and adjacent patches (images of several "
                "patches) or groups of several patches"
            )
        if not len(self.adjacent):
            log.warning(
                "patch task '%s', %s split: no image has adjacent patches; pairs of one group "
                "stand in for them",
                task.name,
                split,
            )

    def draw(
        self, count: int, generator: torch.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Rows (count, 2) of pairs and which of them are one place."""

        def chance() -> NDArray[np.float64]:
            draws: NDArray[np.float64] = (
                torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
                .cpu()
                .numpy()
            )
            return draws

        def below(limits: int | NDArray[np.int64]) -> NDArray[np.int64]:
            return (chance() * limits).astype(np.int64)

        same = chance() < 0.5
        near = ~same & (chance() < ADJACENT_SHARE)
        first = below(len(self.rows))
        pairs = np.stack([self.rows[first]] * 2, 1)

        # of the rows that are left without the first one's group
        far = below(len(self.rows) - self.size[first])
        far += np.where(far >= self.start[first], self.size[first], 0)
        pairs[:, 1] = np.where(same, pairs[:, 1], self.rows[far])

        if len(self.adjacent):
            neighbours = self.adjacent[below(len(self.adjacent))]
        else:
            one = self.shared[below(len(self.shared))]
            other = self.start[one] + below(self.size[one] - 1)
            other += other >= one
            neighbours = self.rows[np.stack([one, other], 1)]
        pairs[near] = neighbours[near]
        return pairs, same


def _adjacent(table: pl.DataFrame) -> NDArray[np.int64]:
    """Rows (N, 2) of patches of one image that share an edge, each pair in both orders."""
    places = table["source", "row", "column", "index"].rows()
    at = {(source, row, column): index for source, row, column, index in places}
    steps = ((0, 1), (0, -1), (1, 0), (-1, 0))
    pairs = [
        (index, at[source, row + down, column + right])
        for (source, row, column), index in at.items()
        for down, right in steps
        if (source, row + down, column + right) in at
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


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
            A task has too few groups, or neither adjacent patches nor groups of several.
        """
        self.encoder = encoder
        self.tasks = tuple(tasks)
        self.device = next(encoder.parameters()).device
        self.judge = ClassHead(2 * encoder.network.embedding_size, 1).to(self.device)
        self.heads: dict[str, nn.Module] = {}
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
    def validate(self) -> Validation:
        """Accuracy on pairs that are the same at every call."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        right, count = 0.0, 0
        for pairs in self.validation_pairs:
            for start in range(0, self.validation, 64):
                batch = self._draw([pairs], min(64, self.validation - start), generator)
                logits = self._logits(batch)
                if not logits.isfinite().all():  # a comparison with NaN is merely false
                    return Validation({self.selection.value: math.nan})
                right += int(((logits > 0) == (batch.same > 0)).sum())
                count += len(batch.same)
        return Validation({self.selection.value: right / count})

    def _logits(self, batch: PairBatch) -> Tensor:
        embeddings = self.encoder.network(torch.cat([batch.first, batch.second]))
        first, second = embeddings.chunk(2)
        logits: Tensor = self.judge(torch.cat([first, second], 1))
        return logits[:, 0]

    def _draw(self, sources: Sequence[_Pairs], count: int, generator: torch.Generator) -> PairBatch:
        pairs = [(source.task, *source.draw(count, generator)) for source in sources]
        variants = training_inputs(
            [(task, rows[:, column]) for column in (0, 1) for task, rows, _ in pairs],
            self.encoder.network.pooling,
            generator,
        )
        same = [torch.from_numpy(equal).float() for _, _, equal in pairs]
        first, second = variants.chunk(2)
        return PairBatch(first, second, torch.cat(same).to(self.device))

"""Section 3, contrastive training [B]: classify pairs of patches as same place or not.

A Siamese encoder embeds both patches of a pair; the concatenated embeddings go through a dense
layer of 256 to one logit. Positive pairs are two heavy augmentations of one patch. Of the negative
pairs, 75 % are adjacent non-overlapping patches and 25 % are patches of two slides.

[choice]: equal numbers of positive and negative pairs, BatchNorm and LeakyReLU in the head, and
how a patch task, which has groups (patients) instead of slides, provides the negative pairs.
Adjacent patches are patches of one image that share an edge. If no image of a split has several
patches, two patches of one group replace them, because they share its stain as adjacent patches
do. Patches of two groups replace patches of two slides.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from nic_core.encoders.errors import EncoderError
from nic_core.encoders.networks import ClassHead, PatchEncoder
from nic_core.encoders.objectives.base import PatchObjective, Selection, Sizes, Validation
from nic_core.encoders.objectives.sampling import training_inputs
from nic_core.encoders.patch_tasks import PatchDataset

log = logging.getLogger(__name__)

ADJACENT_SHARE = 0.75


@dataclass(frozen=True)
class PairBatch:
    """Both network inputs (B, 3, S, S) in [-1, 1] of each pair; ``same`` is 1 if positive."""

    first: Tensor
    second: Tensor
    same: Tensor


class _Pairs:
    """Draws pairs of patches from splits of a task."""

    def __init__(self, task: PatchDataset, *splits: str) -> None:
        self.task = task
        split = " and ".join(splits)
        table = task.table.filter(pl.col("split").is_in(splits)).sort("group", "index")
        self.rows = table["index"].to_numpy()
        # rows are sorted by group: group boundaries are the ends of runs
        groups = table["group"].rle_id().to_numpy()
        self.start = np.searchsorted(groups, groups, "left")
        self.size = np.searchsorted(groups, groups, "right") - self.start
        self.adjacent = _adjacent(table)
        self.shared = np.flatnonzero(self.size > 1)  # positions of rows in groups of two or more
        if self.size.max(initial=0) == len(self.rows) or not len(self.adjacent) + len(self.shared):
            raise EncoderError(
                f"objective 'contrastive' cannot use patch task '{task.name}': its {split} split "
                "needs at least two groups (patients), and adjacent patches (images of several "
                "patches) or groups of several patches"
            )
        if not len(self.adjacent):
            log.warning(
                "patch task '%s', %s split: no image has adjacent patches; contrastive training "
                "uses pairs of one group (patient) instead",
                task.name,
                split,
            )

    def draw(
        self, count: int, generator: torch.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return rows (count, 2) of pairs, and which pairs (count,) are positive."""

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

        # uniform over the rows outside the first patch's group
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
    """Return rows (N, 2) of patches of one image that share an edge, each pair in both orders."""
    cells = table["source", "row", "column", "index"].rows()
    at = {(source, row, column): index for source, row, column, index in cells}
    steps = ((0, 1), (0, -1), (1, 0), (-1, 0))
    pairs = [
        (index, at[source, row + down, column + right])
        for (source, row, column), index in at.items()
        for down, right in steps
        if (source, row + down, column + right) in at
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


class Contrastive(PatchObjective):
    """The contrastive objective: equal numbers of pairs of each task, labels unused.

    ``batch`` counts pairs; a step uses twice as many patches.

    Raises
    ------
    EncoderError
        A task has fewer than two groups, or neither adjacent patches nor groups of several.
    """

    selection = Selection("validation/accuracy", "max")
    learning_rate = 1e-2  # [B]

    def __init__(
        self, encoder: PatchEncoder, tasks: Sequence[PatchDataset], **sizes: Unpack[Sizes]
    ) -> None:
        super().__init__(encoder, tasks, **sizes)
        self.pair_head = ClassHead(2 * encoder.network.embedding_size, 1)
        self.add_networks(pair_head=self.pair_head)
        self.patches_per_step *= 2
        self.validation_pairs = [_Pairs(task, "validation") for task in self.tasks]

    def train_on(self, splits: tuple[str, ...]) -> None:
        self.training_pairs = [_Pairs(task, *splits) for task in self.tasks]

    def batch(self, generator: torch.Generator) -> PairBatch:
        return self._draw(self.training_pairs, self.share, generator)

    def losses(self, batch: PairBatch) -> dict[str, Tensor]:
        return {
            "loss": functional.binary_cross_entropy_with_logits(self._logits(batch), batch.same)
        }

    @torch.inference_mode()
    def validate(self) -> Validation:
        """Evaluate the accuracy on pairs that are the same at every call."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        pairs_per_task = max(2, self.validation // 2)
        correct, count = 0, 0
        for pairs in self.validation_pairs:
            for start in range(0, pairs_per_task, 64):
                batch = self._draw([pairs], min(64, pairs_per_task - start), generator)
                logits = self._logits(batch)
                if not logits.isfinite().all():  # NaN > 0 is false and would count as an answer
                    return Validation({self.selection.value: math.nan})
                correct += int(((logits > 0) == (batch.same > 0)).sum())
                count += len(batch.same)
        return Validation({self.selection.value: correct / count})

    def _logits(self, batch: PairBatch) -> Tensor:
        embeddings = self.encoder.network(torch.cat([batch.first, batch.second]))
        first, second = embeddings.chunk(2)
        logits: Tensor = self.pair_head(torch.cat([first, second], 1))
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

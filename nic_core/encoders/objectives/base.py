"""What training asks of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from nic_core.encoders.networks import PatchEncoder
from nic_core.encoders.patch_tasks import PatchDataset
from nic_core.encoders.scores import TaskScores


@dataclass(frozen=True)
class Selection:
    """The validation value that steers the learning rate and picks the weights to keep."""

    value: str
    mode: Literal["max", "min"]


@dataclass(frozen=True)
class Validation:
    """What the validation splits say: numbers by name, and the scores of supervised tasks."""

    values: dict[str, float]
    scores: Mapping[str, TaskScores] = field(default_factory=dict)


class Objective(Protocol):
    """Owns its networks, its batches and its loss; :mod:`loop` owns the training.

    ``networks`` holds everything that learns, the encoder included. ``selection`` is ``None``
    for a fixed learning rate with the last weights kept.
    """

    encoder: PatchEncoder
    tasks: tuple[PatchDataset, ...]
    networks: nn.ModuleDict
    patches_a_step: int

    @property
    def heads(self) -> Mapping[str, nn.Module]:
        """Of supervised tasks, by name."""

    @property
    def selection(self) -> Selection | None: ...

    def batch(self, generator: torch.Generator) -> Any:
        """Draw a batch; ``generator`` (on the networks' device) is the only source of chance."""

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Scalars by name, float32; ``loss`` is the one to minimise.

        It runs under autocast where the training's precision is bfloat16.
        """

    def validate(self) -> Validation:
        """Figures on the validation splits, networks in evaluation mode, always float32."""

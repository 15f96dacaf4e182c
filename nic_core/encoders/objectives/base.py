"""What training asks of an objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from nic_core.encoders.networks import PatchEncoder


@dataclass(frozen=True)
class Selection:
    """The validation value that steers the learning rate and picks the weights to keep."""

    value: str
    mode: Literal["max", "min"]


class Objective(Protocol):
    """Owns its networks, its batches and its loss; :mod:`training` owns the loop.

    ``networks`` holds everything that learns, the encoder included. ``selection`` is ``None``
    for a fixed learning rate with the last weights kept.
    """

    encoder: PatchEncoder
    heads: nn.ModuleDict
    networks: nn.ModuleDict
    patches_a_step: int

    @property
    def selection(self) -> Selection | None: ...

    def batch(self, generator: torch.Generator) -> Any:
        """Draw a batch; ``generator`` (on the networks' device) is the only source of chance."""

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Scalars by name; ``loss`` is the one to minimise."""

    def validate(self) -> dict[str, float]:
        """Values on the validation splits, networks in evaluation mode."""

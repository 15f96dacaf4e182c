"""Section 3, interface and shared state of the training objectives.

:mod:`nic_core.encoders.training_loop` trains any :class:`Objective`. A new objective derives from
:class:`PatchObjective`, adds its networks and defines ``batch``, ``losses`` and ``validate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nic_core.encoders.networks import PatchEncoder
from nic_core.encoders.objectives.sampling import Sampler, validation_rows
from nic_core.encoders.patch_tasks import PatchDataset
from nic_core.encoders.scores import TaskScores


@dataclass(frozen=True)
class Selection:
    """The validation value that drives the learning rate and selects the weights to keep.

    ``keep``: ``best`` weights by the value, or the ``last`` ones, where the validation splits are
    too small to choose by.
    """

    value: str
    mode: Literal["max", "min"]
    keep: Literal["best", "last"] = "best"


@dataclass(frozen=True)
class Validation:
    """Results on the validation splits: numbers by name, and the scores of supervised tasks."""

    values: dict[str, float]
    scores: Mapping[str, TaskScores] = field(default_factory=dict)


class Objective(Protocol):
    """What the training loop requires of an objective.

    ``networks`` holds every module that is trained, including the encoder. ``selection`` is
    ``None`` for a fixed learning rate where the last weights are kept.
    """

    encoder: PatchEncoder
    tasks: tuple[PatchDataset, ...]
    networks: nn.ModuleDict
    patches_per_step: int

    @property
    def heads(self) -> Mapping[str, nn.Module]:
        """Classification heads of supervised tasks, by task name."""

    @property
    def selection(self) -> Selection | None: ...

    def train_on(self, splits: tuple[str, ...]) -> None:
        """Draw the patches of the following batches from these splits; at first from train."""

    def batch(self, generator: torch.Generator) -> Any:
        """Draw a batch; ``generator``, on the networks' device, is the only source of chance."""

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Return float32 scalars by name; the training minimises ``loss``.

        It runs under autocast if the precision of the training is bfloat16.
        """

    def validate(self) -> Validation:
        """Evaluate the validation splits in float32, with the networks in evaluation mode."""


class Sizes(TypedDict):
    """Arguments of every objective besides the encoder and its patch tasks.

    ``batch``: samples per step, divided equally among the tasks. ``validation``: upper limit of
    validation samples per task. ``seed``: of the validation sample.
    """

    batch: int
    validation: int
    seed: int


class PatchObjective:
    """The state that all objectives share; see :class:`Objective` for its attributes.

    Attributes
    ----------
    learning_rate : float
        Published initial learning rate.
    by_class : bool
        Whether ``sampler`` draws every class of a task equally often.
    sampler : Sampler
        Draws the training patches of a batch.
    share : int
        Samples of each task in a batch.
    """

    selection: Selection | None
    learning_rate: ClassVar[float]
    by_class: ClassVar[bool] = False

    def __init__(
        self, encoder: PatchEncoder, tasks: Sequence[PatchDataset], **sizes: Unpack[Sizes]
    ) -> None:
        self.encoder = encoder
        self.tasks = tuple(tasks)
        self.device = next(encoder.parameters()).device
        self.heads: dict[str, nn.Module] = {}
        self.networks = nn.ModuleDict({"encoder": encoder})
        # at least two samples per task, because BatchNorm cannot normalise one
        self.share = max(2, sizes["batch"] // len(self.tasks))
        self.patches_per_step = self.share * len(self.tasks)
        self.validation, self.seed = sizes["validation"], sizes["seed"]
        self.train_on(("train",))

    def add_networks(self, **networks: nn.Module) -> None:
        """Train ``networks`` too, on the encoder's device."""
        self.networks.update(networks)
        self.networks.to(self.device)

    def train_on(self, splits: tuple[str, ...]) -> None:
        """Draw the patches of the following batches from these splits."""
        self.sampler = Sampler(
            self.tasks, self.share, splits=splits, by_class=self.by_class, device=self.device
        )

    @cached_property
    def validation_rows(self) -> list[NDArray[np.int64]]:
        """Rows of the validation patches of each task."""
        return validation_rows(self.tasks, self.validation, self.seed)

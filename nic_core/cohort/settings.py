"""Entries ``settings`` and ``automation`` of the cohort file."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from nic_core.cohort.fields import Cron, Entry, Fraction, NetworkName, TimeZone
from nic_core.types import RequestedPrecision


class ModelSettings(Entry):
    """How slide models are trained; the defaults are paper B's, or [choice]."""

    network: NetworkName = Field(
        default="published",
        description="grid CNN of the paper, a small one, or gated-attention pooling of cells",
    )
    positions: bool = Field(default=False, description="tell network mil where each cell lies")
    crop: PositiveInt = Field(default=400, description="cells a side; smaller grids are padded")
    feature_noise: NonNegativeFloat = Field(
        default=0.0, description="deviation of noise on normalised features in training"
    )
    feature_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability that training sees a whole feature of a crop as 0",
    )
    folds: int = Field(default=4, ge=3)
    seeds: PositiveInt = Field(
        default=1,
        description="initialisations to train every fold from; more than one says how far "
        "figures depend on it",
    )
    epochs: PositiveInt = 60
    batch: PositiveInt = 16
    learning_rate: PositiveFloat = 1e-2
    crops_at_test: PositiveInt = 10
    bootstrap: PositiveInt = 1000
    seed: int = 0
    permute_labels: int | None = Field(
        default=None,
        description="seed to exchange labels between patients with: a control that must come "
        "out at chance",
    )

    @model_validator(mode="after")
    def _positions_are_for_mil(self) -> Self:
        if self.positions and self.network != "mil":
            raise ValueError(f"positions: network '{self.network}' sees them anyway; for mil alone")
        return self


class CompressionSettings(Entry):
    """How slides are compressed; see docs/grids.md for what each choice costs and changes."""

    precision: RequestedPrecision = Field(
        default="auto",
        description="auto: bfloat16 on a GPU or CPU with matrix units for it",
    )
    reading: Literal["patch", "input"] = Field(
        default="patch",
        description="read the patch's pixels and pool them in the network (published), or read "
        "at the resolution of the network's input",
    )
    orientations: bool = Field(default=False, description="encode in all 8 orientations")


class Settings(Entry):
    """Constants of the method; the defaults are the papers'."""

    patch: PositiveInt = Field(default=128, description="px a side, at `mpp`")
    mpp: PositiveFloat = Field(default=0.5, description="um/px")
    embedding_size: PositiveInt = Field(default=128, description="numbers a patch")
    tissue: Fraction = Field(default=0.6, description="a cell is kept above this tissue fraction")
    compression: CompressionSettings = CompressionSettings()
    models: ModelSettings = ModelSettings()


class Automation(Entry):
    """When whatever is missing or stale is made without being asked for [choice].

    From each tick of ``opens`` to the next of ``closes``, every partition is asked for once, and
    again only if what it is made from changes. With ``closes: null`` there is no closing time:
    ``opens`` then says how often a failed one is tried again.
    """

    opens: Cron = "0 20 * * *"
    closes: Cron | None = "0 6 * * *"
    timezone: TimeZone = "UTC"
    poll_seconds: PositiveInt = Field(
        default=60, description="seconds between two evaluations of each sensor"
    )

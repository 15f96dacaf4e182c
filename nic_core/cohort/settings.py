"""Entries ``settings`` and ``automation`` of the cohort file."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from nic_core.cohort.fields import Cron, Entry, FieldErrors, Fraction, NetworkName, TimeZone
from nic_core.types import Colours, RequestedGridPrecision

LEAST_FOLDS = 3  # one to test, one to validate, the others to train (paper B)


class SiteFolds(Entry):
    """Cross-validation in which whole sites are divided over ``count`` folds."""

    by: Literal["site"]
    count: int


def _check_folds(value: object) -> object:
    match value:
        case SiteFolds() | "site" | "given":
            return value
        case int(number) | {"by": "site", "count": int(number)} if (
            not isinstance(number, bool)
            and number >= LEAST_FOLDS
            and (not isinstance(value, dict) or len(value) == 2)
        ):
            return value
    raise ValueError(
        f"{value!r} is not allowed; write a number of folds (at least {LEAST_FOLDS}), 'site', "
        f"{{by: site, count: N}} with N of at least {LEAST_FOLDS}, or 'given'"
    )


FoldSetting: TypeAlias = Annotated[
    int | Literal["site", "given"] | SiteFolds, BeforeValidator(_check_folds)
]
"""How patients are assigned to folds: a number of folds, a fold for each site, whole sites in a
number of folds, or the column ``fold``.
"""


class ModelSettings(Entry):
    """Training of slide models. Defaults are those of paper [B] or [choice]."""

    network: NetworkName = Field(
        default="published",
        description="published: the grid CNN of the paper; small: a smaller CNN; local: the same "
        "with a field of 3 x 3 cells, for sharper heatmaps; mil: gated attention pooling of cells",
    )
    positions: bool = Field(
        default=False, description="add the position of each cell to the input of network mil"
    )
    crop_um: float = Field(
        default=25_600,
        gt=0,
        allow_inf_nan=False,
        description="side of a crop on the slide, um; smaller grids are padded. Encoders are "
        "compared on the same field of view, whatever the size of their cells",
    )
    feature_noise: NonNegativeFloat = Field(
        default=0.0,
        description="standard deviation of noise added to normalised features in training",
    )
    feature_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability that a feature is set to 0 in a whole crop in training",
    )
    folds: FoldSetting = Field(
        default=4,
        description="number of folds; site: each site is a fold; {by: site, count: N}: N folds of "
        "whole sites; given: the folds of the column `fold`",
    )
    seeds: PositiveInt = Field(
        default=1,
        description="number of random initialisations per fold; more than one shows how much the "
        "results depend on the initialisation",
    )
    epochs: PositiveInt = Field(
        default=60, description="number of epochs; the best one by validation is kept"
    )
    batch: PositiveInt = Field(default=16, description="crops per training step")
    learning_rate: PositiveFloat = Field(
        default=1e-2, description="highest learning rate of the schedule"
    )
    crops_at_test: PositiveInt = Field(
        default=10, description="random crops per slide that a prediction is averaged over"
    )
    bootstrap: PositiveInt = Field(
        default=1000, description="bootstrap samples for confidence intervals"
    )
    recalibration: Literal["none", "temperature", "isotonic"] = Field(
        default="none",
        description="of class and survival probabilities, on the validation fold of each network; "
        "isotonic is for class probabilities: survival functions get a temperature there too",
    )
    seed: int = 0
    permute_labels: int | None = Field(
        default=None,
        description="seed of a random permutation of labels between patients, as a control whose "
        "metric must be at chance level",
    )

    @model_validator(mode="before")
    @classmethod
    def _crop_is_in_um(cls, data: Any) -> Any:
        if isinstance(data, dict) and "crop" in data:
            cells = data["crop"]
            counted = isinstance(cells, int) and not isinstance(cells, bool) and cells > 0
            value = f"{cells * 64}' ({cells} cells of 64 um" if counted else "<cells x 64>' (64 um"
            message = (
                f"crops have a side in um instead of cells: write 'crop_um: {value}: 128 px at "
                "0.5 um/px)"
            )
            raise FieldErrors([(("crop",), message)])
        return data

    @model_validator(mode="after")
    def _positions_are_for_mil(self) -> Self:
        if self.positions and self.network != "mil":
            raise ValueError(
                f"positions: only for network 'mil'; '{self.network}' uses positions anyway"
            )
        return self


class CompressionSettings(Entry):
    """Compression of slides; docs/explanation/grids.md gives cost and effect of each choice."""

    precision: RequestedGridPrecision = Field(
        default="auto",
        description="auto: bfloat16 on a GPU or CPU with matrix units for it, else float32; "
        "int8: faster on CPUs with int8 dot products, not exact; needs the extra openvino",
    )
    reading: Literal["patch", "input"] = Field(
        default="patch",
        description="patch: read at the um/px of the patch, and pool in the network (published); "
        "input: read at the um/px of the network's pooled input",
    )
    orientations: bool = Field(default=False, description="encode each patch in all 8 orientations")
    colours: Colours = Field(
        default="stored",
        description="stored: pixels as in the file; srgb: converted by the file's ICC profile, if "
        "it has one",
    )


class Settings(Entry):
    """Constants of the method. Defaults are those of the papers."""

    patch: PositiveInt = Field(default=128, description="side of a patch, px at `mpp`")
    mpp: PositiveFloat = Field(default=0.5, description="um/px of a patch")
    embedding_size: PositiveInt = Field(default=128, description="length of an embedding")
    tissue: Fraction = Field(
        default=0.6, description="a cell is kept if its tissue fraction exceeds this"
    )
    compression: CompressionSettings = CompressionSettings()
    models: ModelSettings = ModelSettings()


class Automation(Entry):
    """The daily window in which missing and stale partitions are materialized [choice].

    From each tick of ``opens`` to the next tick of ``closes``, a partition is requested once, and
    again only if its inputs change. With ``closes: null`` the window never closes, and a failed
    partition is requested again at each tick of ``opens``.
    """

    opens: Cron = Field(default="0 20 * * *", description="cron schedule")
    closes: Cron | None = Field(default="0 6 * * *", description="cron schedule, or null")
    timezone: TimeZone = Field(default="UTC", description="time zone of both schedules")
    poll_seconds: PositiveInt = Field(
        default=60, description="seconds between two evaluations of each sensor"
    )

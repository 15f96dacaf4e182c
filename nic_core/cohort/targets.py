"""Entries ``targets`` and ``maps`` of the cohort file: what is predicted of slides and cells."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nic_core.cohort.fields import Entry, Name


class _TargetBase(Entry):
    name: Name
    level: Literal["slide", "patient"] = "slide"


class RegressionTarget(_TargetBase):
    """A number a slide or patient; trained with MSE, scored by Spearman's rho."""

    kind: Literal["regression"]
    column: str


class ClassificationTarget(_TargetBase):
    """A class a slide or patient; cross-entropy, ROC AUC.

    Of two classes the second is the positive one.
    """

    kind: Literal["classification"]
    column: str
    classes: tuple[str, ...] = Field(min_length=2)


class SurvivalTarget(_TargetBase):
    """Time to event with right censoring; Cox partial likelihood, C-index."""

    kind: Literal["survival"]
    time: str
    event: str = Field(description="column: 1 the event was seen, 0 censored")
    unit: Literal["days", "weeks", "months", "years"]


Target = Annotated[
    RegressionTarget | ClassificationTarget | SurvivalTarget, Field(discriminator="kind")
]


class ProbabilityMap(Entry):
    """A per-cell probability of one class, read from an MTL encoder's own head.

    Where the slide table has a ``truth`` image (one pixel a region, stretched over the
    slide), the map is scored by AUC: ``positive`` values against the rest, ``ignore`` left out.
    """

    name: Name
    encoder: str
    task: str
    label: str
    positive: tuple[int, ...] = (1,)
    ignore: tuple[int, ...] = (255,)

"""Entry ``external`` of the cohort file: cohorts of other hospitals, which only test the models."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from nic_core.cohort.fields import Entry, Name, UserPath, check_unique
from nic_core.cohort.slides import Slides


class ExternalCohort(Entry):
    """Slides and labels that no encoder or model of the study is trained or chosen on.

    The label table has the columns that the study's targets name.
    """

    name: Name
    slides: Slides
    labels: UserPath = Field(
        description="label table, CSV or parquet, with a column `slide` or `patient`"
    )
    subgroups: tuple[str, ...] = Field(
        default=(),
        description="columns of the slide table or the label table; each of their values is a "
        "subgroup with its own metrics",
    )

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        check_unique("subgroups", self.subgroups)
        return self

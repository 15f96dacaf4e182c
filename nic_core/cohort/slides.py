"""Entries ``slides`` of the cohort file: where the slides are."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from nic_core.cohort.fields import Entry, UserPath


class SlideFolder(Entry):
    """Every file of a folder that matches a pattern is a slide, named by its stem."""

    path: UserPath
    pattern: str = "**/*.tif"
    patient: str | None = Field(
        default=None,
        description="regular expression on the stem; its group 'patient' is the patient. "
        "Without it each slide is a patient of its own.",
    )


class Slides(Entry):
    """Where the slides are: folders with patterns, a table, or both.

    The table (CSV or parquet) has the columns ``slide``, ``path``, ``patient`` and, where
    known, ``mpp`` (um/px at level 0, overrides the file's), ``mask`` (a ready tissue mask),
    ``truth`` (a label image for scoring maps) and ``split`` (``cv`` or ``test``).
    """

    folders: tuple[SlideFolder, ...] = ()
    table: UserPath | None = None

    @model_validator(mode="after")
    def _some_source(self) -> Self:
        if not self.folders and self.table is None:
            raise ValueError("name at least one folder under 'folders' or a 'table'")
        return self

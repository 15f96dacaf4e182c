"""Entry ``slides`` of the cohort file: folders and table of the slides."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from nic_core.cohort.fields import Entry, UserPath, UserSlidePath


class SlideFolder(Entry):
    """A folder of slides, also in a bucket (``s3://bucket/folder``).

    A slide's id is its file name without suffix.
    """

    path: UserSlidePath
    pattern: str | None = Field(
        default=None,
        description="glob pattern of the slides' files, relative to `path`; case does not matter. "
        "Default: every readable format",
    )
    patient: str | None = Field(
        default=None,
        description="regular expression that is searched in the slide id; its group 'patient' is "
        "the patient. Default: each slide is a separate patient",
    )


class Slides(Entry):
    """The slides of a study: folders with patterns, a slide table, or both.

    The slide table (CSV or parquet) has the columns ``slide``, ``path`` and ``patient``. Optional
    columns are ``mpp`` (um/px at level 0; overrides the file), ``image`` (number of the image in a
    file with several), ``mask`` (tissue mask), ``origin`` (``level0`` or ``bounds``: what the
    coordinates of a mask of regions count from; overrides the file), ``truth`` (truth image that
    scores probability maps), ``split`` (``cv``, the default, or ``test``) and ``exclude`` (the
    reason why no model uses the slide; empty: it is used).
    """

    folders: tuple[SlideFolder, ...] = ()
    table: UserPath | None = Field(default=None, description="slide table, CSV or parquet")

    @model_validator(mode="after")
    def _some_source(self) -> Self:
        if not self.folders and self.table is None:
            raise ValueError("give at least one folder under 'folders', or a 'table'")
        return self

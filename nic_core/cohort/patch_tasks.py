"""Entries ``patch_tasks`` of the cohort file: labelled patches that encoders train on."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from nic_core.cohort.fields import Entry, Fraction, TaskName, UserPath, no_duplicates


class Hdf5Images(Entry):
    """Images and labels in HDF5 as PatchCamelyon ships them: a file each, a row an image."""

    images: UserPath = Field(description="file with the dataset `x`, uint8 (N, H, W, 3)")
    labels: UserPath = Field(description="file with the dataset `y`, N class numbers")
    meta: UserPath | None = Field(
        default=None, description="CSV or parquet, a row an image, with the group column"
    )
    split: Literal["train", "validation", "test"] | None = Field(
        default=None, description="the published split that these images are"
    )


class AnnotatedSlides(Entry):
    """Patches cut from slides where people have annotated regions.

    The table (CSV or parquet) has a row a slide: ``path``, ``annotations`` (QuPath GeoJSON or
    ASAP XML), the group column and, where known, ``mpp`` (um/px at level 0, overrides the
    file's), ``mask`` (a ready tissue mask) and ``split``. The study's grid is laid over each
    slide; a tissue cell has the label that covers most of it.
    """

    table: UserPath
    min_coverage: Fraction = Field(
        default=0.5, description="fraction of a cell's area that its label must exceed [choice]"
    )
    background_label: str | None = Field(
        default=None,
        description="label of tissue cells that no region touches; without it they are left out",
    )
    max_per_slide: PositiveInt | None = Field(
        default=None, description="patches of a class from one slide, drawn at random; null: all"
    )


class PatchTask(Entry):
    """A labelled set of patches that encoders train on.

    Exactly one source: ``table`` (CSV or parquet, image paths relative to the table),
    ``folder`` (one sub-folder a class), ``hdf5`` or ``slides``. ``mpp`` is declared, never
    guessed; only slides know their own.
    """

    name: TaskName
    organ: str
    mpp: PositiveFloat | Literal["unknown"] | None = Field(
        default=None,
        description="um/px of the stored images; `unknown`: their pixels are taken as they are",
    )
    table: UserPath | None = None
    folder: UserPath | None = None
    hdf5: tuple[Hdf5Images, ...] = ()
    slides: AnnotatedSlides | None = None
    classes: tuple[str, ...] | None = Field(
        default=None,
        min_length=2,
        description="the classes in their order, other labels are left out; default: every label, "
        "sorted. Of hdf5: what the class numbers 0, 1, ... mean (required)",
    )
    path_column: str = "path"
    label_column: str = "label"
    group_column: str | None = Field(
        default="group", description="patient; rows without one are a group each"
    )
    group_pattern: str | None = Field(
        default=None,
        description="of a folder: regular expression on an image's name; its group 'group' is the "
        "patient. Without it each image is a group of its own.",
    )
    where: dict[str, str] = Field(default={}, description="keep the table's rows with these values")
    test_groups: tuple[str, ...] = Field(
        default=(), description="groups that are always held out, whatever the seed"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = (self.table, self.folder, self.hdf5 or None, self.slides)
        if sum(source is not None for source in sources) != 1:
            raise ValueError(
                f"patch task '{self.name}': give one of 'table', 'folder', 'hdf5' and 'slides'"
            )
        return self

    @model_validator(mode="after")
    def _resolution_declared(self) -> Self:
        if self.slides is None and self.mpp is None:
            raise ValueError(
                f"patch task '{self.name}': give 'mpp', the um/px of its images; if nobody knows "
                "it, 'mpp: unknown' takes their pixels as they are"
            )
        if self.slides is not None and self.mpp is not None:
            raise ValueError(
                f"patch task '{self.name}': slides have their own um/px; where it is wrong or "
                "missing, give it in the column 'mpp' of their table"
            )
        return self

    @model_validator(mode="after")
    def _options_fit_source(self) -> Self:
        if self.classes is not None:
            no_duplicates(f"patch task '{self.name}': classes", self.classes)
        if self.group_pattern is not None and self.folder is None:
            raise ValueError(f"patch task '{self.name}': 'group_pattern' is for a folder")
        if self.hdf5:
            if self.classes is None:
                raise ValueError(
                    f"patch task '{self.name}': HDF5 holds class numbers; give what 0, 1, ... mean "
                    "under 'classes'"
                )
            if len({part.split is None for part in self.hdf5}) == 2:
                raise ValueError(
                    f"patch task '{self.name}': give 'split' for every part of 'hdf5' or for none"
                )
            if self.group_column is not None and any(part.meta is None for part in self.hdf5):
                raise ValueError(
                    f"patch task '{self.name}': give each part of 'hdf5' its 'meta' table with the "
                    f"column '{self.group_column}', or set 'group_column: null'"
                )
        return self

"""Entries ``patch_tasks`` of the cohort file: labelled patches that encoders train on."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from nic_core.cohort.fields import Entry, Fraction, Label, TaskName, UserPath, check_unique
from nic_core.types import Origin


class Hdf5Images(Entry):
    """Images and labels in two HDF5 files, in the layout of PatchCamelyon."""

    images: UserPath = Field(description="file with the dataset `x`, uint8 (N, H, W, 3)")
    labels: UserPath = Field(description="file with the dataset `y`, N class numbers")
    meta: UserPath | None = Field(
        default=None, description="CSV or parquet with the group column, one row per image"
    )
    split: Literal["train", "validation", "test"] | None = Field(
        default=None, description="split that the images were published as"
    )


class AnnotatedSlides(Entry):
    """Patches cut from slides with annotated regions.

    The table (CSV or parquet) has one row per slide, with the columns ``path``, ``annotations``
    (QuPath GeoJSON or ASAP XML) and the group column. Optional columns are ``mpp`` (um/px at level
    0; overrides the file), ``image`` (number of the image in a file with several), ``mask``
    (tissue mask), ``origin`` (``level0`` or ``bounds``: what the
    coordinates of the row's annotations and of a mask of regions count from; overrides the files)
    and ``split``. Each slide is divided into cells of the size of a patch, and a tissue cell gets
    the label with the largest coverage.
    """

    table: UserPath
    min_coverage: Fraction = Field(
        default=0.5,
        description="a label must cover more than this fraction of a cell's area [choice]",
    )
    background_label: Label | None = Field(
        default=None,
        description="label of tissue cells that no region touches; default: these cells are left "
        "out",
    )
    origin: Origin | None = Field(
        default=None,
        description="what coordinates count from in files that do not state it, where the slide's "
        "scanned area does not start at its corner; default: such files are refused",
    )
    rename: dict[Label, Label] = Field(
        default={}, description="class or group in the annotations to label; others stay"
    )
    max_per_slide: PositiveInt | None = Field(
        default=None,
        description="maximum number of patches per class and slide, sampled at random; default: "
        "all",
    )


class PatchTask(Entry):
    """A labelled set of patches that encoders train on.

    It has exactly one source: ``table``, ``folder``, ``hdf5`` or ``slides``. ``mpp`` must be given
    for all but ``slides``, which state it themselves.
    """

    name: TaskName
    organ: str
    mpp: PositiveFloat | Literal["unknown"] | None = Field(
        default=None,
        description="um/px of the stored images; `unknown`: images are not rescaled",
    )
    train_mpp: PositiveFloat | None = Field(
        default=None,
        description="um/px of the patches; default: that of the encoder that trains on them",
    )
    table: UserPath | None = Field(
        default=None,
        description="CSV or parquet, one row per image; relative paths are relative to its folder",
    )
    folder: UserPath | None = Field(default=None, description="folder with a sub-folder per class")
    hdf5: tuple[Hdf5Images, ...] = ()
    slides: AnnotatedSlides | None = None
    classes: tuple[Label, ...] | None = Field(
        default=None,
        min_length=2,
        description="names of the classes in order; other labels are left out. Default: all "
        "labels, sorted. Required for hdf5, where they name the class numbers 0, 1, ...",
    )
    path_column: str = Field(default="path", description="column of the table with image paths")
    label_column: str = Field(default="label", description="column of the table with labels")
    group_column: str | None = Field(
        default="group",
        description="column with the patient; where it is null, or a row has no value, the patient "
        "is unknown, and blocks of consecutive images are the groups",
    )
    group_pattern: str | None = Field(
        default=None,
        description="for a folder: regular expression that is searched in an image's file name; "
        "its group 'group' is the patient. Default: the patients are unknown, and blocks of "
        "consecutive images are the groups",
    )
    where: dict[str, Label] = Field(
        default={}, description="column to value: keep only rows of the table with these values"
    )
    test_groups: tuple[Label, ...] = Field(
        default=(), description="groups that are in the split test for every seed"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = (self.table, self.folder, self.hdf5 or None, self.slides)
        if sum(source is not None for source in sources) != 1:
            raise ValueError(
                f"patch task '{self.name}': give exactly one of 'table', 'folder', 'hdf5' and "
                "'slides'"
            )
        return self

    @model_validator(mode="after")
    def _resolution_declared(self) -> Self:
        if self.slides is None and self.mpp is None:
            raise ValueError(
                f"patch task '{self.name}': give 'mpp', the um/px of its images; if it is not "
                "known, write 'mpp: unknown', and the images are not rescaled"
            )
        if self.slides is not None and self.mpp is not None:
            raise ValueError(
                f"patch task '{self.name}': leave 'mpp' out, since slides state their um/px; "
                "where it is wrong or missing, give it in the column 'mpp' of their table"
            )
        if self.mpp == "unknown" and self.train_mpp is not None:
            raise ValueError(
                f"patch task '{self.name}': leave 'train_mpp' out, since images of unknown um/px "
                "are not rescaled"
            )
        return self

    @model_validator(mode="after")
    def _options_fit_source(self) -> Self:
        if self.classes is not None:
            check_unique(f"patch task '{self.name}': classes", self.classes)
        if self.group_pattern is not None and self.folder is None:
            raise ValueError(f"patch task '{self.name}': 'group_pattern' needs 'folder'")
        if self.hdf5:
            if self.classes is None:
                raise ValueError(
                    f"patch task '{self.name}': name the class numbers 0, 1, ... of the HDF5 files "
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

"""Entries ``targets`` and ``maps`` of the cohort file: predictions of slides and of cells."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from nic_core.cohort.fields import Entry, Label, Name, check_unique


def _check_quoted(value: object) -> object:
    # YAML reads no, null and 1 as false, nothing and a number
    if not isinstance(value, str):
        raise ValueError(f"YAML reads this class as {value!r}, not as text; write it in quotes")
    return value


def _check_names(owner: str, one: str, several: str, names: tuple[str, ...]) -> None:
    """Raise ``ValueError`` if a class or category has no name, or that of another one."""
    check_unique(f"{owner}: {several}", names)
    if "" in names:
        raise ValueError(f"{owner}: a {one} has no name; write its name")


ClassName = Annotated[Label, BeforeValidator(_check_quoted)]


class NumericCovariate(Entry):
    """A clinical number, such as age."""

    kind: Literal["numeric"]
    column: Label = Field(description="column of the label table with the number")


class CategoricalCovariate(Entry):
    """A clinical category, such as stage or sex."""

    kind: Literal["categorical"]
    column: Label = Field(description="column of the label table with the category")
    categories: tuple[ClassName, ...] = Field(
        min_length=2, description="names of the categories; the first is the reference"
    )

    @model_validator(mode="after")
    def _categories_are_distinct(self) -> Self:
        _check_names(f"covariate '{self.column}'", "category", "categories", self.categories)
        return self


Covariate = Annotated[NumericCovariate | CategoricalCovariate, Field(discriminator="kind")]


class _TargetBase(Entry):
    name: Name
    level: Literal["slide", "patient"] = Field(
        default="slide", description="whether a label belongs to a slide or to a patient"
    )
    predict_with: Literal["champion"] | PositiveInt = Field(
        default="champion",
        description="registered model that predicts the slides: the champion, or the number of a "
        "version of `model-<target>`",
    )
    covariates: tuple[Covariate, ...] = Field(
        default=(),
        description="clinical columns of the label table for the clinical baseline; networks do "
        "not use them",
    )

    @model_validator(mode="after")
    def _covariates_are_distinct_and_no_labels(self) -> Self:
        columns = [covariate.column for covariate in self.covariates]
        check_unique(f"target '{self.name}': covariates", columns)
        labels = {getattr(self, field, None) for field in ("column", "time", "event")}
        if both := [column for column in columns if column in labels]:
            raise ValueError(
                f"target '{self.name}': column '{both[0]}' holds its labels, so it cannot be a "
                "covariate; remove it from 'covariates'"
            )
        return self


class RegressionTarget(_TargetBase):
    """A number per slide or patient. Loss: mean squared error; metric: Spearman's rho."""

    kind: Literal["regression"]
    column: Label = Field(description="column of the label table with the number")


class ClassificationTarget(_TargetBase):
    """A class per slide or patient. Loss: cross-entropy; metric: area under the ROC curve."""

    kind: Literal["classification"]
    column: Label = Field(description="column of the label table with the class")
    classes: tuple[ClassName, ...] = Field(
        min_length=2, description="names of the classes; of two, the second is the positive one"
    )

    @model_validator(mode="after")
    def _classes_are_distinct(self) -> Self:
        _check_names(f"target '{self.name}'", "class", "classes", self.classes)
        return self


class SurvivalTarget(_TargetBase):
    """Time to event with right censoring. Loss: Cox partial likelihood; metric: C-index."""

    kind: Literal["survival"]
    time: Label = Field(description="column of the label table with the time to event or censoring")
    event: Label = Field(
        description="column of the label table: 1 or true event, 0 or false censored"
    )
    unit: Literal["days", "weeks", "months", "years"] = Field(description="unit of `time`")
    times: tuple[PositiveFloat, ...] = Field(
        default=(),
        description="times, in `unit`, at which predictions state the probability of survival",
    )

    @model_validator(mode="after")
    def _times_are_distinct(self) -> Self:
        check_unique(f"target '{self.name}': times", [f"{time:g}" for time in self.times])
        return self


Target = Annotated[
    RegressionTarget | ClassificationTarget | SurvivalTarget, Field(discriminator="kind")
]


class ProbabilityMap(Entry):
    """The probability of a class in every cell, from a head of a multitask encoder.

    If the slide table gives a ``truth`` image, which is stretched over the slide, the map is scored
    by the area under the ROC curve (AUC).
    """

    name: Name
    encoder: str = Field(description="name of an encoder of the cohort")
    task: str = Field(description="patch task of the encoder whose head is used")
    label: str = Field(description="class of the task whose probability is mapped")
    positive: tuple[int, ...] = Field(default=(1,), description="positive values of truth images")
    ignore: tuple[int, ...] = Field(
        default=(255,), description="values of truth images that are ignored"
    )

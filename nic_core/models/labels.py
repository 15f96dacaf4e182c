"""Label table to target table: one row per unit, labels checked and decoded.

A unit is a slide or a patient, as the target's ``level`` says. Units without a label are left
out; :func:`match_labels` lists their slides. What a label may be depends on the target's kind
(:mod:`nic_core.models.kinds`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from nic_core.cohort import Cohort, CohortError, Target
from nic_core.cohort.tables import MISSING, Unmatched, read_table, suggestion, unmatched
from nic_core.models.kinds import kind_of
from nic_core.models.kinds.base import label_error

_UNIT_COLUMNS = ("unit", "patient", "slides", "split")
_Key = Literal["slide", "patient"]


def target_table(cohort: Cohort, target: Target, index: pl.DataFrame) -> pl.DataFrame:
    """Return the labelled units of a target.

    The label table has the key column ``slide`` or, without it, ``patient``. A target at patient
    level may use a table keyed by slide if all labelled slides of a patient have the same label.
    A target at slide level may use a table keyed by patient: every slide gets its patient's
    label.

    Parameters
    ----------
    index
        The slide index: columns ``slide``, ``patient``, ``split``.

    Returns
    -------
    polars.DataFrame
        Sorted by ``unit``. Columns ``unit`` (slide or patient id), ``patient``, ``slides``
        (list of ids; one at slide level), ``split`` and

        - regression: ``y`` float64;
        - classification: ``y`` int64, the position in ``target.classes``;
        - survival: ``time`` float64 in ``target.unit``, ``event`` bool (true: observed).

    Raises
    ------
    CohortError
        The table or a column is missing; a label is not a finite number, not a known class, a
        negative time, or an event other than 0 and 1; slides of a patient have different labels
        or are in both splits; or there are too few labelled patients for the folds.
    """
    labels, key = _read_labels(cohort, target)
    kind = kind_of(target)
    decoded = kind.decode(labels, key)
    slides = index.select("slide", "patient", "split").join(decoded, on=key, how="inner")
    if not slides.height:
        raise label_error(
            target,
            kind.source_columns[0],
            f"no labelled {key} of the label table is in the slide index, for example "
            f"{unmatched(decoded[key], set(index[key]))[0]}; "
            f"check the ids in column '{key}' of {cohort.labels}"
            if decoded.height
            else f"no row of {cohort.labels} has a label",
        )
    _check_splits(target, index)
    if target.level == "patient":
        _check_agreement(target, slides)
        table = slides.group_by("patient").agg(pl.col("split", *kind.label_columns).first())
        all_slides = index.group_by("patient").agg(pl.col("slide").sort().alias("slides"))
        table = table.join(all_slides, on="patient").with_columns(unit="patient")
    else:
        table = slides.with_columns(unit="slide", slides=pl.concat_list("slide"))
    table = table.select(*_UNIT_COLUMNS, *kind.label_columns).sort("unit")
    cv, folds = table.filter(pl.col("split") == "cv"), cohort.settings.models.folds
    patients = cv["patient"].n_unique()
    if patients < folds:
        raise label_error(
            target,
            kind.source_columns[0],
            f"{patients} patients are labelled, too few for {folds} folds; "
            "lower settings.models.folds",
        )
    kind.check_enough(cv, folds)
    return table


@dataclass(frozen=True)
class LabelMatches:
    """How the rows of the label table and the slides of the index fit together.

    Every row with a label is either used or in :attr:`labels_without_slide`.

    Attributes
    ----------
    key
        Whether the label table has a row per slide or per patient.
    used
        Number of labelled rows that belong to a slide or patient of the index.
    labels_without_slide
        Labelled ids that are not in the index.
    slides_without_label
        Slides of the index that no label belongs to.
    """

    key: str
    used: int
    labels_without_slide: list[Unmatched]
    slides_without_label: list[Unmatched]


def match_labels(cohort: Cohort, target: Target, index: pl.DataFrame) -> LabelMatches:
    """Compare the labelled ids of a target with the slide index.

    Raises
    ------
    CohortError
        See :func:`target_table`.
    """
    labels, key = _read_labels(cohort, target)
    labelled = kind_of(target).decode(labels, key)[key].to_list()
    missing = unmatched(labelled, set(index[key]))
    without = index.filter(~pl.col(key).is_in(labelled)).sort("slide")
    suggestions = {item.name: item for item in unmatched(without[key], set(labelled))}
    return LabelMatches(
        key=key,
        used=len(labelled) - len(missing),
        labels_without_slide=missing,
        slides_without_label=[
            Unmatched(slide, suggestions[name].suggestion)
            for slide, name in zip(without["slide"], without[key], strict=True)
        ],
    )


def shuffle_labels(table: pl.DataFrame, *, seed: int) -> pl.DataFrame:
    """Exchange labels between patients, within each split: the permutation control.

    Each patient gets the labels of another patient. If the two have different numbers of units,
    the labels are repeated in order or cut off.

    Parameters
    ----------
    table
        Target table.
    seed
        Seed of the permutation.

    Returns
    -------
    The table with other labels, sorted by ``unit``.
    """
    random = np.random.default_rng(seed)
    values = [c for c in table.columns if c not in _UNIT_COLUMNS]
    table = table.sort("unit")
    patient_of_row = table["patient"].to_numpy()
    donor_row = np.arange(table.height)
    for split in sorted(table["split"].unique()):
        rows: dict[str, list[int]] = {}
        for row in np.flatnonzero((table["split"] == split).to_numpy()).tolist():
            rows.setdefault(patient_of_row[row], []).append(row)
        patients = sorted(rows)
        for patient, donor in zip(patients, random.permutation(patients), strict=True):
            theirs = rows[donor]
            for i, row in enumerate(rows[patient]):
                donor_row[row] = theirs[i % len(theirs)]
    return table.with_columns(table.select(values)[donor_row])


def _read_labels(cohort: Cohort, target: Target) -> tuple[pl.DataFrame, _Key]:
    path = cohort.labels
    if path is None:
        raise CohortError(
            f"target '{target.name}': the cohort file has no entry 'labels'; "
            "add the path of the label table"
        )
    table = read_table(path, "label table")
    keys: tuple[_Key, _Key] = ("slide", "patient")
    key = next((k for k in keys if k in table.columns), None)
    if key is None:
        raise CohortError(
            f"label table {path}: no column 'slide' or 'patient'; "
            f"the columns are {', '.join(table.columns)}"
        )
    columns = kind_of(target).source_columns
    for column in columns:
        if column not in table.columns:
            near = suggestion(column, table.columns)
            hint = f"; did you mean '{near}'?" if near else ""
            raise label_error(
                target, column, f"not in {path}; the columns are {', '.join(table.columns)}{hint}"
            )
    table = table.select(pl.col(key).cast(pl.String), *columns).drop_nulls(key)
    # a class may be called None or NA: then this text is a label
    missing = [text for text in MISSING if text not in getattr(target, "classes", ())]
    table = table.with_columns(
        pl.when(~pl.col(column).is_in(missing)).then(pl.col(column)).alias(column)
        for column in columns
        if table.schema[column] == pl.String
    )
    twice = table.filter(pl.col(key).is_duplicated())
    if twice.height:
        raise CohortError(
            f"label table {path}: {key} '{twice[key][0]}' has more than one row; keep one"
        )
    return table, key


def _check_splits(target: Target, index: pl.DataFrame) -> None:
    splits = index.group_by("patient").agg(pl.col("split").n_unique()).filter(pl.col("split") > 1)
    if splits.height:
        raise CohortError(
            f"target '{target.name}': patient '{splits['patient'].sort()[0]}' has slides in both "
            "splits 'cv' and 'test'; put all slides of a patient into one split"
        )


def _check_agreement(target: Target, slides: pl.DataFrame) -> None:
    kind = kind_of(target)
    for patient, rows in slides.group_by("patient", maintain_order=True):
        if rows.select(kind.label_columns).n_unique() > 1:
            raise label_error(
                target,
                kind.source_columns[0],
                f"slides {', '.join(rows['slide'])} of patient '{patient[0]}' have different "
                "labels; correct them or set the target's level to 'slide'",
            )

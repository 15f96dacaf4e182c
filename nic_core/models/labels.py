"""Label table to target table: one row per unit, labels checked and decoded.

A unit is a slide or a patient, as the target's ``level`` says. :func:`read_labels` accounts for
every row of the label table (:class:`LabelMatches`); :func:`target_table` makes the units. What a
label may be depends on the target's kind (:mod:`nic_core.models.kinds`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from nic_core.cohort import Cohort, CohortError, NumericCovariate, Target
from nic_core.cohort.tables import (
    MISSING,
    ROW,
    Unmatched,
    read_table,
    suggestion,
    to_text,
    unmatched,
    visible,
)
from nic_core.models.kinds import kind_of
from nic_core.models.kinds.base import label_error, named_labels, numeric_labels

_UNIT_COLUMNS = ("unit", "patient", "slides", "split")
COVARIATE = "covariate_"  # prefix of the columns of covariates in the target table
_Key = Literal["slide", "patient"]


@dataclass(frozen=True)
class LabelMatches:
    """How the rows of the label table and the slides of the index fit together, for one target.

    Every row is counted once: ``rows`` is the sum of ``used`` and the lengths of ``repeated``,
    ``without_label``, ``without_id``, ``labels_without_slide`` and ``excluded``.

    Attributes
    ----------
    key
        Column of the label table that names the unit: ``slide`` or ``patient``.
    rows
        Number of rows with any value.
    used
        Number of labelled rows that belong to a slide of the index that is not excluded.
    repeated
        Numbers of rows with the same id and label as an earlier row.
    without_label
        Numbers of rows that have no label of this target.
    without_id
        Numbers of rows that have a label, but no slide or patient.
    labels_without_slide
        Labelled ids that are not in the index: slides, or patients without slides.
    excluded
        Labelled ids all of whose slides are excluded.
    slides_without_label
        Slides of the index that are not excluded and that no label belongs to.
    """

    key: str
    rows: int
    used: int
    repeated: list[int]
    without_label: list[int]
    without_id: list[int]
    labels_without_slide: list[Unmatched]
    excluded: list[str]
    slides_without_label: list[Unmatched]


@dataclass(frozen=True)
class Labels:
    """The decoded labels of a target.

    Attributes
    ----------
    rows
        One row per labelled slide or patient, also those that are not in the index:
        ``matches.key`` and the columns of :attr:`TargetKind.label_columns`.
    matches
        What became of every row of the label table.
    covariates
        One row per slide or patient of the label table: ``matches.key`` and
        ``covariate_<column>`` of each covariate, float64 or text, null where it is missing.
    """

    rows: pl.DataFrame
    matches: LabelMatches
    covariates: pl.DataFrame


def read_labels(cohort: Cohort, target: Target, index: pl.DataFrame) -> Labels:
    """Read and decode the labels of a target, and compare their ids with the slide index.

    The label table has the key column ``slide`` or, without it, ``patient``. Rows that repeat an
    id with the same label count once.

    Parameters
    ----------
    index
        The slide index: columns ``slide``, ``patient``, ``split``, ``exclude``.

    Raises
    ------
    CohortError
        The table or a column is missing; a slide has another patient than in the index; a label is
        not a finite number, not a known class, a negative time, or an event other than 0 and 1; a
        covariate is not a finite number or not a known category; or two rows of one id have
        different labels or covariates.
    """
    path = cohort.labels
    if path is None:
        raise CohortError(
            f"target '{target.name}': the cohort file has no entry 'labels'; "
            "add the path of the label table"
        )
    kind = kind_of(target)
    table, key = read_label_table(path)
    cohort.check_label_columns(target, table.drop(ROW).columns)
    if key == "slide" and "patient" in table.columns:
        _check_patients(path, table, index)
    covariates = _read_covariates(target, table, key)
    table = table.select(list(dict.fromkeys((ROW, key, *kind.source_columns))))

    decoded = kind.decode(table, key)
    without_label = table.filter(~pl.col(ROW).is_in(decoded[ROW].implode()))[ROW]
    identified = decoded.drop_nulls(key)
    rows = identified.unique(key, keep="first", maintain_order=True)
    _refuse_conflicts(identified, target, key)
    missing = unmatched(rows[key], set(index[key]))
    used = index.filter(pl.col("exclude").is_null())
    excluded = rows.filter(
        pl.col(key).is_in(index[key].implode()), ~pl.col(key).is_in(used[key].implode())
    )[key]
    unlabelled = used.filter(~pl.col(key).is_in(rows[key].implode())).sort("slide")
    suggestions = {u.name: u.suggestion for u in unmatched(unlabelled[key], set(rows[key]))}
    return Labels(
        rows=rows.drop(ROW),
        matches=LabelMatches(
            key=key,
            rows=table.height,
            used=rows.height - len(missing) - len(excluded),
            repeated=identified.filter(~pl.col(ROW).is_in(rows[ROW].implode()))[ROW].to_list(),
            without_label=without_label.to_list(),
            without_id=decoded.filter(pl.col(key).is_null())[ROW].to_list(),
            labels_without_slide=missing,
            excluded=excluded.to_list(),
            slides_without_label=[
                Unmatched(slide, suggestions[name])
                for slide, name in zip(unlabelled["slide"], unlabelled[key], strict=True)
            ],
        ),
        covariates=covariates,
    )


def read_label_table(path: Path) -> tuple[pl.DataFrame, _Key]:
    """Read a label table, and find the column that names the unit of a row.

    Returns
    -------
    table : polars.DataFrame
        The columns of the file and :data:`~nic_core.cohort.tables.ROW`; ``slide`` and ``patient``
        are text.
    key : str
        ``slide`` or, without that column, ``patient``.

    Raises
    ------
    CohortError
        The table cannot be read, has neither column, or an id is not text.
    """
    table = read_table(path, "label table", row_column=ROW)
    key: _Key = "slide" if "slide" in table.columns else "patient"
    if key not in table.columns:
        columns = [name for name in table.columns if name != ROW]
        near = suggestion("slide", columns) or suggestion("patient", columns)
        raise CohortError(
            f"label table {path}: no column 'slide' or 'patient'; it has "
            f"{', '.join(map(visible, columns))}" + (f"; rename '{visible(near)}'" if near else "")
        )
    for column in {"slide", "patient"} & set(table.columns):
        try:
            table = table.with_columns(to_text(table[column]))
        except TypeError as error:
            raise CohortError(f"label table {path}: column '{column}' {error}") from error
    return table, key


def target_table(target: Target, labels: Labels, index: pl.DataFrame) -> pl.DataFrame:
    """Return the labelled units of a target.

    A target at patient level may use a table keyed by slide if all labelled slides of a patient
    have the same label. A target at slide level may use a table keyed by patient: every slide
    gets its patient's label. Units without a label are left out.

    Parameters
    ----------
    labels
        Output of :func:`read_labels` for the same target and index.
    index
        The slide index: columns ``slide``, ``patient``, ``split``.

    Returns
    -------
    polars.DataFrame
        Sorted by ``unit``. Columns ``unit`` (slide or patient id), ``patient``, ``slides``
        (list of ids; one at slide level), ``split`` and

        - regression: ``y`` float64;
        - classification: ``y`` int64, the position in ``target.classes``;
        - survival: ``time`` float64 in ``target.unit``, ``event`` bool (true: observed);

        and ``covariate_<column>`` of each covariate, float64 or text, null where it is missing.

    Raises
    ------
    CohortError
        No label belongs to a slide of the index; or slides of a patient have different labels or
        covariates, or are in both splits.
    """
    kind, matches = kind_of(target), labels.matches
    if not matches.used:
        example = matches.labels_without_slide[:1]
        raise label_error(
            target,
            kind.source_columns[0],
            f"none of the {labels.rows.height} labelled ids in column '{matches.key}' is in the "
            f"slide index, for example {example[0]}; write the ids as in the slide table"
            if example
            else f"none of the {matches.rows} rows of the label table has a label and a "
            f"{matches.key}; fill in the columns, or remove the target",
        )
    _check_splits(target, index)
    slides = index.select("slide", "patient", "split").join(labels.rows, on=matches.key)
    if target.level == "patient":
        _check_agreement(target, slides)
        table = slides.group_by("patient").agg(pl.col("split", *kind.label_columns).first())
        all_slides = index.group_by("patient").agg(pl.col("slide").sort().alias("slides"))
        table = table.join(all_slides, on="patient").with_columns(unit="patient")
    else:
        table = slides.with_columns(unit="slide", slides=pl.concat_list("slide"))
    table = table.select(*_UNIT_COLUMNS, *kind.label_columns)
    if target.covariates:
        covariates, key = labels.covariates, matches.key
        if key == "slide" and target.level == "patient":
            patients = index.select("slide", "patient").join(covariates, on="slide").drop("slide")
            covariates, key = _one_row_each(target, patients, "patient"), "patient"
        own = "patient" if key == "patient" else "unit"
        table = table.join(covariates, left_on=own, right_on=key, how="left")
    return table.sort("unit")


def shuffle_labels(table: pl.DataFrame, *, seed: int) -> pl.DataFrame:
    """Exchange labels between patients, within each split: the permutation control.

    Each patient gets the labels of another patient and keeps its covariates. If the two have
    different numbers of units, the labels are repeated in order or cut off.

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
    values = [c for c in table.columns if c not in _UNIT_COLUMNS and not c.startswith(COVARIATE)]
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


def _check_patients(path: Path, table: pl.DataFrame, index: pl.DataFrame) -> None:
    """Refuse slides with another patient in the label table than in the slide index.

    Folds are made by the index: if its patients were wrong, a patient would be in several folds.
    """
    both = table.filter(~pl.col("patient").is_in(MISSING)).join(
        index.select("slide", "patient"), on="slide", suffix=" of index", maintain_order="left"
    )
    wrong = both.filter(pl.col("patient") != pl.col("patient of index"))
    if wrong.height:
        slide, patient, row, known = wrong.select("slide", "patient", ROW, "patient of index").row(
            0
        )
        raise CohortError(
            f"label table {path}: {wrong.height} slides have another patient than in the slide "
            f"index, for example slide '{slide}' (row {row}): '{visible(patient)}' instead of "
            f"'{visible(known)}'; correct the patients of the slide table, which decide the "
            "folds, or remove the column 'patient' of the label table"
        )


def _read_covariates(target: Target, table: pl.DataFrame, key: _Key) -> pl.DataFrame:
    """Return :attr:`Labels.covariates`."""
    columns = {}
    for covariate in target.covariates:
        if isinstance(covariate, NumericCovariate):
            values = numeric_labels(table, target, covariate.column, key)
        else:
            values = named_labels(
                table,
                target,
                covariate.column,
                key,
                covariate.categories,
                what="category",
                remedy="correct it, leave the cell empty, or add it to 'categories'",
            )
        columns[COVARIATE + covariate.column] = values
    return _one_row_each(target, table.select(key, **columns).drop_nulls(key), key)


def _one_row_each(target: Target, covariates: pl.DataFrame, key: str) -> pl.DataFrame:
    """Merge rows of one id; a missing value does not contradict a known one.

    Raises
    ------
    CohortError
        An id has two different values of a covariate.
    """
    merged = covariates.group_by(key, maintain_order=True).agg(
        pl.exclude(key).drop_nulls().unique(maintain_order=True)
    )
    for column in merged.columns[1:]:
        different = merged.filter(pl.col(column).list.len() > 1)
        if different.height:
            values = " and ".join(map(str, different[column][0][:2]))
            raise label_error(
                target,
                column.removeprefix(COVARIATE),
                f"{key} '{visible(different[key][0])}' has different values in the label table: "
                f"{values}; correct one of them",
            )
    return merged.with_columns(pl.exclude(key).list.first())


def _refuse_conflicts(decoded: pl.DataFrame, target: Target, key: _Key) -> None:
    """Refuse two rows of one id with different labels."""
    kind = kind_of(target)
    for (name,), rows in decoded.group_by(key, maintain_order=True):
        if rows.height > 1 and rows.select(kind.label_columns).n_unique() > 1:
            raise label_error(
                target,
                kind.source_columns[0],
                f"{key} '{visible(str(name))}' has different labels in rows "
                f"{', '.join(map(str, rows[ROW]))} of the label table; keep one row",
            )


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

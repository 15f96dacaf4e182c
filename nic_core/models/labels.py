"""From the cohort's label table to what a model is trained on: one row a unit.

A unit is a slide or a patient, as the target says. Units without a label are left out;
:func:`unlabelled` names their slides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from nic_core.cohort import ClassificationTarget, Cohort, CohortError, RegressionTarget, Target

_MISSING = ("", "NA", "N/A", "na", "nan", "NaN", "null", "None")
_Key = Literal["slide", "patient"]


def target_table(cohort: Cohort, target: Target, index: pl.DataFrame) -> pl.DataFrame:
    """Labelled units of one target.

    The label table is keyed by ``slide`` or, without that column, by ``patient``. A target at
    patient level may use a table keyed by slide where all labelled slides of a patient agree;
    one at slide level may use a table keyed by patient: every slide then has its patient's label.

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
        - survival: ``time`` float64 in ``target.unit``, ``event`` bool (true: seen).

    Raises
    ------
    CohortError
        The table or a column is missing, a label is no number, no known class, a negative time
        or an event other than 0 and 1, slides of a patient disagree or lie in both splits, or
        too few patients are labelled to be divided into folds.
    """
    labels, key = _read_labels(cohort, target)
    decoded = _decode(labels, target, key)
    slides = index.select("slide", "patient", "split").join(decoded, on=key, how="inner")
    if not slides.height:
        raise _error(
            target,
            _label_columns(target)[0],
            f"no labelled {key} of the label table is among the slides that were found; "
            f"check the ids in column '{key}' of {cohort.labels}",
        )
    _check_splits(target, index)
    values = [c for c in slides.columns if c not in ("slide", "patient", "split")]
    if target.level == "patient":
        _check_agreement(target, slides, values)
        table = slides.group_by("patient").agg(pl.col("split", *values).first())
        everything = index.group_by("patient").agg(pl.col("slide").sort().alias("slides"))
        table = table.join(everything, on="patient").with_columns(unit="patient")
    else:
        table = slides.with_columns(unit="slide", slides=pl.concat_list("slide"))
    table = table.select("unit", "patient", "slides", "split", *values).sort("unit")
    _check_enough(target, table, cohort.settings.models.folds)
    return table


def unlabelled(table: pl.DataFrame, index: pl.DataFrame) -> list[str]:
    """Slides of the index that belong to no unit of a target table, sorted."""
    used = set(table["slides"].explode())
    return sorted(slide for slide in index["slide"] if slide not in used)


def shuffle_labels(table: pl.DataFrame, *, seed: int) -> pl.DataFrame:
    """Labels exchanged between patients, within each split: the permutation control.

    Each patient takes over the labels of another; where the two have different numbers of
    units, the other's are repeated in order or cut.
    """
    random = np.random.default_rng(seed)
    values = [c for c in table.columns if c not in ("unit", "patient", "slides", "split")]
    parts = []
    for _, part in sorted(table.group_by("split"), key=lambda pair: str(pair[0])):
        part = part.sort("unit")
        rows = {p[0]: r[values] for p, r in part.group_by("patient")}
        patients = sorted(rows)
        donors = dict(zip(patients, random.permutation(patients), strict=True))
        for patient, own in sorted(part.group_by("patient"), key=lambda pair: str(pair[0])):
            labels = rows[donors[patient[0]]]
            taken = labels[[i % labels.height for i in range(own.height)]]
            parts.append(own.drop(values).hstack(taken))
    return pl.concat(parts).select(table.columns).sort("unit")


def _read_labels(cohort: Cohort, target: Target) -> tuple[pl.DataFrame, _Key]:
    path = cohort.labels
    if path is None:
        raise CohortError(f"target '{target.name}': the cohort names no 'labels' table")
    try:
        table = _read_table(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise CohortError(f"label table {path}: cannot be read ({error})") from error
    keys: tuple[_Key, _Key] = ("slide", "patient")
    key = next((k for k in keys if k in table.columns), None)
    if key is None:
        raise CohortError(
            f"label table {path}: no column 'slide' or 'patient'; it has {', '.join(table.columns)}"
        )
    columns = _label_columns(target)
    for column in columns:
        if column not in table.columns:
            raise _error(target, column, f"not in {path}; the table has {', '.join(table.columns)}")
    table = table.select(pl.col(key).cast(pl.String), *columns).drop_nulls(key)
    twice = table.filter(pl.col(key).is_duplicated())
    if twice.height:
        raise CohortError(
            f"label table {path}: {key} '{twice[key][0]}' stands more than once; keep one row"
        )
    return table, key


def _read_table(path: Path) -> pl.DataFrame:
    if path.suffix == ".parquet":
        return pl.read_parquet(path)
    # as text first: an id such as 007 must keep its zeros, and a wrong number must be named
    return pl.read_csv(path, infer_schema=False, null_values=list(_MISSING))


def _label_columns(target: Target) -> tuple[str, ...]:
    if isinstance(target, RegressionTarget | ClassificationTarget):
        return (target.column,)
    return (target.time, target.event)


def _decode(labels: pl.DataFrame, target: Target, key: _Key) -> pl.DataFrame:
    """Label columns as numbers; rows without any label are dropped."""
    if isinstance(target, RegressionTarget):
        labels = _numbers(labels, target, target.column, key)
        return labels.rename({target.column: "y"}).drop_nulls("y")
    if isinstance(target, ClassificationTarget):
        column = target.column
        labels = labels.with_columns(pl.col(column).cast(pl.String)).drop_nulls(column)
        unknown = labels.filter(~pl.col(column).is_in(target.classes))
        if unknown.height:
            raise _error(
                target,
                column,
                f"{key} '{unknown[key][0]}' has class '{unknown[column][0]}'; "
                f"known: {', '.join(target.classes)}",
            )
        codes = {name: code for code, name in enumerate(target.classes)}
        return labels.select(key, y=pl.col(column).replace_strict(codes, return_dtype=pl.Int64))
    labels = _numbers(labels, target, target.time, key)
    labels = _numbers(labels, target, target.event, key)
    time, event = pl.col(target.time), pl.col(target.event)
    labels = labels.filter(time.is_not_null() | event.is_not_null())
    for column, wrong, what in (
        (target.time, time.is_null(), "has an event but no time"),
        (target.event, event.is_null(), "has a time but no event"),
        (target.time, time < 0, "has a negative time"),
        (target.event, ~event.is_in([0.0, 1.0]), "has an event that is neither 0 nor 1"),
    ):
        bad = labels.filter(wrong)
        if bad.height:
            raise _error(target, column, f"{key} '{bad[key][0]}' {what}")
    return labels.select(key, time=time, event=event == 1)


def _numbers(labels: pl.DataFrame, target: Target, column: str, key: _Key) -> pl.DataFrame:
    numbers = labels.with_columns(
        pl.col(column).cast(pl.Float64, strict=False).fill_nan(None).alias("number")
    )
    text = pl.col(column).cast(pl.String)
    bad = numbers.filter(
        (pl.col("number").is_null() & text.is_not_null() & ~text.is_in(_MISSING))
        | pl.col("number").is_infinite()
    )
    if bad.height:
        raise _error(
            target, column, f"{key} '{bad[key][0]}' has '{bad[column][0]}', which is no number"
        )
    return numbers.with_columns(pl.col("number").alias(column)).drop("number")


def _check_splits(target: Target, index: pl.DataFrame) -> None:
    splits = index.group_by("patient").agg(pl.col("split").n_unique()).filter(pl.col("split") > 1)
    if splits.height:
        raise CohortError(
            f"target '{target.name}': patient '{splits['patient'].sort()[0]}' has slides in both "
            "splits 'cv' and 'test'; a patient belongs to one"
        )


def _check_agreement(target: Target, slides: pl.DataFrame, values: list[str]) -> None:
    for patient, rows in slides.group_by("patient", maintain_order=True):
        if rows.select(values).n_unique() > 1:
            raise _error(
                target,
                _label_columns(target)[0],
                f"slides {', '.join(rows['slide'])} of patient '{patient[0]}' have different "
                "labels, so the patient has none; correct them or use level 'slide'",
            )


def _check_enough(target: Target, table: pl.DataFrame, folds: int) -> None:
    column = _label_columns(target)[0]
    cv = table.filter(pl.col("split") == "cv")
    patients = cv["patient"].n_unique()
    if patients < folds:
        raise _error(target, column, f"{patients} patients are labelled, too few for {folds} folds")
    if isinstance(target, ClassificationTarget):
        for code, name in enumerate(target.classes):
            count = cv.filter(pl.col("y") == code)["patient"].n_unique()
            if count < folds:
                raise _error(
                    target,
                    column,
                    f"class '{name}' has {count} patients, too few for {folds} folds; "
                    "merge classes or lower settings.models.folds",
                )
    elif isinstance(target, RegressionTarget):
        if cv["y"].n_unique() < 2:
            raise _error(target, column, "all labels are equal, there is nothing to learn")
    else:
        count = cv.filter("event")["patient"].n_unique()
        if count < folds:
            raise _error(
                target,
                target.event,
                f"{count} patients have an event, too few for {folds} folds",
            )


def _error(target: Target, column: str, what: str) -> CohortError:
    return CohortError(f"target '{target.name}', column '{column}': {what}")

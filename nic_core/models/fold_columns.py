"""The columns ``fold`` and ``site`` of the slide table and of the label table.

Both tables may state them, the slide table for a slide and the label table for a slide or a
patient. Folds are of patients: a patient has the value that any of their slides states, and all
slides must state the same [choice].
"""

from __future__ import annotations

from typing import Literal

import polars as pl

from nic_core.cohort import Cohort, CohortError
from nic_core.cohort.tables import MISSING, ROW, same_spelling, to_text, visible
from nic_core.models.labels import read_label_table

FoldColumn = Literal["fold", "site"]
_SHOWN = 20  # ids in a message


class FoldColumnError(CohortError):
    """A column ``fold`` or ``site`` cannot be used."""


def read_fold_column(cohort: Cohort, index: pl.DataFrame, column: FoldColumn) -> pl.DataFrame:
    """Return the fold or the site of each slide, from the slide table and the label table.

    Parameters
    ----------
    index
        The slide index (:data:`nic_core.cohort.index.INDEX_SCHEMA`).

    Returns
    -------
    polars.DataFrame
        ``slide``, ``patient``, ``split`` and ``column`` (string; null where neither table states
        it), in the order of the index.

    Raises
    ------
    FoldColumnError
        The two tables state different values for a slide; two rows of one id of the label table
        do; or the column is not text.
    CohortError
        The label table cannot be read.
    """
    slides = index.select("slide", "patient", "split", column)
    if cohort.labels is None:
        return slides
    table, key = read_label_table(cohort.labels)
    if column not in table.columns:
        return slides
    where = f"label table {cohort.labels}"
    try:
        texts = [None if text in MISSING else text for text in to_text(table[column])]
    except TypeError as error:
        raise FoldColumnError(f"{where}: column '{column}' {error}") from error
    stated = (
        table.select(ROW, key)
        .with_columns(pl.Series("stated", texts, pl.String))
        .drop_nulls([key, "stated"])
    )
    differ = stated.filter(pl.col("stated").n_unique().over(key) > 1)
    if differ.height:
        same = differ.filter(pl.col(key) == differ[key][0])
        shown = ", ".join(f"'{visible(v)}' (row {n})" for n, v in same.select(ROW, "stated").rows())
        raise FoldColumnError(
            f"{where}: {key} '{visible(same[key][0])}' has more than one {column}: {shown}; keep "
            "one of them"
        )
    stated = stated.unique(key, keep="first", maintain_order=True)
    both = slides.join(stated, on=key, how="left", maintain_order="left")
    differ = both.filter(pl.col(column) != pl.col("stated"))
    if differ.height:
        shown = ", ".join(
            f"slide '{slide}' '{visible(value)}' and '{visible(other)}' (row {row})"
            for slide, value, other, row in differ.select("slide", column, "stated", ROW).rows()[:3]
        )
        raise FoldColumnError(
            f"{where}: {differ.height} slides have another {column} in the slide table than in the "
            f"label table, for example {shown}; write the same {column} in both, or remove the "
            "column of one"
        )
    return both.select("slide", "patient", "split", pl.coalesce(column, "stated").alias(column))


def patient_values(values: pl.DataFrame, patients: pl.Series, column: FoldColumn) -> dict[str, str]:
    """Return the fold or the site of patients.

    Parameters
    ----------
    values
        Output of :func:`read_fold_column`, of the slides in use.
    patients
        Ids of the patients.

    Raises
    ------
    FoldColumnError
        No slide has a value; a patient has none, or more than one; or two values differ only in
        case, leading zeros or invisible characters. The message names the patients.
    """
    of_patients = values.filter(pl.col("patient").is_in(patients.implode())).drop_nulls(column)
    if of_patients.is_empty():
        raise FoldColumnError(
            f"column '{column}': no value in the slide table or in the label table; fill in the "
            "column, or set settings.models.folds to a number"
        )
    if (pair := same_spelling(of_patients[column])) is not None:
        one, other = map(visible, pair)
        raise FoldColumnError(
            f"column '{column}': '{one}' and '{other}' differ only in spelling; write one {column} "
            "in one way"
        )
    several = of_patients.filter(pl.col(column).n_unique().over("patient") > 1)
    if several.height:
        names = several["patient"].unique().sort().to_list()
        first = several.filter(pl.col("patient") == names[0]).sort("slide")
        shown = ", ".join(f"{slide} '{v}'" for slide, v in first.select("slide", column).rows())
        raise FoldColumnError(
            f"column '{column}': patients with slides of more than one {column}: {_listed(names)}; "
            f"for example slides {shown}; a patient cannot be in two folds: correct the column, or "
            "exclude slides"
        )
    found = dict(of_patients.select("patient", column).rows())
    if missing := sorted(set(patients) - set(found)):
        raise FoldColumnError(
            f"column '{column}': patients of split 'cv' without a {column}: {_listed(missing)}; "
            "fill in the column of the slide table or of the label table, or exclude their slides"
        )
    return found


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{', '.join(map(visible, names[:_SHOWN]))}{more}"

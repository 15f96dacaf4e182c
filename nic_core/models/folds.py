"""Cross-validation folds by patient, stratified; all encoders of a target share them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import polars as pl

from nic_core.cohort import CohortError, Target
from nic_core.models.kinds import kind_of


def make_folds(
    table: pl.DataFrame,
    *,
    target: Target,
    folds: int,
    seed: int,
    groups: Mapping[str, str] | None = None,
) -> pl.DataFrame:
    """Assign the patients of split ``cv`` to folds [choice].

    Patients are sorted by class, by event and time, or by value, and assigned one after the
    other to the fold with the fewest patients of the same stratum (class, event), then with the
    fewest patients; ties are broken at random. Patients with neighbouring labels thus go to
    different folds, which also stratifies by quantile. A patient with several units counts by
    the most frequent class or the mean value.

    Parameters
    ----------
    table
        Target table (:func:`nic_core.models.labels.target_table`).
    folds
        Number of folds.
    seed
        Seed of the random order and of ties.
    groups
        Patient to group, for patients that share slides; a group is assigned as one patient.

    Returns
    -------
    polars.DataFrame
        ``patient``, ``fold`` (int64, 0 to ``folds`` - 1), sorted by patient.

    Raises
    ------
    ValueError
        There are fewer patients or groups than folds.
    CohortError
        Patients of one group are in both splits.
    """
    kind = kind_of(target)
    groups = groups or {}
    table = table.with_columns(group=pl.col("patient").replace(groups))
    cv = table.filter(pl.col("split") == "cv")
    _check_groups(table, groups)
    patients = cv.group_by("group").agg(kind.patient_labels()).sort("group")
    if patients.height < folds:
        raise ValueError(
            f"target '{target.name}': {patients.height} patients cannot be divided into {folds} "
            "folds; lower settings.models.folds"
        )
    random = np.random.default_rng(seed)
    shuffled = patients[random.permutation(patients.height)]
    ordered = shuffled.sort(kind.fold_order, maintain_order=True)
    assigned: list[int] = []
    in_fold: Counter[int] = Counter()
    in_stratum: Counter[tuple[float, int]] = Counter()
    for stratum in kind.strata(ordered):
        tie = random.permutation(folds)
        fold = min(range(folds), key=lambda f: (in_stratum[stratum, f], in_fold[f], tie[f]))
        in_stratum[stratum, fold] += 1
        in_fold[fold] += 1
        assigned.append(fold)
    result = (
        cv.select("patient", "group")
        .unique()
        .join(ordered.select("group", fold=pl.Series(assigned, dtype=pl.Int64)), on="group")
        .select("patient", "fold")
        .sort("patient")
    )
    check_folds(result, table)
    return result


def _check_groups(table: pl.DataFrame, groups: Mapping[str, str]) -> None:
    """Refuse patients that share slides in both splits: the test would be of training slides."""
    shared = table.filter(pl.col("patient").is_in(list(groups)))
    both = shared.filter(pl.col("split").n_unique().over("group") > 1)
    if both.height:
        patients = both.filter(pl.col("group") == both["group"].min())["patient"].unique().sort()
        raise CohortError(
            f"patients {', '.join(patients)} have slides with the same content and are in both "
            "splits 'cv' and 'test'; put them into one split, or remove the duplicates"
        )


def check_folds(folds: pl.DataFrame, table: pl.DataFrame) -> None:
    """Raise ``ValueError`` unless every patient of split ``cv`` is in one fold, and no other is.

    Parameters
    ----------
    folds
        Columns ``patient`` and ``fold``.
    table
        Target table.
    """
    if folds["patient"].is_duplicated().any():
        twice = folds.filter(pl.col("patient").is_duplicated())["patient"][0]
        raise ValueError(f"folds overlap: patient '{twice}' is in more than one fold")
    expected = set(table.filter(pl.col("split") == "cv")["patient"])
    found = set(folds["patient"])
    if found - expected:
        raise ValueError(
            f"the folds contain patient '{min(found - expected)}', who is not in split 'cv'; "
            "make the folds again"
        )
    if expected - found:
        raise ValueError(f"patient '{min(expected - found)}' is in no fold; make the folds again")

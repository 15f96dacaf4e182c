"""Cross-validation folds by patient, stratified; all encoders of a target share them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import polars as pl

from nic_core.cohort import CohortError, Target
from nic_core.models.kinds import TargetKind, kind_of
from nic_core.models.kinds.base import label_error

LEAST_FOLDS = 3  # one to test, one to validate, the others to train (paper B)
ORDERS = 16  # random orders of the patients that are tried for each number of folds [choice]


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
    different folds, which also stratifies by quantile. A patient whose units have different
    classes counts in each of these; a patient with several numbers counts by their mean.

    If ``folds`` are too many, the largest number that works is used (:func:`folds_note` reports
    it): no class, or number of patients with an event, is smaller than the number of folds, and
    every fold's training units have every class, an event, or two different numbers. With as many
    folds as patients this is leave-one-patient-out.

    Parameters
    ----------
    table
        Target table (:func:`nic_core.models.labels.target_table`).
    folds
        Requested number of folds, at least :data:`LEAST_FOLDS`.
    seed
        Seed of the random order and of ties.
    groups
        Patient to group, for patients that share slides; a group is assigned as one patient.

    Returns
    -------
    polars.DataFrame
        ``patient``, ``fold`` (int64, from 0), sorted by patient.

    Raises
    ------
    CohortError
        The target cannot be cross-validated: not even :data:`LEAST_FOLDS` folds work. The
        message has the numbers. Or patients of one group are in both splits.
    """
    kind = kind_of(target)
    _check_groups(table, groups or {})
    units = table.filter(pl.col("split") == "cv")
    cv = by_group(units, groups)
    column = kind.source_columns[-1]
    merged = _merged(units, cv)
    what, most = _fewest(kind, cv)
    if most < LEAST_FOLDS:
        raise label_error(
            target,
            column,
            f"{most} of {_patients(cv)} patients in split 'cv' have {what}{merged}; "
            f"cross-validation needs at least {LEAST_FOLDS}; label more patients, merge classes, "
            "or remove the target",
        )
    if problem := kind.training_problem(cv, cv):
        raise label_error(target, column, f"{problem}; correct the labels or remove the target")
    for count in range(min(folds, most), LEAST_FOLDS - 1, -1):
        for order in range(ORDERS):
            random = np.random.default_rng([seed, order] if order else seed)
            found = _deal(kind.strata(cv), count, random)
            problem = _training_problem(kind, cv.join(found, on="patient"), count)
            if problem is None:
                result = _of_patients(found, table, groups)
                check_folds(result, table)
                return result
    raise label_error(
        target,
        column,
        f"the {_patients(cv)} patients of split 'cv'{merged} cannot be divided into {LEAST_FOLDS} "
        f"or more folds: {problem}; label more patients or remove the target",
    )


def by_group(table: pl.DataFrame, groups: Mapping[str, str] | None) -> pl.DataFrame:
    """Return a target table in which a group stands for each of its patients."""
    return table.with_columns(pl.col("patient").replace(groups or {}))


def _of_patients(
    folds: pl.DataFrame, table: pl.DataFrame, groups: Mapping[str, str] | None
) -> pl.DataFrame:
    """Return the folds of the patients, from those of the groups."""
    patients = table.filter(pl.col("split") == "cv").select("patient").unique()
    group = pl.col("patient").replace(groups or {}).alias("group")
    named = folds.rename({"patient": "group"})
    return patients.with_columns(group).join(named, on="group").drop("group").sort("patient")


def _check_groups(table: pl.DataFrame, groups: Mapping[str, str]) -> None:
    """Refuse patients that share slides in both splits: the test would be of training slides."""
    shared = table.filter(pl.col("patient").is_in(list(groups)))
    shared = shared.with_columns(group=pl.col("patient").replace(groups))
    both = shared.filter(pl.col("split").n_unique().over("group") > 1)
    if both.height:
        patients = both.filter(pl.col("group") == both["group"].min())["patient"].unique().sort()
        raise CohortError(
            f"patients {', '.join(patients)} have slides with the same content and are in both "
            "splits 'cv' and 'test'; put them into one split, or remove the duplicates"
        )


def folds_note(
    target: Target,
    table: pl.DataFrame,
    *,
    wanted: int,
    groups: Mapping[str, str] | None = None,
) -> str | None:
    """Return one line why a target has fewer folds than requested; None if it has as many.

    Parameters
    ----------
    table
        Target table with the column ``fold``.
    wanted
        ``settings.models.folds``.
    groups
        As for :func:`make_folds`.
    """
    units = table.filter(pl.col("split") == "cv")
    cv = by_group(units, groups)
    count = cv["fold"].n_unique()
    if count == wanted:
        return None
    kind = kind_of(target)
    what, most = _fewest(kind, cv)
    reason = (
        f"only {most} patients have {what}"
        if most == count
        else f"in {count + 1} folds some network would have too few different training labels"
    )
    every = " (leave-one-patient-out)" if count == _patients(cv) else ""
    merged = _merged(units, cv)
    return (
        f"target '{target.name}': {count} folds instead of {wanted}{every}, since {reason}{merged}"
    )


def _merged(units: pl.DataFrame, cv: pl.DataFrame) -> str:
    """Say how many patients :func:`by_group` made of those of ``units``; empty if as many."""
    if _patients(cv) == _patients(units):
        return ""
    return (
        f" ({_patients(units)} patients count as {_patients(cv)}, since slides of theirs have the "
        "same content)"
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


def check_trainable(target: Target, cv: pl.DataFrame, folds: int) -> None:
    """Raise ``CohortError`` unless a network can be trained and validated in every fold.

    Folds that :func:`make_folds` made can fail where slides have no grid.

    Parameters
    ----------
    cv
        Units of split ``cv`` with the column ``fold``.
    folds
        Number of folds.
    """
    kind = kind_of(target)
    if problem := _training_problem(kind, cv, folds):
        raise label_error(
            target,
            kind.source_columns[-1],
            f"{problem}, among the {cv.height} units with a grid; compress the missing slides",
        )


def split_fold(
    cv: pl.DataFrame, fold: int, folds: int
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Return the units that train, validate (fold + 1) and test (fold) in a fold (paper B)."""
    validation = (fold + 1) % folds
    return (
        cv.filter(~pl.col("fold").is_in([fold, validation])),
        cv.filter(pl.col("fold") == validation),
        cv.filter(pl.col("fold") == fold),
    )


def _training_problem(kind: TargetKind, cv: pl.DataFrame, folds: int) -> str | None:
    """Say why some fold cannot be trained; None: all can be."""
    if empty := sorted(set(range(folds)) - set(cv["fold"])):
        return f"fold {empty[0]} of {folds} has no unit"
    for fold in range(folds):
        train, validation, _ = split_fold(cv, fold, folds)
        if problem := kind.training_problem(train, validation):
            return f"in fold {fold} of {folds} {problem}"
    return None


def _deal(patients: pl.DataFrame, folds: int, random: np.random.Generator) -> pl.DataFrame:
    """Assign patients (:meth:`TargetKind.strata`) to folds; see :func:`make_folds`."""
    shuffled = patients.sort("patient")[random.permutation(patients.height)]
    ordered = shuffled.sort(pl.col("strata").list.first(), "value", maintain_order=True)
    assigned: list[int] = []
    in_fold: Counter[int] = Counter()
    in_stratum: Counter[tuple[int, int]] = Counter()
    for strata in ordered["strata"].to_list():
        tie = random.permutation(folds)
        fold = min(
            range(folds),
            key=lambda f: (*(in_stratum[stratum, f] for stratum in strata), in_fold[f], tie[f]),
        )
        in_stratum.update((stratum, fold) for stratum in strata)
        in_fold[fold] += 1
        assigned.append(fold)
    return ordered.select("patient", fold=pl.Series(assigned, dtype=pl.Int64)).sort("patient")


def _fewest(kind: TargetKind, cv: pl.DataFrame) -> tuple[str, int]:
    """What a fold needs that the fewest patients have, and their number."""
    return min(kind.patients_needed(cv).items(), key=lambda item: item[1])


def _patients(units: pl.DataFrame) -> int:
    return units["patient"].n_unique()

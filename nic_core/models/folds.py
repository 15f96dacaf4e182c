"""Cross-validation folds by patient; all encoders of a target share them.

:func:`make_folds` stratifies patients, :func:`make_site_folds` divides whole sites, and
:func:`named_folds` makes a fold of each site or of each published fold. Each returns a table with a
row per patient of split ``cv``: ``patient``, ``fold`` (int64, from 0) and ``fold_name`` (the name
of the site or of the published fold, else the number as text), sorted by patient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from nic_core.cohort import LEAST_FOLDS, CohortError, FoldSetting, SiteFolds, Target
from nic_core.cohort.tables import visible
from nic_core.models.kinds import TargetKind, kind_of
from nic_core.models.kinds.base import label_error
from nic_core.natural_order import natural_key

FOLD_COLUMNS = ("fold", "fold_name", "site")
"""Columns of the product ``target_folds`` that a target table has not."""
ORDERS = 16  # random orders of patients or sites that are tried for each number of folds [choice]
SITE_STRATA = 4  # into about so many strata are labels cut to balance them over folds of sites


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
        ``patient``, ``fold``, ``fold_name``.

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


def make_site_folds(
    table: pl.DataFrame,
    *,
    target: Target,
    sites: Mapping[str, str],
    count: int,
    seed: int,
    groups: Mapping[str, str] | None = None,
) -> pl.DataFrame:
    """Divide the sites of split ``cv`` over folds, so that each site is whole [choice].

    This is the site-preserved cross-validation of Howard et al., Nat. Commun. 12:4423 (2021).
    Each patient has one stratum: the class, the event and the half of its times, or the quarter of
    the values. Sites are assigned one after the other, large ones mostly first, each to the fold
    where the numbers of patients, by stratum and in all, stay closest to those of equal folds. Of
    the results of :data:`ORDERS` random orders, the best balanced one in which every network can be
    trained is used.

    If ``count`` is too large, the largest number of folds that works is used.

    Parameters
    ----------
    sites
        Site of each patient of split ``cv``.
    count
        Requested number of folds, at least :data:`~nic_core.cohort.LEAST_FOLDS`.
    table, seed, groups
        As for :func:`make_folds`.

    Raises
    ------
    CohortError
        There are fewer than three sites; no division of the sites into three or more folds can be
        trained; or patients that share slides are in two sites or in both splits.
    """
    _check_groups(table, groups or {})
    _check_groups_in_one(sites, groups or {}, "site")
    kind, cv = kind_of(target), table.filter(pl.col("split") == "cv")
    names = sorted(set(sites.values()), key=natural_key)
    if len(names) < LEAST_FOLDS:
        raise _too_few("site", names)
    strata = _patient_strata(kind, cv)
    counts = np.zeros((len(names), max(strata.values()) + 1))
    for patient, stratum in strata.items():
        counts[names.index(sites[patient]), stratum] += 1
    counts = np.column_stack([counts, counts.sum(1)])  # sizes of folds are balanced too
    problem: str | None = None
    for folds in range(min(count, len(names)), LEAST_FOLDS - 1, -1):
        dealt = [
            _deal_sites(counts, folds, np.random.default_rng([seed, order]))
            for order in range(ORDERS)
        ]
        for fold_of_site, _ in sorted(dealt, key=lambda item: item[1]):
            fold_of = dict(zip(names, fold_of_site, strict=True))
            rows = [(patient, fold_of[sites[patient]]) for patient in sorted(strata)]
            found = pl.DataFrame(rows, {"patient": pl.String, "fold": pl.Int64}, orient="row")
            problem = _training_problem(kind, cv.join(found, on="patient"), folds)
            if problem is None:
                return found.with_columns(fold_name=pl.col("fold").cast(pl.String))
    raise label_error(
        target,
        kind.source_columns[-1],
        f"the {len(names)} sites of split 'cv' cannot be divided into {LEAST_FOLDS} or more folds: "
        f"{problem}; label patients of more sites, or set settings.models.folds to a number",
    )


def named_folds(
    table: pl.DataFrame,
    *,
    target: Target,
    names: Mapping[str, str],
    column: Literal["fold", "site"],
    groups: Mapping[str, str] | None = None,
) -> pl.DataFrame:
    """Make a fold of the patients of each name: of each published fold, or of each site.

    Folds are numbered in the order of their names, in which numbers count as numbers: 2 is before
    10. As everywhere, each fold is validated on the next one, and the last on the first.

    Parameters
    ----------
    names
        Published fold or site of each patient of split ``cv``.
    column
        What ``names`` are, for messages.
    table, groups
        As for :func:`make_folds`.

    Raises
    ------
    CohortError
        There are fewer than three names; a fold cannot be trained or validated; or patients that
        share slides have two names or are in both splits.
    """
    _check_groups(table, groups or {})
    _check_groups_in_one(names, groups or {}, column)
    kind, cv = kind_of(target), table.filter(pl.col("split") == "cv")
    ordered = sorted(set(names.values()), key=natural_key)
    if len(ordered) < LEAST_FOLDS:
        raise _too_few(column, ordered)
    patients = cv["patient"].unique().sort().to_list()
    rows = [(patient, ordered.index(names[patient]), names[patient]) for patient in patients]
    schema = {"patient": pl.String, "fold": pl.Int64, "fold_name": pl.String}
    found = pl.DataFrame(rows, schema, orient="row")
    if problem := _training_problem(kind, cv.join(found, on="patient"), len(ordered)):
        remedy = (
            "write small sites as one, or set settings.models.folds to {by: site, count: N}"
            if column == "site"
            else "correct the column 'fold', or set settings.models.folds to a number"
        )
        raise label_error(target, kind.source_columns[-1], f"{problem}; {remedy}")
    return found


def _too_few(column: Literal["fold", "site"], names: list[str]) -> CohortError:
    listed = ", ".join(f"'{visible(name)}'" for name in names)
    return CohortError(
        f"column '{column}': the labelled patients of split 'cv' have {len(names)} {column}"
        f"{'s' if len(names) > 1 else ''} ({listed}); cross-validation needs at least "
        f"{LEAST_FOLDS}; set settings.models.folds to a number"
    )


def _check_groups_in_one(
    names: Mapping[str, str], groups: Mapping[str, str], column: Literal["fold", "site"]
) -> None:
    """Refuse patients that share slides in two folds or sites: the test would be of training."""
    first: dict[str, str] = {}  # group to its first patient
    for patient in sorted(set(names) & set(groups)):
        other = first.setdefault(groups[patient], patient)
        if names[other] != names[patient]:
            raise CohortError(
                f"patients {other} and {patient} have slides with the same content and are in two "
                f"{column}s, '{visible(names[other])}' and '{visible(names[patient])}'; put them "
                f"into one {column}, or remove the duplicates"
            )


def _patient_strata(kind: TargetKind, cv: pl.DataFrame) -> dict[str, int]:
    """Return a stratum of each patient, from 0; each of the kind's strata is cut by value."""
    patients = kind.strata(cv).with_columns(first=pl.col("strata").list.first())
    pieces = max(1, SITE_STRATA // patients["first"].n_unique())
    rank = pl.col("value").rank("min").over("first") - 1
    piece = (rank * pieces / pl.len().over("first")).floor().cast(pl.Int64)
    stratum = (pl.col("first").rank("dense").cast(pl.Int64) - 1) * pieces + piece
    return dict(patients.select("patient", stratum.rank("dense").cast(pl.Int64) - 1).rows())


def _deal_sites(
    counts: NDArray[np.float64], folds: int, random: np.random.Generator
) -> tuple[list[int], float]:
    """Assign sites to folds; return the fold of each site, and the imbalance of the result.

    The imbalance is the sum over folds and columns of (n - n')^2 / n', where n' is the number of
    patients in equal folds. In simulations it is less than half of that of scikit-learn's
    ``StratifiedGroupKFold`` and close to the optimum (tested).

    Parameters
    ----------
    counts : float (sites, columns)
        Numbers of patients that are to be balanced, such as those of each stratum.
    """
    share = counts.sum(0) / folds
    in_fold = np.zeros((folds, counts.shape[1]))
    assigned = [0] * len(counts)
    for site in np.argsort(-counts.sum(1) * random.uniform(0.5, 1.5, len(counts))):
        added = ((in_fold + counts[site]) ** 2 - in_fold**2) / share
        tie = random.permutation(folds)
        fold = min(range(folds), key=lambda f: (added[f].sum(), tie[f]))
        in_fold[fold] += counts[site]
        assigned[site] = fold
    return assigned, float(((in_fold - share) ** 2 / share).sum())


def by_group(table: pl.DataFrame, groups: Mapping[str, str] | None) -> pl.DataFrame:
    """Return a target table in which a group stands for each of its patients."""
    return table.with_columns(pl.col("patient").replace(groups or {}))


def _of_patients(
    folds: pl.DataFrame, table: pl.DataFrame, groups: Mapping[str, str] | None
) -> pl.DataFrame:
    """Return the folds of the patients, from those of the groups."""
    patients = table.filter(pl.col("split") == "cv").select("patient").unique()
    group = pl.col("patient").replace(groups or {}).alias("group")
    found = patients.with_columns(group).join(folds.rename({"patient": "group"}), on="group")
    return found.select("patient", "fold", fold_name=pl.col("fold").cast(pl.String)).sort("patient")


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
    wanted: FoldSetting,
    groups: Mapping[str, str] | None = None,
) -> str | None:
    """Return one line why a target has fewer folds than requested; None if it has as many.

    Parameters
    ----------
    table
        Target table with the columns ``fold`` and ``site``.
    wanted
        ``settings.models.folds``.
    groups
        As for :func:`make_folds`.
    """
    if wanted in ("site", "given"):
        return None
    units = table.filter(pl.col("split") == "cv")
    cv = by_group(units, groups)
    count = cv["fold"].n_unique()
    if isinstance(wanted, SiteFolds):
        if count == wanted.count:
            return None
        sites = cv["site"].n_unique()
        why = (
            f"there are only {sites} sites"
            if sites == count
            else f"in {count + 1} folds of whole sites some network could not be trained"
        )
        return f"target '{target.name}': {count} folds instead of {wanted.count}, since {why}"
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
        train, validation, test = split_fold(cv, fold, folds)
        if problem := kind.training_problem(train, validation):
            return f"in fold {fold} of {folds}{_named(fold, test, validation)} {problem}"
    return None


def _named(fold: int, test: pl.DataFrame, validation: pl.DataFrame) -> str:
    """Name the test and validation units of a fold; empty if the folds have numbers only."""
    if "fold_name" not in test.columns or test["fold_name"][0] == str(fold):
        return ""
    tested, validated = (visible(units["fold_name"][0]) for units in (test, validation))
    return f" (test '{tested}', validation '{validated}')"


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

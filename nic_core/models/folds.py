"""Cross-validation folds by patient, one table shared by all encoders of a target."""

from __future__ import annotations

from collections import Counter

import numpy as np
import polars as pl

from nic_core.cohort import Target


def make_folds(table: pl.DataFrame, *, target: Target, folds: int, seed: int) -> pl.DataFrame:
    """Deal the patients of the ``cv`` split into folds [choice].

    Patients are ordered by class, by event then time, or by value (a patient's slides: their
    most frequent class, their mean), ties at random, and dealt one by one to the fold that has
    fewest of the stratum (class, event), then fewest of all. So any stretch of neighbours in a
    stratum is spread over the folds, which stratifies by quantile as well.

    Parameters
    ----------
    table
        Output of :func:`nic_core.models.labels.target_table`.

    Returns
    -------
    polars.DataFrame
        ``patient``, ``fold`` (int64, 0 to ``folds`` - 1), sorted by patient.

    Raises
    ------
    ValueError
        There are fewer patients than folds.
    """
    patients = (
        table.filter(pl.col("split") == "cv")
        .group_by("patient")
        .agg(
            pl.col("time", "event").first()
            if target.kind == "survival"
            else pl.col("y").mode().min()
            if target.kind == "classification"
            else pl.col("y").mean()
        )
        .sort("patient")
    )
    if patients.height < folds:
        raise ValueError(f"target '{target.name}': {patients.height} patients for {folds} folds")
    random = np.random.default_rng(seed)
    shuffled = patients[random.permutation(patients.height)]
    if target.kind == "survival":
        ordered = shuffled.sort("event", "time", maintain_order=True)
        strata = ordered["event"].cast(pl.Int64)
    else:
        ordered = shuffled.sort("y", maintain_order=True)
        strata = ordered["y"] if target.kind == "classification" else ordered["y"] * 0
    dealt: list[int] = []
    everyone: Counter[int] = Counter()
    in_stratum: Counter[tuple[float, int]] = Counter()
    for stratum in strata:
        tie = random.permutation(folds)
        fold = min(range(folds), key=lambda f: (in_stratum[stratum, f], everyone[f], tie[f]))
        in_stratum[stratum, fold] += 1
        everyone[fold] += 1
        dealt.append(fold)
    result = ordered.select("patient", fold=pl.Series(dealt, dtype=pl.Int64)).sort("patient")
    check_folds(result, table)
    return result


def check_folds(folds: pl.DataFrame, table: pl.DataFrame) -> None:
    """Raise ``ValueError`` unless every labelled ``cv`` patient has one fold and no other has."""
    if folds["patient"].is_duplicated().any():
        twice = folds.filter(pl.col("patient").is_duplicated())["patient"][0]
        raise ValueError(f"folds overlap: patient '{twice}' is in more than one")
    expected = set(table.filter(pl.col("split") == "cv")["patient"])
    found = set(folds["patient"])
    if found - expected:
        raise ValueError(f"folds hold patient '{min(found - expected)}', who is not in split 'cv'")
    if expected - found:
        raise ValueError(f"patient '{min(expected - found)}' is in no fold; make the folds again")

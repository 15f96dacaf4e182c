"""Splits of a patch task into train, validation and test by group, stratified by class."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "validation", "test")
FRACTIONS = (0.6, 0.2, 0.2)  # [choice]
ORDERS = 16  # random orders of the groups that are tried
MANY = 4000  # groups; one random order suffices for as many


def split_by_group(
    labels: NDArray[np.integer],
    groups: Sequence[str],
    *,
    seed: int,
    test_groups: Collection[str] = (),
) -> list[str]:
    """Assign each row to a split, such that all rows of a group are in the same split.

    Groups are assigned one after the other to the split that lacks most of the group's classes. Of
    several random orders, the result nearest to 60/20/20 in every class is returned. The first
    group of each class goes to ``train``. With ``test_groups``, these are the test split and the
    others are divided 75/25. All of this is [choice].

    Parameters
    ----------
    labels : ndarray
        Class of each row (N,), 0..classes-1.
    groups : sequence of str
        Group (patient) of each row (N,).
    seed : int
        Of the random orders.
    test_groups : collection of str
        Groups of the test split.

    Returns
    -------
    list of str
        Split of each row (N,), of ``SPLITS``.

    Raises
    ------
    ValueError
        There are too few groups, a test group is unknown, or only test groups have some class.
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    unknown = sorted(set(test_groups) - set(names.tolist()))
    if unknown:
        raise ValueError(f"test groups {unknown} do not exist in the data")
    counts = np.zeros((len(names), int(labels.max()) + 1))
    np.add.at(counts, (index, labels), 1)

    held_out = np.isin(names, sorted(test_groups))
    targets = np.array(FRACTIONS)
    if held_out.any():
        targets = np.array(FRACTIONS[:2]) / sum(FRACTIONS[:2])
    free = np.flatnonzero(~held_out)
    if len(free) < len(targets):
        raise ValueError(
            f"{len(free)} groups cannot be divided into {', '.join(SPLITS[: len(targets)])}"
        )
    lost = np.flatnonzero((counts.sum(0) > 0) & (counts[free].sum(0) == 0))
    if len(lost):
        raise ValueError(f"class number {lost[0]} occurs in test groups only")

    rng = np.random.default_rng(seed)
    error, assigned = min(
        (_deal(counts[free], targets, rng) for _ in range(ORDERS if len(free) < MANY else 1)),
        key=lambda pair: pair[0],
    )
    if not np.isfinite(error):
        raise ValueError(
            "too few groups: a split would be empty once each class has a group in the train split"
        )
    assignment = np.full(len(names), SPLITS.index("test"))
    assignment[free] = assigned
    return [SPLITS[split] for split in assignment[index]]


def _deal(
    counts: NDArray[np.floating], targets: NDArray[np.floating], rng: np.random.Generator
) -> tuple[float, NDArray[np.intp]]:
    """Assign the groups in one random order; return its error and the split of each group.

    The error is infinite if a split is empty.
    """
    total = counts.sum(0)
    shares = counts[:, total > 0] / total[total > 0]  # share of each class that a group has
    filled = np.zeros((len(targets), shares.shape[1]))
    assignment = np.zeros(len(shares), np.intp)
    for group in rng.permutation(len(shares)):
        share = shares[group]
        untrained = (share > 0) & (filled[0] == 0)
        split = 0 if untrained.any() else ((targets[:, None] - filled) @ share).argmax()
        filled[split] += share
        assignment[group] = split
    if (filled.sum(1) == 0).any():
        return float("inf"), assignment
    return float(((filled - targets[:, None]) ** 2).sum()), assignment

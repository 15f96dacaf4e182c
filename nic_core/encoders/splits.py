"""Train, validation and test: whole groups, stratified by class, seeded."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "validation", "test")
FRACTIONS = (0.6, 0.2, 0.2)  # [choice]
ORDERS = 16
MANY = 4000  # groups; among so many one random order is as good as another


def split_by_group(
    labels: NDArray[np.integer],
    groups: Sequence[str],
    *,
    seed: int,
    test_groups: Collection[str] = (),
) -> list[str]:
    """The split of each row, such that a group is never in two of them.

    Groups are dealt one after the other to the split that is shortest of the group's classes;
    of a few random orders the one nearest to 60/20/20 in every class wins. A class comes to
    ``train`` before it comes anywhere else. With ``test_groups`` these are the test split and
    the others are divided 75/25. All of it is [choice].

    Parameters
    ----------
    labels
        Class of each row, 0..classes-1.
    groups
        Group (patient) of each row.

    Raises
    ------
    ValueError
        Too few groups, an unknown test group, or a class that only test groups have.
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    unknown = sorted(set(test_groups) - set(names.tolist()))
    if unknown:
        raise ValueError(f"test groups {unknown} are not among the groups")
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
        raise ValueError(f"class number {lost[0]} is in no group but the test groups")

    rng = np.random.default_rng(seed)
    error, dealt = min(
        (_deal(counts[free], targets, rng) for _ in range(ORDERS if len(free) < MANY else 1)),
        key=lambda pair: pair[0],
    )
    if not np.isfinite(error):
        raise ValueError("too few groups: some split stays empty once each class is in training")
    assignment = np.full(len(names), SPLITS.index("test"))
    assignment[free] = dealt
    return [SPLITS[split] for split in assignment[index]]


def _deal(
    counts: NDArray[np.floating], targets: NDArray[np.floating], rng: np.random.Generator
) -> tuple[float, NDArray[np.intp]]:
    """One random order's error (infinite: a split is empty) and split of each group."""
    total = counts.sum(0)
    shares = counts[:, total > 0] / total[total > 0]  # of each class, what a group holds
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

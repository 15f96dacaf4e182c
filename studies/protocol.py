"""How an encoder is judged: linear probes by patient, and paired bootstrap over patients.

For a task and an encoder, a class-balanced logistic regression is fitted to the embeddings of four
fifths of the groups (patients, where known) and classifies the others, so that each unit is
classified once by a probe that has not seen its patient. This is repeated with other divisions.
The score is the balanced accuracy over all units, mean over divisions; intervals and differences
resample whole groups, the same for both encoders. All of this is [choice].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nic_core.encoders.probes import Embedder
from studies.tissue_tasks import TissueTask

FOLDS = 5
DIVISIONS = 3
STRENGTH = 0.01  # C of the logistic regression, the inverse of its penalty
MOST_PATCHES = 250  # of a group and class in a probe; more of one patient say little more
DRAWS = 2000
LEVEL = 0.95

UNIT_SCHEMA = pl.Schema(
    {
        "task": pl.String(),
        "division": pl.Int64(),
        "unit": pl.Int64(),
        "group": pl.String(),
        "class": pl.Int64(),
        "predicted": pl.Int64(),
    }
)


def probe_units(encoder: Embedder, task: TissueTask) -> pl.DataFrame:
    """Classify every unit of a task by probes that have not seen its group (``UNIT_SCHEMA``)."""
    rows = _sample(task)
    table = task.dataset.table[rows]
    embeddings = np.concatenate(
        [
            np.asarray(encoder.embed(task.dataset.patches[part]), np.float64)
            for part in np.array_split(rows, len(rows) // 512 + 1)
        ]
    )
    if task.unit == "region":
        units, first = np.unique(table["source"].to_numpy(), return_index=True)
        number = np.searchsorted(units, table["source"].to_numpy())
        sums = np.zeros((len(units), embeddings.shape[1]))
        np.add.at(sums, number, embeddings)
        embeddings = sums / np.bincount(number)[:, None]
        table = table[first.tolist()]
    labels, groups = table["class"].to_numpy(), table["group"].to_numpy()
    parts = []
    for division in range(DIVISIONS):
        predicted = np.full(len(labels), -1)
        for train, test in folds(labels, groups, division):
            probe = make_pipeline(
                StandardScaler(),
                LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=1000),
            ).fit(embeddings[train], labels[train])
            predicted[test] = probe.predict(embeddings[test])
        parts.append(
            pl.DataFrame(
                {
                    "task": task.name,
                    "division": division,
                    "unit": np.arange(len(labels)),
                    "group": groups,
                    "class": labels,
                    "predicted": predicted,
                },
                UNIT_SCHEMA,
            )
        )
    return pl.concat(parts)


def folds(
    labels: NDArray[np.integer], groups: NDArray[np.str_], division: int
) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Divide units into at most five folds of whole groups; return (train, test) indices.

    A fold whose training part would lack a class cannot occur unless one group has a whole class;
    then the probe does not know the class and gets these units wrong.
    """
    count = min(FOLDS, len(np.unique(groups)))
    dealer = StratifiedGroupKFold(count, shuffle=True, random_state=division)
    return list(dealer.split(labels, labels, groups))


def _sample(task: TissueTask) -> NDArray[np.int64]:
    """Return the rows of a task, at most ``MOST_PATCHES`` of a group and class."""
    if task.unit == "region":
        return np.arange(len(task.dataset.table))
    table = task.dataset.table
    chosen = (
        table.select("index", "group", "class")
        .with_columns(pl.int_range(pl.len()).shuffle(seed=0).over("group", "class").alias("place"))
        .filter(pl.col("place") < MOST_PATCHES)
    )
    return np.sort(chosen["index"].to_numpy())


# --- scores and intervals ------------------------------------------------------------------------


def balanced_accuracy(units: pl.DataFrame) -> float:
    """Return the balanced accuracy of the units of one task, mean over divisions."""
    return float(_accuracy(_counts(units)[0].sum(0)))


def interval(units: pl.DataFrame) -> tuple[float, float]:
    """Return the 95 % interval of the balanced accuracy by bootstrap over groups."""
    counts, _ = _counts(units)
    return _quantiles(_accuracy(_resampled(counts, _draws(len(counts)))))


def paired_difference(
    one: Sequence[pl.DataFrame], other: Sequence[pl.DataFrame]
) -> tuple[float, float, float]:
    """Return the difference of two encoders on a task, with its 95 % interval.

    Parameters
    ----------
    one, other : sequence of polars.DataFrame
        Units of the same task, one table per training seed of the encoder; an encoder's score is
        the mean over its seeds.

    Returns
    -------
    tuple of float
        Difference of the balanced accuracies, lower and upper limit (bootstrap over groups).
    """
    counts = [[_counts(units) for units in side] for side in (one, other)]
    names = counts[0][0][1]
    if any(found != names for side in counts for _, found in side):
        raise ValueError("the encoders were judged on different groups")
    draws = _draws(len(names))

    def mean(side: list[tuple[NDArray[np.float64], list[str]]], draw: bool) -> NDArray[np.float64]:
        seeds = [_accuracy(_resampled(c, draws) if draw else c.sum(0)) for c, _ in side]
        return np.asarray(np.mean(seeds, axis=0))

    low, high = _quantiles(mean(counts[0], True) - mean(counts[1], True))
    return float(mean(counts[0], False) - mean(counts[1], False)), low, high


def _counts(units: pl.DataFrame) -> tuple[NDArray[np.float64], list[str]]:
    """Return right and all units by group, division and class: (groups, 2, divisions, classes)."""
    names, group = np.unique(units["group"].to_numpy(), return_inverse=True)
    division, label = units["division"].to_numpy(), units["class"].to_numpy()
    right = (units["class"] == units["predicted"]).to_numpy()
    counts = np.zeros((len(names), 2, int(division.max()) + 1, int(label.max()) + 1))
    np.add.at(counts[:, 0], (group, division, label), right)
    np.add.at(counts[:, 1], (group, division, label), 1)
    return counts, names.tolist()


def _draws(groups: int) -> NDArray[np.float64]:
    """Return how often each group is in each bootstrap sample (draws, groups)."""
    rng = np.random.default_rng(0)
    return rng.multinomial(groups, np.full(groups, 1 / groups), DRAWS).astype(np.float64)


def _resampled(counts: NDArray[np.float64], draws: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.einsum("dg,g...->d...", draws, counts))


def _accuracy(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean recall over the classes that occur, then over divisions: (..., 2, D, K)."""
    right, every = counts[..., 0, :, :], counts[..., 1, :, :]
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nanmean(right / every, axis=-1).mean(-1))


def _quantiles(values: NDArray[np.float64]) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, (tail, 1 - tail))
    return float(low), float(high)

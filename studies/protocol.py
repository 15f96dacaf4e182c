"""How an encoder is judged: linear probes by patient, and paired bootstrap over patients.

For a task and an encoder, a linear discriminant with Ledoit-Wolf shrinkage and equal priors is
fitted to the embeddings of four fifths of the groups (patients, where known) and classifies the
others, so that each unit is classified once by a probe that has not seen its patient. It has no
setting that would favour short or long embeddings. All is repeated with other divisions. The score
is the balanced accuracy over all units, mean over divisions; intervals and differences resample
whole groups, the same for both encoders. They hold the spread between patients, not that between
trainings or divisions, whose scores are averaged. All of this is [choice].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from nic_core.encoders.probes import Embedder, embed_in_parts
from studies.tissue_tasks import TissueTask

FOLDS = 5
DIVISIONS = 3
MOST_PATCHES = 100  # of a group and class in a probe; more of one patient say little more
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
    embeddings = embed_in_parts(encoder, task.dataset.patches, rows).astype(np.float64)
    if task.unit == "region":
        embeddings, first = _pooled(embeddings, table["source"].to_numpy())
        table = table[first.tolist()]
    labels, groups = table["class"].to_numpy(), table["group"].to_numpy()
    parts = []
    for division in range(DIVISIONS):
        predicted = np.full(len(labels), -1)
        for train, test in folds(labels, groups, division):
            predicted[test] = (
                balanced_probe(labels[train])
                .fit(embeddings[train], labels[train])
                .predict(embeddings[test])
            )
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

    If one group has a whole class, the probe without this group lacks the class and gets the
    group's units wrong.
    """
    dealer = StratifiedGroupKFold(
        min(FOLDS, len(np.unique(groups))), shuffle=True, random_state=division
    )
    return list(dealer.split(labels, labels, groups))


def balanced_probe(labels: NDArray[np.integer]) -> Pipeline:
    """Return an unfitted probe for the classes of ``labels``, which count equally."""
    classes = len(np.unique(labels))
    discriminant = LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage="auto", priors=np.full(classes, 1 / classes)
    )
    return make_pipeline(StandardScaler(), discriminant)


def _pooled(
    embeddings: NDArray[np.float64], sources: NDArray[np.str_]
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Return mean and standard deviation over each source's patches, and its first patch."""
    names, first, number = np.unique(sources, return_index=True, return_inverse=True)
    count = np.bincount(number)[:, None]
    sums, squares = (np.zeros((len(names), embeddings.shape[1])) for _ in range(2))
    np.add.at(sums, number, embeddings)
    mean = sums / count
    np.add.at(squares, number, (embeddings - mean[number]) ** 2)
    return np.hstack([mean, np.sqrt(squares / count)]), first


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


def score(seeds: Sequence[pl.DataFrame]) -> tuple[float, float, float]:
    """Return the mean balanced accuracy over trainings, with its 95 % interval.

    ``seeds`` holds the units of one task, one table per training. The interval is by bootstrap over
    groups.
    """
    return _with_interval([seeds], lambda means: means[0])


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
    return _with_interval([one, other], lambda means: means[0] - means[1])


def _with_interval(
    encoders: Sequence[Sequence[pl.DataFrame]],
    statistic: Callable[[list[NDArray[np.float64]]], NDArray[np.float64]],
) -> tuple[float, float, float]:
    """Return a statistic of the encoders' scores, and its interval by bootstrap over groups."""
    counts = [[_counts(units) for units in seeds] for seeds in encoders]
    names = counts[0][0][1]
    if any(found != names for seeds in counts for _, found in seeds):
        raise ValueError("the encoders were judged on different groups")

    def value(draws: NDArray[np.float64]) -> NDArray[np.float64]:
        means = [
            np.mean([_accuracy(np.einsum("dg,g...->d...", draws, c)) for c, _ in seeds], axis=0)
            for seeds in counts
        ]
        return np.asarray(statistic(means))

    tail = (1 - LEVEL) / 2
    low, high = np.quantile(value(_draws(len(names))), (tail, 1 - tail))
    return float(value(np.ones((1, len(names))))[0]), float(low), float(high)


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


def _accuracy(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean recall over the classes that occur, then over divisions: (..., 2, D, K)."""
    right, every = counts[..., 0, :, :], counts[..., 1, :, :]
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nanmean(right / every, axis=-1).mean(-1))

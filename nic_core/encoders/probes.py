"""Probes of frozen embeddings: what an encoder knows before any slide is compressed.

All of them see the embeddings of a task's training split and are scored on its test split, so tasks
that the encoder never trained on can be asked as well. All of it is [choice].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import StandardScaler

from nic_core.encoders.encoder import Encoder
from nic_core.encoders.errors import EncoderError
from nic_core.encoders.patch_tasks import PatchDataset
from nic_core.encoders.scores import TaskScores, score_task

NEIGHBOURS = 20
LINEAR, KNN = "linear probe", f"{NEIGHBOURS} nearest neighbours"
PATCHES = 1500  # of a split: enough for a score to the second digit in seconds

PROBE_SCHEMA = pl.Schema(
    {
        "task": pl.String(),
        "in_training": pl.Boolean(),  # the encoder was trained on it; null: an imported encoder
        "probe": pl.String(),
        "balanced_accuracy": pl.Float64(),
        "auc": pl.Float64(),
        "f1": pl.Float64(),
        "train": pl.Int64(),  # patches
        "test": pl.Int64(),
    }
)


class Embedder(Protocol):
    """What a probe asks of an encoder; anything else that gives patches numbers can be probed."""

    def embed(self, pixels: NDArray[np.uint8], /) -> NDArray[np.floating]:
        """Patches uint8 (B, P, P, 3) to embeddings (B, C)."""


@dataclass(frozen=True)
class TaskEmbeddings:
    """Embeddings of a task's training and test patches (or of a sample of them), standardised.

    Each embedding number has mean 0 and variance 1 over the training patches. ``train`` and ``test``
    are float32 (N, C), ``train_rows`` and ``test_rows`` the patches' numbers in ``task``.
    """

    task: PatchDataset
    train: NDArray[np.float32]
    test: NDArray[np.float32]
    train_rows: NDArray[np.int64]
    test_rows: NDArray[np.int64]

    @property
    def train_labels(self) -> NDArray[np.int64]:
        """Class numbers (N,)."""
        return self.task.labels[self.train_rows]

    @property
    def test_labels(self) -> NDArray[np.int64]:
        return self.task.labels[self.test_rows]


def task_embeddings(
    encoder: Embedder, task: PatchDataset, *, patches: int = PATCHES, seed: int = 0
) -> TaskEmbeddings:
    """Embed at most ``patches`` patches of each of the two splits, drawn without replacement.

    The training patches keep one of each class at least.
    """
    rng = np.random.default_rng(seed)
    train, test = (_sample(task, split, patches, rng) for split in ("train", "test"))
    scaler = StandardScaler().fit(embeddings := _embed(encoder, task, train))
    scaled_test = scaler.transform(_embed(encoder, task, test))
    return TaskEmbeddings(task, scaler.transform(embeddings), scaled_test, train, test)


def check_scale(encoder: Encoder, task: PatchDataset) -> None:
    """Raises :class:`EncoderError` where a task's patches have not the encoder's size or um/px."""
    card = encoder.card
    if (card.patch, card.mpp) != (task.patch, task.mpp):
        raise EncoderError(
            f"encoder '{card.name}' reads patches of {card.patch} px at {card.mpp:g} um/px; those "
            f"of patch task '{task.name}' are of {task.patch} px at {task.mpp:g} um/px"
        )


def linear_probe(embeddings: TaskEmbeddings) -> TaskScores:
    """Test scores of a class-balanced logistic regression."""
    return _score(LogisticRegression(max_iter=2000, class_weight="balanced"), embeddings)


def knn_probe(embeddings: TaskEmbeddings) -> TaskScores:
    """Test scores of the 20 nearest training patches, weighted by 1 / distance."""
    neighbours = min(NEIGHBOURS, len(embeddings.train))
    return _score(KNeighborsClassifier(neighbours, weights="distance"), embeddings)


def probe_table(encoder: Encoder, tasks: Sequence[TaskEmbeddings]) -> pl.DataFrame:
    """Both probes of every task (:data:`PROBE_SCHEMA`)."""
    rows = []
    for embeddings in tasks:
        name = embeddings.task.name
        in_training = None if encoder.card.objective == "imported" else name in encoder.card.data
        for probe, score in ((LINEAR, linear_probe), (KNN, knn_probe)):
            s = score(embeddings)
            sizes = (len(embeddings.train), len(embeddings.test))
            rows.append((name, in_training, probe, s.balanced_accuracy, s.auc, s.f1, *sizes))
    return pl.DataFrame(rows, schema=PROBE_SCHEMA, orient="row")


def principal_components(
    embeddings: TaskEmbeddings,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Test embeddings on the first two principal axes of the training embeddings.

    Returns coordinates (N, 2), and the shares of the variance that the two axes hold.
    """
    axes = PCA(2, random_state=0).fit(embeddings.train)
    return axes.transform(embeddings.test), axes.explained_variance_ratio_


def nearest_patches(
    embeddings: TaskEmbeddings, queries: NDArray[np.int64], neighbours: int
) -> NDArray[np.int64]:
    """For test embeddings number ``queries`` (Q,), the training embeddings nearest to each (Q, K)."""
    index = NearestNeighbors(n_neighbors=min(neighbours, len(embeddings.train))).fit(
        embeddings.train
    )
    nearest: NDArray[np.int64] = index.kneighbors(embeddings.test[queries], return_distance=False)
    return nearest


def _score(classifier: ClassifierMixin, embeddings: TaskEmbeddings) -> TaskScores:
    classifier.fit(embeddings.train, embeddings.train_labels)
    # every class is in train, so the columns are all classes in order
    return score_task(embeddings.test_labels, classifier.predict_proba(embeddings.test))


def _sample(
    task: PatchDataset, split: str, patches: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    rows = rng.permutation(task.rows(split))
    # the first of each class stand in front: a sample that lacks a class trains no classifier
    first = np.unique(task.labels[rows], return_index=True)[1]
    ordered = np.concatenate([rows[first], np.delete(rows, first)])
    return np.sort(ordered[: max(patches, len(first))])


def _embed(encoder: Embedder, task: PatchDataset, rows: NDArray[np.int64]) -> NDArray[np.floating]:
    return np.concatenate(
        [encoder.embed(task.patches[part]) for part in np.array_split(rows, len(rows) // 512 + 1)]
    )

"""Probes: simple classifiers on frozen embeddings, to evaluate an encoder without slides [choice].

A probe is fitted to the embeddings of a task's train split and scored on its test split, so it also
evaluates tasks that the encoder was not trained on.
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
from nic_core.types import Pixels

NEIGHBOURS = 20
LINEAR, KNN = "linear probe", f"{NEIGHBOURS} nearest neighbours"
PATCHES = 1500  # per split; gives a score with two digits in seconds

PROBE_SCHEMA = pl.Schema(
    {
        "task": pl.String(),
        "mpp": pl.Float64(),  # um/px of the patches
        # the encoder, or its initial weights, were trained on it; null: not recorded
        "in_training": pl.Boolean(),
        "probe": pl.String(),
        "balanced_accuracy": pl.Float64(),
        "auc": pl.Float64(),
        "f1": pl.Float64(),
        "train": pl.Int64(),  # patches
        "test": pl.Int64(),
    }
)


class Embedder(Protocol):
    """What a probe requires of an encoder; any function of patches can be probed."""

    def embed(self, pixels: NDArray[np.uint8], /) -> NDArray[np.floating]:
        """Embed patches: uint8 (B, P, P, 3) to (B, C)."""


@dataclass(frozen=True)
class TaskEmbeddings:
    """Standardised embeddings of a task's training and test patches, or of a sample of them.

    Attributes
    ----------
    train, test
        float32 (N, C); each component has mean 0 and variance 1 over the training patches.
    train_rows, test_rows
        Indices (N,) of the patches in ``task``.
    """

    task: PatchDataset
    train: NDArray[np.float32]
    test: NDArray[np.float32]
    train_rows: NDArray[np.int64]
    test_rows: NDArray[np.int64]

    @property
    def train_labels(self) -> NDArray[np.int64]:
        """Class numbers of the training patches (N,)."""
        return self.task.labels[self.train_rows]

    @property
    def test_labels(self) -> NDArray[np.int64]:
        """Class numbers of the test patches (N,)."""
        return self.task.labels[self.test_rows]


def task_embeddings(
    encoder: Embedder, task: PatchDataset, *, patches: int = PATCHES, seed: int = 0
) -> TaskEmbeddings:
    """Embed at most ``patches`` patches of the train and of the test split.

    They are drawn without replacement and include at least one patch of each class of the split.
    """
    rng = np.random.default_rng(seed)
    train, test = (_sample(task, split, patches, rng) for split in ("train", "test"))
    scaler = StandardScaler().fit(embeddings := embed_in_parts(encoder, task.patches, train))
    scaled_test = scaler.transform(embed_in_parts(encoder, task.patches, test))
    return TaskEmbeddings(task, scaler.transform(embeddings), scaled_test, train, test)


def check_scale(encoder: Encoder, task: PatchDataset) -> None:
    """Check that a task's patches have the size and resolution that the encoder takes.

    Raises
    ------
    EncoderError
        They have another size, or another resolution than in the encoder's training.
    """
    card = encoder.card
    wanted = card.patch, card.task_mpp.get(task.name, task.mpp)
    if wanted != (task.patch, task.mpp):
        raise EncoderError(
            f"encoder '{card.name}' takes patches of {wanted[0]} px, those of patch task "
            f"'{task.name}' at {wanted[1]:g} um/px, but the patch task has {task.patch} px at "
            f"{task.mpp:g} um/px; make the patch task with the encoder's size and resolution"
        )


def linear_probe(embeddings: TaskEmbeddings) -> TaskScores:
    """Return test scores of a class-balanced logistic regression."""
    return _score(LogisticRegression(max_iter=2000, class_weight="balanced"), embeddings)


def knn_probe(embeddings: TaskEmbeddings) -> TaskScores:
    """Return test scores of the 20 nearest training patches, weighted by 1 / distance."""
    neighbours = min(NEIGHBOURS, len(embeddings.train))
    return _score(KNeighborsClassifier(neighbours, weights="distance"), embeddings)


def probe_table(encoder: Encoder, tasks: Sequence[TaskEmbeddings]) -> pl.DataFrame:
    """Return the scores of both probes on every task (:data:`PROBE_SCHEMA`)."""
    rows = []
    card = encoder.card
    for embeddings in tasks:
        name = embeddings.task.name
        in_training = name in card.seen_data or (False if card.training_recorded else None)
        for probe, score in ((LINEAR, linear_probe), (KNN, knn_probe)):
            s = score(embeddings)
            sizes = (len(embeddings.train), len(embeddings.test))
            figures = (s.balanced_accuracy, s.auc, s.f1)
            rows.append((name, embeddings.task.mpp, in_training, probe, *figures, *sizes))
    return pl.DataFrame(rows, schema=PROBE_SCHEMA, orient="row")


def principal_components(
    embeddings: TaskEmbeddings,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Project the test embeddings onto the first two principal axes of the training embeddings.

    Returns
    -------
    tuple of ndarray
        Coordinates (N, 2), and the share of the variance that each axis explains (2,).
    """
    axes = PCA(2, random_state=0).fit(embeddings.train)
    return axes.transform(embeddings.test), axes.explained_variance_ratio_


def nearest_patches(
    embeddings: TaskEmbeddings, queries: NDArray[np.int64], neighbours: int
) -> NDArray[np.int64]:
    """Return indices (Q, K) of the training embeddings nearest to the test embeddings (Q,)."""
    index = NearestNeighbors(n_neighbors=min(neighbours, len(embeddings.train))).fit(
        embeddings.train
    )
    nearest: NDArray[np.int64] = index.kneighbors(embeddings.test[queries], return_distance=False)
    return nearest


def _score(classifier: ClassifierMixin, embeddings: TaskEmbeddings) -> TaskScores:
    classifier.fit(embeddings.train, embeddings.train_labels)
    # the train split has every class, so the columns are all classes in order
    return score_task(embeddings.test_labels, classifier.predict_proba(embeddings.test))


def _sample(
    task: PatchDataset, split: str, patches: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    rows = rng.permutation(task.rows(split))
    # one patch of each class comes first, because a classifier needs every class
    first = np.unique(task.labels[rows], return_index=True)[1]
    ordered = np.concatenate([rows[first], np.delete(rows, first)])
    return np.sort(ordered[: max(patches, len(first))])


def embed_in_parts(
    encoder: Embedder, patches: Pixels, rows: NDArray[np.int64]
) -> NDArray[np.floating]:
    """Embed the patches of some rows in parts of about 512, which bounds the memory.

    Parameters
    ----------
    patches : uint8 (N, P, P, 3)
    rows : int (M,)

    Returns
    -------
    float (M, C)
    """
    return np.concatenate(
        [encoder.embed(patches[part]) for part in np.array_split(rows, len(rows) // 512 + 1)]
    )

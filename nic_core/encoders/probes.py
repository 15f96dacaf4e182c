"""Probes of frozen codes: what an encoder knows before any slide is compressed.

Both see the codes of a task's training split and are scored on its test split, so tasks that
the encoder never trained on can be asked as well. All of it is [choice].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nic_core.encoders.encoder import Encoder
from nic_core.encoders.patch_tasks import PatchDataset
from nic_core.encoders.scores import TaskScores, score_task

NEIGHBOURS = 20


def linear_probe(encoder: Encoder, task: PatchDataset) -> TaskScores:
    """Scores of a class-balanced logistic regression on standardised codes."""
    return _score(LogisticRegression(max_iter=2000, class_weight="balanced"), encoder, task)


def knn_probe(encoder: Encoder, task: PatchDataset) -> TaskScores:
    """Scores of the 20 nearest training patches by distance between standardised codes."""
    neighbours = min(NEIGHBOURS, len(task.rows("train")))
    return _score(KNeighborsClassifier(neighbours, weights="distance"), encoder, task)


def _score(classifier: ClassifierMixin, encoder: Encoder, task: PatchDataset) -> TaskScores:
    model = make_pipeline(StandardScaler(), classifier)
    train, test = task.rows("train"), task.rows("test")
    model.fit(_codes(encoder, task, train), task.labels[train])
    # every class is in train, so the columns are all classes in order
    return score_task(task.labels[test], model.predict_proba(_codes(encoder, task, test)))


def _codes(encoder: Encoder, task: PatchDataset, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.concatenate(
        [encoder.embed(task.patches[part]) for part in np.array_split(rows, len(rows) // 512 + 1)]
    )

"""How well a classifier does on one patch task."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score


class TaskScores(BaseModel):
    """Scores over ``n`` patches; classes without a patch are left out of every mean.

    ``auc`` is the mean over one-against-rest AUCs (for two classes: the AUC), ``None`` where
    only one class is present. ``confusion``: rows are true classes, columns predicted ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int
    balanced_accuracy: float
    auc: float | None
    f1: float
    confusion: tuple[tuple[int, ...], ...]


def score_task(labels: NDArray[np.integer], probabilities: NDArray[np.floating]) -> TaskScores:
    """Scores of class probabilities (N, classes) against labels (N,) in 0..classes-1.

    ``f1`` is the mean over classes ("macro"). N must be 1 or more.
    """
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(1)
    confusion = confusion_matrix(labels, predicted, labels=np.arange(classes))
    present = np.flatnonzero(confusion.sum(1))
    recalls = confusion.diagonal()[present] / confusion.sum(1)[present]
    aucs = [
        float(roc_auc_score(labels == k, probabilities[:, k])) for k in present if len(present) > 1
    ]
    return TaskScores(
        n=len(labels),
        balanced_accuracy=float(recalls.mean()),
        auc=float(np.mean(aucs)) if aucs else None,
        f1=float(f1_score(labels, predicted, labels=present, average="macro", zero_division=0)),
        confusion=tuple(tuple(int(n) for n in row) for row in confusion),
    )

"""How well a classifier does on one patch task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score

RESAMPLES = 1000


class TaskScores(BaseModel):
    """Scores over ``n`` patches; classes without a patch are left out of every mean.

    ``auc`` is the mean over one-against-rest AUCs (for two classes: the AUC), ``None`` where
    only one class is present. ``confusion``: rows are true classes, columns predicted ones.
    ``interval`` is that of ``balanced_accuracy``, 95 % percentile bootstrap over patients, where
    they are known and more than one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int
    balanced_accuracy: float
    auc: float | None
    f1: float
    confusion: tuple[tuple[int, ...], ...]
    interval: tuple[float, float] | None = None


def score_task(
    labels: NDArray[np.integer],
    probabilities: NDArray[np.floating],
    patients: Sequence[str] = (),
) -> TaskScores:
    """Scores of class probabilities (N, classes) against labels (N,) in 0..classes-1.

    ``f1`` is the mean over classes ("macro"). N must be 1 or more. ``patients`` (N,) of the
    patches give an interval.
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
        interval=_interval(labels, predicted, patients, classes)
        if len(set(patients)) > 1
        else None,
    )


def _interval(
    labels: NDArray[np.integer],
    predicted: NDArray[np.integer],
    patients: Sequence[str],
    classes: int,
) -> tuple[float, float]:
    """Bounds of the balanced accuracy when patients are drawn with replacement.

    By patients, not patches as in :mod:`nic_core.models.metrics`: there may be 100,000 of these.
    """
    _, patient = np.unique(np.asarray(patients), return_inverse=True)
    people = int(patient.max()) + 1
    hits, patches = np.zeros((people, classes)), np.zeros((people, classes))
    np.add.at(hits, (patient, labels), predicted == labels)
    np.add.at(patches, (patient, labels), 1)
    random, share = np.random.default_rng(0), np.full(people, 1 / people)
    values = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = random.multinomial(people, share)
        right, of = drawn @ hits, drawn @ patches
        values[i] = (right[of > 0] / of[of > 0]).mean()
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)

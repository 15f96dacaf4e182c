"""Classification scores on one patch task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score

RESAMPLES = 1000


class TaskScores(BaseModel):
    """Scores over ``n`` patches; classes without a patch are excluded from every mean.

    Attributes
    ----------
    auc
        Mean of the one-versus-rest AUCs (for two classes: the AUC); ``None`` if only one class is
        present.
    f1
        Macro F1: the mean over classes.
    confusion
        Numbers of patches; rows are true classes, columns predicted classes.
    interval
        95 % interval of ``balanced_accuracy``, percentile bootstrap over patients; ``None`` without
        at least two patients.
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
    """Score class probabilities against labels.

    Parameters
    ----------
    labels : ndarray
        Class numbers (N,) in 0..classes-1, N >= 1.
    probabilities : ndarray
        (N, classes).
    patients : sequence of str
        Patient of each patch (N,), for the interval.
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
    """Return the bootstrap interval of the balanced accuracy over patients.

    It resamples counts per patient instead of rows as :mod:`nic_core.models.metrics` does, because
    a task may have 100,000 patches.
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

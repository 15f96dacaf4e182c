"""Distance of a slide to the training cohort of a model: is the slide like those trained on?

A prediction for a slide of another stain, focus, scale or organ may be wrong without any sign of it
in the prediction itself. The distance shows such a shift of the whole slide. Its definition is
[choice]:

1. A slide is its mean embedding over all tissue cells, in standard deviations of the cells of the
   training slides.
2. The distance is the Mahalanobis distance to the mean of the training slides. The covariance
   between slides is that of Ledoit and Wolf (2004), which can be inverted with fewer slides than
   numbers per embedding. Its leading principal components (at most :data:`COMPONENTS`) keep their
   variances; all other directions have one common variance, as in probabilistic principal
   component analysis (Tipping and Bishop 1999). A shift in a direction in which training slides
   hardly differ therefore counts as well.
3. It is calibrated on training slides that were held out: the slides of each fold are compared
   with a reference of the other folds. The percentile of a distance is that of a new observation
   from a log-normal distribution of these distances (Student's t of the logarithm, with as many
   degrees of freedom as slides minus one).

A slide that the model was trained on has the distance that it had when it was held out.

What the percentile can resolve: n held-out slides can show directly only that a slide is farther
than all of them, and one slide in n + 1 of the same kind is. For fewer than about 200 slides the
99th percentile therefore rests on the log-normal distribution. With few slides Student's t puts it
far out: it is about e^(2.8 s) times the median of 12 slides, and e^(8.0 s) times that of 3, where s
is the standard deviation of the logarithms, so only a large shift is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn.covariance import ledoit_wolf_shrinkage

from nic_core.encoders.encoder import weights_hash as tensors_hash
from nic_core.grids.moments import GridMoments

REFERENCE = "distance.safetensors"
COMPONENTS = 16  # largest number of principal components with a variance of their own
FAR_PERCENTILE = 99.0  # a slide beyond it is reported as far from the training cohort
_SMALLEST = 1e-6  # least variance, distance and spread, against division by 0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TrainingReference:
    """The training cohort as the distance compares with it; C numbers per embedding.

    Attributes
    ----------
    mean : float64 (C,)
        Mean of the training slides' mean embeddings.
    scale : float64 (C,)
        Standard deviation of each number over the cells of the training slides.
    axes : float64 (k, C)
        Principal components of the slides' scaled mean embeddings, orthonormal.
    variances : float64 (k,)
        Variance along each of them.
    rest : float64 (1,)
        Variance in every other direction.
    held_out : float64 (slides,)
        Distance of each training slide to a reference without its fold, in the order of
        :attr:`nic_core.models.files.TrainingCohort.slides`.
    """

    mean: Floats
    scale: Floats
    axes: Floats
    variances: Floats
    rest: Floats
    held_out: Floats

    @property
    def limit(self) -> float:
        """The distance at :data:`FAR_PERCENTILE`."""
        location, spread = self._log_normal()
        quantile = stats.t.ppf(FAR_PERCENTILE / 100, len(self.held_out) - 1)
        return float(np.exp(location + spread * quantile))

    def distance(self, mean: Floats) -> float:
        """Return the Mahalanobis distance of a slide with this mean embedding (C,)."""
        scaled = (mean - self.mean) / self.scale
        along = self.axes @ scaled
        # both parts are sums of squares; rounding can make their difference negative
        across = max(float(scaled @ scaled - along @ along), 0.0)
        return float(np.sqrt(np.sum(along**2 / self.variances) + across / self.rest[0]))

    def percentile(self, distance: float) -> float:
        """Return the percentile of a distance, 0 to 100; see the module's third step."""
        location, spread = self._log_normal()
        score = (np.log(max(distance, _SMALLEST)) - location) / spread
        return float(100 * stats.t.cdf(score, len(self.held_out) - 1))

    def _log_normal(self) -> tuple[float, float]:
        """Location and scale of Student's t of the logarithm of a new distance."""
        logarithms = np.log(self.held_out)
        spread = max(float(logarithms.std(ddof=1)), _SMALLEST)
        return float(logarithms.mean()), spread * np.sqrt(1 + 1 / len(logarithms))


def fit_reference(moments: Sequence[GridMoments], folds: Sequence[int]) -> TrainingReference:
    """Compute the reference of a training cohort.

    Parameters
    ----------
    moments
        Of each training slide (:func:`nic_core.grids.moments.grid_moments`).
    folds
        Fold in which each slide was held out, at least two different ones.
    """
    slides = list(zip(moments, folds, strict=True))
    without = {
        fold: _fit([found for found, other in slides if other != fold]) for fold in set(folds)
    }
    held_out = [without[fold].distance(found.mean) for found, fold in slides]
    return replace(_fit(moments), held_out=np.maximum(held_out, _SMALLEST))


def _fit(moments: Sequence[GridMoments]) -> TrainingReference:
    """Compute the reference of slides, without held-out distances."""
    cells = reduce(add, moments)
    variance = cells.squares / cells.cells - cells.mean**2
    scale = np.sqrt(np.maximum(variance, _SMALLEST))
    means = np.stack([found.mean for found in moments])
    scaled = (means - means.mean(0)) / scale
    size = scaled.shape[1]
    _, singular, axes = np.linalg.svd(scaled, full_matrices=False)
    found = singular**2 / len(moments)
    average = found.sum() / size
    shrinkage = float(ledoit_wolf_shrinkage(scaled, assume_centered=True)) if average else 0.0
    shrunk = (1 - shrinkage) * found + shrinkage * average
    kept = min(COMPONENTS, len(shrunk))
    # the directions that are not kept: the other components, and those that no slide differs in
    beyond = shrunk[kept:].sum() + (size - len(shrunk)) * shrinkage * average
    return TrainingReference(
        mean=means.mean(0),
        scale=scale,
        axes=axes[:kept],
        variances=np.maximum(shrunk[:kept], _SMALLEST),
        rest=np.maximum([beyond / max(size - kept, 1)], _SMALLEST),
        held_out=np.empty(0),
    )


def save_reference(folder: Path, reference: TrainingReference) -> str:
    """Write a reference into the folder of a model; return the hash of its numbers."""
    tensors = {
        field.name: torch.from_numpy(np.ascontiguousarray(getattr(reference, field.name)))
        for field in fields(reference)
    }
    save_file(tensors, folder / REFERENCE)
    return tensors_hash(REFERENCE, tensors)


def load_reference(folder: Path) -> tuple[TrainingReference, str]:
    """Read the reference that :func:`save_reference` wrote, and the hash of its numbers.

    Raises
    ------
    OSError, SafetensorError, KeyError
        The file is missing or damaged.
    """
    tensors = load_file(folder / REFERENCE)
    numbers = {field.name: tensors[field.name].numpy() for field in fields(TrainingReference)}
    return TrainingReference(**numbers), tensors_hash(REFERENCE, tensors)

"""How near the embeddings of a faster, inexact setting are to those in float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Similarity:
    """Embeddings compared with exact ones, patch by patch.

    Attributes
    ----------
    cosine, cosine_p1
        Mean and 1st percentile of the cosine similarity.
    distance
        Root mean square distance, as a fraction of the spread: the root mean square distance of the
        exact embeddings from their mean. NaN if all patches have the same embedding.
    patches
        Number of patches.
    """

    cosine: float
    cosine_p1: float
    distance: float
    patches: int


def similarity(found: NDArray[np.floating], exact: NDArray[np.floating]) -> Similarity:
    """Compare embeddings with the exact ones of the same patches, both (N, C), N at least 1."""
    a, b = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(1) / norms
    spread = np.sqrt(((b - b.mean(0)) ** 2).sum(1).mean())
    distance = np.sqrt(((a - b) ** 2).sum(1).mean())
    return Similarity(
        cosine=float(cosine.mean()),
        cosine_p1=float(np.quantile(cosine, 0.01)),
        distance=float(distance / spread) if spread > 0 else float("nan"),
        patches=len(a),
    )

"""Features that need no training, for comparison with encoders [choice]."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage.color import rgb2gray
from skimage.feature import local_binary_pattern
from skimage.filters import gaussian


class ColourAndTexture:
    """44 features of colour and texture, with the interface of an encoder."""

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Compute features (B, 44) of patches uint8 (B, P, P, 3)."""
        return np.stack([_features(patch) for patch in pixels])


def _features(patch: NDArray[np.uint8]) -> NDArray[np.float64]:
    colours = patch.reshape(-1, 3) / 255
    grey = rgb2gray(patch)
    found = [colours.mean(0), colours.std(0), *np.percentile(colours, (10, 50, 90), axis=0)]
    for radius in (1, 3):
        patterns = local_binary_pattern((grey * 255).astype(np.uint8), 8, radius, "uniform")
        found.append(np.bincount(patterns.astype(int).ravel(), minlength=10) / patterns.size)
    for sigma in (1, 2, 4):  # contrast at several scales
        smooth = gaussian(grey, sigma)
        steps = np.hypot(*np.gradient(smooth))
        found.append(np.array([(grey - smooth).std(), steps.mean(), steps.std()]))
    return np.concatenate(found)

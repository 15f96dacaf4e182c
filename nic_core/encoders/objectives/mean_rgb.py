"""Section 3, mean-RGB [B]: the embedding is the mean colour of a patch; nothing is trained."""

from __future__ import annotations

from nic_core.encoders.networks import MeanRGB

EMBEDDING_SIZE = 3


def mean_rgb_module() -> MeanRGB:
    """Return a module from uint8 (B, 3, P, P) to float32 (B, 3)."""
    return MeanRGB().eval()

"""Mean-RGB (paper B): the code is the patch's mean colour; nothing is trained."""

from __future__ import annotations

from nic_core.encoders.networks import MeanRGB

CODE = 3


def mean_rgb_module() -> MeanRGB:
    """uint8 (B, 3, P, P) to float32 (B, 3)."""
    return MeanRGB().eval()

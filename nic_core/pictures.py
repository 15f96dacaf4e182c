"""Pictures that products hold as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from nic_core.types import Pixels


def read_picture(path: Path) -> Pixels:
    """Read a picture as RGB, uint8 (H, W, 3); transparency is dropped."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))

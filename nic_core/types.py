"""Types that several modules share."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""RGB pixels, uint8 (..., height, width, 3)."""

Precision = Literal["float32", "bfloat16"]
"""Of the numbers inside a network."""

RequestedPrecision = Literal["auto", "float32", "bfloat16"]
"""``auto`` is bfloat16 on a device with matrix units for it, else float32 [choice]."""

Reading = Literal["patch", "input"]
"""At which um/px a slide is read: that of the patch, or of the network's (pooled) input."""

"""Types that several packages share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Pixels: TypeAlias = "NDArray[np.uint8]"
"""RGB pixels, uint8 (..., height, width, 3)."""

Precision = Literal["float32", "bfloat16"]
"""Floating-point format that a network computes with."""

RequestedPrecision = Literal["auto", "float32", "bfloat16"]
"""``auto`` is bfloat16 on a device with matrix units for it, else float32 [choice]."""

GridPrecision = Literal["float32", "bfloat16", "int8"]
"""Numbers that an encoder computes a grid with; ``int8`` is :mod:`nic_core.encoders.int8`."""

RequestedGridPrecision = Literal["auto", "float32", "bfloat16", "int8"]
"""As :data:`RequestedPrecision`; ``auto`` is never ``int8``."""

Embedding = Literal["dense", "pooled", "both"]
"""The dense code of the published network, statistics of its last feature maps, or both."""

Reading = Literal["patch", "input"]
"""um/px at which a slide is read: that of the patch, or that of the network's pooled input."""

Origin = Literal["level0", "bounds"]
"""What coordinates of annotations count from: the corner of level 0, or of the scanned area."""

ExportedCells = Literal["all", "classified", "none"]
"""Cells with an object in an export for QuPath: all with an embedding, those with a class, none."""

Colours = Literal["stored", "srgb"]
"""Pixels as stored in the file, or converted to sRGB by the file's ICC profile, if it has one."""

FeaturesFormat = Literal["trident", "clam", "stamp", "slide2vec", "anndata", "spatialdata"]
"""Layout of a file with embeddings that other software computed."""

ExportFormat = Literal["trident-h5", "anndata", "spatialdata", "parquet", "npy-tellez"]
"""Layout of files with the embeddings of a grid, for other software."""

"""The geometry of an encoder: which patches of a slide it takes, and where its cells lie."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """Patch size, resolution and stride of an encoder.

    Cell (row, column) of a grid is the square of ``stride`` px a side whose top-left corner is
    ``(column * stride, row * stride)`` px from that of the slide. Its patch has the same centre and
    ``patch`` px a side, so patches overlap if the stride is smaller than the patch [choice].

    Attributes
    ----------
    patch : int
        Side of a patch, px at ``mpp``.
    mpp : float
        um/px of a patch.
    stride : int
        Side of a cell, px at ``mpp``; at most ``patch``.
    """

    patch: int
    mpp: float
    stride: int

    @property
    def name(self) -> str:
        """Name of folders and partitions, for example ``128px-0.5um``, ``128px-0.5um-stride64``."""
        overlap = "" if self.stride == self.patch else f"-stride{self.stride}"
        return f"{self.patch}px-{self.mpp:.12g}um{overlap}"

    @property
    def margin(self) -> int:
        """Distance from the edge of a patch to that of its cell, px at ``mpp``."""
        return (self.patch - self.stride) // 2

    @property
    def cell_um(self) -> float:
        """Side of a cell, um."""
        return self.stride * self.mpp


def check_stride(encoder: str, geometry: Geometry) -> None:
    """Check that every cell is the central square of its patch.

    Raises
    ------
    ValueError
        The stride exceeds the patch, or differs from it by an odd number of px.
    """
    margin = geometry.patch - geometry.stride
    if margin < 0 or margin % 2:
        raise ValueError(
            f"encoder '{encoder}': a cell of {geometry.stride} px is not the central square of a "
            f"patch of {geometry.patch} px; give a 'stride' that is smaller by an even number"
        )

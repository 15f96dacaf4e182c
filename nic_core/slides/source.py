"""A slide's file together with how it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nic_core.types import Colours, Origin

if TYPE_CHECKING:
    from nic_core.slides.remote import SlidePath
    from nic_core.slides.slide import Slide


@dataclass(frozen=True)
class SlideSource:
    """A slide's file, and what the file does not state or states wrongly.

    Attributes
    ----------
    path : Path or RemotePath
        As in :func:`nic_core.slides.open_slide`.
    mpp : float, optional
        um/px at level 0; overrides that of the file.
    image : int, optional
        Number of the image in a file with several; default: the largest brightfield scan.
    mask : Path, optional
        Tissue mask (:func:`nic_core.tiling.mask_files.read_mask`); default: tissue is detected.
    origin : {"level0", "bounds"}, optional
        What the coordinates of a mask of regions count from; default: as the file states.
    """

    path: SlidePath
    mpp: float | None = None
    image: int | None = None
    mask: Path | None = None
    origin: Origin | None = None


def open_source(source: SlideSource, *, colours: Colours = "stored") -> Slide:
    """Open a slide with the um/px and the image of its source.

    Raises
    ------
    SlideError
        See :func:`nic_core.slides.open_slide`.
    """
    from nic_core.slides.slide import open_slide

    return open_slide(source.path, mpp=source.mpp, image=source.image, colours=colours)

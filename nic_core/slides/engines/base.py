"""The interface of an engine: what a decoding library does for a slide."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from nic_core.slides.errors import SlideError
from nic_core.slides.images import AlphaKind
from nic_core.slides.metadata import DAMAGED_REMEDY, FileMetadata
from nic_core.slides.remote import SlidePath
from nic_core.types import Pixels

EngineName = Literal["tifffile", "openslide", "libvips", "zarr", "czi"]


class ReadError(Exception):
    """A region cannot be decoded; :func:`as_slide_error` turns it into a SlideError."""


@dataclass(frozen=True)
class Level:
    """One resolution of the pyramid.

    Attributes
    ----------
    width, height : int
        Size in px of the level.
    downsample : float
        Level-0 px per px of the level.
    tile : (int, int) or None
        Width and height of its stored tiles, px of the level; None if unknown, or if the tiles are
        no regular grid.
    """

    width: int
    height: int
    downsample: float
    tile: tuple[int, int] | None = None


class Engine(Protocol):
    """An open slide file. Threads may call :meth:`read_region` in parallel.

    Attributes
    ----------
    name : EngineName
    levels : tuple of Level
        Finest first.
    metadata : FileMetadata
    """

    name: EngineName
    levels: tuple[Level, ...]
    metadata: FileMetadata

    def shrink_factors(self, level: int) -> tuple[int, ...]:
        """Return the whole factors by which the decoder can shrink a level; 1 is one of them."""
        ...

    def read_region(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        """Read a region that lies inside the level.

        Parameters
        ----------
        x, y, width, height : int
            Region in px of the level after shrinking.
        shrink : int
            One of :meth:`shrink_factors`.

        Returns
        -------
        uint8 (height, width, 3)

        Raises
        ------
        ReadError
            A part of the region cannot be decoded.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def downsample(width: int, height: int, level_width: int, level_height: int) -> float:
    """Return the level-0 px per px of a level, from the sizes of both in px.

    Pyramids shrink by whole numbers and round the sizes to whole px. A whole number that explains
    both sides is therefore preferred to the ratio of the sizes (700.5 / 175).
    """
    ratio = max(width / level_width, height / level_height)
    for whole in (round(ratio), int(ratio)):
        if (
            whole >= 1
            and abs(width / whole - level_width) < 1
            and abs(height / whole - level_height) < 1
        ):
            return float(whole)
    return (width + height) / (level_width + level_height)


def pyramid_levels(sizes: list[tuple[int, int]], tiles: list[tuple[int, int]]) -> tuple[Level, ...]:
    """Return the levels of a pyramid.

    Parameters
    ----------
    sizes : list of (int, int)
        Width and height of each level, finest first.
    tiles : list of (int, int)
        Width and height of each level's tiles; empty if unknown.
    """
    width, height = sizes[0]
    return tuple(
        Level(w, h, downsample(width, height, w, h), tile)
        for (w, h), tile in zip_longest(sizes, tiles)
    )


def flatten_on_white(pixels: NDArray[np.uint8], alpha: AlphaKind = "straight") -> Pixels:
    """Blend pixels over white by their opacity: what was not scanned becomes white.

    Parameters
    ----------
    pixels : uint8 (H, W, 4)
        RGB and opacity.
    alpha : {"straight", "premultiplied"}
        Whether the colours are already multiplied by their opacity.

    Returns
    -------
    uint8 (H, W, 3)
    """
    opacity = pixels[..., 3:]
    if opacity.size == 0 or opacity.min() == 255:
        return np.ascontiguousarray(pixels[..., :3])
    weight = opacity.astype(np.uint16)
    white = 255 * (255 - weight)
    colours = pixels[..., :3].astype(np.uint16) * (255 if alpha == "premultiplied" else weight)
    # a premultiplied colour cannot exceed its opacity; one that does is limited to it
    limited = np.minimum(colours, 255 * weight)
    flat: Pixels = ((limited + white + 127) // 255).astype(np.uint8)
    return flat


@contextlib.contextmanager
def as_slide_error(path: SlidePath) -> Iterator[None]:
    """Turn a ReadError into a SlideError that names the slide."""
    try:
        yield
    except ReadError as error:
        raise SlideError(path, f"pixels cannot be decoded ({error})", DAMAGED_REMEDY) from error

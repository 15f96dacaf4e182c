"""The interface that every decoding library is put behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal, Protocol

from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import DAMAGED_REMEDY, About
from nic_core.types import Pixels

EngineName = Literal["tifffile", "openslide", "libvips"]


class ReadError(Exception):
    """A region could not be decoded; the slide adds its name and turns it into a SlideError."""


@dataclass(frozen=True)
class Level:
    """One resolution of the pyramid: size in its own px, level-0 px per px, stored tiles.

    ``tile`` is their width and height in px of the level; None: not known, or not a grid.
    """

    width: int
    height: int
    downsample: float
    tile: tuple[int, int] | None = None


class Engine(Protocol):
    """What a decoding library does for a slide. ``region`` may be called from several threads."""

    name: EngineName
    levels: tuple[Level, ...]
    about: About

    def shrinks(self, level: int) -> tuple[int, ...]:
        """Whole factors by which decoding can shrink a level, 1 among them."""
        ...

    def region(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        """Pixels of a region inside the level, in px of the level shrunk by ``shrink``; raises
        ReadError."""
        ...

    def close(self) -> None: ...


def downsample(width: int, height: int, level_width: int, level_height: int) -> float:
    """Level-0 px per level px.

    Pyramids shrink by whole numbers and cut the sizes to whole px, so a whole number that
    explains both sides is the truth and the ratio of the sizes (700.5 / 175) is not.
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
    width, height = sizes[0]
    return tuple(
        Level(w, h, downsample(width, height, w, h), tile)
        for (w, h), tile in zip_longest(sizes, tiles)
    )


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give a ReadError the slide's name."""
    try:
        yield
    except ReadError as error:
        raise SlideError(path, f"pixels cannot be decoded ({error})", DAMAGED_REMEDY) from error

"""OpenSlide: the vendors' formats."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from nic_core.slides.engines.base import EngineName, Level, ReadError, downsample
from nic_core.slides.metadata import openslide_about
from nic_core.types import Pixels


class OpenSlideEngine:
    """OpenSlide: the vendors' formats."""

    name: EngineName = "openslide"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = openslide.OpenSlide(path)
        self._lock = threading.Lock()
        self._factors = self._slide.level_downsamples
        sizes = self._slide.level_dimensions
        # a whole factor is the format's own word; any other is the ratio of rounded sizes
        self.levels = tuple(
            Level(
                w,
                h,
                factor if factor == round(factor) else downsample(*sizes[0], w, h),
                _tile_size(self._slide.properties, number),
            )
            for number, ((w, h), factor) in enumerate(zip(sizes, self._factors, strict=True))
        )
        self.about = openslide_about(self._slide.properties, self._slide.associated_images)

    def shrinks(self, level: int) -> tuple[int, ...]:
        return (1,)

    def region(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        factor = self._factors[level]
        place = (round(x * factor), round(y * factor)), level, (width, height)
        slide = self._slide
        try:
            image = slide.read_region(*place)
        except openslide.OpenSlideError:
            # after one error a handle refuses everything, also what other threads ask of it
            self._renew(slide)
            image = self._read_alone(*place)
        pixels = np.asarray(image)
        if pixels[..., 3].min() < 255:  # not scanned there: glass
            alpha = pixels[..., 3:].astype(np.uint16)
            return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        return np.ascontiguousarray(pixels[..., :3])

    def _read_alone(
        self, corner: tuple[int, int], level: int, size: tuple[int, int]
    ) -> Image.Image:
        """Read with a handle of this read's own: an error is then this region's."""
        try:
            with openslide.OpenSlide(self._path) as own:
                return own.read_region(corner, level, size)
        except openslide.OpenSlideError as error:
            raise ReadError(str(error)) from error

    def _renew(self, failed: openslide.OpenSlide) -> None:
        with self._lock:
            if self._slide is failed:
                # it stays where the file is gone or cut by now
                with contextlib.suppress(openslide.OpenSlideError):
                    self._slide = openslide.OpenSlide(self._path)

    def close(self) -> None:
        self._slide.close()


def _tile_size(properties: Mapping[str, str], level: int) -> tuple[int, int] | None:
    sides = [
        properties.get(f"openslide.level[{level}].tile-{side}") for side in ("width", "height")
    ]
    return (int(sides[0]), int(sides[1])) if sides[0] and sides[1] else None

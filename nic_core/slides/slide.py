"""An open slide: pixels of any region at any resolution."""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from nic_core.slides.engines import Engine, EngineName, naming, open_engine
from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import BRIGHTFIELD_REMEDY, check_size, settle_mpp
from nic_core.slides.resample import resample, settle
from nic_core.types import Pixels

# Source pixels held by one read: a wide thumbnail of a slide without a pyramid comes in bands.
_SOURCE_PIXELS = 1 << 24
# A level this much coarser than asked still serves: sizes and um/px are rounded in files.
_LEVEL_ROUNDING = 1.01
_PROBE = 64  # px a side


class Slide:
    """A whole-slide image, opened by :func:`open_slide`; a context manager, safe to share
    between threads.

    Attributes
    ----------
    path : Path
    engine, engine_reason : str
        Library that decodes it (``libvips``, ``openslide`` or ``tifffile``), and why.
    width, height : int
        Level-0 px.
    mpp : float
        um/px at level 0.
    mpp_source : str
        Where it comes from: the slide table, a field of the file, or the objective power.
    objective_power : float or None
    bounds : (x, y, width, height)
        What was scanned, level-0 px; all, unless the file says less.
    associated : tuple of str
        Names of the label, macro and thumbnail images in the file, which are never read.
    levels : tuple of Level
        Finest first.
    """

    def __init__(
        self, path: Path, engine: Engine, engine_reason: str, mpp: float, mpp_source: str
    ) -> None:
        self.path = path
        self.engine, self.engine_reason = engine.name, engine_reason
        self.levels = engine.levels
        self.width, self.height = engine.levels[0].width, engine.levels[0].height
        self.mpp, self.mpp_source = mpp, mpp_source
        self.objective_power = engine.about.objective_power
        self.bounds = engine.about.bounds or (0, 0, self.width, self.height)
        self.associated = engine.about.associated
        self._engine = engine

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._engine.close()

    def level_for(self, mpp: float) -> int:
        """Index of the coarsest level that is not coarser than ``mpp`` (um/px); else 0."""
        asked = mpp / self.mpp * _LEVEL_ROUNDING
        return max(
            (i for i, level in enumerate(self.levels) if level.downsample <= asked),
            key=lambda i: self.levels[i].downsample,
            default=0,
        )

    def read(
        self, x: float, y: float, width: int, height: int, mpp: float, *, scaled: bool = False
    ) -> Pixels:
        """Read a region at a resolution.

        Parameters
        ----------
        x, y : float
            Top-left corner, level-0 px; fractions count.
        width, height : int
            Of the result, px at ``mpp``.
        mpp : float
            um/px of the result.
        scaled : bool
            Let the decoder shrink where the format allows (tiled JPEG, by 2, 4 or 8): faster,
            and nearly but not exactly area means.

        Returns
        -------
        uint8 (height, width, 3)
            Area means of the nearest finer level, each over exactly the area of the output
            pixel; linear interpolation where the slide has nothing as fine. White outside.

        Raises
        ------
        SlideError
            A part of the region cannot be decoded.
        """
        level = self.level_for(mpp)
        factor = self.levels[level].downsample
        shrink = self._shrink(level, mpp / self.mpp / factor) if scaled else 1
        factor *= shrink
        left, scale = settle(x / factor, mpp / self.mpp / factor)
        top, _ = settle(y / factor, mpp / self.mpp / factor)
        rows = max(1, int(_SOURCE_PIXELS / (width * scale * scale + 1)))
        bands = [
            self._read(
                level,
                shrink,
                (left, top + start * scale),
                scale,
                (width, min(rows, height - start)),
            )
            for start in range(0, height, rows)
        ]
        return bands[0] if len(bands) == 1 else np.concatenate(bands)

    def _shrink(self, level: int, scale: float) -> int:
        """How much the decoder may take of a scale: all of it, or so much that at least two
        of its px are averaged; anything between would blur."""
        shrinks = self._engine.shrinks(level)
        return max(s for s in shrinks if s == 1 or s <= scale / 2 or settle(0, scale / s)[1] == 1)

    def _read(
        self,
        level: int,
        shrink: int,
        start: tuple[float, float],
        scale: float,
        size: tuple[int, int],
    ) -> Pixels:
        """Resample from a level shrunk by the decoder; ``start`` (x, y) and ``scale`` in its px."""
        margin = 1 if scale < 1 else 0  # interpolation looks half a pixel further
        (left, top), (width, height) = start, size
        x0, y0 = math.floor(left) - margin, math.floor(top) - margin
        x1 = math.ceil(left + width * scale) + margin
        y1 = math.ceil(top + height * scale) + margin
        source = self._padded(level, x0, y0, x1 - x0, y1 - y0, shrink)
        return resample(source, (left - x0, top - y0), scale, (width, height))

    def _padded(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        """A region in px of the shrunk level that may reach outside, where it is white."""
        size = self.levels[level]
        x0, x1 = max(x, 0), min(x + width, size.width // shrink)
        y0, y1 = max(y, 0), min(y + height, size.height // shrink)
        if x0 >= x1 or y0 >= y1:
            return np.full((height, width, 3), 255, np.uint8)
        with naming(self.path):
            inside = self._engine.region(level, x0, y0, x1 - x0, y1 - y0, shrink)
        if inside.shape[:2] == (height, width):
            return inside
        padded = np.full((height, width, 3), 255, np.uint8)
        padded[y0 - y : y1 - y, x0 - x : x1 - x] = inside
        return padded

    def thumbnail(self, side: int) -> Pixels:
        """The whole slide with its longest side at most ``side`` px, uint8 (H, W, 3).

        Pixels of the scan itself: label and macro images, which can name a patient, are never
        read.
        """
        factor = max(self.width, self.height) / side
        if factor <= 1:
            return self.read(0, 0, self.width, self.height, self.mpp)
        size = [max(1, round(length / factor)) for length in (self.width, self.height)]
        return self.read(0, 0, size[0], size[1], self.mpp * factor)

    def _probe(self) -> None:
        """Decode a few places of the coarsest level, so that a slide that opens also reads."""
        index = len(self.levels) - 1
        level = self.levels[index]
        dark, failure = True, None
        for across, down in ((0.5, 0.5), (0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)):
            x = max(0, int(level.width * across) - _PROBE // 2)
            y = max(0, int(level.height * down) - _PROBE // 2)
            try:
                pixels = self._padded(
                    index, x, y, min(_PROBE, level.width - x), min(_PROBE, level.height - y)
                )
            except SlideError as error:
                failure = error
                continue
            # light passes glass and tissue: only fluorescence is black with single colours lit
            dark = dark and bool(np.median(pixels) < 16 and pixels.min(axis=2).max() < 128)
            if not dark:
                return
        if failure is not None:
            raise failure
        raise SlideError(
            self.path,
            "black wherever it was looked at: not a brightfield scan",
            BRIGHTFIELD_REMEDY,
        )


def open_slide(path: Path, *, mpp: float | None = None, engine: EngineName | None = None) -> Slide:
    """Open a slide.

    Parameters
    ----------
    path : Path
        SVS, TIFF, OME-TIFF, NDPI, MIRAX, SCN, Philips TIFF, BIF, DICOM, PNG or JPEG.
    mpp : float, optional
        um/px at level 0; overrides the file's.
    engine : str, optional
        Library to read it with; default: the one for its format.

    Raises
    ------
    SlideError
        The file is missing, damaged, cut short, of unknown format, not brightfield, or its
        um/px is unknown or impossible.
    """
    path = Path(path)
    opened, reason = open_engine(path, engine)
    try:
        slide = Slide(path, opened, reason, *settle_mpp(path, mpp, opened.about))
        check_size(path, slide.width, slide.height, slide.mpp)
        slide._probe()
    except SlideError:
        opened.close()
        raise
    return slide

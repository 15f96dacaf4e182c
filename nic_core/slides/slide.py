"""Open slides, and read any region at any resolution."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Self

import numpy as np

from nic_core.slides.engines import (
    Engine,
    EngineName,
    OpenedEngine,
    as_slide_error,
    open_engine,
)
from nic_core.slides.errors import SlideError
from nic_core.slides.files import SlideFiles, files_of_slide
from nic_core.slides.icc import describe_profile, srgb_conversion
from nic_core.slides.metadata import BRIGHTFIELD_REMEDY, check_physical_size, resolve_mpp
from nic_core.slides.remote import SlidePath, slide_path
from nic_core.slides.resample import resample, snap_to_whole
from nic_core.types import Colours, Pixels

# Limit of source pixels in memory; larger reads are done in bands of rows. Thumbnails of slides
# without a pyramid need it.
_SOURCE_PIXELS = 1 << 24
# A level this much coarser than requested is still used, since files round sizes and um/px.
_LEVEL_ROUNDING = 1.01
_SAMPLE = 64  # px a side of the regions that are read when a slide is opened


class Slide:
    """A whole-slide image, opened by :func:`open_slide`.

    A slide is a context manager. Threads may share it.

    Attributes
    ----------
    path : Path or RemotePath
    engine, engine_reason : str
        Library that decodes the file (``tifffile``, ``openslide``, ``libvips``, ``zarr``,
        ``czi``), and why.
    width, height : int
        Level-0 px.
    mpp : float
        um/px at level 0.
    mpp_source : str
        Source of ``mpp``: the slide table, a field of the file, or the objective power.
    objective_power : float or None
    bounds : (x, y, width, height)
        Scanned area, level-0 px; the whole slide if the file does not state it.
    associated : tuple of str
        Names of the label, macro and thumbnail images in the file. They are never read.
    image : int
        Number of the image that is read; 0 if the file has one scan.
    images : tuple of ImageInfo
        All images of a TIFF whose tags describe them; empty for other formats.
    icc_profile : IccProfile or None
        ICC profile that the file states.
    scanner : str or None
        Maker and model or number of the scanner; None if the file does not state them.
    colours : {"stored", "srgb"}
        Whether pixels are as stored, or converted to sRGB by this profile.
    levels : tuple of Level
        Resolutions of the pyramid, finest first.
    """

    def __init__(
        self, path: SlidePath, opened: OpenedEngine, mpp: float, mpp_source: str, colours: Colours
    ) -> None:
        engine = opened.engine
        self.path = path
        self.engine, self.engine_reason = engine.name, opened.reason
        self.image, self.images = opened.image, opened.images
        self.levels = engine.levels
        self.width, self.height = engine.levels[0].width, engine.levels[0].height
        self.mpp, self.mpp_source = mpp, mpp_source
        self.objective_power = engine.metadata.objective_power
        self.bounds = engine.metadata.bounds or (0, 0, self.width, self.height)
        self.associated = engine.metadata.associated
        stored = engine.metadata.icc_profile
        self.icc_profile = describe_profile(stored) if stored else None
        self.scanner = engine.metadata.scanner
        self.colours = colours
        self._convert = srgb_conversion(path, stored) if stored and colours == "srgb" else None
        self._opened, self._engine = opened, engine

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
        """Close the file."""
        self._opened.close()

    def level_for(self, mpp: float) -> int:
        """Return the index of the coarsest level that is at least as fine as ``mpp``; else 0.

        Parameters
        ----------
        mpp : float
            um/px. Files round sizes and um/px, so a level that is 1 % coarser counts as well.
        """
        limit = mpp / self.mpp * _LEVEL_ROUNDING
        return max(
            (i for i, level in enumerate(self.levels) if level.downsample <= limit),
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
            Top-left corner, level-0 px; may be fractional or outside the slide.
        width, height : int
            Size of the result, px at ``mpp``.
        mpp : float
            um/px of the result.
        scaled : bool
            Let the decoder shrink the image where the format allows it (tiled JPEG, by 2, 4 or
            8). This is faster, and close to area means but not equal to them.

        Returns
        -------
        uint8 (height, width, 3)
            Each pixel is the mean of exactly the area it covers in the nearest finer level.
            Where the slide has no finer level, pixels are linearly interpolated. Pixels outside
            the slide are white.

        Raises
        ------
        SlideError
            A part of the region cannot be decoded.
        """
        level = self.level_for(mpp)
        factor = self.levels[level].downsample
        shrink = self._shrink(level, mpp / self.mpp / factor) if scaled else 1
        factor *= shrink
        left, scale = snap_to_whole(x / factor, mpp / self.mpp / factor)
        top, _ = snap_to_whole(y / factor, mpp / self.mpp / factor)
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
        """The factor by which the decoder shrinks a level before it is resampled by ``scale``.

        Either the whole scale, or at most half of it, so that an output pixel averages two decoded
        pixels or more a side. Resampling decoded pixels by a factor between 1 and 2 would blur.
        """
        factors = self._engine.shrink_factors(level)
        return max(
            s for s in factors if s == 1 or s <= scale / 2 or snap_to_whole(0, scale / s)[1] == 1
        )

    def _read(
        self,
        level: int,
        shrink: int,
        start: tuple[float, float],
        scale: float,
        size: tuple[int, int],
    ) -> Pixels:
        """Resample from a level shrunk by the decoder; ``start`` (x, y) and ``scale`` in its px."""
        margin = 1 if scale < 1 else 0  # interpolation needs half a pixel more
        (left, top), (width, height) = start, size
        x0, y0 = math.floor(left) - margin, math.floor(top) - margin
        x1 = math.ceil(left + width * scale) + margin
        y1 = math.ceil(top + height * scale) + margin
        source = self._padded(level, x0, y0, x1 - x0, y1 - y0, shrink)
        return resample(source, (left - x0, top - y0), scale, (width, height))

    def _padded(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        """Read a region in px of the shrunk level; white outside the level."""
        size = self.levels[level]
        x0, x1 = max(x, 0), min(x + width, size.width // shrink)
        y0, y1 = max(y, 0), min(y + height, size.height // shrink)
        if x0 >= x1 or y0 >= y1:
            return np.full((height, width, 3), 255, np.uint8)
        with as_slide_error(self.path):
            inside = self._engine.read_region(level, x0, y0, x1 - x0, y1 - y0, shrink)
        if self._convert is not None:
            inside = self._convert(inside)
        if inside.shape[:2] == (height, width):
            return inside
        padded = np.full((height, width, 3), 255, np.uint8)
        padded[y0 - y : y1 - y, x0 - x : x1 - x] = inside
        return padded

    def thumbnail(self, side: int) -> Pixels:
        """Read the whole slide with its longest side at most ``side`` px.

        The pixels come from the scan. Label and macro images, which may show a patient's name,
        are never read.

        Returns
        -------
        uint8 (H, W, 3)

        Raises
        ------
        SlideError
            A part of the slide cannot be decoded.
        """
        factor = max(self.width, self.height) / side
        if factor <= 1:
            return self.read(0, 0, self.width, self.height, self.mpp)
        size = [max(1, round(length / factor)) for length in (self.width, self.height)]
        return self.read(0, 0, size[0], size[1], self.mpp * factor)


def open_slide(
    path: str | SlidePath,
    *,
    mpp: float | None = None,
    image: int | None = None,
    engine: EngineName | None = None,
    colours: Colours = "stored",
) -> Slide:
    """Open a slide.

    Parameters
    ----------
    path : str, Path or RemotePath
        File, or address in an object store (``s3://bucket/slide.svs``, ``https://host/slide.svs``;
        :mod:`nic_core.slides.remote`).
        SVS, TIFF, OME-TIFF, NDPI, MIRAX, SCN, Philips TIFF, BIF, DICOM, OME-Zarr, CZI, PNG or
        JPEG. Any file of a slide that has several (:mod:`nic_core.slides.files`).
    mpp : float, optional
        um/px at level 0; overrides that of the file.
    image : int, optional
        Number of the image in a TIFF with several. Default: the largest brightfield scan
        (:mod:`nic_core.slides.images`).
    engine : {"tifffile", "openslide", "libvips", "zarr", "czi"}, optional
        Library that reads the file; default: see :mod:`nic_core.slides.engines`.
    colours : {"stored", "srgb"}
        ``srgb`` converts pixels by the file's ICC profile (:mod:`nic_core.slides.icc`). Pixels of a
        file without a profile are sRGB by convention and remain as stored.

    Raises
    ------
    SlideError
        The file is missing, damaged, truncated, of an unknown format or not brightfield, it has no
        such image, the engine does not read it, its um/px is unknown or impossible, or its ICC
        profile is asked for and cannot be applied.
    RemoteError
        The server of a remote slide does not answer, or denies the access.
    """
    found = files_of_slide(slide_path(path))
    if isinstance(found, SlideFiles) and found.problem is not None:
        raise found.problem
    path = found.path
    opened = open_engine(path, engine, image)
    try:
        if _is_dark(path, opened.engine):
            opened = _next_bright(path, opened, engine)
        slide = Slide(path, opened, *resolve_mpp(path, mpp, opened.engine.metadata), colours)
        check_physical_size(path, slide.width, slide.height, slide.mpp)
    except SlideError:
        opened.close()
        raise
    return slide


def _next_bright(path: SlidePath, dark: OpenedEngine, engine: EngineName | None) -> OpenedEngine:
    """Open the largest image after a dark one that is not dark itself."""
    for number in dark.alternatives:
        other = open_engine(path, engine, number)
        try:
            if not _is_dark(path, other.engine):
                dark.close()
                return other
        except SlideError:
            other.close()
            raise
        other.close()
    raise SlideError(
        path, "black in all sampled regions: not a brightfield scan", BRIGHTFIELD_REMEDY
    )


def _is_dark(path: SlidePath, engine: Engine) -> bool:
    """Decode a few regions of the coarsest level; true if all are as dark as fluorescence.

    An error is raised when the slide is opened, not after hours of work on others.

    Raises
    ------
    SlideError
        No sampled region is bright, and one of them cannot be decoded.
    """
    index = len(engine.levels) - 1
    level = engine.levels[index]
    failure = None
    for across, down in ((0.5, 0.5), (0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)):
        x = max(0, int(level.width * across) - _SAMPLE // 2)
        y = max(0, int(level.height * down) - _SAMPLE // 2)
        size = min(_SAMPLE, level.width - x), min(_SAMPLE, level.height - y)
        try:
            with as_slide_error(path):
                pixels = engine.read_region(index, x, y, *size)
        except SlideError as error:
            failure = error
            continue
        # glass and tissue transmit light; fluorescence is black with a signal in one channel
        if not (np.median(pixels) < 16 and pixels.min(axis=2).max() < 128):
            return False
    if failure is not None:
        raise failure
    return True

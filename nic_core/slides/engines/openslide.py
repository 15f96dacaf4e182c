"""OpenSlide: vendor formats."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from nic_core.slides.dicom import check_dicom
from nic_core.slides.engines.base import (
    EngineName,
    Level,
    ReadError,
    downsample,
    flatten_on_white,
)
from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import CONVERT_REMEDY, DAMAGED_REMEDY, openslide_metadata
from nic_core.slides.tiff import TiffInfo
from nic_core.types import Pixels

UNKNOWN_FORMAT_REMEDY = (
    "give a whole-slide image (SVS, TIFF, NDPI, MIRAX, SCN, DICOM, CZI, OME-Zarr), a PNG or a JPEG"
)


class OpenSlideEngine:
    """Engine for vendor formats.

    Parameters
    ----------
    path : Path
    tiff : TiffInfo or None
        None if the file is not a TIFF.

    Raises
    ------
    SlideError
        OpenSlide does not know the format, or the slide is damaged or incomplete.
    """

    name: EngineName = "openslide"

    def __init__(self, path: Path, tiff: TiffInfo | None) -> None:
        self._path = path
        self._slide = _open(path, tiff)
        self._lock = threading.Lock()
        self._factors = self._slide.level_downsamples
        sizes = self._slide.level_dimensions
        # a whole factor is stated by the format; any other is OpenSlide's ratio of rounded sizes
        self.levels = tuple(
            Level(
                w,
                h,
                factor if factor == round(factor) else downsample(*sizes[0], w, h),
                _tile_size(self._slide.properties, number),
            )
            for number, ((w, h), factor) in enumerate(zip(sizes, self._factors, strict=True))
        )
        if tiff is not None and tiff.images:
            _check_same_image(path, tiff, sizes[0])
            self.metadata = tiff.metadata
        else:
            self.metadata = openslide_metadata(
                self._slide.properties,
                self._slide.associated_images,
                _icc_profile(path, self._slide),
            )

    def shrink_factors(self, level: int) -> tuple[int, ...]:
        return (1,)

    def read_region(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        factor = self._factors[level]
        region = (round(x * factor), round(y * factor)), level, (width, height)
        slide = self._slide
        try:
            image = slide.read_region(*region)
        except openslide.OpenSlideError:
            # after an error a handle fails every read, also those of other threads
            self._replace_handle(slide)
            image = self._read_with_new_handle(*region)
        # areas that were not scanned are transparent; Python's OpenSlide returns straight alpha
        return flatten_on_white(np.asarray(image))

    def _read_with_new_handle(
        self, corner: tuple[int, int], level: int, size: tuple[int, int]
    ) -> Image.Image:
        """Read with a handle that no other read uses, so that an error belongs to this region."""
        try:
            with openslide.OpenSlide(self._path) as slide:
                return slide.read_region(corner, level, size)
        except openslide.OpenSlideError as error:
            raise ReadError(str(error)) from error

    def _replace_handle(self, failed: openslide.OpenSlide) -> None:
        with self._lock:
            if self._slide is failed:
                # the failed handle is kept if the file no longer exists or was truncated
                with contextlib.suppress(openslide.OpenSlideError):
                    self._slide = openslide.OpenSlide(self._path)

    def close(self) -> None:
        self._slide.close()


def _open(path: Path, tiff: TiffInfo | None) -> openslide.OpenSlide:
    check_dicom(path)
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        if tiff is None:
            reason = "not an image of a known format"
            raise SlideError(path, reason, UNKNOWN_FORMAT_REMEDY) from error
        kind = tiff.openslide_reason or "plain tiles"
        reason = f"a TIFF that OpenSlide does not support ({kind})"
        raise SlideError(path, reason, CONVERT_REMEDY) from error
    except openslide.OpenSlideError as error:
        remedy = f"{DAMAGED_REMEDY}, or {CONVERT_REMEDY}"
        raise SlideError(path, f"OpenSlide cannot open it: {error}", remedy) from error


def _icc_profile(path: Path, slide: openslide.OpenSlide) -> bytes | None:
    """The ICC profile as stored; OpenSlide attaches it to any region, also to an empty one."""
    try:
        return slide.read_region((0, 0), 0, (0, 0)).info.get("icc_profile")
    except openslide.OpenSlideError as error:
        reason = f"OpenSlide cannot read its ICC profile: {error}"
        raise SlideError(path, reason, DAMAGED_REMEDY) from error


def _check_same_image(path: Path, tiff: TiffInfo, size: tuple[int, int]) -> None:
    """Refuse a TIFF of which OpenSlide may read another image than the chosen one."""
    chosen = next(image for image in tiff.scans if image.number == tiff.image)
    if len(tiff.scans) > 1 or size != (chosen.width, chosen.height):
        reason = f"OpenSlide reads one image of a TIFF, which may not be image {chosen.number}"
        if tiff.openslide_reason:
            remedy = f"save this image alone, or {CONVERT_REMEDY}"
            raise SlideError(path, f"{reason} ({tiff.openslide_reason})", remedy)
        raise SlideError(path, reason, "do not choose an engine")


def _tile_size(properties: Mapping[str, str], level: int) -> tuple[int, int] | None:
    sides = [
        properties.get(f"openslide.level[{level}].tile-{side}") for side in ("width", "height")
    ]
    return (int(sides[0]), int(sides[1])) if sides[0] and sides[1] else None

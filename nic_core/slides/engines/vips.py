"""libvips: PNG and JPEG; on request TIFF and vendor formats."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile

from nic_core.libvips import pyvips
from nic_core.slides.engines.base import (
    EngineName,
    ReadError,
    flatten_on_white,
    pyramid_levels,
)
from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import (
    BRIGHTFIELD_REMEDY,
    COLOUR_REMEDY,
    CONVERT_REMEDY,
    DAMAGED_REMEDY,
    UPRIGHT_REMEDY,
    FileMetadata,
    openslide_metadata,
)
from nic_core.slides.tiff import SEPARATE, TiffInfo, level_pages, open_tiff, tile_size
from nic_core.types import Pixels

# bypass libvips' cache of loaded files: it may hold black tiles, or an older version of the file
_NO_CACHE = {"revalidate": True} if pyvips.at_least_libvips(8, 15) else {}
if not _NO_CACHE:
    pyvips.cache_set_max(0)
_OpenImage = Callable[[], pyvips.Image]


class VipsEngine:
    """Engine for PNG and JPEG; on request for TIFF, and for vendor formats if built with OpenSlide.

    Each thread opens its own images, and opens them again after an error: libvips reports an
    undecodable tile once and returns black pixels for it from then on.

    Parameters
    ----------
    path : Path
    images : list of callable
        Open the image of each level, finest first.
    tiles : list of (int, int)
        Width and height of each level's tiles, px; empty if unknown.
    metadata : FileMetadata
    """

    name: EngineName = "libvips"

    def __init__(
        self,
        path: Path,
        images: list[_OpenImage],
        tiles: list[tuple[int, int]],
        metadata: FileMetadata,
    ) -> None:
        self._path, self._images, self.metadata = path, images, metadata
        self._per_thread = threading.local()
        try:
            opened = [image() for image in images]
        except pyvips.Error as error:
            raise SlideError(path, f"libvips cannot open it: {error}", DAMAGED_REMEDY) from error
        _check_pixels(path, opened[0])
        self.levels = pyramid_levels([(image.width, image.height) for image in opened], tiles)

    @classmethod
    def plain(cls, path: Path) -> VipsEngine:
        """Open a PNG or JPEG and hold it in memory. Its dpi is for printing and is ignored."""
        try:
            image = pyvips.Image.new_from_file(str(path), fail_on="warning", **_NO_CACHE)
            image = image.copy_memory()
        except pyvips.Error as error:
            raise SlideError(
                path, f"libvips cannot decode it: {error}", f"{DAMAGED_REMEDY}, or {CONVERT_REMEDY}"
            ) from error
        return cls(path, [lambda: image], [], FileMetadata(icc_profile=_icc_profile(image)))

    @classmethod
    def tiff(cls, path: Path, info: TiffInfo) -> VipsEngine:
        """Open a TIFF whose tags describe the tiles completely."""
        with open_tiff(path) as tiff:
            pages = level_pages(tiff, info)
            if any(page.is_tiled and page.planarconfig == SEPARATE for page in pages):
                raise SlideError(
                    path,
                    "libvips does not read tiles of separate colour planes",
                    "do not choose an engine",
                )
            if any(_is_mistagged(page) for page in pages):
                raise SlideError(
                    path,
                    "its JPEG tiles are YCbCr but tagged RGB: libvips would return false colours",
                    "do not choose an engine",
                )
            tiles = [tile_size(page) for page in pages]

        def image(page: int, subifd: int) -> _OpenImage:
            return lambda: pyvips.Image.tiffload(
                str(path), page=page, subifd=subifd, fail_on="warning", **_NO_CACHE
            )

        return cls(path, [image(*place) for place in info.levels], tiles, info.metadata)

    @staticmethod
    def has_openslide() -> bool:
        """Whether libvips was built with OpenSlide."""
        return bool(pyvips.type_find("VipsForeignLoad", "openslideload"))

    @classmethod
    def vendor(cls, path: Path) -> VipsEngine:
        """Open a vendor format, if :meth:`has_openslide`."""

        def image(level: int) -> _OpenImage:
            return lambda: pyvips.Image.openslideload(str(path), level=level, **_NO_CACHE)

        try:
            level_0 = image(0)()
        except pyvips.Error as error:
            raise SlideError(path, f"libvips cannot open it: {error}", DAMAGED_REMEDY) from error
        fields = {name: str(level_0.get(name)) for name in level_0.get_fields()}
        associated = fields.get("slide-associated-images", "").split(", ")
        metadata = openslide_metadata(
            fields, [name for name in associated if name], _icc_profile(level_0)
        )
        count = int(fields["openslide.level-count"])
        return cls(path, [image(level) for level in range(count)], [], metadata)

    def shrink_factors(self, level: int) -> tuple[int, ...]:
        return (1,)

    def read_region(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        regions: dict[int, pyvips.Region] = self._per_thread.__dict__.setdefault("regions", {})
        try:
            if level not in regions:
                regions[level] = pyvips.Region.new(_to_rgb(self._images[level]()))
            data = regions[level].fetch(x, y, width, height)
        except pyvips.Error as error:
            regions.pop(level, None)
            raise ReadError(str(error)) from error
        pixels = np.frombuffer(data, np.uint8).reshape(height, width, -1)
        # libvips returns straight alpha
        return flatten_on_white(pixels) if pixels.shape[2] == 4 else pixels

    def close(self) -> None:
        self._images = []
        self._per_thread = threading.local()


def _check_pixels(path: Path, image: pyvips.Image) -> None:
    """Refuse an image that is not 8-bit RGB or RGBA, or not upright."""
    if image.bands < 3 and image.format == "uchar":
        raise SlideError(path, "not an 8-bit RGB image: greyscale", BRIGHTFIELD_REMEDY)
    if image.bands not in (3, 4) or image.format != "uchar" or image.interpretation == "cmyk":
        kind = f"{image.bands} channels of {image.format}, {image.interpretation}"
        raise SlideError(path, f"not an 8-bit RGB image: {kind}", COLOUR_REMEDY)
    orientation = image.get("orientation") if image.get_typeof("orientation") else 1
    if orientation != 1:
        raise SlideError(
            path,
            f"its pixels are stored rotated or mirrored (EXIF orientation {orientation})",
            UPRIGHT_REMEDY,
        )


def _icc_profile(image: pyvips.Image) -> bytes | None:
    name = "icc-profile-data"
    return bytes(image.get(name)) if image.get_typeof(name) else None


def _is_mistagged(page: tifffile.TiffPage) -> bool:
    """Whether a page is tagged RGB and its JPEG tiles are JFIF, whose colours are YCbCr."""
    if (
        page.compression != tifffile.COMPRESSION.JPEG
        or page.photometric != tifffile.PHOTOMETRIC.RGB
    ):
        return False
    stored = (o for o, size in zip(page.dataoffsets, page.databytecounts, strict=True) if size)
    page.parent.filehandle.seek(next(stored, 0))
    return bool(page.parent.filehandle.read(10)[6:] == b"JFIF")


def _to_rgb(image: pyvips.Image) -> pyvips.Image:
    return image if image.interpretation in ("srgb", "rgb") else image.colourspace("srgb")

"""libvips: PNG and JPEG; TIFF and vendors' formats on request."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyvips
import tifffile

from nic_core.slides.engines.base import EngineName, ReadError, pyramid_levels
from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import BRIGHTFIELD_REMEDY, DAMAGED_REMEDY, About, openslide_about
from nic_core.slides.tiff import TiffScan, open_tiff, tile_size
from nic_core.types import Pixels

# libvips would give back what it loaded before, with its black tiles or from an older file
_ANEW = {"revalidate": True} if pyvips.at_least_libvips(8, 15) else {}
if not _ANEW:
    pyvips.cache_set_max(0)
_VipsImage = Callable[[], pyvips.Image]  # opens it anew


class VipsEngine:
    """libvips: PNG and JPEG; on request TIFF, and vendors' formats where it has OpenSlide.

    Every thread has images of its own, and new ones after an error: libvips reports an
    undecodable tile once, keeps black in its place, and gives that to whoever comes next.
    """

    name: EngineName = "libvips"

    def __init__(
        self, path: Path, images: list[_VipsImage], tiles: list[tuple[int, int]], about: About
    ) -> None:
        self._path, self._images, self.about = path, images, about
        self._own = threading.local()
        try:
            opened = [image() for image in images]
        except pyvips.Error as error:
            raise SlideError(path, f"libvips cannot open it: {error}", DAMAGED_REMEDY) from error
        if opened[0].bands < 3 or opened[0].format != "uchar" or opened[0].interpretation == "cmyk":
            kind = f"{opened[0].bands} bands of {opened[0].format}, {opened[0].interpretation}"
            raise SlideError(path, f"not an 8-bit RGB image: {kind}", BRIGHTFIELD_REMEDY)
        self.levels = pyramid_levels([(image.width, image.height) for image in opened], tiles)

    @classmethod
    def plain(cls, path: Path) -> VipsEngine:
        """A PNG or JPEG, whole in memory. Its dpi is that of a print: no um/px."""
        try:
            image = pyvips.Image.new_from_file(str(path), fail_on="warning", **_ANEW)
            image = image.copy_memory()
        except pyvips.Error as error:
            raise SlideError(path, f"damaged: {error}", DAMAGED_REMEDY) from error
        return cls(path, [lambda: image], [], About())

    @classmethod
    def tiff(cls, path: Path, scan: TiffScan) -> VipsEngine:
        """A TIFF without a dialect."""
        with open_tiff(path) as tiff:
            pages = [level.keyframe for level in tiff.series[scan.series].levels]
            if any(_mistagged(page) for page in pages):
                raise SlideError(
                    path,
                    "its JPEG tiles are YCbCr but tagged RGB: libvips would give false colours",
                    "leave the engine open",
                )
            # libvips counts a page's sub-directories, tifffile names their places in the file
            known = {page.offset: (number, -1) for number, page in enumerate(tiff.pages)}
            number, _ = known[pages[0].offset]
            known |= {at: (number, sub) for sub, at in enumerate(pages[0].subifds or ())}
            places = [known[page.offset] for page in pages]
            tiles = [tile_size(page) for page in pages]

        def image(page: int, subifd: int) -> _VipsImage:
            return lambda: pyvips.Image.tiffload(
                str(path), page=page, subifd=subifd, fail_on="warning", **_ANEW
            )

        return cls(path, [image(*place) for place in places], tiles, scan.about)

    @classmethod
    def vendor(cls, path: Path) -> VipsEngine:
        """A vendor's format, by the OpenSlide within libvips."""

        def image(level: int) -> _VipsImage:
            return lambda: pyvips.Image.openslideload(str(path), level=level, **_ANEW)

        try:
            whole = image(0)()
        except pyvips.Error as error:
            raise SlideError(path, f"libvips cannot open it: {error}", DAMAGED_REMEDY) from error
        fields = {name: str(whole.get(name)) for name in whole.get_fields()}
        pictures = fields.get("slide-associated-images", "").split(", ")
        about = openslide_about(fields, [name for name in pictures if name])
        count = int(fields["openslide.level-count"])
        return cls(path, [image(level) for level in range(count)], [], about)

    def shrinks(self, level: int) -> tuple[int, ...]:
        return (1,)

    def region(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        own: dict[int, pyvips.Region] = self._own.__dict__.setdefault("regions", {})
        try:
            if level not in own:
                own[level] = pyvips.Region.new(_rgb(self._images[level]()))
            data = own[level].fetch(x, y, width, height)
        except pyvips.Error as error:
            own.pop(level, None)
            raise ReadError(str(error)) from error
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)

    def close(self) -> None:
        self._images = []
        self._own = threading.local()


def _mistagged(page: tifffile.TiffPage) -> bool:
    """Whether JPEG tiles are JFIF, whose colours are YCbCr, and the page says RGB."""
    if (
        page.compression != tifffile.COMPRESSION.JPEG
        or page.photometric != tifffile.PHOTOMETRIC.RGB
    ):
        return False
    stored = (o for o, size in zip(page.dataoffsets, page.databytecounts, strict=True) if size)
    page.parent.filehandle.seek(next(stored, 0))
    return bool(page.parent.filehandle.read(10)[6:] == b"JFIF")


def _rgb(image: pyvips.Image) -> pyvips.Image:
    if image.interpretation not in ("srgb", "rgb"):
        image = image.colourspace("srgb")
    return image.flatten(background=255) if image.hasalpha() else image

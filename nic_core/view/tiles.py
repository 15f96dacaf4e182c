"""Tiles of slides for deep zoom, and thumbnails, as JPEG."""

from __future__ import annotations

import math

import numpy as np
import simplejpeg
from PIL import Image

from nic_core.pictures import read_picture
from nic_core.steps.slides import THUMBNAIL
from nic_core.store import Store
from nic_core.types import Pixels
from nic_core.view.cache import AnswerCache, file_version
from nic_core.view.errors import ViewError
from nic_core.view.slides import OpenedSlide

TILE = 256  # px a side
QUALITY = 85  # of JPEG, in percent [choice]


def min_zoom(width: int, height: int) -> int:
    """Return the zoom at which a slide of this size, level-0 px, fits into one tile."""
    return -max(0, math.ceil(math.log2(max(width, height) / TILE)))


def read_tile(
    answers: AnswerCache, store: Store, opened: OpenedSlide, zoom: int, column: int, row: int
) -> bytes:
    """Return a tile of a slide as JPEG.

    Parameters
    ----------
    answers : AnswerCache
        Holds the tiles that were read last.
    zoom : int
        log2 of px of the tile per level-0 px; 0 is full resolution, :func:`min_zoom` the last.
    column, row : int
        A tile covers ``TILE * 2**-zoom`` level-0 px a side; white outside the slide.

    Raises
    ------
    ViewError
        404: the slide has no such tile.
    SlideError
        It cannot be decoded.
    """
    key = (opened.version, zoom, column, row)
    found = answers.get(key)
    if found is not None:
        return found
    slide = opened.slide
    lowest = min_zoom(slide.width, slide.height)
    factor = 2**-zoom if lowest <= zoom <= 0 else 0
    side = TILE * factor
    if not (factor and 0 <= column * side < slide.width and 0 <= row * side < slide.height):
        raise ViewError(404, f"slide '{opened.id}' has no such tile", f"its zoom is {lowest} to 0")
    jpeg = encode_jpeg(opened.read(store, column * side, row * side, TILE, factor))
    answers.put(key, jpeg)
    return jpeg


def read_thumbnail(answers: AnswerCache, store: Store, slide: str, side: int) -> bytes:
    """Return the stored thumbnail of a slide as JPEG, its longest side at most ``side`` px.

    Raises
    ------
    ViewError
        404: there is none.
    """
    path = store.slide(slide) / THUMBNAIL
    try:
        key = ("thumbnail", slide, side, *file_version(path))
        found = answers.get(key)
        if found is not None:
            return found
        image = Image.fromarray(read_picture(path))
    except OSError as error:
        reason = f"slide '{slide}' has no thumbnail that can be read"
        raise ViewError(404, reason, "materialize 'slide' again") from error
    image.thumbnail((side, side), Image.Resampling.BOX)
    jpeg = encode_jpeg(np.ascontiguousarray(image))
    answers.put(key, jpeg)
    return jpeg


def encode_jpeg(pixels: Pixels) -> bytes:
    """Encode uint8 (H, W, 3) as JPEG."""
    return bytes(simplejpeg.encode_jpeg(pixels, quality=QUALITY, colorsubsampling="420"))

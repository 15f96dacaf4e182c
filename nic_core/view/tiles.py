"""Tiles of slides for deep zoom, and thumbnails, as JPEG."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from nic_core.cohort.index import row_source
from nic_core.pictures import read_picture
from nic_core.slides import Slide, SlideError, open_source
from nic_core.steps.slides import THUMBNAIL
from nic_core.types import Pixels
from nic_core.view.cache import AnswerCache
from nic_core.view.errors import ViewError, without_paths
from nic_core.view.study import ViewedStudy

TILE = 256  # px a side
QUALITY = 85  # of JPEG, in percent
_OPEN_SLIDES = 8
_CACHE_BYTES = 256 << 20


@dataclass
class _Opened:
    slide: Slide
    users: int = 0
    dropped: bool = False


class Tiles:
    """Reads tiles; holds a few open slides and the last tiles. Threads may share it."""

    def __init__(self, study: ViewedStudy) -> None:
        self._study = study
        self.answers = AnswerCache(_CACHE_BYTES)
        self._open: OrderedDict[tuple[object, ...], _Opened] = OrderedDict()
        self._lock = threading.Lock()

    def tile(self, slide: str, zoom: int, column: int, row: int) -> bytes:
        """Return a tile of a slide as JPEG.

        Parameters
        ----------
        zoom : int
            log2 of px of the tile per level-0 px; 0 is full resolution, :func:`min_zoom` shows the
            whole slide in one tile.
        column, row : int
            A tile covers ``TILE * 2**-zoom`` level-0 px a side.

        Raises
        ------
        ViewError
            404: the slide has no such tile; 410: its file vanished; 422: it cannot be decoded.
        """
        with self.opened(slide) as (opened, version):
            key = (version, zoom, column, row)
            found = self.answers.get(key)
            if found is not None:
                return found
            lowest = min_zoom(opened.width, opened.height)
            side = TILE * 2.0**-zoom if lowest <= zoom <= 0 else 0
            if not (side and 0 <= column * side < opened.width and 0 <= row * side < opened.height):
                raise ViewError(
                    404, f"slide '{slide}' has no such tile", f"zoom is {lowest} to 0 here"
                )
            mpp = opened.mpp * 2.0**-zoom
            try:
                pixels = opened.read(column * side, row * side, TILE, TILE, mpp, scaled=True)
            except SlideError as error:
                raise _unreadable(slide, error) from error
        jpeg = encode_jpeg(pixels)
        self.answers.put(key, jpeg)
        return jpeg

    @contextmanager
    def opened(self, slide: str) -> Iterator[tuple[Slide, tuple[object, ...]]]:
        """Open a slide, or share the opened one; the second value changes with its file.

        Raises
        ------
        ViewError
            404: the study has no such slide; 410: its file vanished; 422: it cannot be opened.
        """
        row = self._study.row(slide)
        path = Path(row["path"])
        try:
            stat = path.stat()
        except OSError as error:
            raise ViewError(
                410,
                f"the file of slide '{slide}' vanished",
                "restore the file, or materialize 'slide_index' again",
            ) from error
        key = (slide, str(path), row["mpp"], row["image"], stat.st_mtime_ns, stat.st_size)
        with self._lock:
            if key not in self._open:
                try:
                    self._open[key] = _Opened(open_source(row_source(row)))
                except SlideError as error:
                    raise _unreadable(slide, error) from error
            entry = self._open[key]
            self._open.move_to_end(key)
            entry.users += 1
            while len(self._open) > _OPEN_SLIDES:
                _, oldest = self._open.popitem(last=False)
                oldest.dropped = True
                _close_unused(oldest)
        try:
            yield entry.slide, key
        finally:
            with self._lock:
                entry.users -= 1
                _close_unused(entry)

    def thumbnail(self, slide: str, side: int) -> bytes:
        """Return the stored thumbnail of a slide as JPEG, its longest side at most ``side`` px."""
        self._study.row(slide)
        path = self._study.store.slide(slide) / THUMBNAIL
        try:
            stat = path.stat()
            key = ("thumbnail", slide, side, stat.st_mtime_ns)
            found = self.answers.get(key)
            if found is not None:
                return found
            image = Image.fromarray(read_picture(path))
        except OSError as error:
            raise ViewError(
                404, f"slide '{slide}' has no thumbnail yet", "materialize 'slide'"
            ) from error
        image.thumbnail((side, side), Image.Resampling.BOX)
        jpeg = encode_jpeg(np.ascontiguousarray(image))
        self.answers.put(key, jpeg)
        return jpeg


def min_zoom(width: int, height: int) -> int:
    """Return the zoom at which a slide of this size, level-0 px, fits into one tile."""
    return -max(0, math.ceil(math.log2(max(width, height) / TILE)))


def encode_jpeg(pixels: Pixels) -> bytes:
    """Encode uint8 (H, W, 3) as JPEG."""
    return bytes(simplejpeg.encode_jpeg(pixels, quality=QUALITY, colorsubsampling="420"))


def _close_unused(entry: _Opened) -> None:
    if entry.dropped and not entry.users:
        entry.slide.close()


def _unreadable(slide: str, error: SlideError) -> ViewError:
    reason = without_paths(error.reason, [error.slide])
    return ViewError(422, f"slide '{slide}': {reason}", without_paths(error.remedy))

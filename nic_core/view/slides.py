"""Open slides: a few at a time, shared by threads, with reduced images of those without a pyramid.

A tile of a slide that has no level near its resolution would decode a large part of the slide, up
to all of it. Such tiles come from the slide's stored thumbnail where that is fine enough, else from
an overview: the whole slide, reduced once when the first tile needs it. How long tiles take with
and without is in ``docs/reference/view.md``.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from nic_core.cohort import CohortError
from nic_core.cohort.index import row_source
from nic_core.object_stores import RemoteError
from nic_core.parallel import cores
from nic_core.pictures import read_picture
from nic_core.slides import Slide, SlideError, content_identity, open_source
from nic_core.slides.remote import slide_path
from nic_core.slides.resample import resample
from nic_core.steps.slides import THUMBNAIL, read_record
from nic_core.store import Store
from nic_core.types import Pixels
from nic_core.view.cache import file_version
from nic_core.view.errors import TRY_LATER, UNREACHABLE, ViewError, without_paths
from nic_core.view.study import ViewedStudy

DIRECT = 8
"""px of a stored level per px of a tile, a side, up to which tiles are read from the level."""
OVERVIEW_SIDE = 4096  # px: longest side of an overview, of up to 48 MB
_OPEN = 4  # slides
_BAND = 64  # rows of an overview that a thread reads at a time


@dataclass(frozen=True)
class Reduced:
    """A reduced image of a whole slide.

    Attributes
    ----------
    pixels : uint8 (H, W, 3)
    factor : float
        Level-0 px per px, a side, from the slide's top-left corner.
    """

    pixels: Pixels
    factor: float

    def read(self, x: float, y: float, side: int, factor: float) -> Pixels:
        """Read a square region at ``factor`` level-0 px per px; white outside the slide.

        Parameters
        ----------
        x, y : float
            Top-left corner, level-0 px.
        side : int
            px at ``factor``.

        Returns
        -------
        uint8 (side, side, 3)
        """
        left, top, scale = x / self.factor, y / self.factor, factor / self.factor
        x0, y0 = math.floor(left), math.floor(top)
        width, height = math.ceil(left + side * scale) - x0, math.ceil(top + side * scale) - y0
        source = np.full((height, width, 3), 255, np.uint8)
        inside = self.pixels[y0 : y0 + height, x0 : x0 + width]
        source[: inside.shape[0], : inside.shape[1]] = inside
        return resample(source, (left - x0, top - y0), scale, (side, side))


@dataclass
class OpenedSlide:
    """A slide that several threads read.

    Attributes
    ----------
    id : str
    version : tuple
        Differs when the slide's file, um/px or image number changed.
    """

    id: str
    version: tuple[object, ...]
    _slide: Slide | None = None
    _reduced: list[Reduced] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _users: int = 0
    _dropped: bool = False

    @property
    def slide(self) -> Slide:
        """The slide, opened."""
        assert self._slide is not None
        return self._slide

    def read(self, store: Store, x: float, y: float, side: int, factor: float) -> Pixels:
        """Read a square region at ``factor`` level-0 px per px; white outside the slide.

        Parameters
        ----------
        store : Store
            Has the slide's thumbnail.
        x, y : float
            Top-left corner, level-0 px; inside the slide.
        side : int
            px at ``factor``.

        Returns
        -------
        uint8 (side, side, 3)

        Raises
        ------
        SlideError
            A part of the region cannot be decoded.
        """
        slide = self.slide
        level = slide.levels[slide.level_for(slide.mpp * factor)]
        if factor / level.downsample > DIRECT:
            with self._lock:
                found = self._reduced_to(store, factor)
            if found is not None:
                return found.read(x, y, side, factor)
        return slide.read(x, y, side, side, slide.mpp * factor, scaled=True)

    def _reduced_to(self, store: Store, factor: float) -> Reduced | None:
        """Return the smallest reduced image that is at least as fine as ``factor``."""
        if self._reduced is None:
            self._reduced = [*_stored_thumbnail(store, self.id, self.slide)]
        fine = [reduced for reduced in self._reduced if reduced.factor <= factor]
        if not fine and overview_factor(self.slide) <= factor:
            fine = [make_overview(self.slide)]
            self._reduced += fine
        return max(fine, key=lambda reduced: reduced.factor, default=None)


class OpenSlides:
    """The slides that were read last, open. Threads may share it."""

    def __init__(self, study: ViewedStudy) -> None:
        self._study = study
        self._opened: OrderedDict[tuple[object, ...], OpenedSlide] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def get(self, slide: str) -> Iterator[OpenedSlide]:
        """Open a slide of the slide index, or share the open one.

        Raises
        ------
        ViewError
            404: the study has no such slide; 410: its file vanished; 422: it cannot be opened;
            503: its server does not answer.
        """
        row = self._study.row(slide)
        path = slide_path(row["path"])
        try:
            version = (slide, str(path), row["mpp"], row["image"], *file_version(path))
        except RemoteError as error:
            raise ViewError(503, f"slide '{slide}': {UNREACHABLE}", TRY_LATER) from error
        except OSError as error:
            raise ViewError(
                410,
                f"the file of slide '{slide}' vanished",
                "restore the file, or materialize 'slide_index' again",
            ) from error
        with self._lock:
            entry = self._opened.setdefault(version, OpenedSlide(slide, version))
            self._opened.move_to_end(version)
            entry._users += 1
            while len(self._opened) > _OPEN:
                _, oldest = self._opened.popitem(last=False)
                oldest._dropped = True
                _close_unused(oldest)
        try:
            # other slides can be opened meanwhile
            with entry._lock:
                if entry._slide is None:
                    entry._slide = open_source(row_source(row))
            yield entry
        except SlideError as error:
            reason = without_paths(error.reason, [error.slide])
            remedy = without_paths(error.remedy, [error.slide])
            raise ViewError(422, f"slide '{slide}': {reason}", remedy) from error
        except RemoteError as error:  # its message names the server
            raise ViewError(503, f"slide '{slide}': {UNREACHABLE}", TRY_LATER) from error
        finally:
            with self._lock:
                entry._users -= 1
                _close_unused(entry)


def _close_unused(entry: OpenedSlide) -> None:
    if entry._dropped and not entry._users and entry._slide is not None:
        entry._slide.close()


def overview_factor(slide: Slide) -> int:
    """Return the level-0 px per px of a slide's overview: a power of two."""
    longest = max(slide.width, slide.height)
    return 1 << max(0, math.ceil(math.log2(longest / OVERVIEW_SIDE)))


def make_overview(slide: Slide) -> Reduced:
    """Reduce a whole slide, in bands of rows that several threads read.

    Raises
    ------
    SlideError
        A part of the slide cannot be decoded.
    """
    factor = overview_factor(slide)
    width, height = math.ceil(slide.width / factor), math.ceil(slide.height / factor)

    def band(top: int) -> Pixels:
        rows = min(_BAND, height - top)
        return slide.read(0, top * factor, width, rows, slide.mpp * factor, scaled=True)

    with ThreadPoolExecutor(cores()) as threads:
        return Reduced(np.concatenate([*threads.map(band, range(0, height, _BAND))]), factor)


def _stored_thumbnail(store: Store, slide: str, opened: Slide) -> Iterator[Reduced]:
    """Yield the stored thumbnail of a slide, if there is one and it is of the present file."""
    path = store.slide(slide) / THUMBNAIL
    if not path.exists():
        return
    try:
        record = read_record(store, slide)
    except (OSError, CohortError):  # of another version: the overview takes its place
        return
    size = record.width, record.height, record.image, record.mpp
    if size != (opened.width, opened.height, opened.image, opened.mpp):
        return
    if record.identity == content_identity(opened.path):
        pixels = read_picture(path)
        yield Reduced(pixels, max(opened.width, opened.height) / max(pixels.shape[:2]))

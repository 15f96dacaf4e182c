"""Compress many slides: skip those that are up to date, continue after failures, report.

Several processes may compress the same slides into the same folder. Each takes slides that no other
process is compressing, and waits for the remaining ones at the end, so that every slide is
compressed once.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import polars as pl

from nic_core.cohort import Geometry
from nic_core.cohort.index import slide_id
from nic_core.compression import compress_to_store, is_up_to_date
from nic_core.encoders.inference import PreparedEncoder
from nic_core.grids import Grid, open_grid
from nic_core.object_stores import RemoteError
from nic_core.slides import SlideError, SlideSource, content_identity, open_source
from nic_core.slides.dicom import folder_series
from nic_core.slides.files import SlideFiles, files_of_slide
from nic_core.store import StoreBusyError, StoreError, atomic_file, exclusive_lock
from nic_core.tiling.mask_files import source_mask
from nic_core.tiling.patches import patch_table
from nic_core.types import Colours

REPORT = "report.csv"
BATCH_SCHEMA: dict[str, pl.DataType] = {
    "slide": pl.String(),
    "path": pl.String(),  # of the slide's main file
    "status": pl.String(),  # compressed, up to date, failed, not tried
    "reason": pl.String(),  # null unless failed or not tried
    "remedy": pl.String(),
    "cells": pl.Int64(),  # cells with an embedding
    "unreadable": pl.Int64(),  # kept cells that could not be decoded
    "seconds": pl.Float64(),  # from opening the slide until the store is written
    "patches_per_second": pl.Float64(),  # null unless compressed
}

# "waiting" is not final: another process is compressing the slide, which is tried again at the end
Status = Literal["compressed", "up to date", "failed", "not tried", "waiting"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a slide; the fields are the columns of :data:`BATCH_SCHEMA`."""

    slide: str
    path: str
    status: Status
    reason: str | None = None
    remedy: str | None = None
    cells: int | None = None
    unreadable: int | None = None
    seconds: float | None = None
    patches_per_second: float | None = None


def slides_by_id(sources: Iterable[SlideSource]) -> dict[str, SlideSource]:
    """Return slides by slide id (:func:`nic_core.cohort.index.slide_id`), each by its main file.

    Several files of one slide, for example of a DICOM series, are one slide.

    Raises
    ------
    ValueError
        Two slides have the same id, or two sources of one slide differ.
    """
    slides: dict[str, SlideSource] = {}
    series_of = functools.cache(folder_series)
    for source in sources:
        found = files_of_slide(source.path, series_of=series_of)
        # compression reports a file that is not a slide
        files = found if isinstance(found, SlideFiles) else SlideFiles(source.path)
        slide = replace(source, path=files.path)
        other = slides.setdefault(slide_id(files), slide)
        if other.path != slide.path:
            raise ValueError(
                f"{other.path} and {slide.path} have the same slide id '{slide_id(files)}'; rename "
                "one of them"
            )
        if other != slide:
            raise ValueError(
                f"{slide.path} is given twice, with different um/px, image or mask; keep one"
            )
    return slides


def compress_slides(
    slides: Mapping[str, SlideSource],
    encoder: PreparedEncoder,
    out: Path,
    *,
    colours: Colours = "stored",
    tissue: float = 0.6,
    stride: int | None = None,
    orientations: bool = False,
    resume: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> pl.DataFrame:
    """Compress slides into ``out/<slide>.zarr``.

    A slide that cannot be used is reported, and the others are compressed. If a store cannot be
    written, the remaining slides are not tried, since they would fail for the same reason. Other
    exceptions are not caught.

    Parameters
    ----------
    slides : mapping of str to SlideSource
        Slide id to the slide's file and how it is read. Without a mask, tissue is detected.
    encoder : PreparedEncoder
    out : Path
        Folder of the grid stores; created if missing.
    colours : {"stored", "srgb"}
        Pixels as stored, or converted by the ICC profile of each file for the embeddings. Tissue is
        always detected on stored pixels.
    tissue : float
        A cell is kept if the tissue fraction of its patch exceeds this.
    stride : int, optional
        Side of a cell, px at the encoder's um/px; default: its patch, so that patches do not
        overlap.
    orientations : bool
        Encode every patch in all 8 orientations.
    resume : bool
        Skip slides whose store is up to date; otherwise compress all slides again.
    progress : callable, optional
        Called with (slide, encoded cells, all kept cells), first with 0 encoded cells.
    on_outcome : callable, optional
        Called with the outcome of a slide as soon as it is known.

    Returns
    -------
    polars.DataFrame
        :data:`BATCH_SCHEMA`, one row per slide, in the order of ``slides``.
    """
    outcomes: dict[str, Outcome] = {}

    def record(outcome: Outcome) -> None:
        outcomes[outcome.slide] = outcome
        if on_outcome is not None:
            on_outcome(outcome)

    def compress(slide: str, source: SlideSource, store: Path) -> tuple[Status, Grid]:
        with open_source(source) as opened:
            card = encoder.card
            geometry = Geometry(card.patch, card.mpp, stride or card.patch)
            mask = source_mask(source, opened)
            table = patch_table(slide, opened, mask, geometry, tissue=tissue)
        with open_source(source, colours=colours) as opened:
            identity = content_identity(source.path)
            if resume and is_up_to_date(
                store, opened, table, encoder, slide_identity=identity, orientations=orientations
            ):
                return "up to date", open_grid(store)
            if progress is not None:
                progress(slide, 0, int(table["kept"].sum()))
            grid = compress_to_store(
                store,
                opened,
                table,
                encoder,
                slide_id=slide,
                slide_identity=identity,
                orientations=orientations,
                progress=None if progress is None else lambda *cells: progress(slide, *cells),
            )
        return "compressed", grid

    waiting = deque((slide, source, False) for slide, source in slides.items())
    while waiting:
        slide, source, wait = waiting.popleft()
        path, store = str(source.path), out / f"{slide}.zarr"
        start = time.perf_counter()
        try:
            with exclusive_lock(store, wait=wait):
                status, grid = compress(slide, source, store)
        except StoreBusyError as error:
            waiting.append((slide, source, True))
            record(Outcome(slide, path, "waiting", error.reason))
        except StoreError as error:
            record(Outcome(slide, path, "failed", f"{store}: {error.reason}", error.remedy))
            for slide, source, _ in waiting:
                path = str(source.path)
                record(Outcome(slide, path, "not tried", error.reason, error.remedy))
            break
        except (SlideError, RemoteError) as error:
            record(Outcome(slide, path, "failed", error.reason, error.remedy))
        else:
            cells, seconds = int(grid.valid.sum()), time.perf_counter() - start
            rate = cells / seconds if status == "compressed" else None
            unreadable = grid.provenance.unreadable
            record(Outcome(slide, path, status, None, None, cells, unreadable, seconds, rate))
    return pl.DataFrame([asdict(outcomes[slide]) for slide in slides], schema=BATCH_SCHEMA)


def write_report(path: Path, table: pl.DataFrame) -> None:
    """Write the table of :func:`compress_slides` as CSV, atomically.

    Raises
    ------
    StoreError
        The file cannot be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(table.write_csv(float_precision=1))

"""Compressing many slides: going on past bad ones, skipping what is done, saying what happened.

Several processes may be given the same slides and the same folder: each takes what no other is
at, and at last waits for those, so they share the work and never do it twice.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from nic_core.cohort.index import slide_id
from nic_core.compression import compress_slide, up_to_date
from nic_core.encoders.inference import PreparedEncoder
from nic_core.grids import Grid, open_grid, write_grid
from nic_core.slides import SlideError, content_identity, open_slide
from nic_core.store import StoreBusyError, StoreError, atomic_file, exclusive_lock
from nic_core.tiling.patches import patch_table
from nic_core.tiling.tissue import tissue_mask

REPORT = "report.csv"
BATCH_SCHEMA: dict[str, pl.DataType] = {
    "slide": pl.String(),
    "path": pl.String(),  # as it was given
    "status": pl.String(),  # compressed, up to date, failed, not tried
    "reason": pl.String(),  # null unless failed or not tried
    "remedy": pl.String(),
    "cells": pl.Int64(),  # with a embedding in the store
    "unreadable": pl.Int64(),  # kept cells that could not be decoded
    "seconds": pl.Float64(),  # from opening the slide to the store in place
    "patches_per_second": pl.Float64(),  # null unless compressed
}

# "put off": another process is at it, it comes again at the end; no last word on a slide
Status = Literal["compressed", "up to date", "failed", "not tried", "put off"]


@dataclass(frozen=True)
class Outcome:
    """What became of a slide; fields as in ``BATCH_SCHEMA``."""

    slide: str
    path: str
    status: Status
    reason: str | None = None
    remedy: str | None = None
    cells: int | None = None
    unreadable: int | None = None
    seconds: float | None = None
    patches_per_second: float | None = None


def name_slides(paths: Iterable[Path]) -> dict[str, Path]:
    """Slides by their ids, the names of their files.

    Raises
    ------
    ValueError
        Two files have one name.
    """
    named: dict[str, Path] = {}
    for path in paths:
        other = named.setdefault(slide_id(path), path)
        if other != path:
            raise ValueError(f"{other} and {path} have one name, and would share a store")
    return named


def compress_slides(
    slides: Mapping[str, Path],
    encoder: PreparedEncoder,
    out: Path,
    *,
    mpp: float | None = None,
    tissue: float = 0.6,
    orientations: bool = False,
    resume: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
    tell: Callable[[Outcome], None] | None = None,
) -> pl.DataFrame:
    """Compress slides into ``out/<slide>.zarr``.

    A slide that cannot be used does not stop the others. A folder that cannot be written does:
    the next slide would fail the same after hours of work. A fault of the program is not caught.

    Parameters
    ----------
    slides : mapping
        Slide id to file.
    mpp : float, optional
        um/px at level 0 of all slides; overrides the files'.
    tissue : float
        A cell is kept if its tissue fraction exceeds this.
    orientations : bool
        Encode every patch in all 8 orientations.
    resume : bool
        Leave a store as it is that already holds what compressing would give; else make it anew.
    progress : callable, optional
        Called with (slide, cells done, cells in all), first with none done.
    tell : callable, optional
        Called with the outcome of a slide as soon as it is known.

    Returns
    -------
    polars.DataFrame
        ``BATCH_SCHEMA``, one row a slide, in the order given.
    """
    outcomes: dict[str, Outcome] = {}

    def told(outcome: Outcome) -> None:
        outcomes[outcome.slide] = outcome
        if tell is not None:
            tell(outcome)

    def work(slide: str, path: Path, store: Path) -> tuple[Status, Grid]:
        with open_slide(path, mpp=mpp) as opened:
            identity = content_identity(path)
            card = encoder.card
            table = patch_table(
                slide, opened, tissue_mask(opened), patch=card.patch, mpp=card.mpp, tissue=tissue
            )
            if resume and up_to_date(
                store, opened, table, encoder, slide_identity=identity, orientations=orientations
            ):
                return "up to date", open_grid(store)
            if progress is not None:
                progress(slide, 0, int(table["kept"].sum()))
            grid = compress_slide(
                opened,
                table,
                encoder,
                slide_id=slide,
                slide_identity=identity,
                orientations=orientations,
                progress=None if progress is None else lambda *cells: progress(slide, *cells),
            )
        write_grid(store, grid)
        return "compressed", grid

    waiting = deque((slide, path, False) for slide, path in slides.items())
    while waiting:
        slide, path, wait = waiting.popleft()
        store = out / f"{slide}.zarr"
        start = time.perf_counter()
        try:
            with exclusive_lock(store, wait=wait):
                status, grid = work(slide, path, store)
        except StoreBusyError as error:
            waiting.append((slide, path, True))
            told(Outcome(slide, str(path), "put off", error.reason))
        except StoreError as error:
            told(Outcome(slide, str(path), "failed", f"{store}: {error.reason}", error.remedy))
            for slide, path, _ in waiting:
                told(Outcome(slide, str(path), "not tried", error.reason, error.remedy))
            break
        except SlideError as error:
            told(Outcome(slide, str(path), "failed", error.reason, error.remedy))
        else:
            cells, seconds = int(grid.valid.sum()), time.perf_counter() - start
            rate = cells / seconds if status == "compressed" else None
            unreadable = grid.provenance.unreadable
            told(Outcome(slide, str(path), status, None, None, cells, unreadable, seconds, rate))
    return pl.DataFrame([asdict(outcomes[slide]) for slide in slides], schema=BATCH_SCHEMA)


def write_report(path: Path, table: pl.DataFrame) -> None:
    """Write the table of :func:`compress_slides` as CSV, whole or not at all.

    Raises
    ------
    StoreError
        It cannot be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(table.write_csv(float_precision=1))

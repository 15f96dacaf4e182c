"""The first slide table and cohort file of a study, for the slides in a folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from nic_core.cohort.fields import CohortError
from nic_core.cohort.index import slide_id
from nic_core.parallel import cores
from nic_core.slides import SlideError, open_slide
from nic_core.slides.files import SlideFiles
from nic_core.slides.folders import find_slide_files, summarize_left_aside
from nic_core.store import atomic_file

TABLE, COHORT = "slides.csv", "cohort.yaml"
DRAFT_SCHEMA: dict[str, pl.DataType] = {
    "slide": pl.String(),  # slide id
    "path": pl.String(),  # relative to the table if the slide is below its folder
    "patient": pl.String(),
    "mpp": pl.Float64(),  # always null: the user writes it where the file does not state it
    "file_mpp": pl.Float64(),  # um/px at level 0 that the file states
    "mpp_from": pl.String(),  # the field of the file that states it
    "decide": pl.String(),  # what the user has to decide about this row; null: nothing
}
"""Columns of the written slide table; the last three are for the reader and have no effect."""

_COHORT = """\
name: "{name}"  # of the study
slides: {{table: {table}}}  # columns slide, path, patient [, mpp, mask, split, fold, site ...]
# labels: labels.csv  # a row per slide or patient, a column per target
# patch_tasks: [{{name: colon, organ: colon, mpp: 0.5, folder: colon}}]  # a sub-folder per class
encoders: [{{name: mean-rgb, objective: mean_rgb}}]  # mean colour; trained ones need patch_tasks
# targets: [{{name: growth, kind: classification, column: growth, classes: [a, b]}}]  # need labels
"""


@dataclass(frozen=True)
class Draft:
    """What :func:`write_study` wrote.

    Attributes
    ----------
    slides : polars.DataFrame
        :data:`DRAFT_SCHEMA`.
    left_aside : list of str
        A line for each kind of file that is not a slide.
    table, cohort : Path
        The written files.
    """

    slides: pl.DataFrame
    left_aside: list[str]
    table: Path
    cohort: Path


def write_study(
    folder: Path, out: Path, progress: Callable[[int, int], None] | None = None
) -> Draft:
    """Write ``slides.csv`` and ``cohort.yaml`` for the slides in a folder and its sub-folders.

    Of each slide only the header and a few small regions are read. A slide that cannot be used
    is listed with the reason. Each slide counts as a patient of its own, since the patient is
    not known from a file name; slides whose names suggest one patient are marked [choice].

    Parameters
    ----------
    folder : Path
        Folder of the slides.
    out : Path
        Folder for the two files; created if it does not exist.
    progress : callable, optional
        Called with the number of opened slides and of all slides.

    Raises
    ------
    CohortError
        ``folder`` is not a folder or has no slide, or one of the two files exists.
    StoreError
        A file cannot be written.
    """
    if not folder.is_dir():
        raise CohortError(f"{folder} is not a folder; give the folder with the slide files")
    table, cohort = out / TABLE, out / COHORT
    for path in (table, cohort):
        if path.exists():
            raise CohortError(
                f"{path} exists and is not replaced; rename it, or choose another folder with --out"
            )
    files, others = find_slide_files(folder)
    left_aside = summarize_left_aside(others)
    if not files:
        aside = "".join(f"; {line}" for line in left_aside)
        raise CohortError(f"{folder}: no slide in this folder and its sub-folders{aside}")
    slides = _slide_table(folder, files, out, progress)
    with atomic_file(table) as path:
        path.write_text(slides.write_csv(), encoding="utf-8")
    with atomic_file(cohort) as path:
        name = re.sub(r"[^\w.\-]+", "-", out.resolve().name).strip(".-") or "study"
        path.write_text(_COHORT.format(name=name, table=TABLE), encoding="utf-8")
    return Draft(slides, left_aside, table, cohort)


def _slide_table(
    folder: Path, files: list[SlideFiles], out: Path, progress: Callable[[int, int], None] | None
) -> pl.DataFrame:
    rows: list[dict[str, object]] = []
    ids = list(_slide_ids(folder, files))
    several = _look_like_one_patient([slide for slide, _ in ids])
    with ThreadPoolExecutor(4 * cores()) as pool:
        paths = [slide.path for slide in files]
        opened = pool.map(_read_mpp, paths)
        for path, (slide, renamed), (mpp, source, problem) in zip(paths, ids, opened, strict=True):
            decide = [problem] if problem else []
            if renamed:
                decide.append(
                    "slide: check this id. An id is unique, of letters, digits, '-', '_' and '.'"
                )
            if source is not None and source.startswith("objective power"):
                decide.append("mpp: the file states only the magnification; write the um/px")
            if slide in several:
                decide.append(f"patient: the same patient as {several[slide]}?")
            inside = path.resolve().is_relative_to(out.resolve())
            shown = os.path.relpath(path.resolve(), out.resolve()) if inside else path.resolve()
            rows.append(
                {
                    "slide": slide,
                    "path": str(shown),
                    "patient": slide,
                    "file_mpp": mpp,
                    "mpp_from": source,
                    "decide": "; ".join(decide) or None,
                }
            )
            if progress is not None:
                progress(len(rows), len(files))
    return pl.DataFrame(rows, schema=DRAFT_SCHEMA)


def _read_mpp(path: Path) -> tuple[float | None, str | None, str | None]:
    """um/px of a slide, the field of the file that states it, and why it cannot be used."""
    try:
        with open_slide(path) as slide:
            return round(slide.mpp, 6), slide.mpp_source, None
    except SlideError as error:
        return None, None, f"{error.reason}; {error.remedy}"


def _slide_ids(folder: Path, files: list[SlideFiles]) -> Iterator[tuple[str, bool]]:
    """Yield a valid id for each file, and whether it differs from the file's name.

    Files of the same name in different folders get their folders' names as well.
    """
    names = Counter(map(slide_id, files))
    taken: set[str] = set()
    for slide in files:
        name = slide_id(slide)
        if names[name] > 1:
            name = "_".join((*slide.path.relative_to(folder).parts[:-1], name))
        valid = re.sub(r"^[.\-]", "_", re.sub(r"[^A-Za-z0-9_.\-]", "_", name))
        unique, number = valid, 2
        while unique in taken:
            unique, number = f"{valid}-{number}", number + 1
        taken.add(unique)
        yield unique, unique != slide_id(slide)


def _look_like_one_patient(slides: list[str]) -> dict[str, str]:
    """Slides whose ids differ in the last part only, after a part with a number; and another one.

    ``P07-1`` and ``P07-2`` are found, ``scan_1`` and ``scan_2`` are not.
    """
    groups: dict[str, list[str]] = {}
    for slide in slides:
        start = re.match(r"(.*\d.*)[\-_.]", slide)
        if start is not None:
            groups.setdefault(start[1], []).append(slide)
    return {
        slide: next(other for other in group if other != slide)
        for group in groups.values()
        if len(group) > 1
        for slide in group
    }

"""Find every mistake in the inputs of a study, before anything is computed.

Of a slide only the header and a few small regions are read. Registered encoders are not checked:
they are in the registry only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from nic_core.cohort import (
    ClassificationTarget,
    Cohort,
    CohortError,
    ImportedEncoder,
    PatchTask,
)
from nic_core.cohort.file import cohort_problems, read_cohort_file, valid_part
from nic_core.cohort.index import (
    FILE_COLUMNS,
    INDEX_SCHEMA,
    folder_slides,
    row_problem,
    table_slides,
)
from nic_core.cohort.problems import Source
from nic_core.cohort.references import wrong_columns
from nic_core.cohort.tables import Unmatched, read_table
from nic_core.encoders.patch_sources import open_source, source_files
from nic_core.models.labels import LabelMatches, read_labels
from nic_core.parallel import cores
from nic_core.slides import SlideError, content_identity, open_slide
from nic_core.slides.files import SlideFiles
from nic_core.slides.folders import summarize_left_aside
from nic_core.steps.slide_index import same_content, used_slides
from nic_core.steps.slide_models import find_target_folds
from nic_core.tiling.annotations import is_annotation_file, read_annotations

SHOWN = 3  # ids that a message lists
_READERS = 4  # slides opened at once for each core: opening waits for the disk

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Finding:
    """A mistake in the inputs of a study, or a note about them.

    Attributes
    ----------
    where : str
        File and line, or what the problem belongs to.
    problem : str
        What is wrong and what to do.
    is_error : bool
        False for a note: something that may be as intended.
    """

    where: str
    problem: str
    is_error: bool = True


def check_study(path: Path | None = None, progress: Progress | None = None) -> list[Finding]:
    """Return every mistake in a cohort file, its tables and its slides.

    If entries of the cohort file are invalid, the others are checked.

    Parameters
    ----------
    path : Path, optional
        Cohort file; default: that of the environment.
    progress : callable, optional
        Called with the number of opened slides and of all slides.

    Raises
    ------
    CohortError
        The cohort file cannot be read at all.
    """
    source = read_cohort_file(path)
    found = [Finding(problem.place, problem.message) for problem in cohort_problems(source)]
    cohort = valid_part(source)
    if cohort is None:
        return found
    index, files, problems = _slides(cohort)
    found += problems
    found += _opened(index, files, progress)
    for task in cohort.patch_tasks:
        found += _patch_task(cohort, task)
    found += _encoder_files(cohort)
    found += _targets(source, cohort, index)
    return found


# --- slides ----------------------------------------------------------------------------------


def _slides(cohort: Cohort) -> tuple[pl.DataFrame, dict[str, SlideFiles], list[Finding]]:
    """The usable rows of the slide index, their files by path, and problems of the others."""
    rows: list[dict[str, object]] = []
    files: dict[str, SlideFiles] = {}
    found: list[Finding] = []
    for number, folder in enumerate(cohort.slides.folders):
        try:
            slides, of_folder, left_aside = folder_slides(folder)
            rows += slides
            files |= of_folder
            for line in summarize_left_aside(left_aside):
                found.append(Finding(str(folder.path), f"no slide: {line}", is_error=False))
        except CohortError as error:
            found.append(Finding(cohort.place("slides", "folders", number), str(error)))
    if cohort.slides.table is not None:
        try:
            slides, of_table = table_slides(cohort.slides.table)
            rows += slides
            files |= of_table
        except CohortError as error:
            found.append(Finding(cohort.place("slides", "table"), str(error)))
    if not rows and not found:
        found.append(Finding(cohort.place("slides"), "no slides: correct the folder or the table"))
    found += [Finding("slides", problem) for row in rows if (problem := row_problem(row))]
    index = pl.DataFrame(rows, schema=INDEX_SCHEMA).sort("slide")
    for (slide,), same in index.filter(pl.col("slide").is_duplicated()).group_by(
        "slide", maintain_order=True
    ):
        found.append(
            Finding(f"slide {slide}", f"the id occurs {same.height} times: {_few(same['path'])}")
        )
    for column in FILE_COLUMNS:
        absent = index.filter(
            pl.col(column).map_elements(lambda path: not Path(path).exists(), pl.Boolean)
        )
        if absent.height:
            found.append(
                Finding(
                    _named("slide", absent["slide"]),
                    f"{column} {absent[column][0]} does not exist; correct the path",
                )
            )
    return index.unique("slide", keep="first", maintain_order=True), files, found


def _opened(
    index: pl.DataFrame, files: dict[str, SlideFiles], progress: Progress | None
) -> Iterator[Finding]:
    """Yield the slides that cannot be used, those with the same problem together; and copies."""
    rows = [row for row in index.iter_rows(named=True) if Path(row["path"]).exists()]

    def identity(row: dict[str, Any]) -> str | SlideError:
        path = Path(row["path"])
        # a problem of the whole slide may not show when one of its files is opened
        if (problem := files[row["path"]].problem) is not None:
            return problem
        try:
            with open_slide(path, mpp=row["mpp"], image=row["image"]):
                return content_identity(path)
        except SlideError as error:
            return error

    slides: dict[tuple[str, str], list[str]] = {}
    identities: dict[str, str] = {}
    with ThreadPoolExecutor(_READERS * cores()) as pool:
        for done, (row, result) in enumerate(zip(rows, pool.map(identity, rows), strict=True), 1):
            if isinstance(result, SlideError):
                slides.setdefault((result.reason, result.remedy), []).append(row["slide"])
            else:
                identities[row["path"]] = result
            if progress is not None:
                progress(done, len(rows))
    for (reason, remedy), names in slides.items():
        yield Finding(_named("slide", names), f"{reason}; {remedy}")
    schema = {"path": pl.String(), "identity": pl.String()}
    table = pl.DataFrame(list(identities.items()), schema, orient="row")
    yield from _copies(used_slides(index), table)


def _copies(index: pl.DataFrame, identities: pl.DataFrame) -> Iterator[Finding]:
    """Yield the slides with the same content."""
    for names in same_content(index, identities):
        rows = index.filter(pl.col("slide").is_in(names))
        where = _named("slide", list(names))
        if rows["split"].n_unique() > 1:
            yield Finding(
                where,
                "the same content is in both splits 'cv' and 'test'; put the slides into one "
                "split, or remove the duplicates",
            )
            continue
        patients = rows["patient"].unique(maintain_order=True)
        images = rows.select("path", "image").unique().height
        if rows["path"].n_unique() == 1 and images == rows.height and len(patients) == 1:
            continue  # two images of one file, each named by the table
        folds = f"; patients {_few(patients)} share a fold" if len(patients) > 1 else ""
        yield Finding(
            where,
            f"their content is the same{folds}; remove the duplicates, or correct the paths",
            is_error=False,
        )


# --- encoders and patch tasks ----------------------------------------------------------------


def _encoder_files(cohort: Cohort) -> Iterator[Finding]:
    for encoder in cohort.encoders:
        if isinstance(encoder, ImportedEncoder) and not encoder.file.exists():
            yield Finding(
                f"encoder {encoder.name}", f"file {encoder.file} does not exist; correct the path"
            )


def _patch_task(cohort: Cohort, task: PatchTask) -> Iterator[Finding]:
    where = f"patch task {task.name}"
    try:
        if task.slides is not None:
            yield from _annotated_slides(task)
            return
        settings = cohort.settings
        with open_source(
            task, patch=settings.patch, mpp=settings.mpp, tissue=settings.tissue, seed=0
        ) as source:
            labels = source.listing["label"].drop_nulls()
    except CohortError as error:
        yield Finding(where, str(error).removeprefix(f"patch task '{task.name}': "))
        return
    present = set(labels)
    for name in task.classes or ():
        if name not in present:
            yield Finding(
                where,
                f"class '{name}' has no image; the labels are {_few(sorted(present))}; correct "
                "'classes' or add images",
            )
    if task.classes is not None and (others := sorted(present - set(task.classes))):
        count = int(labels.is_in(others).sum())
        yield Finding(
            where,
            f"{count:,} images of the labels {_few(others)} are left out: they are not in "
            "'classes'",
            is_error=False,
        )


def _annotated_slides(task: PatchTask) -> Iterator[Finding]:
    for path in source_files(task):
        if not path.is_file():
            yield Finding(f"patch task {task.name}", f"{path} does not exist; correct the path")
        elif is_annotation_file(path):
            try:
                read_annotations(path)
            except SlideError as error:
                yield Finding(f"patch task {task.name}", str(error))


# --- targets ---------------------------------------------------------------------------------


def _targets(source: Source, cohort: Cohort, index: pl.DataFrame) -> Iterator[Finding]:
    """Yield the targets that cannot be cross-validated, and rows without a partner."""
    if cohort.labels is None:
        return
    try:
        table = read_table(cohort.labels, "label table")
    except CohortError as error:
        yield Finding(cohort.place("labels"), str(error))
        return
    wrong = list(wrong_columns(source.data, cohort.labels, table.columns))
    for location, message in wrong:
        yield Finding(cohort.place(*location), message)
    if index.is_empty():  # the reason is reported above
        return
    positions = {location[1] for location, _ in wrong}
    matched: list[Finding] = []
    listed = source.data.get("targets")
    for number, entry in enumerate(listed if isinstance(listed, list) else []):
        name = entry.get("name") if isinstance(entry, dict) else None
        target = next((t for t in cohort.targets if t.name == name), None)
        if target is None or number in positions:
            continue
        if isinstance(target, ClassificationTarget):
            present = set(table[target.column].cast(pl.String))
            absent = [label for label in target.classes if label not in present]
            for label in absent:
                yield Finding(
                    cohort.place("targets", number, "classes"),
                    f"no row of the label table has the class '{label}'; correct the name, or "
                    "remove it",
                )
            # the other problems of the target do not depend on these classes
            classes = tuple(label for label in target.classes if label not in absent)
            if not classes:
                continue
            target = target.model_copy(update={"classes": classes})
        try:
            labels = read_labels(cohort, target, index)
            matched += _without_partner(cohort.labels, labels.matches, index)
            note = find_target_folds(cohort, target, index).note
        except CohortError as error:
            yield Finding(cohort.place("targets", number), str(error))
            continue
        if note is not None:
            yield Finding(cohort.place("targets", number), note, is_error=False)
    # targets of one table mostly have the same rows without a partner
    yield from dict.fromkeys(matched)


def _without_partner(table: Path, matches: LabelMatches, index: pl.DataFrame) -> Iterator[Finding]:
    labels, slides = matches.labels_without_slide, matches.slides_without_label
    where = f"label table {table}"
    if labels:
        yield Finding(
            where,
            f"{len(labels)} of {matches.used + len(labels)} labelled {matches.key}s have no "
            f"slide: {_partners(labels)}; correct the ids, or remove the rows",
        )
    if slides:
        yield Finding(
            where,
            f"{len(slides)} of {index.height} slides have no label: {_partners(slides)}; correct "
            "the ids, or add the labels",
        )
    if matches.without_id:
        yield Finding(
            where,
            f"{len(matches.without_id)} rows have a label but no {matches.key}: rows "
            f"{_few(list(map(str, matches.without_id)))}; add the id, or remove the rows",
        )
    if matches.repeated:
        yield Finding(
            where,
            f"{len(matches.repeated)} rows repeat the id and the label of an earlier row: rows "
            f"{_few(list(map(str, matches.repeated)))}",
            is_error=False,
        )


def _partners(items: list[Unmatched]) -> str:
    # those with a suggestion first: they are most probably misspelt
    return _few([str(item) for item in sorted(items, key=lambda item: item.suggestion is None)])


def _named(kind: str, names: pl.Series | list[str]) -> str:
    return f"{kind}{'s' if len(names) > 1 else ''} {_few(names)}"


def _few(names: pl.Series | list[str]) -> str:
    shown = ", ".join(list(names)[:SHOWN])
    return f"{shown} and {len(names) - SHOWN:,} more" if len(names) > SHOWN else shown

"""Find every mistake in the inputs of a study, before anything is computed.

Of a slide only the header and a few small regions are read. Registered encoders are not checked:
they are in the registry only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import polars as pl

from nic_core.cohort import (
    ClassificationTarget,
    Cohort,
    CohortError,
    EncoderSpec,
    FeaturesEncoder,
    ImportedEncoder,
    PatchTask,
)
from nic_core.cohort.fields import Location, did_you_mean
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
from nic_core.cohort.slides import Slides
from nic_core.cohort.tables import Unmatched, read_table, to_text
from nic_core.encoders.patch_sources import annotated_slide_problems, open_source, source_files
from nic_core.grids.features import FeaturesError, find_features
from nic_core.models.fold_columns import FoldColumnError
from nic_core.models.labels import LabelMatches, read_labels, target_table
from nic_core.models.networks import crop_cells
from nic_core.parallel import cores
from nic_core.slides import SlideError, content_identity, open_slide
from nic_core.slides.files import SlideFiles
from nic_core.slides.folders import summarize_left_aside
from nic_core.slides.remote import slide_path
from nic_core.steps.external import (
    StudySlides,
    external_study,
    refuse_leaks,
    unit_subgroups,
    without_covariates,
)
from nic_core.steps.slide_index import patient_groups, same_content, used_slides
from nic_core.steps.slide_models import find_target_folds
from nic_core.tiling.mask_files import check_mask

SHOWN = 3  # ids that a message lists
_SIMILAR = 0.8  # of names of columns (difflib): orgin and origin, but not age and image
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
    invalid = cohort_problems(source)
    found = [Finding(problem.place, problem.message) for problem in invalid]
    cohort = valid_part(source)
    if cohort is None:
        return found
    index, files, problems = _slides(cohort, cohort.slides, ("slides",))
    found += problems
    identity, problems = _opened(index, files, progress)
    found += problems
    duplicates, groups = _equal_slides(index, identity)
    found += duplicates
    for task in cohort.patch_tasks:
        found += _patch_task(cohort, task)
    found += _encoder_files(cohort, index)
    if not any(problem.field.startswith("settings") for problem in invalid):
        found += _crops(cohort)
    found += _targets(source, cohort, index, groups)
    study = StudySlides(frozenset(index["patient"]), {i: slide for slide, i in identity.items()})
    found += _external(source, cohort, study)
    return found


# --- slides ----------------------------------------------------------------------------------


def _slides(
    cohort: Cohort, slides: Slides, place: Location
) -> tuple[pl.DataFrame, dict[str, SlideFiles], list[Finding]]:
    """The usable rows of the slide index, their files by path, and problems of the others.

    ``place`` is that of the entry ``slides`` in the cohort file.
    """
    rows: list[dict[str, object]] = []
    files: dict[str, SlideFiles] = {}
    found: list[Finding] = []
    for number, folder in enumerate(slides.folders):
        try:
            of_rows, of_folder, left_aside = folder_slides(folder)
            rows += of_rows
            files |= of_folder
            for line in summarize_left_aside(left_aside):
                found.append(Finding(str(folder.path), f"no slide: {line}", is_error=False))
        except CohortError as error:
            found.append(Finding(cohort.place(*place, "folders", number), str(error)))
    if slides.table is not None:
        try:
            of_rows, of_table = table_slides(slides.table)
            rows += of_rows
            files |= of_table
            found += _misspelt_columns(slides.table)
        except CohortError as error:
            where = cohort.place(*place, "table")
            found += [Finding(where, line) for line in str(error).splitlines()]
    if not rows and not found:
        found.append(Finding(cohort.place(*place), "no slides: correct the folder or the table"))
    found += [Finding("slides", problem) for row in rows if (problem := row_problem(row))]
    index = pl.DataFrame(rows, schema=INDEX_SCHEMA).sort("slide")
    for (slide,), same in index.filter(pl.col("slide").is_duplicated()).group_by(
        "slide", maintain_order=True
    ):
        found.append(
            Finding(
                f"slide {slide}",
                f"the id occurs {same.height} times: {_few(same['path'])}; give the slides "
                "different ids, or list a file once",
            )
        )
    for column in FILE_COLUMNS:
        absent = index.filter(
            pl.col(column).map_elements(lambda path: not slide_path(path).exists(), pl.Boolean)
        )
        if absent.height:
            found.append(
                Finding(
                    _named("slide", absent["slide"]),
                    f"{column} {absent[column][0]} does not exist; correct the path",
                )
            )
    return index.unique("slide", keep="first", maintain_order=True), files, found


def _misspelt_columns(table: Path) -> Iterator[Finding]:
    """Yield the columns of a slide table that may be meant as optional ones."""
    columns = read_table(table, "slide table").columns
    absent = [column for column in INDEX_SCHEMA if column not in columns]
    for column in columns:
        near = [] if column in INDEX_SCHEMA else get_close_matches(column, absent, 1, _SIMILAR)
        if near:
            yield Finding(
                f"slide table {table}",
                f"column '{column}' has no effect; did you mean '{near[0]}'?",
                is_error=False,
            )


def _opened(
    index: pl.DataFrame, files: dict[str, SlideFiles], progress: Progress | None
) -> tuple[dict[str, str], list[Finding]]:
    """Content identity of each slide by id, and the slides that cannot be used.

    Slides with the same problem are one finding.
    """
    rows = [row for row in index.iter_rows(named=True) if slide_path(row["path"]).exists()]

    def read(row: dict[str, Any]) -> tuple[str | None, tuple[str, str] | None]:
        # a problem of the whole slide may not show when one of its files is opened
        if (problem := files[row["path"]].problem) is not None:
            return None, (problem.reason, problem.remedy)
        try:
            path = slide_path(row["path"])
            identity = content_identity(path)
            with open_slide(path, mpp=row["mpp"], image=row["image"]) as slide:
                if row["mask"] and Path(row["mask"]).exists():
                    check_mask(Path(row["mask"]), slide, origin=row["origin"])
        except SlideError as error:
            # slides with the same problem are one finding, which names the slides
            return None, (error.reason, error.remedy)
        return identity, None

    identities: dict[str, str] = {}
    slides: dict[tuple[str, str], list[str]] = {}
    with ThreadPoolExecutor(_READERS * cores()) as pool:
        for done, (row, (identity, wrong)) in enumerate(
            zip(rows, pool.map(read, rows), strict=True), 1
        ):
            if identity is not None:
                identities[row["slide"]] = identity
            if wrong is not None:
                slides.setdefault(wrong, []).append(row["slide"])
            if progress is not None:
                progress(done, len(rows))
    return identities, [
        Finding(_named("slide", names), f"{reason}; {remedy}")
        for (reason, remedy), names in slides.items()
    ]


def _equal_slides(
    index: pl.DataFrame, identity: dict[str, str]
) -> tuple[list[Finding], dict[str, str]]:
    """The slides with the same content, and the groups of patients that they make."""
    used = used_slides(index)
    known = used.filter(pl.col("slide").is_in(list(identity)))
    identities = known.select("path", identity=pl.col("slide").replace(identity)).unique()
    duplicates = same_content(used, identities)
    patient_of = dict(used.select("slide", "patient").iter_rows())
    found = []
    for slides in duplicates:
        patients = sorted({patient_of[slide] for slide in slides})
        both = used.filter(pl.col("slide").is_in(slides))["split"].n_unique() > 1
        if both:
            problem = "in both splits 'cv' and 'test'; put the slides into one split"
        elif len(patients) > 1:
            problem = (
                f"of patients {_few(patients)}, who therefore count as one in folds; correct the "
                "paths"
            )
        else:
            problem = f"of patient {patients[0]}; correct the paths"
        found.append(
            Finding(
                _named("slide", list(slides)),
                f"the same content {problem}, or exclude all but one of them",
                is_error=both or len(patients) > 1,
            )
        )
    return found, patient_groups(used, duplicates)


# --- encoders and patch tasks ----------------------------------------------------------------


def _encoder_files(cohort: Cohort, index: pl.DataFrame) -> Iterator[Finding]:
    for encoder in cohort.encoders:
        if isinstance(encoder, ImportedEncoder) and not encoder.file.exists():
            yield Finding(
                f"encoder {encoder.name}", f"file {encoder.file} does not exist; correct the path"
            )
        start = encoder.initial_weights if isinstance(encoder, EncoderSpec) else None
        if start is not None and start.file is not None and not start.file.exists():
            yield Finding(
                f"encoder {encoder.name}",
                f"initial_weights: {start.file} does not exist; correct the path",
            )
        if isinstance(encoder, FeaturesEncoder):
            yield from _features(encoder, used_slides(index))


def _features(encoder: FeaturesEncoder, slides: pl.DataFrame) -> Iterator[Finding]:
    """Yield what is wrong with the folder of features, or with the files of slides in use."""
    where, problems = f"encoder {encoder.name}", dict[str, str]()
    if not encoder.folder.is_dir():
        yield Finding(where, f"folder {encoder.folder} does not exist; correct the path")
        return
    for slide, path in slides.select("slide", "path").iter_rows():
        try:
            find_features(encoder.folder, slide, slide_path(path), encoder.format)
        except FeaturesError as error:
            problems[slide] = str(error)
    if problems:
        first = next(iter(problems.values()))
        yield Finding(
            where,
            f"no grids of {len(problems)} of {slides.height} slides in use "
            f"({_few(sorted(problems))}); {first}",
        )


def _crops(cohort: Cohort) -> Iterator[Finding]:
    """Yield the encoders whose cells give crops that the network of slide models cannot take."""
    if not cohort.targets:
        return
    for encoder in cohort.encoders:
        try:
            crop_cells(cohort.settings.models, cohort.geometry(encoder.name).cell_um)
        except CohortError as error:
            place = cohort.place("settings", "models", "crop_um")
            yield Finding(place, f"encoder '{encoder.name}': {error}")


def _patch_task(cohort: Cohort, task: PatchTask) -> Iterator[Finding]:
    where = f"patch task {task.name}"
    try:
        if task.slides is not None:
            yield from _annotated_slides(task)
            return
        settings = cohort.settings  # labels do not depend on patch and um/px
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
    where = f"patch task {task.name}"
    absent = [path for path in source_files(task) if not path.exists()]
    for path in absent:
        yield Finding(where, f"{path} does not exist; correct the path")
    for problem in annotated_slide_problems(task, absent):
        yield Finding(where, problem)


# --- targets ---------------------------------------------------------------------------------


def _targets(
    source: Source, cohort: Cohort, index: pl.DataFrame, groups: dict[str, str]
) -> Iterator[Finding]:
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
            try:
                present = set(to_text(table[target.column]).drop_nulls())
            except TypeError as error:
                yield Finding(cohort.place("targets", number, "column"), f"the column {error}")
                continue
            absent = [label for label in target.classes if label not in present]
            for label in absent:
                yield Finding(
                    cohort.place("targets", number, "classes"),
                    f"no row of the label table has the class '{label}'"
                    f"{did_you_mean(label, present)}; correct the name, or remove it",
                )
            # the other problems of the target do not depend on these classes
            classes = tuple(label for label in target.classes if label not in absent)
            if not classes:
                continue
        try:
            labels = read_labels(cohort, target, index)
            matched += _without_partner(cohort.labels, labels.matches, index)
            if isinstance(target, ClassificationTarget):
                target = target.model_copy(update={"classes": classes})
            note = find_target_folds(cohort, target, index, groups).note
        except FoldColumnError as error:
            matched.append(Finding(cohort.place("settings", "models", "folds"), str(error)))
            continue
        except CohortError as error:
            yield Finding(cohort.place("targets", number), str(error))
            continue
        if note is not None:
            yield Finding(cohort.place("targets", number), note, is_error=False)
    # targets of one table mostly have the same rows without a partner, and the same sites
    yield from dict.fromkeys(matched)


def _external(source: Source, cohort: Cohort, study: StudySlides) -> Iterator[Finding]:
    """Yield what is wrong with the external cohorts, and their leaks."""
    listed = source.data.get("external")
    for number, data in enumerate(listed if isinstance(listed, list) else []):
        name = data.get("name") if isinstance(data, dict) else None
        entry = next((e for e in cohort.external if e.name == name), None)
        if entry is None:
            continue
        index, files, problems = _slides(cohort, entry.slides, ("external", number, "slides"))
        yield from problems
        identity, problems = _opened(index, files, None)
        yield from problems
        if index.is_empty():
            continue
        place = cohort.place("external", number)
        used = used_slides(index)
        try:
            refuse_leaks(
                used,
                {slide: identity[slide] for slide in used["slide"] if slide in identity},
                study,
            )
        except CohortError as error:
            yield Finding(place, str(error))
        units = used.select("patient", slides=pl.concat_list("slide"))
        for position, column in enumerate(entry.subgroups):
            try:
                unit_subgroups(entry, column, units, index)
            except CohortError as error:
                yield Finding(cohort.place("external", number, "subgroups", position), str(error))
        matched: list[Finding] = []
        for target in map(without_covariates, cohort.targets):
            try:
                labels = read_labels(external_study(entry, target), target, index)
                target_table(target, labels, used.with_columns(split=pl.lit("test")))
            except CohortError as error:
                yield Finding(cohort.place("external", number, "labels"), str(error))
            else:
                matched += _without_partner(entry.labels, labels.matches, index)
        yield from dict.fromkeys(matched)


def _without_partner(table: Path, matches: LabelMatches, index: pl.DataFrame) -> Iterator[Finding]:
    labels, slides = matches.labels_without_slide, matches.slides_without_label
    where = f"label table {table}"
    if labels:
        labelled = matches.used + len(matches.excluded) + len(labels)
        yield Finding(
            where,
            f"{len(labels)} of {labelled} labelled {matches.key}s have no slide: "
            f"{_partners(labels)}; correct the ids, or remove the rows",
        )
    if slides:
        yield Finding(
            where,
            f"{len(slides)} of {used_slides(index).height} slides have no label: "
            f"{_partners(slides)}; correct the ids, or add the labels",
            # slides may have no label on purpose, for example those to predict
            is_error=bool(labels) or any(slide.suggestion for slide in slides),
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

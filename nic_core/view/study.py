"""The study that is viewed: its slides, labels and predictions, as the pages show them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from nic_core.cohort import ClassificationTarget, Cohort, CohortError, SurvivalTarget, Target
from nic_core.cohort.index import INDEX_SCHEMA, find_slides, row_source
from nic_core.models.cross_validation import NETWORK
from nic_core.models.kinds import kind_of
from nic_core.models.labels import read_labels, target_table
from nic_core.object_stores import RemoteError
from nic_core.slides import SlideError, open_source
from nic_core.slides.remote import slide_path
from nic_core.steps.quality_report import SLIDES as QUALITY
from nic_core.steps.slide_index import read_slide_index
from nic_core.steps.slide_models import PREDICTIONS
from nic_core.steps.slides import RECORD, THUMBNAIL
from nic_core.store import ModelKey, Store
from nic_core.version import __version__
from nic_core.view.cache import FileCache, file_version
from nic_core.view.errors import TRY_LATER, UNREACHABLE, ViewError, without_paths

_FILES = 256  # tables and arrays in memory
_MAKE_INDEX = "materialize 'slide_index' again"
# what messages call the files of a slide
_FILE_NAMES = {"path": "its slide file", "mask": "its tissue mask", "truth": "its label image"}


@dataclass(frozen=True)
class Failed:
    """Why a slide cannot be shown or has no products, and what to do."""

    reason: str
    remedy: str


@dataclass(frozen=True)
class ViewedStudy:
    """A cohort and its store, opened for viewing.

    Attributes
    ----------
    cohort : Cohort
    store : Store
    unusable : dict of str to Failed
        Slides of the cohort that are not in the slide index.
    files : FileCache
        Tables and arrays of the store.
    """

    cohort: Cohort
    store: Store
    unusable: Mapping[str, Failed]
    files: FileCache = field(default_factory=lambda: FileCache(_FILES))
    _opened: dict[tuple[str, tuple[int, ...]], Failed] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def index(self) -> dict[str, dict[str, Any]]:
        """Return the rows of the slide index by slide id.

        Raises
        ------
        ViewError
            It does not exist any more.
        """
        try:
            return self.files.get(self.store.slide_index, partial(_index_rows, self.store))
        except (OSError, CohortError, pl.exceptions.PolarsError) as error:
            raise ViewError(404, "the slide index cannot be read", _MAKE_INDEX) from error

    def row(self, slide: str) -> dict[str, Any]:
        """Return the row of a slide in the slide index.

        Raises
        ------
        ViewError
            404: it has no such slide.
        """
        rows = self.index()
        if slide not in rows:
            failed = self.unusable.get(slide)
            if failed is not None:
                raise ViewError(404, f"slide '{slide}': {failed.reason}", failed.remedy)
            raise ViewError(404, "the study has no such slide", "choose one of the cohort's page")
        return rows[slide]

    def failed(self, slide: str) -> Failed | None:
        """Return why a slide of the index cannot be shown, or has no products; None: it can be.

        A slide without a record is opened once for each state of its file.
        """
        row = self.row(slide)
        try:
            version = file_version(slide_path(row["path"]))
        except RemoteError:
            return Failed(UNREACHABLE, TRY_LATER)
        except OSError:
            return Failed(
                "its file was moved or removed after the slide index was made",
                f"restore the file, or {_MAKE_INDEX}",
            )
        if (self.store.slide(slide) / RECORD).exists():
            return None
        with self._lock:
            if (slide, version) not in self._opened:
                try:
                    self._opened[slide, version] = _opening_problem(row)
                except RemoteError:  # not kept: the next request asks again
                    return Failed(UNREACHABLE, TRY_LATER)
            return self._opened[slide, version]


def open_study(cohort: Cohort, store: Store) -> ViewedStudy:
    """Open a study for viewing.

    Raises
    ------
    CohortError
        The slide index does not exist yet, or the slides of the cohort cannot be listed.
    """
    indexed = set(read_slide_index(store)["slide"])
    found = find_slides(cohort)
    unusable = {}
    for row in found.index.iter_rows(named=True):
        if row["slide"] in indexed:
            continue
        reason = found.problems.get(
            row["slide"], "it is new, or could not be read when the slide index was made"
        )
        for column, name in _FILE_NAMES.items():
            reason = reason.replace(f"{column} {row[column]}", name)
        paths = [row[column] for column in _FILE_NAMES if row[column]]
        unusable[row["slide"]] = Failed(without_paths(reason, paths), _MAKE_INDEX)
    return ViewedStudy(cohort, store, unusable)


def study_summary(study: ViewedStudy, *, annotate: bool) -> dict[str, Any]:
    """Return what ``/api/study`` answers: the encoders, targets and maps of the study."""
    cohort = study.cohort
    encoders = []
    for entry in cohort.encoders:
        geometry = cohort.geometry(entry.name)
        encoders.append(
            {
                "name": entry.name,
                "patch": geometry.patch,
                "mpp": geometry.mpp,
                "stride": geometry.stride,
            }
        )
    return {
        "name": cohort.name,
        "version": __version__,
        "annotate": annotate,
        "encoders": encoders,
        "targets": [
            {
                "name": target.name,
                "kind": target.kind,
                "level": target.level,
                "classes": list(target.classes) if isinstance(target, ClassificationTarget) else [],
                "unit": target.unit if isinstance(target, SurvivalTarget) else None,
                "encoders": encoders_of(study, target.name),
                "problem": labels_of(study, target)[1],
            }
            for target in cohort.targets
        ],
        "maps": [{"name": item.name, "classes": [item.label]} for item in cohort.maps],
    }


def encoders_of(study: ViewedStudy, target: str) -> list[str]:
    """Return the encoders that have a slide model of a target, in the order of the cohort file."""
    return [
        entry.name
        for entry in study.cohort.encoders
        if (
            study.store.slide_model(ModelKey(encoder=entry.name, target=target)) / PREDICTIONS
        ).exists()
    ]


def network_predictions(study: ViewedStudy, key: ModelKey) -> pl.DataFrame:
    """Return the stored predictions of a slide model's networks.

    Raises
    ------
    OSError
        There is no such model.
    """
    path = study.store.slide_model(key) / PREDICTIONS
    return study.files.get(path, partial(_read_network_predictions, path))


def _read_network_predictions(path: Path) -> pl.DataFrame:
    return pl.read_parquet(path, glob=False).filter(model=NETWORK)


def slide_list(study: ViewedStudy) -> list[dict[str, Any]]:
    """Return what ``/api/slides`` answers: a row for each slide of the cohort, by slide id."""
    store, index = study.store, study.index()
    qualities = _qualities(study)
    labels = {target.name: labels_of(study, target)[0] for target in study.cohort.targets}
    predictions = {target.name: _predictions(study, target) for target in study.cohort.targets}
    rows = []
    for slide, row in index.items():
        failed = study.failed(slide)
        has_thumbnail = (store.slide(slide) / THUMBNAIL).exists()
        rows.append(
            {
                "slide": slide,
                "patient": row["patient"],
                "split": row["split"],
                "exclude": row["exclude"],
                "organ": row["organ"],
                "thumbnail": f"/api/slides/{slide}/thumbnail.jpg" if has_thumbnail else None,
                "quality": qualities.get(slide, {"flags": []}),
                "labels": {name: found[slide] for name, found in labels.items() if slide in found},
                "predictions": {
                    name: found[slide] for name, found in predictions.items() if slide in found
                },
                "failed": as_json(failed),
            }
        )
    for slide, problem in study.unusable.items():
        if slide not in index:
            rows.append(
                {
                    "slide": slide,
                    "patient": None,
                    "split": None,
                    "exclude": None,
                    "organ": None,
                    "thumbnail": None,
                    "quality": {"flags": []},
                    "labels": {},
                    "predictions": {},
                    "failed": as_json(problem),
                }
            )
    return sorted(rows, key=lambda row: str(row["slide"]))


def as_json(failed: Failed | None) -> dict[str, str] | None:
    """Return a failure as the pages get it."""
    return None if failed is None else {"reason": failed.reason, "remedy": failed.remedy}


def _index_rows(store: Store) -> dict[str, dict[str, Any]]:
    return {row["slide"]: row for row in read_slide_index(store).iter_rows(named=True)}


def _opening_problem(row: Mapping[str, Any]) -> Failed:
    try:
        with open_source(row_source(row)):
            pass
    except SlideError as error:
        return Failed(without_paths(error.reason, [row["path"]]), without_paths(error.remedy))
    return Failed("it has no products yet", "materialize 'slide' and what depends on it")


def _qualities(study: ViewedStudy) -> dict[str, dict[str, Any]]:
    path = study.store.quality_report / QUALITY
    try:
        return study.files.get(path, partial(_read_qualities, path))
    except FileNotFoundError:  # before the first report
        return {}


def _read_qualities(path: Path) -> dict[str, dict[str, Any]]:
    table = pl.read_parquet(path, glob=False)
    shown = ("tissue_share", "ink_share", "blurred_share", "focus", "cells")
    return {
        row["slide"]: {
            "flags": row["problems"].split("; ") if row["problems"] else [],
            **{name: row[name] for name in shown},
        }
        for row in table.iter_rows(named=True)
    }


def labels_of(study: ViewedStudy, target: Target) -> tuple[dict[str, Any], str | None]:
    """Return the label of each slide, and why there are none; None: they could be read.

    A label is a number, a class, or time and event.
    """
    path = study.cohort.labels
    read = partial(_read_labels, study, target)
    try:
        if path is None or not path.exists():
            return read(), None
        key = (target.name, file_version(study.store.slide_index))
        return study.files.get(path, read, *key), None
    except CohortError as error:
        return {}, without_paths(str(error), [str(path)])


def _read_labels(study: ViewedStudy, target: Target) -> dict[str, Any]:
    index = pl.DataFrame(list(study.index().values()), schema=INDEX_SCHEMA)
    table = target_table(target, read_labels(study.cohort, target, index), index)
    return {
        slide: label_of(target, row)
        for row in table.iter_rows(named=True)
        for slide in row["slides"]
    }


def label_of(target: Target, row: Mapping[str, Any]) -> Any:
    """Return the label of a row of a target table: a number, a class, or time and event."""
    if isinstance(target, SurvivalTarget):
        return {"time": row["time"], "event": row["event"]}
    return target.classes[row["y"]] if isinstance(target, ClassificationTarget) else row["y"]


def _predictions(study: ViewedStudy, target: Target) -> dict[str, dict[str, Any]]:
    """Return the prediction of each slide: held out where there is one, else the champion's.

    Held-out predictions are those of the slide model on the champion's encoder, or on the first
    encoder with a model if the target has no champion [choice].
    """
    store = study.store
    found: dict[str, dict[str, Any]] = {}
    encoders = encoders_of(study, target.name)
    try:
        report = study.files.get(store.predictions_report, partial(_report_rows, store))
    except FileNotFoundError:  # before the first prediction
        report = {}
    for row in report.get(target.name, ()):
        if row["encoder"] in encoders:
            encoders = [row["encoder"]]
        for slide in row["slides"]:
            found[slide] = _prediction_of(target, row, row["encoder"], seen=row["in_training"])
    for encoder in encoders[:1]:
        key = ModelKey(encoder=encoder, target=target.name)
        for row in network_predictions(study, key).iter_rows(named=True):
            for slide in row["slides"]:
                found[slide] = _prediction_of(target, row, encoder, seen=False)
    return found


def _prediction_of(
    target: Target, row: Mapping[str, Any], encoder: str, *, seen: bool
) -> dict[str, Any]:
    columns = kind_of(target).prediction_columns
    known = row.get("y")
    result: dict[str, Any] = {"encoder": encoder, "seen": seen}
    if isinstance(target, ClassificationTarget):
        best = max(range(len(columns)), key=lambda k: row[columns[k]])
        result |= {"class": target.classes[best], "value": row[columns[best]]}
        if known is not None:
            result["error"] = 1 - row[columns[known]]
    else:
        result["value"] = row[columns[0]]
        if known is not None:
            result["error"] = row[columns[0]] - known
    return result


def _report_rows(store: Store) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in pl.read_parquet(store.predictions_report, glob=False).iter_rows(named=True):
        rows.setdefault(row["target"], []).append(row)
    return rows

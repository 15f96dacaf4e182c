"""The cohort file: the slides, patch tasks, encoders and targets of a study.

One ``cohort.yaml`` describes a study. :func:`load_cohort` validates it and makes paths absolute;
relative paths are relative to the folder of the file. An error names the file, the line and the
field.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_origin

from pydantic import Field, PrivateAttr, TypeAdapter, ValidationError, model_validator

from nic_core.cohort.encoders import (
    EncoderEntry,
    EncoderSpec,
    FeaturesEncoder,
    ImportedEncoder,
    RegisteredEncoder,
    ReusedEncoder,
)
from nic_core.cohort.external import ExternalCohort
from nic_core.cohort.fields import CohortError, Entry, FieldErrors, Location, Name, UserPath, find
from nic_core.cohort.geometry import Geometry, check_stride
from nic_core.cohort.patch_tasks import PatchTask
from nic_core.cohort.presets import PRESETS
from nic_core.cohort.problems import Problem, Source, field_problems
from nic_core.cohort.references import missing_columns, wrong_references
from nic_core.cohort.settings import Automation, Settings
from nic_core.cohort.slides import Slides
from nic_core.cohort.targets import ProbabilityMap, Target

COHORT_VARIABLE = "NIC_COHORT"
DEFAULT_COHORT = Path("data/demo/cohort.yaml")


class Cohort(Entry):
    """A validated ``cohort.yaml``; see ``docs/how-to/cohort-file.md`` for a commented example."""

    name: Name
    slides: Slides
    labels: UserPath | None = Field(
        default=None,
        description="label table, CSV or parquet, with a column `slide` or `patient`",
    )
    patch_tasks: tuple[PatchTask, ...] = ()
    encoders: tuple[EncoderEntry, ...]
    targets: tuple[Target, ...] = ()
    maps: tuple[ProbabilityMap, ...] = ()
    external: tuple[ExternalCohort, ...] = Field(
        default=(), description="cohorts of other hospitals that the slide models are tested on"
    )
    settings: Settings = Settings()
    automation: Automation | None = Field(
        default=Automation(), description="null: nothing is materialized automatically"
    )

    _source: Source | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _references_lead_somewhere(self) -> Self:
        problems = list(wrong_references(self.model_dump()))
        if not self.encoders:
            problems.append((("encoders",), "give at least one encoder"))
        if problems:
            raise FieldErrors(problems)
        for position, encoder in enumerate(self.encoders):
            try:
                geometry = self.geometry(encoder.name)
                check_stride(encoder.name, geometry)
                if isinstance(encoder, EncoderSpec):
                    encoder.check_patch(geometry.patch)
            except ValueError as error:
                problems.append((("encoders", position), str(error)))
        problems += self._maps_at_another_mpp()
        if problems:
            raise FieldErrors(problems)
        return self

    def _maps_at_another_mpp(self) -> Iterator[tuple[Location, str]]:
        """Yield the maps whose encoder saw their task at another um/px than that of its grids."""
        for position, item in enumerate(self.maps):
            grid = self.geometry(item.encoder).mpp
            seen = self.task_geometry(item.encoder, item.task).mpp
            if grid != seen:
                entry = self.encoder(item.encoder)
                base = entry.encoder if isinstance(entry, ReusedEncoder) else entry.name
                yield (
                    ("maps", position, "encoder"),
                    f"encoder '{base}' saw the patches of task '{item.task}' at {seen:g} um/px, "
                    f"but the grids of '{item.encoder}' are at {grid:g}; add an encoder with "
                    f"'objective: reused', 'encoder: {base}' and 'mpp: {seen:g}', and name it here",
                )

    @property
    def file(self) -> Path | None:
        """The cohort file; None for a cohort that was not read from one."""
        return None if self._source is None else self._source.file

    def place(self, *location: str | int) -> str:
        """Return ``file:line: field`` of a field, to begin a message; without a file, the field."""
        if self._source is None:
            return ".".join(map(str, location))
        return self._source.problem(location, "").place

    def check_label_columns(self, target: Target, columns: Sequence[str]) -> None:
        """Check that the label table has the columns that a target names.

        Parameters
        ----------
        columns
            Columns of the label table.

        Raises
        ------
        CohortError
            It lacks a column; a line per reference.
        """
        assert self.labels is not None  # its columns are given
        wrong = [
            f"{self._target_place(target, *field)}: {message}"
            for field, message in missing_columns(target.model_dump(), self.labels, columns)
        ]
        if wrong:
            raise CohortError("\n".join(wrong))

    def _target_place(self, target: Target, *field: str | int) -> str:
        for position, entry in enumerate(self.targets):
            if entry.name == target.name:
                return self.place("targets", position, *field)
        return f"target '{target.name}': {'.'.join(map(str, field))}"

    def encoder(
        self, name: str
    ) -> EncoderSpec | FeaturesEncoder | ImportedEncoder | RegisteredEncoder | ReusedEncoder:
        """Return the entry of an encoder.

        Raises
        ------
        CohortError
            The cohort has no such encoder.
        """
        return find("encoder", name, self.encoders)

    def geometry(self, encoder: str) -> Geometry:
        """Return the patch size, um/px and stride of an encoder.

        Those of its entry; where it states none, of its preset or network, else of the settings.

        Raises
        ------
        CohortError
            The cohort has no such encoder.
        """
        entry = self.encoder(encoder)
        patch, mpp = self.settings.patch, self.settings.mpp
        if isinstance(entry, ReusedEncoder):
            base = self.geometry(entry.encoder)
            return Geometry(base.patch, entry.mpp or base.mpp, entry.stride or base.patch)
        if isinstance(entry, ImportedEncoder):
            network = PRESETS[entry.preset].network if entry.preset else entry.network
            if network is not None:
                patch, mpp = network.patch, network.mpp
        patch = entry.patch or patch
        return Geometry(patch, entry.mpp or mpp, entry.stride or patch)

    @property
    def networks(self) -> tuple[EncoderEntry, ...]:
        """The encoders that have a network: all but those of objective ``features``."""
        return tuple(entry for entry in self.encoders if not isinstance(entry, FeaturesEncoder))

    @property
    def seen_patch_tasks(self) -> tuple[PatchTask, ...]:
        """The patch tasks that an encoder is trained or probed on: none without a network."""
        return self.patch_tasks if self.networks else ()

    @property
    def geometries(self) -> dict[str, Geometry]:
        """Every geometry that slides are divided by, by name, in the order of the encoders.

        Those of the encoders that have a network; of all, if none has.
        """
        found = (self.geometry(encoder.name) for encoder in self.networks or self.encoders)
        return {geometry.name: geometry for geometry in found}

    def geometry_named(self, name: str) -> Geometry:
        """Return a geometry of an encoder by its name; raises CohortError if none has it."""
        if name not in self.geometries:
            raise CohortError(
                f"no encoder of the cohort has the geometry '{name}'; they have "
                f"{', '.join(self.geometries)}"
            )
        return self.geometries[name]

    def task_geometry(self, encoder: str, task: str) -> Geometry:
        """Return the patch size and um/px at which an encoder sees the patches of a patch task.

        Those of a reused encoder are those of its training. The patches of a task do not overlap,
        whatever the encoder's stride.
        """
        entry = self.encoder(encoder)
        own = self.geometry(entry.encoder if isinstance(entry, ReusedEncoder) else encoder)
        return Geometry(own.patch, self.patch_task(task).train_mpp or own.mpp, own.patch)

    @property
    def task_geometries(self) -> dict[str, dict[str, Geometry]]:
        """Every geometry that a patch task is cut at: task to name to geometry."""
        found: dict[str, dict[str, Geometry]] = {task.name: {} for task in self.patch_tasks}
        for task, geometries in found.items():
            for encoder in self.networks:
                geometry = self.task_geometry(encoder.name, task)
                geometries[geometry.name] = geometry
        return found

    def tasks_of(self, encoder: str) -> tuple[str, ...]:
        """Return the patch tasks of this cohort for which an encoder has classification heads."""
        entry = self.encoder(encoder)
        return self.tasks_of(entry.encoder) if isinstance(entry, ReusedEncoder) else entry.tasks

    def with_encoder(self, entry: EncoderEntry) -> Self:
        """Return a copy in which ``entry`` replaces the encoder of the same name."""
        replaced = (entry if old.name == entry.name else old for old in self.encoders)
        return self.model_copy(update={"encoders": tuple(replaced)})

    def patch_task(self, name: str) -> PatchTask:
        """Return the entry of a patch task; raises CohortError if it does not exist."""
        return find("patch task", name, self.patch_tasks)

    def target(self, name: str) -> Target:
        """Return the entry of a target; raises CohortError if it does not exist."""
        return find("target", name, self.targets)

    def external_cohort(self, name: str) -> ExternalCohort:
        """Return the entry of an external cohort; raises CohortError if it does not exist."""
        return find("external cohort", name, self.external)

    def probability_map(self, name: str) -> ProbabilityMap:
        """Return the entry of a probability map; raises CohortError if it does not exist."""
        return find("map", name, self.maps)


def cohort_path() -> Path:
    """Return the path of the cohort file: ``$NIC_COHORT``, else ``data/demo/cohort.yaml``."""
    return Path(os.environ.get(COHORT_VARIABLE) or DEFAULT_COHORT)


def load_cohort(path: Path | None = None) -> Cohort:
    """Read and validate a cohort file (default: :func:`cohort_path`).

    Raises
    ------
    CohortError
        The file is missing, is not YAML, or a field is wrong. The message has a line per problem:
        ``file:line: field: problem``.
    """
    source = read_cohort_file(path)
    if problems := cohort_problems(source):
        raise CohortError("\n".join(map(str, problems)))
    cohort = Cohort.model_validate(source.data, context=_context(source))
    cohort._source = source
    return cohort


def read_cohort_file(path: Path | None = None) -> Source:
    """Read a cohort file (default: :func:`cohort_path`) without validating it.

    Raises
    ------
    CohortError
        The file is missing, or is not YAML.
    """
    path = cohort_path() if path is None else path
    try:
        return Source.read(path)
    except OSError as error:
        raise CohortError(
            f"{path}: cannot read the cohort file ({error.strerror}); "
            f"set {COHORT_VARIABLE} to the path of your file, or run `nic init FOLDER` to write "
            "one for the slides in a folder, or `make demo` to create the demo cohort"
        ) from error
    except UnicodeDecodeError as error:
        raise CohortError(
            f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error


def cohort_problems(source: Source) -> list[Problem]:
    """Return every problem of a cohort file, by line; none if it is valid."""
    problems = list(source.repeated_keys())
    try:
        Cohort.model_validate(source.data, context=_context(source))
    except ValidationError as error:
        details = error.errors()
        found = [item for detail in details for item in field_problems(detail, Cohort)]
        # the references are validated last, and only if every entry is valid
        if all(detail["loc"] for detail in details):
            found += wrong_references(source.data)
        problems += [source.problem(location, message) for location, message in found]
    return sorted(problems, key=lambda problem: problem.line)


def valid_part(source: Source) -> Cohort | None:
    """Return a cohort of the valid entries of a file; None if `slides` is not valid.

    For checks that report more than the first problem. Its references may lead nowhere.
    """
    data = source.data if isinstance(source.data, Mapping) else {}
    part: dict[str, Any] = {"name": source.file.stem, "slides": None, "encoders": ()}
    for name, field in Cohort.model_fields.items():
        if name not in data:
            continue
        adapter: TypeAdapter[Any] = TypeAdapter(field.annotation)
        given = data[name]
        # the entries of a list are validated one by one
        listed = isinstance(given, list) and get_origin(field.annotation) is tuple
        values = [[entry] for entry in given] if listed else [given]
        valid = []
        for value in values:
            try:
                valid.append(adapter.validate_python(value, context=_context(source)))
            except ValidationError:  # `cohort_problems` reports it
                continue
        if listed:
            part[name] = tuple(entry for entries in valid for entry in entries)
        elif valid:
            part[name] = valid[0]
    if part["slides"] is None:
        return None
    cohort = Cohort.model_construct(**part)
    cohort._source = source
    return cohort


def _context(source: Source) -> dict[str, Any]:
    return {"base": source.file.resolve().parent}

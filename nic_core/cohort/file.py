"""The cohort file: which slides, patch tasks, encoders and targets make a study.

One ``cohort.yaml`` describes a study. :func:`load_cohort` validates it and makes every relative path
absolute (relative paths are relative to the file). An error names the file, the line and the field.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from nic_core.cohort.encoders import (
    EncoderEntry,
    EncoderSpec,
    ImportedEncoder,
    RegisteredEncoder,
)
from nic_core.cohort.fields import (
    CohortError,
    Entry,
    Name,
    UserPath,
    check_known,
    find,
    no_duplicates,
)
from nic_core.cohort.patch_tasks import PatchTask
from nic_core.cohort.settings import Automation, Settings
from nic_core.cohort.slides import Slides
from nic_core.cohort.targets import ProbabilityMap, Target

COHORT_VARIABLE = "NIC_COHORT"
DEFAULT_COHORT = Path("data/demo/cohort.yaml")


class Cohort(Entry):
    """A validated ``cohort.yaml``; see ``docs/cohort.md`` for a commented example."""

    name: Name
    slides: Slides
    labels: UserPath | None = Field(
        default=None, description="CSV or parquet keyed by `slide` or `patient`"
    )
    patch_tasks: tuple[PatchTask, ...] = ()
    encoders: tuple[EncoderEntry, ...]
    targets: tuple[Target, ...] = ()
    maps: tuple[ProbabilityMap, ...] = ()
    settings: Settings = Settings()
    automation: Automation | None = Automation()

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        for field in ("patch_tasks", "encoders", "targets", "maps"):
            no_duplicates(field, [item.name for item in getattr(self, field)])
        if not self.encoders:
            raise ValueError("name at least one encoder under 'encoders'")
        tasks = [task.name for task in self.patch_tasks]
        for encoder in self.encoders:
            for task in encoder.tasks:
                check_known(f"encoder '{encoder.name}': patch task", task, tasks)
            if isinstance(encoder, EncoderSpec):
                encoder.check_patch(self.settings.patch)
        encoders = {encoder.name: encoder for encoder in self.encoders}
        for m in self.maps:
            check_known(f"map '{m.name}': encoder", m.encoder, list(encoders))
            check_known(
                f"map '{m.name}': task of encoder '{m.encoder}'", m.task, encoders[m.encoder].tasks
            )
        if self.targets and self.labels is None:
            raise ValueError("targets need a 'labels' table")
        return self

    def encoder(self, name: str) -> EncoderSpec | ImportedEncoder | RegisteredEncoder:
        """The encoder of that name; raises :class:`CohortError` with the known ones."""
        return find("encoder", name, self.encoders)

    def with_encoder(self, entry: EncoderEntry) -> Self:
        """This cohort with another entry for the encoder of that name."""
        changed = (entry if known.name == entry.name else known for known in self.encoders)
        return self.model_copy(update={"encoders": tuple(changed)})

    def patch_task(self, name: str) -> PatchTask:
        return find("patch task", name, self.patch_tasks)

    def target(self, name: str) -> Target:
        return find("target", name, self.targets)

    def probability_map(self, name: str) -> ProbabilityMap:
        return find("map", name, self.maps)


def cohort_path() -> Path:
    """The cohort file in force: ``$NIC_COHORT``, else ``data/demo/cohort.yaml``."""
    return Path(os.environ.get(COHORT_VARIABLE) or DEFAULT_COHORT)


def load_cohort(path: Path | None = None) -> Cohort:
    """Read and validate a cohort file (default: :func:`cohort_path`).

    Raises
    ------
    CohortError
        The file is missing, is no YAML, or a field is wrong; one line a problem, each as
        ``file:line: field: what is wrong``.
    """
    path = cohort_path() if path is None else path
    try:
        text = path.read_text()
    except OSError as error:
        raise CohortError(
            f"{path}: cannot read the cohort file ({error.strerror}); "
            f"set {COHORT_VARIABLE} to yours, or run `make demo` for the demo cohort"
        ) from error
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CohortError(f"{path}: not valid YAML: {error}") from error
    try:
        return Cohort.model_validate(data, context={"base": path.resolve().parent})
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            line, field = _place(tree, problem)
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{path}:{line}: {field}: {message}")
        raise CohortError("\n".join(lines)) from error


def _place(node: yaml.Node | None, problem: ErrorDetails) -> tuple[int, str]:
    """Line of the deepest YAML node on the way to a pydantic error, and the field's name."""
    location = problem["loc"]
    if problem["type"] == "union_tag_invalid":
        location = (*location, problem["ctx"]["discriminator"].strip("'"))
    line, field = 1, []
    for step in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == step), None)
            # a discriminated union adds its tag to the location: it has no node of its own
            if pair is None:
                continue
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            node = node.value[step]
            line = node.start_mark.line + 1
        field.append(str(step))
    if problem["type"] == "missing":
        field.append(str(location[-1]))
    return line, ".".join(field) or "cohort"

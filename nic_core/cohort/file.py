"""The cohort file: the slides, patch tasks, encoders and targets of a study.

One ``cohort.yaml`` describes a study. :func:`load_cohort` validates it and makes paths absolute;
relative paths are relative to the folder of the file. An error names the file, the line and the
field.
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
    check_defined,
    check_unique,
    find,
)
from nic_core.cohort.patch_tasks import PatchTask
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
    settings: Settings = Settings()
    automation: Automation | None = Field(
        default=Automation(), description="null: nothing is materialized automatically"
    )

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        for field in ("patch_tasks", "encoders", "targets", "maps"):
            check_unique(field, [entry.name for entry in getattr(self, field)])
        if not self.encoders:
            raise ValueError("give at least one encoder under 'encoders'")
        tasks = [task.name for task in self.patch_tasks]
        for encoder in self.encoders:
            for task in encoder.tasks:
                check_defined(f"encoder '{encoder.name}': patch task", task, tasks)
            if isinstance(encoder, EncoderSpec):
                encoder.check_patch(self.settings.patch)
        encoders = {encoder.name: encoder for encoder in self.encoders}
        for m in self.maps:
            check_defined(f"map '{m.name}': encoder", m.encoder, list(encoders))
            check_defined(
                f"map '{m.name}': task of encoder '{m.encoder}'", m.task, encoders[m.encoder].tasks
            )
        if self.targets and self.labels is None:
            raise ValueError("targets need a label table: give 'labels'")
        return self

    def encoder(self, name: str) -> EncoderSpec | ImportedEncoder | RegisteredEncoder:
        """Return the entry of an encoder.

        Raises
        ------
        CohortError
            The cohort has no such encoder.
        """
        return find("encoder", name, self.encoders)

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
    path = cohort_path() if path is None else path
    try:
        text = path.read_text()
    except OSError as error:
        raise CohortError(
            f"{path}: cannot read the cohort file ({error.strerror}); "
            f"set {COHORT_VARIABLE} to the path of your file, or run `make demo` to create the "
            "demo cohort"
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
            line, field = _locate(tree, problem)
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{path}:{line}: {field}: {message}")
        raise CohortError("\n".join(lines)) from error


def _locate(node: yaml.Node | None, problem: ErrorDetails) -> tuple[int, str]:
    """Line of the deepest YAML node on the path to a pydantic error, and the name of the field."""
    location = problem["loc"]
    if problem["type"] == "union_tag_invalid":
        location = (*location, problem["ctx"]["discriminator"].strip("'"))
    line, field = 1, []
    for step in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == step), None)
            # a discriminated union adds its tag to the location, which has no YAML node
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

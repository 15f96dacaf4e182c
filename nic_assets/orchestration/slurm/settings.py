"""The settings file of Slurm, which ``NIC_SLURM`` names: what a job of a step asks for.

::

    gpu: {partition: gpu, gres: "gpu:1", cpus: 8, memory: 32G, time: "1-00:00:00"}
    cpu: {partition: cpu, cpus: 4, memory: 8G, time: "12:00:00"}
    account: pathology
    partitions_per_job: 32

A step's own tag ``nic/slurm`` (a mapping with fields of :class:`Resources`) replaces single fields.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
from pydantic import BeforeValidator, Field, ValidationError

from nic_core.cohort import CohortError
from nic_core.cohort.fields import Entry, UserPath
from nic_core.cohort.problems import Source, field_problems
from nic_core.store import Store

SETTINGS_VARIABLE = "NIC_SLURM"
RESOURCES_TAG = "nic/slurm"


def _dagster_storage() -> Path:
    named = os.environ.get("NIC_DAGSTER_STORAGE")
    return Path(named).resolve() if named else Store.from_environment().root / "dagster"


def _text(value: object) -> object:
    if isinstance(value, int):
        raise ValueError(
            'write it in quotes, like "12:00:00" or "1-00:00:00": YAML reads 12:00:00 without '
            "quotes as a number"
        )
    return value


Time = Annotated[
    str, BeforeValidator(_text), Field(pattern=r"^(\d+-)?\d+(:[0-5]\d){0,2}$|^(?i:infinite)$")
]
"""A time limit as sbatch reads it: minutes, ``hours:minutes:seconds``, ``days-hours``, ..."""
Memory = Annotated[str, Field(pattern=r"^[1-9]\d*[KMGT]$")]


class Resources(Entry):
    """What the job of a step asks for; a field that is not set is left to Slurm's defaults.

    Attributes
    ----------
    partition, account
        As in ``sbatch``.
    gres
        Generic resources, for example ``gpu:1`` or ``gpu:a100:1``.
    cpus
        Cores of the step, which are also its number of threads.
    memory
        Of the node, with its unit: ``32G``.
    time
        Time limit, in quotes: ``"12:00:00"``, ``"2-00:00:00"``.
    options
        Further options of ``sbatch``, for example ``["--qos=long"]``.
    """

    partition: str | None = None
    account: str | None = None
    gres: str | None = None
    cpus: int = Field(default=1, ge=1)
    memory: Memory | None = None
    time: Time | None = None
    options: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """Return the options of ``sbatch``."""
        named = {
            "partition": self.partition,
            "account": self.account,
            "gres": self.gres,
            "cpus-per-task": self.cpus,
            "mem": self.memory,
            "time": self.time,
        }
        found = [f"--{name}={value}" for name, value in named.items() if value is not None]
        return [*found, *self.options]


class SlurmSettings(Entry):
    """The fields of the settings file.

    Attributes
    ----------
    gpu, cpu
        Resources of GPU-bound and of CPU-bound steps. GPU-bound steps ask for ``gres: "gpu:1"``
        unless the file says otherwise.
    account
        Account of all jobs, unless ``gpu`` or ``cpu`` has its own.
    partitions_per_job
        Most partitions of an asset (slides, grids) in one job: a larger batch is split.
    logs
        Folder of the jobs' logs, on a disk that all nodes share. Default: ``slurm`` beside
        Dagster's records (``$NIC_DAGSTER_STORAGE``).
    poll_seconds
        Time between two questions to Slurm about the state of a running job.
    """

    gpu: Resources = Resources()
    cpu: Resources = Resources()
    account: str | None = None
    partitions_per_job: int = Field(default=32, ge=1)
    logs: UserPath = Field(default_factory=lambda: _dagster_storage() / "slurm")
    poll_seconds: int = Field(default=15, ge=1)

    def resources(self, *, gpu_bound: bool, tag: str | None = None) -> Resources:
        """Return the resources of a step.

        Parameters
        ----------
        gpu_bound
            Whether the step is tagged as GPU-bound.
        tag
            The step's own tag :data:`RESOURCES_TAG`, a JSON object.

        Raises
        ------
        ValueError
            The tag is not such an object; the message names the field.
        """
        fields: dict[str, Any] = {"account": self.account}
        if gpu_bound:
            fields["gres"] = "gpu:1"
        fields |= (self.gpu if gpu_bound else self.cpu).model_dump(exclude_unset=True)
        if tag is None:
            return Resources(**fields)
        try:
            own = Resources.model_validate(json.loads(tag))
        except json.JSONDecodeError as error:
            raise ValueError(f"tag {RESOURCES_TAG}: not JSON ({error})") from error
        except ValidationError as error:
            raise ValueError(f"tag {RESOURCES_TAG}: {_first_problem(error)}") from error
        return Resources(**{**fields, **own.model_dump(exclude_unset=True)})


def load_slurm_settings(environment: Mapping[str, str] = os.environ) -> SlurmSettings:
    """Read the settings file that ``$NIC_SLURM`` names.

    Raises
    ------
    dagster.DagsterInvalidDefinitionError
        The variable is not set, the file cannot be read, or a field is wrong. A line for each
        problem: ``file:line: field: problem``.
    """
    path = environment.get(SETTINGS_VARIABLE)
    if not path:
        raise dg.DagsterInvalidDefinitionError(
            f"NIC_EXECUTOR is 'slurm', but {SETTINGS_VARIABLE} is not set; set it to the path of "
            "the settings file of Slurm (examples/slurm/slurm.yaml is one)"
        )
    try:
        source = Source.read(Path(path))
    except OSError as error:
        raise dg.DagsterInvalidDefinitionError(
            f"{path}: cannot read the settings file of Slurm ({error.strerror}); set "
            f"{SETTINGS_VARIABLE} to its path"
        ) from error
    except (CohortError, UnicodeDecodeError) as error:
        raise dg.DagsterInvalidDefinitionError(f"{path}: {error}") from error
    problems = list(source.repeated_keys())
    try:
        found = SlurmSettings.model_validate(
            {} if source.data is None else source.data,
            context={"base": source.file.resolve().parent},
        )
    except ValidationError as error:
        problems += [
            source.problem(location or ("settings",), message)
            for detail in error.errors()
            for location, message in field_problems(detail, SlurmSettings)
        ]
    if problems:
        raise dg.DagsterInvalidDefinitionError("\n".join(map(str, problems)))
    return found


def _first_problem(error: ValidationError) -> str:
    [(location, message), *_] = field_problems(error.errors()[0], Resources)
    return f"{'.'.join(map(str, location))}: {message}" if location else message

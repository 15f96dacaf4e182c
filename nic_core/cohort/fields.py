"""Field types and validators that every part of the cohort file uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo


class CohortError(ValueError):
    """The cohort file, or a table that it names, cannot be used as it is."""


def _resolve(path: Path, info: ValidationInfo) -> Path:
    base: Path = (info.context or {}).get("base", Path.cwd())
    path = path.expanduser()
    return path if path.is_absolute() else (base / path).resolve()


def _check_name(name: str) -> str:
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name[0] in ".-":
        raise ValueError(
            "a name becomes a folder and a partition key: use letters, digits, '-', '_' and '.'"
        )
    return name


def _check_task_name(name: str) -> str:
    # PyTorch joins the names of nested modules with dots, and a task names its head
    if "." in _check_name(name):
        raise ValueError("a patch task's name holds no '.'")
    return name


def _check_cron(text: str) -> str:
    if len(text.split()) != 5:
        raise ValueError("a cron schedule has five fields: '0 20 * * *' is every day at 20:00")
    return text


def _check_time_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise ValueError(f"'{name}' is no time zone; 'Europe/Amsterdam' is one") from error
    return name


UserPath = Annotated[Path, AfterValidator(_resolve)]
Cron = Annotated[str, AfterValidator(_check_cron)]
TimeZone = Annotated[str, AfterValidator(_check_time_zone)]
Name = Annotated[str, AfterValidator(_check_name)]
TaskName = Annotated[str, AfterValidator(_check_task_name)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NetworkName = Literal["published", "small", "mil"]


class Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _NamedItem(Protocol):
    @property
    def name(self) -> str: ...


_Named = TypeVar("_Named", bound=_NamedItem)


def no_duplicates(field: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{field}: name {twice} stands more than once")


def check_known(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"{what} '{name}' is not defined; known: {', '.join(known) or 'none'}")


def find(what: str, name: str, items: Sequence[_Named]) -> _Named:
    for item in items:
        if item.name == name:
            return item
    known = ", ".join(item.name for item in items) or "none"
    raise CohortError(f"no {what} '{name}' in the cohort; known: {known}")

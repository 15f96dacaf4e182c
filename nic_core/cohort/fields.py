"""Field types and helpers that all entries of the cohort file use."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import Annotated, Literal, Protocol, TypeAlias, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
)

from nic_core.slides.remote import RemotePath, SlidePath, slide_path

Location: TypeAlias = tuple[str | int, ...]
"""Place of a field in the cohort file: names of fields and positions in lists, from the top."""


class CohortError(ValueError):
    """The cohort file, or a table that it names, is missing or invalid."""


class FieldErrors(ValueError):
    """Several problems of one entry of the cohort file.

    Attributes
    ----------
    problems : sequence of (Location, str)
        The field of each problem, relative to the entry, and the message.
    """

    def __init__(self, problems: Sequence[tuple[Location, str]]) -> None:
        super().__init__("; ".join(message for _, message in problems))
        self.problems = problems


INVISIBLE = "\u00ad\u180e\u200b\u200c\u200d\u200e\u200f\u2060\ufeff" + "".join(
    map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A)))
)
"""Characters without width that :meth:`str.strip` leaves: zero width spaces, joiners, byte order
and direction marks. Copies from web pages and file dialogs contain them.
"""


def normalise(text: str) -> str:
    """``text`` in Unicode form NFC, without surrounding white space and invisible characters."""
    text = unicodedata.normalize("NFC", text)
    while (stripped := text.strip().strip(INVISIBLE)) != text:
        text = stripped
    return text


def _resolve(path: Path, info: ValidationInfo) -> Path:
    base: Path = (info.context or {}).get("base", Path.cwd())
    path = path.expanduser()
    return path if path.is_absolute() else (base / path).resolve()


def _resolve_slides(value: object, info: ValidationInfo) -> SlidePath:
    if not isinstance(value, str | PurePath):
        raise ValueError("a path or an address (s3://bucket/folder) is expected")
    place = slide_path(str(value))
    return place if isinstance(place, RemotePath) else _resolve(place, info)


def _check_name(name: str) -> str:
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name[0] in ".-":
        raise ValueError(
            "a name becomes a folder and a partition key: use letters, digits, '-', '_' and '.', "
            "and do not start with '-' or '.'"
        )
    return name


def _check_task_name(name: str) -> str:
    # the head of a task is a PyTorch module of its name, and module names must not contain dots
    if "." in _check_name(name):
        raise ValueError("the name of a patch task must not contain '.'")
    return name


def _check_cron(text: str) -> str:
    if len(text.split()) != 5:
        raise ValueError("a cron schedule has five fields; '0 20 * * *' is every day at 20:00")
    return text


def _check_time_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise ValueError(
            f"'{name}' is not a time zone; write it like 'Europe/Amsterdam'"
        ) from error
    return name


UserPath = Annotated[Path, AfterValidator(_resolve)]
"""A path; a relative one is relative to the folder of the cohort file."""
UserSlidePath = Annotated[
    SlidePath,
    PlainValidator(_resolve_slides),
    PlainSerializer(str, when_used="json"),
    WithJsonSchema({"type": "string", "format": "path"}),
]
"""As :data:`UserPath`, or an address in an object store."""
Cron = Annotated[str, AfterValidator(_check_cron)]
TimeZone = Annotated[str, AfterValidator(_check_time_zone)]
Name = Annotated[str, AfterValidator(_check_name)]
TaskName = Annotated[str, AfterValidator(_check_task_name)]
Label = Annotated[str, AfterValidator(normalise)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NetworkName = Literal["published", "small", "local", "mil"]


class Entry(BaseModel):
    """Base class of the entries: immutable, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _NamedItem(Protocol):
    @property
    def name(self) -> str: ...


_Named = TypeVar("_Named", bound=_NamedItem)


def check_unique(field: str, names: Sequence[str]) -> None:
    """Raise ValueError if a name occurs more than once; ``field`` names the list in the error."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{field}: {repeated} occurs more than once")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'X'?`` if a known name is spelled like ``name``; else nothing."""
    lower = {other.lower(): other for other in known}
    near = get_close_matches(name.lower(), lower, n=1)
    return f"; did you mean '{lower[near[0]]}'?" if near else ""


def find(kind: str, name: str, entries: Sequence[_Named]) -> _Named:
    """Return the entry of a name.

    Raises
    ------
    CohortError
        No entry has this name. The message lists all names.
    """
    for entry in entries:
        if entry.name == name:
            return entry
    names = [entry.name for entry in entries]
    raise CohortError(
        f"{kind} '{name}' is not in the cohort; defined: {', '.join(names) or 'none'}"
        f"{did_you_mean(name, names)}"
    )

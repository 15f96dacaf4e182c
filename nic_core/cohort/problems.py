"""Problems of a cohort file: file, line, field, and a message with a suggestion."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic_core import ErrorDetails

from nic_core.cohort.fields import CohortError, Entry, FieldErrors, Location, did_you_mean


@dataclass(frozen=True)
class Problem:
    """One problem of a cohort file; ``str()`` is the line that users see.

    Attributes
    ----------
    file : Path
    line : int
        From 1.
    field : str
        Names and positions from the top, for example ``encoders.0.tasks.1``; empty for the file.
    message : str
        What is wrong and what to do.
    """

    file: Path
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"

    @property
    def place(self) -> str:
        """``file:line: field``."""
        return f"{self.file}:{self.line}: {self.field or 'cohort'}"


@dataclass(frozen=True)
class Source:
    """The text of a cohort file.

    Attributes
    ----------
    file : Path
    data : object
        The file as plain data.
    tree : yaml.Node or None
        The nodes of the YAML, which have lines; None for an empty file.
    """

    file: Path
    data: Any
    tree: yaml.Node | None

    @classmethod
    def read(cls, file: Path) -> Source:
        """Read a file.

        Raises
        ------
        CohortError
            It cannot be read, or is not YAML in UTF-8.
        """
        text = file.read_text(encoding="utf-8-sig")
        try:
            return cls(file, yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            reason = " ".join(filter(None, (error.context, error.problem)))
            raise CohortError(f"{file}:{line}: not valid YAML: {reason}") from error
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise CohortError(f"{file}: not valid YAML: {reason}") from error

    def problem(self, location: Location, message: str) -> Problem:
        """Return a problem with the line of the deepest node on the way to ``location``."""
        node, line = self.tree, 1
        for step in location:
            if isinstance(node, yaml.MappingNode):
                pairs = [(key, value) for key, value in node.value if key.value == str(step)]
                if not pairs:  # the field is missing
                    break
                key, node = pairs[-1]
                line = key.start_mark.line + 1
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
                node = node.value[step]
                line = node.start_mark.line + 1
        return Problem(self.file, line, ".".join(map(str, location)), message)

    def repeated_keys(self) -> Iterator[Problem]:
        """Yield the keys that a mapping has twice; YAML would silently use the last one."""
        seen: set[int] = set()
        waiting = [self.tree]
        while waiting:
            node = waiting.pop()
            if id(node) in seen:  # an alias of a node above
                continue
            seen.add(id(node))
            if isinstance(node, yaml.SequenceNode):
                waiting += node.value
            elif isinstance(node, yaml.MappingNode):
                keys: dict[str, int] = {}
                for key, value in node.value:
                    waiting.append(value)
                    line = key.start_mark.line + 1
                    if isinstance(key.value, str) and key.value in keys:
                        message = f"the key is also in line {keys[key.value]}; keep one"
                        yield Problem(self.file, line, key.value, message)
                    if isinstance(key.value, str):
                        keys[key.value] = line


def field_problems(error: ErrorDetails, entry: type[Entry]) -> Iterator[tuple[Location, str]]:
    """Yield location and message of the problems of one pydantic error.

    Parameters
    ----------
    entry
        The class that was validated.
    """
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":  # the last step is not a field
        above, classes = _walk(entry, error["loc"][:-1])
        location = (*above, error["loc"][-1])
    else:
        location, classes = _walk(entry, error["loc"])
    fields = list(dict.fromkeys(name for cls in classes for name in cls.model_fields))
    original = context.get("error")
    if isinstance(original, FieldErrors):
        for below, message in original.problems:
            yield (*location, *below), message
        return
    match kind:
        case "extra_forbidden":
            key = str(location[-1])
            message = f"unknown key '{key}'{did_you_mean(key, fields)}; known: {', '.join(fields)}"
        case "missing":
            message = f"required, but missing: add '{location[-1]}'"
        case "union_tag_not_found":
            tag = context["discriminator"].strip("'")
            location, message = (*location, tag), f"required, but missing: add '{tag}'"
        case "union_tag_invalid":
            location = (*location, context["discriminator"].strip("'"))
            message = _unknown_value(context["tag"], context["expected_tags"])
        case "literal_error":
            message = _unknown_value(value, context["expected"])
        case "model_type" | "model_attributes_type" | "dict_type":
            message = f"write keys with values ({', '.join(fields) or 'key: value'})"
        case "tuple_type":
            message = "write a list"
        case "path_type":
            message = "write a path"
        case "value_error":
            message = str(original)
        case _:
            shown = f", not {value!r}" if isinstance(value, str | int | float) else ""
            message = f"{error['msg'].replace('Tuple', 'List')}{shown}"
    yield location, message


def _unknown_value(value: object, expected: str) -> str:
    """``expected`` is pydantic's list of quoted values."""
    known = re.findall(r"'([^']*)'", expected)
    near = did_you_mean(str(value), known)
    return f"{value!r} is not allowed{near}; allowed: {', '.join(known)}"


def _walk(entry: type[Entry], location: Location) -> tuple[Location, list[type[Entry]]]:
    """Location without the tags of discriminated unions, which pydantic adds; classes there."""
    classes, path = [entry], []
    for step in location:
        if isinstance(step, str):
            below = [c for cls in classes if step in cls.model_fields for c in _classes(cls, step)]
            tagged = [cls for cls in classes if _has_tag(cls, step)]
            if tagged and not any(step in cls.model_fields for cls in classes):
                classes = tagged
                continue
            classes = below
        path.append(step)
    return tuple(path), classes


def _classes(entry: type[Entry], field: str) -> list[type[Entry]]:
    """The entry classes in the type of a field."""
    waiting, found = [entry.model_fields[field].annotation], []
    while waiting:
        annotation = waiting.pop(0)
        if isinstance(annotation, type) and issubclass(annotation, Entry):
            found.append(annotation)
        waiting += get_args(annotation)
    return found


def _has_tag(entry: type[Entry], tag: str) -> bool:
    return any(tag in get_args(field.annotation) for field in entry.model_fields.values())

"""References in a cohort file: from entry to entry, and from targets to the label table.

Entries are checked as plain data, so that all wrong references are found even if another entry is
invalid. Names that are not text, and entries that are not mappings, are left to the validation of
the entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from nic_core.cohort.fields import Location, did_you_mean
from nic_core.cohort.tables import visible

Found: TypeAlias = Iterator[tuple[Location, str]]
_LISTS = ("patch_tasks", "encoders", "targets", "maps", "external")
_NOT_REUSED = ("reused", "features")  # objectives of entries without weights of their own
_COLUMNS = ("column", "time", "event")  # fields of targets


def wrong_references(data: Mapping[str, Any]) -> Found:
    """Yield the field and the message of every reference that leads nowhere.

    Parameters
    ----------
    data
        The cohort file as plain data.
    """
    for field in _LISTS:
        seen: set[str] = set()
        for position, entry in _entries(data, field):
            name = entry.get("name")
            if isinstance(name, str):
                if name in seen:
                    yield (field, position, "name"), f"'{name}' occurs more than once; rename one"
                seen.add(name)
    tasks = _by_name(data, "patch_tasks")
    for position, encoder in _entries(data, "encoders"):
        for number, wanted in enumerate(_texts(encoder.get("tasks"))):
            if wanted not in tasks:
                message = _undefined("patch task", wanted, tasks)
                yield ("encoders", position, "tasks", number), message
    encoders = _by_name(data, "encoders")
    for position, encoder in _entries(data, "encoders"):
        base = encoder.get("encoder")
        if isinstance(base, str):
            others = [
                n for n, entry in encoders.items() if entry.get("objective") not in _NOT_REUSED
            ]
            if base not in others:
                message = _undefined("encoder that can be reused", base, others)
                yield ("encoders", position, "encoder"), message
    yield from _wrong_initial_weights(data, encoders)
    for position, entry in _entries(data, "maps"):
        name, task, label = (entry.get(field) for field in ("encoder", "task", "label"))
        if isinstance(name, str) and name not in encoders:
            yield ("maps", position, "encoder"), _undefined("encoder", name, encoders)
        elif isinstance(name, str) and isinstance(task, str):
            base = encoders[name].get("encoder")  # of an encoder that reuses another's heads
            with_heads = encoders.get(base, {}) if isinstance(base, str) else encoders[name]
            of_encoder = _texts(with_heads.get("tasks"))
            if task not in of_encoder:
                message = _undefined(f"task of encoder '{name}'", task, of_encoder)
                yield ("maps", position, "task"), message
            elif with_heads.get("embedding") == "pooled":
                yield (
                    ("maps", position, "encoder"),
                    f"encoder '{with_heads['name']}' has embedding 'pooled', but its heads take "
                    "the dense code; set 'embedding: both' or 'embedding: dense' there, or name "
                    "another encoder",
                )
            classes = _texts(tasks.get(task, {}).get("classes"))
            if classes and isinstance(label, str) and label not in classes:
                message = _undefined(f"class of patch task '{task}'", label, classes)
                yield ("maps", position, "label"), message
    if data.get("targets") and not data.get("labels"):
        yield ("targets",), "give the label table of the targets under 'labels'"
    if data.get("external") and not data.get("targets"):
        yield ("external",), "no target's model can be tested on them; give 'targets', or remove it"


def wrong_columns(data: Mapping[str, Any], labels: Path, columns: Sequence[str]) -> Found:
    """Yield the field and the message of every column of a target that ``labels`` does not have.

    Parameters
    ----------
    data
        The cohort file as plain data.
    labels, columns
        The label table and its columns.
    """
    for position, target in _entries(data, "targets"):
        for field, message in missing_columns(target, labels, columns):
            yield ("targets", position, *field), message


def missing_columns(target: Mapping[str, Any], labels: Path, columns: Sequence[str]) -> Found:
    """Yield the field and the message of every column of one target that ``labels`` lacks."""
    named: list[tuple[Location, object]] = [((field,), target.get(field)) for field in _COLUMNS]
    named += [
        (("covariates", position, "column"), covariate.get("column"))
        for position, covariate in _entries(target, "covariates")
    ]
    for field, name in named:
        if isinstance(name, str) and name not in columns:
            yield (
                field,
                f"label table {labels} has no column '{name}'{did_you_mean(name, columns)}; "
                f"it has {', '.join(map(visible, columns))}",
            )


def _wrong_initial_weights(
    data: Mapping[str, Any], encoders: Mapping[str, Mapping[str, Any]]
) -> Found:
    """Yield initial weights of encoders that do not exist, have none, or lead in a circle."""
    bases = {name: found[1] for name, entry in encoders.items() if (found := _base(entry))}
    for position, entry in _entries(data, "encoders"):
        found = _base(entry)
        if found is None or found[0] == "reused":  # a circle is reported once
            continue
        field, base = found
        place = ("encoders", position, "initial_weights", field)
        chain = _circle(str(entry.get("name")), bases)
        if chain is not None:
            yield (
                place,
                f"no encoder can start from itself: {' <- '.join(chain)}; start one of them from "
                "another encoder or file, or without 'initial_weights'",
            )
        elif field == "encoder" and base not in encoders:
            yield place, _undefined("encoder", base, encoders)
        elif field == "encoder" and encoders[base].get("objective") in ("mean_rgb", "features"):
            kind = encoders[base]["objective"]
            yield place, f"encoder '{base}' is {kind}, which has no weights; name another one"


def _base(encoder: Mapping[str, Any]) -> tuple[Literal["reused", "encoder", "version"], str] | None:
    """How an entry names the encoder of the study whose weights it uses, and that encoder.

    Either it reuses it, or it is a field of its initial weights. None without one. The alias
    ``candidate`` follows each training of the encoder that gives the registered model its name.
    """
    if isinstance(name := encoder.get("encoder"), str):
        return "reused", name
    start = encoder.get("initial_weights")
    if not isinstance(start, Mapping):
        return None
    if isinstance(name := start.get("encoder"), str):
        return "encoder", name
    model, _, alias = str(start.get("version")).partition("@")
    return ("version", model.removeprefix("encoder-")) if alias == "candidate" else None


def _circle(name: str, bases: Mapping[str, str]) -> list[str] | None:
    """The chain of encoders that leads from one back to itself; None if it does not."""
    chain = [name]
    while (base := bases.get(chain[-1])) is not None and base not in chain:
        chain.append(base)
    return [*chain, name] if base == name else None


def _undefined(kind: str, name: str, defined: Mapping[str, Any] | list[str]) -> str:
    known = ", ".join(defined) or "none"
    return f"{kind} '{name}' is not defined{did_you_mean(name, defined)}; defined: {known}"


def _entries(data: Mapping[str, Any], field: str) -> list[tuple[int, Mapping[str, Any]]]:
    """Positions and entries of a list, without what is not a mapping."""
    value = data.get(field)
    listed = value if isinstance(value, list | tuple) else ()
    return [(i, entry) for i, entry in enumerate(listed) if isinstance(entry, Mapping)]


def _by_name(data: Mapping[str, Any], field: str) -> dict[str, Mapping[str, Any]]:
    found = [entry for _, entry in _entries(data, field) if isinstance(entry.get("name"), str)]
    return {entry["name"]: entry for entry in found}


def _texts(value: object) -> list[str]:
    return (
        [item for item in value if isinstance(item, str)] if isinstance(value, list | tuple) else []
    )

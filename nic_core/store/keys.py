"""Keys of products that belong to two things: an encoder and a slide, a geometry and a slide.

A key prints as its parts joined by ``|``, in the alphabetical order of their names. That is also
the partition key of the product's asset. Parts are passed by name
(``GridKey(encoder=..., slide=...)``), so they cannot be swapped, and the type checker rejects a key
of another kind.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import Self

SEPARATOR = "|"


@dataclass(frozen=True, kw_only=True)
class _Key:
    @classmethod
    def parse(cls, text: str) -> Self:
        """The key that prints as ``text``.

        Raises
        ------
        ValueError
            ``text`` has another number of parts.
        """
        names = [field.name for field in fields(cls)]
        parts = text.split(SEPARATOR)
        if len(parts) != len(names):
            raise ValueError(f"'{text}' is no key of the form {SEPARATOR.join(names)}")
        return cls(**dict(zip(names, parts, strict=True)))

    def __str__(self) -> str:
        return SEPARATOR.join(astuple(self))


@dataclass(frozen=True, kw_only=True)
class PatchTableKey(_Key):
    """The patch table of a slide, for a geometry (:attr:`nic_core.cohort.Geometry.name`)."""

    geometry: str
    slide: str


@dataclass(frozen=True, kw_only=True)
class PatchTaskKey(_Key):
    """The patches of a patch task, in the patch size and um/px of a geometry."""

    geometry: str
    task: str


@dataclass(frozen=True, kw_only=True)
class GridKey(_Key):
    """The grid of a slide, made by an encoder."""

    encoder: str
    slide: str


@dataclass(frozen=True, kw_only=True)
class ModelKey(_Key):
    """The slide model of a target, on the grids of an encoder; also its explanation."""

    encoder: str
    target: str


@dataclass(frozen=True, kw_only=True)
class ExternalKey(_Key):
    """The evaluation of a target's model on an external cohort."""

    cohort: str
    target: str


@dataclass(frozen=True, kw_only=True)
class MapKey(_Key):
    """The probability map of a slide."""

    map: str
    slide: str


@dataclass(frozen=True, kw_only=True)
class PredictionKey(_Key):
    """The prediction of a slide by the champion of a target, whose name is the target's."""

    champion: str
    slide: str

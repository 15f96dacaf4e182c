"""Regions that a person draws on a slide: checked, and saved as files that patch tasks read.

The folder of ``nic view --annotate`` gets

- ``<slide>.geojson``: the regions of a slide as QuPath annotations, level-0 px;
- ``annotated.csv``: a row for each slide with regions, the table of a patch task's source
  ``slides`` (:class:`nic_core.cohort.patch_tasks.AnnotatedSlides`);
- ``versions/<slide>.<number>.geojson``: what was saved before;
- ``saved.json``: the digest of each file as it was saved. A file with another digest was written
  or changed by someone else, and is never replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import polars as pl
import shapely
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from nic_core.cohort.fields import normalise
from nic_core.slides import SlideError
from nic_core.store import StoreError, atomic_file, exclusive_lock
from nic_core.tiling.annotations import ORIGIN_MEMBER, read_annotations
from nic_core.view.errors import ViewError
from nic_core.view.slides import OpenSlides
from nic_core.view.study import ViewedStudy

TABLE, SAVED, VERSIONS = "annotated.csv", "saved.json", "versions"
MAX_BODY = 4 << 20  # bytes of a request
MAX_REGIONS, MAX_VERTICES = 2000, 10_000  # of a slide; of a region
MAX_LABEL = 80  # characters
NEW = ""
"""The version of a slide without regions."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Polygon(_Strict):
    type: Literal["Polygon"]
    # one ring: what is drawn has no holes
    coordinates: list[list[tuple[FiniteFloat, FiniteFloat]]] = Field(min_length=1, max_length=1)


class _Class(_Strict):
    name: str


class _Properties(_Strict):
    objectType: Literal["annotation"]
    classification: _Class


class _Feature(_Strict):
    type: Literal["Feature"]
    geometry: _Polygon
    properties: _Properties


class _Regions(_Strict):
    """The regions of a slide as the page sends them, with the version that it had read."""

    version: str = Field(max_length=64)
    features: list[_Feature] = Field(max_length=MAX_REGIONS)


def read_regions(study: ViewedStudy, folder: Path, slide: str) -> dict[str, Any]:
    """Return the saved regions of a slide: ``version`` and ``features``.

    Raises
    ------
    ViewError
        404: no such slide. 409: the file is not as this viewer saved it.
    """
    study.row(slide)
    path = folder / f"{slide}.geojson"
    content = _own_content(path, _digests(folder))
    if content is None:
        return {"version": NEW, "features": []}
    return {"version": _digest(content), "features": json.loads(content)["features"]}


def save_regions(
    study: ViewedStudy, slides: OpenSlides, folder: Path, slide: str, body: bytes
) -> dict[str, Any]:
    """Save all regions of a slide; return what :func:`read_regions` returns.

    Parameters
    ----------
    body : bytes
        JSON: ``version`` as it was read, and ``features``: GeoJSON polygons of one ring in level-0
        px, with ``properties`` ``{"objectType": "annotation", "classification": {"name": LABEL}}``.

    Raises
    ------
    ViewError
        400: the request is not valid, or a region is not a simple polygon on the slide. 409: the
        regions changed since they were read, or a file in the way was not saved by this viewer.
        507: the folder cannot be written. Others: :meth:`~nic_core.view.slides.OpenSlides.get`.
    """
    sent = _parsed(body)
    with slides.get(slide) as entry:
        features = [
            _checked(number, feature, entry.slide.width, entry.slide.height)
            for number, feature in enumerate(sent.features, start=1)
        ]
    collection = {"type": "FeatureCollection", ORIGIN_MEMBER: "level0", "features": features}
    content = (json.dumps(collection, ensure_ascii=False) + "\n").encode()
    path = folder / f"{slide}.geojson"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder / SAVED):
            digests = _digests(folder)
            old = _own_content(path, digests)
            if sent.version != (NEW if old is None else _digest(old)):
                raise ViewError(
                    409,
                    f"the regions of slide '{slide}' changed since this page read them",
                    "load the page again, and draw the region again",
                )
            _own_content(folder / TABLE, digests)
            if old is not None:
                _keep_version(folder, slide, old)
            # first the digests: after a crash the file is the old one, whose digest is kept too
            digests[path.name] = [*digests.get(path.name, [])[-1:], _digest(content)]
            _write_digests(folder, digests)
            _write(path, content)
            table = _table(study, folder, digests)
            digests[TABLE] = [*digests.get(TABLE, [])[-1:], _digest(table)]
            _write_digests(folder, digests)
            _write(folder / TABLE, table)
    except (StoreError, OSError) as error:
        raise ViewError(
            507,
            "the region was not saved: the folder of the annotations cannot be written",
            "free the disk or correct the rights of the folder, and save again",
        ) from error
    return {"version": _digest(content), "features": features}


def _parsed(body: bytes) -> _Regions:
    try:
        return _Regions.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise ViewError(
            400, f"{place}: {first['msg']}", "send the regions of a slide as GeoJSON polygons"
        ) from error


def _checked(number: int, feature: _Feature, width: int, height: int) -> dict[str, Any]:
    """Return a region as it is saved; raise ViewError if it is no simple polygon on the slide."""

    def refuse(problem: str, remedy: str) -> ViewError:
        return ViewError(400, f"region {number} {problem}", remedy)

    label = normalise(feature.properties.classification.name).strip()
    if not label or len(label) > MAX_LABEL or not label.isprintable():
        raise refuse("has no valid label", f"give a label of 1 to {MAX_LABEL} printed characters")
    [ring] = feature.geometry.coordinates
    if not 4 <= len(ring) <= MAX_VERTICES or ring[0] != ring[-1]:
        raise refuse("is not a closed ring", f"give 3 to {MAX_VERTICES - 1} corners")
    if not all(0 <= x <= width and 0 <= y <= height for x, y in ring):
        raise refuse("leaves the slide", "draw it inside the slide")
    shape = shapely.Polygon(ring)
    if not shape.is_valid or shape.area < 1:
        raise refuse(
            "crosses itself or has no area", "draw it again so that its edges do not cross"
        )
    # outer rings counter-clockwise with y upwards, as GeoJSON requires
    outline = shapely.geometry.polygon.orient(shape).exterior.coords
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [[list(point) for point in outline]]},
        "properties": {"objectType": "annotation", "classification": {"name": label}},
    }


def _digests(folder: Path) -> dict[str, list[str]]:
    """Digests of each file: that of the last save, before it that of the one before."""
    path = folder / SAVED
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
        return {str(name): list(map(str, digests)) for name, digests in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ViewError(
            409,
            f"'{SAVED}' in the folder of the annotations is damaged",
            "restore it, or annotate into another folder",
        ) from error


def _own_content(path: Path, digests: Mapping[str, list[str]]) -> bytes | None:
    """Content of a file that this viewer saved; None if it does not exist.

    A symbolic link is never followed.
    """
    if not os.path.lexists(path):
        return None
    content = None if path.is_symlink() or not path.is_file() else path.read_bytes()
    if content is None or _digest(content) not in digests.get(path.name, ()):
        raise ViewError(
            409,
            f"'{path.name}' in the folder of the annotations was written or changed by another "
            "program",
            "move it away, or annotate into another folder",
        )
    return content


def _keep_version(folder: Path, slide: str, content: bytes) -> None:
    versions = folder / VERSIONS
    versions.mkdir(exist_ok=True)
    number = 1
    while (path := versions / f"{slide}.{number}.geojson").exists():
        number += 1
    _write(path, content)


def _table(study: ViewedStudy, folder: Path, digests: Mapping[str, list[str]]) -> bytes:
    """Return the table of the slides with regions, as CSV."""
    rows = []
    for slide, row in sorted(study.index().items()):
        path = folder / f"{slide}.geojson"
        if path.name not in digests or not path.exists():
            continue
        try:
            regions = read_annotations(path).regions
        except SlideError as error:
            raise ViewError(409, f"'{path.name}' cannot be read", "move it away") from error
        if regions:
            shown = ("slide", "path", "patient", "mpp", "image")
            rows.append({name: row[name] for name in shown} | {"annotations": path.name})
    schema = {
        "slide": pl.String(),
        "path": pl.String(),
        "annotations": pl.String(),
        "patient": pl.String(),
        "mpp": pl.Float64(),
        "image": pl.Int64(),
    }
    return pl.DataFrame(rows, schema).write_csv().encode()


def _write_digests(folder: Path, digests: Mapping[str, list[str]]) -> None:
    _write(folder / SAVED, (json.dumps(digests, indent=1) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path) as new:
        new.write_bytes(content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

"""Objects for QuPath: the cells of a grid with measurements and classes, and annotations.

The format is the GeoJSON that QuPath 0.4 and later read and write (``PathIO.readObjects``):

- a FeatureCollection; each feature has a UUID, a geometry, and in ``properties`` its
  ``objectType``, a class with a colour, and ``measurements``, an object of name to number;
- coordinates are px of level 0 with two decimals. QuPath crops a slide to its scanned area
  (OpenSlide's bounds) and counts from there, if it reads the slide with OpenSlide;
- a colon in the name of a class separates a class from those derived from it:
  ``growth: speaks for desmoplastic, top 10 %`` is derived from ``growth``;
- a measurement that a cell does not have is left out: QuPath fails at null, and JSON has no NaN;
- a compressed file is a zip archive. QuPath does not read gzip.
"""

from __future__ import annotations

import json
import re
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from scipy.stats import rankdata

from nic_core.cohort import ClassificationTarget, SurvivalTarget, Target
from nic_core.grids import GridProvenance
from nic_core.maps.heatmaps import Heat, cell_area
from nic_core.store import atomic_file
from nic_core.tiling.annotations import ORIGIN_MEMBER
from nic_core.tiling.tissue import TissueMask
from nic_core.types import Origin

TOP, NEXT = 0.10, 0.25
"""Fractions of the cells with heat that are the top class and, with it, the next one [choice]."""

Feature = dict[str, Any]
Cells = npt.NDArray[np.bool_]

_RED, _ORANGE, _BLUE, _PURPLE, _GREEN = (
    (215, 25, 28),
    (253, 174, 97),
    (44, 123, 182),
    (106, 61, 154),
    (0, 140, 60),
)
_IDS = uuid.UUID("2f0b9f5e-6a0e-5d3c-9a55-3c1f7d0e8b41")  # of this project's objects


@dataclass(frozen=True)
class CellClass:
    """A class of cells.

    Attributes
    ----------
    name : str
        As QuPath shows it.
    colour : (int, int, int)
        Red, green and blue, 0 to 255.
    cells : bool (rows, columns)
    """

    name: str
    colour: tuple[int, int, int]
    cells: Cells


def heat_classes(heat: Heat, target: Target) -> list[CellClass]:
    """Return the classes of cells by their heat; a cell has at most one.

    The cells of highest heat are those that at most 10 % (25 %) of the cells reach: of equal
    values all or none are in a class. Heat above 0 speaks for a higher output and heat below 0 for
    a lower one, so only cells with such heat are in the classes of that name.

    Parameters
    ----------
    heat : float32 (rows, columns)
        NaN where it is unknown.
    target : Target
        What the heat explains: of a classification, its last class.
    """
    known = np.isfinite(heat)
    highest, lowest = _share(heat, known), _share(-heat, known)
    top, following = highest <= TOP, (highest > TOP) & (highest <= NEXT)
    shares = f"top {100 * TOP:g} %", f"top {100 * TOP:g} to {100 * NEXT:g} %"
    high, low = _directions(target)
    return [
        CellClass(f"{target.name}: {high}, {shares[0]}", _RED, top & (heat > 0)),
        CellClass(f"{target.name}: {high}, {shares[1]}", _ORANGE, following & (heat > 0)),
        CellClass(f"{target.name}: {low}, {shares[0]}", _BLUE, (lowest <= TOP) & (heat < 0)),
    ]


def map_class(name: str, label: str, probability: Heat) -> CellClass:
    """Return the class of the cells whose probability of ``label`` is 0.5 or more.

    Parameters
    ----------
    name : str
        Name of the probability map.
    probability : float32 (rows, columns)
        NaN where it is unknown.
    """
    shown = _without_colon(label)
    return CellClass(f"{name}: {shown}, probability 0.5 or more", _PURPLE, probability >= 0.5)


def cell_objects(
    provenance: GridProvenance,
    cells: Cells,
    measurements: Mapping[str, npt.NDArray[np.floating]],
    classes: Sequence[CellClass],
    *,
    corner: tuple[float, float],
) -> Iterator[Feature]:
    """Yield a tile object for each of some cells, by row then column.

    Its geometry is the square of the cell, so neighbours touch and do not overlap, whatever the
    size of the patches. Cells at the edge of the slide may extend beyond it.

    Parameters
    ----------
    provenance : GridProvenance
        Provenance of the grid.
    cells : bool (rows, columns)
        Those to yield.
    measurements : mapping of str to float (rows, columns)
        Name to values; those that are not finite are left out. Values are rounded to six digits.
    classes : sequence of CellClass
        The first that contains a cell is its class.
    corner : (float, float)
        The point (x, y) that coordinates count from, level-0 px.
    """
    number = np.full(cells.shape, -1)
    for index in reversed(range(len(classes))):
        number[classes[index].cells] = index
    named = [_classification(of_class.name, of_class.colour) for of_class in classes]
    rows, columns = np.nonzero(cells)
    x, y = (
        np.round(
            start + np.arange(length + 1) * provenance.cell - moved,
            2,
        ).tolist()
        for start, length, moved in zip(provenance.origin, cells.shape[::-1], corner, strict=True)
    )
    values = {name: values[rows, columns].tolist() for name, values in measurements.items()}
    for place, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        left, right, top, bottom = x[column], x[column + 1], y[row], y[row + 1]
        square = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        measured = {
            name: float(f"{of_cells[place]:.6g}")
            for name, of_cells in values.items()
            if np.isfinite(of_cells[place])
        }
        yield _feature(
            _identifier(provenance, "cell", str(row), str(column)),
            {"type": "Polygon", "coordinates": [square]},
            "tile",
            f"row {row}, column {column}",
            named[number[row, column]] if number[row, column] >= 0 else {},
            {"measurements": measured},
        )


def class_area(
    provenance: GridProvenance, of_class: CellClass, *, corner: tuple[float, float]
) -> Feature | None:
    """Return the area of the cells of a class as an annotation; None if it has no cell.

    Parameters
    ----------
    provenance : GridProvenance
        Provenance of the grid.
    corner : (float, float)
        The point (x, y) that coordinates count from, level-0 px.
    """
    if not of_class.cells.any():
        return None
    x, y = (start - moved for start, moved in zip(provenance.origin, corner, strict=True))
    return _annotation(
        _identifier(provenance, "area", of_class.name),
        cell_area(of_class.cells, provenance.cell, (x, y)),
        f"{of_class.name} ({int(of_class.cells.sum())} cells)",
        _classification(of_class.name, of_class.colour),
    )


def tissue_area(
    provenance: GridProvenance, mask: TissueMask, *, corner: tuple[float, float]
) -> Feature | None:
    """Return the tissue as an annotation, simplified by one px of the mask; None without tissue.

    Parameters
    ----------
    provenance : GridProvenance
        Provenance of the grid.
    mask : TissueMask
        Tissue mask of the slide.
    corner : (float, float)
        The point (x, y) that coordinates count from, level-0 px.
    """
    if not mask.array.any():
        return None
    px = mask.mpp / provenance.slide_mpp  # level-0 px per px of the mask
    shape = cell_area(mask.array, px, (-corner[0], -corner[1]))
    return _annotation(
        _identifier(provenance, "tissue"),
        shapely.simplify(shape, px),
        "tissue",
        _classification("Tissue", _GREEN),
    )


def write_objects(
    path: Path, features: Iterable[Feature], *, origin: Origin, zipped: bool = False
) -> int:
    """Write features as a GeoJSON file, atomically, and return their number.

    The features are written one by one and not held in memory.

    Parameters
    ----------
    path : Path
        The file; of a zip archive, the name without ``.zip`` is that of the file in it.
    origin : {"level0", "bounds"}
        What coordinates count from; the file states it in a member that QuPath ignores.
    zipped : bool
        Write a zip archive.

    Raises
    ------
    StoreError
        The file cannot be written.
    """
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        start = {"type": "FeatureCollection", ORIGIN_MEMBER: origin}
        yield (json.dumps(start)[:-1] + ', "features": [').encode()
        for feature in features:
            text = json.dumps(feature, ensure_ascii=False, allow_nan=False)
            yield (",\n" if count else "\n").encode() + text.encode()
            count += 1
        yield b"\n]}\n"

    with atomic_file(path) as temporary:
        if zipped:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
                # a ZipInfo has a fixed date: equal objects give equal files
                entry = zipfile.ZipInfo(path.name.removesuffix(".zip"))
                entry.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(entry, "w", force_zip64=True) as stream:
                    stream.writelines(lines())
        else:
            with temporary.open("wb") as stream:
                stream.writelines(lines())
    return count


def _share(values: Heat, known: Cells) -> npt.NDArray[np.float64]:
    """Return the fraction of known cells whose value is at least that of a cell; NaN: unknown."""
    share = np.full(values.shape, np.nan)
    share[known] = rankdata(-values[known], method="max") / max(1, known.sum())
    return share


def _directions(target: Target) -> tuple[str, str]:
    """What high and low heat of a target speak for."""
    if isinstance(target, ClassificationTarget):
        first, *_, last = map(_without_colon, target.classes)
        two = len(target.classes) == 2
        return f"speaks for {last}", f"speaks for {first}" if two else f"speaks against {last}"
    what = "risk" if isinstance(target, SurvivalTarget) else "value"
    return f"speaks for a high {what}", f"speaks for a low {what}"


def _without_colon(label: str) -> str:
    """A class as a part of a name, which a colon would divide into derived classes."""
    return re.sub(r"\s*:\s*", " - ", label)


def _classification(name: str, colour: tuple[int, int, int]) -> dict[str, Any]:
    """The property that is the class of an object."""
    return {"classification": {"name": name, "color": list(colour)}}


def _annotation(
    identifier: str, shape: shapely.Geometry, name: str, classification: dict[str, Any]
) -> Feature:
    rounded = shapely.set_precision(shape, 0.01)  # valid after rounding, too
    geometry = json.loads(shapely.to_geojson(shapely.orient_polygons(rounded)))
    # locked, so that it is not moved by mistake
    return _feature(identifier, geometry, "annotation", name, classification, {"isLocked": True})


def _feature(
    identifier: str,
    geometry: dict[str, Any],
    kind: str,
    name: str,
    classification: dict[str, Any],
    properties: dict[str, Any],
) -> Feature:
    return {
        "type": "Feature",
        "id": identifier,
        "geometry": geometry,
        "properties": {"objectType": kind, "name": name} | classification | properties,
    }


def _identifier(provenance: GridProvenance, *parts: str) -> str:
    """Return the UUID of an object: the same whenever a slide is exported again."""
    return str(uuid.uuid5(_IDS, "|".join((provenance.slide, provenance.encoder, *parts))))

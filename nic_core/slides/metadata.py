"""Metadata of slide files: um/px, objective power, scanned area, names of other images."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import tifffile

from nic_core.slides.errors import SlideError
from nic_core.slides.ome_set import ome_xml

# No histology scanner works outside this range of um/px [choice]. Print resolutions, which some
# programs write, are outside it (72 to 600 dpi are 353 to 42 um/px).
MPP_RANGE = (0.05, 40.0)
_MAX_SIDE = 300.0  # mm; the largest glass slides have sides of 200 mm
DAMAGED_REMEDY = "copy the file again from its source"
BRIGHTFIELD_REMEDY = "leave it out: only RGB brightfield slides are supported"
MPP_REMEDY = "give the um/px at level 0 in the column `mpp` of the slide table"

_MICROMETRES = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
_RESOLUTION_UNITS = {2: 25_400.0, 3: 10_000.0}  # um in TIFF ResolutionUnit: inch, centimetre
_NDPI_FILTER_SET = 65434


@dataclass(frozen=True)
class FileMetadata:
    """Metadata that a slide file states.

    Attributes
    ----------
    mpp : (float, float) or None
        um/px at level 0 in x and y; None if the file does not state it.
    mpp_source : str
        Field of the file that states it.
    objective_power : float or None
    bounds : (x, y, width, height) or None
        Scanned area, level-0 px; None if the file does not state it.
    associated : tuple of str
        Names of the label, macro and thumbnail images in the file.
    """

    mpp: tuple[float, float] | None = None
    mpp_source: str = ""
    objective_power: float | None = None
    bounds: tuple[int, int, int, int] | None = None
    associated: tuple[str, ...] = ()


def resolve_mpp(path: Path, given: float | None, metadata: FileMetadata) -> tuple[float, str]:
    """Return the um/px to use and its source: the user's value, else that of the file.

    Parameters
    ----------
    given : float, optional
        um/px at level 0 from the slide table; overrides the file.

    Raises
    ------
    SlideError
        Neither is known, or the value is impossible for a scan.
    """
    if given is not None:
        _check_mpp(path, given, "the slide table")
        return given, "slide table"
    if metadata.mpp is None:
        raise SlideError(path, "the file does not state its um/px (mpp)", MPP_REMEDY)
    for value in metadata.mpp:
        _check_mpp(path, value, f"the file ({metadata.mpp_source})")
    x, y = metadata.mpp
    if abs(x - y) > 0.02 * max(x, y):
        raise SlideError(
            path, f"pixels are not square: the file states {x:g} x {y:g} um/px", MPP_REMEDY
        )
    return (x + y) / 2, metadata.mpp_source


def check_physical_size(path: Path, width: int, height: int, mpp: float) -> None:
    """Refuse a slide larger than any glass slide: its size or its um/px is wrong.

    Parameters
    ----------
    width, height : int
        Level-0 px.
    mpp : float
        um/px at level 0.

    Raises
    ------
    SlideError
        A side is longer than 300 mm.
    """
    side = max(width, height) * mpp / 1000
    if side > _MAX_SIDE:
        raise SlideError(
            path,
            f"{width:,} x {height:,} px of {mpp:g} um would be a slide of {side:,.0f} mm",
            f"{DAMAGED_REMEDY}, or {MPP_REMEDY}",
        )


def _check_mpp(path: Path, value: float, source: str) -> None:
    low, high = MPP_RANGE
    if not (math.isfinite(value) and low <= value <= high):
        raise SlideError(
            path,
            f"mpp {value:g} um/px, given by {source}, is impossible for a microscope "
            f"(possible: {low:g} to {high:g})",
            MPP_REMEDY,
        )


def tiff_metadata(
    tiff: tifffile.TiffFile, page: tifffile.TiffPage, associated: Iterable[str]
) -> FileMetadata:
    """Return the metadata of a TIFF file.

    um/px is taken from the first of: the Aperio tag, OME-XML, the TIFF resolution, the objective
    power (10 / power).

    Parameters
    ----------
    page : tifffile.TiffPage
        Level 0 of the slide.
    associated : iterable of str
        Names of the other images.
    """
    mpp, source, power = None, "", None
    if tiff.is_svs:
        power = _aperio_field(page.description, "AppMag")
        if (stated := _aperio_field(page.description, "MPP")) is not None:
            mpp, source = (stated, stated), "Aperio tag"
    elif tiff.is_ome and tiff.ome_metadata:
        mpp, power = _ome_mpp_and_power(ome_xml(Path(tiff.filehandle.path), tiff.ome_metadata))
        source = "OME-XML"
    if mpp is None:
        mpp, source = _resolution_mpp(page), "TIFF resolution"
    mpp, source = _mpp_or_from_power(mpp, source, power)
    return FileMetadata(mpp, source, power, associated=tuple(associated))


def openslide_metadata(properties: Mapping[str, str], associated: Iterable[str]) -> FileMetadata:
    """Return the metadata in OpenSlide's properties."""
    x, y, power = (
        _number(properties.get(f"openslide.{name}"))
        for name in ("mpp-x", "mpp-y", "objective-power")
    )
    vendor = properties.get("openslide.vendor", "OpenSlide")
    source = "TIFF resolution" if vendor == "generic-tiff" else f"{vendor} metadata"
    stated = (x, y) if x is not None and y is not None else None
    mpp, source = _mpp_or_from_power(stated, source, power)
    box = [
        _number(properties.get(f"openslide.bounds-{name}"))
        for name in ("x", "y", "width", "height")
    ]
    bounds = None
    if all(value is not None and math.isfinite(value) for value in box):
        left, top, width, height = (int(value or 0) for value in box)
        bounds = left, top, width, height
    return FileMetadata(mpp, source, power, bounds, tuple(associated))


def _mpp_or_from_power(
    mpp: tuple[float, float] | None, source: str, power: float | None
) -> tuple[tuple[float, float] | None, str]:
    """um/px and its source; without um/px, 10 / objective power."""
    if mpp is None and power is not None and power > 0:
        return (10 / power, 10 / power), f"objective power {power:g}x"
    return mpp, source


def fluorescence_evidence(first: tifffile.TiffPage) -> str | None:
    """Return the metadata by which a Hamamatsu or Leica scan states fluorescence, or None.

    Parameters
    ----------
    first : tifffile.TiffPage
        First page of the file.
    """
    tag = first.tags.get(_NDPI_FILTER_SET)  # empty or absent in brightfield scans
    if tag is not None and (name := str(tag.value).strip()):
        return f"filter set '{name}'"
    if first.is_scn:
        sources = re.findall(r"<illuminationSource>\s*(.*?)\s*<", first.description)
        others = sorted(set(sources) - {"brightfield"})
        # the overview image is always brightfield; a second one is a brightfield scan
        if others and sources.count("brightfield") < 2:
            return f"illumination '{', '.join(others)}'"
    return None


def _aperio_field(description: str, key: str) -> float | None:
    match = re.search(rf"\|\s*{key}\s*=\s*([^|\s]+)", description)
    return _number(match[1]) if match else None


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _ome_mpp_and_power(xml: str) -> tuple[tuple[float, float] | None, float | None]:
    """um/px (x, y) and objective power in OME-XML; None where they are not stated."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return None, None
    objective = next((e for e in root.iter() if e.tag.endswith("}Objective")), None)
    power = _number(objective.get("NominalMagnification")) if objective is not None else None
    pixels = next((e for e in root.iter() if e.tag.endswith("}Pixels")), None)
    if pixels is None:
        return None, power
    values = []
    for axis in "XY":
        size = _number(pixels.get(f"PhysicalSize{axis}"))
        unit = _MICROMETRES.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        if size is None or unit is None:
            return None, power
        values.append(size * unit)
    return (values[0], values[1]), power


def _resolution_mpp(page: tifffile.TiffPage) -> tuple[float, float] | None:
    values = [page.tags.valueof(name) for name in ("XResolution", "YResolution", "ResolutionUnit")]
    if any(value is None for value in values):
        return None
    (xn, xd), (yn, yd), unit = values
    length = _RESOLUTION_UNITS.get(int(unit))
    if length is None or not (xn and xd and yn and yd):
        return None
    return length * xd / xn, length * yd / yn

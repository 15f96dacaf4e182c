"""What a slide file says about itself: micrometres per pixel, and whether it is brightfield."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import tifffile

from nic_core.slides.errors import SlideError

# Outside this no histology scan exists; print resolutions (72 to 600 dpi: 353 to 42 um/px) do.
MPP_RANGE = (0.05, 40.0)
DAMAGED_REMEDY = "copy the file again from its source"
BRIGHTFIELD_REMEDY = "leave it out: only RGB brightfield slides are supported"
MPP_REMEDY = "give the um/px at level 0 in the column `mpp` of the slide table"

_MICROMETRES = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
_RESOLUTION_UNITS = {2: 25_400.0, 3: 10_000.0}  # TIFF ResolutionUnit: inch, centimetre
_NDPI_FILTER_SET = 65434


def settle_mpp(path: Path, given: float | None, found: tuple[float, float] | None) -> float:
    """The um/px to use: the user's, else the file's.

    Parameters
    ----------
    given : float, optional
        From the slide table; overrides the file.
    found : (x, y), optional
        From the file.

    Raises
    ------
    SlideError
        None is known, or the one to use is no possible scan.
    """
    if given is None and found is None:
        raise SlideError(path, "the file does not say its um/px (mpp)", MPP_REMEDY)
    if given is not None:
        _check_mpp(path, given, "the slide table")
        return given
    assert found is not None
    for value in found:
        _check_mpp(path, value, "the file")
    x, y = found
    if abs(x - y) > 0.02 * max(x, y):
        raise SlideError(
            path, f"pixels are not square: {x:g} x {y:g} um/px by the file", MPP_REMEDY
        )
    return (x + y) / 2


def _check_mpp(path: Path, value: float, source: str) -> None:
    low, high = MPP_RANGE
    if not (math.isfinite(value) and low <= value <= high):
        raise SlideError(
            path,
            f"mpp {value:g} um/px by {source} is no microscope's (possible: {low:g} to {high:g})",
            MPP_REMEDY,
        )


def tiff_mpp(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> tuple[float, float] | None:
    """um/px (x, y) of a TIFF page: Aperio tag, OME-XML, resolution tags, Aperio magnification."""
    if tiff.is_svs:
        found = _aperio(page.description, "MPP")
        if found is not None:
            return found, found
    if tiff.is_ome and tiff.ome_metadata and (ome := _ome_mpp(tiff.ome_metadata)) is not None:
        return ome
    if (tagged := _resolution_mpp(page)) is not None:
        return tagged
    if tiff.is_svs and (power := _aperio(page.description, "AppMag")):
        return 10 / power, 10 / power
    return None


def openslide_mpp(properties: Mapping[str, str]) -> tuple[float, float] | None:
    """um/px (x, y) by OpenSlide, else 10 / objective power."""
    x, y = properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y")
    if x is not None and y is not None:
        return float(x), float(y)
    power = float(properties.get("openslide.objective-power", 0))
    return (10 / power, 10 / power) if power > 0 else None


def fluorescence_filter(tiff: tifffile.TiffFile) -> str | None:
    """Name of the fluorescence filter set of a Hamamatsu NDPI; brightfield scans have none."""
    tag = tiff.pages.first.tags.get(_NDPI_FILTER_SET)
    return str(tag.value).strip() or None if tag is not None else None


def _aperio(description: str, key: str) -> float | None:
    match = re.search(rf"\|\s*{key}\s*=\s*([0-9.eE+-]+)", description)
    try:
        return float(match[1]) if match else None
    except ValueError:
        return None


def _ome_mpp(xml: str) -> tuple[float, float] | None:
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return None
    pixels = next((e for e in root.iter() if e.tag.endswith("}Pixels")), None)
    if pixels is None:
        return None
    values = []
    for axis in "XY":
        size = pixels.get(f"PhysicalSize{axis}")
        unit = _MICROMETRES.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        if size is None or unit is None:
            return None
        values.append(float(size) * unit)
    return values[0], values[1]


def _resolution_mpp(page: tifffile.TiffPage) -> tuple[float, float] | None:
    values = [page.tags.valueof(name) for name in ("XResolution", "YResolution", "ResolutionUnit")]
    if any(value is None for value in values):
        return None
    (xn, xd), (yn, yd), unit = values
    length = _RESOLUTION_UNITS.get(int(unit))
    if length is None or not (xn and xd and yn and yd):
        return None
    return length * xd / xn, length * yd / yn

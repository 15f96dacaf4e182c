"""What a slide file says about itself: micrometres per pixel, power, bounds, other pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import tifffile

from nic_core.slides.errors import SlideError

# Outside this no histology scan exists; print resolutions (72 to 600 dpi: 353 to 42 um/px) do.
MPP_RANGE = (0.05, 40.0)
# The largest glass slides have sides of 200 mm.
_MAX_SIDE = 300.0
DAMAGED_REMEDY = "copy the file again from its source"
BRIGHTFIELD_REMEDY = "leave it out: only RGB brightfield slides are supported"
MPP_REMEDY = "give the um/px at level 0 in the column `mpp` of the slide table"

_MICROMETRES = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
_RESOLUTION_UNITS = {2: 25_400.0, 3: 10_000.0}  # TIFF ResolutionUnit: inch, centimetre
_NDPI_FILTER_SET = 65434


@dataclass(frozen=True)
class About:
    """What a file says about itself.

    Attributes
    ----------
    mpp : (x, y) or None
        um/px at level 0.
    mpp_source : str
        Which of its fields says so.
    objective_power : float or None
    bounds : (x, y, width, height) or None
        Of what was scanned, level-0 px; None: the file does not say.
    associated : tuple of str
        Names of the label, macro and thumbnail images in it.
    """

    mpp: tuple[float, float] | None = None
    mpp_source: str = ""
    objective_power: float | None = None
    bounds: tuple[int, int, int, int] | None = None
    associated: tuple[str, ...] = ()


def settle_mpp(path: Path, given: float | None, about: About) -> tuple[float, str]:
    """The um/px to use and where it comes from: the user's, else the file's.

    Parameters
    ----------
    given : float, optional
        From the slide table; overrides the file.

    Raises
    ------
    SlideError
        None is known, or the one to use is no possible scan.
    """
    if given is not None:
        _check_mpp(path, given, "the slide table")
        return given, "slide table"
    if about.mpp is None:
        raise SlideError(path, "the file does not say its um/px (mpp)", MPP_REMEDY)
    for value in about.mpp:
        _check_mpp(path, value, f"the file ({about.mpp_source})")
    x, y = about.mpp
    if abs(x - y) > 0.02 * max(x, y):
        raise SlideError(
            path, f"pixels are not square: {x:g} x {y:g} um/px by the file", MPP_REMEDY
        )
    return (x + y) / 2, about.mpp_source


def check_size(path: Path, width: int, height: int, mpp: float) -> None:
    """Refuse a slide that no glass could hold: its size or its um/px is damaged.

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
            f"mpp {value:g} um/px by {source} is no microscope's (possible: {low:g} to {high:g})",
            MPP_REMEDY,
        )


def tiff_about(
    tiff: tifffile.TiffFile, page: tifffile.TiffPage, associated: Iterable[str]
) -> About:
    """What a TIFF says; um/px by Aperio tag, OME-XML, resolution tags, last objective power."""
    mpp, source, power = None, "", None
    if tiff.is_svs:
        power = _aperio(page.description, "AppMag")
        if (tagged := _aperio(page.description, "MPP")) is not None:
            mpp, source = (tagged, tagged), "Aperio tag"
    elif tiff.is_ome and tiff.ome_metadata:
        mpp, power = _ome(tiff.ome_metadata)
        source = "OME-XML"
    if mpp is None:
        mpp, source = _resolution_mpp(page), "TIFF resolution"
    mpp, source = _or_by_power(mpp, source, power)
    return About(mpp, source, power, associated=tuple(associated))


def openslide_about(properties: Mapping[str, str], associated: Iterable[str]) -> About:
    """What OpenSlide found in a file."""
    x, y, power = (
        _number(properties.get(f"openslide.{name}"))
        for name in ("mpp-x", "mpp-y", "objective-power")
    )
    vendor = properties.get("openslide.vendor", "OpenSlide")
    source = "TIFF resolution" if vendor == "generic-tiff" else f"{vendor} metadata"
    mpp, source = _or_by_power((x, y) if x is not None and y is not None else None, source, power)
    box = [
        _number(properties.get(f"openslide.bounds-{name}"))
        for name in ("x", "y", "width", "height")
    ]
    bounds = None
    if all(value is not None and math.isfinite(value) for value in box):
        left, top, width, height = (int(value or 0) for value in box)
        bounds = left, top, width, height
    return About(mpp, source, power, bounds, tuple(associated))


def _or_by_power(
    mpp: tuple[float, float] | None, source: str, power: float | None
) -> tuple[tuple[float, float] | None, str]:
    """um/px, or without it 10 / objective power."""
    if mpp is None and power is not None and power > 0:
        return (10 / power, 10 / power), f"objective power {power:g}x"
    return mpp, source


def fluorescence(first: tifffile.TiffPage) -> str | None:
    """How a scan of Hamamatsu or Leica says that it is fluorescence; None: it does not."""
    tag = first.tags.get(_NDPI_FILTER_SET)  # brightfield scans have none
    if tag is not None and (name := str(tag.value).strip()):
        return f"filter set '{name}'"
    if first.is_scn:
        lights = re.findall(r"<illuminationSource>\s*(.*?)\s*<", first.description)
        others = sorted(set(lights) - {"brightfield"})
        if others and lights.count("brightfield") < 2:  # the overview picture is one
            return f"illumination '{', '.join(others)}'"
    return None


def _aperio(description: str, key: str) -> float | None:
    match = re.search(rf"\|\s*{key}\s*=\s*([^|\s]+)", description)
    return _number(match[1]) if match else None


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _ome(xml: str) -> tuple[tuple[float, float] | None, float | None]:
    """um/px (x, y) and objective power in OME-XML, as far as they are there."""
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

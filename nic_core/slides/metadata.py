"""Metadata of slide files: um/px, objective power, scanned area, names of other images."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

import tifffile

from nic_core.slides.errors import SlideError
from nic_core.slides.remote import SlidePath

# No histology scanner works outside this range of um/px [choice]. Print resolutions, which some
# programs write, are outside it (72 to 600 dpi are 353 to 42 um/px).
MPP_RANGE = (0.05, 40.0)
_MAX_SIDE = 300.0  # mm; the largest glass slides have sides of 200 mm
DAMAGED_REMEDY = "copy the file again from its source"
BRIGHTFIELD_REMEDY = "leave it out: only RGB brightfield slides are supported"
CONVERT_REMEDY = "convert it to a tiled RGB TIFF"
COLOUR_REMEDY = "save it as 8-bit RGB"
UPRIGHT_REMEDY = "save it upright (orientation 1)"
IMAGE_REMEDY = "name the image of the scan: column `image` of the slide table, or option --image"
MPP_REMEDY = "give the um/px at level 0 in the column `mpp` of the slide table"

_MICROMETRES = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
_RESOLUTION_UNITS = {2: 25_400.0, 3: 10_000.0}  # um in TIFF ResolutionUnit: inch, centimetre
# ImageJ's words for a micrometre; its text escapes the micro sign
_IMAGEJ_UNITS = {
    **dict.fromkeys(("micron", "microns", "um", "µm", "\\u00b5m"), 1.0),
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "inch": 25_400.0,
}
_NDPI_FILTER_SET, _ICC_PROFILE = 65434, 34675
_MAKE, _MODEL = 271, 272
# OpenSlide's property with the model or number of the scanner -> its maker
_SCANNERS_OF_VENDORS = {
    "aperio.ScanScope ID": "Aperio",
    "leica.device-model": "Leica",
    "ventana.ScannerModel": "Ventana",
    "philips.DICOM_DEVICE_SERIAL_NUMBER": "Philips",
}
# OpenSlide's properties with the maker and with the model
_SCANNERS = (("dicom.Manufacturer", "dicom.ManufacturerModelName"), ("tiff.Make", "tiff.Model"))
_MIRAX_SCANNER = ".SCANNER_HARDWARE_ID"  # in a section whose number differs between files


@dataclass(frozen=True)
class FileMetadata:
    """Metadata that a slide file states.

    Attributes
    ----------
    mpp : (float, float) or None
        um/px at level 0 in x and y; None if the file does not state it.
    mpp_source : str
        Field of the file that states it; without um/px, the reason if one is known.
    objective_power : float or None
    bounds : (x, y, width, height) or None
        Scanned area, level-0 px; None if the file does not state it.
    associated : tuple of str
        Names of the label, macro and thumbnail images in the file.
    icc_profile : bytes or None
        ICC profile of the pixels, as stored in the file.
    scanner : str or None
        Maker and model or number of the scanner (:func:`scanner_name`); None if the file does not
        state them.
    """

    mpp: tuple[float, float] | None = None
    mpp_source: str = ""
    objective_power: float | None = None
    bounds: tuple[int, int, int, int] | None = None
    associated: tuple[str, ...] = ()
    icc_profile: bytes | None = None
    scanner: str | None = None


def resolve_mpp(path: SlidePath, given: float | None, metadata: FileMetadata) -> tuple[float, str]:
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
        _check_mpp(path, given, "the user")
        return given, "slide table"
    if metadata.mpp is None:
        why = f": {metadata.mpp_source}" if metadata.mpp_source else ""
        raise SlideError(path, f"the file does not state its um/px (mpp){why}", MPP_REMEDY)
    for value in metadata.mpp:
        _check_mpp(path, value, f"the file ({metadata.mpp_source})")
    x, y = metadata.mpp
    if abs(x - y) > 0.02 * max(x, y):
        raise SlideError(
            path, f"pixels are not square: the file states {x:g} x {y:g} um/px", MPP_REMEDY
        )
    return (x + y) / 2, metadata.mpp_source


def check_physical_size(path: SlidePath, width: int, height: int, mpp: float) -> None:
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


def _check_mpp(path: SlidePath, value: float, source: str) -> None:
    low, high = MPP_RANGE
    if not (math.isfinite(value) and low <= value <= high):
        raise SlideError(
            path,
            f"mpp {value:g} um/px, given by {source}, is impossible for a microscope "
            f"(possible: {low:g} to {high:g})",
            MPP_REMEDY,
        )


def page_metadata(page: tifffile.TiffPage) -> FileMetadata:
    """Return the metadata that a page of a TIFF file states about itself.

    um/px is taken from the first of: the Aperio tag, the TIFF resolution (with ImageJ's unit, where
    ImageJ wrote the file), the objective power (10 / power).
    """
    power = _aperio_number(page.description, "AppMag")
    stated = _aperio_number(page.description, "MPP")
    mpp = (stated, stated) if stated is not None else None
    scanner = scanner_name("Aperio", _aperio_text(page.description, "ScanScope ID"))
    return _with_resolution(page, mpp, "Aperio tag", power, scanner)


def ome_metadata(
    root: ElementTree.Element, image: ElementTree.Element, page: tifffile.TiffPage
) -> FileMetadata:
    """Return the metadata that OME-XML, or else the page, states about one image.

    Parameters
    ----------
    root, image : xml.etree.ElementTree.Element
        The whole OME-XML, and the image's element in it.
    page : tifffile.TiffPage
        Level 0 of the image.
    """
    powers = {
        objective.get("ID", ""): _number(objective.get("NominalMagnification"))
        for objective in root.iter()
        if objective.tag.rpartition("}")[2] == "Objective"
    }
    settings = children(image, "ObjectiveSettings")
    if settings:
        power = powers.get(settings[0].get("ID", ""))
    else:  # a file with one objective rarely says that the image was taken with it
        power = next(iter(powers.values())) if len(powers) == 1 else None
    size = _ome_pixel_size(children(image, "Pixels")[0])
    return _with_resolution(page, size, "OME-XML", power, _ome_scanner(root, image))


def children(element: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    """Return the children of an XML element with a name, in any namespace."""
    return [child for child in element if child.tag.rpartition("}")[2] == name]


def _with_resolution(
    page: tifffile.TiffPage,
    mpp: tuple[float, float] | None,
    source: str,
    power: float | None,
    scanner: str | None,
) -> FileMetadata:
    """Metadata of a page; without um/px, by its resolution, else by the objective power.

    Without a scanner, it is that of the TIFF tags Make and Model.
    """
    if mpp is None:
        mpp, source = _resolution_mpp(page)
    mpp, source = _mpp_or_from_power(mpp, source, power)
    profile = page.tags.valueof(_ICC_PROFILE)
    # numbers instead of bytes: a tag of a wrong type, which is not a profile
    icc_profile = profile if isinstance(profile, bytes) else None
    tags = (page.tags.valueof(_MAKE), page.tags.valueof(_MODEL))
    return FileMetadata(
        mpp,
        source,
        power,
        icc_profile=icc_profile,
        scanner=scanner or scanner_name(*(tag if isinstance(tag, str) else None for tag in tags)),
    )


def openslide_metadata(
    properties: Mapping[str, str], associated: Iterable[str], icc_profile: bytes | None = None
) -> FileMetadata:
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
    scanner = _openslide_scanner(properties)
    return FileMetadata(mpp, source, power, bounds, tuple(associated), icc_profile, scanner)


def scanner_name(maker: str | None, model: str | None) -> str | None:
    """Return the name of a scanner: its maker, and its model or number.

    Spaces are reduced to one. A model that begins with its maker is not preceded by it again, and
    a model without a maker is a name of its own.

    Returns
    -------
    str or None
        For example ``Hamamatsu C9600-12`` or ``Aperio SS1302``; None without a model: a maker
        alone does not distinguish scanners.
    """
    first, second = (" ".join((part or "").split()) for part in (maker, model))
    if not second:
        return None
    return second if second.lower().startswith(first.lower()) else f"{first} {second}"


def _openslide_scanner(properties: Mapping[str, str]) -> str | None:
    """Name of the scanner in OpenSlide's properties; None if there is none."""
    stated = [(maker, properties.get(model)) for model, maker in _SCANNERS_OF_VENDORS.items()]
    stated += [
        ("3DHISTECH", properties[key]) for key in sorted(properties) if key.endswith(_MIRAX_SCANNER)
    ]
    stated += [(properties.get(maker, ""), properties.get(model)) for maker, model in _SCANNERS]
    names = [name for maker, model in stated if (name := scanner_name(maker, model))]
    return names[0] if names else None


def _ome_scanner(root: ElementTree.Element, image: ElementTree.Element) -> str | None:
    """Name of the microscope of an image in OME-XML; None if it is not stated."""
    instruments = {item.get("ID", ""): item for item in children(root, "Instrument")}
    references = children(image, "InstrumentRef")
    if references:
        instrument = instruments.get(references[0].get("ID", ""))
    else:  # a file with one instrument rarely says that the image was taken with it
        instrument = next(iter(instruments.values())) if len(instruments) == 1 else None
    microscopes = [] if instrument is None else children(instrument, "Microscope")
    if not microscopes:
        return None
    return scanner_name(microscopes[0].get("Manufacturer"), microscopes[0].get("Model"))


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


def _aperio_number(description: str, key: str) -> float | None:
    text = _aperio_text(description, key)
    # some programs write a decimal comma
    return _number(text.replace(",", ".")) if text else None


def _aperio_text(description: str, key: str) -> str | None:
    match = re.search(rf"\|\s*{key}\s*=\s*([^|\s]+)", description)
    return match[1] if match else None


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _ome_pixel_size(pixels: ElementTree.Element) -> tuple[float, float] | None:
    """um/px (x, y) of an element Pixels of OME-XML; None if it is not stated."""
    values = []
    for axis in "XY":
        size = _number(pixels.get(f"PhysicalSize{axis}"))
        unit = _MICROMETRES.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        if size is None or unit is None:
            return None
        values.append(size * unit)
    return values[0], values[1]


def _resolution_mpp(page: tifffile.TiffPage) -> tuple[tuple[float, float] | None, str]:
    """um/px (x, y) by the TIFF resolution and its source; without um/px, the reason if known."""
    tags = [page.tags.valueof(name) for name in ("XResolution", "YResolution", "ResolutionUnit")]
    if tags[0] is None or tags[1] is None:
        return None, ""
    (xn, xd), (yn, yd), unit = tags
    if not (xn and xd and yn and yd):
        return None, ""
    length, source = _RESOLUTION_UNITS.get(unit), "TIFF resolution"
    if length is None:
        stated = re.search(r"^unit=(\S+)$", page.description, re.MULTILINE)
        if page.description.startswith("ImageJ=") and stated:
            length, source = _IMAGEJ_UNITS.get(stated[1].lower()), "ImageJ resolution"
    if length is None:
        return None, "" if xn == xd else f"its TIFF resolution ({xn / xd:g} px) has no unit"
    return (length * xd / xn, length * yd / yn), source

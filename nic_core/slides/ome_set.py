"""OME-TIFF sets: several TIFF files that share one OME-XML, in each of them or in a companion."""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree import ElementTree

from nic_core.slides.remote import SlidePath

OTHER_SCAN = 16  # an image with more than 1/16 of the scan's pixels is not a macro image [choice]


@dataclass(frozen=True)
class OmeImage:
    """An image of OME-XML: its number of pixels, and the names of the files with them."""

    pixels: int
    files: tuple[str, ...]


def ome_xml(path: SlidePath, xml: str) -> str:
    """Return the OME-XML of one TIFF of a set whose metadata are in a companion file.

    Parameters
    ----------
    xml : str
        The OME-XML in the TIFF itself. Returned as it is, unless it names a companion file.

    Returns
    -------
    str
        The XML of the companion file, with the images that are in this TIFF only.
    """
    root = parse_ome(xml.encode())
    companion = companion_file(path, root) if root is not None else None
    whole = parse_ome(companion.read_bytes()) if companion and companion.is_file() else None
    if whole is None:
        return xml
    for image in whole.findall("{*}Image"):
        if path.name not in _ome_files(image, None, ""):
            whole.remove(image)
    return ElementTree.tostring(whole, encoding="unicode")


def companion_file(path: SlidePath, root: ElementTree.Element) -> SlidePath | None:
    """Return the file with the metadata of an OME-TIFF; None if they are in itself."""
    binary_only = root.find("{*}BinaryOnly")
    return None if binary_only is None else path.parent / binary_only.get("MetadataFile", "")


def parse_ome(xml: bytes) -> ElementTree.Element | None:
    """Return the root of OME-XML; None if it is damaged."""
    try:
        return ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return None


def ome_images(root: ElementTree.Element, own: str) -> list[OmeImage]:
    """The images of OME-XML; ``own`` is the name of the file from which it is."""
    return [
        OmeImage(
            _size(pixels, "SizeX") * _size(pixels, "SizeY"),
            _ome_files(image, root.get("UUID"), own),
        )
        for image in root.findall("{*}Image")
        if (pixels := image.find("{*}Pixels")) is not None
    ]


def _size(pixels: ElementTree.Element, name: str) -> int:
    text = pixels.get(name, "")
    return int(text) if text.isdecimal() else 0


def _ome_files(image: ElementTree.Element, own_uuid: str | None, own: str) -> tuple[str, ...]:
    """Names of the files with the pixels of an image, each once.

    A file that was renamed is found by its UUID.
    """
    names = [
        own if own_uuid and (uuid.text or "").strip() == own_uuid else uuid.get("FileName", own)
        for uuid in image.iterfind("{*}Pixels/{*}TiffData/{*}UUID")
    ]
    return tuple(dict.fromkeys(names)) or (own,)

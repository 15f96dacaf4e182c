"""DICOM slides: read the tags of a file, find the files of a slide, and refuse incomplete ones.

OpenSlide reads the pixels. It opens a truncated file without an error, so this module checks the
files before.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nic_core.object_stores import RemoteError
from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import DAMAGED_REMEDY
from nic_core.slides.remote import SlidePath

if TYPE_CHECKING:
    from pydicom.tag import BaseTag

_WHOLE_SLIDE_IMAGE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # SOP class
# transfer syntaxes that OpenSlide does not read, whatever the compression of the pixels
_UNREAD_SYNTAXES = {
    "1.2.840.10008.1.2": "implicit VR little endian",
    "1.2.840.10008.1.2.1.99": "deflated",
    "1.2.840.10008.1.2.2": "big endian",
}
_PIXEL_DATA = 0x7FE00010
_LAST_TAG = 0x00480007  # TotalPixelMatrixRows; the long tables of frames come after it
_UNDEFINED_LENGTH = 0xFFFFFFFF
_SEQUENCE_DELIMITER = b"\xfe\xff\xdd\xe0\0\0\0\0"  # ends pixel data of undefined length
_TAIL = 4 * 1024  # bytes; padding may follow the delimiter
_PICTURES = ("LABEL", "OVERVIEW", "THUMBNAIL")  # values of ImageType beside VOLUME


@dataclass(frozen=True)
class DicomFile:
    """The tags of a DICOM file that say to which slide it belongs.

    Attributes
    ----------
    path : Path or RemotePath
    sop_class : str
        Name of the kind of object, for example "VL Whole Slide Microscopy Image Storage".
    is_slide_image : bool
        The object is a whole-slide image: a level, label, overview or thumbnail.
    series, instance : str
        SeriesInstanceUID and SOPInstanceUID.
    is_level : bool
        A level of the pyramid, not a label, overview or thumbnail.
    pixels : int
        Number of pixels of the whole image (TotalPixelMatrix).
    concatenated : bool
        One of several files that together hold one level.
    syntax : str
        Transfer syntax, in words, if OpenSlide does not read it; else empty.
    """

    path: SlidePath
    sop_class: str
    is_slide_image: bool
    series: str
    instance: str
    is_level: bool
    pixels: int
    concatenated: bool
    syntax: str


def read_dicom(path: SlidePath) -> DicomFile | None:
    """Read the tags of a DICOM file in any transfer syntax; None if it is not DICOM.

    Raises
    ------
    SlideError
        The file cannot be read, or its header is damaged.
    """
    try:
        status = path.stat()
        return _read(path, status.st_size, status.st_mtime_ns)
    except RemoteError:
        raise
    except OSError as error:
        raise SlideError(path, f"cannot be read ({error.strerror})", "check the path") from error


# a folder may hold many slides, and the files of the folder are read for each of them
@functools.lru_cache(maxsize=1 << 16)
def _read(path: SlidePath, size: int, modified: int) -> DicomFile | None:
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return None
        # imported here, since it takes half a second
        from pydicom import config
        from pydicom.filereader import read_partial
        from pydicom.uid import UID

        def after_last(tag: BaseTag, vr: str | None, length: int) -> bool:
            return bool(tag > _LAST_TAG)

        file.seek(0)
        try:
            with config.disable_value_validation():
                found = read_partial(file, stop_when=after_last)
                kind = str(found.get("SOPClassUID") or found.file_meta.MediaStorageSOPClassUID)
                image_type = list(found.get("ImageType") or ())
                syntax = str(found.file_meta.get("TransferSyntaxUID", ""))
                sides = (found.get(f"TotalPixelMatrix{side}") for side in ("Columns", "Rows"))
                columns, rows = (int(side or 0) for side in sides)
                if kind == _WHOLE_SLIDE_IMAGE and not found.get("SeriesInstanceUID"):
                    raise ValueError("no SeriesInstanceUID")
                return DicomFile(
                    path=path,
                    sop_class=UID(kind).name,
                    is_slide_image=kind == _WHOLE_SLIDE_IMAGE,
                    series=str(found.get("SeriesInstanceUID", "")),
                    instance=str(found.get("SOPInstanceUID", "")),
                    is_level=not set(image_type) & set(_PICTURES),
                    pixels=columns * rows,
                    concatenated="ConcatenationUID" in found,
                    syntax=_UNREAD_SYNTAXES.get(syntax, ""),
                )
        except RemoteError:
            raise
        # pydicom raises any of a dozen exception types for a damaged header
        except Exception as error:
            reason = f"damaged DICOM header ({error or type(error).__name__})"
            raise SlideError(path, reason, DAMAGED_REMEDY) from error


def dicom_series(files: Iterable[SlidePath]) -> dict[str, list[DicomFile]]:
    """Return the whole-slide images among files by SeriesInstanceUID, level 0 first.

    Files that cannot be read are left out: one of another slide must not make this slide fail.
    """
    series: dict[str, list[DicomFile]] = {}
    for path in files:
        try:
            found = read_dicom(path)
        except SlideError:
            continue
        if found is not None and found.is_slide_image:
            series.setdefault(found.series, []).append(found)
    for members in series.values():
        # the order does not depend on the names of the files
        members.sort(key=lambda file: (not file.is_level, -file.pixels, file.instance, file.path))
    return series


def folder_series(folder: SlidePath) -> dict[str, list[DicomFile]]:
    """Return the series of whole-slide images in a folder (:func:`dicom_series`)."""
    return dicom_series(sorted(file for file in folder.iterdir() if file.is_file()))


def series_problem(files: Iterable[DicomFile]) -> SlideError | None:
    """Return why OpenSlide cannot read the files of a series, or None."""
    levels: dict[int, DicomFile] = {}  # number of pixels to the file
    for file in files:
        if file.syntax:
            return SlideError(
                file.path,
                f"the transfer syntax is {file.syntax}, which OpenSlide does not read",
                "convert its files to explicit VR little endian (dcmconv +te of DCMTK)",
            )
        if not file.is_level:
            continue
        if file.concatenated:
            return SlideError(
                file.path,
                "a level is divided into several files (a concatenation), which OpenSlide does "
                "not read",
                "export it with one file for each level",
            )
        other = levels.setdefault(file.pixels, file)
        if other.instance != file.instance:
            return SlideError(
                file.path,
                f"{other.path.name} and {file.path.name} are the same level of its series (two "
                "focal planes, optical paths or scans)",
                "keep the files of one of them in the folder",
            )
    return None


def check_dicom(path: SlidePath) -> None:
    """Refuse a DICOM slide that OpenSlide cannot read, or with a truncated file.

    Without this check, missing frames are found only when they are read. A file that is not DICOM
    passes.

    Raises
    ------
    SlideError
        The file is no whole-slide image, or its folder has no scan of its series; a file of the
        slide ends before its pixel data do, cannot be read, or has a transfer syntax that OpenSlide
        does not read.
    """
    found = read_dicom(path)
    if found is None:
        return
    if not found.is_slide_image:
        reason = f"DICOM, but not a whole-slide image ({found.sop_class})"
        raise SlideError(path, reason, "give a file of a whole-slide image")
    files = folder_series(path.parent)[found.series]
    if not files[0].is_level:
        reason = "a DICOM label, overview or thumbnail; its series has no scan in its folder"
        raise SlideError(path, reason, "give a file of the scan")
    if problem := series_problem(files):
        raise problem
    try:
        truncated = [file.path.name for file in files if not _is_complete(file.path)]
    except OSError as error:
        raise SlideError(path, f"cannot be read ({error})", "check the path") from error
    if truncated:
        raise SlideError(path, f"truncated: {', '.join(truncated)}", DAMAGED_REMEDY)


def _is_complete(path: SlidePath) -> bool:
    """Whether compressed pixel data have their end mark, and plain ones their whole length."""
    from pydicom.filereader import read_partial

    pixels: list[int] = []

    def at_pixels(tag: Any, vr: str | None, length: int) -> bool:
        if tag == _PIXEL_DATA:
            pixels.append(length)
        return bool(tag == _PIXEL_DATA)

    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL))
        if _SEQUENCE_DELIMITER in file.read():
            return True
        file.seek(0)
        try:
            read_partial(file, stop_when=at_pixels)
        except Exception as error:
            reason = f"damaged DICOM header ({error or type(error).__name__})"
            raise SlideError(path, reason, DAMAGED_REMEDY) from error
        # the element's head (tag, VR, length: 12 bytes) is still to be read
        return bool(
            pixels and pixels[0] != _UNDEFINED_LENGTH and file.tell() + 12 + pixels[0] <= size
        )

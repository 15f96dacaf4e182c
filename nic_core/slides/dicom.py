"""DICOM slides: find the files of a slide, and detect truncated ones.

OpenSlide reads the pixels. It opens a truncated file without an error, so this module checks the
files before.
"""

from __future__ import annotations

import re
from pathlib import Path

from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import DAMAGED_REMEDY

_HEADER = 64 * 1024  # bytes
_SERIES_UID = re.compile(rb"\x20\x00\x0e\x00UI..([0-9.]+)", re.DOTALL)  # tag (0020,000E)
_PIXEL_DATA = re.compile(rb"\xe0\x7f\x10\x00O[BW]\0\0(.{4})", re.DOTALL)  # (7FE0,0010), length
_UNDEFINED_LENGTH = 0xFFFFFFFF
_SEQUENCE_DELIMITER = b"\xfe\xff\xdd\xe0\0\0\0\0"  # ends pixel data of undefined length
_MAX_METADATA = 64 * 1024 * 1024  # bytes; larger than the metadata of any slide
_TAIL = 4 * 1024  # bytes; padding may follow the delimiter


def dicom_files(path: Path) -> list[Path]:
    """Return all files in the folder that belong to the same DICOM slide, ``path`` first.

    A slide is a DICOM series: each level, the label and the overview are separate files.

    Returns
    -------
    list of Path
        Empty if ``path`` is not a DICOM file.
    """
    series = _series_uid(path)
    if series is None:
        return []
    others = sorted(file for file in path.parent.iterdir() if file.is_file() and file != path)
    return [path, *(file for file in others if _series_uid(file) == series)]


def check_dicom_complete(path: Path) -> None:
    """Refuse a DICOM slide with a truncated file.

    Without this check, missing frames are found only when they are read. A file that is not DICOM
    passes.

    Raises
    ------
    SlideError
        A file of the slide ends before its pixel data do, or cannot be read.
    """
    try:
        truncated = [file.name for file in dicom_files(path) if not _is_complete(file)]
    except OSError as error:
        raise SlideError(path, f"cannot be read ({error})", "check the path") from error
    if truncated:
        raise SlideError(path, f"truncated: {', '.join(truncated)}", DAMAGED_REMEDY)


def _is_complete(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL))
        if _SEQUENCE_DELIMITER in file.read():
            return True
        file.seek(0)
        pixels = _PIXEL_DATA.search(file.read(_MAX_METADATA))
    length = int.from_bytes(pixels[1], "little") if pixels else _UNDEFINED_LENGTH
    return pixels is not None and length != _UNDEFINED_LENGTH and pixels.end() + length <= size


def _series_uid(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER)
    except OSError:  # an unreadable file of another slide must not make this slide fail
        return None
    match = _SERIES_UID.search(header) if header[128:132] == b"DICM" else None
    return match[1] if match else None

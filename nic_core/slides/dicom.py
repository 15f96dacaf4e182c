"""What must be known of DICOM files beyond what OpenSlide tells: their number and their end."""

from __future__ import annotations

import re
from pathlib import Path

from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import DAMAGED_REMEDY

_HEAD = 64 * 1024
_SERIES = re.compile(rb"\x20\x00\x0e\x00UI..([0-9.]+)", re.DOTALL)  # its UID, (0020,000E)
_PIXELS = re.compile(rb"\xe0\x7f\x10\x00O[BW]\0\0(.{4})", re.DOTALL)  # (7FE0,0010) and its length
_UNDEFINED = 0xFFFFFFFF
_DELIMITER = b"\xfe\xff\xdd\xe0\0\0\0\0"  # ends frames of undefined total length
_METADATA = 64 * 1024 * 1024  # more than any describes its frames in
_TAIL = 4 * 1024  # padding may follow


def dicom_parts(path: Path) -> list[Path]:
    """All files in the folder that belong to a DICOM slide, itself first; none: it is no DICOM.

    A series is a slide; levels, label and overview are files of their own.
    """
    series = _series(path)
    if series is None:
        return []
    beside = sorted(part for part in path.parent.iterdir() if part.is_file() and part != path)
    return [path, *(part for part in beside if _series(part) == series)]


def check_dicom(path: Path) -> None:
    """A part cut short still opens: its missing frames would only be met while reading.

    Raises
    ------
    SlideError
        A file of the slide ends before its pixels do, or cannot be read.
    """
    try:
        cut = [part.name for part in dicom_parts(path) if not _whole(part)]
    except OSError as error:
        raise SlideError(path, f"cannot be read ({error})", "check the path") from error
    if cut:
        raise SlideError(path, f"cut short: {', '.join(cut)}", DAMAGED_REMEDY)


def _whole(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL))
        if _DELIMITER in file.read():
            return True
        file.seek(0)
        pixels = _PIXELS.search(file.read(_METADATA))
    length = int.from_bytes(pixels[1], "little") if pixels else _UNDEFINED
    return pixels is not None and length != _UNDEFINED and pixels.end() + length <= size


def _series(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:  # another's file in the folder is no reason to refuse this slide
        return None
    found = _SERIES.search(head) if head[128:132] == b"DICM" else None
    return found[1] if found else None

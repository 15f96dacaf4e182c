"""A cheap fingerprint of a slide file, used as its data version."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nic_core.slides.dicom import dicom_parts
from nic_core.slides.errors import SlideError

_END = 64 * 1024
_SAMPLES, _SAMPLE = 32, 4 * 1024


def content_identity(path: Path) -> str:
    """Hash of a file's size, head, tail and evenly spaced samples (a quarter MB read at most).

    A slide of several files (MIRAX keeps its pixels in a folder beside it, DICOM each level in a
    file) counts the others' names, sizes and ends too.

    Returns
    -------
    str
        32 hexadecimal digits.

    Raises
    ------
    SlideError
        The file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            digest.update(size.to_bytes(8, "little"))
            spread = [size * i // (_SAMPLES + 1) for i in range(1, _SAMPLES + 1)]
            for start, length in [(0, _END), (max(size - _END, 0), _END)] + [
                (offset, _SAMPLE) for offset in spread
            ]:
                file.seek(start)
                digest.update(file.read(length))
        for part in _other_parts(path):
            with part.open("rb") as file:
                size = file.seek(0, 2)
                digest.update(f"{part.name}:{size}\n".encode())
                for start in (0, max(size - _SAMPLE, 0)):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE))
    except OSError as error:
        raise SlideError(path, f"cannot be read ({error.strerror})", "check the path") from error
    return digest.hexdigest()


def _other_parts(path: Path) -> list[Path]:
    folder = path.with_suffix("")
    if path.suffix.lower() == ".mrxs" and folder.is_dir():
        return sorted(part for part in folder.iterdir() if part.is_file())
    return dicom_parts(path)[1:]

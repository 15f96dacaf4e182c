"""Content identity: a hash of samples of a slide file, used as its data version."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nic_core.slides.dicom import dicom_files
from nic_core.slides.errors import SlideError

_END = 64 * 1024  # bytes of the head and of the tail
_SAMPLES, _SAMPLE = 32, 4 * 1024  # number and bytes of samples between them


def content_identity(path: Path) -> str:
    """Hash a file's size, head, tail and evenly spaced samples; at most 0.25 MB are read.

    MIRAX keeps pixels in a folder with the slide's name, and DICOM each level in its own file. The
    names, sizes and ends of these other files are hashed too.

    Returns
    -------
    str
        32 hexadecimal digits.

    Raises
    ------
    SlideError
        A file of the slide cannot be read.
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
        for other in _other_files(path):
            with other.open("rb") as file:
                size = file.seek(0, 2)
                digest.update(f"{other.name}:{size}\n".encode())
                for start in (0, max(size - _SAMPLE, 0)):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE))
    except OSError as error:
        raise SlideError(path, f"cannot be read ({error.strerror})", "check the path") from error
    return digest.hexdigest()


def _other_files(path: Path) -> list[Path]:
    folder = path.with_suffix("")
    if path.suffix.lower() == ".mrxs" and folder.is_dir():
        return sorted(file for file in folder.iterdir() if file.is_file())
    return dicom_files(path)[1:]

"""Content identity: a hash of samples of a slide's files, used as its data version."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nic_core.slides.errors import SlideError
from nic_core.slides.files import files_of_slide

_END = 64 * 1024  # bytes of the head and of the tail
_SAMPLES, _SAMPLE = 32, 4 * 1024  # number and bytes of samples between them


def content_identity(path: Path) -> str:
    """Hash a file's size, head, tail and evenly spaced samples; at most 0.25 MB are read.

    Of a slide with several files (DICOM, MIRAX, VMS, OME-TIFF sets) the sizes and ends of the other
    files are hashed too, in an order that does not depend on their names. Any file of the slide
    gives the same identity. Of a folder (OME-Zarr) the names and sizes of all files are hashed, and
    samples of them.

    Returns
    -------
    str
        32 hexadecimal digits.

    Raises
    ------
    SlideError
        A file of the slide cannot be read.
    """
    slide = files_of_slide(path)
    parts = getattr(slide, "parts", ())
    try:
        if slide.path.is_dir():
            return _folder_identity(slide.path)
        digest = hashlib.blake2b(digest_size=16)
        with slide.path.open("rb") as file:
            size = file.seek(0, 2)
            digest.update(size.to_bytes(8, "little"))
            spread = [size * i // (_SAMPLES + 1) for i in range(1, _SAMPLES + 1)]
            for start, length in [(0, _END), (max(size - _END, 0), _END)] + [
                (offset, _SAMPLE) for offset in spread
            ]:
                file.seek(start)
                digest.update(file.read(length))
        for part in sorted(map(_ends, parts)):
            digest.update(part)
    except OSError as error:
        raise SlideError(path, f"cannot be read ({error.strerror})", "check the path") from error
    return digest.hexdigest()


def _ends(path: Path) -> bytes:
    """Digest of a file's size, head and tail."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
        for start in (0, max(size - _SAMPLE, 0)):
            file.seek(start)
            digest.update(file.read(_SAMPLE))
    return digest.digest()


def _folder_identity(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()}:{path.stat().st_size}\n".encode())
    step = max(1, len(files) // _SAMPLES)
    for path in files[::step]:
        digest.update(_ends(path))
    return digest.hexdigest()

"""Content identity: a hash of samples of a slide's files, used as its data version."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from nic_core.slides.errors import SlideError
from nic_core.slides.files import files_of_slide
from nic_core.slides.remote import Range, RemoteObject, RemotePath, SlidePath

_END = 64 * 1024  # bytes of the head and of the tail
_SAMPLES, _SAMPLE = 32, 4 * 1024  # number and bytes of samples between them


def content_identity(path: SlidePath) -> str:
    """Hash a file's size, head, tail and evenly spaced samples; at most 0.25 MB are read.

    Of a slide with several files (DICOM, MIRAX, VMS, OME-TIFF sets) the sizes and ends of the other
    files are hashed too, in an order that does not depend on their names. Any file of the slide
    gives the same identity. Of a folder (OME-Zarr) the names and sizes of all files are hashed, and
    samples of them.

    Of a remote slide the ETag is hashed as well, and of its other files and of folders only the
    sizes and ETags: a copy of the slide on a disk therefore has another identity.

    Returns
    -------
    str
        32 hexadecimal digits.

    Raises
    ------
    SlideError
        A file of the slide cannot be read.
    RemoteError
        The server of a remote slide does not answer, or denies the access.
    """
    slide = files_of_slide(path)
    if isinstance(slide.path, RemotePath):
        return _remote_identity(slide.path, getattr(slide, "parts", ()))
    parts = getattr(slide, "parts", ())
    try:
        if slide.path.is_dir():
            return _folder_identity(slide.path)
        digest = hashlib.blake2b(digest_size=16)
        with slide.path.open("rb") as file:
            size = file.seek(0, 2)
            digest.update(size.to_bytes(8, "little"))
            for start, length in _samples(size):
                file.seek(start)
                digest.update(file.read(length))
        for part in sorted(map(_ends, parts)):
            digest.update(part)
    except OSError as error:
        raise SlideError(path, f"cannot be read ({error.strerror})", "check the path") from error
    return digest.hexdigest()


def _samples(size: int) -> list[Range]:
    """Head, tail and evenly spaced samples of a file of ``size`` bytes; some may end after it."""
    spread = [size * i // (_SAMPLES + 1) for i in range(1, _SAMPLES + 1)]
    ends = [Range(0, _END), Range(max(size - _END, 0), _END)]
    return ends + [Range(offset, _SAMPLE) for offset in spread]


def _remote_identity(path: RemotePath, parts: Iterable[SlidePath]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    if path.is_dir():
        for file in path.files():
            status = file.stat()
            name = file.relative_to(path)
            digest.update(f"{name}:{status.st_size}:{status.etag}\n".encode())
        return digest.hexdigest()
    found = RemoteObject(path)
    digest.update(f"{found.size}:{found.etag}\n".encode())
    inside = [Range(r.start, min(r.length, found.size - r.start)) for r in _samples(found.size)]
    for sample in found.read(inside, gap=0):
        digest.update(sample)
    others = (RemoteObject(part) for part in parts if isinstance(part, RemotePath))
    for other in sorted(f"{part.size}:{part.etag}\n" for part in others):
        digest.update(other.encode())
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

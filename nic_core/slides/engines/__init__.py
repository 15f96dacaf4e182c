"""Engines: the libraries that decode slides, behind one interface.

:func:`open_engine` is the only place that decides which library reads a file:

==============================================  ===========================================
file                                            engine
==============================================  ===========================================
TIFF, OME-TIFF, Aperio SVS                      ``tifffile``; JPEG tiles are decoded by
                                                libjpeg-turbo, other codecs by imagecodecs
Hamamatsu NDPI, Leica SCN, Philips TIFF,        ``openslide``
Ventana BIF, DICOM, MIRAX, other vendor
formats, YCbCr outside JPEG (SVS with 33003)
PNG, JPEG                                       ``libvips``; the whole image is held in memory
OME-Zarr (a folder)                             ``zarr``
Zeiss CZI                                       ``openslide`` where it reads the file, else
                                                ``czi``, in a process of its own
==============================================  ===========================================

libvips can read TIFF as well, at about the same speed, if the caller requests it. It is not the
default because it reports an undecodable tile only once, then returns that tile and good
neighbours as black, and because it accepts JPEG data that are damaged inside a tile. It reads
vendor formats where it was built with OpenSlide, which the wheels are not.

Of a slide in an object store, the engines ``tifffile`` and ``zarr`` read what they need; for the
others the slide is copied to a local folder (:mod:`nic_core.slides.local_copies`).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from nic_core.object_stores import RemoteError
from nic_core.slides.engines.base import Engine, EngineName, Level, as_slide_error
from nic_core.slides.engines.czi import CziEngine
from nic_core.slides.engines.openslide import UNKNOWN_FORMAT_REMEDY, OpenSlideEngine
from nic_core.slides.engines.tifffile import TiffEngine
from nic_core.slides.engines.vips import VipsEngine
from nic_core.slides.errors import SlideError
from nic_core.slides.files import files_of_slide, is_zarr
from nic_core.slides.images import ImageInfo
from nic_core.slides.local_copies import LocalCopy, local_copy
from nic_core.slides.metadata import DAMAGED_REMEDY
from nic_core.slides.remote import RemotePath, SlidePath
from nic_core.slides.tiff import TiffInfo, check_only_image, inspect_tiff

__all__ = ["Engine", "EngineName", "Level", "OpenedEngine", "as_slide_error", "open_engine"]

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_CZI_MAGIC = b"ZISRAWFI"
_PLAIN_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


@dataclass(frozen=True)
class OpenedEngine:
    """An engine that reads a slide.

    Attributes
    ----------
    engine : Engine
    reason : str
        Why this engine was chosen, in a few words.
    image : int
        Number of the image in the file; 0 if the format has one scan.
    images : tuple of ImageInfo
        All images of a TIFF whose tags describe them; empty for other formats.
    alternatives : tuple of int
        Images to try next, if this one is not a brightfield scan.
    copy : LocalCopy or None
        Copy of a remote slide that is read instead of it.
    """

    engine: Engine
    reason: str
    image: int = 0
    images: tuple[ImageInfo, ...] = ()
    alternatives: tuple[int, ...] = ()
    copy: LocalCopy | None = None

    def close(self) -> None:
        """Close the file, and let its local copy be removed when room is needed."""
        self.engine.close()
        if self.copy is not None:
            self.copy.release()


def open_engine(
    path: SlidePath, name: EngineName | None = None, image: int | None = None
) -> OpenedEngine:
    """Open a slide file with the engine for its format, or with the requested one.

    Formats are recognised by content, not by suffix, except for MIRAX, whose ``.mrxs`` file is a
    JPEG.

    Parameters
    ----------
    image : int, optional
        Number of the image to read; default: see :mod:`nic_core.slides.images`.

    Raises
    ------
    SlideError
        The file is missing, damaged, not an image or not RGB brightfield, it has no such image, or
        the requested engine does not read it.
    """
    if is_zarr(path):  # remote ones too: each chunk is an object
        # imported here, since zarr takes half a second
        from nic_core.slides.engines.zarr import ZarrEngine

        if name not in (None, ZarrEngine.name):
            raise _wrong_engine(path, name)
        check_only_image(path, image)
        return OpenedEngine(ZarrEngine(path), "OME-Zarr, chunks read as tiles")
    if isinstance(path, RemotePath):
        return _open_remote(path, name, image)
    magic = _magic(path)
    if magic == _CZI_MAGIC and name in (None, "czi"):
        check_only_image(path, image)
        return _open_czi(path, name)
    tiff = inspect_tiff(path, image) if magic.startswith(_TIFF_MAGIC) else None
    if tiff is None:
        check_only_image(path, image)
    plain = magic.startswith(_PLAIN_MAGIC) and path.suffix.lower() != ".mrxs"
    default: EngineName = "openslide"
    if plain:
        default, reason = "libvips", "plain image, held in memory"
    elif tiff is None:
        reason = "vendor format, not TIFF"
    elif tiff.openslide_reason:
        reason = tiff.openslide_reason
    else:
        default, reason = "tifffile", "TIFF tiles read directly"
    opened = OpenedEngine(
        _open(path, name or default, tiff, plain),
        reason if name in (None, default) else "requested",
    )
    if tiff is None:
        return opened
    return replace(opened, image=tiff.image, images=tiff.images, alternatives=tiff.alternatives)


def _open_remote(path: RemotePath, name: EngineName | None, image: int | None) -> OpenedEngine:
    """Read the tiles of a TIFF by ranges; read any other slide from a local copy."""
    if _magic(path).startswith(_TIFF_MAGIC) and name in (None, TiffEngine.name):
        tiff = inspect_tiff(path, image)
        if not tiff.openslide_reason:
            return OpenedEngine(
                TiffEngine(path, tiff),
                "TIFF tiles read by ranges",
                tiff.image,
                tiff.images,
                tiff.alternatives,
            )
    found = files_of_slide(path)
    files = (found.path, *getattr(found, "parts", ()))
    copy = local_copy([file for file in files if isinstance(file, RemotePath)])
    try:
        opened = open_engine(copy.path, name, image)
    except SlideError as error:
        copy.release()
        raise SlideError(path, error.reason, error.remedy) from error
    except BaseException:
        copy.release()
        raise
    return replace(opened, reason=f"{opened.reason}; from a local copy", copy=copy)


def _open_czi(path: Path, name: EngineName | None) -> OpenedEngine:
    """OpenSlide reads some CZI files; libCZI, an optional package, reads them all."""
    if name is None:
        # OpenSlide refuses unsupported files of the format when it opens them
        with contextlib.suppress(SlideError):
            return OpenedEngine(OpenSlideEngine(path, None), "vendor format, not TIFF")
    reason = "requested" if name else "CZI that OpenSlide does not read"
    return OpenedEngine(CziEngine(path), reason)


def _open(path: Path, name: EngineName, tiff: TiffInfo | None, plain: bool) -> Engine:
    if name == "openslide" and not plain:
        return OpenSlideEngine(path, tiff)
    if name == "tifffile" and tiff is not None and not tiff.openslide_reason:
        return TiffEngine(path, tiff)
    if name == "libvips" and plain:
        return VipsEngine.plain(path)
    if name == "libvips" and tiff is not None and not tiff.openslide_reason:
        return VipsEngine.tiff(path, tiff)
    if name == "libvips":
        if VipsEngine.has_openslide():
            return VipsEngine.vendor(path)
        raise _wrong_engine(path, name, ", or install a libvips with OpenSlide")
    raise _wrong_engine(path, name)


def _wrong_engine(path: SlidePath, name: EngineName | None, more: str = "") -> SlideError:
    reason = f"engine '{name}' does not read this file"
    return SlideError(path, reason, f"do not choose an engine{more}")


def _magic(path: SlidePath) -> bytes:
    try:
        if path.is_dir():
            raise SlideError(path, "is a folder", UNKNOWN_FORMAT_REMEDY)
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise SlideError(path, "is not a regular file", UNKNOWN_FORMAT_REMEDY)
        with path.open("rb") as file:
            magic = file.read(8)
    except RemoteError:
        raise
    except OSError as error:
        raise SlideError(path, f"cannot be read ({error.strerror})", "check the path") from error
    if not magic:
        raise SlideError(path, "the file is empty", DAMAGED_REMEDY)
    return magic

"""The libraries that decode slides, behind one small interface.

:func:`open_engine` alone decides which of them reads a file:

==============================================  =========================================
file                                            engine
==============================================  =========================================
TIFF, OME-TIFF, Aperio SVS                      ``tifffile``: tiles by their offsets; JPEG by
                                                libjpeg-turbo, other codecs by imagecodecs
Hamamatsu NDPI, Leica SCN, Philips TIFF,        ``openslide``
Ventana BIF, DICOM, MIRAX, other vendors',
YCbCr that is not JPEG's (SVS 33003)
PNG, JPEG                                       ``libvips``, whole into memory
==============================================  =========================================

libvips reads TIFF too when asked, about as fast. It is not the default: it reports an
undecodable tile once, then gives it and good ones beside it as black, and passes JPEG data
damaged within a tile.
Vendors' formats it reads where it was built with OpenSlide, which the wheels are not.
"""

from __future__ import annotations

from pathlib import Path

import openslide
import pyvips

from nic_core.slides.dicom import check_dicom
from nic_core.slides.engines.base import Engine, EngineName, Level, naming
from nic_core.slides.engines.openslide import OpenSlideEngine
from nic_core.slides.engines.tifffile import TiffEngine
from nic_core.slides.engines.vips import VipsEngine
from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import DAMAGED_REMEDY
from nic_core.slides.tiff import TiffScan, tiff_scan

__all__ = ["Engine", "EngineName", "Level", "naming", "open_engine"]

_NOT_A_SLIDE = "give a whole-slide image (SVS, TIFF, NDPI, MIRAX, SCN, DICOM), a PNG or a JPEG"
_CONVERT = "convert it to a tiled RGB TIFF"
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PLAIN_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


def open_engine(path: Path, name: EngineName | None = None) -> tuple[Engine, str]:
    """Open a slide file with the engine for it, or with the one asked for.

    Returns
    -------
    engine, reason
        And why it is this one, in a few words.

    Raises
    ------
    SlideError
        The file is missing, damaged, no image or not an RGB brightfield one, or not one for the
        engine asked for.
    """
    magic = _magic(path)
    scan = tiff_scan(path) if magic.startswith(_TIFF_MAGIC) else None
    plain = magic.startswith(_PLAIN_MAGIC) and path.suffix.lower() != ".mrxs"
    default: EngineName = "openslide"
    if plain:
        default, reason = "libvips", "a plain image, whole in memory"
    elif scan is None:
        reason = "a vendor's format, not TIFF"
    elif scan.dialect:
        reason = scan.dialect
    else:
        default, reason = "tifffile", "TIFF: tiles by their offsets"
    engine = _open(path, name or default, scan, plain)
    return engine, reason if name in (None, default) else "asked for"


def _open(path: Path, name: EngineName, scan: TiffScan | None, plain: bool) -> Engine:
    remedy = "leave the engine open"
    if name == "openslide" and not plain:
        return _open_with_openslide(path, scan)
    if name == "tifffile" and scan is not None and not scan.dialect:
        return TiffEngine(path, scan)
    if name == "libvips" and plain:
        return VipsEngine.plain(path)
    if name == "libvips" and scan is not None and not scan.dialect:
        return VipsEngine.tiff(path, scan)
    if name == "libvips":
        if pyvips.type_find("VipsForeignLoad", "openslideload"):
            return VipsEngine.vendor(path)
        remedy += ", or install a libvips with OpenSlide"
    raise SlideError(path, f"engine '{name}' does not read this file", remedy)


def _open_with_openslide(path: Path, scan: TiffScan | None) -> Engine:
    if path.suffix.lower() == ".mrxs" and not path.with_suffix("").is_dir():
        raise SlideError(
            path, f"the folder {path.stem} beside it is missing", "copy the folder with the file"
        )
    check_dicom(path)
    try:
        return OpenSlideEngine(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        if scan is None:
            raise SlideError(path, "not an image of a known format", _NOT_A_SLIDE) from error
        kind = scan.dialect or "tiles by their offsets"
        raise SlideError(path, f"a TIFF that OpenSlide does not know ({kind})", _CONVERT) from error
    except openslide.OpenSlideError as error:
        remedy = f"{DAMAGED_REMEDY}, or {_CONVERT}"
        raise SlideError(path, f"OpenSlide cannot open it: {error}", remedy) from error


def _magic(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise SlideError(path, "is a folder", _NOT_A_SLIDE)
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise SlideError(path, "is no regular file", _NOT_A_SLIDE)
        with path.open("rb") as file:
            magic = file.read(8)
    except OSError as error:
        raise SlideError(path, f"cannot be read ({error.strerror})", "check the path") from error
    if not magic:
        raise SlideError(path, "the file is empty", DAMAGED_REMEDY)
    return magic

"""Which files are a slide: find all files of the slide that a path belongs to.

Several formats store a slide in several files: DICOM (a series), MIRAX (a file and a folder),
Hamamatsu VMS and VMU, and OME-TIFF sets; an OME-Zarr image is a folder. Each is one slide, opened
by one of its files, whichever file a caller names.
"""

from __future__ import annotations

import configparser
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass

from nic_core.object_stores import RemoteError, RemoteUnavailableError
from nic_core.slides.dicom import DicomFile, folder_series, read_dicom, series_problem
from nic_core.slides.errors import SlideError
from nic_core.slides.ome_set import OTHER_SCAN, companion_file, ome_images, parse_ome
from nic_core.slides.remote import RemotePath, SlidePath
from nic_core.slides.tiff import open_tiff

# suffixes of the formats that the engines read and that state um/px
SLIDE_SUFFIXES = frozenset(
    (
        ".svs",
        ".tif",
        ".tiff",
        ".btf",
        ".tf2",
        ".tf8",
        ".ptif",
        ".ptiff",
        ".qptiff",
        ".ndpi",
        ".scn",
        ".bif",
        ".mrxs",
        ".vms",
        ".vmu",
        ".svslide",
        ".dcm",
        ".dicom",
        ".zarr",
        ".czi",
    )
)
# suffixes of images that state no um/px
PICTURE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg"))
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
COMPANION = ".companion.ome"  # the file with the metadata of an OME-TIFF set
# one of these makes a folder a Zarr group or array
ZARR_FILES = frozenset((".zattrs", ".zgroup", "zarr.json"))

_COPY_AGAIN = "copy the file again from its source"
_COPY_FOLDER = "copy the folder together with the file"
_COPY_SET = "copy all files of the OME-TIFF set into one folder"

SeriesOf = Callable[[SlidePath], dict[str, list[DicomFile]]]  # folder to its DICOM series


@dataclass(frozen=True)
class SlideFiles:
    """The files of one slide.

    Attributes
    ----------
    path : Path or RemotePath
        The file (OME-Zarr: folder) by which the slide is opened.
    parts : tuple of Path or RemotePath
        Its other files.
    problem : SlideError or None
        Why the slide cannot be used, as far as its files show it without a look at the pixels.
    folder : str
        Name of the folder that holds only this DICOM series, whose files often have the same
        names for every slide; else empty.
    """

    path: SlidePath
    parts: tuple[SlidePath, ...] = ()
    problem: SlideError | None = None
    folder: str = ""


@dataclass(frozen=True)
class LeftAside:
    """A file that is not taken as a slide, and why not."""

    path: SlidePath
    reason: str


def files_of_slide(
    path: SlidePath, *, series_of: SeriesOf = folder_series
) -> SlideFiles | LeftAside:
    """Find all files of the slide that a path belongs to.

    Parameters
    ----------
    path : Path or RemotePath
        Any file of the slide; or its folder, for OME-Zarr and for a folder with one DICOM series.
    series_of : callable, optional
        Replaces :func:`nic_core.slides.dicom.folder_series`, to read the files of a folder once
        for all of its slides.

    Raises
    ------
    RemoteUnavailableError
        The server of a remote file does not answer. Whether it is a slide is then not known.
    """
    try:
        return _files_of_slide(path, series_of)
    except RemoteUnavailableError:
        raise
    except RemoteError as error:
        return SlideFiles(path, problem=SlideError(path, error.reason, error.remedy))
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        return SlideFiles(path, problem=SlideError(path, reason, "check the path"))


def _files_of_slide(path: SlidePath, series_of: SeriesOf) -> SlideFiles | LeftAside:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return _folder(path, series_of)
    if not stat.S_ISREG(mode):  # opening a pipe would block
        return LeftAside(path, "not a regular file")
    suffix = path.suffix.lower()
    owner = _mirax_of_data(path)
    if owner is not None or suffix == ".mrxs":
        return _mirax(owner or path)
    key_file = path if suffix in (".vms", ".vmu") else _hamamatsu_of_image(path)
    if key_file is not None:
        return _hamamatsu(key_file)
    if path.name.lower().endswith(COMPANION):
        return _ome_set(path, path.read_bytes())
    with path.open("rb") as file:
        head = file.read(132)
    if not head:
        return SlideFiles(path, problem=SlideError(path, "the file is empty", _COPY_AGAIN))
    if head[128:] == b"DICM":
        return _dicom(path, series_of)
    if head.startswith(_TIFF_MAGIC):
        return _tiff(path)
    # a file whose content does not fit its suffix is refused when it is opened
    if suffix in SLIDE_SUFFIXES | PICTURE_SUFFIXES:
        return SlideFiles(path)
    return LeftAside(path, "not a slide format")


def is_zarr(path: SlidePath) -> bool:
    """Whether a path is a folder with Zarr metadata."""
    return path.is_dir() and any((path / name).is_file() for name in ZARR_FILES)


def _folder(path: SlidePath, series_of: SeriesOf) -> SlideFiles | LeftAside:
    if is_zarr(path):
        # imported here, since zarr takes half a second
        from nic_core.slides.ome_zarr import NotASlideError, ome_zarr_files

        try:
            return SlideFiles(path, tuple(ome_zarr_files(path)))
        except NotASlideError as error:
            return LeftAside(path, error.reason)
        except SlideError as error:
            return SlideFiles(path, problem=error)
    mirax = path.with_name(f"{path.name}.mrxs")
    if mirax.is_file():
        return _mirax(mirax)
    series = _scans(series_of(path))
    if len(series) == 1:
        return _dicom(series[0][0].path, series_of)
    if series:
        remedy = "name a file of the slide instead"
        return SlideFiles(
            path, problem=SlideError(path, f"a folder with {len(series)} DICOM series", remedy)
        )
    return LeftAside(path, "a folder that is not a slide: neither OME-Zarr nor a DICOM series")


def _dicom(path: SlidePath, series_of: SeriesOf) -> SlideFiles | LeftAside:
    try:
        tags = read_dicom(path)
    except SlideError as error:
        return SlideFiles(path, problem=error)
    if tags is None or not tags.is_slide_image:
        kind = tags.sop_class if tags else "unknown"
        return LeftAside(path, f"DICOM, but not a whole-slide image ({kind})")
    series = series_of(path.parent)
    if tags.series not in series:
        reason = "it was incomplete when the files of its folder were read"
        remedy = "run this again when the folder is copied"
        return SlideFiles(path, problem=SlideError(path, reason, remedy))
    first, *others = series[tags.series]
    if not first.is_level:
        return LeftAside(path, "DICOM: label, overview or thumbnail; its series has no scan here")
    parts = tuple(file.path for file in others)
    folder = path.absolute().parent.name if len(_scans(series)) == 1 else ""
    return SlideFiles(first.path, parts, series_problem([first, *others]), folder)


def _scans(series: dict[str, list[DicomFile]]) -> list[list[DicomFile]]:
    """The series with a scan; others hold only a label, overview or thumbnail."""
    return [files for files in series.values() if files[0].is_level]


def _mirax_of_data(path: SlidePath) -> SlidePath | None:
    """Return the MIRAX file of a file in a data folder; None for any other file."""
    if path.suffix.lower() not in (".dat", ".ini"):
        return None
    owner = path.parent.with_name(f"{path.parent.name}.mrxs")
    return owner if owner.is_file() else None


def _mirax(path: SlidePath) -> SlideFiles:
    if path.is_symlink() and not path.with_suffix("").is_dir():
        path = path.resolve()  # the folder is beside the file, not beside the link
    folder = path.with_suffix("")
    parts = tuple(sorted(p for p in folder.iterdir() if p.is_file())) if folder.is_dir() else ()
    problem = None
    if path.suffix != ".mrxs":
        problem = SlideError(
            path, f"OpenSlide does not read the suffix {path.suffix}", "rename it to .mrxs"
        )
    elif path.stat().st_size == 0:
        problem = SlideError(path, "the file is empty", _COPY_AGAIN)
    elif not folder.is_dir():
        problem = SlideError(path, f"its folder '{path.stem}' is missing", _COPY_FOLDER)
    elif not (folder / "Slidedat.ini").is_file():
        reason = f"its folder '{path.stem}' has no Slidedat.ini"
        problem = SlideError(path, reason, _COPY_FOLDER)
    return SlideFiles(path, parts, problem)


def _hamamatsu_of_image(path: SlidePath) -> SlidePath | None:
    """Return the VMS or VMU file that names an image as its own; None if there is none."""
    if path.suffix.lower() not in (".jpg", ".jpeg", ".ngr", ".opt"):
        return None
    # names, not paths: a table may name thousands of JPEGs of one folder
    if isinstance(path, RemotePath):
        listed = [other.name for other in path.parent.iterdir()] if path.in_bucket else []
    else:
        listed = os.listdir(path.parent)
    names = sorted(name for name in listed if name.lower().endswith((".vms", ".vmu")))
    keys = (path.parent / name for name in names)
    return next((key for key in keys if path.name in _hamamatsu_names(key)), None)


def _hamamatsu(path: SlidePath) -> SlideFiles:
    names = _hamamatsu_names(path)
    parts = tuple(path.parent / name for name in sorted(names))
    missing = [part.name for part in parts if not part.is_file()]
    problem = None
    if missing:
        reason = f"its file {missing[0]} is missing"
        problem = SlideError(path, reason, "copy all files of the slide into one folder")
    return SlideFiles(path, tuple(part for part in parts if part.is_file()), problem)


def _hamamatsu_names(path: SlidePath) -> set[str]:
    """Names of the files that a VMS or VMU file lists; empty if it cannot be parsed."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="latin-1"))
    except configparser.Error:  # opening the slide reports it
        return set()
    return {
        value
        for section in parser.values()
        for key, value in section.items()
        if value and re.fullmatch(r"(imagefile|mapfile|macroimage|optimisationfile).*", key)
    }


def _tiff(path: SlidePath) -> SlideFiles | LeftAside:
    try:
        with open_tiff(path, ndpi=None) as tiff:
            if tiff.is_ome and tiff.ome_metadata:
                return _ome_set(path, tiff.ome_metadata.encode())
            samples = [page.keyframe.samplesperpixel for page in tiff.pages if page.keyframe]
            if tiff.is_ome or not samples or max(samples) >= 3:
                return SlideFiles(path)
    except RemoteError:
        raise
    # tifffile raises any of a dozen types for a damaged structure; opening the slide reports it
    except Exception:  # noqa: BLE001
        return SlideFiles(path)
    return LeftAside(path, "a TIFF without RGB pixels: a mask or label image, not a slide")


def _ome_set(path: SlidePath, xml: bytes) -> SlideFiles | LeftAside:
    """The slide of an OME-TIFF set, from a TIFF or companion file of it and its OME-XML."""
    root = parse_ome(xml)
    others = {path}
    if root is not None and (companion := companion_file(path, root)) is not None:
        if not companion.is_file():
            reason = f"its OME metadata are in '{companion.name}', which is missing"
            return SlideFiles(path, problem=SlideError(path, reason, _COPY_SET))
        root = parse_ome(companion.read_bytes())
        if root is None:
            reason = f"the OME metadata in '{companion.name}' cannot be parsed"
            return SlideFiles(path, problem=SlideError(path, reason, _COPY_AGAIN))
        others.add(companion)
    elif root is None and path.name.lower().endswith(COMPANION):
        return LeftAside(path, "OME metadata that cannot be parsed: copy the file again")
    images = [] if root is None else ome_images(root, path.name)
    if not images:  # opening the file reports it
        return SlideFiles(path)
    largest = max(image.pixels for image in images)
    scans = [image for image in images if image.pixels * OTHER_SCAN > largest]
    own = [image for image in scans if path.name in image.files] or scans
    if len(own) > 1 and len({image.files[0] for image in own}) > 1:
        names = ", ".join(image.files[0] for image in own)
        return LeftAside(path, f"a file of an OME-TIFF set with several scans: {names}")
    main, problem = path.parent / own[0].files[0], None
    if not main.is_file():
        reason = f"its scan is in '{main.name}' of its OME-TIFF set, which is missing"
        problem, main = SlideError(path, reason, _COPY_SET), path
    # each other scan is another slide
    shared = {name for image in images if image not in scans for name in image.files}
    parts = {path.parent / name for name in (*own[0].files, *shared)} | others
    return SlideFiles(main, tuple(sorted(p for p in parts - {main} if p.is_file())), problem)

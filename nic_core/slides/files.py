"""Which files are a slide: find the slides of a folder, and all files of one slide.

Several formats store a slide in several files: DICOM (a series), MIRAX (a file and a folder),
Hamamatsu VMS and VMU, and OME-TIFF sets; an OME-Zarr image is a folder. Each is one slide, opened
by one of its files, whichever file a caller names.
"""

from __future__ import annotations

import configparser
import functools
import os
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import tifffile
from wcmatch import glob

from nic_core.slides.dicom import DicomFile, folder_series, read_dicom, series_problem
from nic_core.slides.errors import SlideError
from nic_core.slides.ome_set import OTHER_SCAN, companion_file, ome_images, parse_ome

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
_PICTURES = frozenset((".png", ".jpg", ".jpeg"))
_UNREAD = frozenset(
    (
        ".isyntax",
        ".i2syntax",
        ".vsi",
        ".lif",
        ".nd2",
        ".ndpis",
        ".afi",
        ".kfb",
        ".mds",
        ".sdpc",
        ".tmap",
        ".jp2",
    )
)
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_COMPANION = ".companion.ome"  # the file with the metadata of an OME-TIFF set
_ZARR_FILES = frozenset((".zattrs", ".zgroup", "zarr.json"))
_GLOB = glob.GLOBSTAR | glob.IGNORECASE | glob.BRACE

_COPY_AGAIN = "copy the file again from its source"
_COPY_FOLDER = "copy the folder together with the file"
_COPY_SET = "copy all files of the OME-TIFF set into one folder"

_SeriesOf = Callable[[Path], dict[str, list[DicomFile]]]  # folder to its DICOM series


@dataclass(frozen=True)
class SlideFiles:
    """The files of one slide.

    Attributes
    ----------
    path : Path
        The file (OME-Zarr: folder) by which the slide is opened.
    parts : tuple of Path
        Its other files.
    problem : SlideError or None
        Why the slide cannot be used, as far as its files show it without a look at the pixels.
    folder : str
        Name of the folder that holds nothing but this DICOM series, whose files often have the same
        names for every slide; else empty.
    """

    path: Path
    parts: tuple[Path, ...] = ()
    problem: SlideError | None = None
    folder: str = ""


@dataclass(frozen=True)
class LeftAside:
    """A file that is not taken as a slide, and why not."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Listing:
    """Names of files that may be slides, before any file is opened.

    Attributes
    ----------
    candidates : tuple of Path
        Sorted. Folders among them are OME-Zarr.
    left_aside : tuple of LeftAside
        Files with the name of a slide or an image that are no candidates.
    """

    candidates: tuple[Path, ...]
    left_aside: tuple[LeftAside, ...]


def list_candidates(folder: Path, pattern: str | None = None) -> Listing:
    """List the files below a folder that may be slides, by their names alone.

    Links are followed. A folder that links reach more than once is searched once. Hidden files and
    folders, and the data folders of MIRAX slides, are left out.

    Parameters
    ----------
    pattern : str, optional
        Glob pattern relative to ``folder``, with ``**`` and ``{a,b}``; case does not matter.
        Default: every file with the suffix of a readable format, and files without a suffix, which
        may be DICOM.
    """
    tree = _walk(folder)
    left = list(tree.left_aside)
    candidates: list[Path] = []
    listed = {
        os.path.realpath(path)
        for path in (tree.files if tree.links else ())
        if path not in tree.links and path.suffix.lower() in SLIDE_SUFFIXES
    }
    for path in sorted({*tree.files, *tree.zarrs}):
        relative = path.relative_to(folder).as_posix()
        reason = _name_reason(path, relative, pattern, is_zarr=path in tree.zarrs)
        if reason is None and path in tree.links:
            target = os.path.realpath(path)
            if not os.path.exists(target):
                reason = "a link to a file that does not exist"
            elif target in listed:
                reason = "a link to a file that is listed already"
            listed.add(target)
        if reason is None:
            candidates.append(path)
        elif reason:
            left.append(LeftAside(path, reason))
    return Listing(tuple(candidates), tuple(left))


def find_slide_files(
    folder: Path, pattern: str | None = None
) -> tuple[list[SlideFiles], list[LeftAside]]:
    """Find the slides below a folder, each once, and what is not a slide.

    Parameters
    ----------
    pattern : str, optional
        See :func:`list_candidates`.

    Returns
    -------
    slides : list of SlideFiles
        Sorted by path.
    left_aside : list of LeftAside
    """
    listing = list_candidates(folder, pattern)
    left = list(listing.left_aside)
    found: dict[Path, SlideFiles] = {}
    series_of = functools.cache(folder_series)
    for path in listing.candidates:
        if pattern is None and _may_be_dicom(path) and not _is_dicom_or_folder(path):
            left.append(LeftAside(path, "a file without a suffix that is not DICOM"))
            continue
        slide = files_of_slide(path, series_of=series_of)
        if isinstance(slide, LeftAside):
            left.append(slide)
        else:
            # more series may come into the folder of all slides
            found[slide.path] = replace(slide, folder="") if path.parent == folder else slide
    slides = _join_spread_series(found.values(), series_of)
    parts = {part for slide in slides for part in slide.parts}
    return slides, [item for item in left if item.path not in parts]


def files_of_slide(path: Path, *, series_of: _SeriesOf = folder_series) -> SlideFiles | LeftAside:
    """Find all files of the slide that a path belongs to.

    Parameters
    ----------
    path : Path
        Any file of the slide; or its folder, for OME-Zarr and for a folder with one DICOM series.
    series_of : callable, optional
        Replaces :func:`nic_core.slides.dicom.folder_series`, to read the files of a folder once
        for all of its slides.
    """
    if path.is_dir():
        return _folder(path, series_of)
    if not path.exists():
        reason = "cannot be read (No such file or directory)"
        return SlideFiles(path, problem=SlideError(path, reason, "check the path"))
    if not path.is_file():  # opening a pipe would block
        return LeftAside(path, "not a regular file")
    suffix = path.suffix.lower()
    owner = _mirax_of_data(path)
    if owner is not None or suffix == ".mrxs":
        return _mirax(owner or path)
    key_file = path if suffix in (".vms", ".vmu") else _hamamatsu_of_image(path)
    if key_file is not None:
        return _hamamatsu(key_file)
    if path.name.lower().endswith(_COMPANION):
        return _ome_set(path, path.read_bytes())
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        return SlideFiles(path, problem=SlideError(path, reason, "check the path"))
    if not head:
        return SlideFiles(path, problem=SlideError(path, "the file is empty", _COPY_AGAIN))
    if head[128:] == b"DICM":
        return _dicom(path, series_of)
    if head.startswith(_TIFF_MAGIC):
        return _tiff(path)
    if suffix in SLIDE_SUFFIXES | _PICTURES:  # damaged, or not what the suffix says: opening says
        return SlideFiles(path)
    return LeftAside(path, "not a slide format")


def is_zarr(path: Path) -> bool:
    """Whether a path is a folder with Zarr metadata."""
    return any((path / name).is_file() for name in _ZARR_FILES)


def summarize_left_aside(left_aside: Iterable[LeftAside]) -> list[str]:
    """Return a line for each reason: how many files, the reason, and an example."""
    left = list(left_aside)
    example = {item.reason: item.path for item in reversed(left)}
    return [
        f"{count} {'file' if count == 1 else 'files'}: {reason}, for example {example[reason]}"
        for reason, count in Counter(item.reason for item in left).most_common()
    ]


@dataclass
class _Tree:
    """The files below a folder, and the folders that were not searched.

    OME-Zarr folders are in ``zarrs``, links to files in ``files`` and in ``links``.
    """

    files: list[Path] = field(default_factory=list)
    links: set[Path] = field(default_factory=set)
    zarrs: set[Path] = field(default_factory=set)
    left_aside: list[LeftAside] = field(default_factory=list)


def _walk(folder: Path) -> _Tree:
    tree = _Tree()
    visited: set[tuple[int, int]] = set()
    # links last, so that a folder is found under its own name rather than through a link
    waiting: deque[Path] = deque([folder])
    while waiting:
        current = waiting.popleft()
        try:
            status = os.stat(current)
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            reason = f"a folder that cannot be read ({error.strerror})"
            tree.left_aside.append(LeftAside(current, reason))
            continue
        if (status.st_dev, status.st_ino) in visited:
            reason = "a link to a folder that is searched already"
            tree.left_aside.append(LeftAside(current, reason))
            continue
        visited.add((status.st_dev, status.st_ino))
        names = {entry.name for entry in entries}
        if names & _ZARR_FILES:
            tree.zarrs.add(current)
            continue
        if current.suffix.lower() == ".zarr":
            reason = "a .zarr folder without Zarr metadata: copy it again from its source"
            tree.left_aside.append(LeftAside(current, reason))
            continue
        slides = {name[: -len(".mrxs")] for name in names if name.lower().endswith(".mrxs")}
        for entry in entries:
            path = current / entry.name
            if not entry.is_dir():
                tree.files.append(path)
                if entry.is_symlink():
                    tree.links.add(path)
            elif entry.name.startswith("."):
                tree.left_aside.append(LeftAside(path, "a hidden folder"))
            elif entry.name in slides:  # the data of a MIRAX slide
                continue
            elif entry.is_symlink():
                waiting.append(path)
            else:
                waiting.appendleft(path)
    return tree


def _name_reason(path: Path, relative: str, pattern: str | None, *, is_zarr: bool) -> str | None:
    """Why a file is no candidate, by its name; None if it is one, empty if nobody asks why."""
    suffix = ".zarr" if is_zarr else path.suffix.lower()
    if path.name.startswith("."):
        return "a hidden file" if suffix in SLIDE_SUFFIXES else ""
    if pattern is not None and not _matches(relative, pattern):
        return f"does not match the pattern {pattern}" if suffix in SLIDE_SUFFIXES else ""
    if suffix in _PICTURES:
        return (
            "PNG and JPEG state no um/px: a slide table can name it, with its um/px in column mpp"
        )
    if suffix in _UNREAD:
        return f"no library here reads {suffix}: convert it to OME-TIFF or DICOM"
    companion = path.name.lower().endswith(_COMPANION)
    if pattern is None and suffix not in SLIDE_SUFFIXES and not (companion or _may_be_dicom(path)):
        return f"not a slide format ({suffix})"
    return None


@functools.lru_cache(maxsize=64)
def _matcher(pattern: str) -> glob.WcMatcher[str]:
    return glob.compile(unicodedata.normalize("NFC", pattern).removeprefix("./"), flags=_GLOB)


def _matches(relative: str, pattern: str) -> bool:
    return _matcher(pattern).match(unicodedata.normalize("NFC", relative))


def _may_be_dicom(path: Path) -> bool:
    """Whether a name has no suffix; the last number of a UID is none."""
    return re.fullmatch(r"(\.\d*)?", path.suffix) is not None


def _is_dicom_or_folder(path: Path) -> bool:
    try:
        return path.is_dir() or read_dicom(path) is not None
    except SlideError:  # DICOM with a damaged header
        return True


def _folder(path: Path, series_of: _SeriesOf) -> SlideFiles | LeftAside:
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
    series = list(series_of(path).values())
    if len(series) == 1:
        return _dicom(series[0][0].path, series_of)
    if series:
        remedy = "name a file of the slide instead"
        return SlideFiles(
            path, problem=SlideError(path, f"a folder with {len(series)} DICOM series", remedy)
        )
    return LeftAside(path, "a folder that is no slide: neither OME-Zarr nor a DICOM series")


def _dicom(path: Path, series_of: _SeriesOf) -> SlideFiles | LeftAside:
    try:
        tags = read_dicom(path)
    except SlideError as error:
        return SlideFiles(path, problem=error)
    if tags is None or not tags.is_slide_image:
        kind = tags.sop_class if tags else "unknown"
        return LeftAside(path, f"DICOM, but not a whole-slide image ({kind})")
    series = series_of(path.parent)
    first, *others = series[tags.series]
    if not first.is_level:
        return LeftAside(path, "DICOM: label, overview or thumbnail without a scan in its folder")
    parts = tuple(file.path for file in others)
    folder = path.parent.name if len(series) == 1 else ""
    return SlideFiles(first.path, parts, series_problem([first, *others]), folder)


def _join_spread_series(slides: Iterable[SlideFiles], series_of: _SeriesOf) -> list[SlideFiles]:
    """Join the folders of a DICOM series that is spread over several, and name the problem.

    Folders with the same instances are copies, and slides of their own.
    """
    result: list[SlideFiles] = []
    spread: dict[str, tuple[SlideFiles, list[DicomFile]]] = {}  # by series
    for slide in sorted(slides, key=lambda slide: slide.path):
        members = _members(slide.path, series_of)
        known = spread[members[0].series][1] if members and members[0].series in spread else []
        if not members or {f.instance for f in known} & {f.instance for f in members}:
            result.append(slide)
        else:
            spread[members[0].series] = slide, known + members
    for slide, members in spread.values():
        folders = sorted({str(file.path.parent) for file in members})
        if len(folders) == 1:
            result.append(slide)
            continue
        first, *others = sorted(members, key=lambda file: (not file.is_level, -file.pixels))
        problem = SlideError(
            first.path,
            f"its DICOM series is spread over {len(folders)} folders: {', '.join(folders)}",
            "put all files of a series into one folder",
        )
        result.append(SlideFiles(first.path, tuple(file.path for file in others), problem))
    return sorted(result, key=lambda slide: slide.path)


def _members(path: Path, series_of: _SeriesOf) -> list[DicomFile]:
    """The files of the DICOM series of a file, in its folder; empty for any other file."""
    try:
        tags = read_dicom(path) if path.is_file() else None
    except SlideError:
        return []
    return series_of(path.parent)[tags.series] if tags and tags.is_slide_image else []


def _mirax_of_data(path: Path) -> Path | None:
    """Return the MIRAX file of a file in a data folder; None if it is no such file."""
    if path.suffix.lower() not in (".dat", ".ini"):
        return None
    owner = path.parent.with_name(f"{path.parent.name}.mrxs")
    return owner if owner.is_file() else None


def _mirax(path: Path) -> SlideFiles:
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


def _hamamatsu_of_image(path: Path) -> Path | None:
    """Return the VMS or VMU file that names an image as its own; None if there is none."""
    if path.suffix.lower() not in (".jpg", ".jpeg", ".ngr", ".opt"):
        return None
    keys = (p for p in sorted(path.parent.iterdir()) if p.suffix.lower() in (".vms", ".vmu"))
    return next((key for key in keys if path.name in _hamamatsu_names(key)), None)


def _hamamatsu(path: Path) -> SlideFiles:
    names = _hamamatsu_names(path)
    parts = tuple(path.parent / name for name in sorted(names))
    missing = [part.name for part in parts if not part.is_file()]
    problem = None
    if missing:
        reason = f"its file {missing[0]} is missing"
        problem = SlideError(path, reason, "copy all files of the slide into one folder")
    return SlideFiles(path, tuple(part for part in parts if part.is_file()), problem)


def _hamamatsu_names(path: Path) -> set[str]:
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


def _tiff(path: Path) -> SlideFiles | LeftAside:
    try:
        with tifffile.TiffFile(path) as tiff:
            if tiff.is_ome and tiff.ome_metadata:
                return _ome_set(path, tiff.ome_metadata.encode())
            samples = [page.keyframe.samplesperpixel for page in tiff.pages if page.keyframe]
            if tiff.is_ome or not samples or max(samples) >= 3:
                return SlideFiles(path)
    # in a damaged structure tifffile raises any of a dozen types; opening the slide reports it
    except Exception:  # noqa: BLE001
        return SlideFiles(path)
    return LeftAside(path, "a TIFF without RGB pixels: a mask or label image, not a slide")


def _ome_set(path: Path, xml: bytes) -> SlideFiles | LeftAside:
    """The slide of an OME-TIFF set, from a TIFF or companion file of it and its OME-XML."""
    root = parse_ome(xml)
    others = {path}
    if root is not None and (companion := companion_file(path, root)) is not None:
        if not companion.is_file():
            reason = f"its OME metadata are in '{companion.name}', which is missing"
            return SlideFiles(path, problem=SlideError(path, reason, _COPY_SET))
        root = parse_ome(companion.read_bytes())
        others.add(companion)
    images = [] if root is None else ome_images(root, path.name)
    if not images:  # opening the file reports it
        return SlideFiles(path)
    scan = max(images, key=lambda image: image.pixels)
    second = next(
        (
            image
            for image in images
            if image.files[0] not in scan.files and image.pixels * OTHER_SCAN > scan.pixels
        ),
        None,
    )
    main, problem = path.parent / scan.files[0], None
    if not main.is_file():
        reason = f"its scan is in '{scan.files[0]}' of its OME-TIFF set, which is missing"
        problem, main = SlideError(path, reason, _COPY_SET), path
    elif second is not None:
        reason = f"its OME-TIFF set has scans in '{scan.files[0]}' and in '{second.files[0]}'"
        problem = SlideError(main, reason, "save each scan as an OME-TIFF of its own")
    parts = {path.parent / name for image in images for name in image.files} | others
    return SlideFiles(main, tuple(sorted(p for p in parts - {main} if p.is_file())), problem)

"""Slides of a folder: find each slide once, and say what is left aside and why."""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from wcmatch import glob

from nic_core.slides.dicom import DicomFile, folder_series, read_dicom
from nic_core.slides.errors import SlideError
from nic_core.slides.files import (
    COMPANION,
    PICTURE_SUFFIXES,
    SLIDE_SUFFIXES,
    ZARR_FILES,
    LeftAside,
    SeriesOf,
    SlideFiles,
    files_of_slide,
)
from nic_core.slides.remote import RemotePath, SlidePath

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
_GLOB = glob.GLOBSTAR | glob.IGNORECASE | glob.BRACE


@dataclass(frozen=True)
class Listing:
    """Names of files that may be slides, before any file is opened.

    Attributes
    ----------
    candidates : tuple of Path or RemotePath
        Sorted. Folders among them are OME-Zarr.
    left_aside : tuple of LeftAside
        Files with the suffix of a slide or an image that are not candidates.
    """

    candidates: tuple[SlidePath, ...]
    left_aside: tuple[LeftAside, ...]


def list_candidates(folder: SlidePath, pattern: str | None = None) -> Listing:
    """List the files below a folder that may be slides, by their names alone.

    Links are followed. A folder that links reach more than once is searched once. Hidden files and
    folders, and the data folders of MIRAX slides, are left out. Of a folder in a bucket
    (:class:`nic_core.slides.remote.RemotePath`) the objects below it are listed.

    Parameters
    ----------
    pattern : str, optional
        Glob pattern relative to ``folder``, with ``**`` and ``{a,b}``; case does not matter.
        Default: every file with the suffix of a readable format, and files without a suffix, which
        may be DICOM.
    """
    tree = _list_objects(folder) if isinstance(folder, RemotePath) else _walk(folder)
    left = list(tree.left_aside)
    candidates: list[SlidePath] = []
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
        if not _is_utf8(relative):
            shown = os.fsencode(path).decode("utf-8", "backslashreplace")
            left.append(LeftAside(Path(shown), "its path is not valid UTF-8: rename it"))
        elif reason is None:
            candidates.append(path)
        elif reason:
            left.append(LeftAside(path, reason))
    return Listing(tuple(candidates), tuple(left))


def find_slide_files(
    folder: SlidePath, pattern: str | None = None
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
    found: dict[SlidePath, SlideFiles] = {}
    series_of = functools.cache(folder_series)
    for path in listing.candidates:
        if pattern is None and _may_be_dicom(path) and not _is_dicom_or_folder(path):
            left.append(LeftAside(path, "a file without a suffix that is not DICOM"))
            continue
        slide = files_of_slide(path, series_of=series_of)
        if isinstance(slide, LeftAside):
            left.append(slide)
        else:
            # further series may be copied to this folder later
            found[slide.path] = replace(slide, folder="") if path.parent == folder else slide
    slides = _join_spread_series(found.values(), series_of)
    parts = {part for slide in slides for part in slide.parts}
    return slides, [item for item in left if item.path not in parts]


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

    files: list[SlidePath] = field(default_factory=list)
    links: set[SlidePath] = field(default_factory=set)
    zarrs: set[SlidePath] = field(default_factory=set)
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
        if names & ZARR_FILES:
            tree.zarrs.add(current)
            continue
        if current.suffix.lower() == ".zarr":
            reason = "a .zarr folder without Zarr metadata: copy it again from its source"
            tree.left_aside.append(LeftAside(current, reason))
            continue
        slides = {name[: -len(".mrxs")] for name in names if name.lower().endswith(".mrxs")}
        for entry in entries:
            path = current / entry.name
            if not _is_folder(entry):
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


def _list_objects(folder: RemotePath) -> _Tree:
    """The objects below a folder of a bucket, as :func:`_walk` finds files."""
    tree = _Tree()
    files = folder.files()
    with_metadata = {file.parent for file in files if file.name in ZARR_FILES}
    data_of_mirax = {file.with_suffix("") for file in files if file.suffix.lower() == ".mrxs"}
    left: dict[RemotePath, str] = {}
    for file in files:
        inside = file.relative_to(folder).parts[:-1]
        for depth, name in enumerate(("", *inside)):
            above = folder.joinpath(*inside[:depth])
            if above in with_metadata:
                tree.zarrs.add(above)
            elif name.startswith("."):
                left[above] = "a hidden folder"
            elif above.suffix.lower() == ".zarr" and depth:
                left[above] = "a .zarr folder without Zarr metadata: copy it again from its source"
            elif above not in data_of_mirax:
                continue
            break
        else:
            tree.files.append(file)
    tree.left_aside += [LeftAside(path, reason) for path, reason in left.items()]
    return tree


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder without permission: handled as a file
        return False


def _name_reason(
    path: SlidePath, relative: str, pattern: str | None, *, is_zarr: bool
) -> str | None:
    """Why a file is not a candidate, by its name; None: it is one; empty: not to be listed."""
    suffix = ".zarr" if is_zarr else path.suffix.lower()
    if path.name.startswith("."):
        return "a hidden file" if suffix in SLIDE_SUFFIXES else ""
    if pattern is not None and not _matches(relative, pattern):
        return f"does not match the pattern {pattern}" if suffix in SLIDE_SUFFIXES else ""
    if suffix in PICTURE_SUFFIXES:
        return (
            "PNG and JPEG state no um/px: a slide table can name it, with its um/px in column mpp"
        )
    if suffix in _UNREAD:
        return f"no library here reads {suffix}: convert it to OME-TIFF or DICOM"
    companion = path.name.lower().endswith(COMPANION)
    if pattern is None and suffix not in SLIDE_SUFFIXES and not (companion or _may_be_dicom(path)):
        return f"not a slide format ({suffix})"
    return None


def _is_utf8(name: str) -> bool:
    """Whether tables can hold a name; Python reads other bytes of a file name as surrogates."""
    return re.search("[\ud800-\udfff]", name) is None


@functools.lru_cache(maxsize=64)
def _matcher(pattern: str) -> glob.WcMatcher[str]:
    return glob.compile(unicodedata.normalize("NFC", pattern).removeprefix("./"), flags=_GLOB)


def _matches(relative: str, pattern: str) -> bool:
    return _matcher(pattern).match(unicodedata.normalize("NFC", relative))


def _may_be_dicom(path: SlidePath) -> bool:
    """Whether a name has no suffix; the last number of a UID is none."""
    return re.fullmatch(r"(\.\d*)?", path.suffix) is not None


def _is_dicom_or_folder(path: SlidePath) -> bool:
    try:
        return path.is_dir() or read_dicom(path) is not None
    except SlideError:  # DICOM with a damaged header
        return True


def _join_spread_series(slides: Iterable[SlideFiles], series_of: SeriesOf) -> list[SlideFiles]:
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


def _members(path: SlidePath, series_of: SeriesOf) -> list[DicomFile]:
    """The files of the DICOM series of a file, in its folder; empty for any other file."""
    try:
        tags = read_dicom(path) if path.is_file() else None
    except SlideError:
        return []
    if tags is None or not tags.is_slide_image:
        return []
    # none, if the file was incomplete when the files of its folder were read
    return series_of(path.parent).get(tags.series, [])

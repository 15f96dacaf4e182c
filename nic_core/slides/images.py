"""Images of a TIFF file: which images it holds, and which one is the slide.

A file may hold several images: scans, and photos of the label and of the whole glass (macro). A
pyramid is one image. Pixels, levels and um/px of a slide come from one and the same image. The rule
[choice]:

1. Images named label, macro, thumbnail or overview are never read.
2. The slide is the one with the most pixels of the other images in colour; of equal ones, the
   first. An image whose um/px is more than 8 times that of the finest one is an overview and no
   candidate. If the pixels of the chosen image are black, as in fluorescence, the next is tried.
3. A file whose largest image is in grey (fluorescence, for example) and has more than 16 times the
   pixels of the chosen one is refused: the latter may be an overview.
4. The caller can name an image by its number instead.

Images are numbered from 0 in the order of the OME-XML, or of their first page in the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

import tifffile

from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import (
    BRIGHTFIELD_REMEDY,
    COLOUR_REMEDY,
    CONVERT_REMEDY,
    DAMAGED_REMEDY,
    IMAGE_REMEDY,
    MPP_RANGE,
    UPRIGHT_REMEDY,
    FileMetadata,
    children,
    ome_metadata,
    page_metadata,
)
from nic_core.slides.ome_set import ome_xml
from nic_core.slides.remote import SlidePath

AlphaKind = Literal["straight", "premultiplied"]
"""Whether colours are stored as they are, or multiplied by their opacity."""

ASSOCIATED_NAMES = ("label", "macro", "thumbnail", "overview")
_COLOUR = (
    tifffile.PHOTOMETRIC.RGB,
    tifffile.PHOTOMETRIC.YCBCR,
    tifffile.PHOTOMETRIC.SEPARATED,
    tifffile.PHOTOMETRIC.CIELAB,
    tifffile.PHOTOMETRIC.ICCLAB,
)
_GREY = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE)
_ORIENTATION, _PAGE_NAME = 274, 285
_MAX_LISTED = 10
_OVERVIEW_MPP, _OVERVIEW_AREA = 8.0, 16.0  # see rules 2 and 3
# A level is smaller than the level before by at least this factor. Sizes are rounded to whole px,
# by some writers after every level.
_LEVEL_FACTOR, _LEVEL_ROUNDING = 1.5, 2
# channels that are not marked as colours may be red, green and blue, or stains of fluorescence
_CHANNELS_REMEDY = f"{COLOUR_REMEDY} if it is a brightfield slide, else leave it out"
_MPP_ROUNDING = 0.05  # um/px of two pages agree up to this fraction


@dataclass(frozen=True)
class ImageInfo:
    """One image of a file, as ``nic inspect`` shows it.

    Attributes
    ----------
    number : int
        The number by which a caller names the image.
    name : str
        ``label``, ``macro``, ``thumbnail`` or ``overview``; else empty. Other names are not kept,
        since they are free text and may contain a patient's name.
    width, height : int
        Px of its finest level.
    levels : int
    mpp : float or None
        um/px that the file states for this image, the mean of x and y.
    problem : str
        Why the image cannot be a slide; empty if it can.
    """

    number: int
    name: str
    width: int
    height: int
    levels: int
    mpp: float | None
    problem: str

    def __str__(self) -> str:
        scale = f", {self.mpp:.4g} um/px" if self.mpp else ""
        about = f": {self.problem}" if self.problem else ""
        name = f"{self.name}, " if self.name else ""
        return f"{self.number}: {name}{self.width} x {self.height} px{scale}{about}"


@dataclass(frozen=True)
class _Verdict:
    """Whether an image is in colour, why it cannot be read as RGB, and what to do about it."""

    colour: bool
    problem: str = ""
    remedy: str = ""


# GDAL writes such pages
_UNAPPLIED_MASK = _Verdict(
    True, "a separate page states which pixels are transparent (a TIFF mask)", "save it as RGBA"
)


@dataclass(frozen=True)
class TiffImage:
    """One image of a TIFF file.

    Attributes
    ----------
    info : ImageInfo
    pages : tuple of tifffile.TiffPage
        Its levels, finest first. Empty if its pixels are in another file.
    metadata : FileMetadata
        um/px and objective power of this image.
    colour : bool
        It is in colour, though its kind of colour may not be supported.
    remedy : str
        What to do about ``info.problem``.
    """

    info: ImageInfo
    pages: tuple[tifffile.TiffPage, ...]
    metadata: FileMetadata
    colour: bool
    remedy: str

    @property
    def area(self) -> int:
        """Number of px."""
        return self.info.width * self.info.height

    @property
    def is_scan(self) -> bool:
        """Whether it can be the slide by its name and colours."""
        return self.colour and not self.info.name


def find_images(path: SlidePath, tiff: tifffile.TiffFile) -> list[TiffImage]:
    """List the images of a TIFF file by number.

    The OME-XML says which pages form an image. In other files, and for pages that the OME-XML does
    not mention, see :func:`_page_images`.
    """
    pages = [page for page in tiff.pages if isinstance(page, tifffile.TiffPage)]
    root = _ome_root(path, tiff)
    elements = [] if root is None else [e for e in children(root, "Image") if _pixels(e)]
    listed: list[TiffImage] = []
    used: set[int] = set()
    for number, element in enumerate(elements):
        assert root is not None
        places = _ome_places(tiff, root, _pixels(element)[0], len(pages))
        listed.append(_ome_image(tiff, pages, root, number, element, places))
        used.update(places)
    # in a series of files, pages that the OME-XML does not list have no known meaning
    whole = all(image.pages for image in listed)
    rest = [p for place, p in enumerate(pages) if whole and place not in used and p.shape]
    return listed + _page_images(tiff, rest, len(listed))


def choose_image(
    path: SlidePath, images: Sequence[TiffImage], number: int | None
) -> list[TiffImage]:
    """Return the image to read, by the rule of this module, and the next best ones after it.

    Parameters
    ----------
    number : int, optional
        Image that the caller names.

    Returns
    -------
    list of TiffImage
        The image first. The others, largest first, are for the case that its pixels turn out to
        not be a brightfield scan; none if the caller names the image.

    Raises
    ------
    SlideError
        No image is a brightfield scan, the rule cannot decide, there is no such image, or it is
        never read.
    """
    if number is not None:
        return [_named(path, images, number)]
    scans = [image for image in images if image.is_scan]
    low, high = MPP_RANGE
    stated = [image.info.mpp for image in scans if image.info.mpp is not None]
    finest = min((mpp for mpp in stated if low <= mpp <= high), default=math.inf)
    scans = [i for i in scans if i.info.mpp is None or not i.info.mpp > finest * _OVERVIEW_MPP]
    scans.sort(key=lambda image: (-image.area, image.info.number))
    # in a series of files each file with a scan is a slide
    scans = [
        image for image in scans if image.pages and image.area * _OVERVIEW_AREA > scans[0].area
    ] or scans
    others = [image for image in images if not image.info.name and not image.colour]
    largest = max(others, key=lambda image: image.area, default=None)
    if not scans:
        if largest is None:
            raise SlideError(
                path, f"has no image of a scan, only {_listing(images)}", BRIGHTFIELD_REMEDY
            )
        raise SlideError(path, largest.info.problem, largest.remedy)
    best = scans[0]
    if largest is not None and largest.area > best.area * _OVERVIEW_AREA:
        raise SlideError(
            path,
            f"its largest image, {largest.info.number}, is not a brightfield scan, and image "
            f"{best.info.number} may be an overview; it has {_listing(images)}",
            IMAGE_REMEDY,
        )
    _check_usable(path, best, several=len(images) > 1)
    return [
        best,
        *(
            image
            for image in scans[1:]
            if not image.info.problem and best.area <= image.area * _OVERVIEW_AREA
        ),
    ]


def _named(path: SlidePath, images: Sequence[TiffImage], number: int) -> TiffImage:
    image = next((image for image in images if image.info.number == number), None)
    if image is None:
        raise SlideError(path, f"has no image {number}; it has {_listing(images)}", IMAGE_REMEDY)
    if image.info.name:
        raise SlideError(
            path,
            f"image {number} is a {image.info.name} image, which may show a patient's name and is "
            "never read",
            IMAGE_REMEDY,
        )
    _check_usable(path, image, several=len(images) > 1)
    return image


def _listing(images: Sequence[TiffImage]) -> str:
    """The images in one line; long lists are cut."""
    shown = [f"image {image.info}" for image in images[:_MAX_LISTED]]
    more = [f"and {len(images) - _MAX_LISTED} more"] if len(images) > _MAX_LISTED else []
    return "; ".join(shown + more)


def _check_usable(path: SlidePath, image: TiffImage, *, several: bool) -> None:
    if image.info.problem:
        which = f"image {image.info.number}: " if several else ""
        remedy = f"{image.remedy}, or {IMAGE_REMEDY}" if several else image.remedy
        raise SlideError(path, which + image.info.problem, remedy)


def _with_subifds(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> list[tifffile.TiffPage]:
    """Return a page and those of its sub-directories that are coarser levels of it."""
    levels = [page]
    for number, offset in enumerate(page.subifds or ()):
        tiff.filehandle.seek(offset)
        level = tifffile.TiffPage(tiff, (page.index, number))
        if (
            _shrinks(page, level) is not None
            and _is_coarser(levels[-1], level)
            and _same_kind(page, level)
        ):
            levels.append(level)
    return levels


def _image(
    number: int,
    name: str,
    pages: Sequence[tifffile.TiffPage],
    metadata: FileMetadata,
    verdict: _Verdict,
    size: tuple[int, int] | None = None,
) -> TiffImage:
    width, height = size or (pages[0].imagewidth, pages[0].imagelength)
    mpp = sum(metadata.mpp) / 2 if metadata.mpp else None
    return TiffImage(
        ImageInfo(number, name, width, height, max(1, len(pages)), mpp, verdict.problem),
        tuple(pages),
        metadata,
        verdict.colour,
        verdict.remedy,
    )


def _page_verdict(page: tifffile.TiffPage) -> _Verdict:
    colours = getattr(page.photometric, "name", str(page.photometric))
    samples = page.samplesperpixel
    if page.photometric in _GREY:
        if samples == 1:
            return _Verdict(False, "not an RGB image: greyscale", BRIGHTFIELD_REMEDY)
        return _Verdict(False, f"not an RGB image: {samples} grey channels", _CHANNELS_REMEDY)
    if page.photometric not in _COLOUR:
        return _Verdict(False, f"not an RGB image: its colours are {colours}", COLOUR_REMEDY)
    if page.photometric not in _COLOUR[:2]:
        kind = "CMYK" if page.photometric == tifffile.PHOTOMETRIC.SEPARATED else colours
        return _Verdict(True, f"not an RGB image: its colours are {kind}", COLOUR_REMEDY)
    if page.bitspersample != 8 or page.sampleformat != tifffile.SAMPLEFORMAT.UINT:
        kind = "floats" if page.sampleformat == tifffile.SAMPLEFORMAT.IEEEFP else "numbers"
        problem = f"not an 8-bit RGB image: its samples are {page.bitspersample}-bit {kind}"
        return _Verdict(True, problem, COLOUR_REMEDY)
    if samples not in (3, 4):
        return _Verdict(True, f"not an RGB image: {samples} channels", COLOUR_REMEDY)
    if samples == 4 and not alpha_kind(page):
        problem = "its fourth channel is not stated to be transparency (TIFF ExtraSamples)"
        return _Verdict(True, problem, "save it as RGB, or as RGBA with this tag")
    orientation = page.tags.valueof(_ORIENTATION)
    if orientation not in (None, 1):
        problem = f"its pixels are stored rotated or mirrored (TIFF orientation {orientation})"
        return _Verdict(True, problem, UPRIGHT_REMEDY)
    return _Verdict(True)


def alpha_kind(page: tifffile.TiffPage) -> AlphaKind | None:
    """Return how a page stores transparency (TIFF 6.0, ExtraSamples); None if it has none."""
    extra = page.extrasamples[0] if page.extrasamples else None
    if extra == tifffile.EXTRASAMPLE.ASSOCALPHA:
        return "premultiplied"
    return "straight" if extra == tifffile.EXTRASAMPLE.UNASSALPHA else None


# --- OME-TIFF --------------------------------------------------------------------------------


def _ome_root(path: SlidePath, tiff: tifffile.TiffFile) -> ElementTree.Element | None:
    """The OME-XML; None if there is none.

    Raises
    ------
    SlideError
        It cannot be parsed, so which pages are the scan and their um/px are unknown.
    """
    if not tiff.is_ome or not tiff.ome_metadata:
        return None
    try:
        return ElementTree.fromstring(ome_xml(path, tiff.ome_metadata))
    except ElementTree.ParseError as error:
        reason = f"its OME-XML cannot be parsed ({error})"
        raise SlideError(path, reason, f"{DAMAGED_REMEDY}, or {CONVERT_REMEDY}") from error


def _pixels(image: ElementTree.Element) -> list[ElementTree.Element]:
    return children(image, "Pixels")


def _ome_places(
    tiff: tifffile.TiffFile, root: ElementTree.Element, pixels: ElementTree.Element, count: int
) -> list[int]:
    """The numbers of the pages of an image in this file, its first plane first.

    ``count`` is the number of pages of the file, for elements that state no range.
    """
    places: list[int] = []
    data = children(pixels, "TiffData")
    if not data and len([image for image in children(root, "Image") if _pixels(image)]) == 1:
        # files made with libvips often have no element TiffData: the one image starts at page 0
        return list(range(count))
    for part in sorted(data, key=lambda d: [int(d.get(f"First{axis}", "0")) for axis in "TZC"]):
        if not all(_is_own(tiff, root, uuid) for uuid in children(part, "UUID")):
            continue
        first = int(part.get("IFD", "0"))
        rest = 1 if "IFD" in part.attrib else count
        places += range(first, first + int(part.get("PlaneCount", part.get("NumPlanes", rest))))
    return places


def _is_own(tiff: tifffile.TiffFile, root: ElementTree.Element, uuid: ElementTree.Element) -> bool:
    """Whether an element UUID of OME-XML names this file."""
    by_id = root.get("UUID") is not None and (uuid.text or "").strip() == root.get("UUID")
    return by_id or uuid.get("FileName", "").lower() == tiff.filename.lower()


def _ome_image(
    tiff: tifffile.TiffFile,
    pages: Sequence[tifffile.TiffPage],
    root: ElementTree.Element,
    number: int,
    element: ElementTree.Element,
    places: Sequence[int],
) -> TiffImage:
    name, pixels = _associated_name(element.get("Name", "")), _pixels(element)[0]
    size = int(pixels.get("SizeX", "0")), int(pixels.get("SizeY", "0"))
    channels = children(pixels, "Channel")
    samples = int(channels[0].get("SamplesPerPixel", "1")) if channels else 1
    if not places or places[0] >= len(pages):
        problem, remedy = "its pixels are in another file of its OME series", "give that file"
        if places:
            problem = f"its OME-XML names page {places[0]}, but the file has {len(pages)} pages"
            remedy = DAMAGED_REMEDY
        elif not children(pixels, "TiffData"):
            problem = "its OME-XML does not say which pages it has (no element TiffData)"
            remedy = CONVERT_REMEDY
        verdict = _Verdict(samples >= 3, problem, remedy)
        return _image(number, name, [], FileMetadata(), verdict, size)
    page = pages[places[0]]
    # some writers state one sample a channel for interleaved pixels
    samples = max(samples, page.samplesperpixel)
    planes = math.prod(int(pixels.get(f"Size{axis}", "1")) for axis in "CZT") // samples
    verdict = _page_verdict(page)
    if any(_is_fluorescence(channel) for channel in channels):
        verdict = _Verdict(False, "a fluorescence image (OME-XML)", BRIGHTFIELD_REMEDY)
    elif size != (page.imagewidth, page.imagelength):
        # a program that resized or cropped the image and kept the OME-XML: um/px is of other pixels
        problem = (
            f"its OME-XML describes an image of {size[0]} x {size[1]} px, but the page has "
            f"{page.imagewidth} x {page.imagelength} px"
        )
        remedy = "correct the OME-XML, or save the image without it"
        verdict = _Verdict(verdict.colour, problem, remedy)
    elif planes > 1 and page.samplesperpixel < 3:
        problem = f"not an RGB image: {planes} separate channels or planes"
        verdict = _Verdict(False, problem, _CHANNELS_REMEDY)
    elif planes > 1:
        problem = f"a stack of {planes} planes (focus or time)"
        verdict = _Verdict(verdict.colour, problem, "save one plane as a slide")
    metadata = ome_metadata(root, element, page)
    return _image(number, name, _with_subifds(tiff, page), metadata, verdict)


def _is_fluorescence(channel: ElementTree.Element) -> bool:
    return (
        "EmissionWavelength" in channel.attrib
        or "Fluor" in channel.attrib
        or channel.get("ContrastMethod") == "Fluorescence"
    )


# --- other files -----------------------------------------------------------------------------


def _page_images(
    tiff: tifffile.TiffFile, pages: Sequence[tifffile.TiffPage], first: int
) -> list[TiffImage]:
    """Group pages to images, numbered from ``first``.

    A page is a level of a larger one if it is marked as reduced (in Aperio files: tiled) and has
    the same ratio of sides, the same kind of pixels and a um/px that does not contradict. Where two
    images could have the level, it belongs to the only one that precedes it, if the file has levels
    after their images. Else it becomes an image of its own, and the pixels of this resolution are
    computed from finer ones.
    """
    order = {page.offset: place for place, page in enumerate(pages)}
    aperio = any(page.description.startswith("Aperio") for page in pages)
    names = {page.offset: _page_name(page, aperio) for page in pages}
    unnamed = [page for page in pages if not names[page.offset]]
    levels_follow = not aperio and not (unnamed and unnamed[0].is_reduced)
    groups: list[list[tifffile.TiffPage]] = []
    for page in sorted(pages, key=lambda p: (-p.imagewidth * p.imagelength, order[p.offset])):
        owners = []
        if not names[page.offset] and (aperio or page.is_reduced):
            owners = [g for g in groups if not names[g[0].offset] and _is_level(g, page)]
        if len(owners) > 1 and levels_follow:
            owners = [g for g in owners if order[g[0].offset] < order[page.offset]]
        if len(owners) == 1:
            owners[0].append(page)
        else:
            groups.append([page])
    groups.sort(key=lambda group: order[group[0].offset])
    masked = {(p.imagewidth, p.imagelength) for p in pages if p.is_mask}
    return [
        _image(
            first + number,
            names[group[0].offset],
            group if len(group) > 1 else _with_subifds(tiff, group[0]),
            # the text of an Aperio thumbnail repeats the um/px of the scan
            FileMetadata() if names[group[0].offset] else page_metadata(group[0]),
            _UNAPPLIED_MASK
            if _page_verdict(group[0]) == _Verdict(True)
            and (group[0].imagewidth, group[0].imagelength) in masked
            else _page_verdict(group[0]),
        )
        for number, group in enumerate(groups)
    ]


def _is_level(group: Sequence[tifffile.TiffPage], page: tifffile.TiffPage) -> bool:
    """Whether a page can be the next level of an image by its size, pixels and um/px."""
    base = group[0]
    factor = _shrinks(base, page)
    if factor is None or not _is_coarser(group[-1], page) or base.is_tiled != page.is_tiled:
        return False
    if not _same_kind(base, page):
        return False
    stated = [page_metadata(p).mpp for p in (base, page)]
    if stated[0] is None or stated[1] is None:
        return True
    ratio = stated[1][0] / stated[0][0]
    # some writers repeat the um/px of level 0 at every level
    return any(abs(ratio / wanted - 1) < _MPP_ROUNDING for wanted in (factor, 1.0))


def _same_kind(base: tifffile.TiffPage, page: tifffile.TiffPage) -> bool:
    """Whether two pages have the same kind of pixels, so that one can be a level of the other."""
    kinds = [(p.samplesperpixel, p.bitspersample, p.extrasamples) for p in (base, page)]
    return kinds[0] == kinds[1] and _page_verdict(base) == _page_verdict(page)


def _shrinks(base: tifffile.TiffPage, page: tifffile.TiffPage) -> float | None:
    """The factor by which a page is smaller; None if its ratio of sides differs."""
    factor = (base.imagewidth + base.imagelength) / (page.imagewidth + page.imagelength)
    fits = all(
        abs(large / factor - small) <= _LEVEL_ROUNDING
        for large, small in (
            (base.imagewidth, page.imagewidth),
            (base.imagelength, page.imagelength),
        )
    )
    return factor if fits else None


def _is_coarser(level: tifffile.TiffPage, page: tifffile.TiffPage) -> bool:
    return all(
        large > small * _LEVEL_FACTOR or small == 1
        for large, small in (
            (level.imagewidth, page.imagewidth),
            (level.imagelength, page.imagelength),
        )
    )


def _page_name(page: tifffile.TiffPage, aperio: bool) -> str:
    """The name of a label, macro or thumbnail image; empty for other pages."""
    if not aperio:
        stated = (page.description, page.tags.valueof(_PAGE_NAME) or "")
        return next((name for text in stated if (name := _associated_name(str(text)))), "")
    lines = page.description.splitlines()
    word = lines[1].split(" ")[0].lower() if len(lines) > 1 else ""
    if word in ASSOCIATED_NAMES:
        return word
    if page.is_tiled:
        return ""
    return {1: "label", 9: "macro"}.get(int(page.subfiletype), "thumbnail")


def _associated_name(text: str) -> str:
    """The standard name that a text states, alone or as in ``label image``; else empty."""
    name = text.strip().lower().removesuffix(" image")
    return name if name in ASSOCIATED_NAMES else ""

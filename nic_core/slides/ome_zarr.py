"""OME-Zarr images (OME-NGFF 0.4 and 0.5): find the slide in a folder, and its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import ObjectStore

from nic_core.object_stores import RemoteError, as_remote_error, connect, split_address
from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import BRIGHTFIELD_REMEDY, DAMAGED_REMEDY, FileMetadata
from nic_core.slides.ome_set import OTHER_SCAN
from nic_core.slides.remote import RemotePath, SlidePath

_METADATA_NAMES = (".zattrs", ".zgroup", ".zarray", "zarr.json")
_MICROMETRES = {
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
}
_MAX_CHUNK = 1 << 28  # px


class NotASlideError(SlideError):
    """A Zarr folder with other data than an 8-bit RGB image."""

    def __init__(self, path: SlidePath, reason: str) -> None:
        super().__init__(path, reason, BRIGHTFIELD_REMEDY)


@dataclass(frozen=True)
class OmeZarrImage:
    """The slide in an OME-Zarr folder.

    Attributes
    ----------
    levels : tuple of zarr.Array
        uint8, finest first.
    axes : tuple of str
        Names of the arrays' axes, among them "y", "x" and "c".
    metadata : FileMetadata
    """

    levels: tuple[zarr.Array[Any], ...]
    axes: tuple[str, ...]
    metadata: FileMetadata


def read_ome_zarr(path: SlidePath) -> OmeZarrImage:
    """Find the slide in an OME-Zarr folder: the scan, if there are a label and a macro image too.

    Raises
    ------
    NotASlideError
        The folder holds no OME-Zarr image of 8-bit RGB.
    SlideError
        The metadata are damaged or incomplete, or from a version before 0.4; or there are several
        scans.
    """
    try:
        with zarr_errors(path):
            root = zarr.open_group(_zarr_store(path), mode="r")
            found = _rgb_images(path, _images(path, root))
    except (SlideError, RemoteError):
        raise
    # zarr raises any of a dozen exception types for damaged metadata
    except Exception as error:
        reason = f"damaged OME-Zarr metadata ({error or type(error).__name__})"
        raise SlideError(path, reason, DAMAGED_REMEDY) from error
    first, *others = sorted(found, key=lambda image: -image.levels[0].size)
    if others and others[0].levels[0].size * OTHER_SCAN > first.levels[0].size:
        names = " and ".join(image.levels[0].path for image in (first, others[0]))
        remedy = "name the group of one scan in the slide table, for example scan.zarr/0"
        raise SlideError(path, f"has several scans, whose level 0 is at {names}", remedy)
    return first


def zarr_errors(path: SlidePath) -> AbstractContextManager[None]:
    """Raise what zarr reports about a remote image as :func:`as_remote_error` does."""
    return as_remote_error(path) if isinstance(path, RemotePath) else nullcontext()


def _zarr_store(path: SlidePath) -> Path | ObjectStore[Any]:
    if not isinstance(path, RemotePath):
        return path
    root, key = split_address(str(path))
    return ObjectStore(connect(root, key), read_only=True)


def ome_zarr_files(path: SlidePath) -> list[SlidePath]:
    """Return the files with the metadata of the slide in an OME-Zarr folder.

    Raises
    ------
    NotASlideError, SlideError
        See :func:`read_ome_zarr`.
    """
    levels = [path / level.path for level in read_ome_zarr(path).levels]
    folders = {path, *levels, *(level.parent for level in levels)}
    named = (folder / name for folder in folders for name in _METADATA_NAMES)
    return sorted(file for file in named if file.is_file())


def _images(path: SlidePath, root: zarr.Group) -> list[tuple[zarr.Group, Mapping[str, Any]]]:
    """The groups with an image, each with its entry of ``multiscales``."""
    attributes = _ome(root)
    if "plate" in attributes or "well" in attributes:
        raise NotASlideError(path, "an OME-Zarr plate, not a slide")
    groups = [root]
    if "bioformats2raw.layout" in attributes:  # several images, in groups called 0, 1, ...
        groups = [group for name, group in sorted(root.groups()) if name.isdecimal()]
    # the first entry is the image; others are the same image at other levels
    images = [(group, _ome(group)["multiscales"][0]) for group in groups if _has_image(group)]
    if not images:
        raise NotASlideError(path, "a Zarr folder without an OME-Zarr image")
    return images


def _has_image(group: zarr.Group) -> bool:
    return bool(_ome(group).get("multiscales"))


def _rgb_images(
    path: SlidePath, images: list[tuple[zarr.Group, Mapping[str, Any]]]
) -> list[OmeZarrImage]:
    """The images of 8-bit RGB; raises NotASlideError if there is none."""
    found: list[OmeZarrImage] = []
    others: list[NotASlideError] = []
    for group, entry in images:
        try:
            found.append(_image(path, group, entry))
        except NotASlideError as error:
            others.append(error)
    if not found:
        raise others[0]
    return found


def _ome(group: zarr.Group) -> Mapping[str, Any]:
    """The OME metadata of a group: all attributes in 0.4, below ``ome`` in 0.5."""
    attributes: dict[str, Any] = dict(group.attrs)
    return dict(attributes["ome"]) if "ome" in attributes else attributes


def _image(path: SlidePath, group: zarr.Group, entry: Mapping[str, Any]) -> OmeZarrImage:
    axes = entry.get("axes")
    if not axes or not all(isinstance(axis, dict) for axis in axes):
        version = entry.get("version", "of an unknown version")
        raise SlideError(
            path, f"OME-Zarr {version} is not read", "convert it to OME-Zarr 0.4 or 0.5"
        )
    names = tuple(str(axis["name"]) for axis in axes)
    datasets = [(_array(group, d["path"]), d) for d in entry["datasets"]]
    datasets.sort(key=lambda pair: -pair[0].size)
    levels = tuple(array for array, _ in datasets)
    first = levels[0]
    shape = dict(zip(names, first.shape, strict=True))
    others = {name: size for name, size in shape.items() if name not in "yxc" and size != 1}
    if first.dtype != np.uint8 or {"y", "x"} - set(names) or shape.get("c") != 3 or others:
        raise NotASlideError(
            path,
            f"not an 8-bit RGB image: axes {''.join(names)}, shape {first.shape}, {first.dtype}",
        )
    for level in levels:
        if level.dtype != first.dtype or level.ndim != first.ndim:
            raise SlideError(path, f"damaged: level {level.path} differs in kind", DAMAGED_REMEDY)
        if np.prod(level.chunks, dtype=float) > _MAX_CHUNK:
            reason = f"level {level.path} has chunks of {level.chunks} px"
            raise SlideError(path, reason, "convert it to chunks of at most 4096 x 4096 px")
    x, y = (
        _micrometres(axes[names.index(axis)], _scale(entry, datasets[0][1], names.index(axis)))
        for axis in "xy"
    )
    mpp = (x, y) if x is not None and y is not None else None
    return OmeZarrImage(levels, names, FileMetadata(mpp, "OME-Zarr scale"))


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise ValueError(f"level {name} is not an array")
    return array


def _scale(entry: Mapping[str, Any], dataset: Mapping[str, Any], axis: int) -> float | None:
    """Size of a pixel along an axis, in the axis's unit; None if it is not stated."""
    transformations = [
        step
        for source in (dataset, entry)
        for step in source.get("coordinateTransformations", ())
        if step["type"] == "scale"
    ]
    if not transformations:
        return None
    return float(np.prod([float(step["scale"][axis]) for step in transformations]))


def _micrometres(axis: Mapping[str, Any], size: float | None) -> float | None:
    factor = _MICROMETRES.get(str(axis.get("unit")))
    return None if size is None or factor is None else size * factor

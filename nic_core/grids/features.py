"""Embeddings that other software computed: which file belongs to a slide, and what it contains.

======================  ===========================================================================
format                  layout, after the code of its writer
======================  ===========================================================================
``trident``             HDF5: ``features`` (N, C), ``coords`` (N, 2) in level-0 px, whose attributes
                        state patch, overlap and magnifications (TRIDENT, ``save_h5``)
``clam``                HDF5: ``features``, ``coords``; or ``.pt`` with the features. Attributes
                        and, for ``.pt``, coordinates are in ``<slide>.h5`` of the same folder, of
                        ``../h5_files`` or of ``../patches`` (CLAM, ``process_contour``)
``stamp``               HDF5: ``feats``, ``coords`` in um; ``tile_size_um`` (STAMP 2, ``extract_``)
``slide2vec``           ``.pt`` or ``.npz`` with the features; ``<slide>.coordinates.npz`` and
                        ``<slide>.coordinates.meta.json`` in the same folder or in ``../tiles``
``anndata``             ``.h5ad`` or ``.zarr``: ``X``, and ``obsm['spatial']`` in level-0 px
``spatialdata``         ``.zarr`` with exactly one table that has ``obsm['spatial']``
======================  ===========================================================================

Coordinates are the top-left corner of a patch, except ``obsm['spatial']``: the centre of a spot, by
the convention of squidpy. Files that :mod:`nic_core.grids.export` wrote contain the provenance of
their grid in addition.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from nic_core.grids.store import GridProvenance
from nic_core.types import FeaturesFormat

PROVENANCE = "nic"
"""Attribute or entry of an exported file: provenance, rows and columns of the grid, as JSON."""

_SUFFIXES = (".h5", ".hdf5", ".pt", ".npz", ".h5ad", ".zarr")
_COMPOUND = (".ome.tif", ".ome.tiff", ".ome.zarr")  # suffixes that TRIDENT removes as a whole
_COORDINATES = ".coordinates.npz"


class FeaturesError(ValueError):
    """Features of other software are missing, ambiguous, invalid, or not on a lattice."""


@dataclass(frozen=True)
class StatedGrid:
    """The grid that a file was exported from: its provenance, and its rows and columns."""

    provenance: GridProvenance
    rows: int
    columns: int


@dataclass(frozen=True)
class Features:
    """Embeddings of the patches of a slide, and what their file states about the patches.

    Attributes
    ----------
    path : Path
    format : str
    embeddings : float16, float32 or float64 (N, C)
    points : float64 (N, 2)
        Place (x, y) of each patch, level-0 px.
    centred : bool
        Whether a point is the centre of its patch, or its top-left corner.
    patch : int, optional
        Side of a patch, px of the image that the network took.
    patch_level0, stride_level0 : float, optional
        Side of a patch, and distance of neighbouring patches, level-0 px.
    slide_mpp : float, optional
        um/px of the slide at level 0.
    slide_size : (int, int), optional
        Width and height of the slide, level-0 px.
    grid : StatedGrid, optional
        In a file that this project exported.
    """

    path: Path
    format: FeaturesFormat
    embeddings: NDArray[Any]
    points: NDArray[np.float64]
    centred: bool = False
    patch: int | None = None
    patch_level0: float | None = None
    stride_level0: float | None = None
    slide_mpp: float | None = None
    slide_size: tuple[int, int] | None = None
    grid: StatedGrid | None = None


def find_features(
    folder: Path, slide: str, slide_path: PurePath, format: FeaturesFormat | None = None
) -> tuple[Path, FeaturesFormat]:
    """Find the file with the features of a slide in a folder and its subfolders.

    Parameters
    ----------
    slide : str
        Slide id. A file is named by it, or by the name of the slide's file without its suffix.
    slide_path : Path or RemotePath
        File of the slide.
    format : str, optional
        Only files of this format; default: of any, recognised by their content.

    Returns
    -------
    path : Path
    format : str

    Raises
    ------
    FeaturesError
        The folder has no such file, or several.
    """
    if not folder.is_dir():
        raise FeaturesError(f"{folder}: no such folder; correct 'folder' in the cohort file")
    names = {slide, slide_path.stem} | {
        slide_path.name[: -len(suffix)]
        for suffix in _COMPOUND
        if slide_path.name.lower().endswith(suffix)
    }
    named = [path for path in _files(folder) if path.stem in names and path.suffix in _SUFFIXES]
    recognised = [(path, found) for path in named if (found := _recognise(path)) is not None]
    fitting = [item for item in recognised if format in (None, item[1])]
    if len(fitting) == 1:
        return fitting[0]
    wanted = "features" if format is None else f"features in the format {format}"
    if fitting:
        listed = ", ".join(f"{path.relative_to(folder)} ({found})" for path, found in fitting)
        raise FeaturesError(
            f"{folder}: several files may have the {wanted} of slide '{slide}': {listed}; name one "
            "subfolder as 'folder', give 'format', or remove the others"
        )
    reason = f"no file has the {wanted} of slide '{slide}'"
    if recognised:
        path, found = recognised[0]
        reason += f"; {path.relative_to(folder)} is in the format {found}"
    elif named:
        reason += f"; {named[0].relative_to(folder)} {_without_features(named[0])}"
    listed = " or ".join(f"'{name}'" for name in sorted(names))
    raise FeaturesError(
        f"{folder}: {reason}; add a file named {listed} ({', '.join(_SUFFIXES)}), or exclude the "
        "slide"
    )


def read_features(path: Path, format: FeaturesFormat, *, slide_mpp: float) -> Features:
    """Read a file of features.

    Parameters
    ----------
    slide_mpp : float
        um/px of the slide at level 0: coordinates in um are divided by it.

    Raises
    ------
    FeaturesError
        The file cannot be read, or lacks something.
    """
    try:
        match format:
            case "trident":
                return _trident(path)
            case "clam":
                return _clam(path)
            case "stamp":
                return _stamp(path, slide_mpp)
            case "slide2vec":
                return _slide2vec(path)
            case "anndata" | "spatialdata":
                return _anndata(path, format)
    except FeaturesError:
        raise
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        reason = " ".join(str(error).split())
        raise FeaturesError(
            f"{path}: cannot be read as features in the format {format} ({reason}); write the file "
            "again"
        ) from error


def features_hash(folder: Path) -> str:
    """Return the sha256 of names and contents of all files in a folder and its subfolders.

    Raises
    ------
    FeaturesError
        The folder does not exist, or has no files.
    """
    digest = hashlib.sha256()
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if not paths:
        raise FeaturesError(f"{folder}: no files of features; correct 'folder' in the cohort file")
    for path in paths:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder)}\n{content}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders, by name; a ``.zarr`` folder is one file."""
    for root, folders, files in os.walk(folder):
        stores = [name for name in folders if name.endswith(".zarr")]
        folders[:] = sorted(set(folders) - set(stores))
        yield from (Path(root, name) for name in sorted(files + stores))


# --- formats -----------------------------------------------------------------------------------


def _recognise(path: Path) -> FeaturesFormat | None:
    """Return the format of a file, None if it has no features."""
    match path.suffix:
        case ".h5ad":
            return "anndata"
        case ".zarr":
            if not path.is_dir():
                return None
            return "spatialdata" if (path / "tables").is_dir() else "anndata"
        case ".npz":
            return "slide2vec"
        case ".pt":
            return "clam" if _slide2vec_coordinates(path) is None else "slide2vec"
    names = _datasets(path)
    if {"feats", "coords"} <= names:
        return "stamp"
    if not {"features", "coords"} <= names:
        return None
    with h5py.File(path) as file:
        return "trident" if "patch_size_level0" in file["coords"].attrs else "clam"


def _datasets(path: Path) -> set[str]:
    """Names of the datasets of an HDF5 file; empty if it is not one."""
    if not h5py.is_hdf5(path):
        return set()
    try:
        with h5py.File(path) as file:
            return {name for name, item in file.items() if isinstance(item, h5py.Dataset)}
    except (OSError, KeyError) as error:
        raise FeaturesError(f"{path}: is damaged ({error}); write the file again") from error


def _without_features(path: Path) -> str:
    names = _datasets(path)
    if names == {"coords"}:
        return "has coordinates but no features"
    listed = ", ".join(sorted(names)) or "none"
    return f"is in no known layout (datasets: {listed})"


def _trident(path: Path) -> Features:
    with h5py.File(path) as file:
        embeddings, coords = _array(file, "features"), _array(file, "coords")
        stated = dict(file["coords"].attrs)
        grid = _stated_grid(path, file.attrs.get(PROVENANCE))
    patch, overlap = _number(stated, "patch_size"), _number(stated, "overlap") or 0.0
    patch_level0 = _number(stated, "patch_size_level0")
    source, target = (_number(stated, f"{of}_magnification") for of in ("level0", "target"))
    if patch is None or patch_level0 is None:
        raise FeaturesError(
            f"{path}: 'coords' has no attribute 'patch_size' or 'patch_size_level0'; write the "
            "file again"
        )
    # as TRIDENT's WSIPatcher: the stated 'patch_size_level0' is rounded down, its patches are not
    downsample = source / target if source and target else patch_level0 / patch
    patch_level0 = round(patch * downsample)
    width, height = _number(stated, "level0_width"), _number(stated, "level0_height")
    return Features(
        path,
        "trident",
        embeddings,
        coords.astype(np.float64),
        patch=round(patch),
        patch_level0=patch_level0,
        stride_level0=patch_level0 - round(overlap * downsample),
        slide_size=(round(width), round(height)) if width and height else None,
        grid=grid,
    )


def _clam(path: Path) -> Features:
    beside = [
        other
        for folder in (path.parent, path.parent.parent / "h5_files", path.parent.parent / "patches")
        if (other := folder / f"{path.stem}.h5") != path and "coords" in _datasets(other)
    ]
    if path.suffix == ".pt":
        if not beside:
            raise FeaturesError(
                f"{path}: no coordinates; put '{path.stem}.h5', which has 'coords', into the same "
                "folder, '../h5_files' or '../patches'"
            )
        embeddings, coords, stated = _tensor(path), None, dict[str, Any]()
    else:
        with h5py.File(path) as file:
            embeddings, coords = _array(file, "features"), _array(file, "coords")
            stated = dict(file["coords"].attrs)
    # CLAM writes the attributes beside the coordinates only, not beside the features
    for other in beside:
        with h5py.File(other) as file:
            found, attributes = _array(file, "coords"), dict(file["coords"].attrs)
        if coords is not None and not np.array_equal(found, coords):
            raise FeaturesError(
                f"{path}: {other} has other coordinates; remove the file that does not belong here"
            )
        coords, stated = found, attributes | stated
    assert coords is not None
    if (custom := _number(stated, "custom_downsample")) not in (None, 1.0):
        raise FeaturesError(
            f"{path}: patches with 'custom_downsample' {custom:g} are not supported; make the "
            "features at a level of the slide"
        )
    patch, level = _number(stated, "patch_size"), _number(stated, "patch_level")
    downsample = 1.0 if level == 0 else _number(stated, "downsample")
    size = np.ravel(stated.get("level_dim", ()))
    return Features(
        path,
        "clam",
        embeddings,
        coords.astype(np.float64),
        patch=None if patch is None else round(patch),
        # as CLAM's process_contour: the downsample of the level as a whole number
        patch_level0=patch * int(downsample) if patch and downsample else None,
        slide_size=(int(size[0]), int(size[1])) if level == 0 and len(size) == 2 else None,
    )


def _stamp(path: Path, slide_mpp: float) -> Features:
    with h5py.File(path) as file:
        embeddings, coords = _array(file, "feats"), _array(file, "coords")
        stated = dict(file.attrs)
    side = _number(stated, "tile_size_um")
    if side is None and stated.get("unit") == "um":
        side = _number(stated, "tile_size")  # before version 2.1
    if stated.get("unit") != "um" or side is None:
        raise FeaturesError(
            f"{path}: does not state its coordinates in um ('unit' is "
            f"{stated.get('unit')!r}, 'tile_size_um' {side}); make the features with STAMP 2"
        )
    patch = _number(stated, "tile_size_px")
    # as STAMP's _supertiles: a tile has a whole number of level-0 px
    patch_level0 = math.ceil(side / slide_mpp - 1e-6)
    return Features(
        path,
        "stamp",
        embeddings,
        coords.astype(np.float64) / slide_mpp,
        patch=None if patch is None else round(patch),
        patch_level0=patch_level0,
        stride_level0=patch_level0,
    )


def _slide2vec(path: Path) -> Features:
    coordinates = _slide2vec_coordinates(path)
    if coordinates is None:
        raise FeaturesError(
            f"{path}: no coordinates; put '{path.stem}{_COORDINATES}' into the same folder or "
            "into '../tiles'"
        )
    if path.suffix == ".pt":
        embeddings = _tensor(path)
    else:
        with np.load(path, allow_pickle=False) as arrays:
            embeddings = arrays["features"]
    with np.load(coordinates, allow_pickle=False) as arrays:
        points = np.stack([arrays["x"], arrays["y"]], axis=1).astype(np.float64)
    sidecar = coordinates.with_name(f"{path.stem}.coordinates.meta.json")
    stated = dict(json.loads(sidecar.read_text())) if sidecar.exists() else {}
    tiling, slide = (dict(stated.get(section, {})) for section in ("tiling", "slide"))
    patch = _number(tiling, "requested_tile_size_px")
    size = slide.get("dimensions")
    return Features(
        path,
        "slide2vec",
        embeddings,
        points,
        patch=None if patch is None else round(patch),
        patch_level0=_number(tiling, "tile_size_lv0"),
        stride_level0=_number(tiling, "step_px_lv0"),
        slide_mpp=_number(slide, "base_spacing_um"),
        slide_size=None if size is None else (int(size[0]), int(size[1])),
    )


def _slide2vec_coordinates(path: Path) -> Path | None:
    for folder in (path.parent, path.parent.parent / "tiles"):
        if (found := folder / f"{path.stem}{_COORDINATES}").exists():
            return found
    return None


def _anndata(path: Path, format: FeaturesFormat) -> Features:
    try:
        import anndata
    except ImportError as error:
        raise FeaturesError(
            f"{path}: needs the package anndata; install it with the extra 'anndata'"
        ) from error
    if format == "spatialdata":
        tables = sorted(folder for folder in (path / "tables").iterdir() if folder.is_dir())
        read = {table.name: anndata.read_zarr(table) for table in tables}
        with_places = [name for name, table in read.items() if "spatial" in table.obsm]
        if len(with_places) != 1:
            raise FeaturesError(
                f"{path}: exactly one table must have obsm['spatial'], but "
                f"{len(with_places)} of {len(read)} have ({', '.join(read) or 'no tables'}); keep "
                "one"
            )
        table = read[with_places[0]]
    else:
        table = anndata.read_h5ad(path) if path.suffix == ".h5ad" else anndata.read_zarr(path)
    if table.X is None or "spatial" not in table.obsm:
        raise FeaturesError(f"{path}: needs X and obsm['spatial']; write the file again")
    matrix = table.X.toarray() if hasattr(table.X, "toarray") else np.asarray(table.X)
    return Features(
        path,
        format,
        _floating(path, "X", matrix),
        np.asarray(table.obsm["spatial"], np.float64),
        centred=True,
        grid=_stated_grid(path, table.uns.get(PROVENANCE)),
    )


# --- pieces ------------------------------------------------------------------------------------


def _array(file: h5py.File, name: str) -> NDArray[Any]:
    return np.asarray(file[name][:])


def _tensor(path: Path) -> NDArray[Any]:
    import torch  # slow to import, and only files of this suffix need it

    tensor = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor):
        raise FeaturesError(
            f"{path}: contains a {type(tensor).__name__}, not a tensor (N, C); save the features "
            "alone"
        )
    # NumPy has no bfloat16
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _floating(path: Path, name: str, values: NDArray[Any]) -> NDArray[Any]:
    if not np.issubdtype(values.dtype, np.floating):
        raise FeaturesError(
            f"{path}: '{name}' has numbers of type {values.dtype}, not floating-point numbers; "
            "write the embeddings"
        )
    return values


def _number(stated: dict[str, Any], name: str) -> float | None:
    """Return a finite number (of a pair, the first) that a file states; None without one.

    TRIDENT writes the text ``None`` for a number that it does not have.
    """
    value = stated.get(name)
    if value is None or isinstance(value, str):
        return None
    first = float(np.ravel(value)[0])
    return first if math.isfinite(first) else None


def _stated_grid(path: Path, text: object) -> StatedGrid | None:
    if text is None:
        return None
    try:
        stated = json.loads(str(text))
        provenance = GridProvenance.model_validate(stated["provenance"])
        return StatedGrid(provenance, int(stated["rows"]), int(stated["columns"]))
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise FeaturesError(
            f"{path}: the provenance of the exported grid is invalid ({reason}); export the grid "
            "again"
        ) from error


def check_shapes(features: Features) -> None:
    """Check that embeddings (N, C) and points (N, 2) belong together, and that N is positive.

    Raises
    ------
    FeaturesError
        They do not.
    """
    embeddings, points = features.embeddings.shape, features.points.shape
    _floating(features.path, "features", features.embeddings)
    if len(embeddings) != 2 or len(points) != 2 or points[1] != 2 or embeddings[0] != points[0]:
        raise FeaturesError(
            f"{features.path}: features {embeddings} and coordinates {points} do not match; they "
            "must be (N, C) and (N, 2)"
        )
    if not embeddings[0]:
        raise FeaturesError(
            f"{features.path}: has no patches; exclude the slide, or remove the file"
        )


def few(rows: Sequence[int] | NDArray[np.intp]) -> str:
    """Return the first numbers of rows, counted from 0, for an error message."""
    shown = ", ".join(str(row) for row in rows[:5])
    return f"row{'s' * (len(rows) > 1)} {shown}{', ...' * (len(rows) > 5)}"

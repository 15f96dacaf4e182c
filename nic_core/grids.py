"""The grid store: a compressed slide as one small folder that OME-Zarr viewers open.

A store is a zarr v3 group:

- array ``0``: codes, float16 (C, rows, columns), one level of an OME-Zarr 0.5 image whose axes
  are in micrometres over the slide;
- array ``valid``: bool (rows, columns), true where a code was computed. Elsewhere codes are 0,
  which is also a possible code;
- attribute ``nic``: the provenance.

Chunks hold all numbers of 64 x 64 cells and lie in shards of 512 x 512, so a crop of
400 x 400 cells comes from four files at most and a whole store is a handful of files.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
import zarr.codecs
import zarr.errors
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from nic_core.store import whole_folder

_CHUNK, _SHARD = 64, 512
CODES, VALID, PROVENANCE = "0", "valid", "nic"


class GridError(ValueError):
    """A grid store is missing, damaged or not one."""


class GridProvenance(BaseModel):
    """Where a grid comes from.

    ``mpp`` is the um/px that patches of ``patch`` px were read at, ``slide_mpp`` that of the
    slide's level 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    slide: str
    slide_identity: str
    slide_mpp: PositiveFloat
    encoder: str
    weights_hash: str
    mpp: PositiveFloat
    patch: PositiveInt
    unreadable: NonNegativeInt = 0  # kept cells that could not be decoded; not valid in the grid
    precision: Literal["float32"] = "float32"
    software: str = Field(default_factory=lambda: f"nic {_version()}")


def _version() -> str:
    try:
        return importlib.metadata.version("nic")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from its source tree


@dataclass(frozen=True)
class Grid:
    """A compressed slide.

    Attributes
    ----------
    codes : float16 (C, rows, columns)
        A numpy array, or a zarr array that reads only what is indexed. 0 where not valid.
    valid : bool (rows, columns)
        Cells with a code.
    provenance : GridProvenance
    """

    codes: NDArray[np.float16] | zarr.Array[Any]
    valid: NDArray[np.bool_]
    provenance: GridProvenance

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, rows, columns)."""
        code, rows, columns = self.codes.shape
        return code, rows, columns


def write_grid(path: Path, grid: Grid) -> None:
    """Write a store, whole or not at all; one that stands there is replaced."""
    codes = np.asarray(grid.codes[:], np.float16)
    _check(str(path), codes, grid.valid)
    count, rows, columns = codes.shape
    with whole_folder(path) as folder:
        group = zarr.open_group(folder, mode="w", zarr_format=3)
        group.attrs.update({"ome": _ome(grid), PROVENANCE: grid.provenance.model_dump()})
        chunk, shard = _blocks(rows), _blocks(columns)
        for name, data, lead in ((CODES, codes, (count,)), (VALID, grid.valid, ())):
            array = group.create_array(
                name,
                shape=data.shape,
                dtype=data.dtype,
                chunks=(*lead, chunk[0], shard[0]),
                shards=(*lead, chunk[1], shard[1]),
                compressors=zarr.codecs.BloscCodec(cname="zstd", clevel=5, shuffle="shuffle"),
                fill_value=0 if lead else False,
                dimension_names=("c", "y", "x") if lead else ("y", "x"),
            )
            array[:] = data


def open_grid(path: Path) -> Grid:
    """Open a store; the codes stay on disk until they are indexed.

    Raises
    ------
    GridError
        There is no store, or it is not a grid.
    """
    try:
        group = zarr.open_group(path, mode="r", zarr_format=3)
        codes, valid = group[CODES], group[VALID]
        provenance = GridProvenance.model_validate(group.attrs[PROVENANCE])
    except (OSError, KeyError, ValueError, zarr.errors.BaseZarrError) as error:
        kind = "provenance: " if isinstance(error, ValidationError) else ""
        raise GridError(
            f"{path}: no grid store ({kind}{error}); compress the slide again"
        ) from error
    if not isinstance(codes, zarr.Array) or not isinstance(valid, zarr.Array):
        raise GridError(f"{path}: no grid store (arrays expected); compress the slide again")
    mask = np.asarray(valid[:])
    if codes.dtype != np.float16 or codes.ndim != 3 or codes.shape[1:] != mask.shape:
        raise GridError(
            f"{path}: codes {codes.dtype} {codes.shape} do not fit the mask {mask.shape}"
        )
    return Grid(codes, mask, provenance)


def grid_hash(grid: Grid | Path) -> str:
    """Hash of what a grid says (codes, mask, patch size and um/px), not of how it is stored.

    Returns
    -------
    str
        32 hexadecimal digits, the data version of the grid.
    """
    if isinstance(grid, Path):
        grid = open_grid(grid)
    codes = np.ascontiguousarray(grid.codes[:], np.float16)
    about = grid.provenance
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((codes.shape, about.patch, about.mpp, about.slide_mpp)).encode())
    digest.update(codes.tobytes())
    digest.update(np.packbits(grid.valid).tobytes())
    return digest.hexdigest()


def grid_preview(grid: Grid, *, cell: int = 4) -> NDArray[np.uint8]:
    """Picture of a grid: the first three principal components of its codes as RGB.

    Components are those of this grid, each stretched between its 2nd and 98th percentile, and
    signed so that the code of largest weight counts positive. Cells without a code are white.

    Returns
    -------
    uint8 (rows * cell, columns * cell, 3)
    """
    codes = np.asarray(grid.codes[:], np.float32)[:, grid.valid].T  # (cells, C)
    picture = np.full((*grid.valid.shape, 3), 255, np.uint8)
    if len(codes) > 1:
        centred = codes - codes.mean(axis=0)
        _, vectors = np.linalg.eigh(centred.T @ centred)
        axes = vectors[:, ::-1][:, :3]
        axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
        values = centred @ axes
        low, high = np.percentile(values, (2, 98), axis=0)
        stretched = (values - low) / np.maximum(high - low, 1e-12)
        # a code of fewer than three numbers leaves grey channels
        shown = np.full((len(codes), 3), 0.5)
        shown[:, : values.shape[1]] = np.clip(stretched, 0, 1)
        picture[grid.valid] = np.round(shown * 235)
    elif len(codes):
        picture[grid.valid] = 128
    return picture.repeat(cell, axis=0).repeat(cell, axis=1)


def _check(name: str, codes: NDArray[np.float16], valid: NDArray[np.bool_]) -> None:
    if codes.ndim != 3 or codes.shape[1:] != valid.shape or valid.dtype != np.bool_:
        raise GridError(f"{name}: codes {codes.shape} and mask {valid.shape} do not fit")
    if not np.isfinite(codes).all():
        raise GridError(f"{name}: codes are not all finite numbers of float16")
    if codes[:, ~valid].any():
        raise GridError(f"{name}: cells without a code must be 0")


def _blocks(length: int) -> tuple[int, int]:
    """Side of chunk and shard for an axis of cells; a shard is a whole number of chunks."""
    chunk = min(_CHUNK, length)
    return chunk, min(_SHARD, -(-length // chunk) * chunk)


def _ome(grid: Grid) -> dict[str, Any]:
    """OME-Zarr 0.5 image metadata; a pixel's position is its centre, in um from the centre of
    the slide's first pixel."""
    about = grid.provenance
    step = about.patch * about.mpp
    shift = (step - about.slide_mpp) / 2
    return {
        "version": "0.5",
        "multiscales": [
            {
                "name": about.slide,
                "axes": [
                    {"name": "c", "type": "channel"},
                    {"name": "y", "type": "space", "unit": "micrometer"},
                    {"name": "x", "type": "space", "unit": "micrometer"},
                ],
                "datasets": [
                    {
                        "path": CODES,
                        "coordinateTransformations": [
                            {"type": "scale", "scale": [1.0, step, step]},
                            {"type": "translation", "translation": [0.0, shift, shift]},
                        ],
                    }
                ],
            }
        ],
    }

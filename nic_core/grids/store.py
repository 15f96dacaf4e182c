"""The grid store: a compressed slide as one small folder that OME-Zarr viewers open.

A store is a zarr v3 group:

- array ``0``: embeddings, float16 (C, rows, columns), one level of an OME-Zarr 0.5 image whose axes
  are in micrometres over the slide;
- array ``valid``: bool (rows, columns), true where a embedding was computed. Elsewhere embeddings are 0,
  which is also a possible embedding;
- array ``orientations``, on request: float16 (7, C, rows, columns), the embeddings of the slide in
  orientations 1 to 7 (:mod:`nic_core.grids.orientations`), each put back at its upright cell: one mask
  and one frame serve all;
- attribute ``nic``: the provenance; attribute ``nic_hash``: what :func:`grid_hash` gives.

Chunks hold all numbers of 64 x 64 cells and lie in shards of 512 x 512, so a crop of
400 x 400 cells comes from four files at most, in whichever orientation, and a whole store is a
handful of files.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import zarr
import zarr.codecs
import zarr.errors
import zarr.storage
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from zarr.abc.buffer import Buffer

from nic_core.grids.chunks import StoredEmbeddings
from nic_core.grids.orientations import ORIENTATIONS, orient
from nic_core.store import atomic_folder
from nic_core.types import Precision, Reading

_CHUNK, _SHARD = 64, 512
EMBEDDINGS, VALID, TURNED, PROVENANCE, HASH = "0", "valid", "orientations", "nic", "nic_hash"
METADATA = "zarr.json"


class GridError(ValueError):
    """A grid store is missing, damaged or not one."""


class GridProvenance(BaseModel):
    """Where a grid comes from.

    A store that lacks ``stride``, ``precision`` or ``reading`` is older than they are: it was
    made in the one way there was, which their defaults name.

    Attributes
    ----------
    slide, slide_identity : str
    slide_mpp : float
        um/px of the slide's level 0.
    encoder, weights_hash : str
    mpp : float
        um/px that patches of ``patch`` px stand for.
    patch, stride : int
        Side of a patch and distance between two, px at ``mpp``; equal, as cells do not overlap.
    unreadable : int
        Kept cells that could not be decoded; not valid in the grid.
    precision : str
        Of the numbers in the encoder's layers.
    reading : str
        Pixels were read at ``mpp`` (``patch``), or at once at the resolution of the network's
        input (``input``).
    software : str
        That made it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    slide: str
    slide_identity: str
    slide_mpp: PositiveFloat
    encoder: str
    weights_hash: str
    mpp: PositiveFloat
    patch: PositiveInt
    stride: PositiveInt
    unreadable: NonNegativeInt = 0
    precision: Precision = "float32"
    reading: Reading = "patch"
    software: str = Field(default_factory=lambda: f"nic {nic_version()}")

    @model_validator(mode="before")
    @classmethod
    def _stride_is_patch(cls, data: object) -> object:
        return {"stride": data.get("patch")} | data if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _no_overlap(self) -> Self:
        if self.stride != self.patch:
            raise ValueError(f"stride {self.stride} px: patches of {self.patch} px do not overlap")
        return self


def nic_version() -> str:
    """Version of this package."""
    try:
        return importlib.metadata.version("nic")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from its source tree


class Embeddings(Protocol):
    """Embeddings float16 (C, rows, columns) that are read where they are indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class Orientations(Protocol):
    """Embeddings of each orientation, by its number; together float16 (8, C, rows, columns)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, k: int, /) -> Embeddings: ...


@dataclass(frozen=True)
class Grid:
    """A compressed slide.

    Attributes
    ----------
    embeddings : float16 (C, rows, columns)
        A numpy array, or a stored one that reads only what is indexed. 0 where not valid.
    valid : bool (rows, columns)
        Cells with a embedding.
    provenance : GridProvenance
    orientations : float16 (8, C, rows, columns), optional
        Embeddings of the cells' pixels in each orientation (:mod:`nic_core.grids.orientations`), all at the
        upright cells; number 0 are ``embeddings``.
    """

    embeddings: Embeddings
    valid: NDArray[np.bool_]
    provenance: GridProvenance
    orientations: Orientations | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, rows, columns)."""
        embedding_size, rows, columns = self.embeddings.shape
        return embedding_size, rows, columns

    def oriented(self, k: int) -> Embeddings:
        """Embeddings of orientation ``k`` at the upright cells, float16 (C, rows, columns).

        Raises
        ------
        GridError
            The grid was made without orientations.
        """
        if k == 0:
            return self.embeddings
        if self.orientations is None:
            raise GridError(
                f"grid of slide '{self.provenance.slide}' is upright alone: "
                "compress the slide again with its 8 orientations"
            )
        return self.orientations[k]

    def turned(self, k: int) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
        """Embeddings and mask of the slide turned into orientation ``k``: what compressing the
        turned slide gives; rows and columns change places if ``k`` is odd."""
        return orient(np.asarray(self.oriented(k)[:]), k), orient(self.valid, k)


@dataclass(frozen=True)
class _StoredOrientations:
    upright: StoredEmbeddings
    others: zarr.Array[Any]  # (7, C, rows, columns)
    folder: Path  # of the others

    @property
    def shape(self) -> tuple[int, ...]:
        return ORIENTATIONS, *self.upright.shape

    def __getitem__(self, k: int) -> Embeddings:
        if not 0 <= k < ORIENTATIONS:
            raise IndexError(f"orientation {k}: there are 0 to {ORIENTATIONS - 1}")
        return StoredEmbeddings(self.others, self.folder, (k - 1,)) if k else self.upright


def write_grid(path: Path, grid: Grid) -> None:
    """Write a store, whole or not at all; one that stands there is replaced.

    Raises
    ------
    GridError
        The grid's parts do not fit, or hold what they may not.
    StoreError
        It cannot be written: a full disk, a folder without permission.
    """
    embeddings = np.asarray(grid.embeddings[:], np.float16)
    _check(str(path), embeddings, grid.valid)
    if grid.orientations is not None and grid.orientations.shape != (
        ORIENTATIONS,
        *embeddings.shape,
    ):
        raise GridError(
            f"{path}: orientations {grid.orientations.shape} do not fit embeddings {embeddings.shape}"
        )
    # zarr encodes into memory, and files are written here: zarr's own writers go on after one of
    # them has met a full disk, and make again what was cleared away
    encoded: dict[str, Buffer] = {}
    with atomic_folder(path) as folder:
        group = zarr.open_group(zarr.storage.MemoryStore(encoded), mode="w", zarr_format=3)
        group.attrs.update(
            {
                "ome": ome_image(grid.provenance, channels=True),
                PROVENANCE: grid.provenance.model_dump(),
                HASH: grid_hash(grid),
            }
        )
        _create(group, EMBEDDINGS, embeddings.shape, embeddings.shape[:1])[:] = embeddings
        _create(group, VALID, grid.valid.shape, (), "bool")[:] = grid.valid
        _move(encoded, folder, but=METADATA)
        if grid.orientations is not None:
            others = (ORIENTATIONS - 1, *embeddings.shape)
            turned = _create(group, TURNED, others, (1, *embeddings.shape[:1]))
            for k in range(1, ORIENTATIONS):
                embeddings = np.asarray(grid.orientations[k][:], np.float16)
                _check(f"{path}: orientation {k}", embeddings, grid.valid)
                turned[k - 1] = embeddings
                _move(encoded, folder, but=METADATA)
        _move(encoded, folder)


def _move(encoded: dict[str, Buffer], folder: Path, *, but: str | None = None) -> None:
    """Write files of what is encoded, and forget it; files of the name ``but`` come later."""
    for key in list(encoded):
        path = folder / key
        if path.name != but:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded.pop(key).to_bytes())


def _create(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    whole: tuple[int, ...],
    dtype: str = "float16",
) -> zarr.Array[Any]:
    """An array (..., rows, columns) in chunks and shards of cells; ``whole`` is what each holds
    along the axes before. An array of cells alone is small, and a shard of it is one chunk."""
    chunk, shard = zip(*(_blocks(length) for length in shape[-2:]), strict=True)
    chunk = chunk if whole else shard
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(*whole, *chunk),
        shards=(*whole, *shard),
        compressors=zarr.codecs.BloscCodec(cname="zstd", clevel=5, shuffle="shuffle"),
        fill_value=0 if whole else False,
        dimension_names=("orientation", "c", "y", "x")[-len(shape) :],
    )


def open_grid(path: Path) -> Grid:
    """Open a store; the embeddings stay on disk until they are indexed.

    Raises
    ------
    GridError
        There is no store, or it is not a grid.
    """
    try:
        group = zarr.open_group(path, mode="r", zarr_format=3)
        embeddings, valid, turned = group[EMBEDDINGS], group[VALID], group.get(TURNED)
        provenance = GridProvenance.model_validate(group.attrs[PROVENANCE])
    except (OSError, KeyError, ValueError, zarr.errors.BaseZarrError) as error:
        kind = "provenance: " if isinstance(error, ValidationError) else ""
        raise GridError(
            f"{path}: no grid store ({kind}{error}); compress the slide again"
        ) from error
    if not isinstance(embeddings, zarr.Array) or not isinstance(valid, zarr.Array):
        raise GridError(f"{path}: no grid store (arrays expected); compress the slide again")
    mask = np.asarray(valid[:])
    if embeddings.dtype != np.float16 or embeddings.ndim != 3 or embeddings.shape[1:] != mask.shape:
        raise GridError(
            f"{path}: embeddings {embeddings.dtype} {embeddings.shape} do not fit the mask {mask.shape}"
        )
    upright = StoredEmbeddings(embeddings, path / EMBEDDINGS)
    if turned is None:
        return Grid(upright, mask, provenance)
    if not isinstance(turned, zarr.Array) or turned.shape != (ORIENTATIONS - 1, *embeddings.shape):
        raise GridError(
            f"{path}: orientations do not fit embeddings {embeddings.shape}; compress the slide again"
        )
    return Grid(upright, mask, provenance, _StoredOrientations(upright, turned, path / TURNED))


def grid_hash(grid: Grid | Path) -> str:
    """Hash of what a grid says (embeddings, mask, patch size and um/px; orientations if it has
    them), not of how it is stored.

    Returns
    -------
    str
        32 hexadecimal digits, the data version of the grid.
    """
    if isinstance(grid, Path):
        grid = open_grid(grid)
    embeddings = np.ascontiguousarray(grid.embeddings[:], np.float16)
    about = grid.provenance
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((embeddings.shape, about.patch, about.mpp, about.slide_mpp)).encode())
    digest.update(embeddings.tobytes())
    digest.update(np.packbits(grid.valid).tobytes())
    if grid.orientations is not None:
        for k in range(1, ORIENTATIONS):
            digest.update(np.ascontiguousarray(grid.orientations[k][:], np.float16).tobytes())
    return digest.hexdigest()


def verify_grid(path: Path) -> bool:
    """Compare a store with the hash that was recorded when it was written.

    Returns
    -------
    bool
        Whether there is one; a store of an older version has none, and is just read.

    Raises
    ------
    GridError
        It is no grid, cannot be read, or is not the one that was written.
    """
    try:
        found = grid_hash(path)
    except GridError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # of a chunk that cannot be decoded
        raise GridError(f"{path}: cannot be read ({error}); compress the slide again") from error
    recorded = zarr.open_group(path, mode="r", zarr_format=3).attrs.get(HASH)
    if recorded not in (None, found):
        raise GridError(
            f"{path}: the embeddings are not those that were written (hash differs); "
            "compress the slide again"
        )
    return recorded is not None


def grid_preview(grid: Grid, *, cell: int = 4) -> NDArray[np.uint8]:
    """Picture of a grid: the first three principal components of its embeddings as RGB.

    Components are those of this grid, each stretched between its 2nd and 98th percentile, and
    signed so that the embedding of largest weight counts positive. Cells without a embedding are white.

    Returns
    -------
    uint8 (rows * cell, columns * cell, 3)
    """
    embeddings = np.asarray(grid.embeddings[:], np.float32)[:, grid.valid].T  # (cells, C)
    picture = np.full((*grid.valid.shape, 3), 255, np.uint8)
    if len(embeddings) > 1:
        centred = embeddings - embeddings.mean(axis=0)
        _, vectors = np.linalg.eigh(centred.T @ centred)
        axes = vectors[:, ::-1][:, :3]
        axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
        values = centred @ axes
        low, high = np.percentile(values, (2, 98), axis=0)
        stretched = (values - low) / np.maximum(high - low, 1e-12)
        # a embedding of fewer than three numbers leaves grey channels
        shown = np.full((len(embeddings), 3), 0.5)
        shown[:, : values.shape[1]] = np.clip(stretched, 0, 1)
        picture[grid.valid] = np.round(shown * 235)
    elif len(embeddings):
        picture[grid.valid] = 128
    return picture.repeat(cell, axis=0).repeat(cell, axis=1)


def _check(name: str, embeddings: NDArray[np.float16], valid: NDArray[np.bool_]) -> None:
    if embeddings.ndim != 3 or embeddings.shape[1:] != valid.shape or valid.dtype != np.bool_:
        raise GridError(f"{name}: embeddings {embeddings.shape} and mask {valid.shape} do not fit")
    if not np.isfinite(embeddings).all():
        raise GridError(f"{name}: embeddings are not all finite numbers of float16")
    if embeddings[:, ~valid].any():
        raise GridError(f"{name}: cells without a embedding must be 0")


def _blocks(length: int) -> tuple[int, int]:
    """Side of chunk and shard for an axis of cells; a shard is a whole number of chunks."""
    chunk = min(_CHUNK, length)
    return chunk, min(_SHARD, -(-length // chunk) * chunk)


def ome_image(about: GridProvenance, *, channels: bool) -> dict[str, Any]:
    """OME-Zarr 0.5 metadata of an image (c, y, x) or (y, x) with a pixel a cell, at path ``0``; a
    pixel's position is its centre, in um from the centre of the slide's first pixel."""
    step = about.patch * about.mpp
    shift = (step - about.slide_mpp) / 2
    scale, translation = [step, step], [shift, shift]
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    if channels:
        axes = [{"name": "c", "type": "channel"}, *axes]
        scale, translation = [1.0, *scale], [0.0, *translation]
    return {
        "version": "0.5",
        "multiscales": [
            {
                "name": about.slide,
                "axes": axes,
                "datasets": [
                    {
                        "path": EMBEDDINGS,
                        "coordinateTransformations": [
                            {"type": "scale", "scale": scale},
                            {"type": "translation", "translation": translation},
                        ],
                    }
                ],
            }
        ],
    }

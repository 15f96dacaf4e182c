"""The grid store: a compressed slide as a folder, an OME-Zarr image of its embeddings.

A store is a zarr v3 group:

- array ``0``: embeddings, float16 (C, rows, columns). It is the only level of an OME-Zarr 0.5 image
  whose axes are in micrometres on the slide;
- array ``valid``: bool (rows, columns), true where an embedding was computed. Elsewhere embeddings
  are 0, which alone does not mark them, since an encoder may return 0;
- array ``orientations``, optional: float16 (7, C, rows, columns), the embeddings of the slide in
  orientations 1 to 7 (:mod:`nic_core.orientations`). Each embedding is stored at its upright
  cell, so ``valid`` and the axes apply to all orientations;
- attribute ``nic``: the provenance (:class:`GridProvenance`);
- attribute ``nic_hash``: the content hash (:func:`grid_hash`).

A chunk holds the embeddings of 64 x 64 cells, a shard those of 512 x 512, fewer where embeddings
are wide (:func:`nic_core.grids.shards.layout_of`). A store is written chunk by chunk, so only one
chunk of each orientation is in memory, and it consists of a few files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import zarr
import zarr.codecs
import zarr.errors
import zarr.storage
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from zarr.abc.buffer import Buffer

from nic_core.grids.chunks import (
    ChunkError,
    StoredEmbeddings,
    Window,
    chunk_windows,
    read_chunk,
)
from nic_core.grids.shards import (
    COMPRESSION_LEVEL,
    COMPRESSOR,
    SHUFFLE,
    Layout,
    ShardWriter,
    layout_of,
)
from nic_core.orientations import ORIENTATIONS, orient
from nic_core.slides.icc import IccProfile
from nic_core.store import atomic_folder
from nic_core.types import Colours, GridPrecision, Reading

GRID_FORMAT: Literal[4] = 4
"""Version of the store's layout and provenance. Stores of other versions are refused."""

EMBEDDINGS_ARRAY, VALID_ARRAY, ORIENTATIONS_ARRAY = "0", "valid", "orientations"
PROVENANCE_ATTRIBUTE, HASH_ATTRIBUTE = "nic", "nic_hash"


class GridError(ValueError):
    """A grid store is missing, damaged, invalid or of another format."""


class GridProvenance(BaseModel):
    """The slide, the encoder and the settings that a grid was made from.

    Attributes
    ----------
    format : int
        :data:`GRID_FORMAT`.
    slide, slide_identity : str
        Slide id, and the content identity of its file.
    slide_mpp : float
        um/px of the slide at level 0.
    slide_image : int
        Number of the image in the slide's file; 0 if it has one scan.
    encoder, weights_hash : str
        Name of the encoder, and the hash of its weights.
    mpp : float
        um/px of the patches.
    patch, stride : int
        Side of a patch and side of a cell, px at ``mpp``. A cell is the central square of its
        patch, so neighbouring patches overlap if the stride is smaller.
    origin : (float, float)
        Top-left corner (x, y) of cell (0, 0), level-0 px. (0, 0) except for grids of embeddings
        that other software computed.
    unreadable : int
        Number of kept cells that could not be decoded; they are not valid in the grid.
    precision : {"float32", "bfloat16", "int8"}, optional
        Numbers that the encoder computed with. This field and the next two are None for
        embeddings that other software computed, which does not state them.
    reading : {"patch", "input"}, optional
        um/px at which pixels were read: that of the patch, or that of the network's input.
    colours : {"stored", "srgb"}, optional
        Pixels as stored, or converted by the ICC profile of the file, if it has one.
    icc_profile : IccProfile or None
        Hash and description of this profile.
    software : str
        Name and version of the software that made the grid.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[4]
    slide: str
    slide_identity: str
    slide_mpp: PositiveFloat
    slide_image: NonNegativeInt
    encoder: str
    weights_hash: str
    mpp: PositiveFloat
    patch: PositiveInt
    stride: PositiveInt
    origin: tuple[float, float]
    unreadable: NonNegativeInt
    precision: GridPrecision | None
    reading: Reading | None
    colours: Colours | None
    icc_profile: IccProfile | None
    software: str

    @model_validator(mode="after")
    def _no_gaps(self) -> Self:
        if self.stride > self.patch:
            raise ValueError(
                f"stride {self.stride} px: must not exceed the patch of {self.patch} px"
            )
        return self

    @property
    def cell_um(self) -> float:
        """Side of a cell, um."""
        return self.stride * self.mpp

    @property
    def cell(self) -> float:
        """Side of a cell, level-0 px."""
        return self.cell_um / self.slide_mpp


class Embeddings(Protocol):
    """Embeddings float16 (C, rows, columns): an array, or a store that reads what is indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class Orientations(Protocol):
    """Embeddings of the eight orientations, float16 (8, C, rows, columns), indexed by ``k``."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, k: int, /) -> Embeddings: ...


@dataclass(frozen=True)
class Grid:
    """A compressed slide.

    Attributes
    ----------
    embeddings : float16 (C, rows, columns)
        A NumPy array, or a stored array that reads only what is indexed. 0 where not valid.
    valid : bool (rows, columns)
        Cells with an embedding.
    provenance : GridProvenance
    orientations : float16 (8, C, rows, columns), optional
        Embeddings of the slide in each orientation (:mod:`nic_core.orientations`), stored at
        the upright cells. Orientation 0 equals ``embeddings``.
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
        """Return the embeddings of orientation ``k`` at the upright cells.

        Returns
        -------
        float16 (C, rows, columns)

        Raises
        ------
        GridError
            The grid was made without orientations.
        """
        if k == 0:
            return self.embeddings
        if self.orientations is None:
            raise GridError(
                f"the grid of slide '{self.provenance.slide}' has no orientations; "
                "compress the slide again with 8 orientations"
            )
        return self.orientations[k]

    def turned(self, k: int) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
        """Return the embeddings and the mask that the slide has in orientation ``k``.

        They equal those of compressing the turned slide.

        Returns
        -------
        embeddings : float16 (C, rows, columns)
            Rows and columns are exchanged if ``k`` is odd.
        valid : bool (rows, columns)

        Raises
        ------
        GridError
            The grid was made without orientations.
        """
        return orient(np.asarray(self.oriented(k)[:]), k), orient(self.valid, k)


@dataclass(frozen=True)
class _StoredOrientations:
    upright: StoredEmbeddings
    others: zarr.Array[Any]  # (7, C, rows, columns)
    folder: Path  # of the array `others`

    @property
    def shape(self) -> tuple[int, ...]:
        return ORIENTATIONS, *self.upright.shape

    def __getitem__(self, k: int) -> Embeddings:
        if not 0 <= k < ORIENTATIONS:
            raise IndexError(f"orientation {k} does not exist; give 0 to {ORIENTATIONS - 1}")
        return StoredEmbeddings(self.others, self.folder, (k - 1,)) if k else self.upright


@dataclass(frozen=True)
class GridPart:
    """The cells of one chunk of a grid.

    Attributes
    ----------
    window : (slice, slice)
        Their rows and columns in the grid.
    embeddings : float16 (orientations, C, rows, columns)
        0 where not valid.
    valid : bool (rows, columns)
    """

    window: Window
    embeddings: NDArray[np.float16]
    valid: NDArray[np.bool_]


def write_grid(path: Path, grid: Grid) -> None:
    """Write a grid store atomically; an existing one is replaced.

    Raises
    ------
    GridError
        Shapes disagree, or embeddings are not finite, or not 0 where the mask is false.
    StoreError
        The store cannot be written, for example because the disk is full.
    """
    shape = grid.shape
    if shape[1:] != grid.valid.shape or grid.valid.dtype != np.bool_:
        raise GridError(f"{path}: embeddings {shape} and mask {grid.valid.shape} do not match")
    if grid.orientations is not None and grid.orientations.shape != (ORIENTATIONS, *shape):
        raise GridError(
            f"{path}: the shape of the orientations, {grid.orientations.shape}, does not match "
            f"that of the embeddings, {shape}"
        )
    orientations = 1 if grid.orientations is None else ORIENTATIONS
    parts = (
        GridPart(
            (rows, columns),
            np.stack(
                [
                    np.asarray(grid.oriented(k)[:, rows, columns], np.float16)
                    for k in range(orientations)
                ]
            ),
            grid.valid[rows, columns],
        )
        for rows, columns in layout_of(shape).windows()
    )
    write_parts(path, shape, parts, lambda _: grid.provenance, orientations=orientations)


def write_parts(
    path: Path,
    shape: tuple[int, int, int],
    parts: Iterable[GridPart],
    provenance: Callable[[NDArray[np.bool_]], GridProvenance],
    *,
    orientations: int,
) -> None:
    """Write a grid store atomically, part by part; an existing one is replaced.

    One part is in memory at a time. If a part cannot be made or written, the old store remains.

    Parameters
    ----------
    shape : (int, int, int)
        (C, rows, columns).
    parts
        One for each window of :func:`~nic_core.grids.shards.layout_of`, in that order.
    provenance
        Called with the whole mask after the last part.
    orientations : int
        1 (upright only) or 8.

    Raises
    ------
    GridError
        Embeddings are not finite, or not 0 where the mask is false.
    StoreError
        The store cannot be written, for example because the disk is full.
    """
    layout = layout_of(shape)
    valid = np.zeros(shape[1:], np.bool_)
    digest = _Digest(shape[1], orientations)
    with atomic_folder(path) as folder:
        with ExitStack() as stack:
            writers = [
                stack.enter_context(
                    ShardWriter(folder / ORIENTATIONS_ARRAY, layout, (k - 1,))
                    if k
                    else ShardWriter(folder / EMBEDDINGS_ARRAY, layout)
                )
                for k in range(orientations)
            ]
            for window, part in zip(layout.windows(), parts, strict=True):
                assert window == part.window
                valid[window] = part.valid
                for k, writer in enumerate(writers):
                    name = f"{path}: orientation {k}" if k else str(path)
                    _check(name, part.embeddings[k], part.valid)
                    digest.add(k, window, part.embeddings[k])
                    writer.add(window, part.embeddings[k])
        source = provenance(valid)
        content_hash = digest.content_hash(shape, valid, source)
        _write_metadata(folder, layout, valid, source, content_hash, orientations)


def _write_metadata(
    folder: Path,
    layout: Layout,
    valid: NDArray[np.bool_],
    provenance: GridProvenance,
    content_hash: str,
    orientations: int,
) -> None:
    """Write the mask, and everything of a store except the chunks of embeddings."""
    # zarr encodes into memory and this function writes the files: zarr's own threads continue
    # after one of them fails on a full disk, and create files in the folder that was removed
    encoded: dict[str, Buffer] = {}
    group = zarr.open_group(zarr.storage.MemoryStore(encoded), mode="w", zarr_format=3)
    group.attrs.update(
        {
            "ome": ome_image(provenance, channels=True),
            PROVENANCE_ATTRIBUTE: provenance.model_dump(),
            HASH_ATTRIBUTE: content_hash,
        }
    )
    size = layout.shape[0]
    _create(group, EMBEDDINGS_ARRAY, layout, (size,), (size,), "float16")
    if orientations > 1:
        _create(group, ORIENTATIONS_ARRAY, layout, (orientations - 1, size), (1, size), "float16")
    # the mask is small: each shard is a single chunk
    mask = layout_of((1, *valid.shape))
    whole_shards = replace(mask, chunk=mask.shard)
    _create(group, VALID_ARRAY, whole_shards, (), (), "bool")[:] = valid
    for key, value in encoded.items():
        file = folder / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(value.to_bytes())


def _create(
    group: zarr.Group,
    name: str,
    layout: Layout,
    leading: tuple[int, ...],
    chunk: tuple[int, ...],
    dtype: str,
) -> zarr.Array[Any]:
    """Create an array (..., rows, columns) in chunks and shards of cells.

    ``leading`` are the lengths of the axes before rows and columns, ``chunk`` those of a chunk.
    """
    shape = (*leading, *layout.shape[1:])
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(*chunk, *layout.chunk),
        shards=(*chunk, *layout.shard),
        compressors=zarr.codecs.BloscCodec(
            cname=COMPRESSOR, clevel=COMPRESSION_LEVEL, shuffle=SHUFFLE
        ),
        fill_value=0 if leading else False,
        dimension_names=("orientation", "c", "y", "x")[-len(shape) :],
    )


def open_grid(path: Path) -> Grid:
    """Open a grid store. Embeddings are read from disk when they are indexed.

    Raises
    ------
    GridError
        The store does not exist, is damaged, is not a grid store, or has another format.
    """
    try:
        group = zarr.open_group(path, mode="r", zarr_format=3)
        provenance = _check_format(path, group.attrs[PROVENANCE_ATTRIBUTE])
        embeddings, valid = group[EMBEDDINGS_ARRAY], group[VALID_ARRAY]
        others = group.get(ORIENTATIONS_ARRAY)
    except GridError:
        raise
    except (OSError, KeyError, ValueError, zarr.errors.BaseZarrError) as error:
        raise GridError(f"{path}: not a grid store ({error}); compress the slide again") from error
    if not isinstance(embeddings, zarr.Array) or not isinstance(valid, zarr.Array):
        raise GridError(f"{path}: not a grid store (no arrays); compress the slide again")
    mask = np.asarray(valid[:])
    if embeddings.dtype != np.float16 or embeddings.ndim != 3 or embeddings.shape[1:] != mask.shape:
        raise GridError(
            f"{path}: embeddings {embeddings.dtype} {embeddings.shape} do not match the mask "
            f"{mask.shape}; compress the slide again"
        )
    upright = StoredEmbeddings(embeddings, path / EMBEDDINGS_ARRAY)
    if others is None:
        return Grid(upright, mask, provenance)
    if not isinstance(others, zarr.Array) or others.shape != (ORIENTATIONS - 1, *embeddings.shape):
        raise GridError(
            f"{path}: the orientations do not match the embeddings {embeddings.shape}; "
            "compress the slide again"
        )
    orientations = _StoredOrientations(upright, others, path / ORIENTATIONS_ARRAY)
    return Grid(upright, mask, provenance, orientations)


def _check_format(path: Path, attribute: Any) -> GridProvenance:
    stated = attribute.get("format", 1) if isinstance(attribute, dict) else None
    if isinstance(stated, int) and stated < GRID_FORMAT:
        raise GridError(
            f"{path}: was written by an older version (format {stated}); compress the slide again"
        )
    try:
        return GridProvenance.model_validate(attribute)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}".removeprefix(": ")
            for problem in error.errors()
        )
        raise GridError(
            f"{path}: invalid provenance ({problems}); compress the slide again"
        ) from error


def grid_hash(grid: Grid | Path) -> str:
    """Return the content hash of a grid, which is its data version.

    The hash covers embeddings, mask, patch size, stride, origin, um/px and, if present,
    orientations. It does not depend on how the grid is stored. One chunk of a store is in memory
    at a time.

    Returns
    -------
    str
        32 hexadecimal digits.

    Raises
    ------
    GridError
        The store of this path cannot be opened.
    ChunkError
        The store is damaged.
    """
    if isinstance(grid, Path):
        grid = open_grid(grid)
    shape, everything = grid.shape, tuple(slice(0, length) for length in grid.valid.shape)
    orientations = 1 if grid.orientations is None else ORIENTATIONS
    digest = _Digest(shape[1], orientations)
    for k in range(orientations):
        embeddings = grid.oriented(k)
        for window in chunk_windows(embeddings, (everything[0], everything[1])):
            digest.add(k, window, read_chunk(embeddings, window))
    return digest.content_hash(shape, grid.valid, grid.provenance)


class _Digest:
    """The content hash of a grid that arrives window by window.

    Each row of each orientation has its own digest of its embeddings from left to right. So the
    hash depends neither on the sides of the windows nor on their order from row to row.
    """

    def __init__(self, rows: int, orientations: int) -> None:
        self._rows = [
            [hashlib.blake2b(digest_size=16) for _ in range(rows)] for _ in range(orientations)
        ]

    def add(self, k: int, window: Window, embeddings: NDArray[np.float16]) -> None:
        """Add a window (C, rows, columns) of orientation ``k``; in each row from left to right."""
        for i, row in enumerate(self._rows[k][window[0]]):
            row.update(np.asarray(embeddings[:, i].T, "<f2").tobytes())

    def content_hash(
        self, shape: tuple[int, int, int], valid: NDArray[np.bool_], source: GridProvenance
    ) -> str:
        digest = hashlib.blake2b(digest_size=16)
        place = source.patch, source.stride, source.origin, source.mpp, source.slide_mpp
        digest.update(repr((shape, *place)).encode())
        digest.update(np.packbits(valid).tobytes())
        for orientation in self._rows:
            for row in orientation:
                digest.update(row.digest())
        return digest.hexdigest()


def recorded_hash(path: Path) -> str | None:
    """Return the content hash that was recorded when a store was written; None if there is none.

    Raises
    ------
    GridError
        The store cannot be opened.
    """
    try:
        attributes = zarr.open_group(path, mode="r", zarr_format=3).attrs
    except (OSError, ValueError, zarr.errors.BaseZarrError) as error:
        raise GridError(f"{path}: cannot be opened ({error}); compress the slide again") from error
    recorded = attributes.get(HASH_ATTRIBUTE)
    return None if recorded is None else str(recorded)


def verify_grid(path: Path) -> None:
    """Compare the content of a store with the hash that was recorded when it was written.

    Raises
    ------
    GridError
        The store cannot be opened or read, has no recorded hash, or its content differs from the
        hash.
    """
    try:
        computed = grid_hash(path)
    except GridError:
        raise
    except ChunkError as error:
        raise GridError(str(error)) from error
    except (OSError, ValueError, RuntimeError) as error:  # a chunk cannot be decoded
        raise GridError(f"{path}: cannot be read ({error}); compress the slide again") from error
    recorded = recorded_hash(path)
    if recorded is None:
        raise GridError(f"{path}: has no recorded hash; compress the slide again")
    if recorded != computed:
        raise GridError(
            f"{path}: the content changed after it was written (its hash differs); "
            "compress the slide again"
        )


def _check(name: str, embeddings: NDArray[np.float16], valid: NDArray[np.bool_]) -> None:
    if not np.isfinite(embeddings).all():
        raise GridError(f"{name}: some embeddings are not finite in float16")
    if embeddings[:, ~valid].any():
        raise GridError(f"{name}: embeddings of cells that are not valid must be 0")


def ome_image(provenance: GridProvenance, *, channels: bool, levels: int = 1) -> dict[str, Any]:
    """Return the OME-Zarr 0.5 metadata of an image with one pixel per cell.

    The levels of the image are the arrays ``0``, ``1``, ... of its group, and each is half as large
    as the one before. Coordinates are in um, of pixel centres, from the centre of the slide's first
    pixel.

    Parameters
    ----------
    channels : bool
        Whether the axes are (c, y, x) or (y, x).
    """
    corner = [provenance.origin[axis] * provenance.slide_mpp for axis in (1, 0)]  # y, x
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    if channels:
        axes = [{"name": "c", "type": "channel"}, *axes]
    datasets = []
    for level in range(levels):
        step = provenance.cell_um * 2**level
        scale = [step, step]
        translation = [start + (step - provenance.slide_mpp) / 2 for start in corner]
        if channels:
            scale, translation = [1.0, *scale], [0.0, *translation]
        transformations = [
            {"type": "scale", "scale": scale},
            {"type": "translation", "translation": translation},
        ]
        datasets.append({"path": str(level), "coordinateTransformations": transformations})
    return {
        "version": "0.5",
        "multiscales": [{"name": provenance.slide, "axes": axes, "datasets": datasets}],
    }

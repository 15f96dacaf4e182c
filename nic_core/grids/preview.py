"""Previews of grids: the embeddings of every cell as an RGB colour, as an OME-Zarr image.

Embeddings are float16 with one channel per number, which programs for images do not show, and
readers of zarr in JavaScript do not read. A preview has a uint8 pixel per cell: red, green and blue
are the first three principal components of the embeddings of many slides
(:class:`EmbeddingColours`), so equal colours mean similar embeddings on all of these slides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import zarr
import zarr.codecs
import zarr.errors
import zarr.storage
from PIL import Image
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator
from scipy.linalg import eigh
from zarr.abc.buffer import Buffer

from nic_core.grids.chunks import ChunkError, tissue_blocks
from nic_core.grids.store import (
    HASH_ATTRIBUTE,
    PROVENANCE_ATTRIBUTE,
    Grid,
    GridError,
    GridProvenance,
    ome_image,
    open_grid,
)
from nic_core.store import atomic_file, atomic_folder
from nic_core.types import Pixels

COLOURS_FORMAT: Literal[1] = 1
"""Version of the file that :func:`write_colours` writes. Files of other versions are refused."""

COLOURS_FILE = "colours.json"
"""Name of the colours among the previews of :func:`write_previews`."""

COLOURS_ATTRIBUTE = "nic_colours"
"""Attribute of a preview: the hash of the colours that it was drawn with."""

BACKGROUND = 255
"""Red, green and blue of cells without an embedding: white, as the glass of a slide [choice]."""

_BRIGHTEST = 235  # of a cell with an embedding, so that none looks like background [choice]
_PERCENTILES = (2, 98)  # of a component; they become 0 and _BRIGHTEST [choice]
_CELLS_PER_GRID, _CELLS_IN_ALL = 2_000, 50_000  # cells from which colours are computed [choice]
_BLOCK = 4_096  # embeddings that are converted to float64 at once
_PIXEL_CHUNK = 512  # pixels per side of a chunk of a preview
_LARGEST_LEVEL = 1_000  # pixels per side above which a smaller level is added [choice]


class EmbeddingColours(BaseModel):
    """Colours of embeddings: three principal components, and the range of each that is shown.

    The sign of a component is such that its largest loading is positive.

    Attributes
    ----------
    format : int
        :data:`COLOURS_FORMAT`.
    encoder, weights_hash : str
        The encoder, and the hash of its weights. Embeddings of other weights have no colours.
    slides, cells : int
        Number of grids, and of cells in them, from which the components were computed.
    mean : list of float
        Mean embedding (C).
    components : list of list of float
        (3, C): unit vectors, for red, green and blue. 0 for those that embeddings of fewer than
        three numbers do not have.
    low, high : list of float
        (3): values of each component that are drawn as 0 and as the brightest value. A component
        with ``low == high`` is drawn grey.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal[1]
    encoder: str
    weights_hash: str
    slides: PositiveInt
    cells: PositiveInt
    mean: list[float]
    components: list[list[float]]
    low: list[float]
    high: list[float]

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        sizes = {len(component) for component in self.components}
        lengths = len(self.components), len(self.low), len(self.high)
        if lengths != (3, 3, 3) or sizes != {len(self.mean)}:
            raise ValueError("not three components of the length of the mean, with a range each")
        return self

    @property
    def hash(self) -> str:
        """Content hash; 32 hexadecimal digits."""
        return hashlib.blake2b(self.model_dump_json().encode(), digest_size=16).hexdigest()


def embedding_colours(stores: Sequence[Path]) -> EmbeddingColours:
    """Compute colours that hold for all of some grids of one encoder.

    The components are those of at most 50,000 cells: up to 2,000 of each grid, evenly spaced among
    the cells with an embedding, and fewer if there are more than 25 grids. Memory is that of these
    cells, whatever the number and the size of the grids. The same grids in the same order give the
    same colours.

    Parameters
    ----------
    stores
        Grid stores.

    Raises
    ------
    GridError
        A store cannot be opened, the grids are of different weights, or no grid has a cell with an
        embedding.
    """
    wanted = max(1, min(_CELLS_PER_GRID, _CELLS_IN_ALL // max(1, len(stores))))
    first: tuple[Path, GridProvenance] | None = None
    samples = []
    for path in stores:
        grid = open_grid(path)
        first = first or (path, grid.provenance)
        if grid.provenance.weights_hash != first[1].weights_hash:
            raise GridError(
                f"{path}: its encoder has other weights than that of {first[0]}; compress the "
                "slide again"
            )
        samples.append(_sample(grid, wanted))
    if first is None or not any(len(sample) for sample in samples):
        places = ", ".join(str(path) for path in stores[:3]) or "no grid was given"
        raise GridError(f"no cell with an embedding, so no colours: {places}; compress more slides")
    return _colours(samples, first[1])


def _sample(grid: Grid, wanted: int) -> npt.NDArray[np.float16]:
    """Return the embeddings (n, C) of evenly spaced valid cells."""
    valid = np.flatnonzero(grid.valid)
    if len(valid) > wanted:
        valid = valid[np.round(np.linspace(0, len(valid) - 1, wanted)).astype(int)]
    chosen = np.zeros(grid.valid.size, bool)
    chosen[valid] = True
    read = [cells for _, cells in _embeddings(grid, chosen.reshape(grid.valid.shape))]
    return np.concatenate(read) if read else np.empty((0, grid.shape[0]), np.float16)


def _embeddings(
    grid: Grid, chosen: npt.NDArray[np.bool_]
) -> Iterator[tuple[tuple[npt.NDArray[np.intp], ...], npt.NDArray[np.float16]]]:
    """Yield (rows, columns) of chosen cells and their embeddings (n, C), chunk by chunk."""
    try:
        for window, inside, read in tissue_blocks(grid.embeddings, chosen):
            rows, columns = np.nonzero(inside)
            yield (rows + window[0].start, columns + window[1].start), read.T
    except ChunkError as error:
        raise GridError(str(error)) from error


def _projected(
    embeddings: npt.NDArray[np.float16],
    mean: npt.NDArray[np.float64],
    components: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return the components (n, 3) of embeddings (n, C)."""
    blocks = range(0, len(embeddings), _BLOCK)
    return np.concatenate(
        [(embeddings[start : start + _BLOCK] - mean) @ components.T for start in blocks]
    )


def _colours(
    samples: Sequence[npt.NDArray[np.float16]], source: GridProvenance
) -> EmbeddingColours:
    """Return the colours of embeddings (n, C) of grids; at least one embedding."""
    sample = np.concatenate(samples)
    count, size = sample.shape
    mean = sample.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((size, size))
    for start in range(0, count, _BLOCK):
        centred = sample[start : start + _BLOCK] - mean
        scatter += centred.T @ centred
    found = min(3, size)
    _, vectors = eigh(scatter, subset_by_index=(size - found, size - 1))
    components = np.zeros((3, size))
    components[:found] = vectors[:, ::-1].T
    largest = np.abs(components).argmax(axis=1)
    components *= np.where(components[np.arange(3), largest] < 0, -1, 1)[:, None]
    low, high = np.percentile(_projected(sample, mean, components), _PERCENTILES, axis=0)
    return EmbeddingColours(
        format=COLOURS_FORMAT,
        encoder=source.encoder,
        weights_hash=source.weights_hash,
        slides=len(samples),
        cells=count,
        mean=mean.tolist(),
        components=components.tolist(),
        low=low.tolist(),
        high=high.tolist(),
    )


def write_colours(path: Path, colours: EmbeddingColours) -> None:
    """Write colours as JSON, atomically.

    Raises
    ------
    StoreError
        The file cannot be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(colours.model_dump_json())


def read_colours(path: Path) -> EmbeddingColours:
    """Read the colours that :func:`write_colours` wrote.

    Raises
    ------
    GridError
        The file does not exist, is damaged, or has another format.
    """
    try:
        return EmbeddingColours.model_validate_json(path.read_bytes())
    except OSError as error:
        raise GridError(
            f"{path}: cannot be read ({error.strerror}); make the colours of the embeddings again"
        ) from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise GridError(
            f"{path}: not a file of colours ({f'{where}: ' * bool(where)}{problem['msg']}); make "
            "the colours of the embeddings again"
        ) from error


def colour_cells(grid: Grid, colours: EmbeddingColours) -> Pixels:
    """Return the colour of every cell. Cells without an embedding are white.

    Returns
    -------
    uint8 (rows, columns, 3)
        At most 235 in cells with an embedding.

    Raises
    ------
    GridError
        The colours are of another encoder, or of other weights of it.
    """
    low, high = np.asarray(colours.low), np.asarray(colours.high)
    picture = np.full((*grid.valid.shape, 3), BACKGROUND, np.uint8)
    spread = np.where(high > low, high - low, 1)
    for cells, values in _components(grid, colours):
        shown = np.where(high > low, np.clip((values - low) / spread, 0, 1), 0.5)
        picture[cells] = np.round(shown * _BRIGHTEST)
    return picture


def embedding_components(grid: Grid, colours: EmbeddingColours) -> npt.NDArray[np.float64]:
    """Return the principal components of the embedding of every cell.

    Returns
    -------
    float64 (rows, columns, 3)
        NaN in cells without an embedding. 0 for components that embeddings of fewer than three
        numbers do not have.

    Raises
    ------
    GridError
        The colours are of another encoder, or of other weights of it.
    """
    components = np.full((*grid.valid.shape, 3), np.nan)
    for cells, values in _components(grid, colours):
        components[cells] = values
    return components


def _components(
    grid: Grid, colours: EmbeddingColours
) -> Iterator[tuple[tuple[npt.NDArray[np.intp], ...], npt.NDArray[np.float64]]]:
    """Yield (rows, columns) of cells and their components (n, 3), chunk by chunk."""
    about = grid.provenance
    if about.weights_hash != colours.weights_hash or grid.shape[0] != len(colours.mean):
        raise GridError(
            f"the grid of slide '{about.slide}' by encoder '{about.encoder}' is of other weights "
            f"than the colours of encoder '{colours.encoder}'; make both with the same encoder"
        )
    mean, components = np.asarray(colours.mean), np.asarray(colours.components)
    for cells, embeddings in _embeddings(grid, grid.valid):
        yield cells, _projected(embeddings, mean, components)


def draw_grid(grid: Grid, *, cell: int = 4) -> Pixels:
    """Draw a grid in colours of its own: the principal components of this grid alone.

    Colours of two grids that are drawn so cannot be compared.

    Parameters
    ----------
    cell : int
        Side of a cell in the picture, px.

    Returns
    -------
    uint8 (rows * cell, columns * cell, 3)
    """
    sample = _sample(grid, _CELLS_PER_GRID)
    if len(sample):
        picture = colour_cells(grid, _colours([sample], grid.provenance))
    else:
        picture = np.full((*grid.valid.shape, 3), BACKGROUND, np.uint8)
    return enlarge(picture, cell=cell)


def enlarge(picture: Pixels, *, cell: int) -> Pixels:
    """Return a picture uint8 (rows, columns, 3) with each cell as a square of ``cell`` px."""
    return picture.repeat(cell, axis=0).repeat(cell, axis=1)


def write_previews(stores: Sequence[Path], folder: Path) -> None:
    """Write previews of grids in colours that hold for all of them.

    ``folder`` receives a preview of the name of each store, and the colours as ``colours.json``.

    Raises
    ------
    GridError
        See :func:`embedding_colours`.
    StoreError
        The folder cannot be written.
    """
    colours = embedding_colours(stores)
    write_colours(folder / COLOURS_FILE, colours)
    for path in stores:
        write_preview(folder / path.name, open_grid(path), colours)


def write_preview(path: Path, grid: Grid, colours: EmbeddingColours) -> Pixels:
    """Write the preview of a grid as an OME-Zarr image, atomically; an existing one is replaced.

    The image is OME-Zarr 0.5 (zarr v3), uint8 with axes (c, y, x), at the grid's place on the
    slide. Pixels of each smaller level are means of 2 x 2 pixels. Chunks are compressed by gzip,
    which browsers decode themselves, and are not sharded. An image of 3 or 4 columns is widened to
    5 by white pixels, since some viewers take that axis for the channels.

    Returns
    -------
    uint8 (rows, columns, 3)
        The colour of every cell.

    Raises
    ------
    GridError
        See :func:`colour_cells`.
    StoreError
        The store cannot be written.
    """
    picture = colour_cells(grid, colours)
    levels = _pyramid(picture)
    ome = ome_image(grid.provenance, channels=True, levels=len(levels)) | _omero(grid.provenance)
    # zarr encodes into memory and this function writes the files: zarr's own threads continue
    # after one of them fails on a full disk, and create files in the folder that was removed
    encoded: dict[str, Buffer] = {}
    group = zarr.open_group(zarr.storage.MemoryStore(encoded), mode="w", zarr_format=3)
    group.attrs.update(
        {
            "ome": ome,
            PROVENANCE_ATTRIBUTE: grid.provenance.model_dump(),
            COLOURS_ATTRIBUTE: colours.hash,
            HASH_ATTRIBUTE: _content_hash(ome, levels),
        }
    )
    for number, level in enumerate(levels):
        group.create_array(
            str(number),
            shape=level.shape,
            dtype="uint8",
            chunks=(1, _PIXEL_CHUNK, _PIXEL_CHUNK),
            compressors=zarr.codecs.GzipCodec(level=6),
            fill_value=BACKGROUND,
            dimension_names=("c", "y", "x"),
        )[:] = level
    with atomic_folder(path) as folder:
        for key, content in encoded.items():
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(content.to_bytes())
    return picture


def _pyramid(picture: Pixels) -> list[npt.NDArray[np.uint8]]:
    """Return the levels (3, rows, columns) of a picture (rows, columns, 3), largest first."""
    if picture.shape[1] in (3, 4):
        # Viv takes an array whose last axis has this length for interleaved RGB or RGBA
        missing = 5 - picture.shape[1]
        picture = np.pad(picture, ((0, 0), (0, missing), (0, 0)), constant_values=BACKGROUND)
    levels = [picture]
    while max(levels[-1].shape[:2]) > _LARGEST_LEVEL:
        levels.append(np.asarray(Image.fromarray(levels[-1]).reduce(2)))
    return [np.moveaxis(level, 2, 0) for level in levels]


def _omero(provenance: GridProvenance) -> dict[str, Any]:
    """Return the display settings of a preview, by which viewers show it in its colours."""
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    channels = [
        {"label": f"component {number}", "color": color, "active": True, "window": window}
        for number, color in enumerate(("FF0000", "00FF00", "0000FF"), start=1)
    ]
    rendering = {"model": "color", "defaultZ": 0, "defaultT": 0}
    return {"omero": {"name": provenance.slide, "channels": channels, "rdefs": rendering}}


def _content_hash(ome: dict[str, Any], levels: Sequence[npt.NDArray[np.uint8]]) -> str:
    digest = hashlib.blake2b(json.dumps(ome, sort_keys=True).encode(), digest_size=16)
    for level in levels:
        digest.update(repr(level.shape).encode())
        digest.update(np.ascontiguousarray(level).tobytes())
    return digest.hexdigest()


def verify_preview(path: Path) -> str:
    """Compare a preview with the hash that was recorded when it was written, and return the hash.

    Returns
    -------
    str
        The hash of pixels, place and display settings, which is the preview's data version; 32
        hexadecimal digits.

    Raises
    ------
    GridError
        The store cannot be read, or its content differs from the hash.
    """
    try:
        group = zarr.open_group(path, mode="r", zarr_format=3)
        ome: Any = group.attrs["ome"]
        recorded = group.attrs[HASH_ATTRIBUTE]
        datasets = ome["multiscales"][0]["datasets"]
        arrays = [zarr.open_array(path / dataset["path"], mode="r") for dataset in datasets]
        levels = [np.asarray(array[:]) for array in arrays]
    except (
        OSError,
        LookupError,
        TypeError,
        ValueError,
        RuntimeError,
        zarr.errors.BaseZarrError,
    ) as error:
        raise GridError(f"{path}: not a preview ({error}); make it again") from error
    computed = _content_hash(ome, levels)
    if recorded != computed:
        raise GridError(
            f"{path}: the content changed after it was written (its hash differs); make it again"
        )
    return computed

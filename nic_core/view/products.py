"""The products of a slide as arrays of cells, read from the store once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import zarr
import zarr.errors
from numpy.typing import NDArray

from nic_core.cohort import CohortError, ProbabilityMap, Target
from nic_core.grids import GridError, GridProvenance, open_grid
from nic_core.grids.store import PROVENANCE_ATTRIBUTE
from nic_core.libvips import pyvips
from nic_core.maps.heatmaps import ZARR, read_heatmap
from nic_core.models.files import ModelFileError
from nic_core.slides import SlideError
from nic_core.steps.predictions import HEATMAP
from nic_core.steps.probability_maps import CELLS, slide_truth
from nic_core.store import GridKey, MapKey, ModelKey, PatchTableKey, PredictionKey
from nic_core.tiling.mask_files import MaskFileError, level0_px_per_px, open_stored_image
from nic_core.tiling.patches import PatchTableError, read_patch_table
from nic_core.view.addresses import champion_layer, heat_layer
from nic_core.view.study import ViewedStudy

DAMAGED = (
    OSError,
    CohortError,
    GridError,
    ModelFileError,
    PatchTableError,
    SlideError,
    pl.exceptions.PolarsError,
    pyvips.Error,
)
"""What readers of products raise for a product that is missing or damaged."""

LABEL_SIDE = 2048  # px: longest side at which a label image is shown


@dataclass(frozen=True)
class Cells:
    """A value for each cell of a lattice on the slide.

    Attributes
    ----------
    values : array (rows, columns)
    cell : (float, float)
        Width and height of a cell, level-0 px.
    origin : (float, float)
        Top-left corner (x, y) of cell (0, 0), level-0 px.
    """

    values: NDArray[Any]
    cell: tuple[float, float]
    origin: tuple[float, float] = (0.0, 0.0)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the lattice, level-0 px."""
        rows, columns = self.values.shape[:2]
        (x, y), (width, height) = self.origin, self.cell
        return x, y, x + columns * width, y + rows * height

    def index(self, x: float, y: float) -> tuple[int, int] | None:
        """Return row and column of the cell that contains a point, level-0 px; None outside."""
        column = math.floor((x - self.origin[0]) / self.cell[0])
        row = math.floor((y - self.origin[1]) / self.cell[1])
        rows, columns = self.values.shape[:2]
        return (row, column) if 0 <= row < rows and 0 <= column < columns else None


@dataclass(frozen=True)
class PatchCells:
    """A patch table as arrays.

    Attributes
    ----------
    state : int8 Cells
        :data:`KEPT`, :data:`BACKGROUND` or :data:`UNREADABLE`.
    focus, tissue : float32 (rows, columns)
        Focus in grey levels squared, NaN where it was not measured; tissue fraction.
    """

    state: Cells
    focus: NDArray[np.float32]
    tissue: NDArray[np.float32]


KEPT, BACKGROUND, UNREADABLE = 0, 1, 2
STATES = ("kept", "background", "unreadable")


def patch_table_file(study: ViewedStudy, slide: str, geometry: str) -> Path:
    """Return the file of a patch table."""
    return study.store.patch_table(PatchTableKey(geometry=geometry, slide=slide))


def patch_cells(study: ViewedStudy, slide: str, geometry: str) -> PatchCells:
    """Return the patch table of a slide.

    Raises
    ------
    OSError, PatchTableError
        It does not exist, or is damaged.
    """
    path = patch_table_file(study, slide, geometry)
    return study.files.get(path, partial(_read_patch_cells, path))


def _read_patch_cells(path: Path) -> PatchCells:
    table = read_patch_table(path)
    shape = int(table["row"].to_numpy().max()) + 1, int(table["column"].to_numpy().max()) + 1
    number = (
        pl.col("reason")
        .cast(pl.String)
        .replace_strict(
            {"background": BACKGROUND, "unreadable": UNREADABLE}, default=KEPT, return_dtype=pl.Int8
        )
    )
    stride = float(table["stride"][0])
    state = table.select(number).to_series().to_numpy().reshape(shape)
    focus, tissue = (
        table[name].cast(pl.Float32).fill_null(np.nan).to_numpy().reshape(shape)
        for name in ("focus", "tissue")
    )
    return PatchCells(Cells(state, (stride, stride)), focus, tissue)


def grid_file(study: ViewedStudy, slide: str, encoder: str) -> Path:
    """Return a file of a grid that is written anew with it."""
    return study.store.grid(GridKey(encoder=encoder, slide=slide)) / "zarr.json"


def grid_cells(study: ViewedStudy, slide: str, encoder: str) -> Cells:
    """Return the mask of a grid, bool.

    Raises
    ------
    OSError, GridError
        The grid does not exist, or is damaged.
    """
    file = grid_file(study, slide, encoder)
    return study.files.get(file, partial(_read_grid_cells, file.parent))


def _read_grid_cells(path: Path) -> Cells:
    grid = open_grid(path)
    return _on_slide(grid.valid, grid.provenance)


def map_file(study: ViewedStudy, slide: str, item: ProbabilityMap) -> Path:
    """Return the file of a probability map."""
    return study.store.probability_map(MapKey(map=item.name, slide=slide)) / CELLS


def map_cells(study: ViewedStudy, slide: str, item: ProbabilityMap) -> Cells:
    """Return a probability map, float32; NaN where the grid has no embedding.

    Raises
    ------
    OSError, GridError, polars.exceptions.PolarsError
        The map or its grid does not exist, or is damaged.
    """
    path, grid = map_file(study, slide, item), grid_cells(study, slide, item.encoder)
    return study.files.get(path, partial(_read_map_cells, path, grid))


def _read_map_cells(path: Path, grid: Cells) -> Cells:
    table = pl.read_parquet(path, columns=["row", "column", "probability"], glob=False)
    values = np.full(grid.values.shape, np.nan, np.float32)
    values[table["row"].to_numpy(), table["column"].to_numpy()] = table["probability"].to_numpy()
    return Cells(values, grid.cell, grid.origin)


@dataclass(frozen=True)
class HeatSource:
    """A heatmap of a slide, which may not exist.

    Attributes
    ----------
    layer : str
        Id of its layer.
    title : str
    target : Target
    folder : Path
        Of the heatmap.
    """

    layer: str
    title: str
    target: Target
    folder: Path


def heat_sources(study: ViewedStudy, slide: str) -> Iterator[HeatSource]:
    """Yield the heatmaps that a slide may have: of each target's champion and slide models."""
    store = study.store
    for target in study.cohort.targets:
        name = target.name
        folder = store.prediction(PredictionKey(champion=name, slide=slide)) / HEATMAP
        yield HeatSource(
            champion_layer(name),
            f"{name}: heat of the champion",
            target,
            folder,
        )
        for entry in study.cohort.encoders:
            key = ModelKey(encoder=entry.name, target=name)
            yield HeatSource(
                heat_layer(name, entry.name),
                f"{name}: heat of the model on {entry.name}",
                target,
                store.explanation(key) / slide,
            )


def heat_file(folder: Path) -> Path:
    """Return a file of a heatmap's folder that is written anew with it."""
    return folder / ZARR / "zarr.json"


def heat_cells(study: ViewedStudy, folder: Path) -> Cells:
    """Return the heatmap of a folder, float32; NaN where the grid has no embedding.

    Raises
    ------
    OSError, GridError
        It does not exist, or is damaged.
    """
    return study.files.get(heat_file(folder), partial(_read_heat_cells, folder))


def _read_heat_cells(folder: Path) -> Cells:
    try:
        attributes = zarr.open_group(folder / ZARR, mode="r").attrs
        provenance = GridProvenance.model_validate(attributes[PROVENANCE_ATTRIBUTE])
    except (OSError, KeyError, ValueError, zarr.errors.BaseZarrError) as error:
        raise GridError(
            f"the heatmap has no place on the slide ({error}); make it again"
        ) from error
    return _on_slide(read_heatmap(folder), provenance)


def truth_cells(study: ViewedStudy, slide: str, item: ProbabilityMap) -> Cells:
    """Return the truth of a map's cells: 1 positive, 0 negative, -1 unknown.

    Raises
    ------
    OSError, GridError, CohortError
        The truth image or the map's grid does not exist, or cannot be read.
    """
    path = Path(study.row(slide)["truth"])
    return study.files.get(path, partial(_read_truth, study, slide, item), item.name)


def _read_truth(study: ViewedStudy, slide: str, item: ProbabilityMap) -> Cells:
    grid = open_grid(grid_file(study, slide, item.encoder).parent)
    truth = slide_truth(study.store, item, grid)
    assert truth is not None  # the index names an image
    return _on_slide(truth, grid.provenance)


def label_cells(study: ViewedStudy, slide: str, width: int, height: int, mpp: float) -> Cells:
    """Return the truth image of a slide, reduced to at most :data:`LABEL_SIDE` px a side.

    A px of the result has the value of the image's px at its centre, so no label is invented.

    Parameters
    ----------
    width, height : int
        Size of the slide, level-0 px.
    mpp : float
        um/px at level 0.

    Raises
    ------
    OSError
        The image does not exist.
    CohortError
        It cannot be read, does not fit the slide, or has several different bands.
    """
    path = Path(study.row(slide)["truth"])
    return study.files.get(path, partial(_read_labels, path, width, height, mpp))


def _read_labels(path: Path, width: int, height: int, mpp: float) -> Cells:
    try:
        stored = open_stored_image(path)
        across, down = level0_px_per_px(stored, width, height, mpp)
        image = stored.image
        first = image.extract_band(0)
        if any((image.extract_band(band) != first).max() for band in range(1, image.bands)):
            raise CohortError("the label image has several bands; give an image of one band")
        step = max(1, math.ceil(max(image.width, image.height) / LABEL_SIDE))
        columns, rows = math.ceil(image.width / step), math.ceil(image.height / step)
        # whole blocks, shifted so that the first px of each is the one at its centre
        shift, size = step // 2, (columns * step, rows * step)
        padded = first.embed(0, 0, size[0] + shift, size[1] + shift, extend="copy")
        values = padded.crop(shift, shift, *size).subsample(step, step).numpy()
    except (MaskFileError, pyvips.Error) as error:
        raise CohortError(f"the label image cannot be read ({error})") from error
    return Cells(values, (across * step, down * step))


def _on_slide(values: NDArray[Any], provenance: GridProvenance) -> Cells:
    return Cells(values, (provenance.cell, provenance.cell), provenance.origin)

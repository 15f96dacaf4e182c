"""Write the embeddings of a grid in the layouts of other software.

=================  ================================================================================
format             what is written
=================  ================================================================================
``trident-h5``     ``<slide>.h5``: ``features`` (N, C) and ``coords`` (N, 2), as TRIDENT and, but
                   for the attributes, CLAM write them
``anndata``        ``<slide>.h5ad``: ``X`` (N, C); ``obsm['spatial']``: centre of each patch
``spatialdata``    ``<slide>.zarr``: the same table, and the cells as squares, which it annotates
``parquet``        ``<slide>.parquet``: a row for each embedding
``npy-tellez``     ``<slide>_features.npy``: float16 (C, rows, columns), and
                   ``<slide>_features_distance_map.npy``, float64 (rows, columns), as the authors'
                   ``featurize_wsi.py`` writes them [code]
=================  ================================================================================

Coordinates are level-0 px; those of a patch are its top-left corner. Embeddings are float32 (the
numbers of the grid, which are float16) where no other type is named. Of a grid with orientations
only the upright one is written, except by ``npy-tellez``. Every format but the last also contains
the provenance, rows and columns of the grid.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import ndimage

from nic_core.grids.features import PROVENANCE
from nic_core.grids.store import Grid, GridError
from nic_core.orientations import orient
from nic_core.store import atomic_file, atomic_folder
from nic_core.types import ExportFormat

_TABLE, _CELLS = "embeddings", "cells"  # names in a SpatialData store

# The authors' rotation and flip that give orientation 0 to 7. They turn first, this project flips
# first: a flip and then a turn is the turn backwards and then the flip.
_AUGMENTATIONS = [
    *((90 * turns, "none") for turns in range(4)),
    *((90 * (-turns % 4), "horizontal") for turns in range(4)),
]


def export_grid(grid: Grid, folder: Path, format: ExportFormat) -> list[Path]:
    """Write a grid to a folder, in files named by its slide; existing ones are replaced.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    GridError
        The grid has no embedding, or a package that the format needs is not installed.
    StoreError
        A file cannot be written.
    """
    if not grid.valid.any():
        raise GridError(f"the grid of slide '{grid.provenance.slide}' has no embedding to export")
    folder.mkdir(parents=True, exist_ok=True)
    write: dict[ExportFormat, Callable[[Grid, Path], list[Path]]] = {
        "trident-h5": export_trident,
        "anndata": export_anndata,
        "spatialdata": export_spatialdata,
        "parquet": export_parquet,
        "npy-tellez": export_npy,
    }
    return write[format](grid, folder)


def export_trident(grid: Grid, folder: Path) -> list[Path]:
    """Write ``<slide>.h5``, which :func:`~nic_core.grids.features.read_features` reads back.

    ``coords`` are rounded to whole px, as TRIDENT's.
    """
    about = grid.provenance
    _, _, _, corners = _cells(grid)
    scale = about.mpp / about.slide_mpp
    path = folder / f"{about.slide}.h5"
    with atomic_file(path) as new, h5py.File(new, "w") as file:
        file.attrs[PROVENANCE] = _stated(grid)
        file.create_dataset("features", data=_embeddings(grid)).attrs["name"] = about.slide
        coords = file.create_dataset("coords", data=np.round(corners).astype(np.int64))
        coords.attrs.update(
            {
                "patch_size": about.patch,
                "patch_size_level0": round(about.patch * scale),
                "level0_magnification": 10 / about.slide_mpp,
                "target_magnification": 10 / about.mpp,
                "overlap": about.patch - about.stride,
                "name": about.slide,
            }
        )
    return [path]


def export_anndata(grid: Grid, folder: Path) -> list[Path]:
    """Write ``<slide>.h5ad``; raises GridError without the package anndata."""
    path = folder / f"{grid.provenance.slide}.h5ad"
    table = _anndata(grid)
    with atomic_file(path) as new:
        table.write_h5ad(new)
    return [path]


def export_spatialdata(grid: Grid, folder: Path) -> list[Path]:
    """Write ``<slide>.zarr``; raises GridError without the package spatialdata."""
    try:
        import geopandas
        import spatialdata
        from spatialdata.models import ShapesModel, TableModel
    except ImportError as error:
        raise GridError(
            "the format spatialdata needs the package spatialdata; install it with the extra "
            "'spatialdata'"
        ) from error
    import shapely

    table, side = _anndata(grid), grid.provenance.cell
    centres = table.obsm["spatial"]
    squares = shapely.box(*(centres - side / 2).T, *(centres + side / 2).T)
    table.obs["region"] = _CELLS
    table.obs["region"] = table.obs["region"].astype("category")
    table.obs["cell"] = np.arange(len(table))
    data = spatialdata.SpatialData(
        shapes={_CELLS: ShapesModel.parse(geopandas.GeoDataFrame(geometry=squares))},
        tables={
            _TABLE: TableModel.parse(table, region=_CELLS, region_key="region", instance_key="cell")
        },
    )
    path = folder / f"{grid.provenance.slide}.zarr"
    with atomic_folder(path) as new:
        new.rmdir()  # spatialdata writes only to a path that does not exist
        data.write(new)
    return [path]


def export_parquet(grid: Grid, folder: Path) -> list[Path]:
    """Write ``<slide>.parquet``.

    Its columns are ``slide``, ``row``, ``column`` (cell of the grid), ``x``, ``y`` (top-left
    corner of the patch, level-0 px) and ``embedding``, a list of C float32. The file's metadata
    has provenance, rows and columns of the grid under ``nic``.
    """
    slide = grid.provenance.slide
    rows, columns, _, corners = _cells(grid)
    embeddings = _embeddings(grid)
    table = pa.table(
        {
            "slide": pa.array([slide] * len(rows)),
            "row": rows,
            "column": columns,
            "x": corners[:, 0],
            "y": corners[:, 1],
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(embeddings.ravel()), embeddings.shape[1]
            ),
        }
    ).replace_schema_metadata({PROVENANCE: _stated(grid)})
    path = folder / f"{slide}.parquet"
    with atomic_file(path) as new:
        pq.write_table(table, new)
    return [path]


def export_npy(grid: Grid, folder: Path) -> list[Path]:
    """Write the arrays that the authors' code reads [code].

    A grid with orientations gives a pair of files for each of their augmentations,
    ``<slide>_<degrees>_<flip>_features.npy``: a rotation by 0 to 270 degrees counter-clockwise,
    after which ``horizontal`` exchanges left and right, as their ``rot_flip_array``.
    """
    slide = grid.provenance.slide
    written: list[Path] = []
    if grid.orientations is None:
        turned = {f"{slide}_features": 0}
    else:
        turned = {
            f"{slide}_{degrees}_{flip}_features": k
            for k, (degrees, flip) in enumerate(_AUGMENTATIONS)
        }
    for name, k in turned.items():
        embeddings = orient(np.asarray(grid.oriented(k)[:], np.float16), k)
        weights = distance_map(orient(grid.valid, k))
        for array, path in (
            (np.ascontiguousarray(embeddings), folder / f"{name}.npy"),
            (weights, folder / f"{name}_distance_map.npy"),
        ):
            with atomic_file(path) as new, new.open("wb") as file:
                np.save(file, array)
            written.append(path)
    return written


def distance_map(valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the squared distance of each cell to background, as probabilities [code].

    Differs from :func:`nic_core.models.crops.centre_weights`: what is outside of the grid does not
    count as background. If every cell has an embedding, there is no background, and all cells are
    equal.

    Parameters
    ----------
    valid : bool (rows, columns)

    Returns
    -------
    float64 (rows, columns), sum 1
    """
    distance = np.ones(valid.shape) if valid.all() else ndimage.distance_transform_edt(valid)
    squared: NDArray[np.float64] = (distance / distance.max()) ** 2
    squared /= squared.sum()
    return squared


def _cells(
    grid: Grid,
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    """Rows and columns (N,) of the cells with an embedding; centres and corners of the patches.

    Centres and top-left corners are float64 (N, 2): x, y, level-0 px.
    """
    about = grid.provenance
    rows, columns = np.nonzero(grid.valid)
    centres = np.array(about.origin) + (np.stack([columns, rows], axis=1) + 0.5) * about.cell
    return rows, columns, centres, centres - about.patch * about.mpp / about.slide_mpp / 2


def _embeddings(grid: Grid) -> NDArray[np.float32]:
    """Embeddings of the cells of :func:`_cells`, float32 (N, C)."""
    return np.ascontiguousarray(np.asarray(grid.embeddings[:])[:, grid.valid].T, np.float32)


def _stated(grid: Grid) -> str:
    rows, columns = grid.valid.shape
    stated = {"provenance": grid.provenance.model_dump(), "rows": rows, "columns": columns}
    return json.dumps(stated)


def _anndata(grid: Grid) -> Any:
    try:
        import anndata
        import pandas
    except ImportError as error:
        raise GridError(
            "the format anndata needs the package anndata; install it with the extra 'anndata'"
        ) from error
    rows, columns, centres, _ = _cells(grid)
    slide = grid.provenance.slide
    names = [f"{slide}-{row}-{column}" for row, column in zip(rows, columns, strict=True)]
    return anndata.AnnData(
        _embeddings(grid),
        obs=pandas.DataFrame({"row": rows, "column": columns}, index=names),
        obsm={"spatial": centres},
        uns={PROVENANCE: _stated(grid)},
    )

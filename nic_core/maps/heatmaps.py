"""Heatmaps of slide models: files for viewers, pictures, and scores.

A heatmap has a value ("heat") for each cell of a slide's grid. Its folder contains:

- ``heat.tif``: float32, tiled pyramid, one pixel per cell, with um/px. Its top-left corner is that
  of the grid, which is that of the slide except for grids of embeddings that other software
  computed. NaN where the grid has no embedding;
- ``heat.zarr``: the same values as an OME-Zarr 0.5 image, with the coordinates of the grid;
- ``heat.geojson``: the areas of highest heat as QuPath annotations, px of level 0 that count from
  the corner of the slide's scanned area (``origin``: ``bounds``), as QuPath's do [choice];
- ``overlay.png``: the heat over a thumbnail with a scale bar; below, a colour key and a caption;
- ``patches.jpg``: the patches of highest heat and, below, those of lowest heat, each row with its
  range of heat;
- ``patches.parquet``: their places and heat (:data:`EXTREME_SCHEMA`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import polars as pl
import shapely
import zarr
import zarr.codecs
import zarr.errors
from matplotlib.image import imsave
from sklearn.metrics import roc_auc_score

from nic_core.grids import GridError, GridProvenance
from nic_core.grids.store import EMBEDDINGS_ARRAY, PROVENANCE_ATTRIBUTE, ome_image
from nic_core.libvips import pyvips
from nic_core.maps import tint
from nic_core.numbers import format_number
from nic_core.pictures import with_caption, with_colour_key, with_scale_bar
from nic_core.slides import Slide, SlideError, content_identity
from nic_core.store import atomic_folder
from nic_core.tiling.annotations import ORIGIN_MEMBER
from nic_core.types import Pixels

TIFF, ZARR, GEOJSON = "heat.tif", "heat.zarr", "heat.geojson"
OVERLAY, PATCHES, EXTREMES = "overlay.png", "patches.jpg", "patches.parquet"
EXTREME_SCHEMA = pl.Schema(
    {
        "heat": pl.Float64(),
        "end": pl.String(),  # highest or lowest heat
        "rank": pl.Int64(),  # 1: the most extreme of its end
        "row": pl.Int64(),  # cell of the grid
        "column": pl.Int64(),
        "x": pl.Float64(),  # top-left corner of the patch, level-0 px
        "y": pl.Float64(),
    }
)
QUANTILES = (0.5, 0.75, 0.9)  # of the heat of a slide's cells; each outlines an area
_THUMBNAIL, _PATCHES_PER_ROW, _GAP = 1024, 8, 4  # px, patches, px
_RANGE = 98  # percentile of absolute heat that is drawn in pure colour [choice]

Heat = npt.NDArray[np.float32]


def write_heatmap(
    folder: Path,
    heat: Heat,
    provenance: GridProvenance,
    slide: Slide,
    *,
    name: str,
    caption: str,
    quantiles: Sequence[float] = QUANTILES,
    pictures: bool = True,
) -> None:
    """Write the heatmap of a slide atomically; an existing one is replaced.

    Parameters
    ----------
    folder : Path
        Folder of the files listed in the module's docstring.
    heat : float32 (rows, columns)
        NaN where the grid has no embedding.
    provenance : GridProvenance
        Provenance of the slide's grid.
    slide : Slide
        The slide of the grid.
    name : str
        Target or class that the heat explains; part of the names of the areas in QuPath.
    caption : str
        Text below the pictures: what is explained, and what a high value means
        (:func:`nic_core.models.explanation.heat_caption`).
    quantiles : sequence of float
        Quantiles whose areas are written.
    pictures : bool
        Also draw overlay and patches, which takes ten times as long as all other files.

    Raises
    ------
    ValueError
        Every cell is NaN.
    SlideError
        The slide is not that of the grid, or a patch cannot be read.
    StoreError
        The folder cannot be written.
    """
    check_slide_of_grid(slide, provenance)
    if np.isnan(heat).all():
        raise ValueError(f"slide '{provenance.slide}': no cell has heat")
    x, y = provenance.origin
    corner = slide.bounds[:2]
    with atomic_folder(folder) as new:
        _write_tiff(new / TIFF, heat, provenance)
        write_cell_image(new / ZARR, heat, provenance)
        areas = hot_areas(
            heat,
            provenance.cell,
            name=name,
            quantiles=quantiles,
            origin=(x - corner[0], y - corner[1]),
        )
        areas[ORIGIN_MEMBER] = "bounds"
        (new / GEOJSON).write_text(json.dumps(areas) + "\n")
        if pictures:
            # the fastest level: higher ones hardly make a thumbnail of tissue smaller
            fast = {"compress_level": 1}
            low, high = colour_limits(heat)
            overlay = with_colour_key(
                heat_overlay(slide, heat, provenance),
                low=format_number(low),
                high=format_number(high),
                caption=caption,
            )
            imsave(new / OVERLAY, overlay, pil_kwargs=fast)
            extremes = extreme_patches(heat, provenance)
            extremes.write_parquet(new / EXTREMES)
            sheet = _labelled(patch_sheet(slide, extremes, provenance), extremes, caption)
            imsave(new / PATCHES, sheet, pil_kwargs={"quality": 90})


def check_slide_of_grid(slide: Slide, provenance: GridProvenance) -> None:
    """Compare the content identity of a slide with that of the slide of a grid.

    Raises
    ------
    SlideError
        The slide is not that of the grid.
    """
    if content_identity(slide.path) != provenance.slide_identity:
        raise SlideError(
            slide.path,
            f"is not the slide '{provenance.slide}' of the grid",
            "give the slide that the grid was made from",
        )


def read_heatmap(folder: Path) -> Heat:
    """Read the heat that :func:`write_heatmap` wrote.

    Returns
    -------
    float32 (rows, columns)

    Raises
    ------
    GridError
        The heatmap does not exist or cannot be read.
    """
    return read_cell_image(folder / ZARR)


def read_cell_image(path: Path) -> Heat:
    """Read the values that :func:`write_cell_image` wrote.

    Returns
    -------
    float32 (rows, columns)

    Raises
    ------
    GridError
        The image does not exist or cannot be read.
    """
    try:
        return np.asarray(zarr.open_array(path / EMBEDDINGS_ARRAY, mode="r")[:], np.float32)
    except (OSError, ValueError, zarr.errors.BaseZarrError) as error:
        raise GridError(f"{path}: cannot be read ({error}); make it again") from error


def heatmap_provenance(folder: Path) -> GridProvenance:
    """Read the provenance of the grid whose heat :func:`write_heatmap` wrote.

    Raises
    ------
    GridError
        The heatmap does not exist or cannot be read.
    """
    try:
        stated = zarr.open_group(folder / ZARR, mode="r").attrs[PROVENANCE_ATTRIBUTE]
        return GridProvenance.model_validate(stated)
    except (OSError, KeyError, ValueError, zarr.errors.BaseZarrError) as error:
        raise GridError(f"{folder / ZARR}: cannot be read ({error}); make it again") from error


def score_heat(heat: Heat, truth: npt.NDArray[np.int8]) -> tuple[float, bool] | None:
    """Score heat against the truth of cells.

    Only cells with heat and a known truth are used.

    Parameters
    ----------
    heat : float32 (rows, columns)
    truth : int8 (rows, columns)
        1 positive, 0 negative, -1 unknown; from :func:`nic_core.maps.truth_of_cells`.

    Returns
    -------
    auc : float
        Area under the ROC curve.
    hit : bool
        Whether the cell of highest heat is positive (the pointing game).

    None is returned instead if all cells are positive or all are negative.
    """
    known = np.isfinite(heat) & (truth >= 0)
    values, positive = heat[known], truth[known] == 1
    if not positive.any() or positive.all():
        return None
    return float(roc_auc_score(positive, values)), bool(positive[values.argmax()])


def hot_areas(
    heat: Heat,
    cell: float,
    *,
    name: str,
    quantiles: Sequence[float] = QUANTILES,
    origin: tuple[float, float] = (0, 0),
) -> dict[str, Any]:
    """Return the areas of highest heat as QuPath GeoJSON, one annotation per quantile.

    An area consists of exactly those cells whose heat reaches the quantile (:func:`outlines`).

    Parameters
    ----------
    heat : float32 (rows, columns)
    cell : float
        Side of a cell, level-0 px. Coordinates are level-0 px, too.
    name : str
        Part of the names of the annotations.
    quantiles : sequence of float
    origin : (float, float)
        Top-left corner (x, y) of cell (0, 0) in the coordinates of the result, level-0 px.
    """
    features = []
    for quantile in sorted(quantiles):
        level = float(np.nanquantile(heat, quantile))
        colour = matplotlib.colormaps["autumn_r"](quantile)[:3]
        features.append(
            {
                "type": "Feature",
                "geometry": {
                    "type": "MultiPolygon",
                    "coordinates": outlines(heat >= level, cell, origin),  # False for NaN
                },
                "properties": {
                    "objectType": "annotation",
                    "name": f"{name}: heat of {level:.4g} or more",
                    "classification": {
                        "name": f"{name} q{quantile:g}",
                        "color": [round(255 * c) for c in colour],
                    },
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


def cell_area(
    mask: npt.NDArray[np.bool_], cell: float, origin: tuple[float, float] = (0, 0)
) -> shapely.MultiPolygon:
    """Return the area of a mask of cells, level-0 px.

    Their sides are those of the cells. Cells that share only a corner belong to different polygons,
    unless others connect them.

    Parameters
    ----------
    mask : bool (rows, columns)
    cell : float
        Side of a cell, level-0 px.
    origin : (float, float)
        Top-left corner (x, y) of cell (0, 0) in the coordinates of the result, level-0 px.

    Returns
    -------
    shapely.MultiPolygon
        Outer rings run counter-clockwise and holes clockwise with y upwards, as GeoJSON requires.
    """
    # the squares of neighbouring cells in a row are one rectangle
    ends = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, first = np.nonzero(ends == 1)
    _, beyond = np.nonzero(ends == -1)
    area = shapely.union_all(shapely.box(first, rows, beyond, rows + 1))
    area = shapely.orient_polygons(shapely.simplify(area, 0))  # without points on straight sides
    placed = shapely.transform(area, lambda points: points * cell + origin)
    return shapely.MultiPolygon([part for part in shapely.get_parts(placed) if not part.is_empty])


def outlines(
    mask: npt.NDArray[np.bool_], cell: float, origin: tuple[float, float] = (0, 0)
) -> list[list[list[list[float]]]]:
    """Return the area of a mask of cells (:func:`cell_area`) as GeoJSON polygons.

    Returns
    -------
    list of polygons
        A polygon is a list of rings: the outer one, then its holes. A ring is a list of points
        [x, y], level-0 px, whose last point repeats the first.
    """
    return [
        [shapely.get_coordinates(ring).tolist() for ring in (part.exterior, *part.interiors)]
        for part in cell_area(mask, cell, origin).geoms
    ]


def heat_overlay(slide: Slide, heat: Heat, provenance: GridProvenance) -> Pixels:
    """Draw heat over a thumbnail, from blue to red, with a scale bar.

    Parameters
    ----------
    heat : float32 (rows, columns)
    provenance : GridProvenance
        Provenance of the slide's grid.

    Returns
    -------
    uint8 (H, W, 3)

    Raises
    ------
    SlideError
        A part of the slide cannot be decoded.
    """
    low, high = colour_limits(heat)
    values = np.clip((heat - low) / (high - low), 0, 1)
    thumbnail = slide.thumbnail(_THUMBNAIL)
    picture = tint(
        thumbnail,
        values,
        width=slide.width,
        height=slide.height,
        cell=provenance.cell,
        origin=provenance.origin,
    )
    return with_scale_bar(picture, slide.width * slide.mpp / thumbnail.shape[1])


def colour_limits(heat: Heat) -> tuple[float, float]:
    """Return the heat at both ends of the colours; 0 has the colour in the middle.

    The upper end is the 98th percentile of the absolute heat, 1 if there is none. The lower end is
    minus that.

    Parameters
    ----------
    heat : float32 (rows, columns)
    """
    known = np.abs(heat[np.isfinite(heat)])
    high = float(np.percentile(known, _RANGE)) if known.size else 0.0
    high = high or 1.0
    return -high, high


def extreme_patches(heat: Heat, provenance: GridProvenance) -> pl.DataFrame:
    """Return the patches of highest and of lowest heat.

    Each end has 8 patches, or half of the slide's patches if there are fewer.

    Returns
    -------
    polars.DataFrame
        :data:`EXTREME_SCHEMA`: the highest first, each end from its most extreme patch on.
    """
    rows, columns = np.nonzero(np.isfinite(heat))
    order = np.argsort(-heat[rows, columns], kind="stable")
    shown = min(_PATCHES_PER_ROW, -(-len(order) // 2))
    margin = (provenance.patch - provenance.stride) / 2 * provenance.mpp / provenance.slide_mpp
    left_most, top_most = (corner - margin for corner in provenance.origin)
    found = [
        {
            "heat": float(heat[rows[i], columns[i]]),
            "end": end,
            "rank": rank,
            "row": rows[i],
            "column": columns[i],
            "x": left_most + columns[i] * provenance.cell,
            "y": top_most + rows[i] * provenance.cell,
        }
        for end, cells in (("highest", order[:shown]), ("lowest", order[::-1][:shown]))
        for rank, i in enumerate(cells, start=1)
    ]
    return pl.DataFrame(found, schema=EXTREME_SCHEMA)


def patch_sheet(slide: Slide, extremes: pl.DataFrame, provenance: GridProvenance) -> Pixels:
    """Draw the patches of highest heat in a row and those of lowest heat in a row below.

    The most extreme patch is on the left. Patches are shown at the um/px of the encoder; they
    overlap in the slide if the stride is smaller than the patch.

    Parameters
    ----------
    extremes
        Output of :func:`extreme_patches`.

    Returns
    -------
    uint8 (H, W, 3)

    Raises
    ------
    SlideError
        A patch cannot be decoded.
    """
    side, columns = provenance.patch, extremes["rank"].max()
    assert isinstance(columns, int)
    sheet = np.full((2 * side + _GAP, columns * (side + _GAP) - _GAP, 3), 255, np.uint8)
    for end, rank, x, y in extremes.select("end", "rank", "x", "y").iter_rows():
        top, left = (end == "lowest") * (side + _GAP), (rank - 1) * (side + _GAP)
        sheet[top : top + side, left : left + side] = slide.read(x, y, side, side, provenance.mpp)
    return sheet


def _labelled(sheet: Pixels, extremes: pl.DataFrame, caption: str) -> Pixels:
    """Add the range of heat below each row of :func:`patch_sheet`, and the caption at the end."""
    side = (sheet.shape[0] - _GAP) // 2
    rows = []
    for end, row in (("highest", sheet[:side]), ("lowest", sheet[side + _GAP :])):
        heat = extremes.filter(end=end)["heat"]
        text = f"{end} heat, {format_number(heat[0])} (left) to {format_number(heat[-1])}"
        rows.append(with_caption(row, text))
    return with_caption(np.concatenate(rows), caption)


def _write_tiff(path: Path, heat: Heat, provenance: GridProvenance) -> None:
    """Write a tiled pyramid."""
    pyvips.Image.new_from_array(np.ascontiguousarray(heat, np.float32)).tiffsave(
        str(path),
        tile=True,
        tile_width=256,
        tile_height=256,
        pyramid=True,
        compression="deflate",
        resunit="cm",
        xres=1000 / provenance.cell_um,  # libvips expects px/mm for any unit of the file
        yres=1000 / provenance.cell_um,
    )


def write_cell_image(path: Path, values: Heat, provenance: GridProvenance) -> None:
    """Write values of the cells of a grid as an OME-Zarr 0.5 image (y, x) at the grid's place.

    Parameters
    ----------
    path : Path
        Folder of the image; not written atomically.
    values : float32 (rows, columns)
        NaN where there is none.
    provenance : GridProvenance
        Provenance of the grid.
    """
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.attrs.update(
        {
            "ome": ome_image(provenance, channels=False),
            PROVENANCE_ATTRIBUTE: provenance.model_dump(),
        }
    )
    group.create_array(
        EMBEDDINGS_ARRAY,
        data=np.ascontiguousarray(values, np.float32),
        chunks=tuple(min(512, length) for length in values.shape),
        compressors=zarr.codecs.BloscCodec(cname="zstd", clevel=5, shuffle="shuffle"),
        fill_value=np.nan,
        dimension_names=("y", "x"),
    )

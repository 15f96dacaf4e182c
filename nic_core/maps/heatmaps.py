"""Heatmaps on the slide: files that viewers place by themselves, pictures, and scores.

A folder for each slide, written whole:

- ``heat.tif``: float32, pyramidal and tiled, a pixel a cell, with um/px; its top-left corner is
  the slide's. NaN where there is no embedding;
- ``heat.zarr``: the same as an OME-Zarr 0.5 image in the frame of the slide's grid;
- ``heat.geojson``: the areas of highest heat for QuPath, in level-0 px;
- ``overlay.png``: the heat over a thumbnail, with a scale bar;
- ``patches.jpg``: the hottest patches (upper row) and the coldest, hottest and coldest first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pyvips
import zarr
import zarr.codecs
import zarr.errors
from matplotlib.image import imsave
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from skimage.measure import find_contours
from sklearn.metrics import roc_auc_score

from nic_core.grids import GridError, GridProvenance
from nic_core.grids.store import EMBEDDINGS, PROVENANCE, ome_image
from nic_core.maps import tint
from nic_core.slides import Slide, SlideError, content_identity
from nic_core.store import atomic_folder
from nic_core.types import Pixels

TIFF, ZARR, GEOJSON = "heat.tif", "heat.zarr", "heat.geojson"
OVERLAY, PATCHES = "overlay.png", "patches.jpg"
QUANTILES = (0.5, 0.75, 0.9)  # of a slide's cells, from which on an area is outlined
_THUMBNAIL, _SHOWN, _GAP = 1024, 8, 4  # px, patches, px
_RANGE = (2, 98)  # percentiles that are shown as pure blue and red

Heat = npt.NDArray[np.float32]


def write_heatmap(
    folder: Path,
    heat: Heat,
    provenance: GridProvenance,
    slide: Slide,
    *,
    name: str,
    quantiles: Sequence[float] = QUANTILES,
    pictures: bool = True,
) -> None:
    """Write a slide's heatmap, whole or not at all; one that stands there is replaced.

    Parameters
    ----------
    folder
        To hold the files that the module names.
    heat : float32 (rows, columns)
        NaN where the grid has no embedding.
    provenance
        Of the slide's grid.
    name
        Of what is explained; a part of the areas' names in QuPath.
    pictures
        Draw the overlay and the patches too, which takes ten times as long as all else.

    Raises
    ------
    ValueError
        No cell has heat.
    SlideError
        The slide is not that of the grid, or a patch cannot be read.
    StoreError
        The folder cannot be written.
    """
    if content_identity(slide.path) != provenance.slide_identity:
        raise SlideError(
            slide.path, f"is not the slide '{provenance.slide}' of the grid", "give that one"
        )
    if np.isnan(heat).all():
        raise ValueError(f"slide '{provenance.slide}': no cell has heat")
    cell = provenance.patch * provenance.mpp / slide.mpp
    with atomic_folder(folder) as new:
        _write_tiff(new / TIFF, heat, provenance.patch * provenance.mpp)
        _write_zarr(new / ZARR, heat, provenance)
        areas = hot_areas(heat, cell, name=name, quantiles=quantiles)
        (new / GEOJSON).write_text(json.dumps(areas) + "\n")
        if pictures:
            # the fastest: a thumbnail of tissue hardly gets smaller
            quick = {"compress_level": 1}
            imsave(new / OVERLAY, heat_overlay(slide, heat, cell), pil_kwargs=quick)
            sheet = patch_sheet(slide, heat, provenance)
            imsave(new / PATCHES, sheet, pil_kwargs={"quality": 90})


def read_heatmap(folder: Path) -> Heat:
    """The heat that :func:`write_heatmap` wrote, float32 (rows, columns).

    Raises
    ------
    GridError
        There is none.
    """
    try:
        return np.asarray(zarr.open_array(folder / ZARR / EMBEDDINGS, mode="r")[:], np.float32)
    except (OSError, ValueError, zarr.errors.BaseZarrError) as error:
        raise GridError(f"{folder}: no heatmap ({error}); explain the slide again") from error


def score_heat(heat: Heat, truth: npt.NDArray[np.int8]) -> tuple[float, bool] | None:
    """How well heat finds what is there.

    Parameters
    ----------
    heat : float32 (rows, columns)
    truth : int8 (rows, columns)
        1, 0, or -1 for unknown; from :func:`nic_core.maps.truth_of_cells`.

    Returns
    -------
    Area under the ROC curve over the cells with heat and a known truth, and whether the hottest
    of them is positive (the pointing game); None if they are all of one kind.
    """
    known = np.isfinite(heat) & (truth >= 0)
    values, positive = heat[known], truth[known] == 1
    if not positive.any() or positive.all():
        return None
    return float(roc_auc_score(positive, values)), bool(positive[values.argmax()])


def hot_areas(
    heat: Heat, cell: float, *, name: str, quantiles: Sequence[float] = QUANTILES
) -> dict[str, Any]:
    """The areas of highest heat as QuPath's GeoJSON, one annotation a quantile.

    An area holds the centres of exactly the cells whose heat reaches that quantile of the slide's
    cells; its outline runs half way between neighbouring centres. Cells that touch by a corner
    alone are two polygons.

    Parameters
    ----------
    cell
        Side of a cell, level-0 px; so are the coordinates.
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
                    "coordinates": outlines(heat >= level, cell),  # NaN reaches nothing
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


def outlines(mask: npt.NDArray[np.bool_], cell: float) -> list[list[list[list[float]]]]:
    """Outlines of a mask of cells as GeoJSON polygons: the outer ring, then its holes.

    Each ring is closed: its last point (x, y), in level-0 px, is its first. Outer rings run
    counter-clockwise and holes clockwise as GeoJSON counts (y upwards).
    """
    regions, _ = ndimage.label(mask)
    polygons = []
    for number, box in enumerate(ndimage.find_objects(regions), start=1):
        own = np.pad(regions[box] == number, 1).astype(np.float64)
        # row and column of a centre; the corner of the slide is half a cell before the first one
        corner = np.array([box[0].start - 0.5, box[1].start - 0.5])
        found = find_contours(own, 0.5)  # type: ignore[no-untyped-call]
        rings = [(ring + corner)[:, ::-1] * cell for ring in found]
        rings.sort(key=lambda ring: -abs(_area(ring)))  # the outer ring holds all others
        polygons.append(
            [
                (ring if (_area(ring) > 0) == (i == 0) else ring[::-1]).tolist()
                for i, ring in enumerate(rings)
            ]
        )
    return polygons


def heat_overlay(slide: Slide, heat: Heat, cell: float) -> Pixels:
    """The heat over a thumbnail with a scale bar, uint8 (H, W, 3).

    Blue to red are the 2nd to the 98th percentile of the slide's cells. ``cell`` is a cell's
    side, level-0 px.
    """
    low, high = np.nanpercentile(heat, _RANGE)
    values = np.clip((heat - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
    thumbnail = slide.thumbnail(_THUMBNAIL)
    picture = tint(thumbnail, values, width=slide.width, height=slide.height, cell=cell)
    return _with_scale_bar(picture, slide.width * slide.mpp / thumbnail.shape[1])


def patch_sheet(slide: Slide, heat: Heat, provenance: GridProvenance) -> Pixels:
    """The patches of highest heat in a row, and below them those of lowest, as the encoder saw
    them; hottest and coldest on the left, uint8 (H, W, 3). 8 each, or half of the slide's."""
    side, (rows, columns) = provenance.patch, np.nonzero(np.isfinite(heat))
    order = np.argsort(-heat[rows, columns], kind="stable")
    shown = min(_SHOWN, -(-len(order) // 2))
    sheet = np.full((2 * side + _GAP, shown * (side + _GAP) - _GAP, 3), 255, np.uint8)
    step = side * provenance.mpp / slide.mpp
    for line, cells in enumerate((order[:shown], order[::-1][:shown])):
        for i, which in enumerate(cells):
            x, y = columns[which] * step, rows[which] * step
            pixels = slide.read(x, y, side, side, provenance.mpp)
            top, left = line * (side + _GAP), i * (side + _GAP)
            sheet[top : top + side, left : left + side] = pixels
    return sheet


def _write_tiff(path: Path, heat: Heat, step: float) -> None:
    """``step`` is a cell's side, um."""
    pyvips.Image.new_from_array(np.ascontiguousarray(heat, np.float32)).tiffsave(
        str(path),
        tile=True,
        tile_width=256,
        tile_height=256,
        pyramid=True,
        compression="deflate",
        resunit="cm",
        xres=1000 / step,  # px/mm, whatever the file's unit
        yres=1000 / step,
    )


def _write_zarr(path: Path, heat: Heat, provenance: GridProvenance) -> None:
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.attrs.update(
        {"ome": ome_image(provenance, channels=False), PROVENANCE: provenance.model_dump()}
    )
    group.create_array(
        EMBEDDINGS,
        data=np.ascontiguousarray(heat, np.float32),
        chunks=tuple(min(512, length) for length in heat.shape),
        compressors=zarr.codecs.BloscCodec(cname="zstd", clevel=5, shuffle="shuffle"),
        fill_value=np.nan,
        dimension_names=("y", "x"),
    )


def _area(ring: npt.NDArray[np.float64]) -> float:
    """Signed area of a closed ring (n, 2); positive if counter-clockwise with y upwards."""
    x, y = ring.T
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]) / 2)


def _with_scale_bar(picture: Pixels, mpp: float) -> Pixels:
    """The longest bar of 1, 2 or 5 times a power of ten that takes a fifth of the width."""
    longest = picture.shape[1] / 5 * mpp  # um
    power = 10.0 ** np.floor(np.log10(longest))
    length = power * max(step for step in (1, 2, 5) if step * power <= longest)
    # the font that comes with Pillow has no Greek letter
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} um"
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    pixels, margin, thick = round(length / mpp), 12, 5
    bottom = picture.shape[0] - margin
    draw.rectangle((margin, bottom - thick, margin + pixels - 1, bottom), "black", "black")
    draw.text(
        (margin + pixels / 2, bottom - thick - 4),
        text,
        "black",
        ImageFont.load_default(16),
        anchor="mb",
        stroke_width=2,
        stroke_fill="white",
    )
    return np.asarray(image)

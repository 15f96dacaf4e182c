"""Layers over a slide: tissue, patch table, grids, maps, heat, annotations and truth."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nic_core.grids import open_grid
from nic_core.grids.preview import colour_cells, read_colours
from nic_core.maps.heatmaps import outlines
from nic_core.steps.slides import TISSUE, read_record
from nic_core.store import GridKey
from nic_core.tiling.tissue import TissueMask
from nic_core.view.errors import ViewError
from nic_core.view.study import ViewedStudy

Box = tuple[float, float, float, float]
Group = Literal["tissue", "patches", "grid", "maps", "heat", "annotations", "labels"]


@dataclass(frozen=True)
class Layer:
    """A layer of a slide.

    Attributes
    ----------
    id : str
        Part of its URL and of permalinks.
    title : str
    group : str
    kind : {"image", "polygons"}
        A PNG, or GeoJSON in level-0 px.
    legend : dict
        The colour key.
    draw : callable
        Return the content, encoded.
    box : (x0, y0, x1, y1) or None
        Place of an image, level-0 px.
    opacity : float
        At which it is first shown, 0 to 1.
    """

    id: str
    title: str
    group: Group
    kind: Literal["image", "polygons"]
    legend: dict[str, Any]
    draw: Callable[[], bytes]
    box: Box | None = None
    opacity: float = 0.6

    def as_json(self, slide: str) -> dict[str, Any]:
        """Return the layer as the pages get it, with the URL of its content."""
        return {
            "id": self.id,
            "title": self.title,
            "group": self.group,
            "kind": self.kind,
            "url": f"/api/slides/{slide}/layers/{self.id}",
            "box": self.box,
            "pixelated": self.kind == "image",
            "opacity": self.opacity,
            "legend": self.legend,
        }


def layers_of(study: ViewedStudy, slide: str) -> list[Layer]:
    """Return the layers of a slide whose products exist.

    Raises
    ------
    ViewError
        404: the study has no such slide.
    """
    study.row(slide)
    return [*_tissue(study, slide), *_grids(study, slide)]


def find_layer(study: ViewedStudy, slide: str, name: str) -> Layer:
    """Return the layer of an id.

    Raises
    ------
    ViewError
        404: no such slide, or it has no such layer.
    """
    for layer in layers_of(study, slide):
        if layer.id == name:
            return layer
    raise ViewError(404, f"slide '{slide}' has no such layer", "choose one of the slide's page")


def _tissue(study: ViewedStudy, slide: str) -> list[Layer]:
    path = study.store.slide(slide) / TISSUE
    if not path.exists():
        return []
    record = read_record(study.store, slide)

    def draw() -> bytes:
        mask = TissueMask.load(path, record.tissue_mpp)
        polygons = outlines(mask.array, mask.mpp / record.mpp)
        return _geojson([{"label": "tissue", "polygons": polygons}])

    legend = {"kind": "classes", "colours": ["#008c3c"], "labels": ["outline of the tissue"]}
    return [Layer("tissue", "Tissue outline", "tissue", "polygons", legend, draw, opacity=1)]


def _grids(study: ViewedStudy, slide: str) -> list[Layer]:
    found = []
    for entry in study.cohort.encoders:
        path = study.store.grid(GridKey(encoder=entry.name, slide=slide))
        colours = study.store.embedding_colours(entry.name)
        if not path.exists() or not colours.exists():
            continue
        grid = open_grid(path)

        def draw(grid: Any = grid, colours: Any = colours) -> bytes:
            picture = colour_cells(grid, read_colours(colours))
            return png(np.dstack([picture, np.where(grid.valid, 255, 0).astype(np.uint8)]))

        legend = {
            "kind": "note",
            "meaning": "Red, green and blue are three principal components of the embeddings of "
            "the cohort: equal colours are similar embeddings, on every slide.",
        }
        rows, columns = grid.valid.shape
        x, y = grid.provenance.origin
        cell = grid.provenance.cell
        box = (x, y, x + columns * cell, y + rows * cell)
        found.append(
            Layer(
                f"grid.{entry.name}",
                f"Grid of {entry.name}",
                "grid",
                "image",
                legend,
                draw,
                box=box,
                opacity=0.8,
            )
        )
    return found


def png(picture: NDArray[np.uint8]) -> bytes:
    """Encode uint8 (H, W, 4) as PNG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _geojson(areas: list[dict[str, Any]]) -> bytes:
    """Encode areas, each with a label and polygons in level-0 px, as GeoJSON."""
    features = [
        {
            "type": "Feature",
            "properties": {"label": area["label"]},
            "geometry": {"type": "MultiPolygon", "coordinates": area["polygons"]},
        }
        for area in areas
    ]
    return json.dumps({"type": "FeatureCollection", "features": features}).encode()

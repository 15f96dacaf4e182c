"""Layers over a slide: tissue, patch table, grids, maps, heat, annotations and truth.

A layer is listed if its product exists. One that cannot be read is listed too, with the reason in
the place of its colour key.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
import shapely
from matplotlib.colors import to_hex
from PIL import Image

from nic_core.cohort import CohortError, PatchTask, ProbabilityMap
from nic_core.encoders.patch_sources import annotated_rows, row_regions
from nic_core.grids import open_grid
from nic_core.grids.preview import colour_cells, read_colours
from nic_core.maps.heatmaps import cell_area, colour_limits
from nic_core.models.explanation import heat_meaning
from nic_core.slides import Slide, SlideError
from nic_core.steps.slides import TISSUE, read_record
from nic_core.tiling.tissue import TissueMask
from nic_core.view.addresses import TISSUE_LAYER, grid_layer
from nic_core.view.errors import ViewError, without_paths
from nic_core.view.products import (
    DAMAGED,
    STATES,
    Cells,
    HeatSource,
    grid_cells,
    grid_file,
    heat_cells,
    heat_file,
    heat_sources,
    label_cells,
    map_cells,
    map_file,
    patch_cells,
    patch_table_file,
    truth_cells,
)
from nic_core.view.study import ViewedStudy

Group = Literal["tissue", "patches", "grid", "maps", "heat", "annotations", "labels"]
Picture = npt.NDArray[np.uint8]

STATE_COLOURS = ("#2f9e44", "#868e96", "#e03131")  # of STATES
TISSUE_COLOUR = "#008c3c"
TRUTH_COLOURS = {"negative": "#1c7ed6", "positive": "#e03131"}
_STOPS = 9  # colours of a ramp in its key
_FOCUS_RANGE = (2, 98)  # percentiles of focus that are drawn in pure colours [choice]
_OUTLINE_SIDE = 2048  # px: longest side of the mask that is outlined, of a larger one reduced
_SIMPLIFIED = 0.5  # px of this mask by which the outline may be off [choice]
_AREA_COLOURS = "tab10"
_LABEL_COLOURS = "tab20"


@dataclass(frozen=True)
class Described:
    """How a layer is shown.

    Attributes
    ----------
    legend : dict
        The colour key: ``kind`` (``ramp``, ``classes`` or ``note``), ``meaning`` and, depending on
        the kind, ``colours``, ``labels``, ``low``, ``high`` and ``unit``.
    box : (left, top, right, bottom) or None
        Place of an image, level-0 px.
    """

    legend: dict[str, Any]
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Layer:
    """A layer of a slide.

    Attributes
    ----------
    id : str
        Part of its URL and of permalinks.
    kind : {"image", "polygons"}
        A PNG with a px for each cell, or GeoJSON in level-0 px.
    file : Path
        File that is replaced whenever the content changes.
    describe, draw : callable
        Return how it is shown, and its content as PNG or GeoJSON; they raise :data:`DAMAGED`.
    opacity : float
        At which it is first shown, 0 to 1.
    """

    id: str
    title: str
    group: Group
    kind: Literal["image", "polygons"]
    file: Path
    describe: Callable[[], Described]
    draw: Callable[[], bytes]
    opacity: float = 0.6


def layers_of(study: ViewedStudy, slide: str, opened: Slide) -> list[Layer]:
    """Return the layers of a slide whose products exist.

    Parameters
    ----------
    opened : Slide
        The slide of this id.
    """
    layers = [
        *_tissue(study, slide),
        *_patch_tables(study, slide),
        *_grids(study, slide),
        *_maps(study, slide),
        *_heat(study, slide),
        *_annotations(study, opened),
        *_truth(study, slide, opened),
    ]
    return [layer for layer in layers if layer.file.exists()]


def find_layer(study: ViewedStudy, slide: str, opened: Slide, name: str) -> Layer:
    """Return the layer of an id.

    Raises
    ------
    ViewError
        404: the slide has no such layer.
    """
    for layer in layers_of(study, slide, opened):
        if layer.id == name:
            return layer
    raise ViewError(404, f"slide '{slide}' has no such layer", "choose one of the slide's page")


def layer_json(slide: str, layer: Layer) -> dict[str, Any]:
    """Return a layer as the pages get it, with the URL of its content."""
    try:
        described = layer.describe()
    except DAMAGED as error:
        described = Described({"kind": "note", "meaning": f"Cannot be read: {problem(error)}"})
    return {
        "id": layer.id,
        "title": layer.title,
        "group": layer.group,
        "kind": layer.kind,
        "url": f"/api/slides/{slide}/layers/{layer.id}",
        "box": described.box,
        "pixelated": layer.kind == "image",
        "opacity": layer.opacity,
        "legend": described.legend,
    }


def draw_layer(layer: Layer) -> bytes:
    """Return the content of a layer.

    Raises
    ------
    ViewError
        422: its product is damaged.
    """
    try:
        return layer.draw()
    except DAMAGED as error:
        raise ViewError(
            422, f"{layer.title}: {problem(error)}", "materialize its asset again"
        ) from error


def problem(error: Exception) -> str:
    """Return what an exception says, in one line and without paths."""
    if isinstance(error, SlideError):
        return without_paths(f"{error.reason}; {error.remedy}", [error.slide])
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return without_paths(" ".join(str(error).split()))


# --- the layers ------------------------------------------------------------------------------


def _tissue(study: ViewedStudy, slide: str) -> Iterator[Layer]:
    path = study.store.slide(slide) / TISSUE

    def draw() -> bytes:
        record = read_record(study.store, slide)
        mask = TissueMask.load(path, record.tissue_mpp).array
        step = math.ceil(max(mask.shape) / _OUTLINE_SIDE)
        reduced = _halves(mask, step) if step > 1 else mask
        px = record.tissue_mpp / record.mpp * step
        polygons = [
            shapely.Polygon(*_simplified([part.exterior, *part.interiors], px * _SIMPLIFIED))
            for part in cell_area(reduced, px).geoms
        ]
        return _geojson([("tissue", TISSUE_COLOUR, shapely.MultiPolygon(polygons))])

    legend = _classes(["tissue"], [TISSUE_COLOUR], "Outline of the tissue mask.")
    yield Layer(
        TISSUE_LAYER,
        "Tissue outline",
        "tissue",
        "polygons",
        path,
        lambda: Described(legend),
        draw,
        1.0,
    )


def _halves(mask: npt.NDArray[np.bool_], step: int) -> npt.NDArray[np.bool_]:
    """Reduce a mask: True where more than half of a block of ``step`` px a side is True."""
    height, width = (-(-length // step) * step for length in mask.shape)
    padded = np.pad(mask, ((0, height - mask.shape[0]), (0, width - mask.shape[1])))
    blocks = padded.reshape(height // step, step, width // step, step)
    return np.asarray(blocks.mean(axis=(1, 3)) > 0.5)


def _simplified(
    rings: Sequence[shapely.LinearRing], tolerance: float
) -> tuple[shapely.LinearRing, list[shapely.LinearRing]]:
    """Simplify the outer ring and the holes of a polygon each by itself, which is fast."""
    outer, *holes = shapely.simplify(rings, tolerance)
    return outer, holes


def _patch_tables(study: ViewedStudy, slide: str) -> Iterator[Layer]:
    for geometry in study.cohort.geometries:
        path = patch_table_file(study, slide, geometry)
        read = partial(patch_cells, study, slide, geometry)

        def states(read: Any = read) -> Described:
            found = read()
            counts = [int((found.state.values == number).sum()) for number in range(len(STATES))]
            labels = [f"{state} ({count:,})" for state, count in zip(STATES, counts, strict=True)]
            meaning = (
                "Kept cells are compressed. Background has too little tissue, unreadable cells "
                "cannot be decoded."
            )
            return Described(_classes(labels, STATE_COLOURS, meaning), found.state.box)

        def draw_states(read: Any = read) -> bytes:
            values = read().state.values
            return png(_palette(values, STATE_COLOURS))

        def focus(read: Any = read) -> Described:
            found = read()
            low, high = _focus_range(found.focus)
            meaning = (
                "Bright cells are sharp, dark ones blurred; cells that are not kept are clear."
            )
            return Described(
                _ramp("viridis", low, high, "grey levels squared", meaning), found.state.box
            )

        def draw_focus(read: Any = read) -> bytes:
            values = read().focus
            return png(_colours(values, "viridis", *_focus_range(values)))

        yield Layer(
            f"patches.{geometry}",
            f"Patch table {geometry}",
            "patches",
            "image",
            path,
            states,
            draw_states,
            0.35,
        )
        yield Layer(
            f"focus.{geometry}", f"Focus {geometry}", "patches", "image", path, focus, draw_focus
        )


def _grids(study: ViewedStudy, slide: str) -> Iterator[Layer]:
    meaning = (
        "Red, green and blue are three principal components of the embeddings of the cohort: equal "
        "colours mean similar embeddings, on every slide."
    )
    for entry in study.cohort.encoders:
        file = grid_file(study, slide, entry.name)
        colours = study.store.embedding_colours(entry.name)
        if not colours.exists():
            continue

        def describe(encoder: str = entry.name) -> Described:
            box = grid_cells(study, slide, encoder).box
            return Described({"kind": "note", "meaning": meaning}, box)

        def draw(path: Path = file.parent, colours: Path = colours) -> bytes:
            grid = open_grid(path)
            picture = colour_cells(grid, read_colours(colours))
            return png(np.dstack([picture, np.where(grid.valid, 255, 0).astype(np.uint8)]))

        yield Layer(
            grid_layer(entry.name),
            f"Grid of {entry.name}",
            "grid",
            "image",
            file,
            describe,
            draw,
            0.8,
        )


def _maps(study: ViewedStudy, slide: str) -> Iterator[Layer]:
    for item in study.cohort.maps:
        read = partial(map_cells, study, slide, item)

        def describe(item: ProbabilityMap = item, read: Any = read) -> Described:
            meaning = f"Red: the head of {item.encoder} says {item.label}; blue: another class."
            return Described(_ramp("coolwarm", 0, 1, "probability", meaning), read().box)

        def draw(read: Any = read) -> bytes:
            return png(_colours(read().values, "coolwarm", 0, 1))

        yield Layer(
            f"map.{item.name}",
            f"Probability of {item.label} ({item.name})",
            "maps",
            "image",
            map_file(study, slide, item),
            describe,
            draw,
        )


def _heat(study: ViewedStudy, slide: str) -> Iterator[Layer]:
    for source in heat_sources(study, slide):
        yield Layer(
            source.layer,
            source.title,
            "heat",
            "image",
            heat_file(source.folder),
            partial(_describe_heat, study, source),
            partial(_draw_heat, study, source),
        )


def _describe_heat(study: ViewedStudy, source: HeatSource) -> Described:
    cells = heat_cells(study, source.folder)
    meaning = heat_meaning(source.target)
    return Described(_ramp("coolwarm", *colour_limits(cells.values), "heat", meaning), cells.box)


def _draw_heat(study: ViewedStudy, source: HeatSource) -> bytes:
    cells = heat_cells(study, source.folder)
    return png(_colours(cells.values, "coolwarm", *colour_limits(cells.values)))


def _annotations(study: ViewedStudy, opened: Slide) -> Iterator[Layer]:
    path = opened.path.resolve()
    for task in study.cohort.patch_tasks:
        if task.slides is None or not task.slides.table.exists():
            continue
        rows = study.files.get(task.slides.table, partial(annotated_rows, task), task.name)
        if path not in rows:
            continue
        row = rows[path]
        file = task.slides.table.parent / str(row["annotations"])
        read = partial(_read_areas, task, row, opened)
        yield Layer(
            f"annotations.{task.name}",
            f"Annotations of {task.name}",
            "annotations",
            "polygons",
            file,
            partial(_describe_areas, read),
            partial(_draw_areas, read),
            0.9,
        )


Area = tuple[str, str, shapely.Geometry]
"""Label, colour and shape, level-0 px."""


def _read_areas(task: PatchTask, row: dict[str, str | None], opened: Slide) -> list[Area]:
    try:
        regions = row_regions(task, row, opened)
    except ValueError as error:
        raise CohortError(str(error)) from error
    # the same colours on every slide, if the entry names the classes
    labels = dict.fromkeys((*(task.classes or ()), *sorted({r.label for r in regions})))
    colours = dict(zip(labels, _categories(_AREA_COLOURS, range(len(labels))), strict=True))
    return [(region.label, colours[region.label], region.shape) for region in regions]


def _describe_areas(read: Callable[[], list[Area]]) -> Described:
    colours = {label or "without a class": colour for label, colour, _ in read()}
    meaning = "Regions that a person drew."
    return Described(_classes(list(colours), list(colours.values()), meaning))


def _draw_areas(read: Callable[[], list[Area]]) -> bytes:
    return _geojson(read())


def _truth(study: ViewedStudy, slide: str, opened: Slide) -> Iterator[Layer]:
    image = study.row(slide)["truth"]
    if not image:
        return
    place = opened.width, opened.height, opened.mpp
    read = partial(label_cells, study, slide, *place)

    def describe() -> Described:
        cells = read()
        values = _label_values(cells)
        named: dict[float, str] = {
            value: f"{value:g}: {item.label}"
            for item in study.cohort.maps
            for value in item.positive
        }
        labels = [named.get(value, f"{value:g}") for value in values]
        meaning = "Values of the slide's label image; 0 is clear."
        return Described(_classes(labels, _categories(_LABEL_COLOURS, values), meaning), cells.box)

    def draw() -> bytes:
        cells = read()
        values = _label_values(cells)
        numbers = np.where(cells.values == 0, -1, np.searchsorted(values, cells.values))
        return png(_palette(numbers, _categories(_LABEL_COLOURS, values)))

    yield Layer("labels", "Label image", "labels", "image", Path(image), describe, draw)
    for item in study.cohort.maps:
        if not grid_file(study, slide, item.encoder).exists():
            continue
        yield _truth_layer(study, slide, item, Path(image))


def _label_values(cells: Cells) -> list[float]:
    """Return the values of a label image that are drawn, in order."""
    return [value for value in np.unique(cells.values).tolist() if value != 0]


def _truth_layer(study: ViewedStudy, slide: str, item: ProbabilityMap, image: Path) -> Layer:
    read = partial(truth_cells, study, slide, item)
    meaning = f"Cells that the label image calls {item.label}; unknown cells are clear."

    def describe() -> Described:
        legend = _classes(list(TRUTH_COLOURS), list(TRUTH_COLOURS.values()), meaning)
        return Described(legend, read().box)

    def draw() -> bytes:
        return png(_palette(read().values, list(TRUTH_COLOURS.values())))

    return Layer(
        f"truth.{item.name}",
        f"Truth of {item.name}, by cell",
        "labels",
        "image",
        image,
        describe,
        draw,
    )


# --- colours ---------------------------------------------------------------------------------


def png(picture: Picture) -> bytes:
    """Encode uint8 (H, W, 4) as PNG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _colours(values: npt.NDArray[np.floating], name: str, low: float, high: float) -> Picture:
    """Colour values from ``low`` to ``high``, uint8 (H, W, 4); NaN is clear."""
    shown = np.clip((np.nan_to_num(values) - low) / ((high - low) or 1), 0, 1)
    picture: Picture = (matplotlib.colormaps[name](shown) * 255).round().astype(np.uint8)
    picture[np.isnan(values)] = 0
    return picture


def _palette(values: npt.NDArray[np.integer], colours: Sequence[str]) -> Picture:
    """Colour numbers by a list of colours, uint8 (H, W, 4); negative numbers are clear."""
    table = np.zeros((len(colours) + 1, 4), np.uint8)
    for number, colour in enumerate(colours):
        table[number] = (*bytes.fromhex(colour[1:]), 255)
    return table[np.where(values < 0, len(colours), values)]


def _categories(name: str, numbers: Iterable[float]) -> list[str]:
    """Return the colour of each number in a categorical map, which repeats."""
    colours = [to_hex(colour) for colour in matplotlib.colormaps[name].colors]  # type: ignore[attr-defined]
    return [colours[int(number) % len(colours)] for number in numbers]


def _classes(labels: Sequence[str], colours: Sequence[str], meaning: str) -> dict[str, Any]:
    return {
        "kind": "classes",
        "labels": list(labels),
        "colours": list(colours),
        "meaning": meaning,
    }


def _ramp(name: str, low: float, high: float, unit: str, meaning: str) -> dict[str, Any]:
    stops = matplotlib.colormaps[name](np.linspace(0, 1, _STOPS))
    return {
        "kind": "ramp",
        "colours": [to_hex(stop) for stop in stops],
        "low": low,
        "high": high,
        "unit": unit,
        "meaning": meaning,
    }


def _focus_range(focus: npt.NDArray[np.float32]) -> tuple[float, float]:
    known = focus[np.isfinite(focus)]
    if not known.size:
        return 0.0, 1.0
    low, high = np.percentile(known, _FOCUS_RANGE)
    return float(low), float(high)


def _geojson(areas: Sequence[tuple[str, str, shapely.Geometry]]) -> bytes:
    """Encode areas (label, colour, shape in level-0 px) as GeoJSON, rounded to 0.1 px."""
    features = [
        {
            "type": "Feature",
            "properties": {"label": label, "colour": colour},
            "geometry": json.loads(shapely.to_geojson(shapely.set_precision(shape, 0.1))),
        }
        for label, colour, shape in areas
    ]
    return json.dumps({"type": "FeatureCollection", "features": features}).encode()

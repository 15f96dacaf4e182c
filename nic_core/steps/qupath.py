"""Export what the store has of a slide as objects for QuPath.

Not the step of an asset: the files are written where the user asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from nic_core.cohort import Cohort, CohortError, Geometry, ProbabilityMap, Target
from nic_core.grids import (
    Grid,
    GridError,
    GridProvenance,
    embedding_components,
    open_grid,
    read_colours,
)
from nic_core.libvips import pyvips
from nic_core.maps.heatmaps import check_slide_of_grid, heatmap_provenance, read_heatmap
from nic_core.maps.qupath import (
    CellClass,
    Feature,
    cell_objects,
    class_area,
    heat_classes,
    map_class,
    tissue_area,
    write_objects,
)
from nic_core.steps.predictions import HEATMAP, PREDICTION
from nic_core.steps.probability_maps import CELLS, probabilities
from nic_core.steps.slide_index import index_row, open_indexed
from nic_core.steps.slides import TISSUE, read_record
from nic_core.store import GridKey, MapKey, ModelKey, PatchTableKey, PredictionKey, Store
from nic_core.tiling.patches import read_patch_table
from nic_core.tiling.tissue import TissueMask
from nic_core.types import ExportedCells, Origin

MOST_CELLS = 200_000
"""Largest number of cell objects in a file [choice]: QuPath holds the whole file in memory."""

Values = npt.NDArray[np.floating]


@dataclass(frozen=True)
class QupathFile:
    """A file that :func:`export_qupath` wrote.

    Attributes
    ----------
    path : Path
    cells, annotations : int
        Number of cell objects and of annotations.
    measurements : tuple of str
        Names of the measurements of cells.
    classified_by : str or None
        Target or map whose classes the cells have; None: they have no class.
    missing : tuple of str
        Products that the store does not have, so that the file lacks their values.
    """

    path: Path
    cells: int
    annotations: int
    measurements: tuple[str, ...]
    classified_by: str | None
    missing: tuple[str, ...]


def encoders_with_grid(cohort: Cohort, store: Store, slide: str) -> list[str]:
    """Return the encoders of the cohort that have a grid of a slide.

    Raises
    ------
    CohortError
        The slide is not in the slide index, or has no grid.
    """
    index_row(store, slide)
    names = [entry.name for entry in cohort.encoders]
    found = [e for e in names if store.grid(GridKey(encoder=e, slide=slide)).exists()]
    if not found:
        raise CohortError(f"slide '{slide}' has no grid; materialize 'grid' first")
    return found


def export_qupath(
    cohort: Cohort,
    store: Store,
    slide: str,
    encoder: str,
    folder: Path,
    *,
    classify_by: str | None = None,
    cells: ExportedCells = "all",
    origin: Origin = "bounds",
    zipped: bool = False,
) -> QupathFile:
    """Write the cells of a slide's grid with measurements, and areas, as GeoJSON for QuPath.

    The heat of a target is that of the explanation or, for a slide without one, that of the
    prediction, if the encoder is that of the model that predicts.

    Parameters
    ----------
    folder
        Receives ``<slide>.<encoder>.geojson``, or ``.geojson.zip``.
    classify_by
        Target or probability map whose classes the cells have; a target if both have the name.
        Default: the first target of the cohort with heat, else the first map.
    cells
        ``all`` cells with an embedding, those with a class, or none: annotations only.
    origin
        Whether coordinates count from the corner of the scanned area, as QuPath's do with
        OpenSlide, or from the corner of level 0.

    Raises
    ------
    CohortError
        The slide, the target or the map is not in the cohort, a product is of another grid, or
        there are more than :data:`MOST_CELLS` cells.
    GridError, PatchTableError, ModelFileError
        A product is missing or cannot be read.
    SlideError
        The slide file cannot be opened.
    StoreError
        The file cannot be written.
    """
    grid = open_grid(store.grid(GridKey(encoder=encoder, slide=slide)))
    about = grid.provenance
    measurements, missing = _quality(store, grid)
    of_targets: dict[str, list[CellClass]] = {}
    for target in cohort.targets:
        heat = _heat(store, grid, target)
        if heat is None:
            missing.append(f"heat of target '{target.name}'")
            continue
        measurements[f"{target.name}: heat"] = heat
        of_targets[target.name] = heat_classes(heat, target)
    of_maps: dict[str, list[CellClass]] = {}
    for entry in (entry for entry in cohort.maps if entry.encoder == encoder):
        probability = _probability(store, grid, entry)
        if probability is None:
            missing.append(f"map '{entry.name}'")
            continue
        measurements[f"{entry.name}: probability of {entry.label}"] = probability
        of_maps[entry.name] = [map_class(entry.name, entry.label, probability)]
    colours = store.embedding_colours(encoder)
    if colours.exists():
        components = embedding_components(grid, read_colours(colours))
        used = min(3, grid.shape[0])
        measurements |= {f"component {k + 1}": components[..., k] for k in range(used)}
    else:
        missing.append("embedding colours")
    by, classes = _classes(cohort, of_maps | of_targets, classify_by, about)
    chosen = _chosen(grid, classes, cells)
    _check_number(slide, int(chosen.sum()))
    with open_indexed(store, slide) as opened:
        check_slide_of_grid(opened, about)
        corner = opened.bounds[:2] if origin == "bounds" else (0, 0)
    # of each target and map the class of the highest values
    highest = [found[0] for found in (*of_targets.values(), *of_maps.values())]
    areas = [_tissue(store, about, corner)]
    if not (store.slide(slide) / TISSUE).exists():
        missing.append("tissue outline")
    areas += [class_area(about, of_class, corner=corner) for of_class in highest]
    annotations = [area for area in areas if area is not None]

    def features() -> Iterator[Feature]:
        yield from annotations
        yield from cell_objects(about, chosen, measurements, classes, corner=corner)

    path = folder / f"{slide}.{encoder}.geojson{'.zip' if zipped else ''}"
    written = write_objects(path, features(), origin=origin, zipped=zipped)
    return QupathFile(
        path=path,
        cells=written - len(annotations),
        annotations=len(annotations),
        measurements=tuple(measurements),
        classified_by=by,
        missing=tuple(missing),
    )


def _quality(store: Store, grid: Grid) -> tuple[dict[str, Values], list[str]]:
    """Tissue fraction and focus of the cells; no patch table exists for grids of other software."""
    about = grid.provenance
    geometry = Geometry(about.patch, about.mpp, about.stride).name
    path = store.patch_table(PatchTableKey(geometry=geometry, slide=about.slide))
    if about.precision is None or not path.exists():
        return {}, ["patch table"]
    table = read_patch_table(path)
    if table.height != grid.valid.size or table["row"].max() != grid.valid.shape[0] - 1:
        raise _of_another_grid(path, grid, "patch_table' and 'grid")
    found = {"tissue fraction": "tissue", "focus": "focus"}
    return {
        name: table[column].cast(pl.Float64).to_numpy().reshape(grid.valid.shape)
        for name, column in found.items()
    }, []


def _heat(store: Store, grid: Grid, target: Target) -> npt.NDArray[np.float32] | None:
    """The heat of a target in the cells of a grid; None: there is none."""
    about = grid.provenance
    key = ModelKey(encoder=about.encoder, target=target.name)
    folder, asset = store.explanation(key) / about.slide, "explanation"
    if not folder.exists():
        prediction = store.prediction(PredictionKey(champion=target.name, slide=about.slide))
        if not (prediction / HEATMAP).exists() or _predicting_encoder(prediction) != about.encoder:
            return None
        folder, asset = prediction / HEATMAP, "prediction"
    heat, seen = read_heatmap(folder), heatmap_provenance(folder)
    if heat.shape != grid.valid.shape or _place(seen) != _place(about):
        raise _of_another_grid(folder, grid, asset)
    return heat


def _predicting_encoder(prediction: Path) -> str:
    found: str = pl.read_parquet(prediction / PREDICTION, glob=False)["encoder"].item()
    return found


def _place(about: GridProvenance) -> tuple[object, ...]:
    """What two grids have in common whose cells and embeddings are the same."""
    return (
        about.slide_identity,
        about.weights_hash,
        about.cell,
        about.patch,
        about.origin,
    )


def _probability(store: Store, grid: Grid, entry: ProbabilityMap) -> npt.NDArray[np.float32] | None:
    path = store.probability_map(MapKey(map=entry.name, slide=grid.provenance.slide)) / CELLS
    if not path.exists():
        return None
    cells = pl.read_parquet(path, glob=False)
    rows, columns = cells["row"].to_numpy(), cells["column"].to_numpy()
    if not np.array_equal(np.argwhere(grid.valid), np.stack([rows, columns], axis=1)):
        raise _of_another_grid(path, grid, "probability_map")
    return probabilities(cells, grid)


def _of_another_grid(path: Path, grid: Grid, asset: str) -> GridError:
    about = grid.provenance
    return GridError(
        f"{path}: of another grid than the present one of slide '{about.slide}' by encoder "
        f"'{about.encoder}'; materialize '{asset}' again"
    )


def _classes(
    cohort: Cohort,
    found: dict[str, list[CellClass]],
    asked: str | None,
    about: GridProvenance,
) -> tuple[str | None, list[CellClass]]:
    """The target or map that classifies the cells, and its classes."""
    known = [entry.name for entry in (*cohort.targets, *cohort.maps)]
    if asked is None:
        first = next((name for name in known if name in found), None)
        return first, found.get(first or "", [])
    if asked not in known:
        raise CohortError(
            f"'{asked}' is neither a target nor a map of the cohort; it has: "
            f"{', '.join(known) or 'none'}"
        )
    if asked not in found:
        raise CohortError(
            f"slide '{about.slide}' has no heat and no map '{asked}' by encoder "
            f"'{about.encoder}'; materialize 'explanation', 'prediction' or 'probability_map', or "
            "give another encoder"
        )
    return asked, found[asked]


def _chosen(grid: Grid, classes: list[CellClass], cells: ExportedCells) -> npt.NDArray[np.bool_]:
    if cells == "all":
        return grid.valid
    chosen = np.zeros(grid.valid.shape, bool)
    if cells == "classified":
        for of_class in classes:
            chosen |= of_class.cells
    return chosen & grid.valid


def _check_number(slide: str, cells: int) -> None:
    if cells > MOST_CELLS:
        raise CohortError(
            f"slide '{slide}': {cells:,} cells are too many for QuPath, which holds a GeoJSON file "
            f"in memory (at most {MOST_CELLS:,}); export those with a class (--cells classified) "
            "or none (--cells none)"
        )


def _tissue(store: Store, about: GridProvenance, corner: tuple[float, float]) -> Feature | None:
    """The tissue outline; None for a slide without tissue, or without a mask (features)."""
    path = store.slide(about.slide) / TISSUE
    if not path.exists():
        return None
    try:
        mask = TissueMask.load(path, read_record(store, about.slide).tissue_mpp)
    except pyvips.Error as error:
        raise CohortError(
            f"{path}: cannot be read ({error}); materialize 'slide' of '{about.slide}' again"
        ) from error
    return tissue_area(about, mask, corner=corner)

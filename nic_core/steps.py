"""The steps of a study, each from the store to the store.

A step reads what earlier steps left in the :class:`~nic_core.store.Store`, calls the module
that does the work and writes its product whole. An orchestrator calls them partition by
partition; a script can call them in the order in which they stand here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave
from pydantic import BaseModel, ConfigDict

from nic_core.cohort import (
    Cohort,
    CohortError,
    ProbabilityMap,
    ReadyEncoder,
    RegisteredEncoder,
)
from nic_core.compression import compress_slide
from nic_core.encoders import (
    EncoderError,
    PatchDataset,
    Trained,
    build_patch_task,
    import_encoder,
    load_encoder,
    load_patch_task,
    save_encoder,
    train_encoder,
)
from nic_core.encoders.files import read_card
from nic_core.encoders.inference import PreparedEncoder
from nic_core.encoders.patch_sources import source_files
from nic_core.encoders.pictures import code_map, neighbour_sheet
from nic_core.encoders.probes import probe_table, task_codes
from nic_core.grids import Grid, GridProvenance, grid_hash, open_grid, write_grid
from nic_core.heatmaps import OVERLAY as HEAT_OVERLAY
from nic_core.heatmaps import score_heat, write_heatmap
from nic_core.maps import overlay, probability_map, score_maps, truth_of_cells
from nic_core.models.explanation import blind_networks, explain
from nic_core.models.files import (
    GridSettings,
    ModelCard,
    load_model,
    metrics_frame,
    save_model,
    training_cohort,
)
from nic_core.models.folds import make_folds
from nic_core.models.labels import target_table
from nic_core.models.validation import (
    NETWORK,
    Evaluated,
    cross_validate,
    prediction_columns,
)
from nic_core.patches import patch_table, read_patch_table, write_patch_table
from nic_core.pictures import compressed_slide
from nic_core.quality import measure_quality
from nic_core.reports import (
    COMPARISON_SCHEMA,
    Report,
    compare_models,
    encoder_results,
    map_results,
    model_results,
    probe_results,
    results_figure,
)
from nic_core.slides import Level, Slide, content_identity, open_slide
from nic_core.slides.index import absent_files, slide_index
from nic_core.slides.watch import SEEN_SCHEMA, take_in
from nic_core.store import Store, whole_file, whole_folder
from nic_core.tissue import TissueMask, read_mask, tissue_mask, tissue_outline
from nic_core.tracker import Tracker

INDEX, SEEN = "index.parquet", "seen.parquet"
RECORD, THUMBNAIL, TISSUE = "slide.json", "thumbnail.jpg", "tissue.png"
PREDICTIONS, METRICS, RESULTS = "predictions.parquet", "metrics.parquet", "results.parquet"
COMPARISONS = "comparisons.parquet"
HISTORY = "history.parquet"
UNTRACKED = "untracked"  # in a model's folder: its recipe, until its tracker has taken it
SCORES = "scores.parquet"
PICTURED = 4  # slides of highest predictions whose heat is drawn, and of lowest
EXPLANATION_SCHEMA = pl.Schema(
    {
        "slide": pl.String(),
        "split": pl.String(),
        "map": pl.String(),
        "auc": pl.Float64(),
        "hit": pl.Boolean(),
    }
)
CELLS, OVERLAY = "cells.parquet", "overlay.jpg"
THUMBNAIL_SIDE = 1024  # px

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Found:
    """What :func:`find_slides` found.

    Attributes
    ----------
    index
        The slides that are there; see :func:`nic_core.slides.index.slide_index`.
    versions
        Of each: its file's content, and what the slide table says of it.
    absent
        Slides of which a file is not there or cannot be read, with the reason.
    gone
        Slides that were in the index before, and are no more.
    seen
        What was seen of each file (:data:`nic_core.slides.watch.SEEN_SCHEMA`).
    """

    index: pl.DataFrame
    versions: dict[str, str]
    absent: dict[str, str]
    gone: list[str]
    seen: pl.DataFrame


@dataclass(frozen=True)
class Explained:
    """What :func:`explain_model` made.

    Attributes
    ----------
    scores
        A row a slide and map whose truth tells its cells apart: ``slide``, ``split``, ``map``,
        ``auc`` of the heat over cells, ``hit`` of the pointing game.
    overlays
        Those of the highest and the lowest prediction by what they are, uint8 (H, W, 3).
    versions
        Of each slide's heat.
    """

    scores: pl.DataFrame
    overlays: dict[str, Pixels]
    versions: dict[str, str]


class SlideRecord(BaseModel):
    """What is known of an opened slide; ``slide.json`` in the slide's folder."""

    model_config = ConfigDict(frozen=True)

    slide: str
    identity: str  # of the file's content
    engine: str  # library that reads it
    width: int  # level-0 px
    height: int
    mpp: float  # um/px at level 0
    levels: tuple[Level, ...]  # finest first
    tissue_mpp: float  # um/px of tissue.png
    tissue_mm2: float


# --- what the user provides ------------------------------------------------------------------


def write_index(store: Store, index: pl.DataFrame) -> None:
    """Leave the slide index (:func:`nic_core.slides.index.slide_index`) in the store."""
    with whole_file(store.slides / INDEX) as path:
        index.write_parquet(path)


def read_index(store: Store) -> pl.DataFrame:
    """The slide index that :func:`write_index` left.

    Raises
    ------
    CohortError
        There is none yet.
    """
    path = store.slides / INDEX
    if not path.exists():
        raise CohortError(f"{path} is missing; materialize 'slide_index' first")
    return pl.read_parquet(path)


def find_slides(
    cohort: Cohort,
    store: Store,
    *,
    leave: Collection[str] = (),
    reread: bool = True,
    accept_loss: bool = False,
) -> Found:
    """Find the cohort's slides and what changed since :func:`write_found` was last called.

    Parameters
    ----------
    leave : collection of str
        Paths that are still being written: a new slide waits, a known one stays as it was.
    reread : bool
        Read every file's identity anew; else only where its size or time has changed.
    accept_loss : bool
        More than half of the known slides may be gone.

    Raises
    ------
    CohortError
        See :func:`nic_core.slides.index.slide_index`; or most slides are gone at once.
    """
    before = pl.read_parquet(path) if (path := store.slides / INDEX).exists() else None
    index = slide_index(cohort, absent=True)
    seen = read_seen(store)
    tables = [str(table) for table in (cohort.slides.table, cohort.labels) if table is not None]
    files = [path for column in ("path", "mask") for path in index[column].drop_nulls()]
    paths = {**dict.fromkeys(files, True), **dict.fromkeys(tables, False)}
    now, unreadable = take_in(
        {path: content for path, content in paths.items() if path not in leave},
        seen.clear() if reread else seen,
    )
    # of what is still being written, the state that was last taken in stands
    now = pl.concat([now, seen.filter(pl.col("path").is_in(list(leave)))])
    identity = dict(now.select("path", "identity").iter_rows())
    absent = absent_files(index) | {
        slide: unreadable[path]
        for slide, *own in index.select("slide", "path", "mask").iter_rows()
        for path in own
        if path in unreadable
    }
    index = index.filter(
        ~pl.col("slide").is_in(list(absent)),
        pl.col("path").is_in(list(identity)),
        pl.col("mask").is_null() | pl.col("mask").is_in(list(identity)),
    )
    gone = [] if before is None else sorted(set(before["slide"]) - set(index["slide"]))
    if before is not None and len(gone) > max(1, before.height / 2) and not accept_loss:
        raise CohortError(
            f"{len(gone)} of {before.height} slides are gone at once, {gone[0]} among them: is "
            "their folder mounted? If they were taken away, materialize 'slide_index' with the "
            "configuration 'accept_loss: true'"
        )
    if index.is_empty():
        raise CohortError(f"cohort '{cohort.name}': none of its slides can be read yet")
    versions = {
        slide: digest(identity[path], mpp, identity[mask] if mask else None)
        for slide, path, mpp, mask in index.select("slide", "path", "mpp", "mask").iter_rows()
    }
    return Found(index, versions, absent, gone, now)


def write_found(store: Store, found: Found) -> None:
    """Leave the slide index in the store, and what was seen of each file."""
    write_index(store, found.index)
    with whole_file(store.slides / SEEN) as path:
        found.seen.write_parquet(path)


def read_seen(store: Store) -> pl.DataFrame:
    """What :func:`write_found` left of each file; empty where nobody has looked yet."""
    path = store.slides / SEEN
    return pl.read_parquet(path) if path.exists() else pl.DataFrame(schema=SEEN_SCHEMA)


def patch_task_versions(cohort: Cohort) -> dict[str, str]:
    """A version for every patch task: its entry, its files, and the listing of its folder."""
    return {
        task.name: digest(
            task,
            [content_identity(path) for path in source_files(task)],
            _listing(task.folder) if task.folder is not None else None,
        )
        for task in cohort.patch_tasks
    }


def encoder_versions(cohort: Cohort) -> dict[str, str]:
    """A version for every encoder: its entry in the cohort file, and the file that it names.

    Not of those of a registry: what it holds is not known here.
    """
    return {
        encoder.name: digest(encoder, _listing(encoder.file))
        if isinstance(encoder, ReadyEncoder)
        else digest(encoder)
        for encoder in cohort.encoders
        if not isinstance(encoder, RegisteredEncoder)
    }


def target_versions(cohort: Cohort, index: pl.DataFrame) -> dict[str, str]:
    """A version for every target: its entry, and the labels and splits that it reads."""
    return {
        target.name: digest(target, target_table(cohort, target, index).rows())
        for target in cohort.targets
    }


# --- slides and patch tables -----------------------------------------------------------------


def prepare_slide(store: Store, slide: str) -> tuple[SlideRecord, Pixels]:
    """Open a slide, find its tissue, draw a thumbnail.

    Returns the record, and the thumbnail with the tissue outlined, uint8 (H, W, 3).
    """
    with _open(store, slide) as opened:
        ready = _index_row(store, slide)["mask"]
        mask = read_mask(Path(ready), opened) if ready else tissue_mask(opened)
        record = SlideRecord(
            slide=slide,
            identity=content_identity(opened.path),
            engine=opened.engine,
            width=opened.width,
            height=opened.height,
            mpp=opened.mpp,
            levels=opened.levels,
            tissue_mpp=mask.mpp,
            tissue_mm2=float(mask.array.sum()) * (mask.mpp / 1000) ** 2,
        )
        with whole_folder(store.slide(slide)) as folder:
            (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n")
            imsave(folder / THUMBNAIL, opened.thumbnail(THUMBNAIL_SIDE))
            mask.save(folder / TISSUE)
        return record, tissue_outline(opened, mask, side=320)


def read_record(store: Store, slide: str) -> SlideRecord:
    """The record that :func:`prepare_slide` wrote."""
    return SlideRecord.model_validate_json((store.slide(slide) / RECORD).read_bytes())


def tabulate_patches(cohort: Cohort, store: Store, slide: str) -> pl.DataFrame:
    """Lay the cohort's grid over a slide and measure its cells; writes and returns the patch
    table."""
    settings = cohort.settings
    mask = TissueMask.load(store.slide(slide) / TISSUE, read_record(store, slide).tissue_mpp)
    with _open(store, slide) as opened:
        cells = patch_table(
            slide,
            opened,
            mask,
            patch=settings.patch,
            mpp=settings.mpp,
            tissue=settings.tissue,
        )
        cells = measure_quality(cells, opened)
    write_patch_table(store.patch_table(slide), cells)
    return cells


# --- patch tasks and encoders ----------------------------------------------------------------


def make_patch_task(
    cohort: Cohort,
    store: Store,
    task: str,
    progress: Callable[[int, int], None] | None = None,
) -> PatchDataset:
    """Read a patch task's images; writes and returns the dataset, its patches on disk."""
    settings = cohort.settings
    with whole_folder(store.patch_task(task)) as folder:
        build_patch_task(
            cohort.patch_task(task),
            patch=settings.patch,
            mpp=settings.mpp,
            tissue=settings.tissue,
            seed=0,
            folder=folder,
            progress=progress,
        )
    return load_patch_task(store.patch_task(task))


def make_encoder(
    cohort: Cohort,
    store: Store,
    encoder: str,
    tracker: Tracker | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    device: str = "auto",
) -> Trained:
    """Train an encoder on its patch tasks, or import a ready one; writes and returns it.

    A training that was killed goes on from its last epoch. With a tracker its state stays until
    :func:`encoder_tracked`: called again, it tells the tracker all and trains nothing.

    Raises
    ------
    EncoderError
        The entry cannot be trained or imported, or names a version of a registry.
    """
    spec, settings = cohort.encoder(encoder), cohort.settings
    if isinstance(spec, RegisteredEncoder):
        raise EncoderError(
            f"encoder '{encoder}' is a version of a registry, which is not asked here; give the "
            "file of an imported one"
        )
    if isinstance(spec, ReadyEncoder):
        ready = import_encoder(spec, patch=settings.patch, mpp=settings.mpp)
        trained = Trained(ready, pl.DataFrame())
    else:
        trained = train_encoder(
            spec,
            [load_patch_task(store.patch_task(task)) for task in spec.tasks],
            patch=settings.patch,
            mpp=settings.mpp,
            code=settings.code,
            device=device,
            tracker=tracker,
            checkpoint=store.training(encoder),
            progress=progress,
        )
    with whole_folder(store.encoder(encoder)) as folder:
        save_encoder(folder, trained.encoder)
        trained.history.write_parquet(folder / HISTORY)
    if tracker is None:
        encoder_tracked(store, encoder)
    return trained


def encoder_tracked(store: Store, encoder: str) -> None:
    """Forget a training's state: its product is kept, and its tracker has taken everything."""
    store.training(encoder).unlink(missing_ok=True)


def probe_encoder(
    cohort: Cohort, store: Store, encoder: str
) -> tuple[pl.DataFrame, dict[str, Figure]]:
    """Probe an encoder on every patch task that could be made; writes and returns the scores.

    The scores are those of :data:`~nic_core.encoders.probes.PROBE_SCHEMA`; the figures show the
    codes' principal axes and nearest neighbours.
    """
    loaded = load_encoder(store.encoder(encoder))
    made = [path for task in cohort.patch_tasks if (path := store.patch_task(task.name)).exists()]
    codes = [task_codes(loaded, load_patch_task(path)) for path in made]
    scores = probe_table(loaded, codes)
    with whole_file(store.probe(encoder)) as path:
        scores.write_parquet(path)
    return scores, {"codes": code_map(codes), "nearest_patches": neighbour_sheet(codes)}


# --- grids -----------------------------------------------------------------------------------


def prepare_encoder(
    cohort: Cohort, store: Store, encoder: str, device: str = "auto"
) -> PreparedEncoder:
    """Load an encoder for compression as the cohort's settings say."""
    how = cohort.settings.compression
    return load_encoder(store.encoder(encoder)).prepare(device, how.precision, how.reading)


def compress(cohort: Cohort, store: Store, encoder: PreparedEncoder, slide: str) -> Grid:
    """Compress a slide with an encoder; writes and returns the grid."""
    cells = read_patch_table(store.patch_table(slide))
    with _open(store, slide) as opened:
        grid = compress_slide(
            opened,
            cells,
            encoder,
            slide_id=slide,
            slide_identity=content_identity(opened.path),
            orientations=cohort.settings.compression.orientations,
        )
    write_grid(store.grid(encoder.card.name, slide), grid)
    return grid


def gather_grids(store: Store, encoder: str) -> pl.DataFrame:
    """Every grid of an encoder: slide, content hash (null: no grid) and cells."""
    rows: list[tuple[str, str | None, int]] = []
    for slide in read_index(store)["slide"]:
        path = store.grid(encoder, slide)
        if path.exists():
            grid = open_grid(path)
            rows.append((slide, grid_hash(grid), int(grid.valid.sum())))
        else:
            rows.append((slide, None, 0))
    return pl.DataFrame(
        rows, schema={"slide": pl.String, "hash": pl.String, "cells": pl.Int64}, orient="row"
    )


# --- slide models ----------------------------------------------------------------------------


def divide(cohort: Cohort, store: Store, target: str) -> pl.DataFrame:
    """Deal a target's patients into folds; writes and returns the table of folds.

    The table is that of :func:`~nic_core.models.labels.target_table` with the column ``fold``
    (null in split ``test``); every encoder's model on this target uses it.
    """
    kind, settings = cohort.target(target), cohort.settings.models
    units = target_table(cohort, kind, read_index(store))
    folds = make_folds(units, target=kind, folds=settings.folds, seed=settings.seed)
    table = units.join(folds, on="patient", how="left").sort("unit")
    with whole_file(store.folds(target)) as path:
        table.write_parquet(path)
    return table


def make_model(
    cohort: Cohort,
    store: Store,
    encoder: str,
    target: str,
    tracker: Tracker | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    device: str = "auto",
) -> tuple[Evaluated, ModelCard]:
    """Cross-validate a target's networks on an encoder's grids; writes them and their figures.

    Slides whose grid could not be made are left out. With a tracker the product is marked until
    :func:`model_tracked`: called again before, on the same inputs, this reads it, tells the
    tracker all and trains nothing.

    Raises
    ------
    CohortError
        The grids were not all made in one way.
    """
    settings = cohort.settings
    made = gather_grids(store, encoder)
    table = _with_grids(pl.read_parquet(store.folds(target)), made)
    weights = read_card(store.encoder(encoder)).weights_hash
    recipe = digest(
        cohort.target(target), settings, table.rows(), made.rows(), weights, torch.__version__
    )
    if tracker is not None and _untracked_recipe(store.model(target, encoder)) == recipe:
        return _told_again(store.model(target, encoder), tracker)
    origins = {
        slide: open_grid(store.grid(encoder, slide)).provenance
        for slide in table["slides"].explode().unique()
    }
    grids = _grid_settings(cohort, encoder, origins)
    evaluated = cross_validate(
        cohort.target(target),
        table.drop("fold"),
        table.filter(pl.col("split") == "cv").select("patient", "fold").unique().sort("patient"),
        lambda slide: open_grid(store.grid(encoder, slide)),
        settings.models,
        device=device,
        tracker=tracker,
        progress=progress,
    )
    with whole_folder(store.model(target, encoder)) as folder:
        card = save_model(
            folder,
            evaluated,
            encoder=encoder,
            weights_hash=weights,
            patch=settings.patch,
            mpp=settings.mpp,
            grids=grids,
            training=training_cohort(
                cohort.name, table, {slide: o.slide_identity for slide, o in origins.items()}
            ),
        )
        evaluated.predictions.write_parquet(folder / PREDICTIONS)
        evaluated.history.write_parquet(folder / HISTORY)
        model_results(card).write_parquet(folder / METRICS)
        if tracker is not None:
            (folder / UNTRACKED).write_text(recipe)
    return evaluated, card


def model_tracked(store: Store, encoder: str, target: str) -> None:
    """Unmark a model: its tracker has taken everything."""
    (store.model(target, encoder) / UNTRACKED).unlink(missing_ok=True)


def explain_model(cohort: Cohort, store: Store, encoder: str, target: str) -> Explained:
    """Heatmaps of every slide that a model was tested on; writes them and their scores.

    Each patient is explained by the networks that have not seen them: that of the fold in which
    they were held out, or all for the split ``test``.

    The slides of the highest and lowest predictions (of classes: of the last one) get pictures.

    Raises
    ------
    CohortError
        No slide has a grid.
    """
    model = load_model(store.model(target, encoder))
    predictions = pl.read_parquet(store.model(target, encoder) / PREDICTIONS)
    units = (
        predictions.filter(model=NETWORK)
        .join(pl.read_parquet(store.folds(target)).select("unit", "slides"), on="unit")
        .sort(prediction_columns(model.card.target)[-1], descending=True)
    )
    units = _with_grids(units, gather_grids(store, encoder)).explode("slides")
    if units.is_empty():
        raise CohortError(f"no slide of target '{target}' has a grid; materialize 'grid' again")
    rows, versions = [], {}
    with whole_folder(store.explanations(target, encoder)) as folder:
        for place, (slide, fold, split) in enumerate(
            units.select("slides", "fold", "split").rows()
        ):
            grid = open_grid(store.grid(encoder, slide))
            networks = blind_networks(model.networks, fold)
            heat = explain(networks, grid, model.card.target, crop=model.card.settings.crop)
            versions[slide] = digest(heat.shape, heat.tobytes())
            with _open(store, slide) as opened:
                write_heatmap(
                    folder / slide,
                    heat,
                    grid.provenance,
                    opened,
                    name=target,
                    pictures=min(place, units.height - 1 - place) < PICTURED,
                )
            for item in cohort.maps:
                truth = _truth(cohort, store, item, slide, grid.valid.shape)
                if truth is not None and (scores := score_heat(heat, truth)) is not None:
                    rows.append((slide, split, item.name, *scores))
        scored = pl.DataFrame(rows, schema=EXPLANATION_SCHEMA, orient="row").sort("slide", "map")
        scored.write_parquet(folder / SCORES)
    overlays = {}
    for end, slide in (("highest", units["slides"][0]), ("lowest", units["slides"][-1])):
        drawn = imread(store.explanations(target, encoder) / slide / HEAT_OVERLAY)
        overlays[f"{end} prediction: {slide}"] = (255 * drawn[..., :3]).astype(np.uint8)
    return Explained(scored, overlays, versions)


# --- probability maps ------------------------------------------------------------------------


def map_slide(cohort: Cohort, store: Store, name: str, slide: str) -> tuple[pl.DataFrame, Pixels]:
    """Read a probability map off a grid; writes its cells and returns them with an overlay."""
    item = cohort.probability_map(name)
    encoder = load_encoder(store.encoder(item.encoder))
    grid = open_grid(store.grid(item.encoder, slide))
    record = read_record(store, slide)
    cell = cohort.settings.patch * cohort.settings.mpp / record.mpp
    truth = _truth(cohort, store, item, slide, grid.valid.shape)
    cells = probability_map(grid, encoder, item, truth)
    picture = overlay(
        imread(store.slide(slide) / THUMBNAIL),
        cells,
        width=record.width,
        height=record.height,
        cell=cell,
    )
    with whole_folder(store.map(name, slide)) as folder:
        cells.write_parquet(folder / CELLS)
        imsave(folder / OVERLAY, picture)
    return cells, picture


def score_map(cohort: Cohort, store: Store, name: str) -> pl.DataFrame:
    """Score a map on every slide with a truth image; writes and returns the scores.

    They are those of :func:`nic_core.maps.score_maps` with ``patient``, and ``seen``: whether the
    encoder trained on patches of that patient, so that the figure says little about others.
    """
    index = read_index(store)
    found = [store.map(name, slide) / CELLS for slide in index["slide"]]
    scores = score_maps(pl.concat([pl.read_parquet(path) for path in found if path.exists()]))
    patches = load_patch_task(store.patch_task(cohort.probability_map(name).task)).table
    trained_on = patches.filter(pl.col("split") != "test")["group"].unique()
    about = index.select("slide", "patient", seen=pl.col("patient").is_in(trained_on.implode()))
    scores = scores.join(about, on="slide", maintain_order="left")
    with whole_file(store.map_scores(name)) as path:
        scores.write_parquet(path)
    return scores


# --- report ----------------------------------------------------------------------------------


def write_report(cohort: Cohort, store: Store) -> Report:
    """Gather every figure of the study; writes ``results.parquet``, ``comparisons.parquet`` and
    ``results.png``."""
    settings = cohort.settings.models
    parts = [
        pl.read_parquet(path)
        for target in cohort.targets
        for encoder in cohort.encoders
        if (path := store.model(target.name, encoder.name) / METRICS).exists()
    ]
    for encoder in cohort.encoders:
        if store.encoder(encoder.name).exists():
            parts.append(encoder_results(read_card(store.encoder(encoder.name))))
        if store.probe(encoder.name).exists():
            parts.append(probe_results(encoder.name, pl.read_parquet(store.probe(encoder.name))))
    for item in cohort.maps:
        if store.map_scores(item.name).exists():
            scores = pl.read_parquet(store.map_scores(item.name))
            parts.append(map_results(item, scores, resamples=settings.bootstrap))
    results = pl.concat(parts)
    comparisons = pl.concat(
        [
            COMPARISON_SCHEMA.to_frame(),
            *(
                compare_models(
                    target,
                    {
                        encoder.name: pl.read_parquet(path)
                        for encoder in cohort.encoders
                        if (path := store.model(target.name, encoder.name) / PREDICTIONS).exists()
                    },
                    resamples=settings.bootstrap,
                    seed=settings.seed,
                )
                for target in cohort.targets
            ),
        ]
    )
    figures = {"results": results_figure(results)}
    if (example := _first_compressed(cohort, store)) is not None:
        figures["compressed_slide"] = draw_slide(cohort, store, example)
    with whole_folder(store.reports) as folder:
        results.write_parquet(folder / RESULTS)
        comparisons.write_parquet(folder / COMPARISONS)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=110)
    return Report(results, comparisons, figures)


def draw_slide(cohort: Cohort, store: Store, slide: str) -> Figure:
    """A slide with everything that was made of it; see :mod:`nic_core.pictures`."""
    paths = {encoder.name: store.grid(encoder.name, slide) for encoder in cohort.encoders}
    overlays = {item.name: store.map(item.name, slide) / OVERLAY for item in cohort.maps}
    mask = TissueMask.load(store.slide(slide) / TISSUE, read_record(store, slide).tissue_mpp)
    with _open(store, slide) as opened:
        return compressed_slide(
            opened,
            mask,
            {name: open_grid(path) for name, path in paths.items() if path.exists()},
            {f"{n} probability": imread(p) for n, p in overlays.items() if p.exists()},
        )


# --- shared ----------------------------------------------------------------------------------


def digest(*parts: object) -> str:
    """A short stable digest of anything with a faithful ``repr``."""
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:16]


def _index_row(store: Store, slide: str) -> dict[str, Any]:
    rows = read_index(store).filter(pl.col("slide") == slide)
    if rows.is_empty():
        raise CohortError(f"slide '{slide}' is not in the cohort; materialize 'slide_index' again")
    return rows.row(0, named=True)


def _truth(
    cohort: Cohort, store: Store, item: ProbabilityMap, slide: str, shape: tuple[int, ...]
) -> npt.NDArray[np.int8] | None:
    """What the slide's truth image says of its cells, if it has one; see
    :func:`nic_core.maps.truth_of_cells`."""
    path, record = _index_row(store, slide)["truth"], read_record(store, slide)
    if not path:
        return None
    return truth_of_cells(
        Path(path),
        item,
        width=record.width,
        height=record.height,
        cell=cohort.settings.patch * cohort.settings.mpp / record.mpp,
        shape=(shape[0], shape[1]),
    )


def _open(store: Store, slide: str) -> Slide:
    row = _index_row(store, slide)
    return open_slide(Path(row["path"]), mpp=row["mpp"])


def _first_compressed(cohort: Cohort, store: Store) -> str | None:
    """A slide that every encoder has compressed."""
    for slide in read_index(store)["slide"]:
        if all(store.grid(encoder.name, slide).exists() for encoder in cohort.encoders):
            return str(slide)
    return None


def _grid_settings(
    cohort: Cohort, encoder: str, origins: Mapping[str, GridProvenance]
) -> GridSettings:
    """How all grids of an encoder were made."""
    ways = sorted({(origin.precision, origin.reading) for origin in origins.values()})
    if len(ways) != 1:
        told = " and ".join(f"{precision} by {reading}" for precision, reading in ways)
        raise CohortError(
            f"encoder '{encoder}': its grids were made in more than one way ({told or 'none'}); "
            "set settings.compression.precision, not auto, and materialize 'grid' again"
        )
    precision, reading = ways[0]
    return GridSettings.model_validate(
        {"precision": precision, "reading": reading, "tissue": cohort.settings.tissue}
    )


def _untracked_recipe(model: Path) -> str | None:
    """What a model was made of that a tracker has not taken; see :func:`make_model`."""
    mark = model / UNTRACKED
    return mark.read_text() if mark.exists() else None


def _told_again(folder: Path, tracker: Tracker) -> tuple[Evaluated, ModelCard]:
    """A model as it was evaluated, read back; its tracker receives the curves."""
    model, history = load_model(folder), pl.read_parquet(folder / HISTORY)
    for row in history.iter_rows(named=True):
        fold, epoch = row.pop("fold"), row.pop("epoch")
        tracker.metrics({f"fold_{fold}_{name}": value for name, value in row.items()}, step=epoch)
    evaluated = Evaluated(
        target=model.card.target,
        settings=model.card.settings,
        predictions=pl.read_parquet(folder / PREDICTIONS),
        metrics=metrics_frame(model.card),
        networks=model.networks,
        history=history,
        best_epochs=model.card.best_epochs,
    )
    return evaluated, model.card


def _with_grids(table: pl.DataFrame, grids: pl.DataFrame) -> pl.DataFrame:
    """The units of a target with just the slides that have a grid; none left: no unit."""
    made = grids.filter(pl.col("hash").is_not_null())["slide"].implode()
    return table.with_columns(
        pl.col("slides").list.eval(pl.element().filter(pl.element().is_in(made)))
    ).filter(pl.col("slides").list.len() > 0)


def _listing(place: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a folder's files, or of one file; none if there is no such place.

    Thousands of images, or gigabytes of weights, are not read for this.
    """
    paths = [place] if place.is_file() else place.rglob("*")
    return sorted(
        (str(path.relative_to(place)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in paths
        if path.is_file()
    )

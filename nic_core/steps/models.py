"""Slide models: folds, cross-validation on grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl
import torch

from nic_core.cohort import Cohort, CohortError
from nic_core.encoders.files import read_card
from nic_core.grids import GridProvenance, open_grid
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
from nic_core.models.validation import Evaluated, cross_validate
from nic_core.reports import model_results
from nic_core.steps.grids import gather_grids
from nic_core.steps.inputs import digest, read_index
from nic_core.store import Store, whole_file, whole_folder
from nic_core.tracker import Tracker

PREDICTIONS, METRICS, HISTORY = "predictions.parquet", "metrics.parquet", "history.parquet"
UNTRACKED = "untracked"  # in a model's folder: its recipe, until its tracker has taken it


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
        The grids were not all made in one way, or cannot be used; see :func:`cross_validate`.
    TrainingError
        A loss is not finite.
    """
    settings = cohort.settings
    made = gather_grids(store, encoder)
    table = with_grids(pl.read_parquet(store.folds(target)), made)
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


def with_grids(table: pl.DataFrame, grids: pl.DataFrame) -> pl.DataFrame:
    """The units of a target with just the slides that have a grid; none left: no unit."""
    made = grids.filter(pl.col("hash").is_not_null())["slide"].implode()
    return table.with_columns(
        pl.col("slides").list.eval(pl.element().filter(pl.element().is_in(made)))
    ).filter(pl.col("slides").list.len() > 0)

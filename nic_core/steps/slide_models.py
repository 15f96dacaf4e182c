"""Target folds and slide models: assign patients to folds, cross-validate networks on grids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch

from nic_core.cohort import (
    Cohort,
    CohortError,
    FeaturesEncoder,
    Geometry,
    RegressionTarget,
    SiteFolds,
    Target,
)
from nic_core.cohort.index import DESCRIPTIVE_COLUMNS
from nic_core.devices import resolve_device
from nic_core.encoders.files import read_card
from nic_core.grids import GridProvenance, open_grid, recorded_hash
from nic_core.grids.moments import grid_moments
from nic_core.models.checkpoints import FoldCheckpoints
from nic_core.models.cross_validation import NETWORK, CrossValidation, cross_validate
from nic_core.models.decision_curves import decision_curve
from nic_core.models.distance import TrainingReference, fit_reference
from nic_core.models.figures import model_figures
from nic_core.models.files import (
    GridSettings,
    ModelCard,
    load_model,
    metrics_frame,
    save_model,
    training_cohort,
)
from nic_core.models.fold_columns import FoldColumn, patient_values, read_fold_column
from nic_core.models.folds import (
    FOLD_COLUMNS,
    folds_note,
    make_folds,
    make_site_folds,
    named_folds,
)
from nic_core.models.kinds import kind_of
from nic_core.models.labels import LabelMatches, read_labels, target_table
from nic_core.models.networks import crop_cells
from nic_core.models.reliability import reliability
from nic_core.models.subgroups import SUBGROUP_SCHEMA, groups_of_units, subgroup_metrics
from nic_core.pictures import FIGURES, save_figures
from nic_core.reports import fold_results, model_results
from nic_core.steps.grids import read_grid_manifest
from nic_core.steps.slide_index import (
    digest,
    read_patient_groups,
    read_slide_index,
    read_table_of,
    used_slides,
)
from nic_core.steps.slides import slide_scanner
from nic_core.store import GridKey, ModelKey, Store, atomic_file, atomic_folder, remove_product
from nic_core.tracker import Tracker

log = logging.getLogger(__name__)

FOLD_METRICS = "fold_metrics.parquet"
PREDICTIONS, METRICS, HISTORY = "predictions.parquet", "metrics.parquet", "history.parquet"
CLINICAL = "clinical.parquet"
RELIABILITY, DECISION_CURVE = "reliability.parquet", "decision_curve.parquet"
SUBGROUP_COLUMNS = ("site", *DESCRIPTIVE_COLUMNS)
"""Columns of the slide table whose values are subgroups of a model's card."""


@dataclass(frozen=True)
class TargetFolds:
    """A target's units in folds.

    Attributes
    ----------
    table
        Output of :func:`~nic_core.models.labels.target_table` with the columns ``fold`` and
        ``fold_name`` (:mod:`nic_core.models.folds`; null in split ``test``), and ``site``, which is
        null unless the folds keep sites whole.
    matches
        What became of every row of the label table.
    note
        Why there are fewer folds than ``settings.models.folds``; None if there are as many.
    sites
        How the labelled slides of each site are spread over folds: ``site``, ``split``, ``fold``,
        ``fold_name``, ``slides`` and ``patients`` (their numbers); no rows if no slide has a site.
    """

    table: pl.DataFrame
    matches: LabelMatches
    note: str | None
    sites: pl.DataFrame


def make_target_folds(cohort: Cohort, store: Store, target: str) -> TargetFolds:
    """Assign a target's patients to folds; write the table of folds. Excluded slides are left out.

    The models of all encoders on this target share it. Patients with slides of the same content are
    in one fold. ``settings.models.folds`` decides how: a number of folds (:func:`make_folds`),
    ``site`` or ``given`` (:func:`named_folds`), or whole sites (:func:`make_site_folds`).

    Raises
    ------
    CohortError
        The label table is invalid, the target cannot be cross-validated, or the columns ``site`` or
        ``fold`` do not fit ``settings.models.folds``.
    """
    found = find_target_folds(
        cohort, cohort.target(target), read_slide_index(store), read_patient_groups(store)
    )
    if found.note is not None:
        log.warning(found.note)
    with atomic_file(store.target_folds(target)) as path:
        found.table.write_parquet(path)
    return found


def find_target_folds(
    cohort: Cohort,
    target: Target,
    index: pl.DataFrame,
    groups: Mapping[str, str] | None = None,
) -> TargetFolds:
    """Assign a target's patients to folds, without a store.

    Parameters
    ----------
    index
        The slide index (:data:`nic_core.cohort.index.INDEX_SCHEMA`).
    groups
        Patient to group, for patients that share slides
        (:func:`nic_core.steps.slide_index.patient_groups`).

    Raises
    ------
    CohortError
        As :func:`make_target_folds`.
    """
    settings = cohort.settings.models
    labels, used = read_labels(cohort, target, index), used_slides(index)
    units = target_table(target, labels, used)
    wanted, sites = settings.folds, dict[str, str]()
    if isinstance(wanted, int):
        folds = make_folds(units, target=target, folds=wanted, seed=settings.seed, groups=groups)
    else:
        column: FoldColumn = "fold" if wanted == "given" else "site"
        patients = units.filter(pl.col("split") == "cv")["patient"]
        names = patient_values(read_fold_column(cohort, used, column), patients, column)
        sites = names if column == "site" else {}
        if isinstance(wanted, SiteFolds):
            folds = make_site_folds(
                units,
                target=target,
                sites=sites,
                count=wanted.count,
                seed=settings.seed,
                groups=groups,
            )
        else:
            folds = named_folds(units, target=target, names=names, column=column, groups=groups)
    site_of = pl.col("patient").replace_strict(sites, default=None, return_dtype=pl.String)
    table = units.join(folds, on="patient", how="left").with_columns(site=site_of).sort("unit")
    return TargetFolds(
        table,
        labels.matches,
        folds_note(target, table, wanted=wanted, groups=groups),
        _spread_of_sites(cohort, table, used),
    )


def _spread_of_sites(cohort: Cohort, table: pl.DataFrame, index: pl.DataFrame) -> pl.DataFrame:
    """Return :attr:`TargetFolds.sites`."""
    slides = table.explode("slides").select("split", "fold", "fold_name", slide="slides")
    return (
        read_fold_column(cohort, index, "site")
        .select("slide", "patient", "site")
        .drop_nulls("site")
        .join(slides, on="slide")
        .group_by("site", "split", "fold", "fold_name")
        .agg(slides=pl.len(), patients=pl.col("patient").n_unique())
        .sort("site", "split", "fold")
    )


def find_unmatched_labels(cohort: Cohort, store: Store, target: str) -> LabelMatches:
    """Return what became of every row of the label table, and the slides without a label.

    Raises
    ------
    CohortError
        As :func:`~nic_core.models.labels.read_labels`.
    """
    return read_labels(cohort, cohort.target(target), read_slide_index(store)).matches


def make_target_grids(store: Store, key: ModelKey) -> pl.DataFrame:
    """List the grids of a target's labelled slides; write and return the list.

    A slide model is trained and tested on these grids alone. A new slide without a label does not
    change the list, so it makes no model stale.

    Returns
    -------
    polars.DataFrame
        Rows of the encoder's grid manifest (:data:`nic_core.steps.grids.MANIFEST_SCHEMA`).

    Raises
    ------
    CohortError
        The grid manifest does not exist yet.
    """
    folds = pl.read_parquet(store.target_folds(key.target), glob=False)
    labelled = folds["slides"].explode().implode()
    found = read_grid_manifest(store, key.encoder).filter(pl.col("slide").is_in(labelled))
    with atomic_file(store.target_grids(key)) as path:
        found.write_parquet(path)
    return found


def read_target_grids(store: Store, key: ModelKey) -> pl.DataFrame:
    """Read the list that :func:`make_target_grids` wrote.

    Raises
    ------
    CohortError
        The list does not exist yet.
    """
    return read_table_of(
        store.target_grids(key),
        f"target '{key.target}' has no list of its grids of encoder '{key.encoder}'; materialize "
        "'target_grids' first",
    )


def make_slide_model(
    cohort: Cohort,
    store: Store,
    key: ModelKey,
    tracker: Tracker | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    device: str = "auto",
) -> tuple[CrossValidation, ModelCard]:
    """Cross-validate a target's networks on an encoder's grids; write and return the model.

    Slides without a grid are left out. Each finished fold is kept in the store until the model is
    complete, so a repeated call continues an interrupted one with the next fold.

    Parameters
    ----------
    key
        Encoder and target.
    tracker
        Receives the training curves.
    progress
        Called after each epoch with the number of epochs done and of those of all networks.
    device
        ``auto``, ``cpu`` or ``cuda``.

    Raises
    ------
    CohortError
        The grids were compressed with different settings or geometries, changed after they were
        listed (:func:`make_target_grids`), or cannot be used with ``settings.models``; see
        :func:`~nic_core.models.networks.crop_cells` and
        :func:`~nic_core.models.cross_validation.cross_validate`.
    TrainingError
        A loss is not finite.
    ValueError
        The device does not exist.
    """
    settings = cohort.settings
    encoder, target = key.encoder, key.target
    folder = store.slide_model(key)
    listed = read_target_grids(store, key)
    folds = pl.read_parquet(store.target_folds(target), glob=False)
    table = _units_with_grids(key, folds, listed)
    weights = read_card(store.encoder(encoder)).weights_hash
    data = {
        f"target_grids/{encoder}/{target}": digest(listed.rows()),
        f"target_folds/{target}": digest(folds.to_dicts()),
    }
    recipe = digest(
        cohort.target(target), settings, table.rows(), listed.rows(), weights, torch.__version__
    )
    _check_unchanged(store, encoder, listed)
    origins = {
        slide: open_grid(store.grid(GridKey(encoder=encoder, slide=slide))).provenance
        for slide in table["slides"].explode().unique()
    }
    grids = _grid_settings(cohort, encoder, origins)
    geometry = _shared_geometry(cohort, encoder, origins)
    try:
        crop = crop_cells(settings.models, geometry.cell_um)
    except CohortError as error:
        place = cohort.place("settings", "models", "crop_um")
        raise CohortError(f"{place}: encoder '{encoder}': {error}") from error
    result = cross_validate(
        cohort.target(target),
        table.drop(FOLD_COLUMNS),
        table.filter(pl.col("split") == "cv")
        .select("patient", "fold", "fold_name")
        .unique()
        .sort("patient"),
        lambda slide: open_grid(store.grid(GridKey(encoder=encoder, slide=slide))),
        settings.models,
        crop=crop,
        device=device,
        tracker=tracker,
        progress=progress,
        groups=read_patient_groups(store),
        checkpoints=FoldCheckpoints(
            store.slide_model_checkpoint(key), digest(recipe, resolve_device(device).type)
        ),
    )
    with atomic_folder(folder) as new:
        card = save_model(
            new,
            result,
            _training_reference(store, encoder, result, origins),
            encoder=encoder,
            weights_hash=weights,
            patch=geometry.patch,
            mpp=geometry.mpp,
            stride=geometry.stride,
            grids=grids,
            training=training_cohort(
                cohort.name,
                table,
                {slide: o.slide_identity for slide, o in origins.items()},
                mpp={slide: o.slide_mpp for slide, o in origins.items()},
                scanners={slide: slide_scanner(store, slide) for slide in origins},
            ),
            data=data,
        )
        result.predictions.write_parquet(new / PREDICTIONS)
        result.history.write_parquet(new / HISTORY)
        fold_results(card, result.predictions).write_parquet(new / FOLD_METRICS)
        result.clinical.write_parquet(new / CLINICAL)
        _write_curves(new, result)
        model_results(card).write_parquet(new / METRICS)
        save_figures(model_figures(result), new / FIGURES)
    if store.slide_model_checkpoint(key).exists():
        remove_product(store.slide_model_checkpoint(key))
    return result, card


def _write_curves(folder: Path, result: CrossValidation) -> None:
    """Write reliability and, except for regression, decision curves of cross-validated units."""
    target, rows = result.target, result.predictions.filter(split="cv")
    reliability(target, rows, result.times).write_parquet(folder / RELIABILITY)
    if not isinstance(target, RegressionTarget):
        decision_curve(target, rows, result.times).write_parquet(folder / DECISION_CURVE)


def _training_reference(
    store: Store, encoder: str, result: CrossValidation, origins: Mapping[str, GridProvenance]
) -> TrainingReference:
    """Return the reference of the cross-validated slides, with the folds that held them out."""
    rows = result.predictions.filter(model=NETWORK, split="cv").select("slides", "fold")
    folds = dict(rows.explode("slides").iter_rows())
    # as in the card, equal contents count once, in the order of their identities
    slides = {origins[slide].slide_identity: slide for slide in sorted(folds)}
    moments = []
    for _, slide in sorted(slides.items()):
        grid = open_grid(store.grid(GridKey(encoder=encoder, slide=slide)))
        moments.append(grid_moments(slide, grid.embeddings, grid.valid))
    return fit_reference(moments, [folds[slide] for _, slide in sorted(slides.items())])


def _units_with_grids(key: ModelKey, folds: pl.DataFrame, manifest: pl.DataFrame) -> pl.DataFrame:
    """Return the target's units with a grid; refuse to lose a whole fold."""
    units = with_grids(folds, manifest)
    lost = sorted(set(folds["fold"].drop_nulls()) - set(units["fold"].drop_nulls()))
    if lost:
        raise CohortError(
            f"target '{key.target}': no slide of fold {lost[0]} has a grid of encoder "
            f"'{key.encoder}'; materialize 'grid' for its slides"
        )
    return units


def _check_unchanged(store: Store, encoder: str, listed: pl.DataFrame) -> None:
    """Refuse grids other than those that were listed, by which the model's inputs are recorded."""
    for slide, expected in listed.drop_nulls("hash").select("slide", "hash").rows():
        path = store.grid(GridKey(encoder=encoder, slide=slide))
        if not path.exists() or recorded_hash(path) != expected:
            raise CohortError(
                f"encoder '{encoder}': the grid of slide '{slide}' changed after it was listed; "
                "materialize 'grid_manifest' and 'target_grids' again"
            )


def _grid_settings(
    cohort: Cohort, encoder: str, origins: Mapping[str, GridProvenance]
) -> GridSettings:
    """Return precision, reading, colours and tissue threshold, which all grids must share."""
    if not origins:
        raise CohortError(
            f"encoder '{encoder}': no labelled slide has a grid; materialize 'grid' first"
        )
    # of features of other software, none of the three may be known
    found = sorted({(o.precision, o.reading, o.colours) for o in origins.values()}, key=str)
    if len(found) != 1:
        pairs = " and ".join(f"{p} by {reading}, {colours}" for p, reading, colours in found)
        raise CohortError(
            f"encoder '{encoder}': its grids were made in more than one way ({pairs}); set "
            "settings.compression.precision to float32 or bfloat16 and materialize 'grid' again"
        )
    precision, reading, colours = found[0]
    return GridSettings(
        precision=precision, reading=reading, colours=colours, tissue=cohort.settings.tissue
    )


def _shared_geometry(
    cohort: Cohort, encoder: str, origins: Mapping[str, GridProvenance]
) -> Geometry:
    """Return patch, um/px and stride, which all grids must share.

    Grids of features state the um/px that was measured of each slide's patches, which differs a
    little between scanners: their common geometry is that of the encoder's entry.
    """
    if isinstance(cohort.encoder(encoder), FeaturesEncoder):
        return cohort.geometry(encoder)
    slide_of: dict[Geometry, str] = {}
    for slide, origin in sorted(origins.items()):
        slide_of.setdefault(Geometry(origin.patch, origin.mpp, origin.stride), slide)
    if len(slide_of) != 1:
        found = ", ".join(
            f"{geometry.name} for slide '{slide}'" for geometry, slide in slide_of.items()
        )
        raise CohortError(
            f"encoder '{encoder}': its grids have more than one geometry ({found}); materialize "
            "'grid' again for all slides"
        )
    return next(iter(slide_of))


def read_slide_model(folder: Path) -> tuple[CrossValidation, ModelCard]:
    """Read a model that :func:`make_slide_model` wrote.

    Undefined metrics, NaN when the model was made, are null.

    Raises
    ------
    ModelFileError
        See :func:`~nic_core.models.files.load_model`.
    """
    model = load_model(folder)
    result = CrossValidation(
        target=model.card.target,
        settings=model.card.settings,
        crop=model.card.crop,
        predictions=pl.read_parquet(folder / PREDICTIONS, glob=False),
        metrics=metrics_frame(model.card),
        networks=model.networks,
        history=pl.read_parquet(folder / HISTORY, glob=False),
        best_epochs=model.card.best_epochs,
        baseline_hazards=model.card.baseline_hazards,
        clinical=pl.read_parquet(folder / CLINICAL, glob=False),
        notes=model.card.notes,
        recalibrations=model.card.recalibrations,
    )
    return result, model.card


def model_subgroups(store: Store, result: CrossValidation) -> pl.DataFrame:
    """Score a model on the slides of each site, scanner, stain and organ of the slide table.

    Columns with fewer than two values are left out. A unit whose slides have several values has
    the subgroup ``A + B``.

    Returns
    -------
    polars.DataFrame
        ``column`` and :data:`~nic_core.models.subgroups.SUBGROUP_SCHEMA`, of the network's
        cross-validated predictions; the primary metric alone.
    """
    index = read_slide_index(store)
    units = result.predictions.filter(model=NETWORK, split="cv")
    primary = kind_of(result.target).primary_metric
    found = [pl.DataFrame(schema={"column": pl.String(), **SUBGROUP_SCHEMA})]
    for column in SUBGROUP_COLUMNS:
        value_of = dict(index.drop_nulls(column).select("slide", column).iter_rows())
        groups = groups_of_units(units["slides"], value_of)
        if len(set(groups)) < 2:
            continue
        scores = subgroup_metrics(
            result.target,
            units,
            groups,
            resamples=result.settings.bootstrap,
            seed=result.settings.seed,
        )
        named = pl.lit(column).alias("column")
        found.append(scores.filter(metric=primary).select(named, pl.all()))
    return pl.concat(found)


def with_grids(table: pl.DataFrame, manifest: pl.DataFrame) -> pl.DataFrame:
    """Remove slides without a grid from the units of a target; units without slides are left out.

    Parameters
    ----------
    table
        Target table with the column ``slides`` (list of ids).
    manifest
        Grid manifest of the encoder.
    """
    compressed = manifest.filter(pl.col("hash").is_not_null())["slide"].implode()
    return table.with_columns(
        pl.col("slides").list.eval(pl.element().filter(pl.element().is_in(compressed)))
    ).filter(pl.col("slides").list.len() > 0)

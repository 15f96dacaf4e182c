"""Target folds, slide models on grids, and explanations of their predictions."""

import math

import dagster as dg
import polars as pl
import torch

from nic_assets.assets import checks
from nic_assets.assets.inputs import TARGET_ENTRY
from nic_assets.orchestration.batches import Events, Product, batch_asset, materialize_each
from nic_assets.orchestration.executors import CPU_TAGS, GPU_POOL, GPU_TAGS
from nic_assets.orchestration.metadata import code_version, figures, log_progress, picture, table
from nic_assets.partitions import Partitions
from nic_assets.tracking import CANDIDATE, TrackedRun, Tracking, TrackingError
from nic_core import steps
from nic_core.cohort import Cohort, CohortError
from nic_core.devices import leased_device
from nic_core.encoders.files import read_card
from nic_core.models.comparison import (
    PermutationControl,
    compare_with_champion,
    permutation_control,
)
from nic_core.models.cross_validation import NETWORK, CrossValidation
from nic_core.models.figures import evaluation_figure, metrics_figure, training_figure
from nic_core.models.files import ModelCard, ensemble_module
from nic_core.models.fold_metrics import fold_metrics
from nic_core.models.kinds import kind_of
from nic_core.models.labels import LabelMatches
from nic_core.models.training import TrainingError
from nic_core.reports import model_results, results_markdown
from nic_core.slides import SlideError
from nic_core.store import ModelKey, Store

# split of the predictions -> how metadata names it
PARTS = {"cv": "cross_validated", "test": "test"}
# columns of the metrics whose names follow that of the metric in metadata
ENDS = ("low", "high", "folds_mean", "folds_deviation", "folds_undefined")


def model_assets(partitions: Partitions) -> list[dg.AssetsDefinition]:
    """Return the assets of group ``models``; none for a cohort without targets."""
    if not partitions.cohort.targets:
        return []
    settings = partitions.cohort.settings.models

    @batch_asset(
        checks=[checks.folds_disjoint_by_patient, checks.as_many_folds_as_wanted],
        partitions_def=partitions.targets,
        deps=[TARGET_ENTRY],
        group_name="models",
        kinds={"polars", "parquet"},
        op_tags=CPU_TAGS,
        code_version=code_version(4, settings.folds, settings.seed),
    )
    def target_folds(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """The labelled units of a target in folds by patient, shared by all encoders."""

        def make(target: str) -> Product:
            made = steps.make_target_folds(cohort, store, target)
            folds, matches = made.table, made.matches
            return Product(
                version=steps.digest(folds.to_dicts()),
                metadata={
                    "dagster/row_count": folds.height,
                    "folds": table(
                        folds.group_by("split", "fold", "fold_name")
                        .agg(units=pl.len(), patients=pl.col("patient").n_unique())
                        .sort("split", "fold")
                    ),
                    **({"sites": table(made.sites)} if made.sites.height else {}),
                    "number_of_folds": folds["fold"].drop_nulls().n_unique(),
                    **({"fewer_folds": made.note} if made.note is not None else {}),
                    **label_metadata(matches),
                    "file": dg.MetadataValue.path(store.target_folds(target)),
                },
                checks={
                    checks.folds_disjoint_by_patient: checks.folds_disjoint_by_patient(folds),
                    checks.as_many_folds_as_wanted: checks.as_many_folds_as_wanted(made),
                },
            )

        yield from materialize_each(
            context, make, parse=str, path=store.target_folds, expected=(CohortError,)
        )

    @batch_asset(
        checks=[checks.above_permutation_control, checks.compared_with_champion],
        partitions_def=partitions.models,
        deps=["grid_manifest", target_folds],
        group_name="models",
        kinds={"pytorch", "mlflow"},
        pool=GPU_POOL,
        op_tags=GPU_TAGS,
        code_version=code_version(6, settings),
    )
    def slide_model(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
        tracking: dg.ResourceParam[Tracking],
    ) -> Events:
        """Cross-validated networks from grid to target, their predictions and figures."""

        def make(key: ModelKey) -> Product:
            evaluated, control, run = train_slide_model(
                context, key, cohort, store, tracking, device
            )
            assert run.verdict is not None  # a run that has ended is completely logged
            return Product(
                version=steps.digest(evaluated.predictions.rows()),
                metadata={
                    **primary_scores(evaluated),
                    "folds": table(primary_folds(evaluated)),
                    "champion": run.verdict.explanation,
                    "metrics": table(evaluated.metrics),
                    **figures(run.figures),
                    "folder": dg.MetadataValue.path(store.slide_model(key)),
                    "mlflow_run": dg.MetadataValue.url(run.url),
                    "mlflow_model": dg.MetadataValue.url(run.page),
                },
                checks={
                    checks.above_permutation_control: checks.above_permutation_control(control),
                    checks.compared_with_champion: checks.compared_with_champion(run.verdict),
                },
            )

        with leased_device() as device:
            yield from materialize_each(
                context,
                make,
                parse=ModelKey.parse,
                path=store.slide_model,
                expected=(CohortError, TrainingError, TrackingError),
            )

    @batch_asset(
        partitions_def=partitions.models,
        deps=[slide_model],
        group_name="models",
        kinds={"pytorch", "zarr", "image"},
        op_tags=CPU_TAGS,
        code_version=code_version(2, partitions.cohort.maps),
    )
    def explanation(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """Heatmaps of each slide's evidence for its prediction, by networks not trained on it."""

        def make(key: ModelKey) -> Product:
            explained = steps.make_explanation(cohort, store, key, log_progress(context, "slides"))
            return Product(
                version=steps.digest(sorted(explained.versions.items())),
                metadata={
                    **{name: picture(drawn, name) for name, drawn in explained.overlays.items()},
                    "scores": table(
                        explained.scores.group_by("map", "split")
                        .agg(slides=pl.len(), auc=pl.col("auc").mean(), hit=pl.col("hit").mean())
                        .sort("map", "split")
                    ),
                    "folder": dg.MetadataValue.path(store.explanation(key)),
                },
            )

        yield from materialize_each(
            context,
            make,
            parse=ModelKey.parse,
            path=store.explanation,
            expected=(CohortError, SlideError),
        )

    return [target_folds, slide_model, explanation]


def primary_folds(evaluated: CrossValidation) -> pl.DataFrame:
    """Return the network's primary metric in each fold."""
    primary = kind_of(evaluated.target).primary_metric
    folds = fold_metrics(evaluated.target, evaluated.predictions)
    return folds.filter(model=NETWORK, metric=primary).drop("model")


def label_metadata(matches: LabelMatches) -> dict[str, int | list[str] | list[int]]:
    """Return what became of the rows of the label table, by count and by name."""
    return {
        "label_rows": matches.rows,
        "labels_used": matches.used,
        "rows_repeated": matches.repeated,
        "rows_without_label": matches.without_label,
        "rows_without_id": matches.without_id,
        "labels_without_slide_count": len(matches.labels_without_slide),
        "labels_without_slide": list(map(str, matches.labels_without_slide)),
        "labels_of_excluded_slides": matches.excluded,
        "slides_without_label_count": len(matches.slides_without_label),
        "slides_without_label": list(map(str, matches.slides_without_label)),
    }


def train_slide_model(
    context: dg.AssetExecutionContext,
    key: ModelKey,
    cohort: Cohort,
    store: Store,
    tracking: Tracking,
    device: str,
) -> tuple[CrossValidation, PermutationControl, TrackedRun]:
    """Cross-validate a slide model, log it to MLflow and compare it with the champion."""
    with tracking.run(
        context,
        cohort=cohort,
        partition=str(key),
        experiment=f"target-{key.target}",
        product=store.slide_model(key),
    ) as run:
        settings = cohort.settings.models.model_dump()
        run.params({"encoder": key.encoder, "target": key.target, **settings})
        evaluated, card = steps.make_slide_model(
            cohort, store, key, run, log_progress(context, "epochs"), device=device
        )
        run.figure("predictions", evaluation_figure(evaluated))
        run.figure("metrics", metrics_figure(evaluated))
        run.figure("training_curves", training_figure(evaluated))
        log_slide_model(run, evaluated, card, store)
        control = permutation_control(evaluated)
        run.compare_with_champion(
            lambda champion: compare_with_champion(evaluated, champion, control)
        )
    steps.mark_logged(store, key)
    return evaluated, control, run


def primary_scores(evaluated: CrossValidation) -> dict[str, float]:
    """Return the network's primary metric with its 95 % interval, by part of the data.

    For example ``cross_validated_spearman``, ``cross_validated_spearman_low`` and ``..._high``,
    and the same of ``test``; of the cross-validation also ``..._folds_mean``,
    ``..._folds_deviation`` and ``..._folds_undefined``. Undefined values are left out.
    """
    rows = evaluated.metrics.filter(model=NETWORK, metric=kind_of(evaluated.target).primary_metric)
    scores = {
        f"{PARTS[split]}_{metric}{end}": number
        for split, metric, *numbers in rows.select("split", "metric", "value", *ENDS).iter_rows()
        for end, number in zip(("", *(f"_{end}" for end in ENDS)), numbers, strict=True)
    }
    return {
        name: number
        for name, number in scores.items()
        if number is not None and math.isfinite(number)
    }


def log_slide_model(
    run: TrackedRun, evaluated: CrossValidation, card: ModelCard, store: Store
) -> None:
    """Log a slide model's card, data, files and scores to MLflow, and register a version."""
    target, encoder, crop = card.target.name, card.encoder, card.crop
    geometry = f"{card.patch} px at {card.mpp:g} um/px, stride {card.stride} px"
    results = model_results(card)
    networks = results.filter(model=results["model"][0])
    data = {
        f"grid_manifest/{encoder}": (
            store.grid_manifest(encoder),
            steps.digest(steps.read_grid_manifest(store, encoder).rows()),
        ),
        f"target_folds/{target}": (
            store.target_folds(target),
            steps.digest(pl.read_parquet(store.target_folds(target), glob=False).to_dicts()),
        ),
    }
    run.card(card.model_dump(mode="json"))
    run.inputs(data)
    run.files(store.slide_model(ModelKey(encoder=encoder, target=target)))
    run.register(
        ensemble_module(evaluated.networks),
        torch.zeros((2, card.embedding_size, crop, crop)),
        name=f"model-{target}",
        description=f"{card.target.kind}: crop of {crop} x {crop} cells ({card.crop_um:g} um) of "
        f"encoder {encoder} ({geometry}) to {target}, mean of "
        f"{len(card.networks)} folds\n\n{results_markdown(networks)}",
        tags={
            "target": target,
            "encoder": encoder,
            "weights_hash": card.weights_hash,
            "geometry": geometry,
            "crop_um": f"{card.crop_um:g}",
            "tasks": ", ".join(read_card(store.encoder(encoder)).tasks),
            "training_digest": card.training.digest,
            **{f"data/{name}": version for name, (_, version) in data.items()},
        },
        aliases=(f"{CANDIDATE}-{encoder.replace('.', '-')}",),
    )
    run.summary(results)

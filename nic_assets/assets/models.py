"""Target folds, slide models on grids, and explanations of their predictions."""

import math
from typing import TYPE_CHECKING

import dagster as dg
import polars as pl

from nic_assets.assets import checks
from nic_assets.assets.inputs import TARGET_ENTRY
from nic_assets.orchestration.batches import Events, Product, batch_asset, materialize_each
from nic_assets.orchestration.executors import CPU_TAGS, GPU_POOL, GPU_TAGS
from nic_assets.orchestration.metadata import (
    code_version,
    figures,
    log_progress,
    picture,
    table,
)
from nic_assets.partitions import Partitions
from nic_assets.tags import REFRESH_TAG
from nic_assets.tracking import Tracking
from nic_assets.tracking.experiments import target_experiment
from nic_assets.tracking.resource import git_commit, training_tags
from nic_core import steps
from nic_core.cohort import Cohort, CohortError
from nic_core.store import ModelKey, Store
from nic_core.view.addresses import heat_layer, slide_page, target_page

if TYPE_CHECKING:
    from nic_core.models.cross_validation import CrossValidation
    from nic_core.models.labels import LabelMatches

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
        code_version=code_version(5, settings.folds, settings.seed),
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
        partitions_def=partitions.models,
        deps=["grid_manifest", target_folds],
        group_name="models",
        kinds={"polars", "parquet"},
        tags={REFRESH_TAG: "eager"},
        op_tags=CPU_TAGS,
        code_version=code_version(1),
    )
    def target_grids(context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]) -> Events:
        """The grids of a target's labelled slides, by encoder: a slide without a label changes
        none."""

        def make(key: ModelKey) -> Product:
            grids = steps.make_target_grids(store, key)
            return Product(
                version=steps.digest(grids.rows()),
                metadata={
                    "dagster/row_count": grids.height,
                    "without_grid": grids.filter(pl.col("hash").is_null())["slide"].to_list(),
                    "file": dg.MetadataValue.path(store.target_grids(key)),
                },
            )

        yield from materialize_each(
            context,
            make,
            parse=ModelKey.parse,
            path=store.target_grids,
            expected=(CohortError,),
        )

    @batch_asset(
        partitions_def=partitions.models,
        deps=[target_grids, target_folds],
        group_name="models",
        kinds={"pytorch"},
        pool=GPU_POOL,
        op_tags=GPU_TAGS,
        code_version=code_version(9, settings),
    )
    def slide_model(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
        tracking: dg.ResourceParam[Tracking],
    ) -> Events:
        """Cross-validated networks from grid to target, their predictions and figures."""
        from nic_core.devices import leased_device
        from nic_core.models.training import TrainingError

        def make(key: ModelKey) -> Product:
            from nic_assets.tracking.publications import model_run_name
            from nic_core.models.figures import model_figures

            commit = git_commit()
            tags = training_tags(
                cohort, "slide_model", str(key), run=context.run.run_id, commit=commit
            )
            with tracking.live_curves(
                context,
                tags,
                experiment=target_experiment(key.target),
                name=model_run_name(cohort, key),
            ) as curves:
                evaluated, _ = steps.make_slide_model(
                    cohort, store, key, curves, log_progress(context, "epochs"), device=device
                )
            return Product(
                version=steps.digest(evaluated.predictions.rows()),
                metadata={
                    **primary_scores(evaluated),
                    "folds": table(primary_folds(evaluated)),
                    "metrics": table(evaluated.metrics),
                    **(
                        {"clinical": table(evaluated.clinical)}
                        if evaluated.target.covariates
                        else {}
                    ),
                    **figures(model_figures(evaluated)),
                    "look": dg.MetadataValue.url(target_page(key.target)),
                    "folder": dg.MetadataValue.path(store.slide_model(key)),
                    **({} if commit is None else {"commit": commit}),
                },
            )

        with leased_device() as device:
            yield from materialize_each(
                context,
                make,
                parse=ModelKey.parse,
                path=store.slide_model,
                expected=(CohortError, TrainingError),
            )

    @batch_asset(
        partitions_def=partitions.models,
        deps=[slide_model],
        group_name="models",
        kinds={"pytorch", "zarr", "image"},
        op_tags=CPU_TAGS,
        code_version=code_version(5, partitions.cohort.maps),
    )
    def explanation(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """Heatmaps of each slide's evidence for its prediction, by networks not trained on it."""
        from nic_core.slides import SlideError

        def make(key: ModelKey) -> Product:
            explained = steps.make_explanation(cohort, store, key, log_progress(context, "slides"))
            return Product(
                version=steps.digest(sorted(explained.versions.items())),
                metadata={
                    **{
                        f"{end} prediction: {slide}": picture(
                            explained.overlays[slide], f"{end} prediction: {slide}"
                        )
                        for end, slide in explained.extremes.items()
                    },
                    "scores": table(
                        explained.scores.group_by("map", "split")
                        .agg(slides=pl.len(), auc=pl.col("auc").mean(), hit=pl.col("hit").mean())
                        .sort("map", "split")
                    ),
                    **{
                        f"look at the {end}": dg.MetadataValue.url(
                            slide_page(slide, heat_layer(key.target, key.encoder))
                        )
                        for end, slide in explained.extremes.items()
                    },
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

    return [target_folds, target_grids, slide_model, explanation]


def primary_folds(evaluated: "CrossValidation") -> pl.DataFrame:
    """Return the network's primary metric in each fold."""
    from nic_core.models.cross_validation import NETWORK
    from nic_core.models.fold_metrics import fold_metrics
    from nic_core.models.kinds import kind_of

    primary = kind_of(evaluated.target).primary_metric
    folds = fold_metrics(evaluated.target, evaluated.predictions)
    return folds.filter(model=NETWORK, metric=primary).drop("model")


def label_metadata(matches: "LabelMatches") -> dict[str, int | list[str] | list[int]]:
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


def primary_scores(evaluated: "CrossValidation") -> dict[str, float]:
    """Return the network's primary metric with its 95 % interval, by part of the data.

    For example ``cross_validated_spearman``, ``cross_validated_spearman_low`` and ``..._high``,
    and the same of ``test``; of the cross-validation also ``..._folds_mean``,
    ``..._folds_deviation`` and ``..._folds_undefined``. Undefined values are left out.
    """
    from nic_core.models.cross_validation import NETWORK
    from nic_core.models.kinds import kind_of

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

"""Slide- and patient-level models on grids, one for each encoder and target."""

import dagster as dg
import polars as pl
import torch

from nic_assets import checks
from nic_assets.batches import Events, Product, batch_asset, materialize_each
from nic_assets.executors import CPU_TAGS, GPU_POOL, GPU_TAGS
from nic_assets.inputs import TARGET_ENTRY
from nic_assets.metadata import code_version, figure, log_progress, picture, table
from nic_assets.partitions import Partitions
from nic_assets.tracking import Tracking
from nic_core import steps
from nic_core.cohort import Cohort, CohortError
from nic_core.models.files import ensemble_module
from nic_core.models.pictures import evaluation_figure, metrics_figure, training_figure
from nic_core.models.training import TrainingError
from nic_core.reports import model_results
from nic_core.slides import SlideError
from nic_core.store import Store


def model_assets(partitions: Partitions) -> list[dg.AssetsDefinition]:
    """The assets of this layer, for one cohort; none where it has no target."""
    if not partitions.cohort.targets:
        return []
    settings = partitions.cohort.settings.models

    @batch_asset(
        partitions_def=partitions.targets,
        deps=[TARGET_ENTRY],
        group_name="models",
        kinds={"polars", "parquet"},
        op_tags=CPU_TAGS,
        code_version=code_version(1, settings.folds, settings.seed),
        check_specs=[dg.AssetCheckSpec("folds_disjoint_by_patient", asset="target_folds")],
    )
    def target_folds(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """A target's labelled units in folds by patient, shared by all encoders."""

        def work(key: str) -> Product:
            folds = steps.divide(cohort, store, key)
            return Product(
                version=steps.digest(folds.to_dicts()),
                metadata={
                    "dagster/row_count": folds.height,
                    "folds": table(
                        folds.group_by("split", "fold")
                        .agg(units=pl.len(), patients=pl.col("patient").n_unique())
                        .sort("split", "fold")
                    ),
                    "file": dg.MetadataValue.path(store.folds(key)),
                },
                checks={"folds_disjoint_by_patient": checks.folds_disjoint(folds)},
            )

        yield from materialize_each(context, work, expected=(CohortError,), place=store.folds)

    @batch_asset(
        partitions_def=partitions.models,
        deps=["encoded_cohort", target_folds],
        group_name="models",
        kinds={"pytorch", "mlflow"},
        pool=GPU_POOL,
        op_tags=GPU_TAGS,
        code_version=code_version(2, settings),
        check_specs=[dg.AssetCheckSpec("above_permutation_control", asset="task_model")],
    )
    def task_model(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
        tracking: dg.ResourceParam[Tracking],
    ) -> Events:
        """Cross-validated networks from grid to target, their predictions and figures."""

        def work(key: str) -> Product:
            encoder, target = key.split("|")
            with tracking.run(context, partition=key, experiment=f"target-{target}") as run:
                run.params({"encoder": encoder, "target": target, **settings.model_dump()})
                evaluated, card = steps.make_model(
                    cohort, store, encoder, target, run, log_progress(context)
                )
                run.figure("predictions", evaluation_figure(evaluated))
                run.figure("metrics", metrics_figure(evaluated))
                run.figure("training_curves", training_figure(evaluated))
                run.summary(model_results(card))
                page = run.register(
                    ensemble_module(evaluated.networks),
                    torch.zeros((2, card.code, settings.crop, settings.crop)),
                    name=f"model-{target}-{encoder}",
                    description=f"{card.target.kind}: crop of {settings.crop} x {settings.crop} "
                    f"cells of encoder {encoder} to {target}, mean of {settings.folds} folds",
                    tags={
                        "cohort": cohort.name,
                        "target": target,
                        "encoder": encoder,
                        "weights_hash": card.weights_hash,
                    },
                )
                run.card(card.model_dump(mode="json"))
            return Product(
                version=steps.digest(evaluated.predictions.rows()),
                metadata={
                    "metrics": table(evaluated.metrics),
                    **{name: figure(drawing, name) for name, drawing in run.figures.items()},
                    "folder": dg.MetadataValue.path(store.model(target, encoder)),
                    "mlflow_run": dg.MetadataValue.url(run.url),
                    "mlflow_model": dg.MetadataValue.url(page),
                },
                checks={"above_permutation_control": checks.above_permutation(evaluated)},
            )

        yield from materialize_each(
            context,
            work,
            expected=(CohortError, TrainingError),
            place=lambda key: store.model(*reversed(key.split("|"))),
        )

    @batch_asset(
        partitions_def=partitions.models,
        deps=[task_model],
        group_name="models",
        kinds={"pytorch", "zarr", "image"},
        op_tags=CPU_TAGS,
        code_version=code_version(1, partitions.cohort.maps),
    )
    def explanation(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """What in each slide speaks for its prediction, by networks that have not seen it."""

        def work(key: str) -> Product:
            encoder, target = key.split("|")
            explained = steps.explain_model(cohort, store, encoder, target)
            return Product(
                version=steps.digest(sorted(explained.versions.items())),
                metadata={
                    **{name: picture(drawn, name) for name, drawn in explained.overlays.items()},
                    "scores": table(
                        explained.scores.group_by("map", "split")
                        .agg(slides=pl.len(), auc=pl.col("auc").mean(), hit=pl.col("hit").mean())
                        .sort("map", "split")
                    ),
                    "folder": dg.MetadataValue.path(store.explanations(target, encoder)),
                },
            )

        yield from materialize_each(
            context,
            work,
            expected=(CohortError, SlideError),
            place=lambda key: store.explanations(*reversed(key.split("|"))),
        )

    return [target_folds, task_model, explanation]

"""Slide- and patient-level models on grids, one for each encoder and target."""

import dagster as dg

from nic_assets import checks
from nic_assets.batches import Events, Product, materialize_each
from nic_assets.executors import CPU_TAGS, GPU_POOL, GPU_TAGS
from nic_assets.inputs import TARGET_ENTRY
from nic_assets.metadata import OWNERS, code_version, figure, table
from nic_assets.partitions import Partitions
from nic_assets.tracking import Tracking
from nic_core import steps
from nic_core.cohort import Cohort, CohortError
from nic_core.store import Store


def model_assets(partitions: Partitions) -> list[dg.AssetsDefinition]:
    """The assets of this layer, for one cohort; none where it has no target."""
    if not partitions.cohort.targets:
        return []
    settings = partitions.cohort.settings.models

    @dg.asset(
        partitions_def=partitions.targets,
        backfill_policy=dg.BackfillPolicy.single_run(),
        deps=[TARGET_ENTRY],
        group_name="models",
        kinds={"polars", "parquet"},
        owners=OWNERS,
        op_tags=CPU_TAGS,
        code_version=code_version(1, settings.folds, settings.seed),
        output_required=False,
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
                version=steps.digest(folds.rows()),
                metadata={
                    "dagster/row_count": folds.height,
                    "folds": table(steps.fold_counts(folds)),
                    "file": dg.MetadataValue.path(store.folds(key)),
                },
                checks={"folds_disjoint_by_patient": checks.folds_disjoint(folds)},
            )

        yield from materialize_each(context, work, expected=(CohortError,))

    @dg.asset(
        partitions_def=partitions.models,
        backfill_policy=dg.BackfillPolicy.single_run(),
        deps=["encoded_cohort", target_folds],
        group_name="models",
        kinds={"pytorch", "mlflow"},
        owners=OWNERS,
        pool=GPU_POOL,
        op_tags=GPU_TAGS,
        code_version=code_version(1, settings),
        output_required=False,
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
            with tracking.run(
                context,
                partition=key,
                experiment=f"target {target}",
                params={"encoder": encoder, "target": target, **settings.model_dump()},
            ) as run:
                model = steps.model_target(cohort, store, encoder, target, run, context.log.info)
                for name, drawing in model.figures.items():
                    run.figure(name, drawing)
                version = run.register_model(model, cohort.name)
            return Product(
                version=steps.digest(model.predictions.rows()),
                metadata={
                    "metrics": table(model.metrics),
                    **{name: figure(drawing, name) for name, drawing in model.figures.items()},
                    "folder": dg.MetadataValue.path(store.model(target, encoder)),
                    "mlflow_run": dg.MetadataValue.url(run.url),
                    "mlflow_model": dg.MetadataValue.url(version.url),
                },
                checks={"above_permutation_control": checks.above_permutation(model)},
            )

        yield from materialize_each(context, work, expected=(CohortError, steps.TrainingError))

    return [target_folds, task_model]

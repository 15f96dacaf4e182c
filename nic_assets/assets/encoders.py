"""Patch-task datasets, and the encoders trained on them."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg

from nic_assets import checks
from nic_assets.batches import Product, materialize_each
from nic_assets.executors import CPU_TAGS, GPU_POOL, GPU_TAGS
from nic_assets.inputs import ENCODER_ENTRY, PATCH_TASK_SOURCE
from nic_assets.metadata import OWNERS, code_version, figure, picture, table
from nic_assets.partitions import Partitions
from nic_assets.tracking import Tracking
from nic_core import steps
from nic_core.cohort import Cohort, CohortError
from nic_core.store import Store


def encoder_assets(partitions: Partitions) -> list[dg.AssetsDefinition]:
    """The assets of this layer, for one cohort."""
    settings = partitions.cohort.settings

    @dg.asset(
        partitions_def=partitions.patch_tasks,
        backfill_policy=dg.BackfillPolicy.single_run(),
        deps=[PATCH_TASK_SOURCE],
        group_name="encoders",
        kinds={"numpy", "parquet"},
        owners=OWNERS,
        op_tags=CPU_TAGS,
        code_version=code_version(1, settings.patch, settings.mpp),
        output_required=False,
        check_specs=[dg.AssetCheckSpec("splits_disjoint_by_group", asset="patch_task")],
    )
    def patch_task(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        """A patch task's patches at the study's size and resolution, split by patient."""

        def work(key: str) -> Product:
            dataset = steps.build_patch_task(cohort, store, key)
            return Product(
                version=dataset.version,
                metadata={
                    "dagster/row_count": dataset.table.height,
                    "organ": dataset.organ,
                    "examples": picture(steps.patch_examples(dataset), f"patches of {key}"),
                    "classes": table(steps.class_counts(dataset)),
                    "folder": dg.MetadataValue.path(store.patch_task(key)),
                },
                checks={"splits_disjoint_by_group": checks.splits_disjoint(dataset)},
            )

        yield from materialize_each(context, work, expected=(CohortError,))

    @dg.asset(
        partitions_def=partitions.encoders,
        backfill_policy=dg.BackfillPolicy.single_run(),
        deps=[
            ENCODER_ENTRY,
            *(
                [dg.AssetDep(patch_task, partition_mapping=partitions.tasks_of_encoders)]
                if partitions.cohort.patch_tasks
                else []
            ),
        ],
        group_name="encoders",
        kinds={"pytorch", "mlflow"},
        owners=OWNERS,
        pool=GPU_POOL,
        op_tags=GPU_TAGS,
        code_version=code_version(1, settings.patch, settings.mpp, settings.code),
        output_required=False,
        check_specs=[dg.AssetCheckSpec("beats_chance", asset="encoder")],
    )
    def encoder(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
        tracking: dg.ResourceParam[Tracking],
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        """A trained encoder: patch -> code, with the heads of the tasks that taught it."""

        def work(key: str) -> Product:
            spec = cohort.encoder(key)
            with tracking.run(
                context, partition=key, experiment="encoders", params=spec.model_dump()
            ) as run:
                trained = steps.train_encoder(cohort, store, key, run, context.log.info)
                for name, drawing in trained.figures.items():
                    run.figure(name, drawing)
                version = run.register_encoder(trained.encoder, cohort.name)
            return Product(
                version=trained.encoder.card.weights_hash[:16],
                metadata={
                    **{name: figure(drawing, name) for name, drawing in trained.figures.items()},
                    **({"test": table(trained.scores)} if trained.scores.height else {}),
                    "folder": dg.MetadataValue.path(store.encoder(key)),
                    "mlflow_run": dg.MetadataValue.url(run.url),
                    "mlflow_model": dg.MetadataValue.url(version.url),
                },
                checks={"beats_chance": checks.beats_chance(trained.scores)},
            )

        yield from materialize_each(context, work, expected=(CohortError, steps.TrainingError))

    return [*([patch_task] if partitions.cohort.patch_tasks else []), encoder]

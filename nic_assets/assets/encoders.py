"""Patch-task datasets, and the encoders trained on them."""

from typing import Any

import dagster as dg
import torch

from nic_assets.assets import checks
from nic_assets.assets.inputs import ENCODER_ENTRY, PATCH_TASK_SOURCE
from nic_assets.orchestration.batches import Events, Product, batch_asset, materialize_each
from nic_assets.orchestration.executors import CPU_TAGS, GPU_POOL, GPU_TAGS
from nic_assets.orchestration.metadata import code_version, figure, log_progress, table
from nic_assets.partitions import Partitions
from nic_assets.tags import PARTIAL_INPUTS
from nic_assets.tracking import TrackedRun, Tracking, TrackingError
from nic_core import steps
from nic_core.cohort import Cohort, CohortError, RegisteredEncoder
from nic_core.devices import leased_device
from nic_core.encoders import Encoder, EncoderCard, EncoderError
from nic_core.encoders.figures import patch_examples
from nic_core.encoders.files import PROGRAMS
from nic_core.reports import encoder_results, probe_results, results_markdown
from nic_core.store import Store

FINDINGS_SHOWN = 50


def encoder_assets(partitions: Partitions) -> list[dg.AssetsDefinition]:
    """The assets of this layer, for one cohort."""
    settings = partitions.cohort.settings

    @batch_asset(
        partitions_def=partitions.patch_tasks,
        deps=[PATCH_TASK_SOURCE],
        group_name="encoders",
        kinds={"numpy", "parquet"},
        op_tags=CPU_TAGS,
        code_version=code_version(3, settings.patch, settings.mpp, settings.tissue),
        check_specs=[
            checks.declared(name, "patch_task", judge)
            for name, judge in (
                ("splits_disjoint_by_group", checks.splits_disjoint),
                ("classes_present", checks.classes_present),
                ("labels_agree", checks.labels_agree),
                ("no_near_duplicates_across_splits", checks.no_near_duplicates),
                ("images_readable", checks.images_readable),
            )
        ],
    )
    def patch_task(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """A patch task's patches at the study's size and resolution, split by patient."""

        def work(key: str) -> Product:
            dataset = steps.make_patch_task(cohort, store, key, log_progress(context))
            return Product(
                version=dataset.identity[:16],
                metadata={
                    "dagster/row_count": dataset.table.height,
                    "organ": dataset.organ,
                    "groups": dataset.table["group"].n_unique(),
                    "examples": figure(patch_examples(dataset), f"patches of {key}"),
                    "classes": table(dataset.counts()),
                    "left_out_or_doubtful": table(dataset.findings_by_kind()),
                    "findings": table(dataset.findings.head(FINDINGS_SHOWN)),
                    "folder": dg.MetadataValue.path(store.patch_task(key)),
                },
                checks={
                    "splits_disjoint_by_group": checks.splits_disjoint(dataset),
                    "classes_present": checks.classes_present(dataset),
                    "labels_agree": checks.labels_agree(dataset),
                    "no_near_duplicates_across_splits": checks.no_near_duplicates(dataset),
                    "images_readable": checks.images_readable(dataset),
                },
            )

        yield from materialize_each(context, work, expected=(CohortError,), place=store.patch_task)

    @batch_asset(
        partitions_def=partitions.encoders,
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
        pool=GPU_POOL,
        op_tags=GPU_TAGS,
        code_version=code_version(1, settings.patch, settings.mpp, settings.embedding_size),
        check_specs=[checks.declared("beats_chance", "encoder", checks.beats_chance)],
    )
    def encoder(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
        tracking: dg.ResourceParam[Tracking],
    ) -> Events:
        """A trained or imported encoder: patch to embedding, with the heads that taught it."""

        def work(key: str) -> Product:
            entry = cohort.encoder(key)
            if isinstance(entry, RegisteredEncoder):
                with tracking.download_encoder(entry) as (imported, page):
                    local = cohort.with_encoder(imported)
                    card = steps.make_encoder(local, store, key).encoder.card
                return made(key, card, {"mlflow_model": dg.MetadataValue.url(page)})
            with tracking.run(
                context,
                cohort=cohort,
                partition=key,
                experiment="encoders",
                product=store.encoder(key),
            ) as run:
                encoder = steps.make_encoder(
                    cohort, store, key, run, log_progress(context), device=device
                ).encoder
                card = encoder.card
                log_encoder(run, encoder, cohort, store)
            steps.remove_checkpoint(store, key)
            pages = {"mlflow_run": run.url} | ({"mlflow_model": run.page} if run.page else {})
            return made(
                key,
                card,
                {
                    **{name: figure(drawing, name) for name, drawing in run.figures.items()},
                    **{name: dg.MetadataValue.url(page) for name, page in pages.items()},
                },
            )

        def made(key: str, card: EncoderCard, metadata: dict[str, Any]) -> Product:
            return Product(
                version=card.weights_hash[:16],
                metadata={
                    **metadata,
                    "test_scores": table(encoder_results(card)),
                    "folder": dg.MetadataValue.path(store.encoder(key)),
                },
                checks={"beats_chance": checks.beats_chance(card)},
            )

        with leased_device() as device:
            yield from materialize_each(
                context, work, expected=(EncoderError, TrackingError), place=store.encoder
            )

    @batch_asset(
        partitions_def=partitions.encoders,
        deps=[encoder, dg.AssetDep(patch_task, partition_mapping=dg.AllPartitionMapping())],
        group_name="encoders",
        kinds={"scikitlearn", "mlflow"},
        tags=PARTIAL_INPUTS,
        op_tags=CPU_TAGS,
        code_version=code_version(1),
        check_specs=[
            checks.declared("test_patients_unseen", "encoder_probe", checks.patients_unseen)
        ],
    )
    def encoder_probe(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
        tracking: dg.ResourceParam[Tracking],
    ) -> Events:
        """What simple classifiers read off an encoder's embeddings, on every patch task."""

        def work(key: str) -> Product:
            with tracking.run(
                context,
                cohort=cohort,
                partition=key,
                experiment="probes",
                product=store.encoder_probe(key),
            ) as run:
                scores, drawings = steps.make_encoder_probe(cohort, store, key)
                run.summary(probe_results(key, scores))
                for name, drawing in drawings.items():
                    run.figure(name, drawing)
            return Product(
                version=steps.digest(scores.rows()),
                metadata={
                    "scores": table(scores),
                    **{name: figure(drawing, name) for name, drawing in drawings.items()},
                    "file": dg.MetadataValue.path(store.encoder_probe(key)),
                    "mlflow_run": dg.MetadataValue.url(run.url),
                },
                checks={
                    "test_patients_unseen": checks.patients_unseen(
                        steps.leaked_groups(cohort, store, key)
                    )
                },
            )

        yield from materialize_each(
            context, work, expected=(EncoderError, TrackingError), place=store.encoder_probe
        )

    return [patch_task, encoder, encoder_probe] if partitions.cohort.patch_tasks else [encoder]


def log_encoder(run: TrackedRun, encoder: Encoder, cohort: Cohort, store: Store) -> None:
    """Tell MLflow of an encoder: its card, data, files, figures, and a version of its own."""
    card, results = encoder.card, encoder_results(encoder.card)
    run.card(card.model_dump(mode="json"))
    run.inputs({f"patch_task/{task}": (store.patch_task(task), i) for task, i in card.data.items()})
    # what comes from a file is imported from that file, and an archive is not exported anew
    if card.objective != "imported":
        run.files(store.encoder(card.name))
    if card.architecture not in PROGRAMS:
        run.register(
            encoder.module,
            torch.zeros((2, 3, card.patch, card.patch), dtype=torch.uint8),
            name=f"encoder-{card.name}",
            description=f"{card.objective}: patch of {card.patch} px at {card.mpp:g} um/px to embedding "
            f"of {card.embedding_size}\n\n{results_markdown(results)}",
            tags={
                "objective": card.objective,
                "architecture": card.architecture,
                "weights_hash": card.weights_hash,
                "tasks": ", ".join(card.tasks),
                "targets": ", ".join(target.name for target in cohort.targets),
                **{f"data/{task}": identity for task, identity in card.data.items()},
            },
        )
    run.summary(results)

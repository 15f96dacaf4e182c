"""Patch tasks, encoders, and probes of their embeddings."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import torch

from nic_assets.assets import checks
from nic_assets.assets.inputs import ENCODER_ENTRY, PATCH_TASK_SOURCE, report_versions
from nic_assets.orchestration.batches import Events, Product, batch_asset, materialize_each
from nic_assets.orchestration.executors import CPU_TAGS, GPU_POOL, GPU_TAGS
from nic_assets.orchestration.metadata import code_version, figure, figures, log_progress, table
from nic_assets.partitions import Partitions
from nic_assets.tags import EARLIER_PARTITIONS, PARTIAL_INPUTS
from nic_assets.tracking import TrackedRun, Tracking, TrackingError
from nic_core import steps
from nic_core.cohort import (
    Cohort,
    CohortError,
    EncoderSpec,
    FeaturesEncoder,
    Geometry,
    RegisteredEncoder,
)
from nic_core.devices import leased_device
from nic_core.encoders import Encoder, EncoderCard, EncoderError
from nic_core.encoders.figures import patch_examples
from nic_core.encoders.files import PROGRAMS
from nic_core.grids.features import FeaturesError
from nic_core.reports import encoder_results, probe_results, results_markdown
from nic_core.store import PatchTaskKey, Store

FINDINGS_SHOWN = 50


def encoder_assets(partitions: Partitions) -> list[dg.AssetsDefinition]:
    """Return the assets of group ``encoders``."""
    settings = partitions.cohort.settings

    @batch_asset(
        checks=checks.PATCH_TASK_CHECKS,
        partitions_def=partitions.patch_tasks,
        deps=[dg.AssetDep(PATCH_TASK_SOURCE, partition_mapping=partitions.patch_tasks_of_sources)],
        group_name="encoders",
        kinds={"numpy", "parquet"},
        op_tags=CPU_TAGS,
        code_version=code_version(6, settings.tissue),
    )
    def patch_task(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """The patches of a patch task in the size and um/px of an encoder, split by patient."""

        def make(key: PatchTaskKey) -> Product:
            dataset = steps.make_patch_task(
                cohort, store, key, log_progress(context, "images, each counted twice")
            )
            return Product(
                version=dataset.identity[:16],
                metadata={
                    "dagster/row_count": dataset.table.height,
                    "organ": dataset.organ,
                    "groups": dataset.table["group"].n_unique(),
                    "examples": figure(patch_examples(dataset), f"patches of {key.task}"),
                    "classes": table(dataset.counts()),
                    "findings_by_kind": table(dataset.findings_by_kind()),
                    "findings": table(dataset.findings.head(FINDINGS_SHOWN)),
                    "folder": dg.MetadataValue.path(store.patch_task(key)),
                },
                checks={check: check(dataset) for check in checks.PATCH_TASK_CHECKS},
            )

        yield from materialize_each(
            context,
            make,
            parse=PatchTaskKey.parse,
            path=store.patch_task,
            expected=(CohortError,),
        )

    @batch_asset(
        checks=[checks.beats_chance],
        partitions_def=partitions.encoders,
        deps=[
            ENCODER_ENTRY,
            *(
                [dg.AssetDep(patch_task, partition_mapping=partitions.patch_tasks_of_encoders)]
                if partitions.cohort.seen_patch_tasks
                else []
            ),
        ],
        group_name="encoders",
        kinds={"pytorch", "mlflow"},
        pool=GPU_POOL,
        op_tags=GPU_TAGS,
        metadata={EARLIER_PARTITIONS: steps.encoder_bases(partitions.cohort)},
        code_version=code_version(5),
    )
    def encoder(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
        tracking: dg.ResourceParam[Tracking],
    ) -> Events:
        """A trained or imported encoder: patch to embedding, with its classification heads.

        For embeddings that other software computed, its card alone. An encoder that reuses or
        starts from another one of the study is made after it.
        """

        def make(name: str) -> Product:
            entry = cohort.encoder(name)
            if isinstance(entry, RegisteredEncoder):
                card, metadata = fetch_encoder(entry, cohort, store, tracking)
            elif isinstance(entry, FeaturesEncoder):
                card, metadata = steps.make_features_encoder(cohort, store, name), {}
            else:
                card, metadata = train_encoder(context, name, cohort, store, tracking, device)
            report_entries(context.instance, name, cohort, store)
            return Product(
                version=card.weights_hash[:16],
                metadata={
                    **metadata,
                    **{
                        f"{task}_balanced_accuracy": scores.balanced_accuracy
                        for task, scores in card.scores.items()
                    },
                    "test_scores": table(encoder_results(card)),
                    "folder": dg.MetadataValue.path(store.encoder(name)),
                },
                checks={checks.beats_chance: checks.beats_chance(card)},
            )

        with leased_device() as device:
            yield from materialize_each(
                context,
                make,
                parse=str,
                path=store.encoder,
                earlier=steps.encoder_bases(cohort),
                expected=(EncoderError, FeaturesError, TrackingError),
            )

    @batch_asset(
        checks=[checks.test_patients_unseen],
        partitions_def=partitions.networks,
        deps=[
            dg.AssetDep(encoder, partition_mapping=partitions.networks_of_encoders),
            dg.AssetDep(patch_task, partition_mapping=partitions.patch_tasks_of_probes),
        ],
        group_name="encoders",
        kinds={"scikitlearn", "mlflow"},
        tags=PARTIAL_INPUTS,
        op_tags=CPU_TAGS,
        code_version=code_version(1),
    )
    def encoder_probe(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
        tracking: dg.ResourceParam[Tracking],
    ) -> Events:
        """Scores of simple classifiers on an encoder's embeddings, for every patch task."""

        def make(name: str) -> Product:
            with tracking.run(
                context,
                cohort=cohort,
                partition=name,
                experiment="probes",
                product=store.encoder_probe(name),
            ) as run:
                scores, drawings = steps.make_encoder_probe(cohort, store, name)
                run.summary(probe_results(name, scores))
                for title, drawing in drawings.items():
                    run.figure(title, drawing)
            leaks = steps.leaked_groups(cohort, store, name)
            return Product(
                version=steps.digest(scores.rows()),
                metadata={
                    "scores": table(scores),
                    **figures(drawings),
                    "file": dg.MetadataValue.path(store.encoder_probe(name)),
                    "mlflow_run": dg.MetadataValue.url(run.url),
                },
                checks={checks.test_patients_unseen: checks.test_patients_unseen(leaks)},
            )

        yield from materialize_each(
            context,
            make,
            parse=str,
            path=store.encoder_probe,
            expected=(EncoderError, TrackingError),
        )

    return [patch_task, encoder, encoder_probe] if partitions.cohort.seen_patch_tasks else [encoder]


def report_entries(instance: dg.DagsterInstance, base: str, cohort: Cohort, store: Store) -> None:
    """Report the version of each entry that reuses or starts from the encoder ``base``.

    Dagster has no dependencies between partitions of one asset, so other weights of the base are a
    new version of the entry.
    """
    changed = {name for name, used in steps.encoder_bases(cohort).items() if used == base}
    if changed:
        versions = steps.encoder_versions(cohort, store)
        report_versions(instance, ENCODER_ENTRY, {name: versions[name] for name in changed})


def fetch_encoder(
    entry: RegisteredEncoder, cohort: Cohort, store: Store, tracking: Tracking
) -> tuple[EncoderCard, dict[str, Any]]:
    """Import a registered encoder from MLflow; return its card and its metadata for the UI."""
    with tracking.download_encoder(entry) as (imported, page):
        made = steps.make_encoder(cohort.with_encoder(imported), store, entry.name)
    return made.encoder.card, {"mlflow_model": dg.MetadataValue.url(page)}


def train_encoder(
    context: dg.AssetExecutionContext,
    name: str,
    cohort: Cohort,
    store: Store,
    tracking: Tracking,
    device: str,
) -> tuple[EncoderCard, dict[str, Any]]:
    """Train an encoder, or import it from its file, and log it to MLflow.

    Returns its card and its metadata for the UI.
    """
    with tracking.run(
        context,
        cohort=cohort,
        partition=name,
        experiment="encoders",
        product=store.encoder(name),
    ) as run:
        with initial_download(cohort, name, tracking) as downloaded:
            encoder = steps.make_encoder(
                cohort,
                store,
                name,
                run,
                log_progress(context, "patches"),
                device=device,
                downloaded=downloaded,
            ).encoder
        log_encoder(run, encoder, cohort, store)
    steps.remove_checkpoint(store, name)
    pages = {"mlflow_run": run.url} | ({"mlflow_model": run.page} if run.page else {})
    return encoder.card, {
        **figures(run.figures),
        **{title: dg.MetadataValue.url(page) for title, page in pages.items()},
    }


def trained_patch_task(card: EncoderCard, task: str) -> PatchTaskKey:
    """Return the key of a patch task as the encoder saw it in its training."""
    geometry = Geometry(card.patch, card.task_mpp[task], card.patch)
    return PatchTaskKey(geometry=geometry.name, task=task)


@contextmanager
def initial_download(cohort: Cohort, name: str, tracking: Tracking) -> Iterator[Path | None]:
    """Download the registered encoder that a training starts from; None without one."""
    entry = cohort.encoder(name)
    registered = entry.registered_start if isinstance(entry, EncoderSpec) else None
    if registered is None:
        yield None
        return
    with tracking.download_encoder(registered) as (imported, _):
        yield imported.file


def log_encoder(run: TrackedRun, encoder: Encoder, cohort: Cohort, store: Store) -> None:
    """Log an encoder's card, data, files and scores to MLflow, and register a version of it."""
    card, results = encoder.card, encoder_results(encoder.card)
    run.card(card.model_dump(mode="json"))
    run.inputs(
        {
            f"patch_task/{task}": (store.patch_task(trained_patch_task(card, task)), identity)
            for task, identity in card.data.items()
        }
    )
    # an imported encoder has its own file, and a network archive cannot be exported again
    if card.objective != "imported":
        run.files(store.encoder(card.name))
    if card.architecture not in PROGRAMS:
        run.register(
            encoder.module,
            torch.zeros((2, 3, card.patch, card.patch), dtype=torch.uint8),
            name=f"encoder-{card.name}",
            description=f"{card.objective}: patch of {card.patch} px at {card.mpp:g} um/px to "
            f"embedding of {card.embedding_size}\n\n{results_markdown(results)}",
            tags={
                "objective": card.objective,
                "architecture": card.architecture,
                "weights_hash": card.weights_hash,
                "patch": f"{card.patch}",
                "mpp": f"{card.mpp:g}",
                "embedding_size": f"{card.embedding_size}",
                **({} if card.preset is None else {"preset": card.preset}),
                "tasks": ", ".join(card.tasks),
                "targets": ", ".join(target.name for target in cohort.targets),
                **{f"data/{task}": identity for task, identity in card.data.items()},
                **{f"mpp/{task}": f"{mpp:g}" for task, mpp in card.task_mpp.items()},
                **initial_weights_tags(card),
            },
        )
    run.summary(results)


def initial_weights_tags(card: EncoderCard) -> dict[str, str]:
    """Return the origin and hash of the weights that a training started from, as tags."""
    start = card.initial_weights
    if start is None:
        return {}
    return {"initial_weights": start.origin, "initial_weights_hash": start.weights_hash}

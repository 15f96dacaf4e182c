"""Patch tasks, encoders, and probes of their embeddings."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from nic_assets.assets import checks
from nic_assets.assets.inputs import ENCODER_ENTRY, PATCH_TASK_SOURCE, report_versions
from nic_assets.orchestration.batches import Events, Product, batch_asset, materialize_each
from nic_assets.orchestration.executors import CPU_TAGS, GPU_POOL, GPU_TAGS
from nic_assets.orchestration.metadata import (
    code_version,
    figure,
    figures,
    log_progress,
    picture,
    table,
)
from nic_assets.partitions import Partitions
from nic_assets.tags import EARLIER_PARTITIONS, PARTIAL_INPUTS
from nic_assets.tracking import Tracking, TrackingError
from nic_assets.tracking.experiments import ENCODERS
from nic_assets.tracking.resource import git_commit, training_tags
from nic_core import steps
from nic_core.cohort import (
    Cohort,
    CohortError,
    EncoderSpec,
    FeaturesEncoder,
    RegisteredEncoder,
)
from nic_core.store import PatchTaskKey, Store

if TYPE_CHECKING:
    from nic_core.encoders import EncoderCard

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
        code_version=code_version(9, settings.tissue),
    )
    def patch_task(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """The patches of a patch task in the size and um/px of an encoder, split by patient."""

        def make(key: PatchTaskKey) -> Product:
            from nic_core.encoders.figures import patch_examples

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
        kinds={"pytorch"},
        pool=GPU_POOL,
        op_tags=GPU_TAGS,
        metadata={EARLIER_PARTITIONS: steps.encoder_bases(partitions.cohort)},
        code_version=code_version(7),
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
        from nic_core.devices import leased_device
        from nic_core.encoders import EncoderError
        from nic_core.grids.features import FeaturesError

        def make(name: str) -> Product:
            from nic_core.reports import encoder_results

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
        kinds={"scikitlearn"},
        tags=PARTIAL_INPUTS,
        op_tags=CPU_TAGS,
        code_version=code_version(3, partitions.cohort.settings.compression.precision),
    )
    def encoder_probe(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """Scores of simple classifiers on an encoder's embeddings, for every patch task."""
        from nic_core.encoders import EncoderError

        def make(name: str) -> Product:
            scores, drawings = steps.make_encoder_probe(cohort, store, name)
            leaks = steps.leaked_groups(cohort, store, name)
            similarity = steps.encoder_similarity(cohort, store, name)
            return Product(
                version=steps.digest(scores.rows()),
                metadata={
                    "scores": table(scores),
                    **({} if similarity is None else {"grids_and_float32": table(similarity)}),
                    **figures(drawings),
                    "file": dg.MetadataValue.path(store.encoder_probe(name)),
                },
                checks={checks.test_patients_unseen: checks.test_patients_unseen(leaks)},
            )

        yield from materialize_each(
            context,
            make,
            parse=str,
            path=store.encoder_probe,
            expected=(EncoderError,),
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
) -> "tuple[EncoderCard, dict[str, Any]]":
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
) -> "tuple[EncoderCard, dict[str, Any]]":
    """Train an encoder, or import it from its file; return its card and its metadata for the UI."""
    from nic_assets.tracking.publications import encoder_run_name
    from nic_core.steps.encoders import AUGMENTED_PATCHES

    commit = git_commit()
    tags = training_tags(cohort, "encoder", name, run=context.run.run_id, commit=commit)
    with (
        tracking.live_curves(
            context, tags, experiment=ENCODERS, name=encoder_run_name(cohort, name)
        ) as curves,
        initial_download(cohort, name, tracking) as downloaded,
    ):
        card = steps.make_encoder(
            cohort,
            store,
            name,
            curves,
            log_progress(context, "patches"),
            device=device,
            downloaded=downloaded,
        ).encoder.card
    folder = store.encoder(name)
    return card, {
        **figures(steps.encoder_figures(folder)),
        **augmented_patches(folder / AUGMENTED_PATCHES),
        **({} if commit is None else {"commit": commit}),
    }


def augmented_patches(path: Path) -> dict[str, dg.MarkdownMetadataValue]:
    """Return the picture of augmented patches, if the encoder was trained on patches."""
    from nic_core.pictures import read_picture

    if not path.exists():
        return {}
    return {"augmented_patches": picture(read_picture(path), path.stem)}


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

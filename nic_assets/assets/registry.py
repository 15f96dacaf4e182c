"""Registration: encoders and slide models in MLflow, published from their finished folders."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import dagster as dg

from nic_assets.assets import checks
from nic_assets.assets.inputs import ENCODER_ENTRY
from nic_assets.orchestration.batches import (
    Events,
    Product,
    batch_asset,
    latest_record,
    materialize_each,
)
from nic_assets.orchestration.executors import CPU_TAGS
from nic_assets.orchestration.metadata import code_version
from nic_assets.orchestration.partition_checks import Results
from nic_assets.partitions import Partitions
from nic_assets.tags import REFRESH_TAG
from nic_assets.tracking import ModelFormatError, Tracking, TrackingError
from nic_assets.tracking.resource import training_tags
from nic_core import steps
from nic_core.cohort import Cohort
from nic_core.store import ModelKey, Store

if TYPE_CHECKING:
    from nic_assets.tracking.runs import Published

HOURLY = {REFRESH_TAG: "hourly"}


def registry_assets(partitions: Partitions) -> list[dg.AssetsDefinition]:
    """Return the assets of group ``registry``."""

    @batch_asset(
        partitions_def=partitions.own_encoders,
        deps=[
            # the entry's um/px is registered, but does not change the weights
            dg.AssetDep(ENCODER_ENTRY, partition_mapping=partitions.own_of_encoders),
            dg.AssetDep("encoder", partition_mapping=partitions.own_of_encoders),
        ],
        group_name="registry",
        kinds={"mlflow"},
        tags=HOURLY,
        op_tags=CPU_TAGS,
        code_version=code_version(1),
    )
    def registered_encoder(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
        tracking: dg.ResourceParam[Tracking],
    ) -> Events:
        """An encoder in MLflow: run with curves and scores, and a version of `encoder-<name>`."""
        from nic_core.encoders import EncoderError

        def make(name: str) -> Product:
            from nic_assets.tracking.publications import encoder_publication
            from nic_assets.tracking.runs import publish

            tags = recorded_training(context.instance, cohort, "encoder", name)
            publication = encoder_publication(cohort, store, name, tags)
            published = publish(tracking, publication, warn=context.log.warning)
            return registered(publication.content_hash, published, tracking)

        yield from materialize_each(
            context,
            make,
            parse=str,
            path=store.encoder,
            expected=(EncoderError, ModelFormatError, TrackingError),
        )

    @batch_asset(
        checks=[checks.above_permutation_control, checks.compared_with_champion],
        partitions_def=partitions.models,
        deps=["slide_model"],
        group_name="registry",
        kinds={"mlflow"},
        tags=HOURLY,
        op_tags=CPU_TAGS,
        code_version=code_version(1),
    )
    def registered_model(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
        tracking: dg.ResourceParam[Tracking],
    ) -> Events:
        """A slide model in MLflow: run, and a version of `model-<target>`, compared with the
        champion."""
        from nic_core.models.files import ModelFileError

        def make(key: ModelKey) -> Product:
            from nic_assets.tracking.publications import model_publication
            from nic_assets.tracking.runs import publish, settle_champion
            from nic_core.models.comparison import compare_with_champion, permutation_control

            tags = recorded_training(context.instance, cohort, "slide_model", str(key))
            result, card = steps.read_slide_model(store.slide_model(key))
            publication = model_publication(cohort, store, key, tags, (result, card))
            published = publish(tracking, publication, warn=context.log.warning)
            assert published.version is not None  # the networks of a slide model can be exported
            control = permutation_control(result)
            verdict = settle_champion(
                tracking,
                published.version,
                lambda champion: compare_with_champion(
                    result,
                    champion,
                    control,
                    encoder=card.encoder,
                    weights_hash=card.weights_hash,
                ),
            )
            return registered(
                publication.content_hash,
                published,
                tracking,
                metadata={"champion": verdict.explanation},
                results={
                    checks.above_permutation_control: checks.above_permutation_control(control),
                    checks.compared_with_champion: checks.compared_with_champion(verdict),
                },
            )

        yield from materialize_each(
            context,
            make,
            parse=ModelKey.parse,
            path=store.slide_model,
            expected=(ModelFileError, ModelFormatError, TrackingError),
        )

    return [
        *([registered_encoder] if partitions.own_encoders.get_partition_keys() else []),
        *([registered_model] if partitions.cohort.targets else []),
    ]


def recorded_training(
    instance: dg.DagsterInstance, cohort: Cohort, asset: str, partition: str
) -> dict[str, str]:
    """Return the tags of the training that made a product, as Dagster recorded it.

    Without a record, after `dagster run wipe` for example, they do not name a run and commit.
    """
    record = latest_record(instance, dg.AssetKey(asset), partition)
    event = None if record is None else record.asset_materialization
    commit = None if event is None else event.metadata.get("commit")
    return training_tags(
        cohort,
        asset,
        partition,
        run=None if record is None else record.run_id,
        commit=None if commit is None else str(commit.value),
    )


def registered(
    content_hash: str,
    published: "Published",
    tracking: Tracking,
    metadata: Mapping[str, str] | None = None,
    results: Results | None = None,
) -> Product:
    """Return the product of a registration."""
    version = published.version
    number = None if version is None else str(version.version)  # some servers give a number
    pages = {"mlflow_run": published.url}
    if version is not None:
        pages["mlflow_model"] = tracking.page(version.name, version.version)
    return Product(
        version=steps.digest(content_hash, number),
        metadata={
            **(metadata or {}),
            **({} if number is None else {"version": number}),
            **{title: dg.MetadataValue.url(page) for title, page in pages.items()},
        },
        checks=results or {},
    )

"""Evaluations of slide models on the cohorts of other hospitals."""

import dagster as dg

from nic_assets.assets.inputs import EXTERNAL_COHORT
from nic_assets.orchestration.batches import Events, Product, batch_asset, materialize_each
from nic_assets.orchestration.executors import GPU_POOL, GPU_TAGS
from nic_assets.orchestration.metadata import code_version, figures, table
from nic_assets.partitions import Partitions
from nic_core import steps
from nic_core.cohort import Cohort, CohortError
from nic_core.store import ExternalKey, Store


def external_evaluation_assets(partitions: Partitions) -> list[dg.AssetsDefinition]:
    """Return the asset ``external_evaluation``; none for a cohort without external cohorts."""
    if not partitions.cohort.external:
        return []

    @batch_asset(
        partitions_def=partitions.external_evaluations,
        deps=[
            dg.AssetDep(
                EXTERNAL_COHORT,
                partition_mapping=dg.MultiToSingleDimensionPartitionMapping("cohort"),
            ),
            dg.AssetDep(
                "champion", partition_mapping=dg.MultiToSingleDimensionPartitionMapping("target")
            ),
        ],
        group_name="predictions",
        kinds={"pytorch", "parquet"},
        pool=GPU_POOL,
        op_tags=GPU_TAGS,
        code_version=code_version(2),
    )
    def external_evaluation(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """The frozen model of a target on another hospital's slides: metrics, calibration,
        subgroups."""
        from nic_core.devices import leased_device
        from nic_core.encoders import EncoderError
        from nic_core.models.files import ModelFileError
        from nic_core.models.prediction import ModelMismatchError

        def make(key: ExternalKey) -> Product:
            from nic_core.models.kinds import kind_of

            try:
                made = steps.make_external_evaluation(cohort, store, key, device=device)
            except steps.NoChampionError as error:
                steps.remove_external_evaluation(store, key)
                problem = str(error)
                return Product(version=steps.digest(problem), metadata={"not_evaluated": problem})
            for slide, reason in made.left_out.iter_rows():
                context.log.warning(f"{key}: slide '{slide}' is left out: {reason}")
            primary = kind_of(made.card.target).primary_metric
            return Product(
                version=steps.digest(
                    made.predictions.rows(), made.metrics.rows(), made.subgroups.rows()
                ),
                metadata={
                    "metrics": table(made.metrics),
                    "subgroups": table(made.subgroups.filter(metric=primary)),
                    **figures(made.figures),
                    "encoder": made.card.encoder,
                    "units": made.predictions.height,
                    "patients": made.predictions["patient"].n_unique(),
                    "left_out_count": made.left_out.height,
                    "left_out": table(made.left_out),
                    "labels_without_slide": list(map(str, made.matches.labels_without_slide)),
                    "folder": dg.MetadataValue.path(store.external_evaluation(key)),
                },
            )

        with leased_device() as device:
            yield from materialize_each(
                context,
                make,
                parse=ExternalKey.parse,
                path=store.external_evaluation,
                expected=(CohortError, EncoderError, ModelFileError, ModelMismatchError),
            )

    return [external_evaluation]

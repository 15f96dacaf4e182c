"""Probability maps with their scores, and the evaluation report."""

from collections.abc import Sequence

import dagster as dg

from nic_assets.orchestration.batches import Events, Product, batch_asset, materialize_each
from nic_assets.orchestration.executors import CPU_TAGS
from nic_assets.orchestration.metadata import OWNERS, code_version, figure, picture, table
from nic_assets.orchestration.partition_checks import failed_checks
from nic_assets.orchestration.retries import retried_asset, retry_transient_errors
from nic_assets.partitions import Partitions
from nic_assets.tags import PARTIAL_INPUTS, REFRESH_TAG
from nic_core import steps
from nic_core.cohort import Cohort, CohortError
from nic_core.store import MapKey, Store


def report_assets(
    partitions: Partitions, check_specs: Sequence[dg.AssetCheckSpec]
) -> list[dg.AssetsDefinition]:
    """Return the assets of group ``reports``.

    Parameters
    ----------
    check_specs
        The checks of all other assets, whose failures the evaluation report lists.
    """
    cohort = partitions.cohort
    maps = _map_assets(partitions) if cohort.maps else []

    @retried_asset(
        deps=[
            "encoder",
            *(["encoder_probe"] if cohort.seen_patch_tasks else []),
            *(["slide_model"] if cohort.targets else []),
            *maps[1:],
        ],
        group_name="reports",
        kinds={"polars", "parquet"},
        owners=OWNERS,
        tags=PARTIAL_INPUTS,
        op_tags=CPU_TAGS,
        code_version=code_version(7, cohort.name),
    )
    def evaluation_report(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """All scores of the study with intervals, and the report as one HTML file."""
        from nic_core.reports import primary_folds
        from nic_core.steps.evaluation_report import HTML

        checks = failed_checks(context.instance, check_specs)
        with retry_transient_errors():
            report = steps.make_evaluation_report(cohort, store, checks)
        yield dg.MaterializeResult(
            data_version=dg.DataVersion(
                steps.digest(
                    report.results.rows(),
                    report.folds.rows(),
                    report.encoders.rows(),
                    report.comparisons.rows(),
                    report.notes,
                )
            ),
            metadata={
                "results": table(report.results),
                "folds": table(primary_folds(report.folds)),
                "encoders": table(report.encoders),
                "comparisons": table(report.comparisons),
                "notes": report.notes,
                **{name: figure(drawing, name) for name, drawing in report.figures.items()},
                "report": dg.MetadataValue.path(store.evaluation_report / HTML),
                "folder": dg.MetadataValue.path(store.evaluation_report),
                "dagster/row_count": report.results.height,
            },
        )

    return [*maps, evaluation_report]


def _map_assets(partitions: Partitions) -> list[dg.AssetsDefinition]:
    @batch_asset(
        partitions_def=partitions.slide_maps,
        deps=[dg.AssetDep("grid", partition_mapping=partitions.grids_of_maps)],
        group_name="reports",
        kinds={"pytorch", "image"},
        op_tags=CPU_TAGS,
        code_version=code_version(3, partitions.cohort.maps),
    )
    def probability_map(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """The probability of one class in every cell of a slide, by the encoder's own head."""
        from nic_core.slides import SlideError

        def make(key: MapKey) -> Product:
            cells, overlay = steps.make_probability_map(cohort, store, key)
            return Product(
                version=steps.digest(cells.rows()),
                metadata={
                    "overlay": picture(overlay, f"{key.map} on {key.slide}"),
                    "dagster/row_count": cells.height,
                    "file": dg.MetadataValue.path(store.probability_map(key)),
                },
            )

        yield from materialize_each(
            context,
            make,
            parse=MapKey.parse,
            path=store.probability_map,
            expected=(SlideError, CohortError),
        )

    @batch_asset(
        partitions_def=partitions.maps,
        deps=[probability_map],
        group_name="reports",
        kinds={"polars", "parquet"},
        tags={REFRESH_TAG: "eager", **PARTIAL_INPUTS},
        op_tags=CPU_TAGS,
        code_version=code_version(1, partitions.cohort.maps),
    )
    def map_scores(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """AUC of a map's cells against the truth masks of the slides that have one."""

        def make(name: str) -> Product:
            scores = steps.make_map_scores(cohort, store, name)
            return Product(version=steps.digest(scores.rows()), metadata={"scores": table(scores)})

        yield from materialize_each(context, make, parse=str, expected=(CohortError,))

    return [probability_map, map_scores]

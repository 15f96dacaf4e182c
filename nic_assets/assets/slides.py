"""Slide index, slides with their tissue masks, and patch tables."""

from functools import partial
from typing import TYPE_CHECKING

import dagster as dg
import polars as pl

from nic_assets.assets import checks
from nic_assets.assets.inputs import (
    ENCODER_ENTRY,
    EXTERNAL_COHORT,
    PATCH_TASK_SOURCE,
    REGISTERED_CHAMPION,
    SLIDE_FILE,
    TARGET_ENTRY,
    ScanConfig,
    add_slides,
    drop_slides,
    known_versions,
    report_versions,
)
from nic_assets.orchestration.batches import (
    Events,
    Product,
    batch_asset,
    materialize_in_parallel,
)
from nic_assets.orchestration.executors import CPU_TAGS
from nic_assets.orchestration.metadata import (
    OWNERS,
    code_version,
    column_schema,
    figure,
    picture,
    table,
)
from nic_assets.orchestration.partition_checks import republish_checks
from nic_assets.orchestration.retries import retried_asset, retry_transient_errors
from nic_assets.partitions import Partitions
from nic_assets.tags import PARTIAL_INPUTS, REFRESH_TAG
from nic_assets.tracking import Tracking
from nic_assets.tracking.champions import champion_versions
from nic_core import steps
from nic_core.cohort import Cohort
from nic_core.store import PatchTableKey, Store
from nic_core.types import Pixels
from nic_core.view.addresses import TISSUE_LAYER, slide_page

if TYPE_CHECKING:
    from nic_core.steps.slides import SlideRecord


def slide_assets(partitions: Partitions) -> list[dg.AssetsDefinition]:
    """Return the assets of group ``slides``."""
    from nic_core.tiling.patches import PATCH_SCHEMA

    settings = partitions.cohort.settings
    finest = min(geometry.mpp for geometry in partitions.cohort.geometries.values())

    @retried_asset(
        group_name="slides",
        kinds={"polars", "parquet"},
        owners=OWNERS,
        tags={REFRESH_TAG: "always"},
        op_tags=CPU_TAGS,
        code_version=code_version(4),
        check_specs=[
            checks.slide_files_present.spec("slide_index"),
            checks.slides_distinct.spec("slide_index"),
        ],
    )
    def slide_index(
        context: dg.AssetExecutionContext,
        config: ScanConfig,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
        tracking: dg.ResourceParam[Tracking],
    ) -> Events:
        """Every slide of the cohort, with path, patient and split.

        Scans the inputs of the study and reports those that are new or changed.
        """
        from nic_core.slides.folders import summarize_left_aside

        with retry_transient_errors():
            scan = steps.scan_slides(cohort, store, **config.model_dump())
            encoders = [encoder.name for encoder in cohort.encoders]
            known = known_versions(context.instance, ENCODER_ENTRY, encoders)
            targets = [target.name for target in cohort.targets]
            champions = known_versions(context.instance, REGISTERED_CHAMPION, targets)
            versions = {
                SLIDE_FILE: scan.versions,
                PATCH_TASK_SOURCE: steps.patch_task_versions(cohort),
                ENCODER_ENTRY: steps.encoder_versions(cohort, store)
                | tracking.registered_versions(cohort, context.log.warning, known),
                TARGET_ENTRY: steps.target_versions(cohort, scan),
                EXTERNAL_COHORT: steps.external_versions(cohort, scan.snapshot),
                REGISTERED_CHAMPION: champion_versions(
                    tracking, cohort, context.log.warning, champions
                ),
            }
            steps.write_slide_index(store, scan)
        for slide, reason in scan.missing.items():
            context.log.warning(f"slide '{slide}' is left out: {reason}")
        left_aside = summarize_left_aside(scan.left_aside)
        for line in left_aside:
            context.log.info(f"no slide: {line}")
        excluded = steps.excluded_slides(scan.index)
        for slide, reason in excluded.items():
            context.log.info(f"slide '{slide}' is excluded from folds and models: {reason}")
        slides = scan.index["slide"].to_list()
        new = add_slides(context.instance, slides)
        if drop_slides(context.instance, slides) or new:
            keys = {
                "slide": partitions.slides,
                "patch_table": partitions.patch_tables,
                "grid": partitions.grids,
                **({"prediction": partitions.predictions} if cohort.targets else {}),
            }
            for asset, declared in keys.items():
                republish_checks(
                    context.instance, dg.AssetKey(asset), declared, checks.OF_SLIDES[asset]
                )
        changed = {
            key.to_user_string(): report_versions(context.instance, key, found)
            for key, found in versions.items()
        }
        duplicates = [list(slides) for slides in scan.duplicates]
        missing, same = checks.slide_files_present(scan), checks.slides_distinct(scan)
        yield dg.MaterializeResult(
            data_version=dg.DataVersion(steps.digest(scan.index.rows())),
            metadata={
                "slides": len(slides),
                "patients": scan.index["patient"].n_unique(),
                "new": new,
                "removed": scan.removed,
                "excluded": excluded,
                "changed": changed,
                "duplicates": duplicates,
                "left_aside": left_aside,
                "preview": table(scan.index.head(20).drop("path")),
                "dagster/column_schema": column_schema(scan.index.schema),
                "dagster/row_count": len(slides),
            },
            check_results=[
                checks.slide_files_present.result(
                    missing, missing=scan.missing, removed_since_last_scan=scan.removed
                ),
                checks.slides_distinct.result(same, duplicates=duplicates),
            ],
        )

    @batch_asset(
        checks=checks.OF_SLIDES["slide"],
        partitions_def=partitions.slides,
        deps=[SLIDE_FILE],
        group_name="slides",
        kinds={"image"},
        op_tags=CPU_TAGS,
        code_version=code_version(4),
    )
    def slide(
        context: dg.AssetExecutionContext,
        store: dg.ResourceParam[Store],
    ) -> Events:
        """Metadata, thumbnail and tissue mask of a slide."""
        from nic_core.slides import SlideError

        def describe(key: str, made: "tuple[SlideRecord, Pixels]") -> Product:
            record, outline = made
            return Product(
                version=steps.digest(record, outline.tobytes()),
                metadata={
                    "thumbnail": picture(outline, f"{key} with its tissue outlined"),
                    "look": dg.MetadataValue.url(slide_page(key, TISSUE_LAYER)),
                    "engine": record.engine,
                    "width": record.width,
                    "height": record.height,
                    "mpp": record.mpp,
                    "scanner": record.scanner or "not stated",
                    "levels": len(record.levels),
                    "image": record.image,
                    "images_left": [str(i) for i in record.images if i.number != record.image],
                    "tissue_mm2": round(record.tissue_mm2, 3),
                    "ink_share": round(record.ink_share, 4),
                    "folder": dg.MetadataValue.path(store.slide(key)),
                },
                checks={
                    checks.resolution_suffices: checks.resolution_suffices(record, finest),
                    checks.tissue_found: checks.tissue_found(record),
                    checks.free_of_ink: checks.free_of_ink(record),
                },
            )

        make = partial(steps.make_slide, store)
        yield from materialize_in_parallel(
            context, make, describe, parse=str, expected=(SlideError,)
        )

    @batch_asset(
        checks=checks.OF_SLIDES["patch_table"],
        partitions_def=partitions.patch_tables,
        deps=[slide],
        group_name="slides",
        kinds={"polars", "parquet"},
        op_tags=CPU_TAGS,
        code_version=code_version(5, settings.tissue),
        metadata={"dagster/column_schema": column_schema(pl.Schema(PATCH_SCHEMA))},
    )
    def patch_table(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """A slide divided into the cells of a geometry: position, tissue fraction, focus and
        colour of each, and whether its patch is kept or why not."""
        from nic_core.slides import SlideError

        def describe(key: PatchTableKey, cells: pl.DataFrame) -> Product:
            from nic_core.tiling.quality import summarize

            return Product(
                version=steps.digest(cells.rows()),
                metadata={
                    "dagster/row_count": cells.height,
                    **summarize(cells),
                    "rows": cells["row"].n_unique(),
                    "columns": cells["column"].n_unique(),
                    "file": dg.MetadataValue.path(store.patch_table(key)),
                },
                checks={
                    checks.schema_valid: checks.schema_valid(store, key),
                    checks.cells_decodable: checks.cells_decodable(cells),
                },
            )

        make = partial(steps.make_patch_table, cohort, store)
        yield from materialize_in_parallel(
            context, make, describe, parse=PatchTableKey.parse, expected=(SlideError,)
        )

    @retried_asset(
        deps=[patch_table, slide_index],
        group_name="slides",
        kinds={"polars", "image"},
        owners=OWNERS,
        tags=PARTIAL_INPUTS,
        op_tags=CPU_TAGS,
        code_version=code_version(2),
        check_specs=[checks.slides_comparable.spec("quality_report")],
    )
    def quality_report(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """Blur, ink, colour and tissue of every slide, compared with the other slides."""
        with retry_transient_errors():
            report = steps.make_quality_report(cohort, store)
        for slide, problems, _ in report.outliers.filter(pl.col("exclude").is_null()).rows():
            context.log.warning(f"slide '{slide}': {problems}")
        problem = checks.slides_comparable(report)
        yield dg.MaterializeResult(
            data_version=dg.DataVersion(steps.digest(report.slides.rows())),
            metadata={
                "outliers": table(report.outliers),
                "excluded": steps.excluded_slides(report.slides),
                "without_patch_table": report.without_patch_table,
                **({"thumbnails": figure(report.figure, "outliers")} if report.figure else {}),
                "folder": dg.MetadataValue.path(store.quality_report),
                "dagster/row_count": report.slides.height,
            },
            check_results=[checks.slides_comparable.result(problem)],
        )

    return [slide_index, slide, patch_table, quality_report]

"""From files to patch tables: the slide index, the opened slide, the patch table."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg

from nic_assets.batches import Product, materialize_each
from nic_assets.executors import CPU_TAGS
from nic_assets.inputs import (
    ENCODER_ENTRY,
    PATCH_TASK_SOURCE,
    SLIDE_FILE,
    TARGET_ENTRY,
    add_slides,
    drop_slides,
    report_versions,
)
from nic_assets.metadata import OWNERS, code_version, column_schema, digest, picture, table
from nic_assets.partitions import Partitions
from nic_assets.inputs import LOOKS_TAG
from nic_core import steps
from nic_core.cohort import Cohort
from nic_core.patches import PATCH_SCHEMA
from nic_core.slides import SlideError
from nic_core.store import Store


def slide_assets(partitions: Partitions) -> list[dg.AssetsDefinition]:
    """The assets of this layer, for one cohort."""
    settings = partitions.cohort.settings

    @dg.asset(
        group_name="slides",
        kinds={"polars", "parquet"},
        owners=OWNERS,
        tags={LOOKS_TAG: "outside"},
        op_tags=CPU_TAGS,
        code_version=code_version(1),
    )
    def slide_index(
        context: dg.AssetExecutionContext, cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> dg.MaterializeResult:
        """Every slide of the cohort: path, patient, split. Finds new and changed inputs."""
        index = steps.index_slides(cohort, store)
        new = add_slides(context.instance, index["slide"].to_list())
        gone = drop_slides(context.instance, index["slide"].to_list())
        changed = {
            asset: report_versions(context.instance, asset, versions)
            for asset, versions in (
                (SLIDE_FILE, steps.slide_versions(index)),
                (PATCH_TASK_SOURCE, steps.patch_task_versions(cohort)),
                (ENCODER_ENTRY, steps.encoder_versions(cohort)),
                (TARGET_ENTRY, steps.target_versions(cohort, index)),
            )
        }
        return dg.MaterializeResult(
            data_version=dg.DataVersion(digest(index.rows())),
            metadata={
                "slides": index.height,
                "patients": index["patient"].n_unique(),
                "new": new,
                "gone": gone,
                "changed": {asset.to_user_string(): keys for asset, keys in changed.items()},
                "preview": table(index.head(20).drop("path")),
                "dagster/column_schema": column_schema(index.schema),
                "dagster/row_count": index.height,
            },
        )

    @dg.asset(
        partitions_def=partitions.slides,
        backfill_policy=dg.BackfillPolicy.single_run(),
        deps=[SLIDE_FILE],
        group_name="slides",
        kinds={"image"},
        owners=OWNERS,
        op_tags=CPU_TAGS,
        code_version=code_version(1),
        output_required=False,
        check_specs=[
            dg.AssetCheckSpec("mpp_known", asset="slide"),
            dg.AssetCheckSpec("tissue_found", asset="slide"),
        ],
    )
    def slide(
        context: dg.AssetExecutionContext, cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        """An opened slide: metadata, thumbnail and tissue mask."""

        def work(key: str) -> Product:
            record, outline = steps.prepare_slide(cohort, store, key)
            return Product(
                version=record.version,
                metadata={
                    "thumbnail": picture(outline, f"{key} with its tissue outlined"),
                    "engine": record.engine,
                    "width": record.width,
                    "height": record.height,
                    "mpp": record.mpp,
                    "levels": len(record.levels),
                    "tissue_mm2": round(record.tissue_mm2, 3),
                    "folder": dg.MetadataValue.path(store.slide(key)),
                },
                checks={
                    "mpp_known": steps.check_mpp(record),
                    "tissue_found": steps.check_tissue(record),
                },
            )

        yield from materialize_each(context, work, expected=(SlideError,))

    @dg.asset(
        partitions_def=partitions.slides,
        backfill_policy=dg.BackfillPolicy.single_run(),
        deps=[slide],
        group_name="slides",
        kinds={"polars", "parquet"},
        owners=OWNERS,
        op_tags=CPU_TAGS,
        code_version=code_version(1, settings.patch, settings.mpp, settings.tissue),
        output_required=False,
        metadata={"dagster/column_schema": column_schema(PATCH_SCHEMA)},
        check_specs=[dg.AssetCheckSpec("schema_valid", asset="patch_table")],
    )
    def patch_table(
        context: dg.AssetExecutionContext, cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        """One row a grid cell: place, tissue fraction, kept or not."""

        def work(key: str) -> Product:
            cells = steps.tabulate_patches(cohort, store, key)
            return Product(
                version=digest(cells.rows()),
                metadata={
                    "dagster/row_count": cells.height,
                    "kept": int(cells["kept"].sum()),
                    "rows": int(cells["row"].max()) + 1,
                    "columns": int(cells["column"].max()) + 1,
                    "file": dg.MetadataValue.path(store.patch_table(key)),
                },
                checks={"schema_valid": steps.check_patch_table(store, key)},
            )

        yield from materialize_each(context, work, expected=(SlideError,))

    return [slide_index, slide, patch_table]

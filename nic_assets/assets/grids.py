"""Grids: every slide compressed by every encoder, a manifest of each encoder's grids, previews."""

from functools import cache

import dagster as dg
import polars as pl

from nic_assets.assets import checks
from nic_assets.assets.inputs import SLIDE_FILE
from nic_assets.orchestration.batches import Events, Product, batch_asset, materialize_each
from nic_assets.orchestration.executors import CPU_TAGS, GPU_POOL, GPU_TAGS
from nic_assets.orchestration.metadata import code_version, log_progress, picture, table
from nic_assets.partitions import Partitions
from nic_assets.tags import PARTIAL_INPUTS, REFRESH_TAG
from nic_core import steps
from nic_core.cohort import Cohort, CohortError, FeaturesEncoder
from nic_core.store import GridKey, Store
from nic_core.view.addresses import grid_layer, slide_page

PICTURE_SIDE = 400  # px of the picture of a preview in the UI; more if the grid has more cells


def grid_assets(partitions: Partitions) -> list[dg.AssetsDefinition]:
    """Return the assets of group ``grids``."""

    @batch_asset(
        checks=checks.OF_SLIDES["grid"],
        partitions_def=partitions.grids,
        deps=[
            SLIDE_FILE,
            dg.AssetDep("patch_table", partition_mapping=partitions.patch_tables_of_grids),
            "encoder",
        ],
        group_name="grids",
        kinds={"zarr", "pytorch"},
        pool=GPU_POOL,
        op_tags=GPU_TAGS,
        code_version=code_version(4, partitions.cohort.settings.compression),
    )
    def grid(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """A compressed slide: the embedding of every kept patch, at its grid cell.

        Embeddings that other software computed are read from their files.
        """
        from nic_core.devices import leased_device
        from nic_core.encoders import EncoderError
        from nic_core.grids.features import FeaturesError
        from nic_core.slides import SlideError

        load = cache(lambda name: steps.prepare_encoder(cohort, store, name, device))

        def make(key: GridKey) -> Product:
            from nic_core.grids import recorded_hash

            if isinstance(cohort.encoder(key.encoder), FeaturesEncoder):
                made = steps.make_features_grid(cohort, store, key)
                covered = None  # other software decided which patches have an embedding
            else:
                progress = log_progress(context, "cells")
                made = steps.make_grid(cohort, store, load(key.encoder), key.slide, progress)
                covered = checks.covers_patch_table(made, steps.read_cells(cohort, store, key))
            embedding_size, rows, columns = made.shape
            profile = made.provenance.icc_profile
            version = recorded_hash(store.grid(key))  # computed while the grid was written
            assert version is not None
            return Product(
                version=version,
                metadata={
                    "look": dg.MetadataValue.url(slide_page(key.slide, grid_layer(key.encoder))),
                    "embedding_size": embedding_size,
                    "rows": rows,
                    "columns": columns,
                    "cells": int(made.valid.sum()),
                    "unreadable": made.provenance.unreadable,
                    "precision": made.provenance.precision,
                    "reading": made.provenance.reading,
                    "colours": made.provenance.colours,
                    "icc_profile": profile.description if profile else "none",
                    "store": dg.MetadataValue.path(store.grid(key)),
                },
                checks={
                    checks.covers_patch_table: covered,
                    checks.embeddings_finite: checks.embeddings_finite(made),
                    checks.embeddings_not_collapsed: checks.embeddings_not_collapsed(made),
                },
            )

        with leased_device() as device:
            yield from materialize_each(
                context,
                make,
                parse=GridKey.parse,
                path=store.grid,
                expected=(EncoderError, SlideError, FeaturesError),
            )

    @batch_asset(
        partitions_def=partitions.encoders,
        deps=["grid", "slide_index"],  # the index says which slides are excluded
        group_name="grids",
        kinds={"polars", "parquet"},
        tags={REFRESH_TAG: "eager", **PARTIAL_INPUTS},
        op_tags=CPU_TAGS,
        code_version=code_version(1),
    )
    def grid_manifest(
        context: dg.AssetExecutionContext,
        store: dg.ResourceParam[Store],
    ) -> Events:
        """The content hash and cells of every grid of an encoder, which its slide models read."""

        def make(encoder: str) -> Product:
            grids = steps.make_grid_manifest(store, encoder)
            return Product(
                version=steps.digest(grids.rows()),
                metadata={
                    "dagster/row_count": grids.height,
                    "without_grid": grids.filter(pl.col("hash").is_null())["slide"].to_list(),
                    "grids": table(grids.head(20)),
                },
            )

        yield from materialize_each(context, make, parse=str, path=store.grid_manifest, expected=())

    @batch_asset(
        partitions_def=partitions.encoders,
        deps=[grid_manifest],
        group_name="grids",
        kinds={"numpy", "json"},
        op_tags=CPU_TAGS,
        code_version=code_version(1),
    )
    def embedding_colours(
        context: dg.AssetExecutionContext,
        store: dg.ResourceParam[Store],
    ) -> Events:
        """Three principal components of an encoder's embeddings, the colours of its previews."""
        from nic_core.grids import GridError

        def make(encoder: str) -> Product:
            colours = steps.make_embedding_colours(store, encoder)
            return Product(
                version=colours.hash,
                metadata={
                    "slides": colours.slides,
                    "cells": colours.cells,
                    "file": dg.MetadataValue.path(store.embedding_colours(encoder)),
                },
            )

        yield from materialize_each(
            context,
            make,
            parse=str,
            path=store.embedding_colours,
            expected=(CohortError, GridError),
        )

    @batch_asset(
        partitions_def=partitions.grids,
        deps=[grid, embedding_colours],
        group_name="grids",
        kinds={"zarr", "image"},
        op_tags=CPU_TAGS,
        code_version=code_version(1),
    )
    def grid_preview(
        context: dg.AssetExecutionContext,
        store: dg.ResourceParam[Store],
    ) -> Events:
        """A grid as an RGB image for viewers, in colours that all slides of the encoder share."""
        from nic_core.grids import GridError

        def make(key: GridKey) -> Product:
            from nic_core.grids import enlarge, verify_preview

            drawn = steps.make_grid_preview(store, key)
            cell = max(1, PICTURE_SIDE // max(drawn.shape))
            return Product(
                version=verify_preview(store.grid_preview(key)),
                metadata={
                    "preview": picture(
                        enlarge(drawn, cell=cell), f"{key.slide}, coloured by embedding"
                    ),
                    "store": dg.MetadataValue.path(store.grid_preview(key)),
                },
            )

        yield from materialize_each(
            context, make, parse=GridKey.parse, path=store.grid_preview, expected=(GridError,)
        )

    return [grid, grid_manifest, embedding_colours, grid_preview]

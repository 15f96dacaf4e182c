"""A small asset graph of the platform's shape, with inputs and faults that a test sets.

Slide files and encoder entries are external. ``mask`` (by slide), ``encoder``, ``grid`` (by encoder
and slide), ``gathered`` (by encoder, from all its grids) and ``model`` are materialized. A data
version is the state of the inputs.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import dagster as dg

from nic_assets.assets.inputs import ENCODER_ENTRY, SLIDE_FILE, add_slides, report_versions
from nic_assets.orchestration.batches import Product, materialize_each
from nic_assets.orchestration.internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)
from nic_assets.partitions import SLIDES
from nic_assets.tags import PARTIAL_INPUTS, REFRESH_TAG

SLIDE_KEYS = ("s1", "s2", "s3")
ENCODERS = ("first", "second")


class BadSlideError(Exception):
    pass


class World:
    """The external inputs, the slides that fail, and a log of what was materialized."""

    def __init__(self, slides: Iterable[str] = SLIDE_KEYS, *, scan: bool = True) -> None:
        self.slides = dict.fromkeys(slides, "a")
        self.encoders = dict.fromkeys(ENCODERS, "a")
        self.bad: set[str] = set()
        self.code = "1"
        self.made: list[str] = []
        # called while a partition is being materialized
        self.meanwhile: Callable[[], None] = lambda: None
        self.instance = dg.DagsterInstance.ephemeral()
        add_slides(self.instance, list(self.slides))
        if scan:
            self.scan()

    def scan(self) -> None:
        """Report the present versions of the external inputs."""
        add_slides(self.instance, list(self.slides))
        report_versions(self.instance, SLIDE_FILE, self.slides)
        report_versions(self.instance, ENCODER_ENTRY, self.encoders)

    def assets(self) -> list[dg.AssetsDefinition]:
        encoders = dg.StaticPartitionsDefinition(list(ENCODERS))
        grids = dg.MultiPartitionsDefinition({"encoder": encoders, "slide": SLIDES})
        common: dict[str, Any] = {
            "backfill_policy": dg.BackfillPolicy.single_run(),
            "output_required": False,
            "code_version": self.code,
        }

        def each(context: dg.AssetExecutionContext, version) -> Iterator[Any]:
            name = context.asset_key.to_user_string()

            def work(key: str) -> Product:
                if key.split("|")[-1] in self.bad:
                    raise BadSlideError(f"{key} is cut short")
                self.made.append(f"{name} {key}")
                product = Product(version(key))
                self.meanwhile()
                return product

            yield from materialize_each(context, work, parse=str, expected=(BadSlideError,))

        @dg.asset(partitions_def=SLIDES, deps=[SLIDE_FILE], **common)
        def mask(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
            yield from each(context, lambda key: f"mask {self.slides[key]}")

        @dg.asset(partitions_def=encoders, deps=[ENCODER_ENTRY], **common)
        def encoder(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
            yield from each(context, lambda key: f"weights {self.encoders[key]}")

        @dg.asset(partitions_def=grids, deps=[SLIDE_FILE, mask, encoder], **common)
        def grid(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
            def version(key: str) -> str:
                name, slide = key.split("|")
                return f"{self.encoders[name]} of {self.slides[slide]}"

            yield from each(context, version)

        @dg.asset(
            partitions_def=encoders,
            deps=[grid],
            tags={REFRESH_TAG: "eager", **PARTIAL_INPUTS},
            **common,
        )
        def gathered(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
            yield from each(
                context, lambda key: f"{self.encoders[key]} of {sorted(self.slides.values())}"
            )

        @dg.asset(partitions_def=encoders, deps=[gathered], **common)
        def model(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
            yield from each(context, lambda key: f"model {sorted(self.slides.values())}")

        return [mask, encoder, grid, gathered, model]

    def definitions(self) -> dg.Definitions:
        encoders = dg.StaticPartitionsDefinition(list(ENCODERS))
        return dg.Definitions(
            assets=[
                dg.AssetSpec(SLIDE_FILE, partitions_def=SLIDES),
                dg.AssetSpec(ENCODER_ENTRY, partitions_def=encoders),
                *self.assets(),
            ]
        )

    def partitions(self, graph: Any) -> list[tuple[dg.AssetKey, str]]:
        return [
            (key, partition)
            for key in sorted(graph.materializable_asset_keys)
            for partition in graph.get(key).partitions_def.get_partition_keys(
                dynamic_partitions_store=self.instance
            )
        ]

    def make(self, asset: str, *keys: str) -> dg.ExecuteInProcessResult:
        """Materialize neighbouring partitions of an asset, or all, in one run."""
        graph = self.definitions().resolve_asset_graph()
        every = [p for key, p in self.partitions(graph) if key.to_user_string() == asset]
        if "|" in every[0] and not keys:
            for name in ENCODERS:
                result = self.make(asset, *(key for key in every if key.startswith(f"{name}|")))
            return result
        chosen = keys or every
        job = self.definitions().resolve_implicit_global_asset_job_def()
        return job.execute_in_process(
            instance=self.instance,
            asset_selection=[dg.AssetKey(asset)],
            tags={
                ASSET_PARTITION_RANGE_START_TAG: chosen[0],
                ASSET_PARTITION_RANGE_END_TAG: chosen[-1],
            },
            raise_on_error=False,
        )

    def make_all(self) -> None:
        for asset in ("mask", "encoder", "grid", "gathered", "model"):
            self.make(asset)

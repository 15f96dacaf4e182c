"""What in the store nobody needs any more: ``nic store gc``.

A product is needed if it belongs to a partition that the definitions have now, or if a version in
MLflow's registry refers to it. A registered encoder keeps the encoder's folder. A registered model
keeps its own, its folds and explanations, its encoder, and the grids that it learned from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import dagster as dg
import mlflow

from nic_assets.databases import SQLITE
from nic_assets.partitions import SLIDES
from nic_assets.tracking import Tracking
from nic_core.encoders import EncoderError
from nic_core.encoders.files import read_card
from nic_core.grids import GridError, open_grid
from nic_core.models.files import ModelFileError, read_model_card
from nic_core.store import Product, Store

_ASSETS = {
    "slide": "slide",
    "patch_table": "patch_table",
    "patch_task": "patch_task",
    "encoder": "encoder",
    "training": "encoder",
    "probe": "encoder_probe",
    "grid": "grid",
    "map": "probability_map",
    "folds": "target_folds",
    "model": "task_model",
    "explanations": "explanation",
}
"""The asset that makes a kind of product."""


class RetentionError(Exception):
    """What is needed cannot be told."""


def registered_tags(tracking: Tracking) -> list[dict[str, str]]:
    """The tags of every model version in MLflow's registry; none where there is no database."""
    if tracking.uri.startswith(SQLITE) and not Path(tracking.uri.removeprefix(SQLITE)).exists():
        return []
    client = mlflow.MlflowClient(tracking.uri)
    found: list[dict[str, str]] = []
    token: str | None = None
    while True:
        page = client.search_model_versions(page_token=token)
        found += [dict(version.tags) for version in page]
        token = page.token
        if not token:
            return found


def unneeded(
    store: Store,
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    registered: Collection[Mapping[str, str]],
) -> list[Product]:
    """Products that neither a partition nor a registered version needs.

    Raises
    ------
    RetentionError
        The instance knows no slide: it is not this store's, or nothing was materialized yet.
    """
    if not instance.get_dynamic_partitions(str(SLIDES.name)):
        raise RetentionError(
            "Dagster knows no slide, so every slide would look unneeded: "
            "check DAGSTER_HOME, or materialize 'slide_index' first"
        )
    graph = defs.resolve_asset_graph()
    current: dict[str, set[str]] = {}
    for kind, asset in _ASSETS.items():
        key = dg.AssetKey(asset)
        definition = graph.get(key).partitions_def if graph.has(key) else None
        current[kind] = (
            set(definition.get_partition_keys(dynamic_partitions_store=instance))
            if definition is not None
            else set()
        )
    registry = _Registry(store, registered)
    return [
        product
        for product in store.products()
        if _partition(product) not in current[product.kind] and not registry.needs(product)
    ]


def size(product: Product) -> int:
    """Bytes of a product's files."""
    parts = [product.path] if product.path.is_file() else product.path.rglob("*")
    return sum(part.stat().st_size for part in parts if part.is_file())


def _partition(product: Product) -> str:
    # the dimensions of a key stand in alphabetical order
    ordered = product.kind not in ("model", "explanations")
    return "|".join(product.names if ordered else reversed(product.names))


@dataclass(frozen=True)
class _Registry:
    """What registered versions refer to; whatever cannot be read counts as needed."""

    store: Store
    tags: Collection[Mapping[str, str]]

    @cached_property
    def weights(self) -> set[str]:
        """Hashes of the encoders that are registered, or that a registered model is on."""
        return {tags["weights_hash"] for tags in self.tags if "weights_hash" in tags}

    @cached_property
    def models(self) -> set[tuple[str, str, str]]:
        """Target, encoder and its weights of every registered model."""
        return {
            (tags["target"], tags["encoder"], tags["weights_hash"])
            for tags in self.tags
            if {"target", "encoder", "weights_hash"} <= tags.keys()
        }

    @cached_property
    def learned(self) -> set[tuple[str, str]]:
        """Weights and slide identity of every grid that a registered model learned from."""
        found = set()
        for target, encoder, _ in self.models:
            folder = self.store.model(target, encoder)
            if folder.exists() and self._is_registered(target, encoder):
                card = read_model_card(folder)
                found |= {(card.weights_hash, slide) for slide in card.training.slides}
        return found

    def needs(self, product: Product) -> bool:
        try:
            return self._needs(product)
        except (EncoderError, GridError, ModelFileError):
            return True

    def _needs(self, product: Product) -> bool:
        match product.kind, product.names:
            case "encoder", _:
                return read_card(product.path).weights_hash in self.weights
            case "grid", _:
                about = open_grid(product.path).provenance
                return (about.weights_hash, about.slide_identity) in self.learned
            case "folds", (target,):
                return any(target == registered for registered, _, _ in self.models)
            case "model" | "explanations", (target, encoder):
                return self._is_registered(target, encoder)
            case _:
                return False

    def _is_registered(self, target: str, encoder: str) -> bool:
        folder = self.store.model(target, encoder)
        return (
            folder.exists()
            and (target, encoder, read_model_card(folder).weights_hash) in self.models
        )

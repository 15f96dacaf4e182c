"""Find the products in the store that are not needed any more, for ``nic store gc``.

A product is needed if its partition is among the current partitions of the definitions, or if a
version in MLflow's registry refers to it. A registered encoder needs its own folder. A registered
model needs its own folder, its folds, explanations and encoder, and the grids it was trained on
with their table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import dagster as dg
import mlflow

from nic_assets.partitions import SLIDES
from nic_assets.tracking import Tracking
from nic_assets.tracking.connection import connection_errors, reason
from nic_assets.tracking.database import SQLITE
from nic_core.encoders import EncoderError
from nic_core.encoders.files import read_card
from nic_core.grids import GridError, open_grid
from nic_core.models.files import ModelFileError, read_model_card
from nic_core.store import ModelKey, Product, Store


class RetentionError(Exception):
    """The products that are needed cannot be determined."""


def registered_tags(tracking: Tracking) -> list[dict[str, str]]:
    """Return the tags of every version in MLflow's registry; empty if there is no database.

    Raises
    ------
    RetentionError
        MLflow does not answer, or refuses the request.
    """
    if tracking.uri.startswith(SQLITE) and not Path(tracking.uri.removeprefix(SQLITE)).exists():
        return []
    client = mlflow.MlflowClient(tracking.uri)
    found: list[dict[str, str]] = []
    token: str | None = None
    while True:
        try:
            page = client.search_model_versions(page_token=token)
        except connection_errors() as error:
            # `from None`: the cause may contain a URL with a password
            raise RetentionError(
                f"MLflow's registry cannot be read ({reason(error)}), so the products that it "
                "needs are unknown; run again when it answers"
            ) from None
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
    """Return the products that neither a current partition nor a registered version needs.

    Parameters
    ----------
    registered
        The tags of every registered version, by :func:`registered_tags`.

    Raises
    ------
    RetentionError
        The instance has no slide: it belongs to another store, or nothing was materialized yet.
    """
    if not instance.get_dynamic_partitions(str(SLIDES.name)):
        raise RetentionError(
            "the Dagster instance has no slide, so no product would be needed; "
            "set DAGSTER_HOME to this store's instance, or materialize 'slide_index' first"
        )
    graph = defs.resolve_asset_graph()
    current = {
        key.to_user_string(): set(definition.get_partition_keys(dynamic_partitions_store=instance))
        for key in graph.materializable_asset_keys
        if (definition := graph.get(key).partitions_def) is not None
    }
    registry = _RegisteredVersions(store, registered)
    return [
        product
        for product in store.products()
        if str(product.key) not in current.get(product.asset, set()) and not registry.needs(product)
    ]


def size(product: Product) -> int:
    """Return the size of a product's files in bytes."""
    parts = [product.path] if product.path.is_file() else product.path.rglob("*")
    return sum(part.stat().st_size for part in parts if part.is_file())


@dataclass(frozen=True)
class _RegisteredVersions:
    """The products that registered versions refer to; unreadable products count as needed."""

    store: Store
    tags: Collection[Mapping[str, str]]

    @cached_property
    def weights(self) -> set[str]:
        """Weights hashes of registered encoders and of the encoders of registered models."""
        return {tags["weights_hash"] for tags in self.tags if "weights_hash" in tags}

    @cached_property
    def models(self) -> set[tuple[ModelKey, str]]:
        """Key and encoder weights hash of every registered model."""
        return {
            (ModelKey(encoder=tags["encoder"], target=tags["target"]), tags["weights_hash"])
            for tags in self.tags
            if {"target", "encoder", "weights_hash"} <= tags.keys()
        }

    @cached_property
    def training_grids(self) -> set[tuple[str, str]]:
        """Weights hash and slide identity of the grids that registered models were trained on."""
        found = set()
        for key, _ in self.models:
            if self._is_registered(key):
                card = read_model_card(self.store.slide_model(key))
                found |= {(card.weights_hash, slide) for slide in card.training.slides}
        return found

    def needs(self, product: Product) -> bool:
        """Return whether a registered version refers to a product."""
        try:
            return self._needs(product)
        except (EncoderError, GridError, ModelFileError):
            return True

    def _needs(self, product: Product) -> bool:
        if not product.complete:
            return False
        match product.asset, product.key:
            case "encoder", _:
                return read_card(product.path).weights_hash in self.weights
            case "grid", _:
                origin = open_grid(product.path).provenance
                return (origin.weights_hash, origin.slide_identity) in self.training_grids
            case "target_folds", str(target):
                return any(target == key.target for key, _ in self.models)
            case (("slide_model" | "explanation" | "target_grids"), ModelKey() as key):
                return self._is_registered(key)
            case _:
                return False

    def _is_registered(self, key: ModelKey) -> bool:
        folder = self.store.slide_model(key)
        return folder.exists() and (key, read_model_card(folder).weights_hash) in self.models

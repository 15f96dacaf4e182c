"""The store: the place of every product, and atomic writes to it."""

from nic_core.store.atomic import (
    StoreBusyError,
    StoreError,
    atomic_file,
    atomic_folder,
    exclusive_lock,
    remove_product,
)
from nic_core.store.file_systems import lock_problem
from nic_core.store.keys import (
    ExternalKey,
    GridKey,
    MapKey,
    ModelKey,
    PatchTableKey,
    PatchTaskKey,
    PredictionKey,
)
from nic_core.store.layout import DEFAULT_STORE, STORE_VARIABLE, Leftover, Product, Store

__all__ = [
    "DEFAULT_STORE",
    "STORE_VARIABLE",
    "ExternalKey",
    "GridKey",
    "Leftover",
    "MapKey",
    "ModelKey",
    "PatchTableKey",
    "PatchTaskKey",
    "PredictionKey",
    "Product",
    "Store",
    "StoreBusyError",
    "StoreError",
    "atomic_file",
    "atomic_folder",
    "exclusive_lock",
    "lock_problem",
    "remove_product",
]

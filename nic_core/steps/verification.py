"""Is the store what was written? Every product against the hash that was recorded with it.

Encoders and models have the hashes of their weights in their cards, grids that of their embeddings in
their attributes. Of other products none is recorded: they are read from end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyvips

from nic_core.encoders import EncoderError, load_patch_task
from nic_core.encoders.files import verify_encoder
from nic_core.grids import GridError, verify_grid
from nic_core.maps.heatmaps import read_heatmap
from nic_core.models.files import ModelFileError, load_model
from nic_core.steps.slide_models import METRICS, PREDICTIONS
from nic_core.steps.slides import RECORD, THUMBNAIL, TISSUE, SlideRecord
from nic_core.store import Product, Store
from nic_core.tiling.patches import PatchTableError, read_patch_table
from nic_core.tiling.tissue import TissueMask


@dataclass(frozen=True)
class Verified:
    """What was found of a product.

    Attributes
    ----------
    problem
        What is wrong and what to do, or None.
    hashed
        It was compared with a recorded hash, not only read.
    """

    product: Product
    problem: str | None
    hashed: bool


def verify(product: Product) -> Verified:
    """Read a product whole and compare it with what was recorded of it."""
    try:
        hashed = _CHECKS[product.asset](product.path)
    except (EncoderError, GridError, ModelFileError, PatchTableError) as error:
        return Verified(product, str(error), hashed=True)
    except (OSError, ValueError, pl.exceptions.PolarsError, pyvips.Error) as error:
        text = str(error).strip().replace("\n", "; ")
        return Verified(product, f"{product.path}: {text}; materialize it again", hashed=False)
    return Verified(product, None, hashed)


def verify_store(
    store: Store, progress: Callable[[int, int], None] | None = None
) -> list[Verified]:
    """:func:`verify` everything; ``progress`` is called with (products done, products in all).

    The state of a training that was stopped is no product: whoever goes on with it checks it.
    """
    products = [product for product in store.products() if product.complete]
    found = []
    for done, product in enumerate(products, start=1):
        found.append(verify(product))
        if progress is not None:
            progress(done, len(products))
    return found


def _slide(path: Path) -> bool:
    record = SlideRecord.model_validate_json((path / RECORD).read_bytes())
    TissueMask.load(path / TISSUE, record.tissue_mpp)
    pyvips.Image.new_from_file(str(path / THUMBNAIL), fail_on="error").avg()
    return False


def _patch_table(path: Path) -> bool:
    read_patch_table(path)
    return False


def _patch_task(path: Path) -> bool:
    np.asarray(load_patch_task(path).patches).max(initial=0)
    return False


def _encoder(path: Path) -> bool:
    verify_encoder(path)
    return True


def _slide_model(path: Path) -> bool:
    load_model(path)
    for name in (PREDICTIONS, METRICS):
        pl.read_parquet(path / name)
    return True


def _tables(path: Path) -> bool:
    for table in [path] if path.is_file() else path.glob("*.parquet"):
        pl.read_parquet(table)
    return False


def _explanation(path: Path) -> bool:
    _tables(path)
    for slide in path.iterdir():
        if slide.is_dir():
            read_heatmap(slide)
    return False


_CHECKS: dict[str, Callable[[Path], bool]] = {
    "slide": _slide,
    "patch_table": _patch_table,
    "patch_task": _patch_task,
    "encoder": _encoder,
    "encoder_probe": _tables,
    "grid": verify_grid,
    "grid_manifest": _tables,
    "target_folds": _tables,
    "slide_model": _slide_model,
    "explanation": _explanation,
    "probability_map": _tables,
    "map_scores": _tables,
}

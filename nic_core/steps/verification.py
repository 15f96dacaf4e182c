"""Verify the products of the store against the hashes that were recorded with them.

Encoders and slide models record hashes of their weights in their cards, and grids and their
previews record a content hash in their attributes. Other products have no hash; it is only checked
that they can be read completely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from nic_core.encoders import EncoderError, load_patch_task
from nic_core.encoders.files import verify_encoder
from nic_core.grids import GridError, read_colours, verify_grid, verify_preview
from nic_core.libvips import pyvips
from nic_core.maps.heatmaps import read_cell_image, read_heatmap
from nic_core.models.files import ModelFileError, load_model
from nic_core.steps.predictions import HEATMAP
from nic_core.steps.probability_maps import PROBABILITY
from nic_core.steps.slide_models import FOLD_METRICS, METRICS, PREDICTIONS
from nic_core.steps.slides import RECORD, THUMBNAIL, TISSUE, SlideRecord
from nic_core.store import Product, Store
from nic_core.tiling.patches import PatchTableError, read_patch_table
from nic_core.tiling.tissue import TissueMask


@dataclass(frozen=True)
class Verification:
    """The result of verifying a product.

    Attributes
    ----------
    product : Product
    problem : str or None
        What is wrong and what to do; None if nothing is.
    hashed : bool
        Whether the product was compared with a recorded hash, or only read.
    """

    product: Product
    problem: str | None
    hashed: bool


def verify(product: Product) -> Verification:
    """Read a product completely, and compare it with its recorded hash if it has one."""
    try:
        hashed = _CHECKS[product.asset](product.path)
    except (EncoderError, GridError, ModelFileError, PatchTableError) as error:
        return Verification(product, str(error), hashed=True)
    except (OSError, ValueError, pl.exceptions.PolarsError, pyvips.Error) as error:
        text = str(error).strip().replace("\n", "; ")
        return Verification(product, f"{product.path}: {text}; materialize it again", hashed=False)
    return Verification(product, None, hashed)


def verify_store(
    store: Store, progress: Callable[[int, int], None] | None = None
) -> list[Verification]:
    """Verify every complete product of the store.

    Checkpoints of unfinished trainings are left out; a training checks them when it resumes.

    Parameters
    ----------
    progress : callable, optional
        Called with (verified products, all products) after each product.
    """
    products = [product for product in store.products() if product.complete]
    results = []
    for done, product in enumerate(products, start=1):
        results.append(verify(product))
        if progress is not None:
            progress(done, len(products))
    return results


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


def _grid(path: Path) -> bool:
    verify_grid(path)
    return True


def _embedding_colours(path: Path) -> bool:
    read_colours(path)
    return False


def _grid_preview(path: Path) -> bool:
    verify_preview(path)
    return True


def _slide_model(path: Path) -> bool:
    load_model(path)
    for name in (PREDICTIONS, METRICS, FOLD_METRICS):
        pl.read_parquet(path / name, glob=False)
    return True


def _tables(path: Path) -> bool:
    for table in [path] if path.is_file() else path.glob("*.parquet"):
        pl.read_parquet(table, glob=False)
    return False


def _explanation(path: Path) -> bool:
    _tables(path)
    for slide in path.iterdir():
        if slide.is_dir():
            read_heatmap(slide)
    return False


def _prediction(path: Path) -> bool:
    _tables(path)
    if (path / HEATMAP).exists():  # not for a slide without tissue
        read_heatmap(path / HEATMAP)
    return False


def _probability_map(path: Path) -> bool:
    _tables(path)
    read_cell_image(path / PROBABILITY)
    return False


# asset -> function that reads a product and returns whether it compared a hash
_CHECKS: dict[str, Callable[[Path], bool]] = {
    "slide": _slide,
    "patch_table": _patch_table,
    "patch_task": _patch_task,
    "encoder": _encoder,
    "encoder_probe": _tables,
    "grid": _grid,
    "grid_manifest": _tables,
    "embedding_colours": _embedding_colours,
    "grid_preview": _grid_preview,
    "target_folds": _tables,
    "target_grids": _tables,
    "slide_model": _slide_model,
    "explanation": _explanation,
    "champion": _slide_model,
    "prediction_plan": _tables,
    "prediction": _prediction,
    "probability_map": _probability_map,
    "map_scores": _tables,
}

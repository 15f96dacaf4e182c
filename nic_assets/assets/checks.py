"""What is checked of each product; every check says what is wrong, or None.

The results travel with the asset's own step (``check_specs``), so a batch of a thousand slides
costs no step more, and a check sees the product that was just made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import dagster as dg
import numpy as np
import polars as pl

from nic_core.cohort import Settings
from nic_core.encoders import EncoderCard, PatchDataset
from nic_core.grids import Grid
from nic_core.steps import SlideRecord
from nic_core.store import Store
from nic_core.tiling.patches import PatchTableError, read_patch_table

# a slide may be scanned a little coarser than asked: 0.5021 um/px serves 0.5
FINE_ENOUGH = 1.02
# of all embeddings of a slide, the share that may equal the commonest one
COLLAPSED = 0.5


def declared(name: str, asset: str, judge: Callable[..., object]) -> dg.AssetCheckSpec:
    """A check's declaration; the UI shows what its function says of itself."""
    about = (inspect.getdoc(judge) or "").split("\n\n")[0].replace("\n", " ")
    return dg.AssetCheckSpec(name, asset=asset, description=about)


def resolution_suffices(record: SlideRecord, settings: Settings) -> str | None:
    """The slide holds the detail that the study asks for; else pixels are interpolated."""
    if record.mpp <= settings.mpp * FINE_ENOUGH:
        return None
    return f"{record.mpp:.3f} um/px is coarser than the study's {settings.mpp:.3f}: interpolated"


def tissue_found(record: SlideRecord) -> str | None:
    """There is something to compress."""
    return None if record.tissue_mm2 > 0 else "no tissue: its grid will be empty"


def patch_table_valid(store: Store, slide: str) -> str | None:
    """The file as it lies in the store has the schema, one row a cell, and whole rows."""
    try:
        read_patch_table(store.patch_table(slide))
    except PatchTableError as error:
        return str(error)
    return None


def splits_disjoint(dataset: PatchDataset) -> str | None:
    """No patient's patches are in two splits."""
    torn = (
        dataset.table.group_by("group")
        .agg(pl.col("split").n_unique())
        .filter(pl.col("split") > 1)["group"]
        .sort()
    )
    return f"patients in more than one split: {torn.to_list()[:5]}" if len(torn) else None


def labels_agree(dataset: PatchDataset) -> str | None:
    """No image stands under two labels."""
    found = dataset.found("conflict")
    if found.is_empty():
        return None
    first = found.row(0, named=True)
    return (
        f"{len(found)} images equal one with another label and were left out with it: "
        f"{first['source']} ({first['label']}) is {first['other']} ({first['other_label']})"
    )


def no_near_duplicates(dataset: PatchDataset) -> str | None:
    """No patch of validation or test shows what one of an earlier split shows."""
    found = dataset.found("near_duplicate")
    if found.is_empty():
        return None
    first = found.sort("detail").row(0, named=True)
    return (
        f"{len(found)} patches have a near-duplicate in an earlier split: {first['source']} "
        f"({first['split']}) is like {first['other']} ({first['other_split']})"
    )


def classes_present(dataset: PatchDataset) -> str | None:
    """Each class has patches in each split."""
    absent = [
        f"{label} in {split}"
        for label, split in dataset.found("absent").select("label", "split").rows()
    ]
    return f"no patch of {', '.join(absent)}" if absent else None


def images_readable(dataset: PatchDataset) -> str | None:
    """Every image of the source could be read."""
    found = dataset.found("unreadable")
    if found.is_empty():
        return None
    first = found.row(0, named=True)
    return f"{len(found)} left out, the first is {first['source']} ({first['detail']})"


def beats_chance(card: EncoderCard) -> str | None:
    """On every task's test patients the heads do better than guessing."""
    weak = {
        task: round(scores.balanced_accuracy, 3)
        for task, scores in card.scores.items()
        if scores.balanced_accuracy <= 1 / len(card.tasks[task])
    }
    return f"balanced accuracy at or below chance: {weak}" if weak else None


def patients_unseen(leaks: Sequence[str]) -> str | None:
    """No patch task's test patients are in the encoder's training, in another task."""
    return "; ".join(leaks) or None


def covers_patch_table(grid: Grid, cells: pl.DataFrame) -> str | None:
    """A embedding at each kept cell of the patch table that could be read, and nowhere else."""
    kept = np.zeros(grid.valid.shape, bool)
    rows = cells.filter("kept")
    kept[rows["row"].to_numpy(), rows["column"].to_numpy()] = True
    missing = int((kept & ~grid.valid).sum()) - grid.provenance.unreadable
    extra = int((grid.valid & ~kept).sum())
    if missing or extra:
        return (
            f"{missing} kept cells without a embedding, {extra} embeddings outside the kept cells"
        )
    return None


def embeddings_finite(grid: Grid) -> str | None:
    """No embedding is NaN or beyond float16."""
    bad = int((~np.isfinite(np.asarray(grid.embeddings[:]))).any(0).sum())
    return f"{bad} cells with a embedding that is no finite number" if bad else None


def embeddings_not_collapsed(grid: Grid) -> str | None:
    """The encoder tells patches apart: no single embedding takes most of the slide."""
    embeddings = np.asarray(grid.embeddings[:])[:, grid.valid].T
    if len(embeddings) < 2:
        return None
    _, counts = np.unique(embeddings, axis=0, return_counts=True)
    share = counts.max() / len(embeddings)
    return f"one embedding in {share:.0%} of the cells" if share > COLLAPSED else None


def folds_disjoint(folds: pl.DataFrame) -> str | None:
    """Each patient is in one fold only."""
    torn = (folds.group_by("patient").agg(pl.col("fold").n_unique()).filter(pl.col("fold") > 1))[
        "patient"
    ]
    return f"patients in more than one fold: {torn.sort().to_list()[:5]}" if len(torn) else None

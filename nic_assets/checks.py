"""What is checked of each product; every check says what is wrong, or None.

The results travel with the asset's own step (``check_specs``), so a batch of a thousand slides
costs no step more, and a check sees the product that was just made.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import dagster as dg
import numpy as np
import polars as pl

from nic_core.cohort import Settings, Target
from nic_core.encoders import EncoderCard, PatchDataset
from nic_core.grids import Grid
from nic_core.metrics import PRIMARY, compare
from nic_core.models.labels import shuffle_labels
from nic_core.models.training import primary_metric
from nic_core.models.validation import (
    NETWORK,
    Evaluated,
    prediction_array,
    prediction_columns,
    rows_metrics,
)
from nic_core.patches import PatchTableError, read_patch_table
from nic_core.reports import METRIC_NAMES, common_units
from nic_core.steps import SlideRecord
from nic_core.store import Store

# a slide may be scanned a little coarser than asked: 0.5021 um/px serves 0.5
FINE_ENOUGH = 1.02
# of all codes of a slide, the share that may equal the commonest one
COLLAPSED = 0.5
PERMUTATIONS = 200


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
    """A code at each kept cell of the patch table that could be read, and nowhere else."""
    kept = np.zeros(grid.valid.shape, bool)
    rows = cells.filter("kept")
    kept[rows["row"].to_numpy(), rows["column"].to_numpy()] = True
    missing = int((kept & ~grid.valid).sum()) - grid.provenance.unreadable
    extra = int((grid.valid & ~kept).sum())
    if missing or extra:
        return f"{missing} kept cells without a code, {extra} codes outside the kept cells"
    return None


def codes_finite(grid: Grid) -> str | None:
    """No code is NaN or beyond float16."""
    bad = int((~np.isfinite(np.asarray(grid.codes[:]))).any(0).sum())
    return f"{bad} cells with a code that is no finite number" if bad else None


def codes_not_collapsed(grid: Grid) -> str | None:
    """The encoder tells patches apart: no single code takes most of the slide."""
    codes = np.asarray(grid.codes[:])[:, grid.valid].T
    if len(codes) < 2:
        return None
    _, counts = np.unique(codes, axis=0, return_counts=True)
    share = counts.max() / len(codes)
    return f"one code in {share:.0%} of the cells" if share > COLLAPSED else None


def above_permutation(evaluated: Evaluated) -> str | None:
    """The network's cross-validated figure is better than with patients' labels exchanged.

    A permutation test of the predictions; the full control, which trains on exchanged labels,
    is setting ``models.permute_labels``.
    """
    target = evaluated.target
    rows = evaluated.predictions.filter(model=NETWORK, split="cv").sort("unit")
    prediction = prediction_array(target, rows)
    labels = rows.select("unit", "patient", "split", *_labels(target))
    value = primary_metric(target, rows, prediction)
    control = [
        primary_metric(target, shuffle_labels(labels, seed=seed), prediction)
        for seed in range(PERMUTATIONS)
    ]
    bar = float(np.nanquantile(control, 0.95))
    if value > bar:
        return None
    return f"{value:.3f} is within what exchanged labels give (95 % of them below {bar:.3f})"


@dataclass(frozen=True)
class Champion:
    """The registered model to beat: what it is called, and its
    :attr:`~nic_core.models.validation.Evaluated.predictions` if the registry has them."""

    title: str
    predictions: pl.DataFrame | None


@dataclass(frozen=True)
class Verdict:
    """Whether a new model becomes the champion, and why, in words; ``compared`` is false where
    nobody can tell, so that a person must."""

    better: bool
    words: str
    compared: bool = True


def against_champion(evaluated: Evaluated, champion: Champion | None) -> Verdict:
    """A new model becomes champion if there is none, or if its primary metric is better.

    Better: the lower bound of the 95 % interval of the difference, by the paired bootstrap over
    patients, is above 0. On cross-validated predictions of the units of both, by today's labels.
    """
    target, settings = evaluated.target, evaluated.settings
    if settings.permute_labels is not None:
        return Verdict(False, "trained on exchanged labels: a control, never champion")
    if champion is None:
        return Verdict(True, "the first of its name: champion")

    def unknown(why: str) -> Verdict:
        words = f"cannot be compared with the champion, {champion.title}: {why}; set the alias"
        return Verdict(False, f"{words} by hand", compared=False)

    columns, labels = prediction_columns(target), _labels(target)
    held = champion.predictions
    if held is None or not {"model", "split", "unit", *columns} <= set(held.columns):
        return unknown("its run holds no predictions of this target")
    one = evaluated.predictions.filter(model=NETWORK, split="cv")
    other = held.filter(model=NETWORK, split="cv").drop(*labels, strict=False)
    one, other = common_units(target, one, other.join(one.select("unit", *labels), on="unit"))
    if one.is_empty():
        return unknown("no unit is predicted by both")
    name = PRIMARY[target.kind]
    difference = compare(
        {name: rows_metrics(target, one)[name]},
        {name: rows_metrics(target, other)[name]},
        one["patient"].to_list(),
        resamples=settings.bootstrap,
        seed=settings.seed,
    )[name]
    if not math.isfinite(difference.low):
        return unknown(f"{METRIC_NAMES[name]} is undefined on their {one.height} common units")
    new, old = (
        primary_metric(target, rows, prediction_array(target, rows)) for rows in (one, other)
    )
    figures = (
        f"{METRIC_NAMES[name]} {new:.3f} against {old:.3f}, difference {difference.value:+.3f} "
        f"[{difference.low:+.3f}, {difference.high:+.3f}] on {one.height} units of "
        f"{one['patient'].n_unique()} patients"
    )
    if difference.low > 0:
        return Verdict(True, f"takes the place of {champion.title}: {figures}")
    return Verdict(False, f"{champion.title} stays champion: {figures}")


def folds_disjoint(folds: pl.DataFrame) -> str | None:
    """Each patient is in one fold only."""
    torn = (folds.group_by("patient").agg(pl.col("fold").n_unique()).filter(pl.col("fold") > 1))[
        "patient"
    ]
    return f"patients in more than one fold: {torn.sort().to_list()[:5]}" if len(torn) else None


def _labels(target: Target) -> list[str]:
    """Columns of a target's labels in a table of predictions."""
    return ["time", "event"] if target.kind == "survival" else ["y"]

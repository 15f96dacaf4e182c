"""The checks of each product. A check returns the problem, or None where it passes.

The asset's own step runs its checks on the product that it just made, so a batch of a thousand
slides needs no further step.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from nic_assets.orchestration.partition_checks import Check
from nic_core.cohort import Target
from nic_core.store import PatchTableKey, Store

if TYPE_CHECKING:
    from nic_core.encoders import EncoderCard, PatchDataset
    from nic_core.grids import Grid
    from nic_core.models.comparison import PermutationControl, Verdict
    from nic_core.models.distance import TrainingReference
    from nic_core.models.files import TrainingCohort
    from nic_core.steps import QualityReport, SlideRecord, SlideScan, TargetFolds

# a slide may be slightly coarser than the study: 0.5021 um/px serves 0.5 [choice]
RESOLUTION_TOLERANCE = 1.02
# largest relative difference of two um/px at level 0 that count as equal: scanners of one model
# differ by 1 % or 2 %, those of two makers by 9 % (0.2526 and 0.2302) [choice]
MPP_TOLERANCE = 0.05
# largest share of a slide's cells that may have the same embedding [choice]
MAX_COLLAPSED = 0.5


@Check
def slide_files_present(scan: SlideScan) -> str | None:
    """Every file of the slide table can be read, and no slide of the last scan is missing."""
    problems = [f"{slide}: {reason}" for slide, reason in scan.missing.items()]
    problems += [
        f"{slide}: removed since the last scan"
        for slide in scan.removed
        if slide not in scan.missing
    ]
    return "; ".join(problems) or None


@Check
def slides_distinct(scan: SlideScan) -> str | None:
    """No two slides have the same content. Folds keep the patients of such slides together."""
    patient = dict(scan.index.select("slide", "patient").iter_rows())
    problems = [
        " = ".join(f"{slide} (patient {patient[slide]})" for slide in slides)
        for slides in scan.duplicates
    ]
    return f"the same content: {'; '.join(problems)}" if problems else None


@Check
def resolution_suffices(record: SlideRecord, mpp: float) -> str | None:
    """The slide is at least as fine as the finest um/px of an encoder; pixels of a coarser slide
    are interpolated."""
    if record.mpp <= mpp * RESOLUTION_TOLERANCE:
        return None
    return f"{record.mpp:.3f} um/px is coarser than an encoder's {mpp:.3f}: interpolated"


@Check
def tissue_found(record: SlideRecord) -> str | None:
    """The slide has tissue."""
    return None if record.tissue_mm2 > 0 else "no tissue: the slide's grid will be empty"


@Check
def free_of_ink(record: SlideRecord) -> str | None:
    """Little of the slide is pen ink or black."""
    from nic_core.tiling.slide_quality import MAX_INK

    if record.ink_share <= MAX_INK:
        return None
    return f"{record.ink_share:.1%} of the slide is ink or black (allowed: {MAX_INK:.0%})"


@Check
def cells_decodable(cells: pl.DataFrame) -> str | None:
    """Almost all tissue cells of the slide can be decoded."""
    from nic_core.tiling.quality import summarize
    from nic_core.tiling.slide_quality import MAX_UNREADABLE

    share = summarize(cells)["unreadable_share"]
    if share is None or share <= MAX_UNREADABLE:
        return None
    return f"{share:.1%} of the tissue cells cannot be decoded (expected: {MAX_UNREADABLE:.0%})"


@Check
def slides_comparable(report: QualityReport) -> str | None:
    """No slide in use differs from its cohort in focus, colour, tissue, ink or readability."""
    found = report.outliers.filter(pl.col("exclude").is_null())
    if found.is_empty():
        return None
    shown = [f"{slide}: {problems}" for slide, problems, _ in found.head(5).rows()]
    more = [f"and {found.height - 5} more"] if found.height > 5 else []
    return " | ".join(shown + more)


@Check
def schema_valid(store: Store, key: PatchTableKey) -> str | None:
    """The stored patch table has the expected columns, and one row for each grid cell."""
    from nic_core.tiling.patches import PatchTableError, read_patch_table

    try:
        read_patch_table(store.patch_table(key))
    except PatchTableError as error:
        return str(error)
    return None


@Check
def splits_disjoint_by_group(dataset: PatchDataset) -> str | None:
    """The patches of each patient are in one split only."""
    shared = (
        dataset.table.group_by("group")
        .agg(pl.col("split").n_unique())
        .filter(pl.col("split") > 1)["group"]
        .sort()
    )
    return f"patients in more than one split: {shared.to_list()[:5]}" if len(shared) else None


@Check
def classes_present(dataset: PatchDataset) -> str | None:
    """Each class has patches in each split."""
    absent = [
        f"{label} in {split}"
        for label, split in dataset.found("absent").select("label", "split").rows()
    ]
    return f"no patch of {', '.join(absent)}" if absent else None


@Check
def labels_agree(dataset: PatchDataset) -> str | None:
    """Equal images have equal labels."""
    found = dataset.found("conflict")
    if found.is_empty():
        return None
    first = found.row(0, named=True)
    return (
        f"{len(found)} images are equal to one with another label; both were left out, for "
        f"example {first['source']} ({first['label']}) and {first['other']} "
        f"({first['other_label']})"
    )


@Check
def no_near_duplicates_across_splits(dataset: PatchDataset) -> str | None:
    """No patch of validation or test is a near-duplicate of a patch in an earlier split."""
    found = dataset.found("near_duplicate")
    if found.is_empty():
        return None
    first = found.sort("detail").row(0, named=True)
    return (
        f"{len(found)} patches have a near-duplicate in an earlier split, for example "
        f"{first['source']} ({first['split']}) of {first['other']} ({first['other_split']})"
    )


@Check
def images_readable(dataset: PatchDataset) -> str | None:
    """Every image of the source can be read."""
    found = dataset.found("unreadable")
    if found.is_empty():
        return None
    first = found.row(0, named=True)
    return f"{len(found)} images were left out, for example {first['source']} ({first['detail']})"


@Check
def regions_clear(dataset: PatchDataset) -> str | None:
    """Every annotated region has a class and lies mostly in tissue."""
    problems = [
        f"{source}: {detail}"
        for kind in ("unclassified", "outside_tissue")
        for source, detail in dataset.found(kind).select("source", "detail").rows()
    ]
    return "; ".join(problems[:5]) or None


@Check
def neighbours_unlike(dataset: PatchDataset) -> str | None:
    """Where the patients are unknown, images that follow each other are not alike."""
    found = dataset.found("ordered")
    if found.is_empty():
        return None
    return (
        f"{'; '.join(found['detail'])}: the images are probably ordered by patient or batch, so "
        "that scores may be too high in spite of splits by blocks; state the patients if they can "
        "be known"
    )


PATCH_TASK_CHECKS = (
    splits_disjoint_by_group,
    classes_present,
    labels_agree,
    no_near_duplicates_across_splits,
    images_readable,
    regions_clear,
    neighbours_unlike,
)


@Check
def beats_chance(card: EncoderCard) -> str | None:
    """The balanced accuracy of each head on its task's test patients is above chance."""
    weak = {
        task: round(scores.balanced_accuracy, 3)
        for task, scores in card.scores.items()
        if scores.balanced_accuracy <= 1 / len(card.tasks[task])
    }
    return f"balanced accuracy at or below chance: {weak}" if weak else None


@Check
def test_patients_unseen(leaks: Sequence[str]) -> str | None:
    """No test patient of a patch task is in the encoder's training data of another task."""
    return "; ".join(leaks) or None


@Check
def covers_patch_table(grid: Grid, cells: pl.DataFrame) -> str | None:
    """The grid has an embedding in each kept cell that could be read, and in no other cell.

    Not applied to embeddings that other software computed.
    """
    import numpy as np

    kept = np.zeros(grid.valid.shape, bool)
    rows = cells.filter("kept")
    kept[rows["row"].to_numpy(), rows["column"].to_numpy()] = True
    missing = int((kept & ~grid.valid).sum()) - grid.provenance.unreadable
    extra = int((grid.valid & ~kept).sum())
    if missing or extra:
        return (
            f"{missing} kept cells without an embedding, {extra} embeddings outside the kept cells"
        )
    return None


@Check
def embeddings_finite(grid: Grid) -> str | None:
    """Every component of every embedding is finite in float16."""
    import numpy as np

    from nic_core.grids.chunks import tissue_blocks

    bad = sum(
        int((~np.isfinite(embeddings)).any(0).sum())
        for _, _, embeddings in tissue_blocks(grid.embeddings, grid.valid)
    )
    return f"{bad} cells have an embedding that is not finite" if bad else None


@Check
def embeddings_not_collapsed(grid: Grid) -> str | None:
    """At most half of the slide's cells have the same embedding."""
    import numpy as np

    from nic_core.grids.chunks import tissue_blocks

    # digests instead of embeddings: few bytes for each cell of a slide of any size
    counts = Counter(
        hashlib.blake2b(embedding, digest_size=8).digest()
        for _, _, embeddings in tissue_blocks(grid.embeddings, grid.valid)
        for embedding in np.ascontiguousarray(embeddings.T)
    )
    if counts.total() < 2:
        return None
    share = max(counts.values()) / counts.total()
    return f"{share:.0%} of the cells have the same embedding" if share > MAX_COLLAPSED else None


@Check
def near_training_cohort(
    distance: float, percentile: float, reference: TrainingReference
) -> str | None:
    """The slide's distance to the champion's training cohort is below the 99th percentile."""
    from nic_core.models.distance import FAR_PERCENTILE

    if percentile <= FAR_PERCENTILE:
        return None
    return (
        f"distance {distance:.3g} is beyond {reference.limit:.3g}, the {FAR_PERCENTILE:g}th "
        f"percentile by {len(reference.held_out)} held-out training slides (the farthest: "
        f"{reference.held_out.max():.3g}); the prediction may be wrong"
    )


@Check
def mpp_as_in_training(mpp: float, training: TrainingCohort) -> str | None:
    """The slide's um/px at level 0 is within 5 % of that of a training slide."""
    if any(abs(mpp / known - 1) <= MPP_TOLERANCE for known in training.mpp):
        return None
    shown = ", ".join(f"{known:g}" for known in training.mpp)
    return f"{mpp:g} um/px at level 0; the training slides have {shown}"


@Check
def scanner_as_in_training(scanner: str | None, training: TrainingCohort) -> str | None:
    """The slide's scanner is one of the training slides', as far as both are known."""
    if scanner is None or not training.scanners or scanner in training.scanners:
        return None
    unknown = training.without_scanner
    rest = f" ({unknown} of their files state none)" if unknown else ""
    return f"scanner '{scanner}'; the training slides have {', '.join(training.scanners)}{rest}"


@Check
def quality_as_in_cohort(problems: str) -> str | None:
    """The quality report lists no problem of the slide."""
    return problems or None


OF_SLIDES: dict[str, tuple[Check[Any], ...]] = {
    "slide": (resolution_suffices, tissue_found, free_of_ink),
    "patch_table": (schema_valid, cells_decodable),
    "grid": (covers_patch_table, embeddings_finite, embeddings_not_collapsed),
    "prediction": (
        near_training_cohort,
        mpp_as_in_training,
        scanner_as_in_training,
        quality_as_in_cohort,
    ),
}
"""Checks of each asset that is partitioned by slide; their results change with the slides."""


@Check
def folds_disjoint_by_patient(folds: pl.DataFrame) -> str | None:
    """Each patient is in one fold only."""
    shared = (folds.group_by("patient").agg(pl.col("fold").n_unique()).filter(pl.col("fold") > 1))[
        "patient"
    ]
    return f"patients in more than one fold: {shared.sort().to_list()[:5]}" if len(shared) else None


@Check
def as_many_folds_as_wanted(made: TargetFolds) -> str | None:
    """The target has the number of folds that `settings.models.folds` requests."""
    return made.note


@Check
def above_permutation_control(control: PermutationControl) -> str | None:
    """The model's cross-validated score is above the 95th percentile with exchanged labels."""
    return None if control.passed else control.explanation


@Check
def compared_with_champion(verdict: Verdict) -> str | None:
    """The model could be compared with the champion of its target; if not, set the alias by
    hand. The metadata `champion` of each model has the result.
    """
    return None if verdict.compared else verdict.explanation


@Check
def champion_exists(target: Target, version: str | None) -> str | None:
    """The target has a registered model that predicts it."""
    if version is not None:
        return None
    name = f"model-{target.name}"
    if target.predict_with != "champion":
        return f"{name} has no version {target.predict_with}; correct 'predict_with' of the target"
    return (
        f"no version of {name} has the alias 'champion', so no slide is predicted; set it on one "
        "in MLflow, or train a model that passes its permutation control"
    )

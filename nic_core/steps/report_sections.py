"""The sections of the HTML report, collected from the cohort and the store.

The report is for readers outside the hospital: it contains no id of a slide or patient and no
path. Slides and patients are counted. Of the texts that people write, only names of cohorts,
encoders, targets, classes, sites and scanners appear, and reasons of the column ``exclude`` unless
they contain an id or a path (:func:`public_text`) [choice].
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from nic_core.cohort import (
    ClassificationTarget,
    Cohort,
    CohortError,
    RegressionTarget,
    SiteFolds,
    SurvivalTarget,
    Target,
)
from nic_core.cohort.index import DESCRIPTIVE_COLUMNS, find_slides
from nic_core.encoders import EncoderCard
from nic_core.encoders.files import read_card
from nic_core.maps.heatmaps import OVERLAY
from nic_core.models.comparison import CROSS_VALIDATED, permutation_control
from nic_core.models.cross_validation import NETWORK, CrossValidation
from nic_core.models.distance import FAR_PERCENTILE
from nic_core.models.explanation import heat_meaning
from nic_core.models.figures import evaluation_figure, reliability_figure
from nic_core.models.files import ModelCard
from nic_core.models.fold_columns import read_fold_column
from nic_core.models.kinds import kind_of
from nic_core.pictures import read_picture
from nic_core.reports import Report, starting_weights
from nic_core.reports.html import (
    Block,
    DataTable,
    Document,
    Flow,
    Heading,
    Items,
    Picture,
    Section,
    Stage,
    Text,
    drawn_figure,
    photograph,
    stored_png,
)
from nic_core.reports.methods import REFERENCES, content_hashes, methods
from nic_core.steps.encoders import leaked_groups
from nic_core.steps.external import ABOUT, SUBGROUPS
from nic_core.steps.grids import read_grid_manifest
from nic_core.steps.quality_report import SLIDES as QUALITY
from nic_core.steps.slide_index import read_slide_index, used_slides
from nic_core.steps.slide_models import METRICS, find_unmatched_labels, read_slide_model
from nic_core.steps.slides import RECORD, SlideRecord, read_record
from nic_core.store import ExternalKey, ModelKey, Store

WITHHELD = "reason withheld, since it contains an id or a path"
PICTURE_SIDE = 900  # px, of heatmaps
NARROW = 6.0  # inches
_PACKAGES = (
    *("nic-pathology", "torch", "numpy", "scipy", "scikit-learn", "scikit-survival", "polars"),
    *("scikit-image", "tifffile", "openslide-python", "pyvips", "zarr", "dagster", "mlflow"),
)
_PATH = re.compile(r"(^|[\s'\"(=:,])(~?/|\.{1,2}/|[A-Za-z]:\\|\\\\)\S|\w/\w[\w./-]*\.\w{2,5}\b")


@dataclass(frozen=True)
class FailedCheck:
    """A check of a product that failed.

    Attributes
    ----------
    asset
        Kind of product.
    check
        Name of the check.
    meaning
        What holds where it passes.
    failed, products
        Number of products for which it failed, and of those that it was applied to.
    """

    asset: str
    check: str
    meaning: str
    failed: int
    products: int


def report_document(
    cohort: Cohort, store: Store, report: Report, checks: Sequence[FailedCheck] | None = None
) -> Document:
    """Collect all sections of the HTML report.

    Parameters
    ----------
    report
        The scores (:func:`nic_core.steps.evaluation_report.collect_report`).
    checks
        The failed checks of the orchestrator; None: those that the store alone decides are
        computed (:func:`failed_checks`).

    Raises
    ------
    CohortError
        The slide index does not exist yet, or a slide record is of another version.
    ModelFileError
        A model is of another format.
    """
    index = read_slide_index(store)
    records = {
        slide: read_record(store, slide)
        for slide in index["slide"]
        if (store.slide(slide) / RECORD).exists()
    }
    encoders = [
        read_card(store.encoder(entry.name))
        for entry in cohort.encoders
        if store.encoder(entry.name).exists()
    ]
    models = {
        key: read_slide_model(store.slide_model(key))
        for target in cohort.targets
        for entry in cohort.encoders
        if store.slide_model(key := ModelKey(encoder=entry.name, target=target.name)).exists()
    }
    cards = [card for _, card in models.values()]
    if checks is None:
        checks = failed_checks(cohort, store, {key: result for key, (result, _) in models.items()})
    masks = index["mask"].drop_nulls().len()
    sections = [
        Section("Cohort", _cohort_blocks(cohort, store, index, records)),
        Section("Splits and folds", _split_blocks(cohort, store, index)),
        Section("Encoders", _encoder_blocks(cohort, store, report, encoders)),
        Section("Results", _result_blocks(cohort, store, report, models)),
        Section("Comparisons", _comparison_blocks(cohort, report)),
        Section("External evaluation", _external_blocks(cohort, store)),
        Section("Predictions", _prediction_blocks(cohort, store)),
        Section("Checks that failed", _check_blocks(checks)),
        Section(
            "Methods",
            (
                *map(Text, methods(cohort, encoders, cards, masks=masks)),
                Heading("References and tags"),
                Items(REFERENCES),
            ),
        ),
        Section("Limits", (Items(_limits(cohort, store, index, report, cards)),)),
        Section("All metrics", _all_metrics(cohort, report)),
        Section("Software and hashes", _software_blocks(cohort, store, encoders, cards)),
    ]
    return Document(
        title=f"Evaluation of the study {cohort.name}",
        subtitle=(
            f"Neural image compression of whole-slide images. Written on "
            f"{datetime.now(UTC):%Y-%m-%d} (UTC) by nic {importlib.metadata.version(_PACKAGES[0])}."
            " For research; not a medical device. Slides and patients are counted, not named."
        ),
        sections=tuple(section for section in sections if section.blocks),
    )


def public_text(text: str, ids: Collection[str]) -> str:
    """Return a text that a person wrote, or :data:`WITHHELD` if it contains an id or a path."""
    named = any(
        one in text and re.search(rf"(?<!\w){re.escape(one)}(?!\w)", text) for one in ids if one
    )
    return WITHHELD if named or _PATH.search(text) else text


def failed_checks(
    cohort: Cohort, store: Store, models: dict[ModelKey, CrossValidation]
) -> list[FailedCheck]:
    """Return the failed checks that need no orchestrator: of quality, encoders and slide models.

    Parameters
    ----------
    models
        The models of the store.
    """
    checks = []
    if store.quality_report.exists():
        quality = pl.read_parquet(store.quality_report / QUALITY, glob=False)
        used = quality.filter(pl.col("exclude").is_null())
        problems = used.filter(pl.col("problems") != "").height
        meaning = "The slide does not differ from its cohort in focus, colour, tissue or ink."
        checks.append(
            FailedCheck("quality_report", "slides_comparable", meaning, problems, used.height)
        )
    made = [entry.name for entry in cohort.networks if store.encoder(entry.name).exists()]
    leaking = sum(bool(leaked_groups(cohort, store, name)) for name in made)
    meaning = "No test patient of a patch task is in the encoder's training data of another task."
    checks.append(FailedCheck("encoder", "test_patients_unseen", meaning, leaking, len(made)))
    chance = sum(not permutation_control(result).passed for result in models.values())
    meaning = "The score is above the 95th percentile of the scores with exchanged labels."
    checks.append(
        FailedCheck("slide_model", "above_permutation_control", meaning, chance, len(models))
    )
    return [check for check in checks if check.failed]


def _cohort_blocks(
    cohort: Cohort, store: Store, index: pl.DataFrame, records: dict[str, SlideRecord]
) -> tuple[Block, ...]:
    stages, accessible = _flow(cohort, index, records)
    blocks: list[Block] = [Flow(stages)]
    if not accessible:
        blocks.append(
            Text(
                "The slide files or the slide table could not be read when this report was "
                "written, so slides that cannot be read are not counted."
            )
        )
    used = used_slides(index)
    of_used = [records[slide] for slide in used["slide"] if slide in records]
    facts: list[tuple[str, str]] = [
        ("slides in use", f"{used.height:,}"),
        ("patients", f"{used['patient'].n_unique():,}"),
    ]
    if of_used:
        mpp = sorted({round(record.mpp, 4) for record in of_used})
        area = [record.tissue_mm2 for record in of_used]
        facts += [
            ("um/px at level 0", _listed(f"{value:g}" for value in mpp)),
            ("tissue area, mm2: median (range)", _range(area)),
            ("files are read by", _counts(record.engine for record in of_used)),
        ]
    scanners = [
        stated or (records[slide].scanner if slide in records else None)
        for slide, stated in used.select("slide", "scanner").iter_rows()
    ]
    for name, values in (
        ("scanner", scanners),
        ("site", used["site"].to_list()),
        *((c, used[c].to_list()) for c in DESCRIPTIVE_COLUMNS if c != "scanner"),
    ):
        if any(values):
            facts.append((name, _counts(value or "not stated" for value in values)))
    blocks.append(DataTable("Slides in use", ("", "value"), tuple(facts), texts=2))
    blocks += _label_blocks(cohort, store, used)
    return tuple(blocks)


def _flow(
    cohort: Cohort, index: pl.DataFrame, records: dict[str, SlideRecord]
) -> tuple[tuple[Stage, ...], bool]:
    """Return the stages from listed slides to slides with tissue; whether files were accessible."""
    ids = _ids(index)
    stages = []
    try:
        found = find_slides(cohort)
    except CohortError:  # reported in the section
        found = None
    if found is not None:
        listed = found.index
        lost = listed.filter(~pl.col("slide").is_in(index["slide"].implode()))["slide"]
        missing = sum(slide in found.problems for slide in lost)
        reasons = (
            ("file missing or incomplete", missing),
            ("not readable at the last scan, or added since", len(lost) - missing),
        )
        everything = pl.concat([listed, index]).unique("slide")
        stages.append(_stage("Listed by the cohort's folders and slide table", everything, reasons))
    excluded = index.filter(pl.col("exclude").is_not_null())
    counts = Counter(public_text(reason, ids) for reason in excluded["exclude"])
    stages.append(
        _stage("Readable", index, ((f"excluded: {r}", n) for r, n in counts.most_common()))
    )
    used = used_slides(index)
    if not records:  # a study of embeddings of other software
        stages.append(_stage("In use", used))
        return tuple(stages), found is not None
    recorded = used.filter(pl.col("slide").is_in(list(records)))
    tissue = [slide for slide in recorded["slide"] if records[slide].tissue_mm2 > 0]
    reasons = (
        ("not processed yet, or its processing failed", used.height - recorded.height),
        ("no tissue found", recorded.height - len(tissue)),
    )
    stages.append(_stage("In use", used, reasons))
    stages.append(_stage("With tissue", recorded.filter(pl.col("slide").is_in(tissue))))
    return tuple(stages), found is not None


def _stage(label: str, slides: pl.DataFrame, left_out: Iterable[tuple[str, int]] = ()) -> Stage:
    reasons = tuple((reason, count) for reason, count in left_out if count)
    return Stage(label, slides.height, slides["patient"].n_unique(), reasons)


def _ids(index: pl.DataFrame) -> set[str]:
    """Return the ids of slides and patients, and the names of the slides' files."""
    paths = map(PurePath, index["path"])
    names = {name for path in paths for name in (path.name, path.stem)}
    return {*index["slide"], *index["patient"], *names}


def _label_blocks(cohort: Cohort, store: Store, used: pl.DataFrame) -> list[Block]:
    """Tables of the labels of each target, and of the grids of each encoder."""
    rows, grids = [], []
    for target in cohort.targets:
        if not store.target_folds(target.name).exists():
            continue
        folds = pl.read_parquet(store.target_folds(target.name), glob=False)
        labelled = folds["slides"].explode().unique()
        in_use = used.filter(pl.col("slide").is_in(labelled.implode()))
        rows.append(
            (
                target.name,
                target.kind,
                target.level,
                f"{folds.height:,}",
                f"{in_use.height:,}",
                f"{in_use['patient'].n_unique():,}",
                f"{used.height - in_use.height:,}",
                *_label_rows(cohort, store, target.name),
            )
        )
        for entry in cohort.encoders:
            if store.grid_manifest(entry.name).exists():
                manifest = read_grid_manifest(store, entry.name)
                compressed = manifest.filter(
                    pl.col("hash").is_not_null(), pl.col("slide").is_in(labelled.implode())
                )
                cells = compressed["cells"].sum()
                numbers = (compressed.height, len(labelled) - compressed.height, cells)
                grids.append((target.name, entry.name, *(f"{n:,}" for n in numbers)))
    blocks: list[Block] = []
    if rows:
        columns = (
            *("target", "kind", "unit", "labelled units", "their slides", "their patients"),
            *("slides without a label", "rows of the label table", "of them not used"),
        )
        blocks.append(DataTable("Labels", columns, tuple(rows), texts=3))
    if grids:
        of_grids = ("target", "encoder", "slides with a grid", "slides without one", "cells")
        blocks.append(DataTable("Grids of labelled slides", of_grids, tuple(grids), texts=2))
    return blocks


def _label_rows(cohort: Cohort, store: Store, target: str) -> tuple[str, str]:
    """Return the number of rows of the label table, and of those without a use for the target."""
    try:
        matches = find_unmatched_labels(cohort, store, target)
    except CohortError:  # the label table changed after the folds were made
        return "not readable", ""
    return f"{matches.rows:,}", f"{matches.rows - matches.used:,}"


def _split_blocks(cohort: Cohort, store: Store, index: pl.DataFrame) -> tuple[Block, ...]:
    blocks: list[Block] = []
    try:
        sites_of_slides = read_fold_column(cohort, used_slides(index), "site").drop_nulls("site")
    except CohortError:  # the label table changed after the folds were made
        sites_of_slides = used_slides(index).drop_nulls("site")
        blocks.append(Text("The label table cannot be read: sites are those of the slide table."))
    site_of = dict(sites_of_slides.select("slide", "site").iter_rows())
    for target in cohort.targets:
        if not store.target_folds(target.name).exists():
            continue
        folds = pl.read_parquet(store.target_folds(target.name), glob=False)
        rows = []
        for (split, fold, name), part in folds.sort("split", "fold").group_by(
            "split", "fold", "fold_name", maintain_order=True
        ):
            slides = part["slides"].explode()
            sites = Counter(site_of[slide] for slide in slides if slide in site_of)
            part_name = "test" if split == "test" else f"fold {fold}"
            if split != "test" and name != str(fold):
                part_name += f" ({name})"
            rows.append(
                (
                    part_name,
                    *([_counts_of(sites)] if site_of else []),
                    f"{part['patient'].n_unique():,}",
                    f"{slides.n_unique():,}",
                    f"{part.height:,}",
                    *_label_summary(target, part),
                )
            )
        texts = ("part", "slides of each site") if site_of else ("part",)
        columns = (*texts, "patients", "slides", "units", *_label_columns(target))
        caption = f"{target.name}: a unit is a {target.level}"
        blocks.append(DataTable(caption, columns, tuple(rows), len(texts)))
    return tuple(blocks)


def _label_columns(target: Target) -> tuple[str, ...]:
    match target:
        case ClassificationTarget():
            return target.classes
        case SurvivalTarget():
            return ("events", f"median time, {target.unit}")
        case RegressionTarget():
            return ("mean label", "standard deviation")


def _label_summary(target: Target, units: pl.DataFrame) -> tuple[str, ...]:
    """Return the cells of :func:`_label_columns`."""
    match target:
        case ClassificationTarget():
            return tuple(str(units.filter(y=i).height) for i in range(len(target.classes)))
        case SurvivalTarget():
            return str(units["event"].sum()), f"{float(np.median(units['time'])):,.1f}"
        case RegressionTarget():
            return _number(units["y"].mean()), _number(units["y"].std())


def _encoder_blocks(
    cohort: Cohort, store: Store, report: Report, cards: Sequence[EncoderCard]
) -> tuple[Block, ...]:
    if not cards:
        return ()
    rows = []
    for card in cards:
        geometry = cohort.geometry(card.name)
        rows.append(
            (
                card.name,
                cohort.encoder(card.name).objective,
                ", ".join(card.tasks or card.data) or "none",
                str(geometry.patch),
                f"{geometry.mpp:g}",
                str(geometry.stride),
                f"{geometry.cell_um:g}",
                str(card.embedding_size),
            )
        )
    columns = (
        *("encoder", "objective", "patch tasks of its training"),
        *("patch, px", "um/px", "stride, px", "cell, um", "numbers a cell"),
    )
    blocks: list[Block] = [DataTable("Encoders", columns, tuple(rows), texts=3)]
    blocks.append(Items(tuple(f"{card.name}: {starting_weights(card)}" for card in cards)))
    scores = report.results.filter(kind="patch task")
    if scores.height:
        blocks += [
            Heading("Scores on patch tasks"),
            _metric_table("Test patients of each patch task", scores, ("about", "encoder")),
            Text("Scores of patch tasks do not rank encoders for predictions of slides."),
        ]
    if (picture := report.figures.get("compressed_slide")) is not None:
        caption = (
            "A slide of the cohort with its tissue outlined, its grids coloured by the first "
            "three principal components of their embeddings, and its probability maps."
        )
        blocks.append(_figure(picture, caption))
    return tuple(blocks)


def _result_blocks(
    cohort: Cohort,
    store: Store,
    report: Report,
    models: dict[ModelKey, tuple[CrossValidation, ModelCard]],
) -> tuple[Block, ...]:
    blocks: list[Block] = []
    if models:
        caption = (
            "First metric of each target, with its 95 % interval, for each encoder and model; "
            "the tables below hold the numbers."
        )
        blocks.append(_figure(report.figures["results"], caption))
    if report.notes:
        blocks.append(Items(tuple(report.notes)))
    for target in cohort.targets:
        rows = report.results.filter(kind="target", about=target.name)
        if rows.is_empty():
            continue
        kind = kind_of(target)
        first = rows.unique(["encoder", "model", "part"], keep="first", maintain_order=True)
        columns = (
            *("encoder", "model", "scored on", kind.primary_name, "95 % interval"),
            *("mean ± SD of folds", "units"),
        )
        shown = tuple(
            (
                *(row[name] for name in ("encoder", "model", "part")),
                _number(row["value"]),
                _interval(row["low"], row["high"]),
                _folds(row),
                str(row["n"]),
            )
            for row in first.iter_rows(named=True)
        )
        caption = f"{target.name} ({target.kind}); chance level {kind.chance_level:g}"
        blocks += [Heading(target.name), DataTable(caption, columns, shown, texts=3)]
        for key, (result, _) in models.items():
            if key.target == target.name:
                blocks += _model_pictures(store, key, result)
    maps = report.results.filter(kind="map")
    if maps.height:
        blocks += [
            Heading("Probability maps"),
            _metric_table("Mean over slides of the AUC of cells", maps, ("about", "encoder")),
        ]
    return tuple(blocks)


def _model_pictures(store: Store, key: ModelKey, result: CrossValidation) -> list[Block]:
    """Figures of one model, and the heatmaps of its highest and lowest prediction."""
    name = f"{key.target}, encoder {key.encoder}"
    evaluated = f"{name}: predictions of held-out units, cross-validated."
    reliable = f"{name}: reliability of the cross-validated predictions"
    reliable += "." if isinstance(result.target, RegressionTarget) else ", and decision curve."
    blocks: list[Block] = [
        _figure(evaluation_figure(result), evaluated),
        _figure(reliability_figure(result), reliable),
    ]
    units = result.predictions.filter(model=NETWORK).sort(
        kind_of(result.target).prediction_columns[-1], descending=True
    )
    slides = units["slides"].explode().to_list()
    meaning = heat_meaning(result.target)
    for end, slide in (("highest", slides[0]), ("lowest", slides[-1])):
        path = store.explanation(key) / slide / OVERLAY
        if path.exists():
            caption = f"{name}: heatmap of a slide with the {end} prediction. {meaning}"
            picture = photograph(read_picture(path), side=PICTURE_SIDE)
            blocks.append(Picture(picture, caption, caption, small=True))
    return blocks


def _figure(figure: Figure, caption: str) -> Picture:
    """Return a figure as a picture, which has half the width of the page if it is narrow."""
    small = figure.get_figwidth() <= NARROW
    return Picture(drawn_figure(figure), caption, caption, small=small)


def _comparison_blocks(cohort: Cohort, report: Report) -> tuple[Block, ...]:
    shown = report.comparisons.unique(
        ["target", "part", "first", "second"], keep="first", maintain_order=True
    )
    blocks: list[Block] = []
    for target in cohort.targets:
        rows = tuple(
            (
                *(row[name] for name in ("first", "second", "part", "metric")),
                _signed(row["difference"]),
                "" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}",
                _p(row["p"]),
                _p(row["p_holm"]),
                str(row["n"]),
            )
            for row in shown.filter(target=target.name).iter_rows(named=True)
        )
        if rows:
            columns = (
                *("model", "against", "scored on", "metric"),
                *("difference", "95 % interval", "p", "p (Holm)", "units"),
            )
            caption = f"{target.name}: differences of the first metric"
            blocks.append(DataTable(caption, columns, rows, texts=4))
    if blocks:
        blocks.insert(
            0,
            Text(
                "p (Holm) is corrected for all comparisons of the same target, part of the data "
                "and metric. The smallest p of B bootstrap samples is 2 / (B + 1)."
            ),
        )
    return tuple(blocks)


def _external_blocks(cohort: Cohort, store: Store) -> tuple[Block, ...]:
    blocks: list[Block] = []
    for entry in cohort.external:
        for target in cohort.targets:
            folder = store.external_evaluation(ExternalKey(cohort=entry.name, target=target.name))
            if not folder.exists():
                text = f"{target.name} in {entry.name}: not evaluated when this report was written."
                blocks.append(Text(text))
                continue
            about = json.loads((folder / ABOUT).read_text())
            metrics = pl.read_parquet(folder / METRICS, glob=False)
            rows = tuple(
                (
                    row["metric"],
                    _number(row["value"]),
                    _interval(row["low"], row["high"]),
                    _number(row["cross_validated"]),
                    _signed(row["difference"]),
                    _interval(row["difference_low"], row["difference_high"]),
                )
                for row in metrics.iter_rows(named=True)
            )
            columns = (
                *("metric", "external", "95 % interval", "cross-validated"),
                *("difference", "95 % interval of the difference"),
            )
            caption = (
                f"{about['patients']} patients, {about['units']} units, {about['slides']} slides, "
                f"{about['left_out']} slides left out; model of encoder {about['encoder']}"
            )
            blocks += [
                Heading(f"{target.name} in {entry.name}"),
                DataTable(caption, columns, rows),
            ]
            blocks += _subgroup_blocks(pl.read_parquet(folder / SUBGROUPS, glob=False))
            if (drawn := folder / "evaluation.png").exists():
                caption = f"{target.name}: predictions in the external cohort {entry.name}."
                blocks.append(Picture(stored_png(drawn), caption, caption))
    return tuple(blocks)


def _subgroup_blocks(subgroups: pl.DataFrame) -> list[Block]:
    """Return the table of the first metric of each subgroup; none without subgroups."""
    rows = tuple(
        (
            *(row[name] for name in ("column", "group", "metric")),
            _number(row["value"]),
            _interval(row["low"], row["high"]),
            f"{row['patients']:,}",
            f"{row['units']:,}",
        )
        for row in subgroups.unique(
            ["column", "group"], keep="first", maintain_order=True
        ).iter_rows(named=True)
    )
    columns = ("column", "subgroup", "metric", "value", "95 % interval", "patients", "units")
    return [DataTable("Subgroups", columns, rows, texts=3)] if rows else []


def _prediction_blocks(cohort: Cohort, store: Store) -> tuple[Block, ...]:
    rows = []
    report = (
        pl.read_parquet(store.predictions_report, glob=False)
        if store.predictions_report.exists()
        else None
    )
    for target in cohort.targets:
        if not store.prediction_plan(target.name).exists():
            continue
        plan = pl.read_parquet(store.prediction_plan(target.name), glob=False)
        unplanned = plan.filter(pl.col("reason").is_not_null()).height
        if report is None or (found := report.filter(target=target.name)).is_empty():
            rows.append((target.name, "", "", "0", "", "", "", str(unplanned)))
            continue
        rows.append(
            (
                target.name,
                f"{found['encoder'][0]}, version {found['model_version'][0]}",
                _predicted(target, found),
                f"{found.height:,}",
                f"{found['in_training'].sum():,}",
                f"{found.filter(pl.col('distance_percentile') > FAR_PERCENTILE).height:,}",
                f"{found.filter(pl.col('failed').list.len() > 0).height:,}",
                f"{unplanned:,}",
            )
        )
    if not rows:
        return ()
    columns = (
        *("target", "champion", "predictions", "units", "of them in its training"),
        *(f"beyond the {FAR_PERCENTILE:g}th percentile of distance", "with a failed slide"),
        "slides not predicted",
    )
    return (DataTable("Predictions by the champion of each target", columns, tuple(rows), texts=3),)


def _predicted(target: Target, found: pl.DataFrame) -> str:
    match target:
        case ClassificationTarget():
            return _counts(found["class"].drop_nulls())
        case SurvivalTarget():
            return _counts(f"{group} risk" for group in found["risk_group"].drop_nulls())
        case RegressionTarget():
            return f"median {_number(found['prediction'].median())}"


def _check_blocks(checks: Sequence[FailedCheck]) -> tuple[Block, ...]:
    if not checks:
        return (Text("No check failed."),)
    rows = tuple((c.asset, c.check, c.meaning, f"{c.failed} of {c.products}") for c in checks)
    columns = ("product", "check", "what holds where it passes", "failed for")
    return (DataTable("Checks that failed", columns, rows, texts=3),)


def _limits(
    cohort: Cohort,
    store: Store,
    index: pl.DataFrame,
    report: Report,
    cards: Sequence[ModelCard],
) -> tuple[str, ...]:
    """State what the results do not show, from what the study has."""
    limits = ["The models are for research. They are no medical device."]
    for target in cohort.targets:
        of_target = [card for card in cards if card.target.name == target.name]
        if of_target:
            patients = max(card.training.patients for card in of_target)
            limits.append(
                f"{target.name}: {patients} patients were cross-validated. An interval says how "
                "exactly a metric is known on patients like these, not how it changes elsewhere."
            )
    outside = [
        entry.name
        for entry in cohort.external
        if any(
            store.external_evaluation(ExternalKey(cohort=entry.name, target=t.name)).exists()
            for t in cohort.targets
        )
    ]
    limits.append(
        f"Other hospitals than {', '.join(outside)} were not tested."
        if outside
        else "No external cohort was tested: other hospitals, scanners and stains may give other "
        "results."
    )
    by_site = cohort.settings.models.folds == "site" or isinstance(
        cohort.settings.models.folds, SiteFolds
    )
    if index["site"].null_count() == index.height and not by_site:
        limits.append(
            "The slide table states no sites: whether a site is in several folds is not known."
        )
    networks = len({card.encoder for card in cards})
    if networks > 1:
        limits.append(
            f"{networks} encoders were compared on the same held-out units; the score of "
            "the best of them is expected to be lower on new patients."
        )
    if any(card.settings.seeds == 1 for card in cards):
        limits.append(
            "Each fold was trained from one random initialisation: how much the results depend on "
            "it was not measured."
        )
    if any(card.settings.permute_labels is not None for card in cards):
        limits.append("Labels were exchanged before training: the results are a control.")
    below = report.results.filter(kind="target", part=CROSS_VALIDATED).unique(
        ["about", "encoder", "model"], keep="first", maintain_order=True
    )
    if any(
        row["value"] is not None
        and row["value"] < kind_of(cohort.target(row["about"])).chance_level
        for row in below.iter_rows(named=True)
    ):
        limits.append(
            "A model that has learned nothing scores somewhat below chance when folds are put "
            "together; a value below chance is no hidden signal."
        )
    return tuple(limits)


def _all_metrics(cohort: Cohort, report: Report) -> tuple[Block, ...]:
    return tuple(
        _metric_table(f"{target.name}: value [95 % interval]", rows, ("encoder",))
        for target in cohort.targets
        if (rows := report.results.filter(kind="target", about=target.name)).height
    )


def _metric_table(caption: str, results: pl.DataFrame, keys: tuple[str, ...]) -> DataTable:
    """Return a table with a row for each model and part, and a column for each metric."""
    metrics = results["metric"].unique(maintain_order=True).to_list()
    groups = (*keys, "model", "part")
    rows = []
    for group, part in results.group_by(groups, maintain_order=True):
        value = {row["metric"]: _value(row) for row in part.iter_rows(named=True)}
        rows.append(
            (*map(str, group), *(value.get(name, "") for name in metrics), str(part["n"][0]))
        )
    names = ("name" if key == "about" else key for key in keys)
    columns = (*names, "model", "scored on", *metrics, "n")
    return DataTable(caption, columns, tuple(rows), texts=len(groups))


def _software_blocks(
    cohort: Cohort, store: Store, encoders: Sequence[EncoderCard], cards: Sequence[ModelCard]
) -> tuple[Block, ...]:
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    versions = [("Python", platform.python_version())]
    versions += [(name, installed[name]) for name in _PACKAGES if name in installed]
    trained = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in card.software.items()) for card in cards
    )
    hashes: dict[str, str] = {}
    inputs = (
        ("cohort file", cohort.file),
        ("slide table", cohort.slides.table),
        ("label table", cohort.labels),
    )
    for name, path in inputs:
        if path is not None and path.exists():
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for entry in cohort.encoders:
        if store.grid_manifest(entry.name).exists():
            content = repr(read_grid_manifest(store, entry.name).rows())
            digest = hashlib.sha256(content.encode()).hexdigest()
            hashes[f"grids of encoder {entry.name} (list of their hashes)"] = digest
    hashes |= content_hashes(encoders, cards)
    blocks: list[Block] = [
        DataTable("Software that wrote this report", ("package", "version"), tuple(versions), 2)
    ]
    if trained:
        blocks.append(Text(f"Slide models were trained with {'; '.join(trained)}."))
    rows = tuple(hashes.items())
    blocks.append(DataTable("Hashes (sha256)", ("of", "hash"), rows, texts=2))
    return tuple(blocks)


def _value(row: dict[str, Any]) -> str:
    interval = "" if row["low"] is None else f"\n[{row['low']:.3f}, {row['high']:.3f}]"
    return f"{_number(row['value'])}{interval}"


def _folds(row: dict[str, Any]) -> str:
    if row["folds_mean"] is None:
        return ""
    deviation = "" if row["folds_deviation"] is None else f" ± {row['folds_deviation']:.2f}"
    return f"{row['folds_mean']:.2f}{deviation}"


def _number(value: Any) -> str:
    if value is None:
        return "undefined"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _range(values: Sequence[float]) -> str:
    return f"{np.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _listed(values: Iterable[str], most: int = 8) -> str:
    found = list(values)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def _counts(values: Iterable[str]) -> str:
    return _counts_of(Counter(values))


def _counts_of(counts: Counter[str]) -> str:
    return _listed(f"{name} {count:,}" for name, count in counts.most_common())

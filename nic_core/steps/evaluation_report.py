"""The evaluation report: all scores of a study in one table, comparisons and figures."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
from matplotlib.figure import Figure
from matplotlib.image import imread

from nic_core.cohort import Cohort
from nic_core.encoders.files import read_card
from nic_core.grids import open_grid
from nic_core.models.comparison import COMPARISON_SCHEMA, compare_models, comparison_notes
from nic_core.models.files import read_model_card
from nic_core.models.folds import folds_note
from nic_core.models.kinds import kind_of
from nic_core.pictures import save_figure
from nic_core.reports import (
    ENCODER_SCHEMA,
    FOLD_SCHEMA,
    RESULT_SCHEMA,
    Report,
    encoder_results,
    map_results,
    probe_results,
    results_figure,
)
from nic_core.reports.html import render_html
from nic_core.reports.slide_figure import compressed_slide
from nic_core.steps.probability_maps import OVERLAY
from nic_core.steps.report_sections import FailedCheck, report_document
from nic_core.steps.slide_index import open_indexed, read_patient_groups, read_slide_index
from nic_core.steps.slide_models import CLINICAL, FOLD_METRICS, METRICS, PREDICTIONS
from nic_core.steps.slides import TISSUE, read_record
from nic_core.store import GridKey, MapKey, ModelKey, Store, atomic_folder
from nic_core.tiling.tissue import TissueMask

RESULTS, ENCODERS = "results.parquet", "encoders.parquet"
COMPARISONS, NOTES, HTML = "comparisons.parquet", "notes.txt", "report.html"


def make_evaluation_report(
    cohort: Cohort, store: Store, checks: Sequence[FailedCheck] | None = None
) -> Report:
    """Collect all scores of a study; write and return the report.

    The folder gets ``results.parquet``, ``fold_metrics.parquet``, ``encoders.parquet``,
    ``comparisons.parquet``, ``notes.txt`` (a line each; empty without notes), ``results.png``,
    ``report.html`` (:func:`~nic_core.steps.report_sections.report_document`) and, if every encoder
    has compressed the same slide, ``compressed_slide.png``. Models, encoders and maps that do not
    exist yet are left out.

    Parameters
    ----------
    checks
        See :func:`~nic_core.steps.report_sections.report_document`.

    Raises
    ------
    CohortError
        The slide index does not exist yet, or a slide record is of another version.
    ModelFileError
        A model is of an older format.
    """
    report = collect_report(cohort, store)
    html = render_html(report_document(cohort, store, report, checks))
    with atomic_folder(store.evaluation_report) as folder:
        (folder / NOTES).write_text("".join(f"{note}\n" for note in report.notes))
        report.results.write_parquet(folder / RESULTS)
        report.folds.write_parquet(folder / FOLD_METRICS)
        report.encoders.write_parquet(folder / ENCODERS)
        report.comparisons.write_parquet(folder / COMPARISONS)
        for name, figure in report.figures.items():
            save_figure(figure, folder / f"{name}.png")
        (folder / HTML).write_text(html)
    return report


def collect_report(cohort: Cohort, store: Store) -> Report:
    """Collect all scores of a study without writing anything.

    Raises
    ------
    CohortError
        The slide index does not exist yet.
    ModelFileError
        A model is of an older format.
    """
    settings = cohort.settings.models
    models = {
        target.name: {
            encoder.name: folder
            for encoder in cohort.encoders
            if (
                folder := store.slide_model(ModelKey(encoder=encoder.name, target=target.name))
            ).exists()
        }
        for target in cohort.targets
    }
    cards = {
        target: {encoder: read_model_card(folder) for encoder, folder in folders.items()}
        for target, folders in models.items()
    }
    parts, folds = (
        [
            pl.read_parquet(folder / name, glob=False)
            for folders in models.values()
            for folder in folders.values()
        ]
        for name in (METRICS, FOLD_METRICS)
    )
    for encoder in cohort.encoders:
        if store.encoder(encoder.name).exists():
            parts.append(encoder_results(read_card(store.encoder(encoder.name))))
        if store.encoder_probe(encoder.name).exists():
            parts.append(
                probe_results(
                    encoder.name, pl.read_parquet(store.encoder_probe(encoder.name), glob=False)
                )
            )
    for item in cohort.maps:
        if store.map_scores(item.name).exists():
            scores = pl.read_parquet(store.map_scores(item.name), glob=False)
            parts.append(map_results(item, scores, resamples=settings.bootstrap))
    results = pl.concat([RESULT_SCHEMA.to_frame(), *parts])
    comparisons = pl.concat(
        [
            COMPARISON_SCHEMA.to_frame(),
            *(
                compare_models(
                    target,
                    *(
                        {
                            encoder: pl.read_parquet(folder / file, glob=False)
                            for encoder, folder in models[target.name].items()
                        }
                        for file in (PREDICTIONS, CLINICAL)
                    ),
                    resamples=settings.bootstrap,
                    seed=settings.seed,
                )
                for target in cohort.targets
            ),
        ]
    )
    encoders = _encoders_with_grids(cohort, store)
    chance = {target.name: kind_of(target).chance_level for target in cohort.targets}
    figures = {"results": results_figure(results, chance)}
    if (example := _first_compressed(cohort, store)) is not None:
        figures["compressed_slide"] = draw_slide(cohort, store, example)
    groups = read_patient_groups(store)
    notes = [
        note
        for target in cohort.targets
        if (path := store.target_folds(target.name)).exists()
        and (
            note := folds_note(
                target, pl.read_parquet(path, glob=False), wanted=settings.folds, groups=groups
            )
        )
        is not None
    ]
    for target, of_target in cards.items():
        notes += comparison_notes(target, of_target, comparisons.filter(target=target))
        notes += dict.fromkeys(note for card in of_target.values() for note in card.notes)
    folds_of_models = pl.concat([FOLD_SCHEMA.to_frame(), *folds])
    return Report(results, folds_of_models, encoders, comparisons, figures, notes)


def draw_slide(cohort: Cohort, store: Store, slide: str) -> Figure:
    """Draw a slide with its grids and probability maps.

    See :func:`nic_core.reports.slide_figure.compressed_slide`.
    """
    paths = {
        encoder.name: store.grid(GridKey(encoder=encoder.name, slide=slide))
        for encoder in cohort.encoders
    }
    overlays = {
        item.name: store.probability_map(MapKey(map=item.name, slide=slide)) / OVERLAY
        for item in cohort.maps
    }
    mask = TissueMask.load(store.slide(slide) / TISSUE, read_record(store, slide).tissue_mpp)
    with open_indexed(store, slide) as opened:
        return compressed_slide(
            opened,
            mask,
            {name: open_grid(path) for name, path in paths.items() if path.exists()},
            {f"{n} probability": imread(p) for n, p in overlays.items() if p.exists()},
        )


def _encoders_with_grids(cohort: Cohort, store: Store) -> pl.DataFrame:
    """Return patch, um/px, stride and embedding size of encoders, each from one of its grids."""
    rows, slides = [], read_slide_index(store)["slide"].to_list()
    for encoder in cohort.encoders:
        paths = (store.grid(GridKey(encoder=encoder.name, slide=slide)) for slide in slides)
        if (path := next((path for path in paths if path.exists()), None)) is not None:
            grid = open_grid(path)
            about = grid.provenance
            numbers = (about.patch, about.mpp, about.stride, about.cell_um, grid.shape[0])
            rows.append((encoder.name, *numbers))
    return pl.DataFrame(rows, schema=ENCODER_SCHEMA, orient="row")


def _first_compressed(cohort: Cohort, store: Store) -> str | None:
    """Return the first slide that every encoder has compressed; None if there is none."""
    for slide in read_slide_index(store)["slide"]:
        if all(
            store.grid(GridKey(encoder=encoder.name, slide=slide)).exists()
            for encoder in cohort.encoders
        ):
            return str(slide)
    return None

"""The evaluation report: all scores of a study in one table, comparisons and figures."""

from __future__ import annotations

import polars as pl
from matplotlib.figure import Figure
from matplotlib.image import imread

from nic_core.cohort import Cohort
from nic_core.encoders.files import read_card
from nic_core.grids import open_grid
from nic_core.models.comparison import COMPARISON_SCHEMA, compare_models
from nic_core.models.folds import folds_note
from nic_core.reports import Report, encoder_results, map_results, probe_results, results_figure
from nic_core.reports.slide_figure import compressed_slide
from nic_core.steps.probability_maps import OVERLAY
from nic_core.steps.slide_index import open_indexed, read_patient_groups, read_slide_index
from nic_core.steps.slide_models import METRICS, PREDICTIONS
from nic_core.steps.slides import TISSUE, read_record
from nic_core.store import GridKey, MapKey, ModelKey, Store, atomic_folder
from nic_core.tiling.tissue import TissueMask

RESULTS, COMPARISONS, NOTES = "results.parquet", "comparisons.parquet", "notes.txt"


def make_evaluation_report(cohort: Cohort, store: Store) -> Report:
    """Collect all scores of a study; write and return the report.

    The folder gets ``results.parquet``, ``comparisons.parquet``, ``notes.txt`` (a line each; empty
    without notes), ``results.png`` and, if every encoder has compressed the same slide,
    ``compressed_slide.png``. Models, encoders and maps that
    do not exist yet are left out.
    """
    settings = cohort.settings.models
    parts = [
        pl.read_parquet(path, glob=False)
        for target in cohort.targets
        for encoder in cohort.encoders
        if (
            path := store.slide_model(ModelKey(encoder=encoder.name, target=target.name)) / METRICS
        ).exists()
    ]
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
    results = pl.concat(parts)
    comparisons = pl.concat(
        [
            COMPARISON_SCHEMA.to_frame(),
            *(
                compare_models(
                    target,
                    {
                        encoder.name: pl.read_parquet(path, glob=False)
                        for encoder in cohort.encoders
                        if (
                            path := store.slide_model(
                                ModelKey(encoder=encoder.name, target=target.name)
                            )
                            / PREDICTIONS
                        ).exists()
                    },
                    resamples=settings.bootstrap,
                    seed=settings.seed,
                )
                for target in cohort.targets
            ),
        ]
    )
    figures = {"results": results_figure(results)}
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
    with atomic_folder(store.evaluation_report) as folder:
        (folder / NOTES).write_text("".join(f"{note}\n" for note in notes))
        results.write_parquet(folder / RESULTS)
        comparisons.write_parquet(folder / COMPARISONS)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=110)
    return Report(results, comparisons, figures, notes)


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


def _first_compressed(cohort: Cohort, store: Store) -> str | None:
    """Return the first slide that every encoder has compressed; None if there is none."""
    for slide in read_slide_index(store)["slide"]:
        if all(
            store.grid(GridKey(encoder=encoder.name, slide=slide)).exists()
            for encoder in cohort.encoders
        ):
            return str(slide)
    return None

"""Explanations: heatmaps of slides, by the networks that were not trained on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from nic_core.cohort import Cohort, CohortError
from nic_core.grids import open_grid
from nic_core.maps.heatmaps import OVERLAY, score_heat, write_heatmap
from nic_core.models.cross_validation import NETWORK
from nic_core.models.explanation import explain, heat_caption, held_out_networks
from nic_core.models.files import load_model
from nic_core.models.kinds import kind_of
from nic_core.pictures import read_picture
from nic_core.steps.grids import read_grid_manifest
from nic_core.steps.probability_maps import slide_truth
from nic_core.steps.slide_index import digest, open_indexed
from nic_core.steps.slide_models import PREDICTIONS, with_grids
from nic_core.store import GridKey, ModelKey, Store, atomic_folder
from nic_core.types import Pixels

SCORES = "scores.parquet"
PICTURED = 4  # slides with the highest and the lowest predictions whose heatmaps are drawn
EXPLANATION_SCHEMA = pl.Schema(
    {
        "slide": pl.String(),
        "split": pl.String(),
        "map": pl.String(),  # the probability map whose truth image is used
        "auc": pl.Float64(),  # of the heatmap's values over cells
        "hit": pl.Boolean(),  # pointing game: the hottest cell is positive
    }
)


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`make_explanation`.

    Attributes
    ----------
    scores
        One row per slide and map whose truth image has positive and negative cells,
        :data:`EXPLANATION_SCHEMA`.
    extremes
        ``highest`` and ``lowest`` to the slide with that prediction.
    overlays
        Their heatmaps drawn over them, by slide, uint8 (H, W, 3).
    versions
        Slide id to digest of its heatmap.
    """

    scores: pl.DataFrame
    extremes: dict[str, str]
    overlays: dict[str, Pixels]
    versions: dict[str, str]


def make_explanation(
    cohort: Cohort,
    store: Store,
    key: ModelKey,
    progress: Callable[[int, int], None] | None = None,
) -> Explanation:
    """Compute the heatmap of every slide of a model; write the heatmaps and their scores.

    Each patient is explained by the networks that were not trained on them: the network of the
    fold in which the patient was held out, or all networks for split ``test``. The slides with the
    highest and lowest predictions (classification: probabilities of the last class) are also
    drawn as pictures.

    Parameters
    ----------
    key
        Encoder and target of the model.
    progress
        Called after each slide with the number of slides done and of all slides.

    Raises
    ------
    CohortError
        No slide has a grid.
    ModelFileError
        The model is missing or invalid.
    """
    model = load_model(store.slide_model(key))
    predictions = pl.read_parquet(store.slide_model(key) / PREDICTIONS, glob=False)
    units = predictions.filter(model=NETWORK).sort(
        kind_of(model.card.target).prediction_columns[-1], descending=True
    )
    units = with_grids(units, read_grid_manifest(store, key.encoder)).explode("slides")
    if units.is_empty():
        raise CohortError(f"no slide of target '{key.target}' has a grid; materialize 'grid' again")
    rows, versions = [], {}
    with atomic_folder(store.explanation(key)) as folder:
        for place, row in enumerate(units.iter_rows(named=True)):
            slide, split = row["slides"], row["split"]
            grid = open_grid(store.grid(GridKey(encoder=key.encoder, slide=slide)))
            networks = held_out_networks(model.networks, row["fold"])
            heat = explain(networks, grid, model.card.target, crop=model.card.crop)
            versions[slide] = digest(heat.shape, heat.tobytes())
            with open_indexed(store, slide) as opened:
                write_heatmap(
                    folder / slide,
                    heat,
                    grid.provenance,
                    opened,
                    name=key.target,
                    caption=f"{slide}, {kind_of(model.card.target).prediction_text(row)}\n"
                    f"{heat_caption(model.card.target)}",
                    pictures=min(place, units.height - 1 - place) < PICTURED,
                )
            for item in cohort.maps:
                truth = slide_truth(store, item, grid)
                if truth is not None and (scores := score_heat(heat, truth)) is not None:
                    rows.append((slide, split, item.name, *scores))
            if progress is not None:
                progress(place + 1, units.height)
        scored = pl.DataFrame(rows, schema=EXPLANATION_SCHEMA, orient="row").sort("slide", "map")
        scored.write_parquet(folder / SCORES)
    extremes = {"highest": units["slides"][0], "lowest": units["slides"][-1]}
    overlays = {
        slide: read_picture(store.explanation(key) / slide / OVERLAY) for slide in extremes.values()
    }
    return Explanation(scored, extremes, overlays, versions)

"""Explanations: heatmaps of the slides that a model was tested on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from matplotlib.image import imread

from nic_core.cohort import Cohort, CohortError
from nic_core.grids import open_grid
from nic_core.maps.heatmaps import OVERLAY, score_heat, write_heatmap
from nic_core.models.cross_validation import NETWORK, prediction_columns
from nic_core.models.explanation import explain, held_out_networks
from nic_core.models.files import load_model
from nic_core.steps.grids import read_grid_manifest
from nic_core.steps.probability_maps import slide_truth
from nic_core.steps.slide_index import digest, open_indexed
from nic_core.steps.slide_models import PREDICTIONS, with_grids
from nic_core.store import GridKey, ModelKey, Store, atomic_folder
from nic_core.types import Pixels

SCORES = "scores.parquet"
PICTURED = 4  # slides of highest predictions whose heat is drawn, and of lowest
EXPLANATION_SCHEMA = pl.Schema(
    {
        "slide": pl.String(),
        "split": pl.String(),
        "map": pl.String(),
        "auc": pl.Float64(),
        "hit": pl.Boolean(),
    }
)


@dataclass(frozen=True)
class Explanation:
    """What :func:`make_explanation` made.

    Attributes
    ----------
    scores
        A row a slide and map whose truth tells its cells apart: ``slide``, ``split``, ``map``,
        ``auc`` of the heat over cells, ``hit`` of the pointing game.
    overlays
        Those of the highest and the lowest prediction by what they are, uint8 (H, W, 3).
    versions
        Of each slide's heat.
    """

    scores: pl.DataFrame
    overlays: dict[str, Pixels]
    versions: dict[str, str]


def make_explanation(cohort: Cohort, store: Store, key: ModelKey) -> Explanation:
    """Heatmaps of every slide that a model was tested on; writes them and their scores.

    Each patient is explained by the networks that have not seen them: that of the fold in which
    they were held out, or all for the split ``test``.

    The slides of the highest and lowest predictions (of classes: of the last one) get pictures.

    Raises
    ------
    CohortError
        No slide has a grid.
    """
    model = load_model(store.slide_model(key))
    predictions = pl.read_parquet(store.slide_model(key) / PREDICTIONS)
    units = (
        predictions.filter(model=NETWORK)
        .join(pl.read_parquet(store.target_folds(key.target)).select("unit", "slides"), on="unit")
        .sort(prediction_columns(model.card.target)[-1], descending=True)
    )
    units = with_grids(units, read_grid_manifest(store, key.encoder)).explode("slides")
    if units.is_empty():
        raise CohortError(f"no slide of target '{key.target}' has a grid; materialize 'grid' again")
    rows, versions = [], {}
    with atomic_folder(store.explanation(key)) as folder:
        for place, (slide, fold, split) in enumerate(
            units.select("slides", "fold", "split").rows()
        ):
            grid = open_grid(store.grid(GridKey(encoder=key.encoder, slide=slide)))
            networks = held_out_networks(model.networks, fold)
            heat = explain(networks, grid, model.card.target, crop=model.card.settings.crop)
            versions[slide] = digest(heat.shape, heat.tobytes())
            with open_indexed(store, slide) as opened:
                write_heatmap(
                    folder / slide,
                    heat,
                    grid.provenance,
                    opened,
                    name=key.target,
                    pictures=min(place, units.height - 1 - place) < PICTURED,
                )
            for item in cohort.maps:
                truth = slide_truth(cohort, store, item, slide, grid.valid.shape)
                if truth is not None and (scores := score_heat(heat, truth)) is not None:
                    rows.append((slide, split, item.name, *scores))
        scored = pl.DataFrame(rows, schema=EXPLANATION_SCHEMA, orient="row").sort("slide", "map")
        scored.write_parquet(folder / SCORES)
    overlays = {}
    for end, slide in (("highest", units["slides"][0]), ("lowest", units["slides"][-1])):
        drawn = imread(store.explanation(key) / slide / OVERLAY)
        overlays[f"{end} prediction: {slide}"] = (255 * drawn[..., :3]).astype(np.uint8)
    return Explanation(scored, overlays, versions)

"""What precision int8 costs: embeddings and slide-level targets, against float32.

    python -m studies.int8 --cohort data/demo/cohort.yaml --encoder data/store/encoders/mtl-4 \\
        --out data/studies/int8

The slides of a cohort are compressed in both precisions. For every target, slide models are
cross-validated on the grids of float32, and their networks also predict the held-out patients from
the grids of int8, which they were not trained on: the cost of mixing the two. Then everything is
cross-validated on the grids of int8. Differences are those of the primary metric, with intervals by
the paired bootstrap over patients. A released encoder is a Keras file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from nic_core.cohort import load_cohort
from nic_core.encoders import load_encoder
from nic_core.encoders.encoder import Encoder
from nic_core.encoders.keras_import import import_keras_encoder
from nic_core.encoders.similarity import Similarity, similarity
from nic_core.grids import Grid
from nic_core.models.crops import Crops
from nic_core.models.cross_validation import NETWORK, CrossValidation
from nic_core.models.kinds import kind_of, prediction_array, primary_value
from nic_core.models.metrics import compare
from nic_core.models.training import predict_units
from nic_core.store import Store
from nic_core.tables import terminal_table
from studies.slides import Slides

RESAMPLES = 2000
MIXED = "network of float32 on int8"
Grids = dict[str, Grid]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cohort", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, required=True, help="folder, or a Keras file")
    parser.add_argument("--out", type=Path, required=True, help="folder for patch tables and folds")
    parser.add_argument("--seeds", type=int, default=1, help="number of trainings of each network")
    options = parser.parse_args()
    encoder = read_encoder(options.encoder)
    slides = Slides(load_cohort(options.cohort), Store(options.out.resolve()))
    exact, reduced = (
        slides.compress(encoder.prepare("cpu", precision)) for precision in ("float32", "int8")
    )
    console = Console(width=110)
    found = similarities(exact, reduced)
    console.print(
        f"{len(found)} slides, cosine mean {np.mean([s.cosine for s in found]):.4f}, "
        f"1st percentile {np.mean([s.cosine_p1 for s in found]):.4f} "
        f"(lowest of a slide {min(s.cosine_p1 for s in found):.4f}), distance "
        f"{np.mean([s.distance for s in found]):.1%} of the spread"
    )
    rows = [
        (target, str(seed), model, metric, *(f"{value:+.3f}" for value in figures))
        for seed in range(options.seeds)
        for target, model, metric, *figures in differences(slides, exact, reduced, seed)
    ]
    headings = ("float32", "int8", "difference", "low", "high")
    console.print(terminal_table(("target", "seed", "model", "metric"), headings, rows))


def read_encoder(path: Path) -> Encoder:
    """Load an encoder folder or the Keras file of a released encoder."""
    return load_encoder(path) if path.is_dir() else import_keras_encoder(path, path.stem)


def similarities(exact: Grids, reduced: Grids) -> list[Similarity]:
    """Compare the embeddings of every slide."""
    return [
        similarity(grid.embeddings[:][:, grid.valid].T, exact[name].embeddings[:][:, grid.valid].T)
        for name, grid in reduced.items()
    ]


def differences(
    slides: Slides, exact: Grids, reduced: Grids, seed: int
) -> Iterator[tuple[str, str, str, float, float, float, float, float]]:
    """Yield target, model, metric, its values in float32 and int8, the difference, its interval."""
    settings = slides.cohort.settings.models.model_copy(update={"seed": seed, "bootstrap": 1})
    for target in slides.cohort.targets:
        kind = kind_of(target)
        of_exact = slides.cross_validate(target, exact, settings)
        of_reduced = slides.cross_validate(target, reduced, settings)
        for model in (MIXED, NETWORK, "mean_embedding"):
            first = held_out(of_exact, NETWORK if model == MIXED else model)
            one = prediction_array(kind, first)
            if model == MIXED:
                other = mixed_predictions(of_exact, first, reduced)
            else:
                other = prediction_array(kind, held_out(of_reduced, model))
            name = kind.primary_metric
            found = compare(
                {name: kind.metrics(first, other)[name]},
                {name: kind.metrics(first, one)[name]},
                first["patient"].to_list(),
                resamples=RESAMPLES,
                seed=seed,
            )[name]
            values = primary_value(kind, first, one), primary_value(kind, first, other)
            interval = found.value, found.low, found.high
            yield target.name, model, kind.primary_name, *values, *interval


def held_out(result: CrossValidation, model: str) -> pl.DataFrame:
    """Return the rows of a model's cross-validated predictions, by unit."""
    rows = result.predictions.filter(model=model, split="cv").sort("unit")
    # survival functions have horizons of their own; the primary metric compares risks
    return rows.drop("survival", "horizons", strict=False)


def mixed_predictions(
    result: CrossValidation, rows: pl.DataFrame, grids: Grids
) -> NDArray[np.float64]:
    """Predict held-out units (n, outputs) from other grids, each by the network of its fold."""
    predictions = np.empty((rows.height, len(kind_of(result.target).prediction_columns)))
    for fold, network in enumerate(result.networks):
        of_fold = np.flatnonzero(rows["fold"].to_numpy() == fold)
        predictions[of_fold] = predict_units(
            network,
            rows[of_fold.tolist()],
            Crops(grids.__getitem__, network.normalise, result.crop),
            count=result.settings.crops_at_test,
            seed=result.settings.seed,
        )
    return predictions


if __name__ == "__main__":
    main()

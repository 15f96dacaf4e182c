"""Study of heatmaps: do they find the planted causes of the demo cohort?

    python -m studies.maps run COHORT STORE --out FOLDER
    python -m studies.maps show FOLDER

``COHORT`` is the ``cohort.yaml`` of a demo cohort and ``STORE`` its store with every slide model.
``run`` trains the networks ``small``, ``local`` and ``mil`` on the grids of each encoder (or takes
the store's models, if they are of that network) and explains each slide by networks that have not
seen its patient, by several methods. Controls: labels exchanged between patients, and random
weights. One file for each row of work is written under ``rows``; an interrupted run continues where
it stopped. ``show`` prints the tables of what is finished.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from captum.attr import IntegratedGradients, LayerGradCam, Occlusion
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from nic_core.cohort import NetworkName, load_cohort
from nic_core.grids import Grid, open_grid
from nic_core.maps.heatmaps import score_heat
from nic_core.models.crops import Crops, crop_windows
from nic_core.models.cross_validation import NETWORK, CrossValidation, cross_validate
from nic_core.models.explanation import cell_values, held_out_networks, mean_over_views
from nic_core.models.kinds import kind_of, prediction_array, primary_value
from nic_core.models.kinds.base import ExplainedOutput
from nic_core.models.networks import FoldModel, build_network, occupied
from nic_core.models.training import fitting_threads
from nic_core.orientations import ORIENTATIONS
from nic_core.steps.slide_models import read_slide_model
from nic_core.store import GridKey, ModelKey, Store, atomic_file
from studies.planted import planted_causes
from studies.protocol import DRAWS, LEVEL
from studies.settings import check_settings
from studies.tables import markdown_table

NETWORKS: tuple[NetworkName, ...] = ("small", "local", "mil")
STEPS = 8  # of integrated gradients
BLOCK = 3  # cells a side that occlusion replaces
PARTS = 10  # of a slide's cells that are removed one after the other
CELLS, GRADIENTS, OCCLUSION, GRAD_CAM, ATTENTION = (
    "cell outputs",
    "integrated gradients",
    "occlusion",
    "Grad-CAM",
    "attention",
)
RANDOM_WEIGHTS = "cell outputs, random weights"

Heat = NDArray[np.floating]
Method = Callable[[FoldModel, Tensor, ExplainedOutput], Tensor]

SCORE_SCHEMA = pl.Schema(
    {
        "method": pl.String(),
        "slide": pl.String(),
        "patient": pl.String(),
        "split": pl.String(),
        "cause": pl.String(),  # null: rows of deletion and agreement
        "auc": pl.Float64(),
        "hit": pl.Boolean(),
        "deletion": pl.Float64(),  # see removal_effect
        "agreement": pl.Float64(),  # Spearman's rho between the maps of folds, split test only
    }
)


# --- methods -------------------------------------------------------------------------------------


def output_of(model: FoldModel, output: ExplainedOutput) -> Callable[[Tensor], Tensor]:
    """Return the function from crops of features (B, k, side, side) to what is explained (B,)."""
    return lambda x: output(model.network(x), model.shift, model.scale)


def integrated_gradients(model: FoldModel, x: Tensor, output: ExplainedOutput) -> Tensor:
    """Integrated gradients from the mean embedding of the training cohort."""
    method = IntegratedGradients(output_of(model, output))
    found: Tensor = method.attribute(x, n_steps=STEPS).sum(1)[0]
    return found.detach()


def grad_cam(model: FoldModel, x: Tensor, output: ExplainedOutput) -> Tensor:
    """Grad-CAM of the first convolution [B], with its sign."""
    first = next(m for m in model.network.modules() if isinstance(m, nn.Conv2d))
    method = LayerGradCam(output_of(model, output), first)
    found: Tensor = method.attribute(x)[0, 0]
    return found.detach()


def occlusion(model: FoldModel, x: Tensor, output: ExplainedOutput) -> Tensor:
    """What is lost where a block of cells gets the slide's mean features."""
    tissue = occupied(x)
    mean = x.sum((2, 3), keepdim=True) / tissue.sum()
    method = Occlusion(output_of(model, output))
    with torch.no_grad():
        found: Tensor = method.attribute(
            x,
            (x.shape[1], BLOCK, BLOCK),
            strides=(x.shape[1], BLOCK, BLOCK),
            baselines=mean * tissue,
            perturbations_per_eval=128,
        )
    return found[0, 0]


def attention(model: FoldModel, x: Tensor, output: ExplainedOutput) -> Tensor:
    """The weights of cells, without direction."""
    with torch.no_grad():
        found: Tensor = model.network.attention(x)[0]  # type: ignore[operator]
    return found


def methods(network: NetworkName) -> dict[str, tuple[Method, int]]:
    """Return the methods of a network, each with the number of orientations to average."""
    common: dict[str, tuple[Method, int]] = {
        CELLS: (cell_values, ORIENTATIONS),
        GRADIENTS: (integrated_gradients, ORIENTATIONS),
    }
    if network == "mil":
        return common | {ATTENTION: (attention, 1)}
    return common | {OCCLUSION: (occlusion, 1), GRAD_CAM: (grad_cam, ORIENTATIONS)}


# --- running -------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Train, explain and score every row of work that has no file yet."""
    cohort, store, out = load_cohort(options.cohort), Store(options.store), options.out
    check_settings(
        out, {"cohort": str(options.cohort.resolve()), "store": str(options.store.resolve())}
    )
    names = [target.name for target in cohort.targets]
    labels = (False, True)  # exchanged
    for exchanged, network, encoder, target in itertools.product(
        labels, options.networks, options.encoders, names
    ):
        path = _row(out, encoder, target, network, exchanged=exchanged)
        if path.exists():
            continue
        start = time.monotonic()
        key = ModelKey(encoder=encoder, target=target)
        result, _ = read_slide_model(store.slide_model(key))
        if exchanged or result.settings.network != network:
            result = _train(store, key, result, network, exchanged=exchanged)
        scores = _score(options.cohort.parent / "truth", store, key, result)
        row = scores.with_columns(
            encoder=pl.lit(encoder),
            target=pl.lit(target),
            network=pl.lit(network),
            exchanged=pl.lit(exchanged),
            **{split: pl.lit(value) for split, value in _metrics(result).items()},
        )
        with atomic_file(path) as partial:
            row.write_parquet(partial)
        print(f"{path.stem}: {time.monotonic() - start:.0f} s", flush=True)


def _train(
    store: Store, key: ModelKey, stored: CrossValidation, network: NetworkName, *, exchanged: bool
) -> CrossValidation:
    """Train a network on the folds of the store's model of the same encoder and target."""
    units = stored.predictions.filter(model=NETWORK)
    labels = kind_of(stored.target).label_columns
    table = units.select("unit", "patient", "split", "slides", *labels)
    folds = units.filter(split="cv").select("patient", "fold", "fold_name").unique()
    settings = stored.settings.model_copy(
        update={
            "network": network,
            "positions": False,
            "bootstrap": 20,  # the intervals of the metrics are not used
            "permute_labels": 1 if exchanged else None,
        }
    )
    return cross_validate(
        stored.target,
        table,
        folds.sort("patient"),
        lambda slide: open_grid(store.grid(GridKey(encoder=key.encoder, slide=slide))),
        settings,
        crop=stored.crop,
    )


def _metrics(result: CrossValidation) -> dict[str, float]:
    """Return the primary metric of the network in both splits."""
    kind = kind_of(result.target)
    return {
        split: primary_value(kind, part, prediction_array(kind, part))
        for split in ("cv", "test")
        if (part := result.predictions.filter(model=NETWORK, split=split)).height
    }


def _score(truth: Path, store: Store, key: ModelKey, result: CrossValidation) -> pl.DataFrame:
    """Score the maps of every slide by every method (``SCORE_SCHEMA``)."""
    kind, crop = kind_of(result.target), result.crop
    output = kind.explained_output(None)
    signals = dict(pl.read_csv(truth / "causes.csv").select("slide", "signal").iter_rows())
    found = methods(result.settings.network)
    if result.settings.permute_labels is not None:
        found = {CELLS: found[CELLS]}  # one method is enough for the control
    shuffled = [_random_weights(model, result, seed) for seed, model in enumerate(result.networks)]
    works = [(name, *method, result.networks) for name, method in found.items()]
    if result.settings.permute_labels is None:
        works.append((RANDOM_WEIGHTS, *found[CELLS], tuple(shuffled)))
    rows: list[tuple[object, ...]] = []
    units = result.predictions.filter(model=NETWORK).explode("slides")
    for unit in units.iter_rows(named=True):
        slide, fold = unit["slides"], unit["fold"]
        about = slide, unit["patient"], unit["split"]
        grid = open_grid(store.grid(GridKey(encoder=key.encoder, slide=slide)))
        points = np.asarray(Image.open(truth / f"{slide}.png"))
        causes = planted_causes(key.target, points, grid.valid.shape, signals[slide])
        for name, method, orientations, every in works:
            networks = held_out_networks(every, fold)

            def values(model: FoldModel, x: Tensor, method: Method = method) -> Tensor:
                return method(model, x, output)

            maps = [
                mean_over_views([model], grid, values, crop=crop, orientations=range(orientations))
                for model in networks
            ]
            heat = np.mean(maps, axis=0)
            for cause in causes:
                scored = np.where(cause.known, cause.cells, -1).astype(np.int8)
                if (score := score_heat(cause.sign * heat, scored)) is not None:
                    rows.append((name, *about, cause.name, *score, None, None))
            removed = np.mean(
                [removal_effect(model, grid, heat, output, crop) for model in networks]
            )
            agreement = fold_agreement(maps) if fold is None else None
            rows.append((name, *about, None, None, None, float(removed), agreement))
    return pl.DataFrame(rows, schema=SCORE_SCHEMA, orient="row")


def _random_weights(model: FoldModel, result: CrossValidation, seed: int) -> FoldModel:
    """Return a network of the same inputs with other random weights."""
    kind = kind_of(result.target)
    with torch.random.fork_rng():
        torch.manual_seed(1000 + seed)
        network = build_network(
            result.settings.network,
            model.normalise.channels,
            kind.outputs,
            positions=result.settings.positions,
        ).requires_grad_(False)
    return FoldModel(model.normalise, network, kind).eval()


def removal_effect(
    model: FoldModel, grid: Grid, heat: Heat, output: ExplainedOutput, crop: int
) -> float:
    """Return how much more the output is where the coldest cells are removed, not the hottest.

    Cells are removed in tenths of the tissue, hottest first (deletion) and coldest first; a removed
    cell gets the mean features of the slide. The result is the mean over the curves of the
    difference between both, relative to the deviation of the curves; a random order has 0.
    """
    crops = Crops(lambda _: grid, model.normalise, crop)
    rows, columns = grid.valid.shape
    centre = crop // 2 - (crop - rows) // 2, crop // 2 - (crop - columns) // 2
    x = torch.from_numpy(crops.crop_at("", centre, 0))
    in_grid, in_crop = crop_windows(grid.valid.shape, centre, crop)
    placed = np.full(x.shape[1:], np.nan)
    placed[in_crop] = heat[in_grid]
    tissue = occupied(x[None])[0, 0].numpy() > 0
    at = np.argwhere(tissue & np.isfinite(placed))
    order = np.argsort(-placed[tuple(at.T)], kind="stable")
    mean = x[:, tissue].mean(1, keepdim=True)
    curves = []
    for sequence in (order, order[::-1]):
        changed = x.repeat(PARTS - 1, 1, 1, 1)
        for part in range(1, PARTS):
            rows_, columns_ = at[sequence[: len(at) * part // PARTS]].T
            changed[part - 1][:, rows_, columns_] = mean
        with torch.no_grad(), fitting_threads(crop):
            curves.append(output(model.network(changed), model.shift, model.scale).numpy())
    hottest, coldest = curves
    deviation = np.std(curves)
    return float((coldest - hottest).mean() / deviation) if deviation > 0 else 0.0


def fold_agreement(maps: Sequence[Heat]) -> float:
    """Return the mean Spearman's rho between the maps of a slide by the networks of folds."""
    known = np.isfinite(maps[0])
    pairs = itertools.combinations([heat[known] for heat in maps], 2)
    return float(np.mean([stats.spearmanr(one, other).statistic for one, other in pairs]))


def _row(out: Path, encoder: str, target: str, network: str, *, exchanged: bool) -> Path:
    end = "-exchanged" if exchanged else ""
    return out / "rows" / f"{encoder}-{target}-{network}{end}.parquet"


# --- showing -------------------------------------------------------------------------------------


def show(options: argparse.Namespace) -> None:
    """Print the tables of what is finished, as Markdown: split ``cv``, then ``test``."""
    rows = [pl.read_parquet(path) for path in sorted((options.folder / "rows").glob("*.parquet"))]
    if not rows:
        raise SystemExit(f"{options.folder} has no rows; run 'python -m studies.maps run' first")
    table = pl.concat(rows, how="diagonal")
    for split in ("cv", "test"):
        print(f"Split {split}\n\n{_table(table.filter(split=split), split)}\n")


def _table(scores: pl.DataFrame, split: str) -> str:
    """Return the table of a split: AUC of each cause with its interval and the share of hits."""
    causes = scores["cause"].drop_nulls().unique().sort().to_list()
    keys = ("target", "encoder", "network", "exchanged", "method")
    rows = []
    for key, part in scores.group_by(*keys, maintain_order=True):
        target, encoder, network, exchanged, method = key
        removal, agreement = part.select(pl.col("deletion", "agreement").mean()).row(0)
        rows.append(
            [
                f"{target}, {network}, {encoder}",
                f"{part[split][0]:.2f}",
                f"{method}, labels exchanged" if exchanged else str(method),
                *(_cause(part.filter(cause=cause)) for cause in causes),
                f"{removal:.2f}",
                *([f"{agreement:.2f}"] if split == "test" else []),
            ]
        )
    header = ["target, network, encoder", "metric", "map", *causes, "removal"]
    # the networks of all folds explain the slides of split test
    return markdown_table([*header, *(["agreement"] if split == "test" else [])], rows)


def _cause(scores: pl.DataFrame) -> str:
    """Return the mean AUC of a cause with its interval by bootstrap over patients, and hits."""
    if scores.is_empty():
        return ""
    value, low, high = mean_interval(scores)
    return f"{value:.2f} [{low:.2f}, {high:.2f}], {scores.select(pl.col('hit').mean()).item():.0%}"


def mean_interval(scores: pl.DataFrame) -> tuple[float, float, float]:
    """Return the mean of ``auc`` over slides with its interval by bootstrap over patients."""
    sums = scores.group_by("patient").agg(pl.col("auc").sum(), pl.len()).sort("patient")
    values = sums.select("auc", "len").to_numpy()
    drawn = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    total = values[drawn].sum(1)
    low, high = np.quantile(total[:, 0] / total[:, 1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(values[:, 0].sum() / values[:, 1].sum()), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="train, explain and score what is missing")
    running.add_argument("cohort", type=Path, help="cohort.yaml of a demo cohort")
    running.add_argument("store", type=Path, help="its store")
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    running.add_argument("--encoders", nargs="+", required=True, help="of the cohort")
    running.set_defaults(do=run)
    showing = commands.add_parser("show", help="print the tables of what is finished")
    showing.add_argument("folder", type=Path)
    showing.set_defaults(do=show)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()

"""Study on composed slides: slide models on the grids of several encoders, where pixels are real.

    python -m studies.composed run REALDATA --out FOLDER --released FOLDER --encoders FOLDER...
    python -m studies.composed show FOLDER --picture composed.png
    python -m studies.composed layout FOLDER --picture layout.png

``run`` composes a cohort of real tissue (:mod:`nic_core.demo.composed`), compresses its slides with
every encoder and cross-validates the three targets with the grid CNN and with attention pooling
(``mil``); the linear model on the mean embedding is fitted along. The controls are mean RGB, tissue
area, and exchanged labels.
Predictions are written to FOLDER, one file for each encoder, model, seed and target, and an
interrupted run resumes when it is started again. ``show`` prints the metrics with 95 % intervals
and the differences between encoders by the paired bootstrap over the patients of the slides. A
metric is the mean over seeds, in each resample too. ``layout`` draws what was planted in a slide of
each growth pattern.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyvips
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nic_core.cohort import EncoderSpec, NetworkName, Target, load_cohort
from nic_core.demo import make_composed
from nic_core.demo.tissues import Tissue
from nic_core.encoders import EncoderCard, load_encoder, train_encoder
from nic_core.encoders.inference import PreparedEncoder
from nic_core.encoders.keras_import import import_keras_encoder
from nic_core.grids import Grid
from nic_core.models.cross_validation import NETWORK
from nic_core.models.kinds import kind_of, prediction_array
from nic_core.models.metrics import Difference, Interval, Metric, compare, score
from nic_core.store import Store, atomic_file
from studies.encoders import EMBEDDING_SIZE, MPP, RELEASED, untrained_encoder
from studies.features import ColourAndTexture
from studies.settings import check_settings
from studies.slides import Slides
from studies.tissue_tasks import PATCH

NETWORKS: tuple[NetworkName, ...] = ("small", "mil")
MODELS = {
    "small": "grid CNN",
    "mil": "MIL",
    "mean_embedding": "mean embedding, linear",
    "tissue_area": "tissue area, linear",
}
REFERENCE = "released_mtl"
FEATURES = "colour_and_texture"
PERMUTED = "exchanged labels"
RESAMPLES = 2000
# in a truth image: name and colour
TISSUES: dict[int, tuple[str, str]] = {
    Tissue.BACKGROUND: ("glass", "white"),
    Tissue.TUMOUR: ("malignant glands", "#882255"),
    Tissue.RIM: ("stroma", "#ddcc77"),
    Tissue.GLAND: ("benign glands", "#88ccee"),
}


@dataclass(frozen=True)
class Work:
    """Cross-validations of the targets with the grids of an encoder."""

    encoder: str
    network: NetworkName
    seed: int
    permuted: bool = False

    def path(self, out: Path, target: str) -> Path:
        labels = "permuted" if self.permuted else "own"
        name = f"{self.network}-{labels}-{self.seed}-{target}.parquet"
        return out / "rows" / self.encoder / name


# --- running ---------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    out: Path = options.out
    check_settings(out, {"slides": options.slides, "side": options.side})
    cohort = make_composed(
        out / "composed", options.material, slides=options.slides, side=options.side
    )
    slides = Slides(load_cohort(cohort), Store(out / "store"))
    # every encoder with a seed before the next seed, as a run may be stopped
    for seed in range(options.seeds):
        for encoder in _encoders(options):
            work = [
                one
                for one in _work(encoder, seed)
                if not all(one.path(out, t.name).exists() for t in slides.cohort.targets)
            ]
            if not work:
                continue
            start = time.monotonic()
            grids = slides.compress(_prepared(encoder, options))
            print(f"{encoder}: compressed in {time.monotonic() - start:.0f} s", flush=True)
            for one in work:
                _evaluate(slides, one, grids, out)


def _encoders(options: argparse.Namespace) -> list[str]:
    released = list(RELEASED) if options.released else []
    names = [
        "mean_rgb",
        *released,
        "untrained",
        *(folder.name for folder in options.encoders),
        FEATURES,
    ]
    if len(set(names)) < len(names):
        raise SystemExit(f"encoders {', '.join(names)}: two have one name; rename a folder")
    return names


def _work(encoder: str, seed: int) -> Iterator[Work]:
    for network in NETWORKS:
        yield Work(encoder, network, seed)
    if encoder == REFERENCE:
        yield Work(encoder, "small", seed, permuted=True)


def _prepared(name: str, options: argparse.Namespace) -> PreparedEncoder:
    if name == FEATURES:
        return hand_made_features()
    if name in RELEASED:
        return import_keras_encoder(options.released / RELEASED[name], name).prepare()
    if name == "untrained":
        return untrained_encoder(PATCH, EMBEDDING_SIZE, 0).prepare()
    if name == "mean_rgb":
        spec = EncoderSpec(name=name, objective="mean_rgb")
        return train_encoder(
            spec, [], patch=PATCH, mpp=MPP, embedding_size=EMBEDDING_SIZE
        ).encoder.prepare()
    (folder,) = (folder for folder in options.encoders if folder.name == name)
    return load_encoder(folder).prepare()


class _Features(nn.Module):
    """The 44 hand-made features of patches uint8 (B, 3, P, P)."""

    def forward(self, pixels: Tensor) -> Tensor:
        found = ColourAndTexture().embed(pixels.permute(0, 2, 3, 1).numpy())
        return torch.from_numpy(found.astype(np.float32))


def hand_made_features() -> PreparedEncoder:
    """Return the 44 features of colour and texture in the form of an encoder."""
    card = EncoderCard(
        name=FEATURES,
        architecture="features",
        objective=FEATURES,
        patch=PATCH,
        mpp=MPP,
        embedding_size=44,
        weights_hash=FEATURES,
    )
    cpu = torch.device("cpu")
    return PreparedEncoder(card, _Features(), PATCH, MPP, cpu, "float32", "patch")


def _evaluate(slides: Slides, work: Work, grids: dict[str, Grid], out: Path) -> None:
    """Cross-validate all targets; write the predictions for held-out units, a file a target."""
    settings = slides.cohort.settings.models.model_copy(
        update={
            "seed": work.seed,
            "network": work.network,
            "bootstrap": 1,
            "permute_labels": work.seed if work.permuted else None,
        }
    )
    for target in slides.cohort.targets:
        path = work.path(out, target.name)
        if path.exists():
            continue
        start = time.monotonic()
        predictions = slides.cross_validate(target, grids, settings).predictions
        with atomic_file(path) as partial:
            predictions.write_parquet(partial)
        print(f"{work.encoder} {path.stem}: {time.monotonic() - start:.0f} s", flush=True)


# --- showing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """The predictions of one model for a target, a table for each seed."""

    encoder: str
    model: str
    labels: str
    predictions: tuple[pl.DataFrame, ...]


def gather(folder: Path, target: Target) -> list[Results]:
    """Collect the predictions for a target; networks and, along with the grid CNN, baselines."""
    found: dict[tuple[str, str, str], list[pl.DataFrame]] = {}
    for path in sorted((folder / "rows").glob("*/*.parquet")):
        network, labels, _, name = path.stem.split("-", 3)
        if name != target.name:
            continue
        rows = pl.read_parquet(path, glob=False)
        for model in rows["model"].unique(maintain_order=True):
            if model != NETWORK and network != "small":
                continue
            key = path.parent.name, network if model == NETWORK else model, labels
            found.setdefault(key, []).append(rows.filter(model=model).sort("unit"))
    return [Results(*key, tuple(tables)) for key, tables in found.items()]


def interval(target: Target, results: Results) -> Interval:
    """Return the primary metric, mean over seeds, with its 95 % interval over patients."""
    patients = results.predictions[0]["patient"].to_list()
    metrics = {"mean": mean_metric(target, results.predictions)}
    return score(metrics, patients, resamples=RESAMPLES, seed=0)["mean"]


def difference(target: Target, one: Results, other: Results) -> Difference:
    """Return the difference of the primary metrics, with its 95 % paired interval."""
    units, others = (r.predictions[0].select("unit", "patient") for r in (one, other))
    if not units.equals(others):
        raise SystemExit(
            f"{target.name}: {one.encoder} and {other.encoder} predict different units; "
            "run the study again in a new folder"
        )
    first, second = ({"mean": mean_metric(target, r.predictions)} for r in (one, other))
    return compare(first, second, units["patient"].to_list(), resamples=RESAMPLES, seed=0)["mean"]


def mean_metric(target: Target, predictions: Sequence[pl.DataFrame]) -> Metric:
    """Return the mean over seeds of the primary metric, as a function of bootstrap counts."""
    kind = kind_of(target)
    metrics = [kind.metrics(p, prediction_array(kind, p))[kind.primary_metric] for p in predictions]
    return lambda counts: np.mean([metric(counts) for metric in metrics], axis=0)


def show(options: argparse.Namespace) -> None:
    folder: Path = options.folder
    targets = load_cohort(folder / "composed" / "cohort.yaml").targets
    found = {target.name: gather(folder, target) for target in targets}
    console = Console(width=140)
    console.print(metrics_table(targets, found))
    console.print(differences_table(targets, found))
    picture(targets, found).savefig(options.picture, dpi=90)
    console.print(str(options.picture))


def metrics_table(targets: Sequence[Target], found: Mapping[str, Sequence[Results]]) -> Table:
    """Return a table with a row for each encoder and model, the controls last."""
    titles = [f"{t.name}, {kind_of(t).primary_name}" for t in targets]
    table = Table("encoder", "model", "seeds", *titles, title="cross-validated")
    values: dict[tuple[str, str], dict[str, Results]] = {}
    for target in targets:
        for results in found[target.name]:
            values.setdefault(_key(results), {})[target.name] = results
    for key in sorted(values, key=_order):
        own = values[key]
        cells = [_interval(interval(t, own[t.name])) if t.name in own else "" for t in targets]
        seeds = {len(results.predictions) for results in own.values()}
        table.add_row(*key, "/".join(map(str, sorted(seeds))), *cells)
    return table


def differences_table(targets: Sequence[Target], found: Mapping[str, Sequence[Results]]) -> Table:
    """Return a table of differences: between encoders, and of the grid CNN to other models."""
    table = Table("first", "second", *(t.name for t in targets), title="differences, paired")
    encoders = sorted({r.encoder for own in found.values() for r in own if r.labels == "own"})
    pairs = [
        ((REFERENCE, model), (encoder, model))
        for model in ("small", "mean_embedding", "mil")
        for encoder in encoders
        if encoder != REFERENCE and REFERENCE in encoders
    ]
    pairs += [((e, "small"), (e, model)) for e in encoders for model in ("mil", "mean_embedding")]
    for pair in pairs:
        cells = []
        for target in targets:
            sides = {(r.encoder, r.model): r for r in found[target.name] if r.labels == "own"}
            one, other = (sides.get(side) for side in pair)
            cells.append(
                "" if one is None or other is None else _interval(difference(target, one, other))
            )
        table.add_row(*(f"{encoder}: {MODELS[model]}" for encoder, model in pair), *cells)
    return table


def picture(targets: Sequence[Target], found: Mapping[str, Sequence[Results]]) -> Figure:
    """Plot metrics with intervals, a panel for each target."""
    figure = Figure(figsize=(4.4 * len(targets), 3.8), layout="constrained")
    for axes, target in zip(
        figure.subplots(1, len(targets), squeeze=False)[0], targets, strict=True
    ):
        own = [r for r in found[target.name] if r.labels == "own"]
        encoders = sorted({r.encoder for r in own}, key=_place)
        for shift, model in enumerate(("small", "mil", "mean_embedding")):
            places, values = [], []
            for results in own:
                if results.model == model:
                    places.append(encoders.index(results.encoder) + 0.2 * (shift - 1))
                    values.append(interval(target, results))
            middle = np.array([v.value for v in values])
            bounds = np.array([(v.value - v.low, v.high - v.value) for v in values])
            axes.errorbar(places, middle, bounds.T.clip(0), fmt="o", ms=4, label=MODELS[model])
        axes.axhline(kind_of(target).chance_level, color="0.6", lw=0.8, ls=":")
        labels = [name.replace("_", " ") for name in encoders]
        axes.set_xticks(range(len(encoders)), labels, rotation=40, ha="right", fontsize=8)
        axes.set_title(target.name, fontsize=10)
        axes.set_ylabel(kind_of(target).primary_name)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def layout(options: argparse.Namespace) -> None:
    """Draw the truth image of the first slide of each growth pattern."""
    root: Path = options.folder / "composed"
    slides = pl.read_csv(root / "slides.csv").join(pl.read_csv(root / "labels.csv"), on="slide")
    slides = slides.unique("growth", keep="first", maintain_order=True)
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    colours = ListedColormap([colour for _, colour in TISSUES.values()])
    for axes, row in zip(
        figure.subplots(1, slides.height), slides.iter_rows(named=True), strict=True
    ):
        truth = pyvips.Image.new_from_file(str(root / row["truth"])).numpy()
        axes.imshow(np.searchsorted(list(TISSUES), truth), cmap=colours, vmax=len(TISSUES) - 1)
        axes.set_title(row["growth"], fontsize=9)
        axes.axis("off")
    handles = [Patch(color=colour, label=name) for name, colour in list(TISSUES.values())[1:]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(options.picture, dpi=100)
    print(options.picture)


def _key(results: Results) -> tuple[str, str]:
    labels = f", {PERMUTED}" if results.labels == "permuted" else ""
    return f"{results.encoder}{labels}", MODELS[results.model]


def _order(key: tuple[str, str]) -> tuple[bool, tuple[int, str], int]:
    encoder, model = key
    return PERMUTED in encoder, _place(encoder), list(MODELS.values()).index(model)


def _place(encoder: str) -> tuple[int, str]:
    first = ("mean_rgb", FEATURES, "untrained", "released_bigan", "released_mtl")
    return (first.index(encoder) if encoder in first else len(first), encoder)


def _interval(found: Interval | Difference) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run")
    runner.set_defaults(work=run)
    runner.add_argument("material", type=Path, help="folder of the real data, with MANIFEST.csv")
    runner.add_argument("--out", type=Path, required=True)
    runner.add_argument("--slides", type=int, default=48)
    runner.add_argument("--side", type=int, default=2048, help="px, at the um/px of the material")
    runner.add_argument("--seeds", type=int, default=2)
    runner.add_argument("--released", type=Path, help="folder of the released Keras encoders")
    runner.add_argument(
        "--encoders", type=Path, nargs="*", default=[], help="folders of encoders trained here"
    )
    runner.add_argument("--threads", type=int, default=1)
    shower = commands.add_parser("show")
    shower.set_defaults(work=show)
    shower.add_argument("folder", type=Path)
    shower.add_argument("--picture", type=Path, required=True)
    planter = commands.add_parser("layout")
    planter.set_defaults(work=layout)
    planter.add_argument("folder", type=Path)
    planter.add_argument("--picture", type=Path, required=True)
    options = parser.parse_args()
    if "threads" in options:
        torch.set_num_threads(options.threads)
    options.work(options)


if __name__ == "__main__":
    main()

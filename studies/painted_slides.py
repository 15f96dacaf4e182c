"""Study on painted slides: multitask encoders against unsupervised ones, by number of tasks.

    python -m studies.painted_slides run COHORT.yaml --out FOLDER [--slides] [--subsets 1]
    python -m studies.painted_slides show FOLDER... --picture study.png

``run`` trains, for each seed, VAE, contrastive and BiGAN on the patches of all tasks, and
supervised encoders on every set of 1, 2, ... tasks, all with equal patches seen [choice]. Mean RGB,
colour and texture features and an untrained network are included for comparison. Each encoder is
evaluated by the linear probe of every patch task; with ``--slides`` the slides are also compressed
and the targets cross-validated. The seed determines the splits of the patch tasks (by group) and
the initial weights. Results are written to FOLDER, one file per encoder, and an interrupted run
resumes when it is started again. ``show`` collects the results into ``study.parquet``, prints means
by number of tasks and by set of tasks, and draws the figure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path

import numpy as np
import polars as pl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from nic_core.cohort import Cohort, EncoderSpec, PatchTask, load_cohort
from nic_core.encoders import (
    Encoder,
    PatchDataset,
    build_patch_task,
    load_patch_task,
    train_encoder,
)
from nic_core.encoders.probes import Embedder, linear_probe, task_embeddings
from nic_core.models.kinds import kind_of
from nic_core.steps import digest
from nic_core.store import Store, atomic_file, atomic_folder
from studies.encoders import UNSUPERVISED, Learned, untrained_encoder
from studies.features import ColourAndTexture
from studies.settings import check_settings
from studies.slides import Slides

# instead of the published 1e-2, which is too high for so few steps [choice]
RATES = {"mtl": 2e-3, "contrastive": 2e-3}
PROBE = "probe"  # balanced accuracy of the linear probe on a patch task
STARS = "* trained with its labels, + on its patches"

SCHEMA = pl.Schema(
    {
        "cohort": pl.String(),
        "seed": pl.Int64(),
        "encoder": pl.String(),
        "kind": pl.String(),  # objective, or kind of an encoder that was not trained here
        "tasks": pl.String(),  # patch tasks with labels in training, joined by +
        "count": pl.Int64(),  # number of these tasks
        "measure": pl.String(),  # PROBE, or the metric of a slide target
        "model": pl.String(),  # linear probe, network, mean_embedding or tissue_area
        "on": pl.String(),  # patch task or slide target
        "trained_on": pl.String(),  # part of the patch task in training: labels, pixels or nothing
        "value": pl.Float64(),
    }
)


# --- running ---------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    cohort = load_cohort(options.cohort)
    out: Path = options.out
    _check_settings(cohort, options)
    slides = Slides(cohort, Store(out / "slides")) if options.slides else None
    # the unsupervised encoders come last, because they take longest
    for last, seed in product((False, True), range(options.seeds)):
        tasks = [_dataset(cohort, task, seed, out) for task in cohort.patch_tasks]
        for name, kind, labels, spec in _encoders(cohort, options, seed):
            path = out / "rows" / f"{name}-{seed}.parquet"
            if path.exists() or (kind in UNSUPERVISED) != last:
                continue
            start = time.monotonic()
            encoder = _make(cohort, tasks, kind, spec, name, seed)
            used = dict.fromkeys(labels, "labels")
            if kind in UNSUPERVISED and isinstance(spec, EncoderSpec):
                used = dict.fromkeys(spec.tasks, "pixels")
            about = (cohort.name, seed, name, kind, "+".join(labels), len(labels))
            rows: list[tuple[object, ...]] = [
                (*about, PROBE, "linear probe", task.name, used.get(task.name, "nothing"), value)
                for task in tasks
                for value in [
                    linear_probe(task_embeddings(encoder, task, seed=seed)).balanced_accuracy
                ]
            ]
            if slides is not None and isinstance(encoder, Encoder):
                rows += [(*about, *row) for row in _evaluate_slides(slides, encoder, seed)]
            with atomic_file(path) as partial:
                pl.DataFrame(rows, SCHEMA, orient="row").write_parquet(partial)
            print(f"seed {seed} {name}: {time.monotonic() - start:.0f} s", flush=True)


def _check_settings(cohort: Cohort, options: argparse.Namespace) -> None:
    """Write the settings of the folder, or exit if it was made with other settings."""
    held_out = [task.name for task in cohort.patch_tasks if task.test_groups]
    if options.slides and held_out:
        raise SystemExit(
            f"patch tasks {held_out} have test_groups, which may be patients of the slides; the "
            "study assigns its own splits and would train on them; remove their rows from the "
            "tables of the tasks"
        )
    check_settings(
        options.out,
        {"cohort": digest(cohort), "patches": options.patches, "slides": options.slides},
    )


def _dataset(cohort: Cohort, task: PatchTask, seed: int, out: Path) -> PatchDataset:
    """Build a patch task with splits by ``seed``, unless it has published splits."""
    folder = out / "patch_tasks" / f"{task.name}-{seed}"
    if not folder.exists():
        settings = cohort.settings
        with atomic_folder(folder) as partial:
            build_patch_task(
                task.model_copy(update={"test_groups": ()}),
                patch=settings.patch,
                mpp=settings.mpp,
                tissue=settings.tissue,
                seed=seed,
                folder=partial,
            )
    return load_patch_task(folder)


def _encoders(
    cohort: Cohort, options: argparse.Namespace, seed: int
) -> Iterator[tuple[str, str, tuple[str, ...], EncoderSpec | None]]:
    """Yield name, kind, tasks with labels, and spec of each encoder of the study."""
    names = tuple(task.name for task in cohort.patch_tasks)
    for kind in ("mean_rgb", "colour_and_texture", "untrained"):
        yield kind, kind, (), None
    chosen: list[tuple[tuple[str, ...], Learned]] = [
        (subset, "mtl")
        for size in (len(names), *range(1, len(names)))  # all tasks first: the main result
        for subset in _subsets(names, size, options.subsets, seed)
    ]
    unsupervised: list[tuple[tuple[str, ...], Learned]] = [(names, o) for o in UNSUPERVISED]
    for tasks, objective in (*chosen, *unsupervised):
        labels = tasks if objective == "mtl" else ()
        name = ".".join(labels) or objective
        yield (
            name,
            objective,
            labels,
            EncoderSpec(
                name=name,
                objective=objective,
                tasks=tasks,
                seed=seed,
                patches_seen=options.patches,
                learning_rate=RATES.get(objective),
            ),
        )


def _subsets(
    names: tuple[str, ...], size: int, limit: int | None, seed: int
) -> list[tuple[str, ...]]:
    """Return all subsets of ``size`` names, or ``limit`` random ones."""
    every = list(combinations(names, size))
    if limit is None or limit >= len(every):
        return every
    chosen = np.random.default_rng((seed, size)).choice(len(every), limit, replace=False)
    return [every[number] for number in sorted(chosen)]


def _make(
    cohort: Cohort,
    tasks: list[PatchDataset],
    kind: str,
    source: EncoderSpec | None,
    name: str,
    seed: int,
) -> Embedder:
    settings = cohort.settings
    if kind == "colour_and_texture":
        return ColourAndTexture()
    if kind == "untrained":
        return untrained_encoder(settings.patch, settings.embedding_size, seed)
    spec = source or EncoderSpec(name=name, objective="mean_rgb")
    by_name = {task.name: task for task in tasks}
    return train_encoder(
        spec,
        [by_name[task] for task in spec.tasks],
        patch=settings.patch,
        mpp=settings.mpp,
        embedding_size=settings.embedding_size,
    ).encoder


def _evaluate_slides(
    slides: Slides, encoder: Encoder, seed: int
) -> Iterator[tuple[str, str, str, None, float]]:
    """Cross-validate the targets; yield metric, model, target, None and value."""
    grids = slides.compress(encoder.prepare())
    settings = slides.cohort.settings.models.model_copy(update={"seed": seed, "bootstrap": 1})
    for target in slides.cohort.targets:
        if target.kind == "survival":
            continue
        found = slides.cross_validate(target, grids, settings).metrics
        own = found.filter(split="cv", metric=kind_of(target).primary_metric)
        for row in own.iter_rows(named=True):
            yield row["metric"], row["model"], target.name, None, row["value"]


# --- showing ---------------------------------------------------------------------------------


def show(options: argparse.Namespace) -> None:
    gathered = [gather(folder) for folder in options.folders]
    names = [name for rows in gathered for name in rows["cohort"].unique()]
    if len(set(names)) < len(names):
        raise SystemExit(
            f"two folders have the same cohort ({sorted(names)}); show them one by one"
        )
    rows = pl.concat(gathered)
    console = Console(width=110)
    for (cohort,), own in rows.group_by("cohort", maintain_order=True):
        console.print(summary(own, str(cohort)))
        console.print(by_tasks(own, str(cohort)))
    figure = picture(rows)
    figure.savefig(options.picture, dpi=90)
    console.print(str(options.picture))


def gather(folder: Path) -> pl.DataFrame:
    """Collect the rows of a folder and write them to its ``study.parquet``."""
    rows = pl.read_parquet(folder / "rows" / "*.parquet")
    with atomic_file(folder / "study.parquet") as path:
        rows.write_parquet(path)
    return rows


def by_seed(rows: pl.DataFrame) -> pl.DataFrame:
    """Average over the encoders of one kind and number of tasks, for each seed and measure.

    Probes on tasks of the training and on other tasks are averaged separately.
    """
    keys = ("cohort", "kind", "count", "measure", "model", "on", "trained_on")
    return rows.group_by(*keys, "seed", maintain_order=True).agg(pl.col("value").mean())


def over_seeds(rows: pl.DataFrame) -> pl.DataFrame:
    """Return mean and standard deviation over seeds; ``sd`` is null for a single seed."""
    keys = ("cohort", "kind", "count", "measure", "model", "on", "trained_on")
    return (
        by_seed(rows)
        .group_by(*keys, maintain_order=True)
        .agg(mean=pl.col("value").mean(), sd=pl.col("value").std(), seeds=pl.len())
    )


def summary(rows: pl.DataFrame, cohort: str) -> Table:
    """Return a table with one row per kind of encoder and number of tasks.

    A star marks scores on tasks that the encoder was trained on.
    """
    found = over_seeds(rows)
    columns = found.select("measure", "model", "on").unique(maintain_order=True)
    names = [
        on if measure == PROBE else f"{on}, {model}: {measure}"
        for measure, model, on in columns.iter_rows()
    ]
    table = Table("encoder", *names, title=f"{cohort}: mean (sd over seeds); {STARS}")
    kinds = found.select("kind", "count").unique(maintain_order=True)
    for kind, count in kinds.sort("count", maintain_order=True).iter_rows():
        own = found.filter(kind=kind, count=count)
        cells = []
        for measure, model, on in columns.iter_rows():
            values = own.filter(measure=measure, model=model, on=on).sort("trained_on")
            cells.append("  ".join(_cell(row) for row in values.iter_rows(named=True)))
        table.add_row(f"{kind}, {count} tasks" if count else kind, *cells)
    return table


def by_tasks(rows: pl.DataFrame, cohort: str) -> Table:
    """Return a table with one row per set of tasks, supervised encoders only."""
    keys = ("count", "tasks", "measure", "model", "on")
    found = (
        rows.filter(pl.col("kind") == "mtl", pl.col("model").is_in(("linear probe", "network")))
        .group_by(*keys, maintain_order=True)
        .agg(pl.col("trained_on").first(), mean=pl.col("value").mean(), sd=pl.col("value").std())
        .sort("count", "tasks", maintain_order=True)
    )
    columns = found["on"].unique(maintain_order=True).to_list()
    table = Table("trained on", *columns, title=f"{cohort}, supervised: mean (sd); {STARS}")
    for (_, tasks), own in found.group_by("count", "tasks", maintain_order=True):
        cells = {row["on"]: _cell(row) for row in own.iter_rows(named=True)}
        table.add_row(str(tasks).replace("+", " + "), *(cells.get(on, "") for on in columns))
    return table


def _cell(row: dict[str, object]) -> str:
    star = {"labels": "*", "pixels": "+"}.get(str(row["trained_on"]), "")
    spread = "" if row["sd"] is None else f" ({row['sd']:.2f})"
    return f"{row['mean']:.2f}{spread}{star}"


def picture(rows: pl.DataFrame) -> Figure:
    """Plot scores by kind of encoder and number of tasks, one panel per task or target."""
    found = over_seeds(rows).filter(pl.col("model").is_in(("linear probe", "network")))
    panels = found.partition_by("cohort", "on", maintain_order=True)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines), layout="constrained")
    every = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in every[len(panels) :]:
        axes.remove()
    for axes, panel in zip(every, panels, strict=False):
        _panel(axes, panel)
    legend = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _panel(axes: Axes, found: pl.DataFrame) -> None:
    """Plot other encoders on the left, then 1, 2, ... tasks; bars are one standard deviation."""
    others = found.filter(pl.col("kind") != "mtl")["kind"].unique(maintain_order=True).to_list()
    counts = sorted(found.filter(kind="mtl")["count"].unique())
    places = {name: place for place, name in enumerate((*others, *counts))}
    markers = {"nothing": "o", "labels": "s", "pixels": "^", None: "o"}
    meanings = {
        "nothing": "not trained on this task",
        "labels": "trained with its labels",
        "pixels": "trained on its patches without labels",
        None: "slides",
    }
    for used, marker in markers.items():
        own = found.filter(pl.col("trained_on").eq_missing(used)).sort("count")
        for multitask in (False, True):
            part = own.filter((pl.col("kind") == "mtl") == multitask)
            if part.is_empty():
                continue
            axes.errorbar(
                [places[r["count"] if multitask else r["kind"]] for r in part.to_dicts()],
                part["mean"],
                part["sd"].fill_null(0),
                fmt=marker + ("-" if multitask else ""),
                color="C0" if multitask else "0.4",
                mfc="white" if used == "nothing" else None,
                capsize=3,
                label=f"{'supervised' if multitask else 'other'}, {meanings[used]}",
            )
    labels = [str(name).replace("_", " ") for name in places]
    axes.set_xticks(range(len(places)), labels, rotation=60, ha="right", fontsize=7)
    first = found.row(0, named=True)
    measure = "balanced accuracy of the probe" if first["measure"] == PROBE else first["measure"]
    axes.set_ylabel(measure, fontsize=8)
    axes.set_title(f"{first['cohort']}: {first['on']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run")
    runner.set_defaults(work=run)
    runner.add_argument("cohort", type=Path)
    runner.add_argument("--out", type=Path, required=True)
    runner.add_argument("--patches", type=int, default=40_000, help="patches seen in each training")
    runner.add_argument("--seeds", type=int, default=3)
    runner.add_argument("--subsets", type=int, help="random subsets of each size; default: all")
    runner.add_argument("--slides", action="store_true", help="also compress and cross-validate")
    runner.add_argument("--threads", type=int, default=2)
    shower = commands.add_parser("show")
    shower.set_defaults(work=show)
    shower.add_argument("folders", type=Path, nargs="+")
    shower.add_argument("--picture", type=Path, required=True)
    options = parser.parse_args()
    if "threads" in options:
        torch.set_num_threads(options.threads)
    options.work(options)


if __name__ == "__main__":
    main()

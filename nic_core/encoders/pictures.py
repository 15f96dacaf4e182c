"""Pictures of patch tasks and of encoder training, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from nic_core.encoders.augmentation import augment
from nic_core.encoders.networks import pool_patches
from nic_core.encoders.patch_tasks import PatchDataset
from nic_core.encoders.scores import TaskScores


def training_curves(history: pl.DataFrame) -> Figure:
    """Losses and validation values against patches seen; grey lines: the learning rate fell."""
    figure = _figure(12, 3.6)
    losses, values = figure.subplots(1, 2)
    patches = history["patches"].to_numpy()
    parts = [name.split("/") for name in history.columns]
    tasks = list(dict.fromkeys(p[1] for p in parts if len(p) == 3))
    colours = {task: f"C{number}" for number, task in enumerate(tasks)}
    for column, (place, *rest) in zip(history.columns, parts, strict=True):
        task = rest[0] if rest and rest[0] in colours else None
        if place == "loss":
            label = "/".join(rest) or "all"
            axes, line = losses, "-"
        elif place == "validation":
            if rest[-1] == "f1":
                continue  # close to balanced accuracy: it stands in the tracker's figures
            label = " ".join(rest).replace("_", " ")
            axes, line = values, ":" if rest[-1] == "auc" else "-"
        else:
            continue
        axes.plot(
            patches,
            history[column],
            line,
            label=label,
            color=colours[task] if task else "black",
            lw=1 if task else 2.5,
        )
    drops = np.flatnonzero(np.diff(history["learning_rate"].to_numpy()))
    for axes, title in ((losses, "training loss"), (values, "validation")):
        for drop in drops:
            axes.axvline(patches[drop], color="0.85", lw=1, zorder=0)
        axes.set(title=title, xlabel="patches seen")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1000:g}k"))
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def confusion_picture(task: str, classes: Sequence[str], scores: TaskScores) -> Figure:
    """Confusion matrix: colour by share of the true class, numbers are patches."""
    counts = np.array(scores.confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.2 + 0.5 * len(classes)
    figure = _figure(side + 0.6, side)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.6 else "black"
        axes.text(column, row, f"{count}", ha="center", va="center", color=colour, fontsize=8)
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(ticks, classes, fontsize=8)
    auc = "none" if scores.auc is None else f"{scores.auc:.3f}"
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(
        f"{task}, test: balanced accuracy {scores.balanced_accuracy:.3f}, AUC {auc}", fontsize=9
    )
    return figure


def augmentation_sheet(
    tasks: Sequence[PatchDataset], *, seed: int = 0, patches: int = 2, variants: int = 7
) -> Figure:
    """Training patches as the network sees them: first column as stored, then variants.

    ``patches`` of each task, of different classes as far as there are as many.
    """
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    chosen = [
        (task, rng.choice(rows[task.labels[rows] == label]))
        for task in tasks
        for rows in [task.rows("train")]
        for label in np.resize(rng.permutation(np.unique(task.labels[rows])), patches)
    ]
    figure = _figure(1.1 * (variants + 1), 1.15 * len(chosen))
    axes = figure.subplots(len(chosen), variants + 1, squeeze=False)
    for line, (task, row) in zip(axes, chosen, strict=True):
        pixels = torch.from_numpy(np.array(task.patches[row])).permute(2, 0, 1)[None]
        pooled = pool_patches(pixels) / 255
        images = torch.cat([pooled, augment(pooled.repeat(variants, 1, 1, 1), generator)])
        for place, image in zip(line, images, strict=True):
            place.imshow(image.permute(1, 2, 0).numpy())
            place.set_axis_off()
        line[0].set_title(f"{task.name}: {task.classes[task.labels[row]]}", fontsize=7, loc="left")
    return figure


def patch_examples(task: PatchDataset, *, seed: int = 0, patches: int = 6) -> Figure:
    """Stored patches of a task, a line a class, drawn at random."""
    rng = np.random.default_rng(seed)
    figure = _figure(0.9 * patches, 1.0 * len(task.classes))
    axes = figure.subplots(len(task.classes), patches, squeeze=False)
    for line, number in zip(axes, range(len(task.classes)), strict=True):
        members = np.flatnonzero(task.labels == number)
        for place, row in zip(line, rng.permutation(members)[:patches], strict=False):
            place.imshow(task.patches[row])
        for place in line:
            place.set_axis_off()
        line[0].set_title(task.classes[number], fontsize=7, loc="left")
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure

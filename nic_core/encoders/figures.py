"""Matplotlib figures of patch tasks, encoder training and embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from nic_core.encoders.augmentation import augment
from nic_core.encoders.networks import pool_patches
from nic_core.encoders.patch_tasks import PatchDataset
from nic_core.encoders.probes import TaskEmbeddings, nearest_patches, principal_components
from nic_core.encoders.scores import TaskScores


def training_curves(history: pl.DataFrame) -> Figure:
    """Plot losses and validation values against patches seen.

    Grey lines mark reductions of the learning rate.
    """
    figure = _figure(12, 3.6)
    losses, values = figure.subplots(1, 2)
    patches = history["patches"].to_numpy()
    parts = [name.split("/") for name in history.columns]
    tasks = list(dict.fromkeys(p[1] for p in parts if len(p) == 3))
    colours = {task: f"C{number}" for number, task in enumerate(tasks)}
    for column, (place, *rest) in zip(history.columns, parts, strict=True):
        task = rest[0] if rest and rest[0] in colours else None
        if place == "loss":
            label = "/".join(rest) or "total"
            axes, line = losses, "-"
        elif place == "validation":
            if rest[-1] == "f1":
                continue  # close to balanced accuracy; the tracker has it
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


def confusion_matrix(task: str, classes: Sequence[str], scores: TaskScores) -> Figure:
    """Draw a confusion matrix: colour is the share of the true class, numbers are patches."""
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
    auc = "undefined" if scores.auc is None else f"{scores.auc:.3f}"
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(
        f"{task}, test split: balanced accuracy {scores.balanced_accuracy:.3f}, AUC {auc}",
        fontsize=9,
    )
    return figure


def augmentation_sheet(
    tasks: Sequence[PatchDataset], *, seed: int = 0, patches: int = 2, variants: int = 7
) -> Figure:
    """Show training patches (first column) and their augmented variants, pooled.

    Each task has ``patches`` rows, of different classes if the task has enough.
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
    """Show random patches of a task, one row per class."""
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


def embedding_map(tasks: Sequence[TaskEmbeddings]) -> Figure:
    """Plot the test embeddings of each task on two principal axes, coloured by class."""
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = _figure(4.6 * columns, 3.2 * rows)
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in places[len(tasks) :]:
        axes.set_axis_off()
    for axes, embeddings in zip(places, tasks, strict=False):
        points, shares = principal_components(embeddings)
        palette = colormaps["tab10" if len(embeddings.task.classes) <= 10 else "tab20"]
        colours = palette(np.arange(palette.N))
        # in random order, so that no class covers the others
        order = np.random.default_rng(0).permutation(len(points))
        labels = embeddings.test_labels
        shades = colours[labels[order] % len(colours)]
        axes.scatter(*points[order].T, s=8, c=shades, alpha=0.7, lw=0)
        for number in np.unique(labels):
            colour = colours[number % len(colours)]
            axes.scatter([], [], s=16, color=colour, label=embeddings.task.classes[number])
        axes.set(xlabel=f"axis 1 ({shares[0]:.0%})", ylabel=f"axis 2 ({shares[1]:.0%})")
        axes.set_title(f"{embeddings.task.name}: {len(points)} test patches", fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def neighbour_sheet(
    tasks: Sequence[TaskEmbeddings], *, seed: int = 0, queries: int = 2, neighbours: int = 8
) -> Figure:
    """Show test patches (first column) and the training patches with the nearest embeddings.

    The test patches are random, of different classes. A green frame marks neighbours of the same
    class, a red frame neighbours of another class.
    """
    rng = np.random.default_rng(seed)
    lines: list[tuple[TaskEmbeddings, int, NDArray[np.int64]]] = []
    for embeddings in tasks:
        classes = rng.permutation(np.unique(embeddings.test_labels))[:queries]
        chosen = np.array(
            [rng.choice(np.flatnonzero(embeddings.test_labels == k)) for k in classes]
        )
        nearest = nearest_patches(embeddings, chosen, neighbours)
        lines += [
            (embeddings, int(query), found) for query, found in zip(chosen, nearest, strict=True)
        ]
    figure = _figure(1.05 * (neighbours + 1), 1.2 * len(lines))
    axes = figure.subplots(len(lines), neighbours + 1, squeeze=False)
    for line, (embeddings, query, found) in zip(axes, lines, strict=True):
        task, label = embeddings.task, embeddings.test_labels[query]
        line[0].imshow(task.patches[embeddings.test_rows[query]])
        line[0].set_title(f"{task.name}: {task.classes[label]}", fontsize=7, loc="left")
        for place, number in zip(line[1:], found, strict=False):
            place.imshow(task.patches[embeddings.train_rows[number]])
            same = embeddings.train_labels[number] == label
            for spine in place.spines.values():
                spine.set(color="C2" if same else "C3", linewidth=2.5)
        for place in line:
            place.set(xticks=[], yticks=[])
        line[0].set_frame_on(False)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure

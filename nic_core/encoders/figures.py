"""Matplotlib figures of patch tasks, encoder training and embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from nic_core.encoders.augmentation import augment
from nic_core.encoders.networks import pool_patches
from nic_core.encoders.patch_tasks import PatchDataset
from nic_core.encoders.probes import TaskEmbeddings, nearest_patches, principal_components
from nic_core.encoders.scores import TaskScores
from nic_core.pictures import (
    BLUE,
    RED,
    WIDTH,
    draw_shares,
    hide_frame,
    new_figure,
    series_styles,
)

VALUE_NAMES = {"auc": "AUC", "balanced_accuracy": "balanced accuracy"}


def training_curves(history: pl.DataFrame) -> Figure:
    """Plot losses and validation values against patches seen.

    Vertical lines mark reductions of the learning rate, a dotted line an AUC of chance.
    """
    figure = new_figure(WIDTH, 7.2)
    losses, values = figure.subplots(2, 1)
    patches = history["patches"].to_numpy()
    parts = [name.split("/") for name in history.columns]
    tasks = list(dict.fromkeys(p[1] for p in parts if len(p) == 3))
    styles = series_styles(len(tasks))
    colours = {task: style.colour for task, style in zip(tasks, styles, strict=True)}
    for column, (place, *rest) in zip(history.columns, parts, strict=True):
        task = rest[0] if rest and rest[0] in colours else None
        if place == "loss":
            label = "/".join(rest) or "all tasks"
            axes, line = losses, "-"
        elif place == "validation":
            if rest[-1] == "f1":
                continue  # close to balanced accuracy; the tracker has it
            label = f"{': '.join(rest[:-1]) or 'all tasks'}, {VALUE_NAMES.get(rest[-1], rest[-1])}"
            axes, line = values, "--" if rest[-1] == "auc" else "-"
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
    if any(parts_of[-1] == "auc" for parts_of in parts):
        values.axhline(0.5, color="black", lw=0.8, ls=":", label="AUC of chance (0.5)")
    for axes, title in ((losses, "loss on training patches"), (values, "validation patches")):
        for i, drop in enumerate(drops):
            named = "learning rate reduced" if i == 0 else None
            axes.axvline(patches[drop], color="0.7", lw=1, zorder=0, label=named)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="patches seen", ylabel="loss" if axes is losses else "value (1: best)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        hide_frame(axes)
    return figure


def confusion_matrix(task: str, classes: Sequence[str], scores: TaskScores) -> Figure:
    """Draw a confusion matrix: colour is the share of the true class, numbers are patches."""
    side = 3.4 + 0.45 * len(classes)
    figure = new_figure(min(WIDTH, side + 1.4), min(WIDTH, side))
    axes = figure.subplots()
    draw_shares(axes, np.array(scores.confusion), classes, unit="patches")
    auc = "undefined" if scores.auc is None else f"{scores.auc:.3f}"
    figure.suptitle(
        f"{task}, patches of test patients:\n"
        f"balanced accuracy {scores.balanced_accuracy:.3f} (chance {1 / len(classes):.2g}), "
        f"AUC {auc} (chance 0.5)",
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
    figure = new_figure(1.1 * (variants + 1), 1.15 * len(chosen) + 0.4)
    axes = figure.subplots(len(chosen), variants + 1, squeeze=False)
    for line, (task, row) in zip(axes, chosen, strict=True):
        pixels = torch.from_numpy(np.array(task.patches[row])).permute(2, 0, 1)[None]
        pooled = pool_patches(pixels) / 255
        images = torch.cat([pooled, augment(pooled.repeat(variants, 1, 1, 1), generator)])
        for place, image in zip(line, images, strict=True):
            place.imshow(image.permute(1, 2, 0).numpy())
            place.set_axis_off()
        line[0].set_title(f"{task.name}: {task.classes[task.labels[row]]}", fontsize=8, loc="left")
    figure.suptitle(
        "first column: a training patch, at the um/px of the network's input; others: augmented",
        fontsize=9,
    )
    return figure


def patch_examples(task: PatchDataset, *, seed: int = 0, patches: int = 6) -> Figure:
    """Show random patches of a task, one row per class."""
    rng = np.random.default_rng(seed)
    figure = new_figure(1.1 * patches, 1.25 * len(task.classes) + 0.3)
    axes = figure.subplots(len(task.classes), patches, squeeze=False)
    for line, number in zip(axes, range(len(task.classes)), strict=True):
        members = np.flatnonzero(task.labels == number)
        for place, row in zip(line, rng.permutation(members)[:patches], strict=False):
            place.imshow(task.patches[row])
        for place in line:
            place.set_axis_off()
        title = f"{task.classes[number]} ({len(members):,} patches)"
        line[0].set_title(title, fontsize=8, loc="left")
    figure.suptitle(f"{task.name}: random patches of each class", fontsize=9)
    return figure


def embedding_map(tasks: Sequence[TaskEmbeddings]) -> Figure:
    """Plot the test embeddings of each task on two principal axes, with a mark for each class."""
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = new_figure(4.8 * columns, 3.4 * rows)
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in places[len(tasks) :]:
        axes.set_axis_off()
    for axes, embeddings in zip(places, tasks, strict=False):
        points, shares = principal_components(embeddings)
        labels, classes = embeddings.test_labels, embeddings.task.classes
        for number, style in enumerate(series_styles(len(classes))):
            of_class = points[labels == number]
            axes.scatter(
                *of_class.T,
                s=10,
                color=style.colour,
                marker=style.marker,
                alpha=0.7,
                lw=0,
                label=classes[number],
            )
        axes.set_xlabel(f"principal axis 1 ({shares[0]:.0%} of the variance)", fontsize=8)
        axes.set_ylabel(f"principal axis 2 ({shares[1]:.0%})", fontsize=8)
        axes.set_title(f"{embeddings.task.name}: {len(points)} test patches", fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.legend(
            fontsize=8, markerscale=2, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
        )
        hide_frame(axes)
    return figure


def neighbour_sheet(
    tasks: Sequence[TaskEmbeddings], *, seed: int = 0, queries: int = 2, neighbours: int = 8
) -> Figure:
    """Show test patches (first column) and the training patches with the nearest embeddings.

    The test patches are random, of different classes. A blue frame marks neighbours of the same
    class, a dashed red frame neighbours of another class.
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
    figure = new_figure(1.05 * (neighbours + 1), 1.2 * len(lines) + 0.4)
    axes = figure.subplots(len(lines), neighbours + 1, squeeze=False)
    for line, (embeddings, query, found) in zip(axes, lines, strict=True):
        task, label = embeddings.task, embeddings.test_labels[query]
        line[0].imshow(task.patches[embeddings.test_rows[query]])
        line[0].set_title(f"{task.name}: {task.classes[label]}", fontsize=8, loc="left")
        for place, number in zip(line[1:], found, strict=False):
            place.imshow(task.patches[embeddings.train_rows[number]])
            same = embeddings.train_labels[number] == label
            for spine in place.spines.values():
                spine.set(color=BLUE if same else RED, linewidth=3, ls="-" if same else "--")
        for place in line:
            place.set(xticks=[], yticks=[])
        line[0].set_frame_on(False)
    frames = {"same class": (BLUE, "-"), "other class": (RED, "--")}
    figure.legend(
        [Patch(fill=False, edgecolor=colour, ls=line, lw=2) for colour, line in frames.values()],
        frames,
        title="first column: a test patch; others: the training patches of nearest embedding",
        title_fontsize=9,
        fontsize=8,
        frameon=False,
        ncols=2,
        loc="outside upper center",
    )
    return figure

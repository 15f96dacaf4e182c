"""Plots of predictions: scatter, ROC and reliability curves, confusion matrix, Kaplan-Meier.

Functions take arrays. :mod:`nic_core.models.figures` draws them for a cross-validated target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve
from sksurv.nonparametric import kaplan_meier_estimator

from nic_core.models.metrics import (
    CALIBRATION_BINS,
    classification_metrics,
    confusion,
    high_risk,
    log_rank,
)

Floats = NDArray[np.float64]
BLUE, RED, GREY = "#3b6ea8", "#b8433f", "#9a9a9a"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, width and height in inches, without an interactive window."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def hide_frame(axes: Axes) -> None:
    """Hide the top and right borders of a plot."""
    axes.spines[["top", "right"]].set_visible(False)


def scatter_figure(
    y: Floats, prediction: Floats, *, fold: NDArray[np.int64] | None, label: str, title: str
) -> Figure:
    """Plot predictions (units,) against labels (units,), coloured by fold if there is one."""
    figure = new_figure(4.2, 4)
    axes = figure.subplots()
    if fold is None:
        axes.scatter(y, prediction, color=BLUE, s=22)
    else:
        axes.scatter(y, prediction, c=fold, cmap="tab10", vmin=0, vmax=9, s=22)
    ends = [min(y.min(), prediction.min()), max(y.max(), prediction.max())]
    axes.plot(ends, ends, color=GREY, lw=0.8, ls=":")
    axes.set(xlabel=label, ylabel=f"predicted {label}")
    axes.set_title(title, fontsize=9)
    hide_frame(axes)
    return figure


def classification_figure(
    models: Mapping[str, tuple[NDArray[np.int64], Floats]], *, classes: Sequence[str], title: str
) -> Figure:
    """Plot ROC curves, and the first model's reliability curve and confusion matrix.

    Parameters
    ----------
    models
        Display name to labels int (units,) and probabilities (units, classes). Of two classes
        the ROC curves of all models are drawn; of more, those of the first model, one class
        against the rest.
    """
    figure = new_figure(12, 4.4)
    roc, reliability, matrix = figure.subplots(1, 3)
    y, p = next(iter(models.values()))
    if len(classes) == 2:
        for i, (name, (labels, probability)) in enumerate(models.items()):
            fpr, tpr, _ = roc_curve(labels, probability[:, 1])
            style = ("-", "--", ":")[min(i, 2)]
            roc.plot(fpr, tpr, color=GREY if i else RED, ls=style, lw=1 if i else 1.8, label=name)
    else:
        for i, name in enumerate(classes):
            fpr, tpr, _ = roc_curve(y == i, p[:, i])
            roc.plot(fpr, tpr, label=f"{name} against the rest")
    roc.plot([0, 1], [0, 1], color=GREY, lw=0.5)
    roc.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    roc.legend(frameon=False, fontsize=8, loc="lower right")
    roc.set_title(title, fontsize=9)
    hide_frame(roc)
    _plot_reliability(reliability, y, p)
    _plot_confusion(matrix, confusion(y, p), classes)
    return figure


def kaplan_meier_figure(
    time: Floats,
    event: NDArray[np.bool_],
    risk: Floats,
    *,
    unit: str,
    title: str,
    threshold: float | None = None,
) -> Figure:
    """Plot Kaplan-Meier curves above and below a risk, with numbers at risk (paper A).

    ``threshold`` is as in :func:`nic_core.models.metrics.high_risk`.
    """
    high = high_risk(risk, threshold)
    figure = new_figure(5.4, 4.6)
    axes, numbers = figure.subplots(2, 1, height_ratios=[5, 1], sharex=True)
    end = 1.02 * time.max()
    ticks = [t for t in MaxNLocator(7).tick_values(0, end) if t <= end]
    groups = (("high risk", high, RED), ("low risk", ~high, BLUE))
    for line, (name, group, colour) in enumerate(groups):
        if group.any():
            t, s = kaplan_meier_estimator(event[group], time[group])
            t, s = np.concatenate([[0], t]), np.concatenate([[1], s])
            axes.step(t, s, where="post", color=colour, label=f"{name} (n = {group.sum()})")
            censored = time[group & ~event]
            height = s[np.searchsorted(t, censored, side="right") - 1]
            axes.plot(censored, height, "|", color=colour, ms=6)
        for tick in ticks:
            count = int((time[group] >= tick).sum())
            numbers.text(tick, 1 - line, str(count), ha="center", va="center", fontsize=8)
    axes.set(ylabel="survival probability", ylim=(0, 1.02), xlim=(0, end))
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(
        f"{title}; log-rank p = {log_rank(time, event, risk, threshold=threshold):.2g}", fontsize=9
    )
    numbers.set(ylim=(-0.6, 1.6), xlim=(0, end), xlabel=f"time ({unit})", xticks=ticks)
    numbers.set_yticks([1, 0], [name for name, *_ in groups], fontsize=8)
    numbers.set_title("number at risk", fontsize=8, loc="left", pad=1)
    numbers.tick_params(left=False)
    for axis in (axes, numbers):
        hide_frame(axis)
    numbers.spines["left"].set_visible(False)
    return figure


def interval_figure(
    rows: Sequence[tuple[str, float | None, float | None, float | None]],
    *,
    label: str,
    chance: float,
) -> Figure:
    """Plot values with their intervals, one line each; the dotted line marks chance level.

    Parameters
    ----------
    rows
        Name, value and bounds of the interval; a row without value is marked as not scored.
    """
    figure = new_figure(5.5, 0.8 + 0.35 * len(rows))
    axes = figure.subplots()
    for i, (_, value, low, high) in enumerate(rows):
        if value is None:
            axes.text(chance, i, " not scored", va="center", fontsize=8, color=GREY)
            continue
        if low is not None and high is not None:
            axes.plot([low, high], [i, i], color=RED if i else GREY, lw=2)
        axes.plot(value, i, "o", color=RED if i else GREY)
    axes.axvline(chance, color="k", lw=0.8, ls=":")
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=8)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=label)
    hide_frame(axes)
    return figure


def _plot_reliability(axes: Axes, y: NDArray[np.int64], p: Floats) -> None:
    """Plot the accuracy of the most probable class by its probability, and the share of units."""
    correct, confidence = p.argmax(1) == y, p.max(1)
    error = classification_metrics(y, p)["calibration_error"](np.ones((1, len(y))))[0]
    axes.hist(
        confidence,
        CALIBRATION_BINS,
        range=(0, 1),
        weights=np.full(len(y), 1 / len(y)),
        color="0.88",
        label="fraction of units",
    )
    accuracy, mean = calibration_curve(correct, confidence, n_bins=CALIBRATION_BINS)
    axes.plot(mean, accuracy, "o-", color=RED, ms=4)
    axes.plot([0, 1], [0, 1], color=GREY, lw=0.5)
    axes.set(xlabel="probability of the predicted class", ylabel="accuracy", aspect="equal")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f"expected calibration error {error:.2f}", fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    hide_frame(axes)


def _plot_confusion(axes: Axes, counts: NDArray[np.int64], classes: Sequence[str]) -> None:
    fraction = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.ndindex(*counts.shape):
        colour = "w" if fraction[i, j] > 0.6 else "k"
        axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=colour)
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, fontsize=8)
    axes.set_yticks(ticks, classes, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")

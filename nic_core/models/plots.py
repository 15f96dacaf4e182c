"""Plots of predictions: scatter, ROC and reliability curves, confusion matrix, Kaplan-Meier.

Functions take arrays. :mod:`nic_core.models.figures` draws them for a cross-validated target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
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
from nic_core.numbers import format_number
from nic_core.pictures import (
    BLUE,
    GREY,
    RED,
    SERIES,
    WIDTH,
    draw_shares,
    hide_frame,
    new_figure,
    series_styles,
)

Floats = NDArray[np.float64]
CHANCE_STYLE: dict[str, Any] = {"color": "black", "lw": 0.8, "ls": ":"}


def scatter_figure(
    y: Floats, prediction: Floats, *, fold: NDArray[np.int64] | None, label: str, title: str
) -> Figure:
    """Plot predictions (units,) against labels (units,), with a mark for each fold if it is known.

    The dotted line marks exact predictions.
    """
    figure = new_figure(6, 4.8)
    axes = figure.subplots()
    if fold is None:
        axes.scatter(y, prediction, color=BLUE, s=22, label="unit")
    else:
        folds = np.unique(fold)
        for k, style in zip(folds, series_styles(len(folds)), strict=True):
            of_fold = fold == k
            axes.scatter(
                y[of_fold],
                prediction[of_fold],
                color=style.colour,
                marker=style.marker,
                s=22,
                label=f"held out in fold {k}",
            )
    ends = [min(y.min(), prediction.min()), max(y.max(), prediction.max())]
    axes.plot(ends, ends, **CHANCE_STYLE, label="prediction equals label")
    axes.set(xlabel=f"true {label}", ylabel=f"predicted {label}")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=10)
    hide_frame(axes)
    return figure


def classification_figure(
    models: Mapping[str, tuple[NDArray[np.int64], Floats]], *, classes: Sequence[str], title: str
) -> Figure:
    """Plot ROC curves, and the first model's calibration and confusion matrix.

    Parameters
    ----------
    models
        Display name to labels int (units,) and probabilities (units, classes). Of two classes
        the ROC curves of all models are drawn; of more, those of the first model, one class
        against the rest.
    """
    figure = new_figure(WIDTH, 7.4)
    ((roc, key), (calibration, matrix)) = figure.subplots(2, 2)
    first, (y, p) = next(iter(models.items()))
    if len(classes) == 2:
        styles = zip(series_styles(len(models)), ("-", "--", "-."), strict=False)
        for (name, (labels, probability)), (style, line) in zip(
            models.items(), styles, strict=True
        ):
            fpr, tpr, _ = roc_curve(labels, probability[:, 1])
            width = 2 if name == first else 1.2
            roc.plot(fpr, tpr, color=style.colour, ls=line, lw=width, label=name)
        positive = f" ({classes[1]})"
    else:
        for i, (name, style) in enumerate(zip(classes, series_styles(len(classes)), strict=True)):
            fpr, tpr, _ = roc_curve(y == i, p[:, i])
            line = "-" if i < len(SERIES) else "--"
            roc.plot(fpr, tpr, color=style.colour, ls=line, label=f"{name} against the rest")
        positive = ""
    roc.plot([0, 1], [0, 1], **CHANCE_STYLE, label="chance")
    roc.set(xlabel="false positive rate", ylabel=f"true positive rate{positive}", aspect="equal")
    roc.set_title("ROC curve", fontsize=9)
    hide_frame(roc)
    key.set_axis_off()
    key.legend(*roc.get_legend_handles_labels(), frameon=False, fontsize=9, loc="center left")
    _plot_calibration(calibration, y, p, first)
    draw_shares(matrix, confusion(y, p), classes, unit="units")
    matrix.set_title(f"confusion matrix of the {first}", fontsize=9)
    figure.suptitle(title, fontsize=10)
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

    A vertical tick marks a censored unit. ``threshold`` is as in
    :func:`nic_core.models.metrics.high_risk`.
    """
    high = high_risk(risk, threshold)
    figure = new_figure(7.2, 5.4)
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
    axes.plot([], [], "|", color="black", ms=6, label="censored")
    axes.set(ylabel="share alive (Kaplan-Meier)", ylim=(0, 1.02), xlim=(0, end))
    axes.legend(frameon=False, fontsize=9)
    divided = "the median risk" if threshold is None else f"a risk of {format_number(threshold)}"
    p_value = log_rank(time, event, risk, threshold=threshold)
    axes.set_title(f"{title}\ngroups divided at {divided}; log-rank p = {p_value:.2g}", fontsize=10)
    # a plain number even beyond 10,000 days
    numbers.xaxis.set_major_formatter(FuncFormatter(lambda t, _: format_number(t)))
    numbers.set(ylim=(-0.6, 1.6), xlim=(0, end), xlabel=f"time ({unit})", xticks=ticks)
    numbers.set_yticks([1, 0], [name for name, *_ in groups], fontsize=8)
    numbers.set_title("number at risk", fontsize=8, loc="left", pad=1)
    numbers.tick_params("y", left=False, pad=12)
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
        Name, value and bounds of the interval; a row without value is marked as not scored. The
        first row is drawn in grey, as the reference of the others.
    """
    figure = new_figure(7.2, 1.1 + 0.35 * len(rows))
    axes = figure.subplots()
    for i, (_, value, low, high) in enumerate(rows):
        if value is None:
            axes.text(chance, i, " not scored", va="center", fontsize=8, color=GREY)
            continue
        if low is not None and high is not None:
            axes.plot([low, high], [i, i], color=RED if i else GREY, lw=2)
        axes.plot(value, i, "o", color=RED if i else GREY)
    axes.axvline(chance, **CHANCE_STYLE, label=f"chance ({chance:g})")
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=8)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=label)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    hide_frame(axes)
    return figure


def _plot_calibration(axes: Axes, y: NDArray[np.int64], p: Floats, name: str) -> None:
    """Plot the accuracy of the most probable class by its probability, and the share of units."""
    correct, confidence = p.argmax(1) == y, p.max(1)
    error = classification_metrics(y, p)["calibration_error"](np.ones((1, len(y))))[0]
    axes.hist(
        confidence,
        CALIBRATION_BINS,
        range=(0, 1),
        weights=np.full(len(y), 1 / len(y)),
        color="0.85",
        label="share of units",
    )
    accuracy, mean = calibration_curve(correct, confidence, n_bins=CALIBRATION_BINS)
    axes.plot(mean, accuracy, "o-", color=BLUE, ms=4, label="share of units predicted right")
    axes.plot([0, 1], [0, 1], **CHANCE_STYLE, label="perfect calibration")
    axes.set(xlabel="probability of the predicted class", ylabel="share of units", aspect="equal")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f"{name}: expected calibration error {error:.2f}", fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    hide_frame(axes)

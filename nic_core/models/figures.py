"""Figures of a cross-validated target."""

from __future__ import annotations

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve
from sksurv.nonparametric import kaplan_meier_estimator

from nic_core.cohort import ClassificationTarget, RegressionTarget, SurvivalTarget
from nic_core.models.cross_validation import NETWORK, CrossValidation, prediction_array
from nic_core.models.metrics import (
    CALIBRATION_BINS,
    PRIMARY,
    classification_metrics,
    confusion,
    high_risk,
    log_rank,
)

_BLUE, _RED, _GREY = "#3b6ea8", "#b8433f", "#9a9a9a"
_NAMES = {
    "spearman": "Spearman's ρ",
    "auc": "AUC",
    "harrell_c": "Harrell's C",
    "network": "network",
    "mean_embedding": "mean embedding, linear",
    "tissue_area": "tissue area, linear",
}


def evaluation_figure(evaluated: CrossValidation, *, split: str = "cv") -> Figure:
    """The picture of the target's kind, of the network's predictions in one split.

    Regression: scatter. Classification: ROC curves with the baselines', reliability curve and
    confusion matrix.
    Survival: Kaplan-Meier curves either side of the median risk, with the numbers at risk.
    """
    target = evaluated.target
    if isinstance(target, RegressionTarget):
        return _scatter(evaluated, target, split)
    if isinstance(target, ClassificationTarget):
        return _roc(evaluated, target, split)
    return _kaplan_meier(evaluated, target, split)


def training_figure(evaluated: CrossValidation) -> Figure:
    """Loss of training and validation and the validation metric by epoch, a line a fold.

    A dot marks the epoch that was kept.
    """
    figure = _figure(9, 3.2)
    losses, metric = figure.subplots(1, 2)
    for fold, best in enumerate(evaluated.best_epochs):
        rows = evaluated.history.filter(fold=fold)
        epoch = rows["epoch"]
        first = fold == 0
        losses.plot(epoch, rows["loss"], color=_GREY, lw=1, label="training" if first else None)
        losses.plot(
            epoch,
            rows["validation_loss"],
            color=_BLUE,
            lw=1,
            label="validation" if first else None,
        )
        line = metric.plot(epoch, rows["validation_metric"], lw=1, label=f"fold {fold}")[0]
        metric.plot(best, rows["validation_metric"][best], "o", color=line.get_color(), ms=5)
    losses.set(xlabel="epoch", ylabel="loss")
    losses.set_ylim(0, None)
    metric.set(xlabel="epoch", ylabel=f"{_NAMES[PRIMARY[evaluated.target.kind]]}, validation")
    for axes in (losses, metric):
        _plain(axes)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(evaluated.target.name, fontsize=10)
    return figure


def metrics_figure(evaluated: CrossValidation) -> Figure:
    """The primary metric of network and baselines with intervals, in each split."""
    primary = PRIMARY[evaluated.target.kind]
    rows = evaluated.metrics.filter(metric=primary)
    figure = _figure(5.5, 0.6 + 0.35 * rows.height)
    axes = figure.subplots()
    names = []
    for i, row in enumerate(rows.iter_rows(named=True)):
        colour = _RED if row["model"] == NETWORK else _GREY
        axes.plot([row["low"], row["high"]], [i, i], color=colour, lw=2)
        axes.plot(row["value"], i, "o", color=colour)
        names.append(f"{_NAMES[row['model']]} ({row['split']}, n = {row['units']})")
    axes.axvline(0.0 if primary == "spearman" else 0.5, color="k", lw=0.8, ls=":")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{_NAMES[primary]}, 95 % interval over patients")
    _plain(axes)
    return figure


def _scatter(evaluated: CrossValidation, target: RegressionTarget, split: str) -> Figure:
    rows = _rows(evaluated, NETWORK, split)
    y, p = rows["y"].to_numpy(), prediction_array(target, rows)[:, 0]
    figure = _figure(4.2, 4)
    axes = figure.subplots()
    if split == "cv":
        axes.scatter(y, p, c=rows["fold"].to_numpy(), cmap="tab10", vmin=0, vmax=9, s=22)
    else:
        axes.scatter(y, p, color=_BLUE, s=22)
    ends = [min(y.min(), p.min()), max(y.max(), p.max())]
    axes.plot(ends, ends, color=_GREY, lw=0.8, ls=":")
    axes.set(xlabel=target.column, ylabel=f"predicted {target.column}")
    axes.set_title(_title(evaluated, split), fontsize=9)
    _plain(axes)
    return figure


def _roc(evaluated: CrossValidation, target: ClassificationTarget, split: str) -> Figure:
    figure = _figure(12, 4.4)
    axes, reliability, table = figure.subplots(1, 3)
    rows = _rows(evaluated, NETWORK, split)
    y, p = rows["y"].to_numpy(), prediction_array(target, rows)
    if len(target.classes) == 2:
        for model in evaluated.predictions["model"].unique(maintain_order=True):
            scored = _rows(evaluated, model, split)
            fpr, tpr, _ = roc_curve(scored["y"], prediction_array(target, scored)[:, 1])
            ours = model == NETWORK
            axes.plot(
                fpr,
                tpr,
                color=_RED if ours else _GREY,
                ls="-" if ours else {"mean_embedding": "--"}.get(model, ":"),
                lw=1.8 if ours else 1,
                label=_NAMES[model],
            )
    else:
        for i, name in enumerate(target.classes):
            fpr, tpr, _ = roc_curve(y == i, p[:, i])
            axes.plot(fpr, tpr, label=f"{name} against the rest")
    axes.plot([0, 1], [0, 1], color=_GREY, lw=0.5)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set_title(_title(evaluated, split), fontsize=9)
    _plain(axes)
    _reliability(reliability, y, p)
    counts = confusion(y, p)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    table.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.ndindex(*counts.shape):
        table.text(
            j, i, counts[i, j], ha="center", va="center", color="w" if share[i, j] > 0.6 else "k"
        )
    ticks = range(len(target.classes))
    table.set_xticks(ticks, target.classes, fontsize=8)
    table.set_yticks(ticks, target.classes, fontsize=8)
    table.set(xlabel="predicted", ylabel="truth")
    return figure


def _reliability(axes: Axes, y: NDArray[np.int64], p: NDArray[np.float64]) -> None:
    """How often the most probable class is right, by its probability; bar: how many units."""
    right, sure = p.argmax(1) == y, p.max(1)
    error = classification_metrics(y, p)["calibration_error"](np.ones((1, len(y))))[0]
    axes.hist(
        sure,
        CALIBRATION_BINS,
        range=(0, 1),
        weights=np.full(len(y), 1 / len(y)),
        color="0.88",
        label="units",
    )
    often, mean = calibration_curve(right, sure, n_bins=CALIBRATION_BINS)
    axes.plot(mean, often, "o-", color=_RED, ms=4)
    axes.plot([0, 1], [0, 1], color=_GREY, lw=0.5)
    axes.set(xlabel="probability of the predicted class", ylabel="right", aspect="equal")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f"expected calibration error {error:.2f}", fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    _plain(axes)


def _kaplan_meier(evaluated: CrossValidation, target: SurvivalTarget, split: str) -> Figure:
    rows = _rows(evaluated, NETWORK, split)
    time, event = rows["time"].to_numpy(), rows["event"].to_numpy()
    risk = prediction_array(target, rows)[:, 0]
    above = high_risk(risk)
    figure = _figure(5.4, 4.6)
    axes, numbers = figure.subplots(2, 1, height_ratios=[5, 1], sharex=True)
    end = 1.02 * time.max()
    ticks = [t for t in MaxNLocator(7).tick_values(0, end) if t <= end]
    groups = (("high risk", above, _RED), ("low risk", ~above, _BLUE))
    for line, (name, group, colour) in enumerate(groups):
        if group.any():
            t, s = kaplan_meier_estimator(event[group], time[group])
            t, s = np.concatenate([[0], t]), np.concatenate([[1], s])
            axes.step(t, s, where="post", color=colour, label=f"{name} (n = {group.sum()})")
            gone = time[group & ~event]
            at = s[np.searchsorted(t, gone, side="right") - 1]
            axes.plot(gone, at, "|", color=colour, ms=6)
        for tick in ticks:
            count = int((time[group] >= tick).sum())
            numbers.text(tick, 1 - line, str(count), ha="center", va="center", fontsize=8)
    p = log_rank(time, event, risk)
    axes.set(ylabel="surviving", ylim=(0, 1.02), xlim=(0, end))
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"{_title(evaluated, split)}; log-rank p = {p:.2g}", fontsize=9)
    numbers.set(ylim=(-0.6, 1.6), xlim=(0, end), xlabel=f"time ({target.unit})", xticks=ticks)
    numbers.set_yticks([1, 0], [name for name, *_ in groups], fontsize=8)
    numbers.set_title("at risk", fontsize=8, loc="left", pad=1)
    numbers.tick_params(left=False)
    for axis in (axes, numbers):
        _plain(axis)
    numbers.spines["left"].set_visible(False)
    return figure


def _rows(evaluated: CrossValidation, model: str, split: str) -> pl.DataFrame:
    return evaluated.predictions.filter(model=model, split=split)


def _title(evaluated: CrossValidation, split: str) -> str:
    primary = PRIMARY[evaluated.target.kind]
    row = evaluated.metrics.row(
        by_predicate=(pl.col("model") == NETWORK)
        & (pl.col("split") == split)
        & (pl.col("metric") == primary),
        named=True,
    )
    return (
        f"{evaluated.target.name} ({split}): {_NAMES[primary]} "
        f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    )


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)

"""Pictures of a cross-validated target, one set a kind: what a person judges a model by."""

from __future__ import annotations

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve
from sksurv.nonparametric import kaplan_meier_estimator

from nic_core.cohort import ClassificationTarget, RegressionTarget, SurvivalTarget
from nic_core.metrics import confusion, high_risk, log_rank
from nic_core.models.validation import NETWORK, Evaluated, prediction_array

COLOURS = ("C0", "C3")


def model_figures(evaluated: Evaluated) -> dict[str, Figure]:
    """The network's hold-out predictions as pictures, and its training curves."""
    target = evaluated.target
    rows = evaluated.predictions.filter(model=NETWORK, split="cv").sort("unit")
    figures = {"training_curves": training_curves(evaluated)}
    if isinstance(target, RegressionTarget):
        figures["scatter"] = scatter(target, rows)
    elif isinstance(target, ClassificationTarget):
        figures["roc"] = roc(target, rows)
        figures["confusion"] = confusion_matrix(target, rows)
    else:
        figures["kaplan_meier"] = kaplan_meier(target, rows)
    return figures


def training_curves(evaluated: Evaluated) -> Figure:
    """Loss and validation metric of every fold against epochs; dots are the kept epochs."""
    figure = _figure(9, 3.2)
    left, right = figure.subplots(1, 2)
    for fold, best in enumerate(evaluated.best_epochs):
        history = evaluated.history.filter(fold=fold)
        epoch = history["epoch"].to_numpy()
        left.plot(epoch, history["loss"], color=f"C{fold}", label=f"fold {fold}")
        left.plot(epoch, history["validation_loss"], color=f"C{fold}", ls=":")
        right.plot(epoch, history["validation_metric"], color=f"C{fold}")
        kept = history.filter(epoch=best)
        right.plot(kept["epoch"], kept["validation_metric"], "o", color=f"C{fold}")
    left.set(title="loss (dotted: validation)", xlabel="epoch")
    left.legend(frameon=False, fontsize=8)
    right.set(title="validation metric", xlabel="epoch")
    return figure


def scatter(target: RegressionTarget, rows: pl.DataFrame) -> Figure:
    """Hold-out predictions against labels, with the line of equality."""
    figure = _figure(4, 4)
    axes = figure.subplots()
    label, predicted = rows["y"].to_numpy(), rows["prediction"].to_numpy()
    ends = [min(label.min(), predicted.min()), max(label.max(), predicted.max())]
    axes.plot(ends, ends, color="0.8", zorder=0)
    for fold in rows["fold"].unique().sort():
        at = (rows["fold"] == fold).to_numpy()
        axes.scatter(label[at], predicted[at], s=16, color=f"C{fold}", label=f"fold {fold}")
    axes.set(title=f"{target.name}: held-out units", xlabel="label", ylabel="prediction")
    axes.legend(frameon=False, fontsize=8)
    return figure


def roc(target: ClassificationTarget, rows: pl.DataFrame) -> Figure:
    """ROC curves: of the second class of two, else of each class against the rest."""
    figure = _figure(4, 4)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.8", zorder=0)
    shown = [1] if len(target.classes) == 2 else range(len(target.classes))
    probability = prediction_array(target, rows)
    for number in shown:
        false, true, _ = roc_curve(rows["y"].to_numpy() == number, probability[:, number])
        axes.plot(false, true, label=target.classes[number])
    axes.set(
        title=f"{target.name}: held-out units",
        xlabel="1 - specificity",
        ylabel="sensitivity",
        aspect="equal",
    )
    axes.legend(frameon=False, fontsize=8)
    return figure


def confusion_matrix(target: ClassificationTarget, rows: pl.DataFrame) -> Figure:
    """Units by true and predicted class."""
    counts = confusion(rows["y"].to_numpy(), prediction_array(target, rows))
    figure = _figure(2.4 + 0.5 * len(counts), 2.2 + 0.5 * len(counts))
    axes = figure.subplots()
    axes.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    for (true, predicted), count in np.ndenumerate(counts):
        axes.text(predicted, true, f"{count}", ha="center", va="center")
    ticks = range(len(target.classes))
    axes.set_xticks(ticks, target.classes, rotation=30, ha="right")
    axes.set_yticks(ticks, target.classes)
    axes.set(xlabel="predicted", ylabel="true")
    return figure


def kaplan_meier(target: SurvivalTarget, rows: pl.DataFrame) -> Figure:
    """Survival of the halves by median risk, with the log-rank p and the numbers at risk."""
    time, event = rows["time"].to_numpy(), rows["event"].to_numpy()
    high = high_risk(rows["risk"].to_numpy())
    figure = _figure(5.5, 4.4)
    axes = figure.subplots()
    for group, name, colour in ((~high, "low risk", COLOURS[0]), (high, "high risk", COLOURS[1])):
        at, alive = kaplan_meier_estimator(event[group], time[group])
        axes.step([0, *at], [1, *alive], where="post", color=colour, label=name)
        censored = time[group & ~event]
        height = alive[np.searchsorted(at, censored)]  # every time of the group is in `at`
        axes.plot(censored, height, "|", color=colour, ms=6)
    p = log_rank(time, event, rows["risk"].to_numpy())
    axes.set(
        title=f"{target.name}: halves by median risk, log-rank p = {p:.2g}",
        xlabel=target.unit,
        ylabel="survival",
        ylim=(0, 1.02),
        xlim=(0, None),
    )
    axes.legend(frameon=False)
    _at_risk(axes, time, high)
    return figure


def _at_risk(axes: Axes, time: np.ndarray, high: np.ndarray) -> None:
    ticks = [tick for tick in axes.get_xticks() if 0 <= tick <= axes.get_xlim()[1]]
    for line, (group, colour) in enumerate(((~high, COLOURS[0]), (high, COLOURS[1]))):
        for tick in ticks:
            axes.annotate(
                str(int((time[group] >= tick).sum())),
                (tick, 0),
                xycoords=("data", "axes fraction"),
                xytext=(0, -46 - 12 * line),
                textcoords="offset points",
                ha="center",
                color=colour,
                fontsize=8,
                annotation_clip=False,
            )


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure

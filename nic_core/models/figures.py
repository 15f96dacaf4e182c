"""Figures of a cross-validated target: evaluation, training curves, metrics with intervals."""

from __future__ import annotations

import polars as pl
from matplotlib.figure import Figure

from nic_core.cohort import RegressionTarget, SurvivalTarget, Target
from nic_core.models.cross_validation import MODEL_NAMES, NETWORK, CrossValidation
from nic_core.models.decision_curves import decision_curve
from nic_core.models.kinds import kind_of
from nic_core.models.plots import BLUE, GREY, RED, hide_frame, new_figure
from nic_core.models.reliability import reliability


def evaluation_figure(result: CrossValidation, *, split: str = "cv") -> Figure:
    """Plot the network's predictions in one split, as suits the target's kind.

    Regression: scatter plot. Classification: ROC curves of network and baselines, reliability
    curve and confusion matrix. Survival: Kaplan-Meier curves above and below the median risk,
    with numbers at risk.
    """
    kind = kind_of(result.target)
    rows = result.predictions.filter(split=split)
    score = _primary_metrics(result).filter(model=NETWORK, split=split).row(0, named=True)
    return kind.figure(
        {
            name: of_model
            for model, name in MODEL_NAMES.items()
            if (of_model := rows.filter(model=model)).height
        },
        f"{result.target.name} ({split}): {kind.primary_name} "
        f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]",
    )


def training_figure(result: CrossValidation) -> Figure:
    """Plot losses and the validation metric by epoch, one line per fold.

    A dot marks the epoch whose weights are kept.
    """
    kind = kind_of(result.target)
    figure = new_figure(9, 3.2)
    losses, metric = figure.subplots(1, 2)
    for fold, best in enumerate(result.best_epochs):
        rows = result.history.filter(fold=fold)
        epoch = rows["epoch"]
        first = fold == 0
        losses.plot(epoch, rows["loss"], color=GREY, lw=1, label="training" if first else None)
        losses.plot(
            epoch,
            rows["validation_loss"],
            color=BLUE,
            lw=1,
            label="validation" if first else None,
        )
        line = metric.plot(epoch, rows["validation_metric"], lw=1, label=f"fold {fold}")[0]
        metric.plot(best, rows["validation_metric"][best], "o", color=line.get_color(), ms=5)
    losses.set(xlabel="epoch", ylabel="loss")
    losses.set_ylim(0, None)
    metric.set(xlabel="epoch", ylabel=f"validation {kind.primary_name}")
    for axes in (losses, metric):
        hide_frame(axes)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(result.target.name, fontsize=10)
    return figure


def reliability_figure(result: CrossValidation) -> Figure:
    """Plot the network's reliability, cross-validated; beside it its decision curve if it has one.

    One colour for each class or time; the dotted lines mark perfect predictions and treating none,
    the dashed lines treating all.
    """
    target = result.target
    rows = result.predictions.filter(model=NETWORK, split="cv")
    groups = reliability(target, rows, result.times)
    has_curve = not isinstance(target, RegressionTarget)
    figure = new_figure(9 if has_curve else 4.5, 3.6)
    panels = figure.subplots(1, 2 if has_curve else 1, squeeze=False)[0]
    for i, ((outcome, time), part) in enumerate(
        groups.group_by("outcome", "time", maintain_order=True)
    ):
        label = _curve_name(target, outcome, time)
        panels[0].plot(part["predicted"], part["observed"], "o-", color=f"C{i}", ms=4, label=label)
        panels[0].vlines(part["predicted"], part["low"], part["high"], color=f"C{i}", lw=1)
    ends = groups.select("predicted", "observed").unpivot()["value"].drop_nulls()
    panels[0].plot([ends.min(), ends.max()], [ends.min(), ends.max()], color=GREY, lw=0.8, ls=":")
    panels[0].set(xlabel="mean predicted", ylabel="observed, 95 % interval")
    if not isinstance(target, RegressionTarget):
        curve = decision_curve(target, rows, result.times)
        for i, ((outcome, time), part) in enumerate(
            curve.group_by("outcome", "time", maintain_order=True)
        ):
            label = _curve_name(target, outcome, time)
            panels[1].plot(part["threshold"], part["net_benefit"], color=f"C{i}", label=label)
            panels[1].plot(part["threshold"], part["treat_all"], color=f"C{i}", lw=0.8, ls="--")
        panels[1].axhline(0, color=GREY, lw=0.8, ls=":")
        panels[1].set(xlabel="threshold probability", ylabel="net benefit")
        benefits = curve.select("net_benefit", "treat_all").unpivot()["value"].drop_nulls()
        panels[1].set_ylim(-0.1, max([0.1, *benefits]) + 0.05)
    for axes in panels:
        hide_frame(axes)
        if has_curve:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(target.name, fontsize=10)
    return figure


def _curve_name(target: Target, outcome: str | None, time: float | None) -> str | None:
    """Return the class, or the time in the target's unit; None for regression."""
    return f"{time:g} {target.unit}" if isinstance(target, SurvivalTarget) else outcome


def metrics_figure(result: CrossValidation) -> Figure:
    """Plot the primary metric of network and baselines with 95 % intervals, for each split.

    The dotted line marks chance level.
    """
    kind = kind_of(result.target)
    rows = _primary_metrics(result)
    figure = new_figure(5.5, 0.6 + 0.35 * rows.height)
    axes = figure.subplots()
    names = []
    for i, row in enumerate(rows.iter_rows(named=True)):
        colour = RED if row["model"] == NETWORK else GREY
        axes.plot([row["low"], row["high"]], [i, i], color=colour, lw=2)
        axes.plot(row["value"], i, "o", color=colour)
        names.append(f"{MODEL_NAMES[row['model']]} ({row['split']}, n = {row['units']})")
    axes.axvline(kind.chance_level, color="k", lw=0.8, ls=":")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{kind.primary_name}, 95 % interval over patients")
    hide_frame(axes)
    return figure


def _primary_metrics(result: CrossValidation) -> pl.DataFrame:
    """Return the rows of the primary metric; undefined values, null in a stored model, are NaN."""
    rows = result.metrics.filter(metric=kind_of(result.target).primary_metric)
    return rows.with_columns(pl.col("value", "low", "high").fill_null(float("nan")))

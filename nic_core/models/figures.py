"""Figures of a cross-validated target: evaluation, training curves, metrics with intervals."""

from __future__ import annotations

import polars as pl
from matplotlib.figure import Figure

from nic_core.cohort import RegressionTarget, SurvivalTarget, Target
from nic_core.models.cross_validation import MODEL_NAMES, NETWORK, CrossValidation
from nic_core.models.decision_curves import decision_curve
from nic_core.models.kinds import kind_of
from nic_core.models.plots import CHANCE_STYLE
from nic_core.models.reliability import reliability
from nic_core.numbers import format_number
from nic_core.pictures import BLUE, GREY, SERIES, WIDTH, hide_frame, new_figure, series_styles


def model_figures(result: CrossValidation) -> dict[str, Figure]:
    """Draw every figure of a cross-validated target, by name."""
    return {
        "predictions": evaluation_figure(result),
        "reliability": reliability_figure(result),
        "intervals": metrics_figure(result),
        "training_curves": training_figure(result),
    }


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
        f"{result.target.name}, {'cross-validated' if split == 'cv' else split}: "
        f"{kind.primary_name} {score['value']:.2f} "
        f"(95 % interval {score['low']:.2f} to {score['high']:.2f}) of the network",
    )


def training_figure(result: CrossValidation) -> Figure:
    """Plot losses and the validation metric by epoch, one line per fold.

    A mark shows the epoch whose weights are kept; a dotted line the metric's chance level.
    """
    kind = kind_of(result.target)
    figure = new_figure(WIDTH, 3.8)
    losses, metric = figure.subplots(1, 2)
    styles = series_styles(len(result.best_epochs))
    for fold, (best, style) in enumerate(zip(result.best_epochs, styles, strict=True)):
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
        metric.plot(
            epoch,
            rows["validation_metric"],
            color=style.colour,
            ls="-" if fold < len(SERIES) else "--",
            lw=1,
            label=f"fold {fold}",
        )
        metric.plot(best, rows["validation_metric"][best], style.marker, color=style.colour, ms=6)
    metric.plot([], [], "o", color="black", ms=6, label="kept epoch")
    metric.axhline(kind.chance_level, **CHANCE_STYLE, label=f"chance ({kind.chance_level:g})")
    losses.set(xlabel="epoch", ylabel="loss, a line for each fold")
    losses.set_ylim(0, None)
    metric.set(xlabel="epoch", ylabel=f"{kind.primary_name} on validation units")
    hide_frame(losses)
    losses.legend(frameon=False, fontsize=8)
    hide_frame(metric)
    metric.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{result.target.name}: training", fontsize=10)
    return figure


def reliability_figure(result: CrossValidation) -> Figure:
    """Plot the network's reliability, cross-validated; beside it its decision curve if it has one.

    One mark for each class or time; dotted lines show perfect predictions and treating none,
    dashed lines treating all.
    """
    target = result.target
    rows = result.predictions.filter(model=NETWORK, split="cv")
    groups = reliability(target, rows, result.times)
    has_curve = not isinstance(target, RegressionTarget)
    figure = new_figure(WIDTH if has_curve else 6, 4.2)
    panels = figure.subplots(1, 2 if has_curve else 1, squeeze=False)[0]
    parts = list(groups.group_by("outcome", "time", maintain_order=True))
    for ((outcome, time), part), style in zip(parts, series_styles(len(parts)), strict=True):
        panels[0].plot(
            part["predicted"],
            part["observed"],
            f"{style.marker}-",
            color=style.colour,
            ms=4,
            label=f"{_curve_name(target, outcome, time)}, 95 % interval",
        )
        panels[0].vlines(part["predicted"], part["low"], part["high"], color=style.colour, lw=1)
    ends = groups.select("predicted", "observed").unpivot()["value"].drop_nulls()
    panels[0].plot(
        [ends.min(), ends.max()], [ends.min(), ends.max()], **CHANCE_STYLE, label="perfect"
    )
    predicted, observed = _reliability_labels(target)
    panels[0].set(xlabel=predicted, ylabel=observed)
    if not isinstance(target, RegressionTarget):
        curve = decision_curve(target, rows, result.times)
        parts = list(curve.group_by("outcome", "time", maintain_order=True))
        for ((outcome, time), part), style in zip(parts, series_styles(len(parts)), strict=True):
            name = _curve_name(target, outcome, time)
            panels[1].plot(
                part["threshold"],
                part["net_benefit"],
                color=style.colour,
                label=f"{name}: treat by the model",
            )
            panels[1].plot(
                part["threshold"],
                part["treat_all"],
                color=style.colour,
                lw=0.8,
                ls="--",
                label=f"{name}: treat all",
            )
        panels[1].axhline(0, **CHANCE_STYLE, label="treat none")
        panels[1].set(xlabel="threshold probability", ylabel="net benefit per unit")
        benefits = curve.select("net_benefit", "treat_all").unpivot()["value"].drop_nulls()
        panels[1].set_ylim(-0.1, max([0.1, *benefits]) + 0.05)
    for axes in panels:
        hide_frame(axes)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_title("reliability", fontsize=9)
    if has_curve:
        panels[1].set_title("decision curve", fontsize=9)
    figure.suptitle(f"{target.name}, cross-validated network", fontsize=10)
    return figure


def _curve_name(target: Target, outcome: str | None, time: float | None) -> str:
    """Return the class, the time in the target's unit, or the column of a regression."""
    if isinstance(target, SurvivalTarget):
        assert time is not None  # survival is observed at times
        return f"{format_number(time)} {target.unit}"
    return target.column if outcome is None else outcome


def _reliability_labels(target: Target) -> tuple[str, str]:
    """Return the labels of the axes of a reliability curve: predicted and observed."""
    if isinstance(target, RegressionTarget):
        return f"mean predicted {target.column}", f"mean true {target.column}"
    if isinstance(target, SurvivalTarget):
        return "mean predicted probability of survival", "share alive (Kaplan-Meier)"
    return "mean predicted probability of the class", "share of units of the class"


def metrics_figure(result: CrossValidation) -> Figure:
    """Plot the primary metric of network and baselines with 95 % intervals, for each split.

    The dotted line marks chance level.
    """
    kind = kind_of(result.target)
    rows = _primary_metrics(result)
    figure = new_figure(7.2, 1.2 + 0.35 * rows.height)
    axes = figure.subplots()
    names = []
    for i, row in enumerate(rows.iter_rows(named=True)):
        colour = BLUE if row["model"] == NETWORK else GREY
        axes.plot([row["low"], row["high"]], [i, i], color=colour, lw=2)
        axes.plot(row["value"], i, "o", color=colour)
        part = "test" if row["split"] == "test" else "cross-validated"
        names.append(f"{MODEL_NAMES[row['model']]} ({part}, n = {row['units']})")
    for name, colour in (("network", BLUE), ("baseline", GREY)):
        axes.plot([], [], "o-", color=colour, lw=2, label=name)
    axes.axvline(kind.chance_level, **CHANCE_STYLE, label=f"chance ({kind.chance_level:g})")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{kind.primary_name}, 95 % interval over patients")
    axes.set_title(result.target.name, fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    hide_frame(axes)
    return figure


def _primary_metrics(result: CrossValidation) -> pl.DataFrame:
    """Return the rows of the primary metric; undefined values, null in a stored model, are NaN."""
    rows = result.metrics.filter(metric=kind_of(result.target).primary_metric)
    return rows.with_columns(pl.col("value", "low", "high").fill_null(float("nan")))

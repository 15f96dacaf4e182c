"""Interactive plots of a target: ROC, scatter, Kaplan-Meier and calibration, a point per unit.

A unit is what the target labels: a slide or a patient. Plots are Bokeh's, encoded as JSON for its
script in the browser. The values are those of the slide model: its held-out predictions, the
metrics of its card, its table of reliability.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from bokeh.embed import json_item
from bokeh.models.annotations import Whisker
from bokeh.models.renderers import GlyphRenderer
from bokeh.models.sources import ColumnDataSource
from bokeh.models.tools import HoverTool, TapTool
from bokeh.plotting import figure
from numpy.typing import NDArray
from sklearn.metrics import roc_curve
from sksurv.nonparametric import kaplan_meier_estimator

from nic_core.cohort import (
    ClassificationTarget,
    RegressionTarget,
    SurvivalTarget,
    Target,
)
from nic_core.grids import GridError
from nic_core.models.cross_validation import NETWORK
from nic_core.models.files import ModelCard, ModelFileError, metrics_frame, read_model_card
from nic_core.models.kinds import kind_of
from nic_core.models.metrics import high_risk, log_rank
from nic_core.pictures import BLUE, GREY, RED
from nic_core.steps.slide_models import RELIABILITY
from nic_core.store import ModelKey
from nic_core.view.addresses import heat_layer
from nic_core.view.errors import ViewError, without_paths
from nic_core.view.products import heat_cells, heat_file
from nic_core.view.study import ViewedStudy, encoders_of, label_of, network_predictions

Figure = Any  # Bokeh has no types for its figures' methods
UNITS = "units"
"""Name of the data source of the points: the page opens the unit that is tapped."""
_SPLITS = {"cv": "cross-validated", "test": "test split"}
_WIDTH, _HEIGHT = 390, 400  # px
_COLOURS = (RED, BLUE, "#5a8f4e", "#b0782f", "#7a5aa6", "#4f9aa8", "#8a8a3a", "#a6567f")


def target_answer(study: ViewedStudy, name: str) -> dict[str, Any]:
    """Return what ``/api/targets/{target}`` answers: the plots of every encoder with a model.

    ``items`` has an entry per plot: ``encoder``, ``split``, ``title``, and ``item`` for
    ``Bokeh.embed.embed_item``. The data source :data:`UNITS` has the column ``unit``.

    Raises
    ------
    ViewError
        404: the study has no such target, or no model of it. 422: a model is of another format.
    """
    target = _target(study, name)
    encoders = encoders_of(study, name)
    items = [plot for encoder in encoders for plot in _plots(study, target, encoder)]
    return {
        "target": name,
        "kind": target.kind,
        "level": target.level,
        "encoders": encoders,
        "items": items,
    }


def hottest_cell(study: ViewedStudy, name: str, encoder: str, unit: str) -> dict[str, Any]:
    """Return the slide of a unit with its cell of highest heat, for ``/api/targets/.../hottest``.

    Of a patient's slides it is the one whose heat is highest. ``x`` and ``y`` are the centre of
    the cell, level-0 px, and ``layer`` the id of the heatmap. Without an explanation, the place is
    None and the slide the first one.

    Raises
    ------
    ViewError
        404: no such target, model or unit.
    """
    key = ModelKey(encoder=encoder, target=_target(study, name).name)
    if encoder not in encoders_of(study, name):
        raise ViewError(404, f"target '{name}' has no model of this encoder", "choose a point")
    rows = network_predictions(study, key).filter(pl.col("unit") == unit)
    if rows.is_empty():
        raise ViewError(404, f"target '{name}' has no such unit", "choose a point of a plot")
    slides = [slide for slide in rows["slides"][0] if slide in study.index()]
    if not slides:
        raise ViewError(404, "its slides are not in the study any more", "train the model again")
    best: tuple[float, dict[str, Any]] | None = None
    for slide in slides:
        folder = study.store.explanation(key) / slide
        if not heat_file(folder).exists():
            continue
        try:
            cells = heat_cells(study, folder)
        except GridError as error:
            reason, _, remedy = without_paths(str(error)).rpartition("; ")
            raise ViewError(422, reason, remedy) from error
        row, column = np.unravel_index(np.nanargmax(cells.values), cells.values.shape)
        heat = float(cells.values[row, column])
        place = {
            "slide": slide,
            "x": cells.origin[0] + (float(column) + 0.5) * cells.cell[0],
            "y": cells.origin[1] + (float(row) + 0.5) * cells.cell[1],
            "layer": heat_layer(name, encoder),
        }
        if best is None or heat > best[0]:
            best = heat, place
    return best[1] if best else {"slide": slides[0], "x": None, "y": None, "layer": None}


def _target(study: ViewedStudy, name: str) -> Target:
    for target in study.cohort.targets:
        if target.name == name:
            return target
    raise ViewError(404, "the study has no such target", "choose one of the cohort's page")


def _plots(study: ViewedStudy, target: Target, encoder: str) -> list[dict[str, Any]]:
    key = ModelKey(encoder=encoder, target=target.name)
    folder = study.store.slide_model(key)
    try:
        card = read_model_card(folder)
    except ModelFileError as error:
        raise ViewError(
            422, f"the model of '{target.name}' on '{encoder}' cannot be read", "train it again"
        ) from error
    found = []
    predictions = network_predictions(study, key)
    for split, words in _SPLITS.items():
        rows = predictions.filter(pl.col("split") == split)
        if rows.height:
            plot = _evaluation_plot(target, rows)
            found.append((split, f"{words}: {_score(card, split)}", plot))
    if (path := folder / RELIABILITY).exists():
        found.append(("cv", "calibration, cross-validated", _calibration_plot(target, path)))
    return [
        {"encoder": encoder, "split": split, "title": title, "item": json_item(plot)}
        for split, title, plot in found
    ]


def _score(card: ModelCard, split: str) -> str:
    """The primary metric with its interval, as text."""
    kind = kind_of(card.target)
    row = metrics_frame(card).filter(model=NETWORK, split=split, metric=kind.primary_metric)
    if row.is_empty() or row["value"][0] is None:
        return f"{kind.primary_name} undefined"
    text = f"{kind.primary_name} {row['value'][0]:.2f}"
    low, high = row["low"][0], row["high"][0]
    return text if low is None or high is None else f"{text} [{low:.2f}, {high:.2f}]"


def _evaluation_plot(target: Target, rows: pl.DataFrame) -> Figure:
    if isinstance(target, ClassificationTarget):
        return _roc_plot(target, rows)
    if isinstance(target, RegressionTarget):
        return _scatter_plot(target, rows)
    return _kaplan_meier_plot(target, rows)


def _new(x: str, y: str, **options: Any) -> Figure:
    plot = figure(
        width=_WIDTH,
        height=_HEIGHT,
        x_axis_label=x,
        y_axis_label=y,
        tools="pan,wheel_zoom,box_zoom,reset,save",
        toolbar_location="right",
        output_backend="canvas",
        **options,
    )
    plot.toolbar.logo = None
    plot.grid.grid_line_color = "#eceff3"
    plot.outline_line_color = None
    return plot


def _dotted_line(plot: Figure, ends: list[Any], label: str) -> None:
    """Draw the diagonal between two ends: chance, or perfect predictions."""
    plot.line(ends, ends, color=GREY, line_dash="dotted", line_width=2, legend_label=label)


def _with_legend_above(plot: Figure) -> Figure:
    """Move the legend out of the plot, where it hides no point."""
    if plot.legend:
        legend = plot.legend[0]
        legend.border_line_color = None
        legend.padding, legend.spacing, legend.margin = 0, 0, 4
        plot.add_layout(legend, "above")
    return plot


def _source(table: pl.DataFrame) -> ColumnDataSource:
    return ColumnDataSource(table.to_dict(as_series=False))


def _points(
    plot: Figure,
    target: Target,
    rows: pl.DataFrame,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    colours: list[str],
    groups: list[str] | None,
    values: Mapping[str, list[str]],
) -> None:
    """Draw a point per unit that can be tapped, with values under the pointer.

    ``groups`` name the units of each colour in the legend; None: the curves name them.
    """
    labels = [label_of(target, row) for row in rows.iter_rows(named=True)]
    source = ColumnDataSource(
        {
            "x": x.tolist(),
            "y": y.tolist(),
            "colour": colours,
            "group": groups or [""] * len(colours),
            "unit": rows["unit"].to_list(),
            "slides": [", ".join(slides) for slides in rows["slides"]],
            "label": [_label_text(label) for label in labels],
            **values,
        },
        name=UNITS,
    )
    legend = {"legend_group": "group"} if groups else {}
    points: GlyphRenderer[Any] = plot.scatter(
        "x",
        "y",
        source=source,
        color="colour",
        size=9,
        fill_alpha=0.7,
        line_color="white",
        **legend,
    )
    shown = [(target.level, "@unit"), ("label", "@label"), *((n, f"@{{{n}}}") for n in values)]
    if target.level == "patient":
        shown.insert(1, ("slides", "@slides"))
    plot.add_tools(HoverTool(renderers=[points], tooltips=shown), TapTool(renderers=[points]))


def _label_text(label: Any) -> str:
    if isinstance(label, dict):
        return f"{label['time']:g}, {'event' if label['event'] else 'censored'}"
    return label if isinstance(label, str) else f"{label:.3g}"


def _roc_plot(target: ClassificationTarget, rows: pl.DataFrame) -> Figure:
    """ROC curves; of two classes that of the second, of more those of each against the rest.

    The point of a unit is where the threshold is its own probability, on the curve of the second
    class, or of its true class if there are more than two.
    """
    plot = _new("false positive rate", "true positive rate", x_range=(-0.02, 1.02))
    plot.y_range.start, plot.y_range.end = -0.02, 1.02
    _dotted_line(plot, [0, 1], "chance: AUC 0.5")
    y = rows["y"].to_numpy()
    binary = len(target.classes) == 2
    x_of, y_of = np.full(len(y), np.nan), np.full(len(y), np.nan)
    for number, name in enumerate(target.classes):
        positive = y == number
        if (binary and number == 0) or positive.all() or not positive.any():
            continue
        probability = rows[f"probability_{name}"].to_numpy()
        fpr, tpr, thresholds = roc_curve(positive, probability, drop_intermediate=False)
        label = f"{name} against {target.classes[0] if binary else 'the rest'}"
        colour = _COLOURS[0 if binary else number % len(_COLOURS)]
        plot.line(fpr, tpr, color=colour, line_width=2, legend_label=label)
        units = np.ones_like(positive) if binary else positive
        # thresholds fall, and each unit's probability is one of them
        at = np.searchsorted(-thresholds, -probability[units])
        x_of[units], y_of[units] = fpr[at], tpr[at]
    colours = [_COLOURS[(1 - k) if binary else k % len(_COLOURS)] for k in y.tolist()]
    values = {
        f"probability of {name}": [f"{p:.3f}" for p in rows[f"probability_{name}"]]
        for name in target.classes
    }
    groups = [f"{target.level}: {target.classes[k]}" for k in y.tolist()]
    _points(plot, target, rows, x_of, y_of, colours, groups, values)
    return _with_legend_above(plot)


def _scatter_plot(target: RegressionTarget, rows: pl.DataFrame) -> Figure:
    plot = _new(f"{target.column} (label)", f"predicted {target.column}")
    y, predicted = rows["y"].to_numpy(), rows["prediction"].to_numpy()
    ends = [float(min(y.min(), predicted.min())), float(max(y.max(), predicted.max()))]
    _dotted_line(plot, ends, "prediction = label")
    _points(
        plot,
        target,
        rows,
        y,
        predicted,
        [BLUE] * len(y),
        [target.level] * len(y),
        {"prediction": [f"{p:.3g}" for p in predicted]},
    )
    return _with_legend_above(plot)


def _kaplan_meier_plot(target: SurvivalTarget, rows: pl.DataFrame) -> Figure:
    """Kaplan-Meier curves above and below the median risk of these units, as in the report.

    A unit's point is on the curve of its group, at its time.
    """
    time, event = rows["time"].to_numpy(), rows["event"].to_numpy()
    risk = rows["risk"].to_numpy()
    high = high_risk(risk)
    plot = _new(f"time ({target.unit})", "survival probability", y_range=(0, 1.03))
    survival = np.full(len(time), np.nan)
    for name, group, colour in (("high risk", high, RED), ("low risk", ~high, BLUE)):
        if not group.any():
            continue
        t, s = kaplan_meier_estimator(event[group], time[group])
        t, s = np.concatenate([[0], t]), np.concatenate([[1], s])
        label = f"{name} (n = {group.sum()})"
        plot.step(t, s, mode="after", color=colour, line_width=2, legend_label=label)
        survival[group] = s[np.searchsorted(t, time[group], side="right") - 1]
    p = log_rank(time, event, risk)
    plot.title.text = f"log-rank p = {p:.2g}"
    _points(
        plot,
        target,
        rows,
        time,
        survival,
        [RED if h else BLUE for h in high],
        None,
        {"risk": [f"{r:.3g}" for r in risk]},
    )
    return _with_legend_above(plot)


def _calibration_plot(target: Target, path: Path) -> Figure:
    """Mean predicted and observed value of groups of units, with 95 % intervals."""
    table = pl.read_parquet(path, glob=False).filter(pl.col("model") == NETWORK)
    table = table.drop_nulls("observed")
    plot = _new("mean predicted", "observed, 95 % interval")
    ends = table.select("predicted", "observed", "low", "high").unpivot()["value"].drop_nulls()
    if len(ends):
        # the ends of the diagonal are those of the intervals, so that the plot holds them all
        _dotted_line(plot, [ends.min(), ends.max()], "observed = predicted")
    curves = table.group_by("outcome", "time", maintain_order=True)
    for number, ((outcome, time), part) in enumerate(curves):
        source = ColumnDataSource(
            part.select("predicted", "observed", "low", "high", "units").to_dict(as_series=False)
        )
        colour = _COLOURS[number % len(_COLOURS)]
        label = _curve_name(target, outcome, time)
        plot.line("predicted", "observed", source=source, color=colour, legend_label=label)
        points = plot.scatter("predicted", "observed", source=source, color=colour, size=8)
        plot.add_tools(
            HoverTool(
                renderers=[points],
                tooltips=[
                    ("units", "@units"),
                    ("mean predicted", "@predicted{0.00}"),
                    ("observed", "@observed{0.00} [@low{0.00}, @high{0.00}]"),
                ],
            )
        )
        with_interval = ColumnDataSource(
            part.drop_nulls(["low", "high"])
            .select("predicted", "low", "high")
            .to_dict(as_series=False)
        )
        plot.add_layout(
            Whisker(
                source=with_interval, base="predicted", lower="low", upper="high", line_color=colour
            )
        )
    return _with_legend_above(plot)


def _curve_name(target: Target, outcome: Any, time: Any) -> str:
    if isinstance(target, SurvivalTarget):
        return f"alive after {time:g} {target.unit}"
    return str(outcome) if outcome is not None else "mean label"

"""The evaluation report: all scores of a study in one table, with terminal and Markdown output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Group
from rich.table import Table

from nic_core.cohort import ProbabilityMap
from nic_core.encoders import EncoderCard
from nic_core.encoders.probes import KNN
from nic_core.models.baselines import BASELINE_NAMES
from nic_core.models.clinical import CLINICAL, CLINICAL_NAMES
from nic_core.models.comparison import CROSS_VALIDATED
from nic_core.models.cross_validation import MODEL_NAMES, NETWORK
from nic_core.models.files import ModelCard
from nic_core.models.fold_metrics import fold_metrics
from nic_core.models.kinds import kind_of, metric_name
from nic_core.models.metrics import score
from nic_core.pictures import GREY, WIDTH, Style, encoder_styles, hide_frame, new_figure
from nic_core.tables import interval, terminal_table

RESULT_SCHEMA = pl.Schema(
    {
        "kind": pl.String(),  # target, patch task or map
        "about": pl.String(),  # name of the target, patch task or map
        "encoder": pl.String(),
        "model": pl.String(),  # grid network, baseline, patch head, or probe of embeddings
        "part": pl.String(),  # cross-validated, test; for a map held-out or training patients
        "metric": pl.String(),
        "value": pl.Float64(),
        "low": pl.Float64(),  # bounds of the 95 % bootstrap interval over patients
        "high": pl.Float64(),
        "n": pl.Int64(),  # scored units
        # over the folds of a cross-validation; null for other scores
        "folds_mean": pl.Float64(),
        "folds_deviation": pl.Float64(),
        "folds_undefined": pl.Int64(),  # folds in which the metric is undefined
    }
)
FOLD_SCHEMA = pl.Schema(
    {
        "about": pl.String(),  # name of the target
        "encoder": pl.String(),
        "model": pl.String(),  # grid network or baseline
        "metric": pl.String(),
        "fold": pl.Int64(),
        "fold_name": pl.String(),  # site, name of a published fold, or the number as text
        "value": pl.Float64(),  # null: undefined
        "n": pl.Int64(),  # scored units
        "patients": pl.Int64(),
    }
)
ENCODER_SCHEMA = pl.Schema(
    {
        "encoder": pl.String(),
        "patch": pl.Int64(),  # px at mpp
        "mpp": pl.Float64(),  # um/px
        "stride": pl.Int64(),  # side of a cell, px at mpp
        "cell_um": pl.Float64(),  # side of a cell, um
        "embedding_size": pl.Int64(),
    }
)
_NO_FOLDS = (None, None, None)
NETWORK_NAMES = {
    "published": "published grid CNN",
    "small": "small grid CNN",
    "local": "local grid CNN",
    "mil": "gated-attention MIL",
}
EXCHANGED = ", labels exchanged"  # end of the name of a network of the permutation control
PATCH_METRIC_NAMES = {"auc": "AUC", "balanced_accuracy": "balanced accuracy", "f1": "F1"}


def results_table(results: pl.DataFrame) -> Group:
    """Format the results (:data:`RESULT_SCHEMA`) for a terminal of 80 columns or more.

    There is a table for each target, patch task and map, and each part. Only the first metric of
    each model is shown, with mean and standard deviation over the folds beside the value of all
    folds together; baselines only cross-validated, and of the probes only the linear one. The
    tissue area and the clinical baseline are shown once if they have the same value for all
    encoders: grids with the same cells, or of the same slides.
    """
    results = results.filter(pl.col("model") != KNN)
    baseline = pl.col("model").is_in([*BASELINE_NAMES.values(), *CLINICAL_NAMES.values()])
    results = results.filter(~baseline | (pl.col("part") == CROSS_VALIDATED))
    tables = []
    for (kind, about, part, metric), rows in _primary_results(results).group_by(
        "kind", "about", "part", "metric", maintain_order=True
    ):
        cells = [
            (
                row["encoder"] or "(any)",
                row["model"],
                "undefined" if row["value"] is None else f"{row['value']:.3f}",
                interval(row["low"], row["high"]),
                _spread(row),
                str(row["n"]),
            )
            for row in rows.iter_rows(named=True)
        ]
        title = f"{kind} {about}: {metric}, {part}"
        headings = ("value", "95 % interval", "folds", "n")
        tables.append(terminal_table(("encoder", "model"), headings, cells, title=title))
    return Group(*tables)


def _primary_results(results: pl.DataFrame) -> pl.DataFrame:
    """Return the first metric of each model, with a score that all encoders share only once.

    Its encoder is then empty.
    """
    same = pl.struct("value", "n").n_unique().over("kind", "about", "model", "part", "metric") == 1
    shared = [BASELINE_NAMES["tissue_area"], CLINICAL_NAMES[CLINICAL]]
    without_encoder = pl.col("model").is_in(shared) & same
    return results.with_columns(
        encoder=pl.when(without_encoder).then(pl.lit("")).otherwise("encoder")
    ).unique(["kind", "about", "encoder", "model", "part"], keep="first", maintain_order=True)


def _spread(row: Mapping[str, Any]) -> str:
    """Return mean and standard deviation over folds, and the number of undefined folds."""
    if row["folds_undefined"] is None:
        return ""
    if row["folds_mean"] is None:
        return "undefined"
    deviation = "" if row["folds_deviation"] is None else f" ± {row['folds_deviation']:.2f}"
    undefined = f" ({row['folds_undefined']} undefined)" if row["folds_undefined"] else ""
    return f"{row['folds_mean']:.2f}{deviation}{undefined}"


def results_markdown(results: pl.DataFrame) -> str:
    """Format the results (:data:`RESULT_SCHEMA`) as Markdown, for a registered model's page."""
    rows = []
    for row in results.iter_rows(named=True):
        bounds = "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
        value = "undefined" if row["value"] is None else f"{row['value']:.3f}{bounds}"
        cells = [row[name] for name in ("about", "model", "part", "metric")]
        rows.append([*cells, value, _spread(row), row["n"]])
    return markdown_table(("about", "model", "scored on", "metric", "value", "folds", "n"), rows)


def markdown_table(headings: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table in Markdown."""
    first, *others = (f"| {' | '.join(map(str, cells))} |" for cells in (headings, *rows))
    return "\n".join([first, "|" + "---|" * len(headings), *others])


def comparisons_table(comparisons: pl.DataFrame) -> Group:
    """Format comparisons of models (:data:`~nic_core.models.comparison.COMPARISON_SCHEMA`).

    There is a table for each target. Only the first metric of a target is shown, and only the
    cross-validated part.
    """
    shown = comparisons.filter(part=CROSS_VALIDATED).unique(
        ["target", "first", "second"], keep="first", maintain_order=True
    )
    tables = []
    for (target, metric), rows in shown.group_by("target", "metric", maintain_order=True):
        cells = []
        for row in rows.iter_rows(named=True):
            defined = row["p"] is not None
            cells.append(
                (
                    row["first"],
                    row["second"],
                    "" if row["difference"] is None else f"{row['difference']:+.3f}",
                    interval(row["low"], row["high"], "+.3f") if defined else "",
                    f"{row['p']:.2g}" if defined else "",
                    f"{row['p_holm']:.2g}" if defined else "",
                    str(row["n"]),
                )
            )
        title = (
            f"target {target}: differences in {metric}, {CROSS_VALIDATED}; p (Holm): corrected for "
            "all comparisons of the target"
        )
        headings = ("difference", "95 % interval", "p", "p (Holm)", "n")
        tables.append(terminal_table(("model", "against"), headings, cells, title=title))
    return Group(*tables)


def encoders_table(encoders: pl.DataFrame) -> Table:
    """Format patch, um/px and stride of encoders (:data:`ENCODER_SCHEMA`) for the terminal."""
    rows = [
        (name, *(f"{number:g}" for number in numbers)) for name, *numbers in encoders.iter_rows()
    ]
    headings = ("patch, px", "um/px", "stride, px", "cell, um", "embedding")
    return terminal_table(("encoder",), headings, rows, title="Encoders")


def encoder_results(card: EncoderCard) -> pl.DataFrame:
    """Return the scores of an encoder's patch heads on test patients (:data:`RESULT_SCHEMA`)."""
    rows = [
        ("patch task", task, card.name, "patch head", "test", metric, value, *bounds, scores.n)
        + _NO_FOLDS
        for task, scores in card.scores.items()
        for name, metric in PATCH_METRIC_NAMES.items()
        if (value := getattr(scores, name)) is not None
        for bounds in [(name == "balanced_accuracy" and scores.interval) or (None, None)]
    ]
    return pl.DataFrame(rows, schema=RESULT_SCHEMA, orient="row")


def probe_results(encoder: str, scores: pl.DataFrame) -> pl.DataFrame:
    """Return the scores of probes of an encoder on test patients (:data:`RESULT_SCHEMA`).

    Parameters
    ----------
    encoder
        Name of the encoder.
    scores
        Scores of the probes, :data:`nic_core.encoders.probes.PROBE_SCHEMA`.
    """
    rows = [
        (
            "patch task",
            r["task"],
            encoder,
            r["probe"],
            "test",
            metric,
            r[name],
            None,
            None,
            r["test"],
            *_NO_FOLDS,
        )
        for r in scores.iter_rows(named=True)
        for name, metric in PATCH_METRIC_NAMES.items()
        if r[name] is not None
    ]
    return pl.DataFrame(rows, schema=RESULT_SCHEMA, orient="row")


def model_results(card: ModelCard) -> pl.DataFrame:
    """Return the metrics of a slide model and its baselines (:data:`RESULT_SCHEMA`)."""
    kind = kind_of(card.target)
    rows = [
        (
            "target",
            card.target.name,
            card.encoder,
            _model_name(card, row.model),
            "test" if row.split == "test" else CROSS_VALIDATED,
            metric_name(kind, row.metric),
            row.value,
            row.low,
            row.high,
            row.units,
            row.folds_mean,
            row.folds_deviation,
            row.folds_undefined,
        )
        for row in card.metrics
    ]
    return pl.DataFrame(rows, schema=RESULT_SCHEMA, orient="row")


def _model_name(card: ModelCard, model: str) -> str:
    """Return the name of a model of the predictions in tables."""
    if model != NETWORK:
        return MODEL_NAMES[model]
    exchanged = "" if card.settings.permute_labels is None else EXCHANGED
    return NETWORK_NAMES[card.settings.network] + exchanged


def fold_results(card: ModelCard, predictions: pl.DataFrame) -> pl.DataFrame:
    """Return the metrics of a slide model and its baselines in each fold (:data:`FOLD_SCHEMA`).

    Parameters
    ----------
    predictions
        :attr:`nic_core.models.cross_validation.CrossValidation.predictions` of the model.
    """
    kind = kind_of(card.target)
    rows = [
        (
            card.target.name,
            card.encoder,
            _model_name(card, row["model"]),
            metric_name(kind, row["metric"]),
            *(row[name] for name in ("fold", "fold_name", "value", "units", "patients")),
        )
        for row in fold_metrics(card.target, predictions).iter_rows(named=True)
    ]
    return pl.DataFrame(rows, schema=FOLD_SCHEMA, orient="row")


def primary_folds(folds: pl.DataFrame) -> pl.DataFrame:
    """Return the first metric of each network in each fold, from rows of :data:`FOLD_SCHEMA`."""
    network = pl.col("model").str.strip_suffix(EXCHANGED).is_in(list(NETWORK_NAMES.values()))
    return folds.filter(network).unique(
        ["about", "encoder", "model", "fold"], keep="first", maintain_order=True
    )


def map_results(item: ProbabilityMap, scores: pl.DataFrame, *, resamples: int) -> pl.DataFrame:
    """Return a map's mean AUC over slides (:data:`RESULT_SCHEMA`).

    Held-out patients and patients in training have separate rows.

    Parameters
    ----------
    scores
        Output of :func:`nic_core.steps.make_map_scores`.
    resamples
        Number of bootstrap resamples of patients; with a single patient there is no interval.
    """
    rows = []
    for in_training, part in ((False, "held-out patients"), (True, "patients in training")):
        slides = scores.filter(in_training=in_training)
        if slides.is_empty():
            continue
        auc = slides["auc"].to_numpy()
        metrics = {"auc": lambda w, auc=auc: w @ auc / w.sum(1)}
        mean = score(metrics, slides["patient"].to_list(), resamples=resamples, seed=0)["auc"]
        bounds = (mean.low, mean.high) if slides["patient"].n_unique() > 1 else (None, None)
        row = ("map", item.name, item.encoder, "patch head", part, "AUC of cells")
        rows.append((*row, mean.value, *bounds, slides.height, *_NO_FOLDS))
    return pl.DataFrame(rows, schema=RESULT_SCHEMA, orient="row")


@dataclass(frozen=True)
class Report:
    """The evaluation report of a study.

    Attributes
    ----------
    results
        All scores, :data:`RESULT_SCHEMA`.
    folds
        Metrics of slide models in each fold, :data:`FOLD_SCHEMA`.
    encoders
        Patch, um/px and stride of each encoder with a grid, :data:`ENCODER_SCHEMA`.
    comparisons
        Differences between models, :data:`~nic_core.models.comparison.COMPARISON_SCHEMA`.
    figures
        Name to figure.
    notes
        Remarks on the scores: targets with fewer folds than requested, and compared models that
        differ in more than the encoder (:func:`~nic_core.models.comparison.comparison_notes`).
    """

    results: pl.DataFrame
    folds: pl.DataFrame
    encoders: pl.DataFrame
    comparisons: pl.DataFrame
    figures: dict[str, Figure]
    notes: list[str]


def results_figure(results: pl.DataFrame, chance: Mapping[str, float]) -> Figure:
    """Plot the first metric of each target's models with its interval.

    A colour for each encoder; grey for a baseline that does not depend on it, which is drawn once.
    Cross-validated values have a filled mark, values on split ``test`` an empty one. The dotted
    line marks chance level.

    Parameters
    ----------
    chance
        Chance level of each target's first metric.
    """
    targets = results.filter(kind="target")
    names = targets["encoder"].unique(maintain_order=True).to_list()
    styles = encoder_styles(names)
    targets = _primary_results(targets)
    panels = targets.partition_by("about", maintain_order=True)
    lines = [panel.select("encoder", "model").unique(maintain_order=True) for panel in panels]
    heights = [0.9 + 0.34 * line.height for line in lines] or [1.0]
    figure = new_figure(WIDTH, sum(heights) + 0.4)
    places = figure.subplots(max(1, len(panels)), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel, of_panel in zip(places, panels, lines, strict=False):
        rows = {line: place for place, line in enumerate(of_panel.iter_rows())}
        for row in panel.iter_rows(named=True):
            encoder = row["encoder"]
            colour, marker = styles[encoder] if encoder else Style(GREY, "o")
            held_in = row["part"] == CROSS_VALIDATED
            place = rows[encoder, row["model"]] + (-0.13 if held_in else 0.13)
            if row["value"] is None:
                text = f"undefined ({row['part']})"
                axes.text(chance[row["about"]], place, text, fontsize=7, va="center", color=colour)
                continue
            bounded = row["low"] is not None and row["high"] is not None
            axes.errorbar(
                row["value"],
                place,
                xerr=[[row["value"] - row["low"]], [row["high"] - row["value"]]]
                if bounded
                else None,
                fmt=marker,
                color=colour,
                markerfacecolor=colour if held_in else "white",
                capsize=2,
                ms=5,
            )
        target, metric = panel["about"][0], panel["metric"][0]
        axes.axvline(chance[target], color="black", lw=0.8, ls=":")
        labels = [f"{encoder}: {model}" if encoder else model for encoder, model in rows]
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_title(f"{target}", fontsize=10, loc="left")
        axes.set_xlabel(f"{metric}, 95 % interval over patients", fontsize=9)
        hide_frame(axes)
    handles = [
        *(
            Line2D([], [], color=s.colour, marker=s.marker, label=name)
            for name, s in styles.items()
        ),
        Line2D([], [], color=GREY, marker="o", label="without encoder"),
        Line2D([], [], color="black", marker="o", ls="", label=CROSS_VALIDATED),
        Line2D([], [], color="black", marker="o", ls="", mfc="white", label="test"),
        Line2D([], [], color="black", lw=0.8, ls=":", label="chance"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure

"""The evaluation report: every figure of a study in one table."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from nic_core.cohort import ProbabilityMap
from nic_core.encoders import EncoderCard
from nic_core.encoders.probes import KNN
from nic_core.models.comparison import BASELINE_NAMES, CROSS_VALIDATED, METRIC_NAMES
from nic_core.models.cross_validation import NETWORK
from nic_core.models.files import ModelCard
from nic_core.models.metrics import score

RESULT_SCHEMA = pl.Schema(
    {
        "kind": pl.String(),  # target, patch task or map
        "about": pl.String(),  # its name
        "encoder": pl.String(),
        "model": pl.String(),  # grid network, baseline, patch head or probe of embeddings
        "part": pl.String(),  # cross-validated, test, or the slide of a map
        "metric": pl.String(),
        "value": pl.Float64(),
        "low": pl.Float64(),  # bounds of the 95 % bootstrap interval over patients
        "high": pl.Float64(),
        "n": pl.Int64(),  # units that were scored
    }
)


NETWORK_NAMES = {
    "published": "published grid CNN",
    "small": "small grid CNN",
    "mil": "gated-attention MIL",
}
METRICS_OF_PATCHES = {"auc": "AUC", "balanced_accuracy": "balanced accuracy", "f1": "F1"}


def results_table(results: pl.DataFrame) -> Table:
    """The results (:data:`RESULT_SCHEMA`) for the terminal.

    Each model's first metric. Baselines are shown cross-validated, what does not depend on
    the encoder once, and of the probes the linear one; the rest is in the table itself.
    """
    results = results.filter(pl.col("model") != KNN)
    baseline = pl.col("model").is_in(list(BASELINE_NAMES.values()))
    results = results.filter(~baseline | (pl.col("part") == CROSS_VALIDATED))
    no_code = pl.col("model") == BASELINE_NAMES["tissue_area"]
    results = results.with_columns(
        encoder=pl.when(no_code).then(pl.lit("")).otherwise("encoder")
    ).unique(["kind", "about", "encoder", "model", "part"], keep="first", maintain_order=True)
    table = Table(title="Results", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("about", "encoder", "model", "scored on", "metric"):
        table.add_column(column, no_wrap=True)
    for column in ("value", "95 % interval", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    for about in results.partition_by("kind", "about", maintain_order=True):
        for row in about.iter_rows(named=True):
            interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
            table.add_row(
                *(row[name] for name in ("about", "encoder", "model", "part", "metric")),
                f"{row['value']:.3f}",
                interval,
                str(row["n"]),
            )
        table.add_section()
    return table


def results_markdown(results: pl.DataFrame) -> str:
    """The results (:data:`RESULT_SCHEMA`) as a Markdown table, for a model's description."""
    lines = ["| about | model | scored on | metric | value | n |", "|---|---|---|---|---|---|"]
    for row in results.iter_rows(named=True):
        bounds = "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
        value = "undefined" if row["value"] is None else f"{row['value']:.3f}{bounds}"
        cells = [row[name] for name in ("about", "model", "part", "metric")]
        lines.append(f"| {' | '.join([*cells, value, str(row['n'])])} |")
    return "\n".join(lines)


def comparisons_table(comparisons: pl.DataFrame) -> Table:
    """How cross-validated networks differ (:data:`COMPARISON_SCHEMA`), for the terminal.

    Each target's first metric; the others, and the split ``test``, are in the table itself.
    """
    shown = comparisons.filter(part=CROSS_VALIDATED).unique(
        ["target", "first", "second"], keep="first", maintain_order=True
    )
    table = Table(
        title="Differences, cross-validated; p not corrected for their number",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in ("target", "model", "against", "metric"):
        table.add_column(column, no_wrap=True)
    for column in ("difference", "95 % interval", "p", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    for target in shown.partition_by("target", maintain_order=True):
        for row in target.iter_rows(named=True):
            defined = row["p"] is not None
            table.add_row(
                *(row[name] for name in ("target", "first", "second", "metric")),
                "" if row["difference"] is None else f"{row['difference']:+.3f}",
                f"{row['low']:+.3f} to {row['high']:+.3f}" if defined else "",
                f"{row['p']:.2g}" if defined else "",
                str(row["n"]),
            )
        table.add_section()
    return table


def encoder_results(card: EncoderCard) -> pl.DataFrame:
    """How an encoder's heads do on their tasks' test patients (:data:`RESULT_SCHEMA`)."""
    rows = [
        ("patch task", task, card.name, "patch head", "test", metric, value, *bounds, scores.n)
        for task, scores in card.scores.items()
        for name, metric in METRICS_OF_PATCHES.items()
        if (value := getattr(scores, name)) is not None
        for bounds in [(name == "balanced_accuracy" and scores.interval) or (None, None)]
    ]
    return pl.DataFrame(rows, schema=RESULT_SCHEMA, orient="row")


def probe_results(encoder: str, scores: pl.DataFrame) -> pl.DataFrame:
    """Probes of an encoder's embeddings on test patients (:data:`RESULT_SCHEMA`).

    ``scores``: :data:`nic_core.encoders.probes.PROBE_SCHEMA`.
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
        )
        for r in scores.iter_rows(named=True)
        for name, metric in METRICS_OF_PATCHES.items()
        if r[name] is not None
    ]
    return pl.DataFrame(rows, schema=RESULT_SCHEMA, orient="row")


def model_results(card: ModelCard) -> pl.DataFrame:
    """A slide model's and its baselines' metrics (:data:`RESULT_SCHEMA`)."""
    network = NETWORK_NAMES[card.settings.network]
    if card.settings.permute_labels is not None:
        network += ", labels exchanged"
    rows = [
        (
            "target",
            card.target.name,
            card.encoder,
            network if row.model == NETWORK else BASELINE_NAMES[row.model],
            "test" if row.split == "test" else CROSS_VALIDATED,
            METRIC_NAMES.get(row.metric, row.metric),
            row.value,
            row.low,
            row.high,
            row.units,
        )
        for row in card.metrics
    ]
    return pl.DataFrame(rows, schema=RESULT_SCHEMA, orient="row")


def map_results(item: ProbabilityMap, scores: pl.DataFrame, *, resamples: int) -> pl.DataFrame:
    """The mean AUC of a map over slides (:data:`RESULT_SCHEMA`), held-out patients apart.

    Parameters
    ----------
    scores
        From :func:`nic_core.steps.make_map_scores`.
    resamples
        Of the patients, for the interval; a single patient gives none.
    """
    rows = []
    for in_training, part in ((False, "held-out patients"), (True, "patients in training")):
        slides = scores.filter(in_training=in_training)
        if slides.is_empty():
            continue
        auc = slides["auc"].to_numpy()
        metrics = {"auc": lambda w, auc=auc: w @ auc / w.sum(1)}
        interval = score(metrics, slides["patient"].to_list(), resamples=resamples, seed=0)["auc"]
        bounds = (interval.low, interval.high) if slides["patient"].n_unique() > 1 else (None, None)
        row = ("map", item.name, item.encoder, "patch head", part, "AUC of cells")
        rows.append((*row, interval.value, *bounds, slides.height))
    return pl.DataFrame(rows, schema=RESULT_SCHEMA, orient="row")


@dataclass(frozen=True)
class Report:
    """The study's results (:data:`RESULT_SCHEMA`), how models differ
    (:data:`COMPARISON_SCHEMA`), and the figures drawn from them."""

    results: pl.DataFrame
    comparisons: pl.DataFrame
    figures: dict[str, Figure]


def results_figure(results: pl.DataFrame) -> Figure:
    """First metric and interval of each target's models: cross-validated blue, test orange."""
    targets = results.filter(kind="target").unique(
        ["about", "encoder", "model", "part"], keep="first", maintain_order=True
    )
    panels = targets.partition_by("about", maintain_order=True)
    figure = Figure(figsize=(4.2 * max(1, len(panels)), 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(
        figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False
    ):
        names = [f"{r['encoder']}: {r['model']}" for r in panel.iter_rows(named=True)]
        for place, row in enumerate(panel.iter_rows(named=True)):
            errors = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            colour = "C0" if row["part"] == CROSS_VALIDATED else "C1"
            axes.errorbar(row["value"], place, xerr=errors, fmt="o", color=colour, capsize=3)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.invert_yaxis()
        axes.set_title(f"{panel['about'][0]}: {panel['metric'][0]}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return figure

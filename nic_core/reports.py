"""The evaluation report: every figure of a study in one table."""

from __future__ import annotations

import polars as pl
from rich.table import Table

RESULT_SCHEMA = pl.Schema(
    {
        "about": pl.String(),  # the target, patch task or map
        "encoder": pl.String(),
        "model": pl.String(),  # grid network, baseline or patch head
        "part": pl.String(),  # cross-validated, test, or the slide of a map
        "metric": pl.String(),
        "value": pl.Float64(),
        "low": pl.Float64(),  # bounds of the 95 % bootstrap interval over patients
        "high": pl.Float64(),
        "n": pl.Int64(),  # units that were scored
    }
)


def results_table(results: pl.DataFrame) -> Table:
    """The results (:data:`RESULT_SCHEMA`) as a table for the terminal."""
    table = Table(title="Results")
    for column in ("about", "encoder", "model", "part", "metric"):
        table.add_column(column)
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("n", justify="right")
    previous = None
    for row in results.iter_rows(named=True):
        if previous is not None and row["about"] != previous:
            table.add_section()
        previous = row["about"]
        interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        table.add_row(
            *(row[name] for name in ("about", "encoder", "model", "part", "metric")),
            f"{row['value']:.3f}",
            interval,
            str(row["n"]),
        )
    return table

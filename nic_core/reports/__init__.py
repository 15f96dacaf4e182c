"""The evaluation report: scores of a study as tables and figures."""

from nic_core.reports.results import (
    RESULT_SCHEMA,
    Report,
    comparisons_table,
    encoder_results,
    map_results,
    model_results,
    probe_results,
    results_figure,
    results_markdown,
    results_table,
)

__all__ = [
    "RESULT_SCHEMA",
    "Report",
    "comparisons_table",
    "encoder_results",
    "map_results",
    "model_results",
    "probe_results",
    "results_figure",
    "results_markdown",
    "results_table",
]

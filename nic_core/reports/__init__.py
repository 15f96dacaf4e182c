"""The evaluation report: scores of a study as tables and figures."""

from nic_core.reports.model_cards import encoder_model_card, slide_model_card, starting_weights
from nic_core.reports.results import (
    ENCODER_SCHEMA,
    RESULT_SCHEMA,
    Report,
    comparisons_table,
    encoder_results,
    encoders_table,
    map_results,
    model_results,
    probe_results,
    results_figure,
    results_markdown,
    results_table,
)

__all__ = [
    "ENCODER_SCHEMA",
    "RESULT_SCHEMA",
    "Report",
    "comparisons_table",
    "encoder_model_card",
    "encoder_results",
    "encoders_table",
    "map_results",
    "model_results",
    "probe_results",
    "results_figure",
    "results_markdown",
    "results_table",
    "slide_model_card",
    "starting_weights",
]

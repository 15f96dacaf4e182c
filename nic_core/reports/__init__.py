"""The evaluation report: scores of a study as tables and figures."""

from nic_core.reports.model_cards import encoder_model_card, slide_model_card, starting_weights
from nic_core.reports.results import (
    ENCODER_SCHEMA,
    FOLD_SCHEMA,
    RESULT_SCHEMA,
    Report,
    comparisons_table,
    encoder_results,
    encoders_table,
    fold_results,
    map_results,
    model_results,
    primary_folds,
    probe_results,
    results_figure,
    results_markdown,
    results_table,
)

__all__ = [
    "ENCODER_SCHEMA",
    "FOLD_SCHEMA",
    "RESULT_SCHEMA",
    "Report",
    "comparisons_table",
    "encoder_model_card",
    "encoder_results",
    "encoders_table",
    "fold_results",
    "map_results",
    "model_results",
    "primary_folds",
    "probe_results",
    "results_figure",
    "results_markdown",
    "results_table",
    "slide_model_card",
    "starting_weights",
]

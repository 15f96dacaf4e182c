"""The console output of a run: one short line per message."""

from __future__ import annotations

import logging

import dagster as dg
from rich.logging import RichHandler


class _BriefFormatter(logging.Formatter):
    """Format a message as step and text, without run ids and job names."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "dagster_meta", {})
        step, text = fields.get("step_key"), fields.get("orig_message", record.getMessage())
        return f"{step}: {text}" if step and not text.startswith(step) else text


def _make_logger(_: dg.InitLoggerContext) -> logging.Logger:
    handler = RichHandler(show_path=False, show_level=False, rich_tracebacks=False)
    handler.setFormatter(_BriefFormatter())
    logger = logging.Logger("nic", level=logging.INFO)
    logger.addHandler(handler)
    return logger


brief_logger = dg.LoggerDefinition(
    _make_logger,
    description="Prints messages of assets and failures. Dagster's events are in its event log.",
)

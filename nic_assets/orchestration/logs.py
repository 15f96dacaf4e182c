"""What a run says on the console: one short line a message."""

from __future__ import annotations

import logging

import dagster as dg
from rich.logging import RichHandler


class _Brief(logging.Formatter):
    """The message with its asset, without run ids and job names."""

    def format(self, record: logging.LogRecord) -> str:
        about = getattr(record, "dagster_meta", {})
        step, text = about.get("step_key"), about.get("orig_message", record.getMessage())
        return f"{step}: {text}" if step and not text.startswith(step) else text


def _brief_logger(_: dg.InitLoggerContext) -> logging.Logger:
    handler = RichHandler(show_path=False, show_level=False, rich_tracebacks=False)
    handler.setFormatter(_Brief())
    logger = logging.Logger("nic", level=logging.INFO)
    logger.addHandler(handler)
    return logger


brief_logger = dg.LoggerDefinition(
    _brief_logger, description="Messages of assets and failures; events stay in the event log."
)

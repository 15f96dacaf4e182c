"""The interface for the curves of a training in progress.

A training reports its metrics to a :class:`Tracker` if it is given one. With ``None`` as tracker,
nothing is reported; the same values are in the product's ``history.parquet``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Tracker(Protocol):
    """Receives the metrics of a training while it runs."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Receive metrics after a step. A resumed training reports its earlier steps again."""

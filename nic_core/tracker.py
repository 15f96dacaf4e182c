"""The interface of an experiment tracker.

The library reports to a :class:`Tracker` if it is given one. With ``None`` as tracker, nothing is
reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import polars as pl
from matplotlib.figure import Figure


class Tracker(Protocol):
    """Records the parameters, metrics, tables and figures of a training run."""

    def params(self, values: Mapping[str, str | int | float]) -> None:
        """Record the settings of the run. Called once, before the first metrics."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics after a step. A metric may be recorded again at a larger step."""

    def table(self, name: str, rows: pl.DataFrame) -> None:
        """Append rows to the table ``name``, which is a file name without suffix."""

    def figure(self, name: str, figure: Figure) -> None:
        """Record a figure; ``name`` is a file name without suffix."""

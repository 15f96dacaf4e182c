"""What the library asks of an experiment tracker; ``None`` stands for none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import polars as pl
from matplotlib.figure import Figure


class Tracker(Protocol):
    """Receives what a training run wants to be remembered for."""

    def params(self, values: Mapping[str, str | int | float]) -> None:
        """Settings of the run; called once, before the first metrics."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Values after ``step``; a later call may repeat a name with a larger step."""

    def table(self, name: str, rows: pl.DataFrame) -> None:
        """A table, named like a file without its ending; a later call adds rows to it."""

    def figure(self, name: str, figure: Figure) -> None:
        """A picture, named like a file without its ending."""

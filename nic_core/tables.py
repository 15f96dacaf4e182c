"""Tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text


def terminal_table(
    texts: Sequence[str],
    numbers: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    title: str | None = None,
) -> Table:
    """Return a table whose cells are never cut.

    A narrow terminal folds texts, ids among them, into several lines. Numbers stay whole.

    Parameters
    ----------
    texts, numbers
        Headings of the columns: texts on the left, numbers on the right. A heading may have several
        lines.
    rows
        A cell for each column. Square brackets have no special meaning.
    """
    table = Table(
        title=None if title is None else Text(title, "bold", overflow="fold"),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for heading in texts:
        table.add_column(Text(heading), overflow="fold")
    for heading in numbers:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return table


def interval(low: float | None, high: float | None, form: str = ".3f") -> str:
    """Return an interval as text; empty if it is undefined."""
    return "" if low is None or high is None else f"{low:{form}} to {high:{form}}"

"""What the commands share: the console, progress bars, errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

console = Console()

Mpp = Annotated[float | None, typer.Option(help="um/px at level 0; overrides the file's")]
Out = Annotated[Path, typer.Option(help="PNG to write")]


@contextmanager
def one_line(*expected: type[Exception]) -> Iterator[None]:
    """An expected error is a line and exit status 1, not a traceback."""
    try:
        yield
    except expected as error:
        console.print(str(error), style="red", soft_wrap=True, markup=False)
        raise typer.Exit(1) from error


def progress_bars() -> Progress:
    """Bars with a rate in the ``unit`` that their task names."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
        console=console,
    )


def facts() -> Table:
    """A table of names and values, a line each; no digit of a long value is cut."""
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    return table


def save_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write pixels, uint8 (H, W, 3); the folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit")
        return Text(f"{speed:,.0f} {unit}/s" if unit and speed else "")

"""Helpers of the commands: the console, progress bars, one-line errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
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

from nic_core.types import Pixels

if TYPE_CHECKING:
    from nic_core.slides.remote import SlidePath

console = Console()

SlideArgument = Annotated[str, typer.Argument(help="slide file, or its address (s3://, https://)")]
SlideArguments = Annotated[
    list[str], typer.Argument(help="slide files, or their addresses (s3://, https://)")
]
Mpp = Annotated[
    float | None, typer.Option(help="um/px at level 0; overrides the value in the file")
]
ImageNumber = Annotated[
    int | None,
    typer.Option(
        help="number of the image in a file with several ('nic inspect' lists them); default: the "
        "largest brightfield scan"
    ),
]
MPP_OPTION = "give the um/px at level 0 with --mpp"
Out = Annotated[Path, typer.Option(help="PNG file to write")]


def given_slide(text: str) -> SlidePath:
    """The path or address of an argument; an invalid one is an error of the command line."""
    from nic_core.slides.remote import slide_path

    try:
        return slide_path(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def advice_names_mpp_option() -> Iterator[None]:
    """Let the advice of a :class:`SlideError` name ``--mpp``, in a command with this option."""
    from nic_core.slides.errors import SlideError
    from nic_core.slides.metadata import MPP_REMEDY

    try:
        yield
    except SlideError as error:
        remedy = error.remedy.replace(MPP_REMEDY, MPP_OPTION)
        raise SlideError(error.slide, error.reason, remedy) from error


@contextmanager
def one_line(*expected: type[Exception]) -> Iterator[None]:
    """Print an expected error as one line and exit with status 1, without a traceback."""
    try:
        yield
    except expected as error:
        console.print(str(error), style="red", soft_wrap=True, markup=False)
        raise typer.Exit(1) from error


def progress_bars() -> Progress:
    """Progress bars; a task with a ``unit`` also shows its rate."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
        console=console,
    )


def facts() -> Table:
    """A table of names and values, one line each; long values are wrapped, not cut."""
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    return table


def save_picture(path: Path, picture: Pixels) -> None:
    """Write pixels, uint8 (H, W, 3), as PNG; creates the folder if it does not exist."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit")
        return Text(f"{speed:,.0f} {unit}/s" if unit and speed else "")

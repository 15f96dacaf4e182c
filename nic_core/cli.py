"""``nic``: look at slides and compress them, without cohort or orchestrator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

from nic_core.encoder_cli import encoder_app
from nic_core.grids import GridError, grid_preview, open_grid, write_grid
from nic_core.patches import patch_table
from nic_core.slides import SlideError, content_identity, open_slide
from nic_core.tissue import read_mask, tissue_mask, tissue_outline

if TYPE_CHECKING:
    from nic_core.encoders.encoder import Encoder

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
grid_app = typer.Typer(no_args_is_help=True, help="Look into a grid store.")
app.add_typer(grid_app, name="grid")
app.add_typer(encoder_app, name="encoder")
console = Console()

SlidePath = Annotated[Path, typer.Argument(help="slide file")]
StorePath = Annotated[Path, typer.Argument(help="grid store (.zarr)")]
Mpp = Annotated[float | None, typer.Option(help="um/px at level 0; overrides the file's")]
MaskPath = Annotated[
    Path | None, typer.Option(help="ready tissue mask: image, GeoJSON or ASAP XML")
]
Out = Annotated[Path, typer.Option(help="PNG to write")]


@app.command()
def inspect(slide: SlidePath, mpp: Mpp = None) -> None:
    """What a slide is: who reads it, its size, scale, levels and identity."""
    with _one_line(), open_slide(slide, mpp=mpp) as opened:
        table = Table(show_header=False, box=None)
        table.add_row("slide", str(slide))
        table.add_row("read by", opened.engine)
        table.add_row("size", f"{opened.width} x {opened.height} px")
        table.add_row("scale", f"{opened.mpp:.4g} um/px")
        table.add_row("area", f"{opened.width * opened.height * opened.mpp**2 / 1e6:.3g} mm2")
        for number, level in enumerate(opened.levels):
            size = f"{level.width} x {level.height} px, 1/{level.downsample:g}"
            table.add_row(f"level {number}", f"{size}, {opened.mpp * level.downsample:.4g} um/px")
        table.add_row("identity", content_identity(slide))
        console.print(table)


@app.command()
def tissue(slide: SlidePath, out: Out, mpp: Mpp = None, mask: MaskPath = None) -> None:
    """Draw the outline of the tissue on a thumbnail."""
    with _one_line(), open_slide(slide, mpp=mpp) as opened:
        found = read_mask(mask, opened) if mask else tissue_mask(opened)
        _save(out, tissue_outline(opened, found, side=1600))
        area = found.array.sum() * found.mpp**2 / 1e6
        console.print(f"{found.array.mean():.1%} of the slide is tissue ({area:.3g} mm2): {out}")


@app.command()
def compress(
    slides: Annotated[list[Path], typer.Argument(help="slide files")],
    encoder: Annotated[Path, typer.Option(help="folder of a trained encoder")],
    out: Annotated[Path, typer.Option(help="folder for the grid stores")],
    mpp: Mpp = None,
    share: Annotated[
        float, typer.Option("--tissue", min=0, max=1, help="a cell is kept above this share")
    ] = 0.6,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Compress slides to grids; a store that is up to date is left as it is.

    A slide that cannot be used does not stop the others: all such are listed at the end, and
    the exit status is 1.
    """
    from nic_core.encoders.encoder import EncoderError  # imports torch: slow, for this alone
    from nic_core.encoders.files import load_encoder

    try:
        trained = load_encoder(encoder)
    except EncoderError as error:
        raise typer.BadParameter(str(error), param_hint="--encoder") from error
    _no_equal_names(slides)
    failed: dict[Path, SlideError] = {}
    skipped = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for path in slides:
            try:
                skipped += not _compress(path, trained, out, mpp, share, device, progress)
            except SlideError as error:
                failed[path] = error
    done = len(slides) - skipped - len(failed)
    console.print(f"{done} compressed, {skipped} up to date, {len(failed)} failed")
    if failed:
        table = Table("slide", "reason", "what to do")
        for path, reason in failed.items():
            table.add_row(path.name, reason.reason, reason.remedy)
        console.print(table)
        raise typer.Exit(1)


def _compress(
    path: Path,
    encoder: Encoder,
    out: Path,
    mpp: float | None,
    share: float,
    device: str,
    progress: Progress,
) -> bool:
    """Compress one slide; False if its store is already what it would be."""
    from nic_core.compression import compress_slide, up_to_date

    card, slide_id = encoder.card, _slide_id(path)
    store = out / f"{slide_id}.zarr"
    with open_slide(path, mpp=mpp) as slide:
        identity = content_identity(path)
        table = patch_table(
            slide_id, slide, tissue_mask(slide), patch=card.patch, mpp=card.mpp, tissue=share
        )
        if up_to_date(store, slide, table, encoder, slide_identity=identity):
            return False
        bar = progress.add_task(slide_id, total=int(table["kept"].sum()))
        grid = compress_slide(
            slide,
            table,
            encoder,
            slide_id=slide_id,
            slide_identity=identity,
            device=device,
            progress=lambda done, total: progress.update(bar, completed=done),
        )
        write_grid(store, grid)
    return True


def _no_equal_names(slides: list[Path]) -> None:
    names: dict[str, Path] = {}
    for path in slides:
        other = names.setdefault(_slide_id(path), path)
        if other != path:
            raise typer.BadParameter(f"{other} and {path} would share a store")


def _slide_id(path: Path) -> str:
    return path.stem.removesuffix(".ome")


@grid_app.command()
def info(store: StorePath) -> None:
    """What a grid is and where it comes from."""
    with _one_line():
        grid = open_grid(store)
        code, rows, columns = grid.shape
        kept = int(grid.valid.sum())
        size = sum(part.stat().st_size for part in store.rglob("*") if part.is_file())
        table = Table(show_header=False, box=None)
        table.add_row("codes", f"{code} numbers x {rows} rows x {columns} columns")
        table.add_row("cells with a code", f"{kept} of {rows * columns}")
        table.add_row("on disk", f"{size / 1e6:.2f} MB")
        for name, value in grid.provenance.model_dump().items():
            table.add_row(name.replace("_", " "), str(value))
        console.print(table)


@grid_app.command()
def preview(store: StorePath, out: Out) -> None:
    """Draw a grid: its first three principal components as red, green and blue."""
    with _one_line():
        grid = open_grid(store)
        cell = max(1, math.ceil(800 / max(grid.shape[1:])))
        _save(out, grid_preview(grid, cell=cell))
        console.print(f"{out}")


def _save(path: Path, picture: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


@contextmanager
def _one_line() -> Iterator[None]:
    """An expected error is a line and exit status 1, not a traceback."""
    try:
        yield
    except (SlideError, GridError) as error:
        console.print(str(error), style="red", soft_wrap=True, markup=False)
        raise typer.Exit(1) from error


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.0f} patches/s" if speed else "")

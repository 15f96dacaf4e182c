"""``nic``: look at slides and compress them, without cohort or orchestrator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from nic_core.cohort import CompressionSettings
from nic_core.encoder_cli import encoder_app
from nic_core.grids import GridError, Reading, grid_preview, open_grid
from nic_core.slides import SlideError, content_identity, open_slide
from nic_core.store import Store, StoreError
from nic_core.tissue import read_mask, tissue_mask, tissue_outline

if TYPE_CHECKING:
    from nic_core.batch import Outcome
    from nic_core.encoders.encoder import Encoder

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
grid_app = typer.Typer(no_args_is_help=True, help="Look into a grid store.")
app.add_typer(grid_app, name="grid")
app.add_typer(encoder_app, name="encoder")
console = Console()

COMPRESSION = CompressionSettings()
Asked = Literal["auto", "float32", "bfloat16"]
Orientations = Literal["1", "8"]
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
    encoder: Annotated[str, typer.Option(help="folder of an encoder, or its name in $NIC_STORE")],
    out: Annotated[Path, typer.Option(help="folder for the grid stores and report.csv")],
    mpp: Mpp = None,
    share: Annotated[
        float, typer.Option("--tissue", min=0, max=1, help="a cell is kept above this share")
    ] = 0.6,
    orientations: Annotated[Orientations, typer.Option(help="1 (upright) or 8")] = "1",
    precision: Annotated[
        Asked, typer.Option(help="auto: bfloat16 if the device has it")
    ] = COMPRESSION.precision,
    reading: Annotated[
        Reading, typer.Option(help="pixels of the patch, or of the network's input")
    ] = COMPRESSION.reading,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    resume: Annotated[
        bool, typer.Option(help="leave stores that are up to date; or make all anew")
    ] = True,
) -> None:
    """Compress slides to grids.

    A slide that cannot be used does not stop the others: report.csv tells what became of each,
    and the exit status is 1.
    """
    # imports torch: slow, for this command alone
    from nic_core.batch import REPORT, compress_slides, name_slides, write_report

    prepared = _encoder(encoder).prepare(device, precision, reading)
    try:
        named = name_slides(slides)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        every = bars.add_task("slides", total=len(named))
        current: dict[str, TaskID] = {}

        def show(slide: str, done: int, total: int) -> None:
            if slide not in current:
                current[slide] = bars.add_task(slide, total=total, unit="patches")
            bars.update(current[slide], completed=done)

        def tell(outcome: Outcome) -> None:
            if outcome.slide in current:
                bars.remove_task(current.pop(outcome.slide))
            if outcome.status != "put off":
                bars.advance(every)
            if outcome.status != "not tried":
                console.print(_line(outcome), soft_wrap=True)

        table = compress_slides(
            named,
            prepared,
            out,
            mpp=mpp,
            tissue=share,
            orientations=orientations == "8",
            resume=resume,
            progress=show,
            tell=tell,
        )
    counts = {s: int((table["status"] == s).sum()) for s in ("compressed", "up to date", "failed")}
    left = len(table) - sum(counts.values())
    told = [f"{count} {status}" for status, count in counts.items()]
    console.print(", ".join(told + [f"{left} not tried"] * bool(left)))
    failed = Table("failed", "reason", "what to do")
    for row in table.rows(named=True):
        if row["status"] == "failed":
            failed.add_row(Path(row["path"]).name, row["reason"], row["remedy"])
    if counts["failed"]:
        console.print(failed)
    with _one_line():
        write_report(out / REPORT, table)
    console.print(str(out / REPORT), soft_wrap=True)
    if counts["failed"]:
        raise typer.Exit(1)


def _line(outcome: Outcome) -> Text:
    """A slide's outcome in a line."""
    line = Text.assemble((outcome.slide, "bold"), f": {outcome.status}")
    if outcome.patches_per_second is not None:
        line.append(f", {outcome.cells:,} patches, {outcome.patches_per_second:,.0f} patches/s")
    if outcome.unreadable:
        line.append(f", {outcome.unreadable:,} unreadable", "yellow")
    if outcome.reason:
        line.append(f", {outcome.reason}", "red" if outcome.status == "failed" else "")
    return line


def _encoder(name: str) -> Encoder:
    """An encoder by its folder or by its name in the store."""
    from nic_core.encoders.encoder import EncoderError
    from nic_core.encoders.files import load_encoder

    store = Store.from_environment()
    folder = Path(name) if Path(name).is_dir() else store.encoder(name)
    if not folder.is_dir():
        known = sorted(path.name for path in folder.parent.glob("[!.]*/"))
        raise typer.BadParameter(
            f"'{name}' is neither a folder nor an encoder of the store {store.root} "
            f"(it has: {', '.join(known) or 'none'})",
            param_hint="--encoder",
        )
    try:
        return load_encoder(folder)
    except EncoderError as error:
        raise typer.BadParameter(str(error), param_hint="--encoder") from error


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
        table.add_row("orientations", "1 (upright)" if grid.orientations is None else "8")
        table.add_row("cells with a code", f"{kept} of {rows * columns}")
        table.add_row("on disk", f"{size / 1e6:.2f} MB")
        for name, value in grid.provenance.model_dump().items():
            table.add_row(name.replace("_", " "), str(value))
        console.print(table)


@grid_app.command()
def preview(
    store: StorePath,
    out: Out,
    slide: Annotated[
        Path | None, typer.Option(help="the slide, to be drawn beside its grid")
    ] = None,
) -> None:
    """Draw a grid: its first three principal components as red, green and blue."""
    from nic_core.pictures import slide_and_grid  # imports matplotlib: slow, for this alone

    with _one_line():
        grid = open_grid(store)
        cell = max(1, math.ceil(800 / max(grid.shape[1:])))
        if slide is None:
            _save(out, grid_preview(grid, cell=cell))
        else:
            with open_slide(slide, mpp=grid.provenance.slide_mpp) as opened:
                _save(out, slide_and_grid(opened, grid, cell=cell))
        console.print(f"{out}")


def _save(path: Path, picture: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


@contextmanager
def _one_line() -> Iterator[None]:
    """An expected error is a line and exit status 1, not a traceback."""
    try:
        yield
    except (SlideError, GridError, StoreError) as error:
        console.print(str(error), style="red", soft_wrap=True, markup=False)
        raise typer.Exit(1) from error


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit")
        return Text(f"{speed:,.0f} {unit}/s" if unit and speed else "")

"""``nic compress``: compress slide files to grids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import TaskID
from rich.text import Text

from nic_core.cli.shared import (
    MPP_OPTION,
    ImageNumber,
    Mpp,
    SlideArguments,
    console,
    given_slide,
    one_line,
    progress_bars,
)
from nic_core.store import Store, StoreError
from nic_core.tables import terminal_table
from nic_core.types import Colours, Reading, RequestedGridPrecision

if TYPE_CHECKING:
    import polars as pl

    from nic_core.compression.batch import Outcome
    from nic_core.encoders.encoder import Encoder

PREVIEWS = "previews"  # folder of the previews, beside the grid stores
Orientations = Literal["1", "8"]


def compress(
    slides: SlideArguments,
    encoder: Annotated[
        str, typer.Option(help="folder of an encoder, or name of an encoder in $NIC_STORE")
    ],
    out: Annotated[
        Path, typer.Option(help="folder for the grid stores, their previews and report.csv")
    ],
    mpp: Mpp = None,
    image: ImageNumber = None,
    share: Annotated[
        float,
        typer.Option(
            "--tissue", min=0, max=1, help="keep cells whose tissue fraction exceeds this"
        ),
    ] = 0.6,
    stride: Annotated[
        int | None,
        typer.Option(
            help="side of a grid cell, px at the encoder's um/px; default: its patch", min=1
        ),
    ] = None,
    orientations: Annotated[
        Orientations, typer.Option(help="number of orientations: 1 (upright) or 8")
    ] = "1",
    precision: Annotated[
        RequestedGridPrecision,
        typer.Option(
            help="auto: bfloat16 if the device has matrix units for it; int8: for CPUs, not exact"
        ),
    ] = "auto",
    reading: Annotated[
        Reading,
        typer.Option(help="read pixels at the um/px of the patch or of the network's input"),
    ] = "patch",
    colours: Annotated[
        Colours,
        typer.Option(help="pixels as stored, or converted to sRGB by the file's ICC profile"),
    ] = "stored",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    resume: Annotated[bool, typer.Option(help="skip grids that are up to date")] = True,
) -> None:
    """Compress slides to grids, and draw them.

    A slide that cannot be used does not stop the others. report.csv lists the outcome of every
    slide; the exit status is 1 if a slide failed. The folder previews receives an RGB image of
    every grid of the encoder in --out, in colours that hold for all of them.
    """
    from nic_core.cohort import Geometry
    from nic_core.cohort.geometry import check_stride
    from nic_core.compression.batch import REPORT, compress_slides, slides_by_id, write_report
    from nic_core.devices import resolve_device
    from nic_core.encoders.errors import EncoderError
    from nic_core.slides import SlideSource

    try:
        resolve_device(device)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error
    found = find_encoder(encoder)
    try:
        prepared = found.prepare(device, precision, reading)
    except EncoderError as error:
        raise typer.BadParameter(str(error), param_hint="--precision") from error
    card = prepared.card
    try:
        check_stride(card.name, Geometry(card.patch, card.mpp, stride or card.patch))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--stride") from error
    try:
        named = slides_by_id(SlideSource(given_slide(path), mpp, image) for path in slides)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with batch_progress(len(named)) as (show, tell), one_line(EncoderError):
        report = compress_slides(
            named,
            prepared,
            out,
            colours=colours,
            tissue=share,
            stride=stride,
            orientations=orientations == "8",
            resume=resume,
            progress=show,
            on_outcome=tell,
        )
    table = advise_mpp_option(report)
    counts = {s: int((table["status"] == s).sum()) for s in ("compressed", "up to date", "failed")}
    left = len(table) - sum(counts.values())
    summary = [f"{count} {status}" for status, count in counts.items()]
    console.print(", ".join(summary + [f"{left} not tried"] * bool(left)))
    print_failed(table)
    with one_line(StoreError):
        write_report(out / REPORT, table)
    console.print(str(out / REPORT), soft_wrap=True)
    _draw(out, card.weights_hash)
    if counts["failed"]:
        raise typer.Exit(1)


def _draw(out: Path, weights_hash: str) -> None:
    """Write previews of all grids of an encoder in a folder, in colours that hold for all."""
    from nic_core.grids import GridError, open_grid, write_previews

    stores, cells = [], 0
    for path in sorted(out.glob("[!.]*.zarr")):
        try:
            grid = open_grid(path)
        except GridError as error:
            console.print(f"no preview: {error}", style="yellow", soft_wrap=True, markup=False)
            continue
        if grid.provenance.weights_hash == weights_hash:
            stores.append(path)
            cells += int(grid.valid.sum())
    if cells:
        with one_line(StoreError, GridError):
            write_previews(stores, out / PREVIEWS)
        console.print(str(out / PREVIEWS), soft_wrap=True)


@contextmanager
def batch_progress(
    slides: int | None,
) -> Iterator[tuple[Callable[[str, int, int], None], Callable[[Outcome], None]]]:
    """Show progress bars for all slides and for the current one, and print each outcome.

    ``slides`` is their number, if it is known. Yields the callbacks ``progress`` and
    ``on_outcome`` of :func:`nic_core.compression.batch.compress_slides`.
    """
    with progress_bars() as bars:
        every = bars.add_task("slides", total=slides)
        current: dict[str, TaskID] = {}

        def show(slide: str, done: int, total: int) -> None:
            if slide not in current:
                current[slide] = bars.add_task(slide, total=total, unit="patches")
            bars.update(current[slide], completed=done)

        def tell(outcome: Outcome) -> None:
            if outcome.slide in current:
                bars.remove_task(current.pop(outcome.slide))
            if outcome.status != "waiting":
                bars.advance(every)
            if outcome.status != "not tried":
                console.print(_line(outcome), soft_wrap=True)

        yield show, tell


def advise_mpp_option(report: pl.DataFrame) -> pl.DataFrame:
    """Return a report whose remedies name the option ``--mpp`` instead of the slide table."""
    import polars as pl

    from nic_core.slides.metadata import MPP_REMEDY

    return report.with_columns(pl.col("remedy").str.replace(MPP_REMEDY, MPP_OPTION, literal=True))


def print_failed(report: pl.DataFrame) -> None:
    """Print the failed slides of a report with reason and remedy."""
    rows = [
        (Path(row["path"]).name, row["reason"], row["remedy"])
        for row in report.filter(status="failed").rows(named=True)
    ]
    if rows:
        console.print(terminal_table(("failed", "reason", "what to do"), (), rows))


def _line(outcome: Outcome) -> Text:
    """One line about a slide's outcome."""
    line = Text.assemble((outcome.slide, "bold"), f": {outcome.status}")
    if outcome.patches_per_second is not None:
        line.append(f", {outcome.cells:,} patches, {outcome.patches_per_second:,.0f} patches/s")
    if outcome.unreadable:
        line.append(f", {outcome.unreadable:,} unreadable", "yellow")
    if outcome.reason:
        line.append(f", {outcome.reason}", "red" if outcome.status == "failed" else "")
    return line


def find_encoder(name: str) -> Encoder:
    """Load an encoder by its folder or by its name in the store."""
    from nic_core.encoders.errors import EncoderError
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

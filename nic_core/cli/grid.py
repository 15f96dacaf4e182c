"""``nic grid``: metadata, preview and export of grid stores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from nic_core.cli.shared import Out, console, facts, given_slide, one_line, save_picture
from nic_core.store import StoreError
from nic_core.types import ExportFormat

grid_app = typer.Typer(
    no_args_is_help=True, help="Show the metadata or a preview of a grid store, or export grids."
)

StorePath = Annotated[Path, typer.Argument(help="grid store (.zarr)")]


@grid_app.command()
def info(store: StorePath) -> None:
    """Print a grid's shape, size and provenance."""
    from nic_core.grids import GridError, open_grid

    with one_line(GridError):
        grid = open_grid(store)
        size, rows, columns = grid.shape
        kept = int(grid.valid.sum())
        stored = sum(part.stat().st_size for part in store.rglob("*") if part.is_file())
        table = facts()
        table.add_row("embeddings", f"{size} numbers x {rows} rows x {columns} columns")
        table.add_row("orientations", "1 (upright)" if grid.orientations is None else "8")
        table.add_row("cells with an embedding", f"{kept} of {rows * columns}")
        table.add_row("on disk", f"{stored / 1e6:.2f} MB")
        for name, value in grid.provenance.model_dump().items():
            table.add_row(name.replace("_", " "), str(value))
        console.print(table)


@grid_app.command()
def preview(
    store: StorePath,
    out: Out,
    slide: Annotated[
        str | None,
        typer.Option(help="slide file, or its address, to draw beside its grid"),
    ] = None,
) -> None:
    """Draw a grid: the first three principal components of its embeddings as RGB."""
    from nic_core.grids import GridError, draw_grid, open_grid
    from nic_core.reports.slide_figure import slide_and_grid
    from nic_core.slides import SlideError, open_slide

    with one_line(SlideError, GridError):
        grid = open_grid(store)
        cell = max(1, math.ceil(800 / max(grid.shape[1:])))
        if slide is None:
            save_picture(out, draw_grid(grid, cell=cell))
        else:
            about = grid.provenance
            with open_slide(
                given_slide(slide), mpp=about.slide_mpp, image=about.slide_image
            ) as opened:
                save_picture(out, slide_and_grid(opened, grid, cell=cell))
        console.print(f"{out}")


@grid_app.command()
def export(
    grids: Annotated[list[Path], typer.Argument(help="grid stores (.zarr)")],
    format: Annotated[ExportFormat, typer.Option(help="layout of the files")],
    out: Annotated[Path, typer.Option(help="folder for the files, which are named by slide")],
) -> None:
    """Write the embeddings of grids for other software, with coordinates in level-0 px.

    A grid that cannot be exported does not stop the others; the exit status is 1.
    """
    from nic_core.grids import GridError, open_grid
    from nic_core.grids.chunks import ChunkError
    from nic_core.grids.export import export_grid

    failed = False
    named: dict[str, Path] = {}
    for store in grids:
        try:
            grid = open_grid(store)
            slide = grid.provenance.slide
            if (first := named.setdefault(slide, store)) != store:
                raise GridError(
                    f"{store}: is a grid of slide '{slide}', as {first}; give another folder with "
                    "--out"
                )
            paths = export_grid(grid, out, format)
        except (GridError, StoreError, ChunkError) as error:
            console.print(str(error), style="red", soft_wrap=True, markup=False)
            failed = True
        else:
            size = sum(
                part.stat().st_size
                for path in paths
                for part in ([path] if path.is_file() else path.rglob("*"))
                if part.is_file()
            )
            shown = ", ".join(path.name for path in paths)
            console.print(
                f"{shown}: {int(grid.valid.sum())} embeddings of {grid.shape[0]} numbers, "
                f"{size / 1e6:.2f} MB",
                soft_wrap=True,
                markup=False,
            )
    if failed:
        raise typer.Exit(1)

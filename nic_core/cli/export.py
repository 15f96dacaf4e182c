"""``nic export``: what the store has of slides, for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nic_core.cli.shared import console, one_line
from nic_core.types import ExportedCells, Origin

if TYPE_CHECKING:
    from nic_core.steps.qupath import QupathFile

export_app = typer.Typer(
    no_args_is_help=True, help="Write what the store has of slides, for other programs."
)


@export_app.command()
def qupath(
    slides: Annotated[list[str], typer.Argument(help="ids of slides of the cohort")],
    encoder: Annotated[
        str | None, typer.Option(help="encoder of the grid; default: a file for each encoder")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="target or probability map that classifies the cells; default: the first target "
            "with heat, else the first map"
        ),
    ] = None,
    cells: Annotated[
        ExportedCells,
        typer.Option(help="cells to write: all, those with a class, or none (annotations only)"),
    ] = "all",
    origin: Annotated[
        Origin,
        typer.Option(
            help="coordinates count from the corner of the scanned area, as QuPath's do with "
            "OpenSlide, or from that of level 0"
        ),
    ] = "bounds",
    zipped: Annotated[
        bool, typer.Option("--zip", help="write zip archives, which QuPath opens, too")
    ] = False,
    out: Annotated[Path, typer.Option(help="folder for the files")] = Path("data/qupath"),
) -> None:
    """Write the cells of slides with heat, probabilities and focus as GeoJSON for QuPath.

    The cohort file is $NIC_COHORT and the store $NIC_STORE. A slide that cannot be exported does
    not stop the others; the exit status is 1.
    """
    from nic_core.cohort import CohortError, load_cohort
    from nic_core.grids import GridError
    from nic_core.models.files import ModelFileError
    from nic_core.slides import SlideError
    from nic_core.steps.qupath import encoders_with_grid, export_qupath
    from nic_core.store import Store, StoreError
    from nic_core.tiling.patches import PatchTableError

    expected = (CohortError, GridError, ModelFileError, PatchTableError, SlideError, StoreError)
    with one_line(CohortError):
        cohort, store = load_cohort(), Store.from_environment()
        if encoder is not None:
            cohort.encoder(encoder)
    failed = False
    for slide in dict.fromkeys(slides):
        try:
            names = encoders_with_grid(cohort, store, slide) if encoder is None else [encoder]
            for name in names:
                made = export_qupath(
                    cohort,
                    store,
                    slide,
                    name,
                    out,
                    classify_by=by,
                    cells=cells,
                    origin=origin,
                    zipped=zipped,
                )
                _print(made)
        except expected as error:
            console.print(str(error), style="red", soft_wrap=True, markup=False)
            failed = True
    if failed:
        raise typer.Exit(1)


def _print(made: QupathFile) -> None:
    size = made.path.stat().st_size / 1e6
    lines = [
        f"{made.path}: {made.cells:,} cells, {made.annotations} annotations, {size:.2f} MB",
        f"  measurements: {', '.join(made.measurements) or 'none'}",
        f"  classes of cells: {made.classified_by or 'none'}",
    ]
    if made.missing:
        lines.append(f"  not in the store: {', '.join(made.missing)}")
    console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)

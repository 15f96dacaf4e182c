"""``nic init`` and ``nic check``: write the first files of a study, and find its mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from nic_core.cli.shared import console, one_line, progress_bars
from nic_core.store import StoreError
from nic_core.tables import terminal_table

SHOWN = 6  # rows to decide that are printed


def init(
    folder: Annotated[Path, typer.Argument(help="folder with slide files, also in sub-folders")],
    out: Annotated[
        Path | None,
        typer.Option(help="folder for slides.csv and cohort.yaml; default: that of the slides"),
    ] = None,
) -> None:
    """Write a slide table and a cohort file for the slides in a folder.

    Existing files are not replaced. The column `decide` of the slide table says which rows need a
    decision.
    """
    import polars as pl

    from nic_core.cohort import CohortError
    from nic_core.cohort.draft import write_study

    with one_line(CohortError, StoreError), progress_bars() as bars:
        bar = bars.add_task("slides", total=None)
        study = write_study(
            folder,
            out or folder,
            lambda done, total: bars.update(bar, completed=done, total=total),
        )
    slides = study.slides
    resolutions = slides.group_by("file_mpp", "mpp_from").len().sort("len", descending=True)
    for mpp, source, count in resolutions.iter_rows():
        stated = "unknown um/px" if mpp is None else f"{mpp:.4g} um/px ({source})"
        _print(f"{count} slide{'s' if count > 1 else ''}: {stated}")
    for line in study.left_aside:
        _print(f"left aside: {line}")
    undecided = slides.filter(pl.col("decide").is_not_null())
    if undecided.height:
        rows = undecided.head(SHOWN).select("slide", "decide").rows()
        console.print(terminal_table(("slide", "to decide"), (), rows))
    if undecided.height > SHOWN:
        _print(f"and {undecided.height - SHOWN:,} more: column decide of {study.table}")
    _print(
        "each slide counts as a patient of its own: correct the column patient where a patient has "
        "several, else its slides get into several folds"
    )
    _print(f"wrote {study.table}")
    _print(f"wrote {study.cohort}")
    _print(f"next: nic check {study.cohort}")


def check(
    cohort: Annotated[
        Path | None,
        typer.Argument(help="cohort file; default: $NIC_COHORT, or that of the demo"),
    ] = None,
) -> None:
    """Report every mistake in a cohort file, its tables and its slides; compute nothing.

    The exit status is 1 if there is an error. A note is not an error.
    """
    from nic_core.cohort import CohortError
    from nic_core.steps.study_check import check_study

    with one_line(CohortError), progress_bars() as bars:
        bar = bars.add_task("slides", total=None)
        found = check_study(
            cohort, lambda done, total: bars.update(bar, completed=done, total=total)
        )
    if not found:
        console.print("no mistake found")
        return
    rows = [
        (
            Text("error", "red") if item.is_error else Text("note", "yellow"),
            item.where,
            item.problem,
        )
        for item in sorted(found, key=lambda item: not item.is_error)
    ]
    console.print(terminal_table(("", "where", "what is wrong, and what to do"), (), rows))
    errors = sum(item.is_error for item in found)
    console.print(f"errors: {errors}, notes: {len(found) - errors}")
    if errors:
        raise typer.Exit(1)


def _print(line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)

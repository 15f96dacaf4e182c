"""``nic evaluate``: test a slide model on the slides and labels of another hospital."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from nic_core.cli.compress import batch_progress, find_encoder
from nic_core.cli.predict import model_folder
from nic_core.cli.shared import console, one_line
from nic_core.store import Store, StoreError
from nic_core.tables import interval, terminal_table

if TYPE_CHECKING:
    import polars as pl

    from nic_core.cohort import ExternalCohort
    from nic_core.steps import ExternalEvaluation

GRIDS = "grids"


def evaluate(
    model: Annotated[
        str,
        typer.Option(help="folder of a slide model, or ENCODER/TARGET in $NIC_STORE"),
    ],
    slides: Annotated[Path, typer.Option(help="slide table (CSV or parquet) or folder of slides")],
    labels: Annotated[
        Path, typer.Option(help="label table with the columns of the model's target")
    ],
    out: Annotated[Path, typer.Option(help="folder for grids, tables and figures")],
    subgroups: Annotated[
        list[str] | None,
        typer.Option(help="column of the slide or label table: score each of its values by itself"),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="folder or name of the encoder; default: that of the model, in $NIC_STORE"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Test a slide model on a cohort that it was not trained on.

    Prints the metrics with intervals, calibration and the cross-validated values beside them. A
    cohort that shares a patient or slide with the study in $NIC_STORE, or a slide with the model's
    training, is refused. Grids in the folder --out are reused. A slide that cannot be used is left
    out with its reason.
    """
    from nic_core.cohort import CohortError
    from nic_core.devices import resolve_device
    from nic_core.encoders.errors import EncoderError
    from nic_core.models.files import ModelFileError, read_model_card
    from nic_core.models.prediction import ModelMismatchError
    from nic_core.steps import evaluate_external, study_slides, write_external_evaluation

    expected = (CohortError, EncoderError, ModelFileError, ModelMismatchError, StoreError)
    folder = model_folder(model)
    with one_line(*expected):
        card = read_model_card(folder)
        entry = _entry(slides, labels, tuple(subgroups or ()))
    tables = out / f"evaluation-{card.target.name}"
    network = find_encoder(encoder or card.encoder)
    try:
        resolve_device(device)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error
    with one_line(*expected), batch_progress(None) as (show, tell):
        made = evaluate_external(
            folder,
            network,
            entry,
            grids=out / GRIDS,
            study=study_slides(Store.from_environment()),
            device=device,
            progress=show,
            on_outcome=tell,
        )
        write_external_evaluation(tables, made)
    _print(made)
    console.print(str(tables), soft_wrap=True, markup=False)


def _entry(slides: Path, labels: Path, subgroups: tuple[str, ...]) -> ExternalCohort:
    from nic_core.cohort import CohortError, ExternalCohort, SlideFolder, Slides

    if not slides.exists():
        raise CohortError(f"{slides} does not exist; give a slide table or a folder of slides")
    source = (
        Slides(folders=(SlideFolder(path=slides),)) if slides.is_dir() else Slides(table=slides)
    )
    return ExternalCohort(
        name="external", slides=source, labels=labels, subgroups=tuple(dict.fromkeys(subgroups))
    )


def _print(made: ExternalEvaluation) -> None:
    card = made.card
    console.print(_table(made.metrics, f"{card.target.name}, encoder {card.encoder}"))
    for column in made.subgroups["column"].unique(maintain_order=True):
        console.print(_subgroup_table(made.subgroups.filter(column=column), column))
    predictions = made.predictions
    console.print(
        f"{predictions.height} units of {predictions['patient'].n_unique()} patients; intervals: "
        "95 %, bootstrap over patients; change: external minus cross-validated",
        soft_wrap=True,
    )
    for slide, reason in made.left_out.iter_rows():
        console.print(
            f"left out: slide {slide}: {reason}", style="yellow", soft_wrap=True, markup=False
        )
    for unmatched in made.matches.labels_without_slide:
        console.print(f"label without slide: {unmatched}", style="yellow", markup=False)


def _table(metrics: pl.DataFrame, title: str) -> Table:
    rows = [
        (
            row["metric"].replace("_", " "),
            _number(row["value"]) or "undefined",
            interval(row["low"], row["high"]),
            _number(row["cross_validated"]),
            _number(row["difference"]),
            interval(row["difference_low"], row["difference_high"]),
        )
        for row in metrics.iter_rows(named=True)
    ]
    headings = ("external", "95 % interval", "cross-\nvalidated", "change", "95 % interval")
    return terminal_table(("metric",), headings, rows, title=title)


def _subgroup_table(subgroups: pl.DataFrame, column: str) -> Table:
    first = subgroups.unique("group", keep="first", maintain_order=True)
    rows = [
        (
            row["group"],
            row["note"] or "",
            row["metric"].replace("_", " "),
            str(row["patients"]),
            str(row["units"]),
            _number(row["value"]),
            interval(row["low"], row["high"]),
        )
        for row in first.iter_rows(named=True)
    ]
    return terminal_table(
        ("group", "note", "metric"),
        ("patients", "units", "value", "95 % interval"),
        rows,
        title=f"subgroups by {column}",
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

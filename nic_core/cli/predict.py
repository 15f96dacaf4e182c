"""``nic predict``: apply a slide model to slide files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from nic_core.cli.compress import (
    advise_mpp_option,
    batch_progress,
    find_encoder,
    print_failed,
)
from nic_core.cli.shared import (
    ImageNumber,
    Mpp,
    SlideArguments,
    console,
    given_slide,
    one_line,
)
from nic_core.store import ModelKey, Store, StoreError
from nic_core.tables import terminal_table

if TYPE_CHECKING:
    import polars as pl

    from nic_core.models.files import ModelCard, SlideModel


def predict(
    slides: SlideArguments,
    model: Annotated[
        str, typer.Option(help="folder of a slide model, or ENCODER/TARGET in $NIC_STORE")
    ],
    encoder: Annotated[
        str | None,
        typer.Option(
            help="folder or name of the encoder; default: that of the model, in $NIC_STORE"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="folder for predictions-TARGET.csv and .parquet, report.csv and grids"),
    ] = None,
    patients: Annotated[
        Path | None, typer.Option(help="CSV file with the columns slide and patient")
    ] = None,
    times: Annotated[
        list[float] | None,
        typer.Option(
            help="survival targets: give the survival probability at this time, in its unit"
        ),
    ] = None,
    heatmaps: Annotated[
        bool, typer.Option("--heatmaps", help="write heatmaps to the folder --out")
    ] = False,
    mpp: Mpp = None,
    image: ImageNumber = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Predict slides or patients with a slide model.

    Slides are compressed with the settings of the model's grids. Grids that exist in the folder
    --out are reused. A slide that cannot be used does not stop the others; the exit status is 1.
    """
    from nic_core.compression.batch import REPORT, slides_by_id, write_report
    from nic_core.devices import resolve_device
    from nic_core.encoders.errors import EncoderError
    from nic_core.models.distance import FAR_PERCENTILE
    from nic_core.models.prediction import (
        PatientsError,
        check_encoder,
        check_times,
        predict_slides,
        read_patients,
        write_predictions,
    )
    from nic_core.slides import SlideSource

    if heatmaps and out is None:
        raise typer.BadParameter("heatmaps need a folder: give --out too", param_hint="--heatmaps")
    loaded = _model(model)
    card = loaded.card
    network = find_encoder(encoder or card.encoder)
    try:
        resolve_device(device)
        check_encoder(card, network.card)
        check_times(card, times or ())
        named = slides_by_id(SlideSource(given_slide(path), mpp, image) for path in slides)
        of_slide = read_patients(patients) if patients is not None else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if card.target.level == "patient" and of_slide is None:
        console.print("no --patients given: each slide counts as one patient")
    with one_line(EncoderError, StoreError, PatientsError), batch_progress(len(named)) as bars:
        show, tell = bars
        predicted = predict_slides(
            loaded,
            network,
            named,
            out,
            patients=of_slide,
            times=times or (),
            device=device,
            heatmaps=heatmaps,
            progress=show,
            on_outcome=tell,
        )
    console.print(_table(card, predicted.predictions, times or ()))
    console.print(_legend(card), soft_wrap=True, markup=False)
    if predicted.predictions["in_training"].any():
        console.print(
            "* part of the training cohort: this prediction does not show how good the model is",
            style="yellow",
            soft_wrap=True,
        )
    rows = predicted.predictions
    far = rows.filter(rows["distance_percentile"] > FAR_PERCENTILE)["unit"]
    if len(far):
        console.print(
            f"far from the training cohort (beyond percentile {FAR_PERCENTILE:g}), so the "
            f"prediction may be wrong: {', '.join(far)}",
            style="yellow",
            soft_wrap=True,
            markup=False,
        )
    report = advise_mpp_option(predicted.slides)
    print_failed(report)
    if out is not None:
        with one_line(StoreError):
            table = write_predictions(out, card.target.name, predicted.predictions)
            write_report(out / REPORT, report)
        console.print(str(table), soft_wrap=True)
    if predicted.slides["status"].is_in(["failed", "not tried"]).any():
        raise typer.Exit(1)


def model_folder(name: str) -> Path:
    """Return the folder of a slide model: itself, or of encoder and target in the store.

    Encoder and target are accepted in either order, if only one of the two models exists.
    """
    if Path(name).is_dir():
        return Path(name)
    store = Store.from_environment()
    first, _, second = name.partition("/")
    orders = ((first, second), (second, first)) if first and second else ()
    found = {
        folder
        for encoder, target in orders
        if (folder := store.slide_model(ModelKey(encoder=encoder, target=target))).is_dir()
    }
    if len(found) > 1:
        raise typer.BadParameter(
            f"'{name}' names two models, {' and '.join(map(str, sorted(found)))}; give the folder "
            "of one",
            param_hint="--model",
        )
    if not found:
        known = sorted(
            f"{path.parent.name}/{path.name}" for path in store.root.glob("slide_models/*/[!.]*/")
        )
        raise typer.BadParameter(
            f"'{name}' is neither a folder nor a model of the store {store.root} "
            f"(it has: {', '.join(known) or 'none'})",
            param_hint="--model",
        )
    return found.pop()


def _model(name: str) -> SlideModel:
    """Load a slide model by its folder, or by encoder and target in the store."""
    from nic_core.models.files import ModelFileError, load_model

    try:
        return load_model(model_folder(name))
    except ModelFileError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error


def _table(card: ModelCard, predictions: pl.DataFrame, times: Sequence[float]) -> Table:
    """Some rows a unit: each quantity, its mean, lowest and highest over the folds."""
    by_patient = card.target.level == "patient"
    rows = []
    for row in predictions.rows(named=True):
        other = ", ".join(row["slides"]) if by_patient else row["patient"] or ""
        names = [f"{row['unit']}{' *' if row['in_training'] else ''}", other]
        for quantity in _quantities(card, row, times):
            rows.append((*names, *quantity))
            names = ["", ""]
    headings = ["patient", "slides", "quantity"] if by_patient else ["slide", "patient", "quantity"]
    if not any(other for _, other, *_ in rows):  # no --patients
        del headings[1]
        rows = [(name, *quantity) for name, _, *quantity in rows]
    return terminal_table(
        headings,
        ("value", "folds"),
        rows,
        title=f"{card.target.name} ({card.target.kind}), encoder {card.encoder}",
    )


def _quantities(
    card: ModelCard, row: dict[str, Any], times: Sequence[float]
) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and range over the folds of everything predicted for a unit."""
    from nic_core.models.kinds import kind_of
    from nic_core.numbers import format_number

    kind, folds = kind_of(card.target), range(len(card.networks))
    conclusions = kind.conclusion_cells(row)
    headings = kind.conclusion_headings(times)
    at_times = zip(headings[len(headings) - len(times) :], times, strict=True)
    for name, column in (
        *((name.replace("_", " "), name) for name in kind.prediction_columns),
        *((heading, f"survival_{time:g}") for heading, time in at_times),
    ):
        if row[column] is None:
            yield name, "none", ""
            continue
        each = [row[f"fold_{k}_{column}"] for k in folds]
        write = _probability if column.startswith(("probability_", "survival_")) else format_number
        yield name, write(row[column]), f"{write(min(each))} to {write(max(each))}"
    for heading, cell in zip(headings, conclusions, strict=False):
        if cell:
            yield heading, cell, ""
    if row["distance"] is not None:
        percentile = f"percentile {row['distance_percentile']:.0f}"
        yield "distance", format_number(row["distance"]), percentile


def _probability(value: float) -> str:
    return f"{value:.3f}"


def _legend(card: ModelCard) -> str:
    from nic_core.models.kinds import kind_of

    parts = [
        f"value: mean of {len(card.networks)} folds; folds: lowest to highest",
        kind_of(card.target).legend(card.median_risk),
        "distance: to the training cohort, with its percentile among held-out training slides",
    ]
    return "; ".join(part for part in parts if part)

"""``nic encoder``: train, import, list, describe and probe encoders."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from nic_core.cli.shared import (
    Mpp,
    SlideArguments,
    console,
    facts,
    given_slide,
    one_line,
    progress_bars,
)
from nic_core.store import Store, StoreError
from nic_core.tables import terminal_table
from nic_core.types import Reading, RequestedGridPrecision

encoder_app = typer.Typer(
    no_args_is_help=True, help="Train, import, list, describe and probe encoders."
)
Folder = Annotated[Path, typer.Argument(help="folder of an encoder")]


@dataclass(frozen=True)
class ListedEncoder:
    """A line of ``nic encoder list``; None or empty where it is not known.

    Attributes
    ----------
    origin
        ``preset``, ``released``, ``store`` or ``registry``.
    file
        What the file of the encoder contains, or its architecture.
    patch, mpp, embedding_size
        Side of a patch, px; um/px; length of an embedding.
    licence
        Licence of the weights.
    """

    name: str
    origin: str
    file: str
    patch: float | None
    mpp: float | None
    embedding_size: float | None
    licence: str = ""


Listing = tuple[list[ListedEncoder], list[str]]
"""Encoders, and what could not be read: one sentence each."""

MORE_ENCODERS: list[Callable[[Store], Listing]] = []
"""Functions that list encoders of a further origin, which a plug-in adds."""


@encoder_app.command()
def train(
    name: Annotated[str, typer.Argument(help="name of an encoder in the cohort file")],
    cohort: Annotated[
        Path | None, typer.Option(help="cohort file; default: $NIC_COHORT, or that of the demo")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="store; default: $NIC_STORE")] = None,
) -> None:
    """Train one encoder of a cohort file.

    Patch tasks that are missing from the store, or whose entry or files changed, are built first.
    An interrupted training continues from its last epoch.
    """
    from nic_core import steps
    from nic_core.cohort import load_cohort
    from nic_core.reports import encoder_results, results_table

    with _one_line(), progress_bars() as progress:
        study = load_cohort(cohort)
        products = Store(store.resolve()) if store else Store.from_environment()
        keys = steps.patch_task_keys(study, name)
        for task in study.encoder(name).tasks:
            if not steps.patch_task_is_current(study, products, keys[task]):
                steps.make_patch_task(study, products, keys[task])
        bar = progress.add_task(name, total=None, unit="patches")
        trained = steps.make_encoder(
            study,
            products,
            name,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    if trained.encoder.card.scores:
        console.print(results_table(encoder_results(trained.encoder.card)))
    console.print(f"{products.encoder(name)}", soft_wrap=True)


@encoder_app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Keras HDF5 file of a released encoder (.h5)")],
    out: Annotated[Path, typer.Option(help="folder for the encoder")],
    name: Annotated[
        str | None, typer.Option(help="name of the encoder; default: name of the folder")
    ] = None,
) -> None:
    """Convert a released Keras encoder into an encoder folder.

    Networks of other formats are imported by an entry in the cohort file, which describes them.
    """
    from nic_core.encoders.files import save_encoder
    from nic_core.encoders.keras_import import import_keras_encoder

    with _one_line():
        encoder = import_keras_encoder(file, name or out.resolve().name)
        save_encoder(out, encoder)
        _show(encoder.card.model_dump())
        console.print(f"{out}", soft_wrap=True)


@encoder_app.command("list")
def list_() -> None:
    """List presets, released encoders, and the encoders of the store and of the registry.

    The weights of a preset come from a local file. The exit status is 1 if an encoder of the store,
    or the registry, cannot be read.
    """
    store = Store.from_environment()
    listed = _published()
    problems: list[str] = []
    for list_more in (_of_store, *MORE_ENCODERS):
        found, unreadable = list_more(store)
        listed += found
        problems += unreadable
    rows = []
    for encoder in listed:
        numbers = (encoder.patch, encoder.mpp, encoder.embedding_size)
        shown = ("" if number is None else f"{number:g}" for number in numbers)
        rows.append((encoder.name, encoder.origin, encoder.file, encoder.licence, *shown))
    texts = ("name", "from", "file", "licence")
    console.print(terminal_table(texts, ("patch, px", "um/px", "embedding"), rows))
    console.print(f"store: {store.root}", soft_wrap=True, markup=False)
    for problem in problems:
        console.print(problem, style="red", soft_wrap=True, markup=False)
    if problems:
        raise typer.Exit(1)


@encoder_app.command()
def info(folder: Folder) -> None:
    """Print an encoder's card."""
    from nic_core.encoders.files import read_card

    with _one_line():
        card = read_card(folder)
        _show(card.model_dump(exclude={"scores"}))
        if card.scores:
            rows = []
            for task, s in card.scores.items():
                auc = "" if s.auc is None else f"{s.auc:.3f}"
                values = (f"{s.balanced_accuracy:.3f}", auc, f"{s.f1:.3f}")
                rows.append((task, str(s.n), *values))
            headings = ("test\npatches", "balanced\naccuracy", "AUC", "F1")
            console.print(terminal_table(("task",), headings, rows))


@encoder_app.command()
def probe(
    folder: Folder,
    tasks: Annotated[list[Path], typer.Argument(help="folders of patch tasks")],
    out: Annotated[Path, typer.Option(help="folder for the table and the figures")],
    patches: Annotated[
        int, typer.Option(min=1, help="maximum number of patches of each split")
    ] = 1500,
    seed: Annotated[int, typer.Option(help="seed of the sample of patches")] = 0,
) -> None:
    """Fit simple classifiers on an encoder's embeddings and score them on test patients.

    Writes ``probes.parquet``, ``embeddings.png`` (principal axes) and ``nearest_patches.png``.
    """
    from nic_core.encoders.figures import embedding_map, neighbour_sheet
    from nic_core.encoders.files import load_encoder
    from nic_core.encoders.patch_tasks import load_patch_task
    from nic_core.encoders.probes import check_scale, probe_table, task_embeddings
    from nic_core.pictures import save_figure

    with _one_line():
        encoder = load_encoder(folder)
        datasets = [load_patch_task(path) for path in tasks]
        for task in datasets:
            check_scale(encoder, task)
        embeddings = [
            task_embeddings(encoder, task, patches=patches, seed=seed) for task in datasets
        ]
        scores = probe_table(encoder, embeddings)
        out.mkdir(parents=True, exist_ok=True)
        scores.write_parquet(out / "probes.parquet")
        save_figure(embedding_map(embeddings), out / "embeddings.png")
        save_figure(neighbour_sheet(embeddings, seed=seed), out / "nearest_patches.png")
        rows = []
        for row in scores.iter_rows(named=True):
            auc = "" if row["auc"] is None else f"{row['auc']:.3f}"
            values = (f"{row['balanced_accuracy']:.3f}", auc, f"{row['f1']:.3f}", str(row["test"]))
            rows.append((row["task"], row["probe"], f"{row['mpp']:g}", *values))
        headings = ("um/px", "balanced\naccuracy", "AUC", "F1", "test\npatches")
        console.print(terminal_table(("task", "probe"), headings, rows))


@encoder_app.command()
def similarity(
    folder: Folder,
    slides: SlideArguments,
    precision: Annotated[
        RequestedGridPrecision, typer.Option(help="precision to compare with float32")
    ] = "auto",
    reading: Annotated[Reading, typer.Option(help="reading to compare with 'patch'")] = "patch",
    mpp: Mpp = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Compare a slide's embeddings in a precision and reading with those in float32 and 'patch'.

    Prints the cosine similarity over the slide's patches, its 1st percentile, and the root mean
    square distance as a share of the spread between the patches.
    """
    from nic_core.compression.similarity import slide_similarity
    from nic_core.encoders.files import load_encoder
    from nic_core.slides import SlideError, open_slide

    rows = []
    with _one_line(), one_line(SlideError, ValueError):
        encoder = load_encoder(folder)
        exact = encoder.prepare(device, "float32")
        prepared = encoder.prepare(device, precision, reading)
        for path in slides:
            given = given_slide(path)
            with open_slide(given, mpp=mpp) as slide:
                found = slide_similarity(slide, exact, prepared)
            shown = (f"{found.cosine:.4f}", f"{found.cosine_p1:.4f}", f"{found.distance:.1%}")
            rows.append((given.name, prepared.precision, str(found.patches), *shown))
        headings = ("patches", "cosine", "1st percentile", "distance")
        console.print(terminal_table(("slide", "precision"), headings, rows))


def _published() -> list[ListedEncoder]:
    from nic_core.cohort.presets import PRESETS
    from nic_core.encoders.keras_import import LICENCE, MPP, PATCH, RELEASED

    presets = [
        ListedEncoder(
            name,
            "preset",
            "exported graph" if preset.network.timm is None else "timm weights",
            preset.network.patch,
            preset.network.mpp,
            preset.network.embedding_size,
            preset.licence,
        )
        for name, preset in PRESETS.items()
    ]
    released = [
        ListedEncoder(name, "released", "Keras", PATCH, MPP, size, LICENCE)
        for name, size in RELEASED.items()
    ]
    return presets + released


def _of_store(store: Store) -> Listing:
    from nic_core.cohort.presets import licence_of
    from nic_core.encoders.errors import EncoderError
    from nic_core.encoders.files import read_card

    listed: list[ListedEncoder] = []
    problems: list[str] = []
    for product in store.products():
        if product.asset == "encoder" and product.complete:
            try:
                card = read_card(product.path)
            except EncoderError as error:
                problems.append(str(error))
                continue
            listed.append(
                ListedEncoder(
                    str(product.key),
                    "store",
                    card.architecture,
                    card.patch,
                    card.mpp,
                    card.embedding_size,
                    licence_of(card.preset),
                )
            )
    return listed, problems


def _show(card: dict[str, Any]) -> None:
    """Print a card, one line a field; empty fields are left out."""
    table = facts()
    for name, value in card.items():
        if value is None or value == {}:
            continue
        if isinstance(value, dict):
            value = "\n".join(
                f"{key}: {', '.join(map(str, v)) if isinstance(v, tuple) else v}"
                for key, v in value.items()
            )
        table.add_row(name.replace("_", " "), str(value))
    console.print(table)


def _one_line() -> AbstractContextManager[None]:
    from nic_core.cohort import CohortError
    from nic_core.encoders.errors import EncoderError

    return one_line(EncoderError, CohortError, StoreError, OSError)

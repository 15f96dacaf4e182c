"""``nic``: the library's commands, and those that look after a study that Dagster runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from nic_core.cli import app
from nic_core.cli.shared import console, one_line, progress_bars
from nic_core.cohort import CohortError
from nic_core.store import Store, StoreError, remove_product

if TYPE_CHECKING:
    import dagster as dg

# what computes or knows Dagster is imported in each command: that takes seconds


@app.callback()
def environment() -> None:
    """Every step of the method on the command line, and what looks after a study.

    The cohort and the store are those of NIC_COHORT and NIC_STORE, or of .env in this folder.
    """
    from nic_assets.operations.environment import read_environment

    read_environment()


store_app = typer.Typer(no_args_is_help=True, help="Verify and clean the store ($NIC_STORE).")
app.add_typer(store_app, name="store")


@app.command()
def doctor(
    mend: Annotated[bool, typer.Option("--mend", help="mend what can be mended")] = False,
) -> None:
    """Find what killed processes and wrong settings left behind; change nothing unless told to.

    The exit status is 1 where something is wrong and was not mended.
    """
    left = 0
    with _study() as (_, instance):
        from nic_assets.operations.doctor import examine

        table = Table("what", "where", "what it means", "what to do", box=SIMPLE_HEAD)
        for finding in examine(instance, Store.from_environment()):
            remedy = finding.remedy
            if finding.mend is None:
                left += 1
            elif mend:
                with one_line(StoreError):
                    finding.mend()
                remedy = f"[green]mended:[/green] {remedy}"
            else:
                left += 1
                remedy = f"nic doctor --mend: {remedy}"
            table.add_row(finding.what, finding.where, finding.meaning, remedy)
    console.print(table if table.row_count else "nothing is wrong")
    if left:
        raise typer.Exit(1)


@store_app.command()
def verify() -> None:
    """Read everything in the store and compare it with the hashes that were recorded of it.

    The exit status is 1 where something differs or cannot be read.
    """
    from nic_core.steps.verification import verify_store

    store = _store()
    with progress_bars() as bars:
        bar = bars.add_task("products", total=None)
        found = verify_store(
            store, lambda done, total: bars.update(bar, completed=done, total=total)
        )
    kinds = Table("", "products", "as recorded", "readable, no hash", "wrong", box=SIMPLE_HEAD)
    for asset in dict.fromkeys(item.product.asset for item in found):
        of_asset = [item for item in found if item.product.asset == asset]
        wrong = sum(item.problem is not None for item in of_asset)
        hashed = sum(item.problem is None and item.hashed for item in of_asset)
        kinds.add_row(
            asset, f"{len(of_asset)}", f"{hashed}", f"{len(of_asset) - hashed - wrong}", f"{wrong}"
        )
    console.print(kinds)
    problems = [item.problem for item in found if item.problem is not None]
    for problem in problems:
        console.print(problem, style="red", soft_wrap=True, markup=False)
    if problems:
        raise typer.Exit(1)


@store_app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="remove what is listed")] = False,
) -> None:
    """List what neither a partition nor a version in MLflow's registry needs; remove it if told.

    The partitions are those that the cohort file and the slide index give now.
    """
    store = _store()
    with _study() as (defs, instance):
        from nic_assets.operations.retention import RetentionError, registered_tags, size, unneeded
        from nic_assets.tracking import Tracking

        with one_line(RetentionError):
            products = unneeded(store, defs, instance, registered_tags(Tracking.in_store(store)))
    table = Table("asset", "partition", "MB", box=SIMPLE_HEAD)
    table.columns[2].justify = "right"
    total = 0.0
    for product in products:
        megabytes = size(product) / 1e6
        total += megabytes
        table.add_row(product.asset, str(product.key), f"{megabytes:.2f}")
    if not products:
        console.print("everything is needed")
        return
    console.print(table)
    told = f"{len(products)} products, {total:.2f} MB"
    if not delete:
        console.print(f"{told}; nothing was removed: nic store gc --delete removes them")
        return
    busy = 0
    for product in products:
        try:
            remove_product(product.path)
        except StoreError as error:
            busy += 1
            console.print(str(error), style="red", soft_wrap=True, markup=False)
    console.print(f"removed: {told}" if not busy else f"{busy} of {told} could not be removed")
    if busy:
        raise typer.Exit(1)


def _store() -> Store:
    store = Store.from_environment()
    if not store.root.is_dir():
        console.print(f"{store.root}: there is no store; set NIC_STORE", style="red")
        raise typer.Exit(1)
    return store


@contextmanager
def _study() -> Iterator[tuple[dg.Definitions, dg.DagsterInstance]]:
    """The definitions and the Dagster instance that the environment names."""
    home = Path(os.environ["DAGSTER_HOME"])
    if not (home / "dagster.yaml").exists():
        console.print(
            f"{home}: no Dagster home (no dagster.yaml here): call this from the project's folder, "
            "or set DAGSTER_HOME",
            style="red",
            soft_wrap=True,
        )
        raise typer.Exit(1)
    with one_line(CohortError):
        from nic_assets.definitions import defs
    import dagster as dg

    with dg.DagsterInstance.get() as instance:
        yield defs, instance

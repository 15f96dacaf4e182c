"""Commands of ``nic`` for a study that Dagster runs: refresh, doctor, store.

They also add the registry to ``nic encoder list``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nic_core.cli.encoder import MORE_ENCODERS, ListedEncoder, Listing
from nic_core.cli.shared import console, one_line, progress_bars
from nic_core.store import Store, StoreError, remove_product
from nic_core.tables import terminal_table
from nic_core.version import DISTRIBUTION

if TYPE_CHECKING:
    import dagster as dg

    from nic_core.store.bucket import Transfer

store_app = typer.Typer(
    no_args_is_help=True,
    help="Verify and clean the store ($NIC_STORE), and copy it to and from a bucket.",
)
BucketAddress = Annotated[str, typer.Argument(help="folder of a bucket: s3://bucket/folder")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to ``nic``; an entry point of group ``nic.commands``."""
    app.command()(refresh)
    app.command()(doctor)
    app.add_typer(store_app, name="store")
    MORE_ENCODERS.append(_registered_encoders)


def refresh() -> None:
    """Materialize every partition that is missing or stale, then print the results.

    The exit status is 1 if a partition failed, 2 if the cohort file cannot be used, and 130 after
    Ctrl-C or SIGTERM; what was recorded before is kept.
    """
    _require_platform()
    _set_home()
    from nic_assets.operations.refresh import main

    raise typer.Exit(main())


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Repair what can be repaired.")] = False,
) -> None:
    """Find what killed processes and wrong settings left behind; with --fix, repair it.

    The exit status is 1 if a problem remains.
    """
    remaining = 0
    with _study() as (_, instance):
        from nic_assets.operations.doctor import examine

        rows = []
        for finding in examine(instance, Store.from_environment()):
            remedy = finding.remedy
            if finding.fix is None:
                remaining += 1
            elif fix:
                with one_line(StoreError):
                    finding.fix()
                remedy = f"fixed: {remedy}"
            else:
                remaining += 1
                remedy = f"nic doctor --fix: {remedy}"
            rows.append((finding.what, finding.where, finding.meaning, remedy))
    headings = ("problem", "where", "consequence", "remedy")
    console.print(terminal_table(headings, (), rows) if rows else "no problem found")
    if remaining:
        raise typer.Exit(1)


@store_app.command()
def push(
    address: BucketAddress,
    remove: Annotated[
        bool, typer.Option("--remove", help="Also remove products that the store does not have.")
    ] = False,
) -> None:
    """Publish the complete products of the store in a bucket.

    Only files that the bucket does not have are sent. A reader finds the old or the new product.
    The databases of Dagster and MLflow are not part of it.
    """
    from nic_core.store.bucket import push as push_store

    with progress_bars() as bars, one_line(StoreError):
        bar = bars.add_task("products", total=None)

        def show(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total)

        done = push_store(_store(), address, remove=remove, progress=show)
    console.print(_transfer(done, "sent"), soft_wrap=True)
    for name in done.removed:
        console.print(f"removed: {name}", soft_wrap=True, markup=False)


@store_app.command()
def pull(address: BucketAddress) -> None:
    """Fetch the products of a bucket into the store; those with other content are replaced.

    Products that the bucket does not have stay.
    """
    from nic_core.store.bucket import pull as pull_store

    with progress_bars() as bars, one_line(StoreError):
        bar = bars.add_task("products", total=None)
        done = pull_store(
            Store.from_environment(), address, lambda n, m: bars.update(bar, completed=n, total=m)
        )
    console.print(_transfer(done, "received"), soft_wrap=True)


def _transfer(done: Transfer, verb: str) -> str:
    return (
        f"{done.products} products, {done.unchanged} unchanged; {verb}: {done.files} files, "
        f"{done.bytes / 1e6:.2f} MB"
    )


@store_app.command()
def verify(
    address: Annotated[
        str | None, typer.Argument(help="A copy in a bucket, instead of $NIC_STORE.")
    ] = None,
) -> None:
    """Read every product in the store and compare it with its recorded hash.

    The exit status is 1 if a product differs from its hash or cannot be read.
    """
    if address is not None:
        _verify_bucket(address)
        return
    from nic_core.steps.verification import verify_store

    store = _store()
    with progress_bars() as bars:
        bar = bars.add_task("products", total=None)
        found = verify_store(
            store, lambda done, total: bars.update(bar, completed=done, total=total)
        )
    rows = []
    for asset in dict.fromkeys(item.product.asset for item in found):
        of_asset = [item for item in found if item.product.asset == asset]
        wrong = sum(item.problem is not None for item in of_asset)
        hashed = sum(item.problem is None and item.hashed for item in of_asset)
        rows.append(
            (asset, *map(str, (len(of_asset), hashed, len(of_asset) - hashed - wrong, wrong)))
        )
    headings = ("products", "hash matches", "readable, no hash", "damaged")
    console.print(terminal_table(("asset",), headings, rows))
    problems = [item.problem for item in found if item.problem is not None]
    for problem in problems:
        console.print(problem, style="red", soft_wrap=True, markup=False)
    if problems:
        raise typer.Exit(1)


def _verify_bucket(address: str) -> None:
    from nic_core.store.bucket import verify_bucket

    with progress_bars() as bars:
        bar = bars.add_task("products", total=None)
        count, problems = verify_bucket(
            address, lambda n, m: bars.update(bar, completed=n, total=m)
        )
    console.print(f"{count} products, {len(problems)} damaged")
    for problem in problems:
        console.print(problem, style="red", soft_wrap=True, markup=False)
    if problems:
        raise typer.Exit(1)


@store_app.command()
def gc(
    address: Annotated[
        str | None, typer.Argument(help="A copy in a bucket, instead of $NIC_STORE.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove what is listed.")] = False,
) -> None:
    """List products that no partition and no registered MLflow version needs.

    With --delete they are removed. Partitions are those of the present cohort file and slide index.
    Of a copy in a bucket: the objects that no product has, left by replaced products and by killed
    processes.
    """
    if address is not None:
        from nic_core.store.bucket import remove_unreferenced, unreferenced

        found = remove_unreferenced(address) if delete else unreferenced(address)
        hint = "" if delete or not found else f"; to remove them: nic store gc {address} --delete"
        summary = f"{len(found)} objects, {sum(found.values()) / 1e6:.2f} MB"
        console.print(f"{'removed' if delete else 'not needed'}: {summary}{hint}", soft_wrap=True)
        return
    _require_platform()
    store = _store()
    with _study() as (defs, instance):
        from nic_assets.operations.retention import RetentionError, registered_tags, size, unneeded
        from nic_assets.tracking import Tracking

        with one_line(RetentionError):
            products = unneeded(store, defs, instance, registered_tags(Tracking.in_store(store)))
    rows = []
    total = 0.0
    for product in products:
        megabytes = size(product) / 1e6
        total += megabytes
        rows.append((product.asset, str(product.key), f"{megabytes:.2f}"))
    if not products:
        console.print("every product is needed")
        return
    console.print(terminal_table(("asset", "partition"), ("MB",), rows))
    summary = f"{len(products)} products, {total:.2f} MB"
    if not delete:
        console.print(f"{summary}; nothing was removed; to remove them: nic store gc --delete")
        return
    busy = 0
    for product in products:
        try:
            remove_product(product.path)
        except StoreError as error:
            busy += 1
            console.print(str(error), style="red", soft_wrap=True, markup=False)
    console.print(
        f"removed: {summary}" if not busy else f"{busy} of {summary} could not be removed"
    )
    if busy:
        raise typer.Exit(1)


def _registered_encoders(store: Store) -> Listing:
    """List the registered encoder versions that carry an alias; nothing without a registry."""
    installed = all(find_spec(package) is not None for package in ("dagster", "mlflow"))
    used = bool(os.environ.get("MLFLOW_TRACKING_URI")) or (store.mlflow / "mlflow.db").exists()
    if not installed or not used:
        return [], []
    from nic_assets.tracking import Tracking, TrackingError
    from nic_assets.tracking.registry import aliased_encoders
    from nic_core.cohort.presets import licence_of

    try:
        versions = aliased_encoders(Tracking.in_store(store))
    except TrackingError as error:
        return [], [str(error)]

    def number(tags: dict[str, str], name: str) -> float | None:
        # a version that an earlier release registered does not have these tags
        return float(tags[name]) if name in tags else None

    listed = [
        ListedEncoder(
            version,
            "registry",
            tags.get("architecture", ""),
            number(tags, "patch"),
            number(tags, "mpp"),
            number(tags, "embedding_size"),
            licence_of(tags.get("preset")),
        )
        for version, tags in versions.items()
    ]
    return listed, []


def _store() -> Store:
    store = Store.from_environment()
    if not store.root.is_dir():
        console.print(
            f"{store.root}: this folder does not exist; set NIC_STORE to your store", style="red"
        )
        raise typer.Exit(1)
    return store


def _require_platform() -> None:
    missing = [package for package in ("dagster", "mlflow") if find_spec(package) is None]
    if missing:
        console.print(
            f"this command needs {' and '.join(missing)}: pip install '{DISTRIBUTION}[platform]'",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(1)


def _set_home() -> None:
    """Set ``DAGSTER_HOME`` to the working directory if it is not set; refuse another folder."""
    home = Path(os.environ.setdefault("DAGSTER_HOME", str(Path.cwd())))
    if not (home / "dagster.yaml").exists():
        console.print(
            f"{home} is not a Dagster home (it has no dagster.yaml): run this command in the "
            "project's folder, or set DAGSTER_HOME",
            style="red",
            soft_wrap=True,
        )
        raise typer.Exit(1)


@contextmanager
def _study() -> Iterator[tuple[dg.Definitions, dg.DagsterInstance]]:
    """The definitions and the Dagster instance of the current environment."""
    _require_platform()
    _set_home()
    import dagster as dg

    from nic_core.cohort import CohortError

    with one_line(CohortError, dg.DagsterInvalidDefinitionError):
        from nic_assets.definitions import defs
    with dg.DagsterInstance.get() as instance:
        yield defs, instance

"""Addresses of SQLite databases, and creation of MLflow's in one atomic step.

MLflow creates a new SQLite file by a hundred migrations outside a transaction. A process that is
killed among them leaves a file that MLflow cannot open again.
"""

from __future__ import annotations

import os
from pathlib import Path

import dagster as dg
from sqlalchemy.engine import make_url

from nic_core.store import Store, StoreError, atomic_file, exclusive_lock

SQLITE = "sqlite:///"
STORAGE_VARIABLE = "NIC_DAGSTER_STORAGE"


def sqlite_uri(path: Path) -> str:
    """Return the address of a SQLite file, with the escapes that the installed SQLAlchemy decodes.

    Raises
    ------
    StoreError
        This version of SQLAlchemy has no address for the path.
    """
    for text in (str(path), str(path).replace("%", "%25").replace("?", "%3F")):
        if make_url(SQLITE + text).database == str(path):
            return SQLITE + text
    raise StoreError(
        path,
        "the installed SQLAlchemy has no address for a database in this folder",
        "set NIC_STORE to a folder without '?' and '%', or MLFLOW_TRACKING_URI to a server",
    )


def check_dagster_storage() -> None:
    """Refuse a folder of Dagster's databases that Dagster's own addresses do not reach.

    Dagster puts the path into an address without escapes, so a ``?`` cuts it and ``%20`` is read
    as a blank. The folder is ``$NIC_DAGSTER_STORAGE``.

    Raises
    ------
    dagster.DagsterInvalidDefinitionError
        The path contains such characters.
    """
    folder = os.environ.get(STORAGE_VARIABLE)
    if folder and make_url(f"{SQLITE}{os.path.abspath(folder)}").database != os.path.abspath(
        folder
    ):
        raise dg.DagsterInvalidDefinitionError(
            f"{STORAGE_VARIABLE}={folder}: Dagster cannot keep its databases in a folder with '?' "
            f"or '%' in its path; set {STORAGE_VARIABLE} to another folder (NIC_STORE may stay)"
        )


def database_uri(store: Store) -> str:
    """Return the address of MLflow's database in the store."""
    return sqlite_uri(store.mlflow / "mlflow.db")


def create_database(uri: str) -> None:
    """Create the database of a tracking URI if the URI is a SQLite file that does not exist."""
    import mlflow

    if not uri.startswith(SQLITE):
        return
    path = Path(make_url(uri).database or "")
    if path.exists():
        return
    with exclusive_lock(path):
        if not path.exists():  # another process may have created it before this one got the lock
            with atomic_file(path) as temporary:
                mlflow.MlflowClient(sqlite_uri(temporary)).search_experiments(max_results=1)

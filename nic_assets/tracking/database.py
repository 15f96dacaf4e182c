"""MLflow's database, made whole or not at all.

MLflow lays out a new SQLite file in a hundred steps that are not one transaction: a process that is
killed among them leaves a file that MLflow never opens again.
"""

from __future__ import annotations

from pathlib import Path

import mlflow

from nic_core.store import atomic_file, exclusive_lock

SQLITE = "sqlite:///"


def make_database(uri: str) -> None:
    """Make the database of a tracking URI where that is a SQLite file and there is none yet."""
    if not uri.startswith(SQLITE):
        return
    path = Path(uri.removeprefix(SQLITE))
    if path.exists():
        return
    with exclusive_lock(path):
        if not path.exists():  # somebody else may have made it meanwhile
            with atomic_file(path) as temporary:
                mlflow.MlflowClient(f"{SQLITE}{temporary}").search_experiments(max_results=1)

"""Creation of MLflow's SQLite database in one atomic step.

MLflow creates a new SQLite file by a hundred migrations outside a transaction. A process that is
killed among them leaves a file that MLflow cannot open again.
"""

from __future__ import annotations

from pathlib import Path

import mlflow

from nic_core.store import atomic_file, exclusive_lock

SQLITE = "sqlite:///"


def create_database(uri: str) -> None:
    """Create the database of a tracking URI if the URI is a SQLite file that does not exist."""
    if not uri.startswith(SQLITE):
        return
    path = Path(uri.removeprefix(SQLITE))
    if path.exists():
        return
    with exclusive_lock(path):
        if not path.exists():  # another process may have created it before this one got the lock
            with atomic_file(path) as temporary:
                mlflow.MlflowClient(f"{SQLITE}{temporary}").search_experiments(max_results=1)

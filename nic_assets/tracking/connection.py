"""The connection to MLflow: its address, its settings in this process, and its errors."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from nic_assets.tracking.database import create_database
from nic_assets.transient import (
    database_error_is_transient,
    mlflow_error_is_transient,
    os_error_is_transient,
)

if TYPE_CHECKING:
    import mlflow
    from mlflow.exceptions import MlflowException

DEFAULT_UI = "http://127.0.0.1:5000"

MODEL_TRAINING = "workflowType=machine_learning"
"""Part of a URL with which MLflow shows its pages of model training; without it those of GenAI."""

# a table that is logged in parts is read again for each part; no progress bar for that
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# the URL of the tracking server may contain a password
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# a training waits during the client's retries; the step of a registration retries by itself
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
# each migration of a new database is an INFO line
logging.getLogger("alembic").setLevel(logging.WARNING)
# MLflow logs database errors and raises them as well
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def connection_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of the MLflow client: no answer (:func:`is_unavailable`), or a refusal.

    The causes are no connection, a server error, a locked database, an artifact folder that cannot
    be written, or a request for what was deleted.
    """
    from mlflow.exceptions import MlflowException

    return (MlflowException, SQLAlchemyError, OSError)


class TrackingError(Exception):
    """MLflow does not carry out a request; the message states what is stored and what to do.

    Permanent: the same call fails again until a person changes something.
    """


class TrackingUnavailableError(TrackingError):
    """MLflow does not answer. Transient: the same call may succeed later."""


@dataclass(frozen=True)
class Connection:
    """The address of MLflow's records.

    Attributes
    ----------
    uri
        Tracking URI; may contain a password, so it is not part of the ``repr``.
    artifacts
        URI of the folder for the files of new experiments; None if the server chooses it.
    ui
        URL of MLflow's web pages, without a password.
    """

    uri: str = field(repr=False)
    artifacts: str | None
    ui: str = DEFAULT_UI

    @property
    def client(self) -> mlflow.MlflowClient:
        """A client; creates the database if the URI is a SQLite file that does not exist."""
        import mlflow

        create_database(self.uri)
        return mlflow.MlflowClient(self.uri)

    def page(self, name: str, number: str) -> str:
        """Return the URL of a registered version."""
        return f"{self.ui}/#/models/{name}/versions/{number}?{MODEL_TRAINING}"

    def run_page(self, experiment: str, run: str) -> str:
        """Return the URL of a run."""
        return f"{self.ui}/#/experiments/{experiment}/runs/{run}?{MODEL_TRAINING}"

    @contextmanager
    def active(self) -> Iterator[None]:
        """Set the address for MLflow's own functions, which read it from the process."""
        import mlflow

        before = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(self.uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None: as if never set


@contextmanager
def as_tracking_error(version: str) -> Iterator[None]:
    """Turn an error of a registry request into a :class:`TrackingError`."""
    try:
        yield
    except connection_errors() as error:
        # `from None`: the cause may contain a URL with a password
        if is_unavailable(error):
            raise TrackingUnavailableError(
                f"MLflow does not answer the request for {version} ({reason(error)}); run again "
                "when it does"
            ) from None
        raise TrackingError(
            f"MLflow refuses the request for {version} ({reason(error)}); correct it in MLflow, or "
            "MLFLOW_TRACKING_URI and the permissions, and run again"
        ) from None


def is_unavailable(error: Exception) -> bool:
    """Return whether one of :func:`connection_errors` means that MLflow does not answer."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return mlflow_error_is_transient(error)
    if isinstance(error, SQLAlchemyError):
        return database_error_is_transient(error)
    return isinstance(error, OSError) and os_error_is_transient(error)


def does_not_exist(error: MlflowException) -> bool:
    """Return whether MLflow says that a run, version or model does not exist."""
    code: str = error.error_code
    return code in {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"}


def without_secrets(text: str) -> str:
    """Return a text without the user and password of any URL in it."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def reason(error: Exception) -> str:
    """Return the first line of an error's message, without passwords, up to 300 characters."""
    return without_secrets(str(error).strip().partition("\n")[0])[:300] or type(error).__name__

"""Transient faults of disks, servers and MLflow: a later attempt may succeed."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from sqlalchemy.exc import OperationalError, SQLAlchemyError

if TYPE_CHECKING:
    from mlflow.exceptions import MlflowException

TRANSIENT_CODES = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.EAGAIN,
        errno.ETIMEDOUT,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
    }
)
"""Error numbers of an ``OSError`` that are transient: a disk or a server did not respond."""

TRANSIENT_SQLITE_ERRORS = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_IOERR", "SQLITE_PROTOCOL")
"""Beginnings of SQLite's error names that are transient: not a full, missing or foreign file."""

TRANSIENT_MLFLOW_CODES = frozenset(
    {
        "INTERNAL_ERROR",  # also what the client raises where no server answers
        "TEMPORARILY_UNAVAILABLE",
        "DEADLINE_EXCEEDED",
        "REQUEST_LIMIT_EXCEEDED",
        "RESOURCE_EXHAUSTED",
        "ABORTED",
        "CANCELLED",
    }
)
"""MLflow's error codes that are transient. Other codes are final, such as "does not exist"."""

TRANSIENT_HTTP_STATUSES = frozenset({408, 429})
"""HTTP statuses below 500 that are transient: timeout, too many requests."""


def os_error_is_transient(error: OSError) -> bool:
    """Return whether a disk or a server did not respond."""
    # a request for an artifact; the class is that of the HTTP library MLflow uses
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in TRANSIENT_HTTP_STATUSES
    return isinstance(error, ConnectionError | TimeoutError) or error.errno in TRANSIENT_CODES


def database_error_is_transient(error: SQLAlchemyError) -> bool:
    """Return whether a database is locked, or its server does not answer."""
    if not isinstance(error, OperationalError):
        return False
    name = getattr(error.orig, "sqlite_errorname", None)
    return name is None or name.startswith(TRANSIENT_SQLITE_ERRORS)


def mlflow_error_is_transient(error: MlflowException) -> bool:
    """Return whether MLflow or its database did not answer, by the error code of the answer."""
    cause = error.__cause__
    if isinstance(cause, SQLAlchemyError):
        return database_error_is_transient(cause)
    return error.error_code in TRANSIENT_MLFLOW_CODES

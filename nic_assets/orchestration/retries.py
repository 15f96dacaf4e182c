"""Which errors are transient, and how often Dagster retries a step after one.

Dagster also retries a step whose process was killed. Any other error fails the step at once: a
corrupt slide, a full disk or a programming error would fail again.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager

import dagster as dg
from sqlalchemy.exc import OperationalError

from nic_assets.orchestration.mistakes import MISTAKES, step_failure
from nic_assets.tracking import TrackingError
from nic_core.store import StoreBusyError

RETRIES = dg.RetryPolicy(
    max_retries=3,
    delay=10,  # seconds: 10, 30, 70, each up to 10 s more or less
    backoff=dg.Backoff.EXPONENTIAL,
    jitter=dg.Jitter.PLUS_MINUS,
)

TRANSIENT: tuple[type[Exception], ...] = (
    StoreBusyError,
    ConnectionError,
    TimeoutError,
    BrokenExecutor,  # a worker process of the step was killed
    TrackingError,
    OperationalError,  # a database is locked, or its server cannot be reached
)
"""Exception types that are transient; :data:`TRANSIENT_CODES` has those of an ``OSError``."""

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


def is_transient(error: BaseException) -> bool:
    """Return whether an exception, or one of its causes, is transient."""
    return any(
        isinstance(cause, TRANSIENT)
        or (isinstance(cause, OSError) and cause.errno in TRANSIENT_CODES)
        for cause in _chain(error)
    )


@contextmanager
def retry_transient_errors() -> Iterator[None]:
    """Let a step with :data:`RETRIES` fail at once unless the error is transient.

    Raises
    ------
    dagster.Failure
        Without retries, for an error that is not transient; the description names the error. If
        it is a mistake of the user, it is shown without a traceback
        (:mod:`nic_assets.orchestration.mistakes`).
    """
    try:
        yield
    except dg.Failure:
        raise
    except Exception as error:
        if is_transient(error):
            raise
        if isinstance(error, MISTAKES):
            raise step_failure(str(error)) from None
        raise dg.Failure(f"{type(error).__name__}: {error}", allow_retries=False) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its causes."""
    while error is not None:
        yield error
        error = error.__cause__

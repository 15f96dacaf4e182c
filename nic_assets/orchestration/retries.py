"""Which faults pass by themselves, and how often a step is tried again for them.

Dagster also tries a step again whose process was killed. Whatever is not transient fails at once:
a bad slide, a full disk or a fault of ours is the same at the second attempt.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager

import dagster as dg
from sqlalchemy.exc import OperationalError

from nic_assets.tracking import TrackingError
from nic_core.store import StoreBusyError

RETRIES = dg.RetryPolicy(
    max_retries=3,
    delay=10,  # seconds: 10, 30, 70, each 10 more or less at most
    backoff=dg.Backoff.EXPONENTIAL,
    jitter=dg.Jitter.PLUS_MINUS,
)

TRANSIENT: tuple[type[Exception], ...] = (
    StoreBusyError,
    ConnectionError,
    TimeoutError,
    BrokenExecutor,  # one of the processes that work ahead was killed
    TrackingError,
    OperationalError,  # of a database: locked, or its server is away
)
"""Exceptions that pass by themselves, beside those of :data:`TRANSIENT_CODES`."""

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
"""Embeddings of an ``OSError``: a disk or a server that did not answer."""


def is_transient(error: BaseException) -> bool:
    """Whether an exception, or one that it was raised from, passes by itself."""
    return any(
        isinstance(fault, TRANSIENT)
        or (isinstance(fault, OSError) and fault.errno in TRANSIENT_CODES)
        for fault in _chain(error)
    )


@contextmanager
def transient_again() -> Iterator[None]:
    """In the body of a step with :data:`RETRIES`: whatever is not transient fails it at once.

    Raises
    ------
    dagster.Failure
        For such a fault, which it names.
    """
    try:
        yield
    except dg.Failure:
        raise
    except Exception as error:
        if is_transient(error):
            raise
        raise dg.Failure(f"{type(error).__name__}: {error}", allow_retries=False) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__

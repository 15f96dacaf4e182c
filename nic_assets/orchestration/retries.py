"""Which errors are transient, and how often Dagster retries a step after one.

Dagster also retries a step whose process was killed. Any other error fails the step at once: a
corrupt slide, a full disk or a programming error would fail again. SIGINT and SIGTERM end a step
for good: Dagster's retry policy alone would start it again.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import dagster as dg
from sqlalchemy.exc import SQLAlchemyError

from nic_assets.orchestration.mistakes import is_mistake, step_failure
from nic_assets.tracking import TrackingUnavailableError
from nic_assets.transient import database_error_is_transient, os_error_is_transient
from nic_core.store import StoreBusyError

Arguments = ParamSpec("Arguments")
Event = TypeVar("Event")

RETRIES = dg.RetryPolicy(
    max_retries=3,
    delay=10,  # seconds: 10, 30, 70, each up to 10 s more or less
    backoff=dg.Backoff.EXPONENTIAL,
    jitter=dg.Jitter.PLUS_MINUS,
)

EXIT_WHEN_INTERRUPTED = "NIC_EXIT_WHEN_INTERRUPTED"
"""Variable of a step's process: after SIGINT or SIGTERM it exits at once and records nothing.

For steps whose executor finds the reason of the signal elsewhere: that of Slurm asks for the job's
state, since a pre-empted step is retried and a cancelled one is not.
"""

INTERRUPTS = (KeyboardInterrupt, dg.DagsterExecutionInterruptedError)
"""What SIGINT and SIGTERM raise in a step: the second while Dagster executes a step's body."""

TRANSIENT: tuple[type[Exception], ...] = (
    StoreBusyError,
    ConnectionError,
    TimeoutError,
    BrokenExecutor,  # a worker process of the step was killed
    TrackingUnavailableError,
)
"""Exception types that are transient; :mod:`nic_assets.transient` judges others by their codes."""


def is_transient(error: BaseException) -> bool:
    """Return whether an exception, or one of its causes, is transient."""
    return any(
        isinstance(cause, TRANSIENT)
        or (isinstance(cause, OSError) and os_error_is_transient(cause))
        or (isinstance(cause, SQLAlchemyError) and database_error_is_transient(cause))
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
        if is_mistake(error):
            raise step_failure(str(error)) from None
        raise dg.Failure(f"{type(error).__name__}: {error}", allow_retries=False) from error


def retried_asset(
    **arguments: Any,
) -> Callable[[Callable[..., Iterator[Any]]], dg.AssetsDefinition]:
    """Return ``@dg.asset`` for a body that is retried by :data:`RETRIES`, unless it is interrupted.

    ``arguments`` are those of ``dg.asset``; the body yields its events.
    """

    def declare(body: Callable[..., Iterator[Any]]) -> dg.AssetsDefinition:
        asset: dg.AssetsDefinition = dg.asset(retry_policy=RETRIES, **arguments)(
            ends_when_interrupted(body)
        )
        return asset

    return declare


def ends_when_interrupted(
    body: Callable[Arguments, Iterator[Event]],
) -> Callable[Arguments, Iterator[Event]]:
    """Let the body of a step fail without a retry after SIGINT or SIGTERM.

    With :data:`EXIT_WHEN_INTERRUPTED`, the process ends with the status 143 instead.

    Raises
    ------
    dagster.Failure
        Without retries, in place of the exceptions :data:`INTERRUPTS`.
    """

    @wraps(body)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Iterator[Event]:
        try:
            yield from body(*args, **kwargs)
        except INTERRUPTS as error:
            if EXIT_WHEN_INTERRUPTED in os.environ:
                logging.shutdown()
                os._exit(128 + signal.SIGTERM)
            raise dg.Failure(
                "interrupted; what was recorded is kept", allow_retries=False
            ) from error

    return run


def was_interrupted(events: Iterable[dg.DagsterEvent]) -> bool:
    """Return whether a run failed because of SIGINT or SIGTERM, by its events."""
    names = {kind.__name__ for kind in INTERRUPTS}
    for event in events:
        error = None
        if event.is_step_failure:
            error = event.step_failure_data.error
        elif event.is_job_failure:
            error = event.job_failure_data.error
        while error is not None:
            if error.cls_name in names:
                return True
            error = error.cause
    return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its causes."""
    while error is not None:
        yield error
        error = error.__cause__

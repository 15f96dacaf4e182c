"""How Dagster's commands show a mistake of the user: the message, without a traceback.

A mistake is an error that the user can correct: in the cohort file, in a table, in a slide, or in
the arguments of a command. A traceback does not help to correct it. Dagster has no setting for
that, so this module uses two public ones of Python:

* ``sys.tracebacklimit = 0`` in a process that ends with the error. Dagster then records the message
  with an empty stack, for the UI as well.
* ``sys.excepthook`` for commands that load the definitions in their own process, as ``dg launch``
  does, and let the exception end it.

Any other error keeps its traceback.
"""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import dagster as dg

from nic_assets.orchestration.internals import CheckError
from nic_core.cohort import CohortError
from nic_core.cohort.fields import did_you_mean
from nic_core.encoders import EncoderError
from nic_core.object_stores import RemoteError
from nic_core.slides import SlideError
from nic_core.store import StoreError

SHOWN = 5  # partitions that a message lists


def is_mistake(error: BaseException) -> bool:
    """Return whether the message of an error says what is wrong and what to do."""
    from nic_core.grids import GridError
    from nic_core.models.files import ModelFileError

    mistakes = (CohortError, SlideError, RemoteError, StoreError, EncoderError)
    return isinstance(error, (*mistakes, GridError, ModelFileError))


@contextmanager
def definitions_without_traceback() -> Iterator[None]:
    """Let a mistake in the block, which loads the definitions, be shown by its message alone.

    The block runs in a process that cannot continue without definitions.

    Raises
    ------
    CohortError, dagster.DagsterInvalidDefinitionError
        As in the block, without a cause.
    """
    try:
        yield
    except (CohortError, StoreError, dg.DagsterInvalidDefinitionError) as error:
        mistake = error  # Python deletes `error` at the end of this block
        sys.tracebacklimit = 0
        _print_instead_of_traceback(lambda shown: str(mistake) if shown is mistake else None)
        raise mistake from None


def step_failure(
    description: str, *, metadata: Mapping[str, Any] | None = None, retry: bool = False
) -> dg.Failure:
    """Return the failure of a step by a mistake, to be raised ``from None``.

    In a process that was started for this step alone, its stack is left out.
    """
    if multiprocessing.parent_process() is not None:
        sys.tracebacklimit = 0
    return dg.Failure(description, metadata=metadata, allow_retries=retry)


def show_wrong_arguments() -> None:
    """Let wrong arguments of a command in this process be shown in one line.

    Arguments are wrong if they name an asset or a partition that does not exist, or no partition
    where one is needed. The line about an unknown partition lists existing ones.
    """

    def message(error: BaseException) -> str | None:
        if isinstance(error.__context__, dg.DagsterUnknownPartitionError):
            return _unknown_partition(error.__context__)
        if isinstance(error, dg.DagsterUnknownPartitionError):
            return _unknown_partition(error)
        text = " ".join(str(error).removeprefix("Failure condition: ").split())
        # other failed checks are faults of the program
        is_argument = type(error) is CheckError and "partition" in text.lower()
        return text if is_argument or isinstance(error, dg.DagsterInvalidSubsetError) else None

    _print_instead_of_traceback(message)


def _print_instead_of_traceback(message: Callable[[BaseException], str | None]) -> None:
    """Print ``message`` of an exception that ends this process; if it is None, the traceback."""
    previous = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = message(error)
        if text is None:
            previous(kind, error, trace)
        else:
            print(text, file=sys.stderr)

    sys.excepthook = show


def _unknown_partition(error: dg.DagsterUnknownPartitionError) -> str:
    """Message with existing partitions, which the variables of Dagster's failed check lead to."""
    checks = [
        frame.f_locals
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if isinstance(frame.f_locals.get("self"), dg.PartitionsDefinition)
        and {"partition_key", "context"} <= frame.f_locals.keys()
    ]
    if not checks:
        return " ".join(str(error).split())
    key, context = checks[0]["partition_key"], checks[0]["context"]
    known = checks[0]["self"].get_partition_keys(
        dynamic_partitions_store=context.dynamic_partitions_store
    )
    if not known:
        return f"partition '{key}' does not exist: materialize 'slide_index' first, which adds them"
    more = f" and {len(known) - SHOWN:,} more" if len(known) > SHOWN else ""
    return (
        f"partition '{key}' does not exist{did_you_mean(key, known)}; "
        f"there are {', '.join(known[:SHOWN])}{more}"
    )

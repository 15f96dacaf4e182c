"""Run CPU-bound functions in processes, ahead of the caller."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import TypeVar

Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")

ITEMS_PER_PROCESS = 8  # fewer items are not worth a process, which takes seconds to start
MAX_WAITING = 4  # results per process that wait for the caller
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS", "VIPS_CONCURRENCY"), "1"
)


def cores() -> int:
    """Return the number of cores that this process may use.

    It is the number of cores in the affinity mask of the process, limited by ``OMP_NUM_THREADS``.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(bound or 1, int(limit)) if limit.isdecimal() and int(limit) else bound or 1


@contextmanager
def ahead(
    function: Callable[[Item], Result], items: Sequence[Item], *, processes: int | None = None
) -> Iterator[Callable[[Item], Result]]:
    """Compute ``function(item)`` for each item in a pool of processes, ahead of the caller.

    Parameters
    ----------
    function : callable
        It, its items, results and exceptions must be picklable.
    items : sequence
        In the order in which the caller fetches the results. The caller may skip items, but not
        fetch one twice.
    processes : int, optional
        Number of processes, each with one thread. Default: one per core, at most one per
        ``ITEMS_PER_PROCESS`` items. With fewer than two processes, the function is called in this
        process when a result is fetched.

    Yields
    ------
    callable
        Return the result of an item, or raise the exception of its call. Raise
        :class:`~concurrent.futures.process.BrokenProcessPool` if a process was killed.
    """
    count = min(cores(), len(items) // ITEMS_PER_PROCESS) if processes is None else processes
    if count < 2:
        yield function
        return
    with process_pool(count) as pool:
        waiting = deque(items)
        submitted: dict[Item, Future[Result]] = {}

        def fetch(item: Item) -> Result:
            while waiting and (item not in submitted or len(submitted) <= MAX_WAITING * count):
                following = waiting.popleft()
                submitted[following] = pool.submit(function, following)
            return submitted.pop(item).result()

        yield fetch


@contextmanager
def process_pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """Start a pool of ``count`` processes with one thread each, so that they do not share cores.

    When the block ends, calls that have not begun are cancelled. Those that have begun are waited
    for, except after an interruption (SIGINT, SIGTERM): a call may take minutes, so the processes
    are then terminated.
    """
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    others = set(active_children())
    # libraries read these variables when a new process imports them
    os.environ |= _ONE_THREAD
    try:
        # spawn, since libraries that run threads do not work after a fork
        pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=_set_signals)
        try:
            yield pool
        except BaseException as error:
            if not isinstance(error, Exception):
                for process in set(active_children()) - others:
                    process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _set_signals() -> None:
    """Ignore Ctrl-C, which a terminal sends to all processes: the caller ends the pool.

    It does so by SIGTERM, which a process ignores if the process that started it does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

"""Work that is bound by the CPU, done ahead by a process a core."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

Result = TypeVar("Result")

# a process takes seconds to start
WORTH = 8  # items a process
AHEAD = 4  # items a process that may wait to be fetched
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "POLARS_MAX_THREADS"), "1")


def cores() -> int:
    """Cores that this process may use: those it is bound to, ``OMP_NUM_THREADS`` at most."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(bound or 1, int(asked)) if asked.isdecimal() and int(asked) else bound or 1


@contextmanager
def ahead(
    function: Callable[[str], Result], items: Sequence[str], *, processes: int | None = None
) -> Iterator[Callable[[str], Result]]:
    """Call ``function`` for each item in a process of its own kind, a little ahead of need.

    Parameters
    ----------
    function
        Can be pickled, as its results and exceptions.
    items
        In the order in which they will be asked for; some may be left out, none repeated.
    processes : int, optional
        Default: a process a core, fewer where the items are few, none (each call is made when it
        is asked for) where they are not worth the start of two. Each has one thread.

    Yields
    ------
    callable
        Item to result; raises what the call raised.
    """
    count = min(cores(), len(items) // WORTH) if processes is None else processes
    if count < 2:
        yield function
        return
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    # read by the libraries of the new processes when they are imported
    os.environ |= _ONE_THREAD
    # spawned: libraries with threads of their own do not survive a fork
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        waiting = deque(items)
        begun: dict[str, Future[Result]] = {}

        def fetch(item: str) -> Result:
            while waiting and (item not in begun or len(begun) <= AHEAD * count):
                following = waiting.popleft()
                begun[following] = pool.submit(function, following)
            return begun.pop(item).result()

        try:
            yield fetch
        finally:
            pool.shutdown(cancel_futures=True)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

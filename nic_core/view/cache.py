"""Bounded caches of the viewer: what was read from files, and finished answers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")


class FileCache:
    """Values that were read from files; a file that changed is read again. Threads may share it.

    Parameters
    ----------
    entries : int
        Number of values that are kept; the least recently used is dropped.
    """

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._values: OrderedDict[Hashable, tuple[object, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path, read: Callable[[Path], Value], *, of: Path | None = None) -> Value:
        """Return ``read(path)``.

        Parameters
        ----------
        of : Path, optional
            File whose size and time show a change, where ``path`` is a folder.

        Raises
        ------
        FileNotFoundError
            The file does not exist. Errors of ``read`` are passed on and not kept.
        """
        stat = (path if of is None else of).stat()
        key, version = (path, read), (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        with self._lock:
            if key in self._values and self._values[key][0] == version:
                self._values.move_to_end(key)
                value: Value = self._values[key][1]
                return value
        value = read(path)
        with self._lock:
            self._values[key] = version, value
            self._values.move_to_end(key)
            while len(self._values) > self._entries:
                self._values.popitem(last=False)
        return value


class AnswerCache:
    """Encoded pictures by key, at most ``size`` bytes of them. Threads may share it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._held = 0
        self._values: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> bytes | None:
        """Return the picture of a key; None if it is not held."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def put(self, key: Hashable, value: bytes) -> None:
        """Hold a picture, and drop the least recently used ones beyond the size."""
        with self._lock:
            self._held += len(value) - len(self._values.pop(key, b""))
            self._values[key] = value
            while self._held > self._size:
                _, dropped = self._values.popitem(last=False)
                self._held -= len(dropped)

    @property
    def held(self) -> int:
        """Bytes of the pictures that are held."""
        return self._held

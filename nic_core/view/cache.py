"""Bounded caches of the viewer: what was read from files, and finished answers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

from nic_core.slides.remote import RemotePath, SlidePath

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

    def get(self, file: Path, read: Callable[[], Value], *key: Hashable) -> Value:
        """Return ``read()``, which reads a file; values of one file differ in ``key``.

        Raises
        ------
        OSError
            The file does not exist. Errors of ``read`` are passed on and not kept.
        """
        version = file_version(file)
        place = (file, *key)
        with self._lock:
            if place in self._values and self._values[place][0] == version:
                self._values.move_to_end(place)
                value: Value = self._values[place][1]
                return value
        value = read()
        with self._lock:
            self._values[place] = version, value
            self._values.move_to_end(place)
            while len(self._values) > self._entries:
                self._values.popitem(last=False)
        return value


def file_version(file: SlidePath) -> tuple[int, ...]:
    """Return numbers that differ when a file was replaced or changed: time, size, inode.

    Raises
    ------
    OSError
        The file does not exist.
    """
    if isinstance(file, RemotePath):
        status = file.stat()
        return status.st_mtime_ns, status.st_size
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


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

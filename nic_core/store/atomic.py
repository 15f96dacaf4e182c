"""Atomic writes, and one lock a product.

A product is written beside its place as ``.new.NAME`` and then renamed, so a reader finds the old
product, the new one or none. ``.lock.NAME`` exists while a process writes the product; a second
writer waits for it. The system releases the lock when a process dies. Files ``.new.*`` and
``.old.*`` without a held lock are leftovers, which the next writer removes; an ``.old.NAME``
without a ``NAME`` is a product whose replacement was interrupted, and is put back.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path

LONGEST_POLL = 1.0  # s between two attempts to get a lock
WAITING_LOGGED_AFTER = 1.0  # s of waiting until the first line in the log
WAITING_LOGGED_EVERY = 60.0  # s between further lines

log = logging.getLogger(__name__)


class StoreError(Exception):
    """A product cannot be written; says which, why, and what to do."""

    def __init__(self, path: str | Path, reason: str, remedy: str) -> None:
        self.path = Path(path)
        self.reason = reason
        self.remedy = remedy
        # pickle rebuilds an exception from its args, so all three must be among them
        super().__init__(str(path), reason, remedy)

    def __str__(self) -> str:
        return f"{self.path}: cannot be written ({self.reason}); {self.remedy}"


class StoreBusyError(StoreError):
    """Another process is writing the product."""


@contextmanager
def exclusive_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a product: one writer among all threads and processes, and among machines
    if their shared file system supports locks.

    :func:`atomic_file` and :func:`atomic_folder` hold it while they write. A caller that must make
    a product only once holds it around checking, making and writing. A thread that already holds
    the lock may take it again. The lock file names the process that holds it, its machine and the
    time; a process that waits logs them.

    Parameters
    ----------
    wait : bool
        Wait until another writer is finished; otherwise raise.

    Raises
    ------
    StoreBusyError
        Another process is writing the product, and ``wait`` is false.
    StoreError
        The folder cannot be written, or its file system has no locks.
    """
    product = path.parent.resolve() / path.name
    held: set[Path] = _held.__dict__.setdefault("products", set())
    if product in held:
        yield
        return
    lock = _lock_of(product)
    with _as_store_error(path):
        product.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = _open_locked(lock, product.name, wait)
        except BlockingIOError as error:
            reason = f"another process has locked it: {_holder(lock)}"
            raise StoreBusyError(path, reason, "run again later") from error
    held.add(product)
    try:
        with _as_store_error(path):
            _put_back(product)
            for leftover in (_beside(product, "new"), _beside(product, "old")):
                _remove(leftover)
        yield
    finally:
        held.discard(product)
        lock.unlink(missing_ok=True)
        fcntl.flock(file, fcntl.LOCK_UN)  # a forked child may keep the file open longer
        os.close(file)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` if the block succeeds.

    Raises
    ------
    StoreError
        The disk is full, or the place cannot be written.
    """
    with exclusive_lock(path), _as_store_error(path):
        temporary = _beside(path, "new")
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder beside ``path``; move it to ``path`` if the block succeeds.

    Linux exchanges the old and the new folder in one system call. Systems that cannot do so (other
    kernels, NFS, Lustre) have neither for an instant, which is logged once. A process that is
    killed then leaves the old folder aside; the next one that takes the lock puts it back.

    Raises
    ------
    StoreError
        The disk is full, or the place cannot be written.
    """
    with exclusive_lock(path), _as_store_error(path):
        temporary, old = _beside(path, "new"), _beside(path, "old")
        temporary.mkdir()
        try:
            yield temporary
            if not path.exists():
                os.replace(temporary, path)
            elif not _exchange(temporary, path):
                _log_missing_exchange(path.parent)
                os.replace(path, old)
                os.replace(temporary, path)
        finally:
            _put_back(path)
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)


def remove_product(path: Path) -> None:
    """Remove a product; a reader finds it complete or not at all.

    Raises
    ------
    StoreBusyError
        A process is writing it.
    """
    with exclusive_lock(path, wait=False), _as_store_error(path):
        removed = _beside(path, "new")  # what a killed process leaves of it is never put back
        os.replace(path, removed)
        _remove(removed)


def is_locked(path: Path) -> bool:
    """Whether a process is writing a product."""
    try:
        file = os.open(_lock_of(path), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


_held = threading.local()
_REMEDIES = {
    number: remedy
    for remedy, numbers in {
        "free some space and run again": (errno.ENOSPC, errno.EDQUOT),
        "choose a place where you have write permission": (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
        ),
        "a file exists where a folder is needed: choose another place": (
            errno.EEXIST,
            errno.ENOTDIR,
        ),
        "use a file system with locks (flock)": (
            errno.ENOLCK,
            errno.EOPNOTSUPP,
            errno.ENOSYS,
        ),
        "check the disk": (errno.EIO, errno.ESTALE),
    }.items()
    for number in numbers
}


def _lock_of(path: Path) -> Path:
    return path.with_name(f".lock.{path.name}")


def _beside(path: Path, kind: str) -> Path:
    # the suffix stays last, since writers choose their format by it
    return path.with_name(f".{kind}.{path.name}")


def _put_back(path: Path) -> None:
    """Restore a product whose replacement was interrupted between its two renames."""
    old = _beside(path, "old")
    if os.path.lexists(old) and not os.path.lexists(path):
        os.replace(old, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _as_store_error(path: Path) -> Iterator[None]:
    """Turn faults of the disk into a :class:`StoreError` that names the product and a remedy."""
    try:
        yield
    except OSError as error:
        number = error.errno or _full_disk(error)
        if number not in _REMEDIES:
            raise
        raise StoreError(path, os.strerror(number), _REMEDIES[number]) from error
    except Exception as error:
        number = _full_disk(error)
        if number is None:
            raise
        raise StoreError(path, os.strerror(number), _REMEDIES[number]) from error


def _full_disk(error: Exception) -> int | None:
    """The error number of a full disk, if the message of a writing library contains its text.

    polars, safetensors and libvips raise errors of their own, or an OSError without a number. Other
    faults are not recognised by their text: it may be about an input file.
    """
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return next((n for n in numbers if os.strerror(n).lower() in str(error).lower()), None)


def _open_locked(path: Path, product: str, wait: bool) -> int:
    """Descriptor of a lock file that this thread has locked; the file names this process."""
    begun = time.monotonic()
    pause, log_at = 0.001, begun + WAITING_LOGGED_AFTER
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the previous writer removes its lock file: a lock on a removed file protects nothing
            if os.path.samestat(os.fstat(file), path.stat()):
                _name_holder(file)
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            if not wait:
                os.close(file)
                raise
            if time.monotonic() >= log_at:
                log.info(
                    "waiting for %s, which another process has locked: %s", product, _holder(path)
                )
                log_at = time.monotonic() + WAITING_LOGGED_EVERY
            os.close(file)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL)
            continue
        except OSError:
            os.close(file)
            raise
        os.close(file)


def _name_holder(file: int) -> None:
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    # a product must be removable from a full disk
    with suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode(), 0)


def _holder(lock: Path) -> str:
    """Return process, machine and time of a lock, as its file says."""
    with suppress(FileNotFoundError):
        return lock.read_text() or "its process is not recorded"
    return "it has just ended"


@cache
def _log_missing_exchange(folder: Path) -> None:
    log.warning(
        "%s: this file system cannot exchange two folders in one step; a reader may find none for "
        "an instant while a product is replaced: run such a reader again",
        folder,
    )


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one system call; False if the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    current_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    arguments = (current_folder, os.fsencode(first), current_folder, os.fsencode(second), exchange)
    if not rename(*arguments):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))

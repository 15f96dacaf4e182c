"""Local copies of remote slides that no library here reads by ranges (OpenSlide's formats, CZI).

The copies are in one folder of bounded size (``NIC_SLIDE_CACHE``, ``NIC_SLIDE_CACHE_GB``). The copy
that was used longest ago is removed first; one that is in use, in any process, is never removed. A
copy belongs to one version of the slide's files (sizes and ETags): a replaced slide is copied anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nic_core.object_stores import RemoteError, RemoteUnavailableError
from nic_core.slides.remote import Range, RemoteObject, RemotePath

FOLDER_VARIABLE, SIZE_VARIABLE = "NIC_SLIDE_CACHE", "NIC_SLIDE_CACHE_GB"
DEFAULT_GB = 50.0
_DONE = ".complete"  # written last into the folder of a copy
_PIECE = 64 * 1024 * 1024  # bytes of a slide in memory while it is copied


@dataclass(frozen=True)
class LocalCopy:
    """A copy of a slide, which is kept until it is released.

    Attributes
    ----------
    path : Path
        The copy of the slide's first file; its other files are where they are to it.
    lock : int
        Descriptor of the copy's lock file, locked for reading.
    """

    path: Path
    lock: int

    def release(self) -> None:
        """Let the copy be removed when room is needed."""
        os.close(self.lock)


def local_copy(files: Sequence[RemotePath]) -> LocalCopy:
    """Copy the files of a slide, unless there is a copy of this version.

    Parameters
    ----------
    files : sequence of RemotePath
        The file by which the slide is opened, then its others, all in one folder or below it.

    Raises
    ------
    RemoteError
        A file cannot be read or changed while it was copied, the slide is larger than the folder
        may be, or the folder cannot be written.
    """
    objects = [RemoteObject(file) for file in files]
    limit = _limit(files[0])
    if (size := sum(found.size for found in objects)) > limit:
        reason = f"its {size / 1e9:.1f} GB do not fit into the {limit / 1e9:g} GB of local copies"
        raise RemoteError(files[0], reason, f"raise {SIZE_VARIABLE}")
    version = [(str(found.path), found.size, found.etag, found.stored) for found in objects]
    folder = _folder() / hashlib.blake2b(repr(version).encode(), digest_size=16).hexdigest()
    top = files[0].parent
    targets = {folder / found.path.relative_to(top): found for found in objects}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        while True:
            lock = _locked(_lock_file(folder), fcntl.LOCK_SH)
            if (folder / _DONE).exists():
                os.utime(_lock_file(folder))  # used now
                return LocalCopy(folder / files[0].relative_to(top), lock)
            os.close(lock)
            lock = _locked(_lock_file(folder), fcntl.LOCK_EX)
            try:
                if not (folder / _DONE).exists():
                    _fill(folder, targets, limit)
            finally:
                os.close(lock)
    except RemoteError:
        raise
    except OSError as error:
        reason = f"cannot be copied to {folder.parent} ({error.strerror})"
        remedy = f"free some space, or set {FOLDER_VARIABLE} to a folder on another disk"
        raise RemoteError(files[0], reason, remedy) from error


def _fill(folder: Path, targets: Mapping[Path, RemoteObject], limit: float) -> None:
    """Copy the files of a slide into its folder, whose lock this process holds."""
    with _room(folder.parent):
        shutil.rmtree(folder, ignore_errors=True)  # of a process that died
        if not _make_room(folder.parent, sum(found.size for found in targets.values()), limit):
            reason = f"the {limit / 1e9:g} GB of local copies are in use"
            remedy = f"raise {SIZE_VARIABLE}, or run fewer steps at the same time"
            raise RemoteUnavailableError(next(iter(targets.values())).path, reason, remedy)
        for target, found in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                file.truncate(found.size)  # so that other processes count the whole copy
    try:
        for target, found in targets.items():
            _copy(found, target)
        (folder / _DONE).touch()
    except BaseException:
        with _room(folder.parent):
            shutil.rmtree(folder, ignore_errors=True)  # it would take room until the next attempt
        raise


def _copy(found: RemoteObject, target: Path) -> None:
    with target.open("r+b") as file:
        for start in range(0, found.size, _PIECE):
            file.write(found.read([Range(start, min(_PIECE, found.size - start))])[0])


def _make_room(root: Path, size: int, limit: float) -> bool:
    """Remove the copies that were used longest ago, until a new one of ``size`` bytes fits.

    Returns whether it does; copies that are in use stay. The caller is in :func:`_room`.
    """
    used = {lock: lock.stat().st_mtime_ns for lock in root.glob("*.lock")}
    folders = {lock: root / lock.stem for lock in sorted(used, key=lambda lock: used[lock])}
    sizes = {
        lock: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for lock, folder in folders.items()
    }
    total = sum(sizes.values())
    for lock, folder in folders.items():
        if total + size <= limit:
            break
        descriptor = os.open(lock, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # in use
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
            # the lock file stays: a process that waits for it must not get one that is removed
            total -= sizes[lock]
        finally:
            os.close(descriptor)
    return total + size <= limit


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _locked(path: Path, kind: int) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(lock, kind)
    return lock


@contextmanager
def _room(root: Path) -> Iterator[None]:
    """Be the only one, among all processes, that adds or removes copies."""
    lock = _locked(root / ".room", fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(lock)


def _folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(FOLDER_VARIABLE) or base / "nic" / "slides")


def _limit(slide: RemotePath) -> float:
    text = os.environ.get(SIZE_VARIABLE) or str(DEFAULT_GB)
    try:
        return float(text) * 1e9
    except ValueError:
        remedy = f"set {SIZE_VARIABLE} to a number of gigabytes"
        raise RemoteError(slide, f"{SIZE_VARIABLE} is '{text}'", remedy) from None

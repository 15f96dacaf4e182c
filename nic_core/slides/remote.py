"""Slides in an object store: their addresses, and reading them by ranges.

A slide at ``s3://bucket/key`` or at ``http(s)://host/path`` is a :class:`RemotePath`. Of a TIFF
only the ranges that are needed are read, in few requests; of OME-Zarr, whose chunks are objects,
zarr reads those that are needed; other formats are copied to a local folder of bounded size
(:mod:`nic_core.slides.local_copies`).

Every request of a :class:`RemoteObject` names the version of the object that was opened (its ETag),
and every answer is compared with it. An object that is replaced while it is read is therefore an
error, never a mixture of two versions.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import os
import stat
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, TypeAlias, cast

from nic_core.object_stores import (
    SCHEMES,
    ChangedError,
    RemoteError,
    RemoteUnavailableError,
    as_remote_error,
    connect,
    split_address,
)

if TYPE_CHECKING:
    from obstore import ObjectMeta

_BLOCK = 64 * 1024  # bytes; metadata are read in blocks, since tifffile reads a few bytes at a time
_BLOCKS = 1024  # blocks that are kept: 64 MB
_GAP = 128 * 1024  # bytes between two ranges that are read rather than a second request [choice]
_LARGEST = 8 * 1024 * 1024  # bytes of a request; larger ones are divided and read at the same time
_CONNECTIONS = 16
_ATTEMPTS = 4  # at an answer that is cut, or that is another range than the requested one
_PAUSE = 0.1  # s; four times as long after each failed attempt
_FRESH = 5.0  # s for which the size and version of an object are not asked for again


class RemotePath(PurePosixPath):
    """The address of an object, or of a folder of objects: ``s3://bucket/folder/slide.svs``.

    It offers what the readers of slides use of :class:`pathlib.Path`. Folders exist in S3 only; of
    an HTTP server only single files can be read.
    """

    def __str__(self) -> str:
        scheme, *rest = self.parts
        return f"{scheme}//{'/'.join(rest)}"

    def relative_to(self, *other: Any) -> PurePosixPath:  # type: ignore[override]
        """Return the path below a folder; it has no scheme, so it is no address."""
        plain = (PurePosixPath(*p.parts) if isinstance(p, RemotePath) else p for p in other)
        return PurePosixPath(*self.parts).relative_to(*plain)

    def absolute(self) -> RemotePath:
        return self

    def resolve(self) -> RemotePath:
        return self

    def stat(self) -> RemoteStatus:
        """Return size, time and version of the object.

        Raises
        ------
        FileNotFoundError
            There is no such object, and no object below this address.
        RemoteError
            The server does not answer, or denies the access.
        """
        status: RemoteStatus | None = _statuses.get(self)
        if status is None:
            try:
                status = _status_of(_head(self))
            except FileNotFoundError:
                if not (self.in_bucket and _has_objects(self)):
                    raise
                status = RemoteStatus(stat.S_IFDIR, 0, 0, "")
            _statuses.put(self, status)
        return status

    def exists(self) -> bool:
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_file(self) -> bool:
        return self.exists() and stat.S_ISREG(self.stat().st_mode)

    def is_dir(self) -> bool:
        return self.exists() and stat.S_ISDIR(self.stat().st_mode)

    def is_symlink(self) -> bool:
        return False

    @property
    def in_bucket(self) -> bool:
        """Whether the address is in a bucket, whose objects can be listed."""
        return self.parts[0] == "s3:"

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield the objects and folders directly in this folder.

        Raises
        ------
        RemoteError
            An HTTP server cannot list its files, or see :meth:`stat`.
        """
        root, key = self._place()
        store = connect(root)
        import obstore

        with as_remote_error(self):
            found = obstore.list_with_delimiter(store, key or None)
        for prefix in found["common_prefixes"]:
            yield self / PurePosixPath(prefix).name
        for meta in found["objects"]:
            yield _listed(root, meta)

    def files(self) -> list[RemotePath]:
        """Return all objects below this folder, sorted; see :meth:`iterdir`."""
        root, key = self._place()
        store = connect(root)
        import obstore

        with as_remote_error(self):
            objects = obstore.list(store, key or None).collect()
        # some programs store an empty object for each folder
        paths = (PurePosixPath(meta["path"]) for meta in objects)
        folders = {str(parent) for path in paths for parent in path.parents}
        return sorted(_listed(root, meta) for meta in objects if meta["path"] not in folders)

    def _place(self) -> tuple[str, str]:
        if not self.in_bucket:
            remedy = "name the files of the slides in a slide table"
            raise RemoteError(self, "an HTTP server does not list the files of a folder", remedy)
        return split_address(str(self))

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        """Open the object for reading; see :meth:`stat` for what is raised."""
        return cast(BinaryIO, RemoteFile(RemoteObject(self)))

    def read_bytes(self) -> bytes:
        found = RemoteObject(self)
        return found.read([Range(0, found.size)])[0]

    def read_text(self, encoding: str) -> str:
        return self.read_bytes().decode(encoding)


def look_up(paths: Iterable[RemotePath]) -> None:
    """Ask for the status of many objects at the same time; :meth:`RemotePath.stat` then has it.

    Several objects of one folder of a bucket are listed, 1000 in a request.
    """
    folders: dict[RemotePath, list[RemotePath]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    questions: list[Callable[[], object]] = []
    for folder, wanted in folders.items():
        if folder.in_bucket and len(wanted) > 1:
            questions.append(partial(deque, folder.iterdir(), 0))
        else:
            questions += [path.exists for path in wanted]
    for _ in _pool().map(lambda ask: ask(), questions):
        pass


SlidePath: TypeAlias = Path | RemotePath
"""Where a slide is: a local file or folder, or an address in an object store."""


def slide_path(place: str | SlidePath) -> SlidePath:
    """Return the path or address that a text states.

    Raises
    ------
    ValueError
        The address has no bucket or server, a query (``?``), or empty parts (``//``, ``.``).
    """
    if isinstance(place, Path | RemotePath):
        return place
    scheme, mark, rest = place.partition("://")
    if not mark or scheme.lower() not in SCHEMES:
        return Path(place)
    parts = rest.removesuffix("/").split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{place}: an address has no empty part and no '.'; correct it")
    if scheme.lower() != "s3" and set(rest) & set("?#@"):
        raise ValueError(
            f"{place}: an address with a query or a login is not stored; use s3:// with AWS_* in "
            "the environment, or a server without them"
        )
    return RemotePath(f"{scheme.lower()}:", *parts)


class RemoteStatus(NamedTuple):
    """What :meth:`RemotePath.stat` returns, with the names of ``os.stat``.

    Attributes
    ----------
    st_mode : int
        Regular file or folder.
    st_size : int
        Bytes.
    st_mtime_ns : int
        Time at which the object was stored, ns since 1970. Servers state whole seconds; the
        fraction is a digest of the ETag, so that two versions of one second differ.
    etag : str
        The server's name of the version; empty if it states none.
    """

    st_mode: int
    st_size: int
    st_mtime_ns: int
    etag: str


class Range(NamedTuple):
    """Bytes of a file."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


def plan_requests(ranges: Iterable[Range], gap: int = _GAP) -> list[Range]:
    """Return the requests that cover ranges, sorted, without overlap.

    Ranges with at most ``gap`` bytes between them share a request. Requests have at most 8 MB: a
    larger one is divided, so that its parts are read at the same time.
    """
    merged: list[Range] = []
    for found in sorted(r for r in ranges if r.length):
        if merged and found.start <= merged[-1].end + gap:
            start = merged[-1].start
            merged[-1] = Range(start, max(merged[-1].end, found.end) - start)
        else:
            merged.append(found)
    return [
        Range(start, min(_LARGEST, whole.end - start))
        for whole in merged
        for start in range(whole.start, whole.end, _LARGEST)
    ]


class RemoteObject:
    """An object in the version that it had when it was opened. Threads may share it.

    Attributes
    ----------
    path : RemotePath
    size : int
        Bytes.
    etag : str
        The server's name of the version; empty if it states none.
    stored : int
        ``st_mtime_ns`` of its :class:`RemoteStatus`.

    Raises
    ------
    FileNotFoundError, RemoteError
        See :meth:`RemotePath.stat`.
    """

    def __init__(self, path: RemotePath) -> None:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        self.path, self.size, self.etag = path, status.st_size, status.etag
        self.stored, self._status = status.st_mtime_ns, status
        root, self._key = split_address(str(path))
        self._store = connect(root)

    def read(self, ranges: Sequence[Range], *, gap: int = _GAP) -> list[bytes]:
        """Read ranges of the object, with as few requests as :func:`plan_requests` finds.

        Raises
        ------
        ChangedError
            The object was replaced or removed since it was opened.
        RemoteUnavailableError
            The server does not answer, or not with these bytes, also after several attempts.
        """
        requests = plan_requests(ranges, gap)
        if len(requests) <= 1:
            parts = [self._get(request) for request in requests]
        else:
            parts = list(_pool().map(self._get, requests))
        return [self._part(wanted, requests, parts) for wanted in ranges]

    @staticmethod
    def _part(wanted: Range, requests: list[Range], parts: list[bytes]) -> bytes:
        found = [
            part[max(wanted.start - request.start, 0) : wanted.end - request.start]
            for request, part in zip(requests, parts, strict=True)
            if request.start < wanted.end and wanted.start < request.end
        ]
        return found[0] if len(found) == 1 else b"".join(found)

    def block(self, number: int) -> bytes:
        """Return a block of 64 KB, from memory if it was read before."""
        return self._blocks([number])[0]

    def read_blocks(self, wanted: Range) -> bytes:
        """Read a range by blocks of 64 KB, which are kept: for metadata, which lie together."""
        first, last = wanted.start // _BLOCK, (wanted.end - 1) // _BLOCK
        data = b"".join(self._blocks(range(first, last + 1)))
        return data[wanted.start - first * _BLOCK :][: wanted.length]

    def _blocks(self, numbers: Sequence[int]) -> list[bytes]:
        keys = {number: (self.path, self._status, number) for number in numbers}
        missing = [number for number in numbers if _kept.get(keys[number]) is None]
        ranges = [
            Range(number * _BLOCK, min(_BLOCK, self.size - number * _BLOCK)) for number in missing
        ]
        read = dict(zip(missing, self.read(ranges, gap=0), strict=True))
        for number, data in read.items():
            _kept.put(keys[number], data)
        # what was in memory a moment ago may have been dropped for what was just read
        return [
            read[number] if number in read else _kept.get(keys[number]) or self.block(number)
            for number in numbers
        ]

    def _get(self, request: Range) -> bytes:
        import obstore

        options: Any = {"range": (request.start, request.end)}
        if self.etag and not self.etag.startswith("W/"):  # a weak one never matches
            options["if_match"] = self.etag
        failure = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE * 4**attempt)
            try:
                with as_remote_error(self.path):
                    result = obstore.get(self._store, self._key, options=options)
                    status, answered = _status_of(result.meta), result.range
                    data = bytes(result.bytes()) if status == self._status else b""
            except (ChangedError, FileNotFoundError) as error:
                raise self._changed() from error
            except RemoteUnavailableError as error:
                failure = error.reason
                continue
            if status != self._status:
                raise self._changed()
            if tuple(answered) == (request.start, request.end) and len(data) == request.length:
                return data
            failure = (
                f"the server sent {len(data):,} bytes from byte {answered[0]:,} instead of "
                f"{request.length:,} from byte {request.start:,}"
            )
        remedy = "check that the server can be reached, and run it again"
        raise RemoteUnavailableError(self.path, failure, remedy)

    def _changed(self) -> ChangedError:
        _statuses.drop(self.path)
        reason = "it was replaced or removed while it was read"
        return ChangedError(self.path, reason, "run it again")


class RemoteFile(io.RawIOBase):
    """A remote object as a file that is read by blocks (:meth:`RemoteObject.read_blocks`).

    Attributes
    ----------
    failure : RemoteError or None
        What a read raised. Libraries that read the file may catch it and go on without the data.
    """

    def __init__(self, found: RemoteObject) -> None:
        self._object, self._position = found, 0
        self.name = found.path.name
        self.failure: RemoteError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._object.size}
        position = base[whence] + offset
        if position < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = position
        return position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self._object.size - self._position))
        if length:
            try:
                view[:length] = self._object.read_blocks(Range(self._position, length))
            except RemoteError as error:
                self.failure = error
                raise
        self._position += length
        return length


class _Recent:
    """The values that were used last. Threads may share it."""

    def __init__(self, count: int, fresh: float = float("inf")) -> None:
        self._count, self._fresh = count, fresh  # s for which a value holds
        self._values: OrderedDict[Any, tuple[float, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object) -> Any:
        with self._lock:
            since, value = self._values.get(key, (0.0, None))
            if value is None or time.monotonic() - since > self._fresh:
                return None
            self._values.move_to_end(key)
            return value

    def put(self, key: object, value: object) -> None:
        with self._lock:
            self._values[key] = (time.monotonic(), value)
            self._values.move_to_end(key)
            while len(self._values) > self._count:
                self._values.popitem(last=False)

    def drop(self, key: object) -> None:
        with self._lock:
            self._values.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self._values.clear()


_kept = _Recent(_BLOCKS)
_statuses = _Recent(1 << 16, _FRESH)


def forget() -> None:
    """Forget what was read: the next status is asked for again, and the next block is read."""
    _kept.clear()
    _statuses.clear()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """The threads of this process that send requests."""
    return ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="ranges")


def _head(path: RemotePath) -> ObjectMeta:
    root, key = split_address(str(path))
    store = connect(root)
    import obstore  # an optional package, whose absence `connect` reports

    if not key:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    with as_remote_error(path):
        return obstore.head(store, key)


def _has_objects(folder: RemotePath) -> bool:
    root, key = split_address(str(folder))
    store = connect(root)
    import obstore

    with as_remote_error(folder):
        return any(len(page) for page in obstore.list(store, key or None, chunk_size=1))


def _status_of(meta: ObjectMeta) -> RemoteStatus:
    etag = meta["e_tag"] or ""
    digest = hashlib.blake2b(etag.encode(), digest_size=8).digest()
    fraction = int.from_bytes(digest, "little") % 10**9 if etag else 0
    stored = int(meta["last_modified"].timestamp()) * 10**9 + fraction
    return RemoteStatus(stat.S_IFREG, meta["size"], stored, etag)


def _listed(root: str, meta: ObjectMeta) -> RemotePath:
    """The address of an object of a listing, whose status is then known."""
    path = RemotePath(*PurePosixPath(root).parts, *meta["path"].split("/"))
    _statuses.put(path, _status_of(meta))
    return path

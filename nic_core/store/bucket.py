"""A copy of the store in a bucket, for other machines: publish products, fetch them, check them.

::

    s3://<bucket>/<folder>/
      objects/<sha256>              the content of a file
      products/<path in the store>.json    the files of a product, written last
      writer.json                   the lease of the process that writes

A product is its manifest: a reader finds the files of the old one or of the new one. An object is
named by its content and never changes, so equal files are stored once, and a writer that was killed
leaves objects that no manifest names; :func:`remove_unreferenced` removes them. One process writes
at a time (:func:`_writing`). Manifests are replaced by conditional requests, so that a writer which
lost its lease cannot undo the work of another.

The databases of Dagster and MLflow are not part of the copy, and neither are unfinished trainings.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from nic_core.object_stores import (
    NO_BUCKET_REMEDY,
    ChangedError,
    RemoteError,
    RemoteUnavailableError,
    as_remote_error,
    connect,
    split_address,
)
from nic_core.store.atomic import atomic_file, atomic_folder, exclusive_lock
from nic_core.store.layout import Store

if TYPE_CHECKING:
    from obstore.store import HTTPStore, S3Store

MANIFEST_FORMAT = 1
_OBJECTS, _PRODUCTS, _WRITER = "objects/", "products/", "writer.json"
_LEASE = timedelta(minutes=10)  # a writer that did not renew it for so long has died [choice]
_CONNECTIONS = 16
_PIECE = 8 * 1024 * 1024  # bytes

# push sends an object that is missing or has another size; it does not read the others
_SEND_AGAIN = "delete the object if there is one, and push the store again"

Progress = Callable[[int, int], None]


class StoredFile(BaseModel):
    """A file of a product. Its name is relative to the product; empty: the product is this file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    size: int
    sha256: str


class Manifest(BaseModel):
    """The files of a product."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int = MANIFEST_FORMAT
    folder: bool
    files: tuple[StoredFile, ...]


@dataclass(frozen=True)
class Transfer:
    """What :func:`push` or :func:`pull` did.

    Attributes
    ----------
    products, unchanged : int
        Number of all products, and of those that the other side had already.
    removed : tuple of str
        Products that were removed from the bucket, by their paths in the store.
    files, bytes : int
        What was sent or received.
    """

    products: int
    unchanged: int
    files: int
    bytes: int
    removed: tuple[str, ...] = ()


def push(
    store: Store, address: str, *, remove: bool = False, progress: Progress | None = None
) -> Transfer:
    """Publish the complete products of a store in a bucket.

    Parameters
    ----------
    address : str
        Folder of a bucket: ``s3://bucket/folder``.
    remove : bool
        Also remove the products from the bucket that the store does not have.
    progress : callable, optional
        Called with the number of products done, and of all.

    Raises
    ------
    RemoteError
        The bucket cannot be written, or another process is writing to it.
    StoreError
        A product cannot be locked for reading.
    """
    bucket = _Bucket(address)
    paths = {path.relative_to(store.root).as_posix(): path for path in store.published()}
    unchanged = files = sent = 0
    with _writing(bucket) as renew, ThreadPoolExecutor(_CONNECTIONS) as pool:
        present = bucket.objects()
        for done, (name, path) in enumerate(paths.items(), 1):
            renew()
            # no process replaces the product while its files are read
            with exclusive_lock(path):
                if not path.exists():  # removed since it was listed
                    continue
                manifest = _manifest_of(path)
                # as bytes, so that a damaged manifest is replaced
                old, etag = bucket.get(_manifest_key(name))
                # an object of another size is damaged, and sent again
                new = {f.sha256: f for f in manifest.files if present.get(f.sha256) != f.size}
                if old == _encoded(manifest) and not new:
                    unchanged += 1
                else:
                    places = [(path / f.name if f.name else path, f) for f in new.values()]
                    for _ in pool.map(lambda item: bucket.put_file(*item), places):
                        renew()
                    present |= {file.sha256: file.size for file in new.values()}
                    files, sent = files + len(new), sent + sum(f.size for f in new.values())
                    renew()
                    bucket.put_manifest(name, manifest, etag)
            if progress is not None:
                progress(done, len(paths))
        absent = sorted(bucket.products() - paths.keys()) if remove else []
        renew()
        for name in absent:
            bucket.delete(_manifest_key(name))
    return Transfer(len(paths), unchanged, files, sent, tuple(absent))


def pull(store: Store, address: str, progress: Progress | None = None) -> Transfer:
    """Fetch the products of a bucket into a store; those with other content are replaced.

    Each product is compared with its hashes before it takes its place. Products that the bucket
    does not have stay.

    Raises
    ------
    RemoteError
        The bucket cannot be read, or an object is missing or damaged.
    StoreError
        The store cannot be written.
    """
    bucket = _Bucket(address)
    names = sorted(bucket.products())
    if not names:
        raise RemoteError(address, "it holds no store", "check the address, or push a store to it")
    unchanged = files = received = 0
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        for done, name in enumerate(names, 1):
            path = _inside(store, address, name)
            manifest = _needed(bucket, name)
            with exclusive_lock(path):
                if path.exists() and _manifest_of(path) == manifest:
                    unchanged += 1
                else:
                    _fetch(bucket, name, path, manifest, pool)
                    files += len(manifest.files)
                    received += sum(file.size for file in manifest.files)
            if progress is not None:
                progress(done, len(names))
    return Transfer(len(names), unchanged, files, received)


def verify_bucket(address: str, progress: Progress | None = None) -> tuple[int, list[str]]:
    """Read every object that a manifest names, and compare it with its hash.

    Returns
    -------
    products : int
        Number of products.
    problems : list of str
        A line for each product with a damaged manifest, or with a missing or damaged object, and
        what to do.

    Raises
    ------
    RemoteError
        The bucket cannot be read.
    """
    bucket = _Bucket(address)
    names, problems, good = sorted(bucket.products()), list[str](), set[str]()
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        for done, name in enumerate(names, 1):
            try:
                manifest = _needed(bucket, name)
            except RemoteUnavailableError:
                raise
            except RemoteError as error:
                problems.append(str(error))
                manifest = Manifest(folder=False, files=())
            # equal files are read once
            files = [file for file in manifest.files if file.sha256 not in good]
            found = list(pool.map(bucket.problem, files))
            good |= {f.sha256 for f, wrong in zip(files, found, strict=True) if wrong is None}
            wrong = [f"{f.name or name} {w}" for f, w in zip(files, found, strict=True) if w]
            if wrong:
                problems.append(f"{address}: {name}: {'; '.join(wrong)}; {_SEND_AGAIN}")
            if progress is not None:
                progress(done, len(names))
    return len(names), problems


def unreferenced(address: str) -> dict[str, int]:
    """Return the objects that no manifest names, with their sizes in bytes.

    Raises
    ------
    RemoteError
        The bucket cannot be read.
    """
    return _unreferenced(_Bucket(address))


def remove_unreferenced(address: str) -> dict[str, int]:
    """Remove the objects that no manifest names; return them with their sizes in bytes.

    Raises
    ------
    RemoteError
        The bucket cannot be written, or another process is writing to it.
    """
    bucket = _Bucket(address)
    with _writing(bucket) as renew:
        found = _unreferenced(bucket)
        for name in found:
            renew()
            bucket.delete(f"{_OBJECTS}{name}")
    return found


def _unreferenced(bucket: _Bucket) -> dict[str, int]:
    objects = bucket.objects()
    for name in bucket.products():
        for file in _needed(bucket, name).files:
            objects.pop(file.sha256, None)
    return objects


def _manifest_key(name: str) -> str:
    return f"{_PRODUCTS}{name}.json"


def _encoded(manifest: Manifest) -> bytes:
    return manifest.model_dump_json().encode()


def _manifest_of(path: Path) -> Manifest:
    """The manifest of a local product, from the content of its files."""
    if not path.is_dir():
        return Manifest(folder=False, files=(_stored(path, ""),))
    files = sorted(file for file in path.rglob("*") if file.is_file())
    named = (_stored(file, file.relative_to(path).as_posix()) for file in files)
    return Manifest(folder=True, files=tuple(named))


def _stored(path: Path, name: str) -> StoredFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return StoredFile(name=name, size=file.tell(), sha256=digest)


def _inside(store: Store, address: str, name: str) -> Path:
    """The place of a product in the store; a name that leads out of it is refused."""
    parts = PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or not parts or ".." in parts:
        raise RemoteError(address, f"'{name}' is no place in a store", "push the store again")
    return store.root.joinpath(*parts)


def _needed(bucket: _Bucket, name: str) -> Manifest:
    manifest, _ = bucket.manifest(name)
    if manifest is None:
        raise ChangedError(bucket.address, f"'{name}' was removed meanwhile", "run it again")
    return manifest


def _fetch(
    bucket: _Bucket, name: str, path: Path, manifest: Manifest, pool: ThreadPoolExecutor
) -> None:
    write = atomic_folder(path) if manifest.folder else atomic_file(path)
    with write as temporary:
        places = []
        for file in manifest.files:
            parts = PurePosixPath(file.name).parts
            if manifest.folder != bool(parts) or ".." in parts or file.name.startswith("/"):
                reason = f"'{name}' has a file '{file.name}'"
                raise RemoteError(bucket.address, reason, "push the store again")
            places.append((temporary.joinpath(*parts), file))
        for _ in pool.map(lambda item: bucket.get_file(*item), places):
            pass


class _Bucket:
    """Objects and manifests below an address."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        root, self._folder = split_address(self.address)
        if not root.startswith("s3://") or root == "s3://":
            raise RemoteError(address, "no folder of a bucket", "write it as s3://bucket/folder")
        self._store: S3Store | HTTPStore = connect(root, self._folder)

    def objects(self) -> dict[str, int]:
        """Size of each object by its name, which is its sha256."""
        return {key.removeprefix(_OBJECTS): size for key, size in self._list(_OBJECTS).items()}

    def products(self) -> set[str]:
        """Paths in the store of all products."""
        return {key.removeprefix(_PRODUCTS).removesuffix(".json") for key in self._list(_PRODUCTS)}

    def _list(self, prefix: str) -> Mapping[str, int]:
        import obstore

        with as_remote_error(self.address):
            found = obstore.list(self._store, prefix.rstrip("/")).collect()
        return {meta["path"]: meta["size"] for meta in found}

    def manifest(self, name: str) -> tuple[Manifest | None, str | None]:
        """The manifest of a product and its ETag; None if there is none."""
        data, etag = self.get(_manifest_key(name))
        if data is None:
            return None, None
        try:
            manifest = Manifest.model_validate_json(data)
        except ValidationError as error:
            reason = f"the manifest of '{name}' is damaged"
            raise RemoteError(self.address, reason, "push the store again") from error
        if manifest.format != MANIFEST_FORMAT:
            reason = f"'{name}' has format {manifest.format}, not {MANIFEST_FORMAT}"
            raise RemoteError(self.address, reason, "push it again with this version")
        return manifest, etag

    def put_manifest(self, name: str, manifest: Manifest, etag: str | None) -> None:
        self.put(_manifest_key(name), _encoded(manifest), etag)

    def get(self, key: str) -> tuple[bytes | None, str | None]:
        """Content and ETag of an object; None if there is none."""
        import obstore

        try:
            with as_remote_error(f"{self.address}/{key}"):
                found = obstore.get(self._store, key)
                return bytes(found.bytes()), found.meta["e_tag"]
        except FileNotFoundError:
            return None, None

    def put(self, key: str, data: bytes, etag: str | None) -> str | None:
        """Replace the version ``etag`` of an object, or create it; return the new ETag.

        Raises
        ------
        ChangedError
            Another process wrote it meanwhile.
        RemoteError
            There is no such bucket.
        """
        import obstore

        mode: Any = "create" if etag is None else {"e_tag": etag}
        try:
            with as_remote_error(f"{self.address}/{key}"):
                return obstore.put(self._store, key, data, mode=mode)["e_tag"]
        except FileNotFoundError as error:
            reason = "there is no such bucket"
            raise RemoteError(self.address, reason, NO_BUCKET_REMEDY) from error

    def put_file(self, path: Path, file: StoredFile) -> None:
        import obstore

        with as_remote_error(f"{self.address}/{_OBJECTS}{file.sha256}"):
            # one part of a file at a time, since other files are sent beside it
            obstore.put(
                self._store,
                f"{_OBJECTS}{file.sha256}",
                path,
                chunk_size=_PIECE,
                max_concurrency=1,
            )

    def get_file(self, path: Path, file: StoredFile) -> None:
        """Write the content of a file, and compare it with its hash."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as target:
            wrong = self._read(file, target.write)
        if wrong is not None:
            reason = f"the object of '{file.name or path.name}' {wrong}"
            raise RemoteError(f"{self.address}/{_OBJECTS}{file.sha256}", reason, _SEND_AGAIN)

    def problem(self, file: StoredFile) -> str | None:
        """What is wrong with the object of a file; None if nothing is."""
        return self._read(file, lambda data: None)

    def _read(self, file: StoredFile, write: Callable[[bytes], object]) -> str | None:
        import obstore

        key, digest, size = f"{_OBJECTS}{file.sha256}", hashlib.sha256(), 0
        try:
            with as_remote_error(f"{self.address}/{key}"):
                for part in obstore.get(self._store, key).stream(min_chunk_size=_PIECE):
                    data = bytes(part)
                    digest.update(data)
                    size += len(data)
                    write(data)
        except FileNotFoundError:
            return "is missing"
        if (size, digest.hexdigest()) != (file.size, file.sha256):
            other = "other bytes" if size == file.size else f"{size:,} bytes, not {file.size:,}"
            return f"is damaged ({key}: {other})"
        return None

    def delete(self, key: str) -> None:
        import obstore

        with as_remote_error(f"{self.address}/{key}"):
            obstore.delete(self._store, key)


class _Lease(BaseModel):
    """The content of ``writer.json``."""

    holder: str
    until: datetime


@contextmanager
def _writing(bucket: _Bucket) -> Iterator[Callable[[], None]]:
    """Be the only writer of a bucket; yield a function that renews the lease.

    The lease is an object that is created, renewed and ended by conditional requests. It ends 10
    minutes after its last renewal if the process died, by the clocks of the machines.

    Raises
    ------
    RemoteError
        The server ignores the conditions of requests, so that two processes could write.
    RemoteUnavailableError
        Another process is writing.
    ChangedError
        From ``renew``: the lease was lost, since it was not renewed in time.
    """
    holder = f"process {os.getpid()} on {socket.gethostname()}"

    def content(until: datetime) -> bytes:
        return json.dumps({"holder": holder, "until": until.isoformat()}).encode()

    data, etag = bucket.get(_WRITER)
    if data is not None:
        try:
            lease = _Lease.model_validate_json(data)
        except ValidationError as error:
            raise RemoteError(
                f"{bucket.address}/{_WRITER}", "it is damaged", "delete it"
            ) from error
        if lease.until > datetime.now(UTC):
            reason = f"{lease.holder} is writing to it, until {lease.until:%Y-%m-%d %H:%M:%S} UTC"
            raise RemoteUnavailableError(bucket.address, reason, "run it again later")
    etag = bucket.put(_WRITER, content(datetime.now(UTC) + _LEASE), etag)
    renewed = datetime.now(UTC)

    def renew() -> None:
        nonlocal etag, renewed
        if datetime.now(UTC) - renewed > _LEASE / 10:
            etag = bucket.put(_WRITER, content(datetime.now(UTC) + _LEASE), etag)
            renewed = datetime.now(UTC)

    try:
        with suppress(ChangedError):
            bucket.put(_WRITER, content(datetime.now(UTC)), None)  # it exists
            reason = "the server ignores the condition of a request (If-None-Match)"
            raise RemoteError(bucket.address, reason, "use a server with conditional writes")
        yield renew
    finally:
        with suppress(RemoteError):  # a lease that cannot be ended here ends by itself
            bucket.put(_WRITER, content(datetime.now(UTC)), etag)

"""The store: where every product lies, and how it gets there whole.

::

    <root>/
      slides/index.parquet, seen.parquet   the slides, and what was seen of each file
      slides/<slide>/           slide.json, thumbnail.jpg, tissue.png
      patch_tables/<slide>.parquet
      patch_tasks/<task>/       patches.npy, patches.parquet, findings.parquet, recipe
      encoders/<encoder>/       weights.safetensors (or network.*), card.json, history.parquet
      encoders/.<encoder>.training.pt      the state of a training that goes on
      probes/<encoder>.parquet  scores of its codes on every patch task
      grids/<encoder>/<slide>.zarr
      maps/<map>/<slide>/       cells.parquet, overlay.jpg
      maps/<map>.parquet        scores of the map by slide
      models/<target>/folds.parquet
      models/<target>/<encoder>/  fold-*.safetensors, card.json, predictions.parquet
      explanations/<target>/<encoder>/  scores.parquet, <slide>/: heat.tif, heat.zarr, ...
      reports/
      mlflow/                   the tracker's database and artifacts
      dagster/                  the orchestrator's own storage

This module alone knows the layout. Products are written beside their place as ``.new.NAME``
and renamed, so a reader sees the old one, the new one or none. ``.lock.NAME``, gone when the
writer is, keeps a second writer of the same product waiting; so what a killed one left beside
it is known to be litter, and the next one removes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STORE_VARIABLE = "NIC_STORE"
DEFAULT_STORE = Path("data/store")


@dataclass(frozen=True)
class Store:
    """Paths of every product under one root."""

    root: Path

    @classmethod
    def from_environment(cls) -> Store:
        """``$NIC_STORE``, else ``data/store``."""
        return cls(Path(os.environ.get(STORE_VARIABLE) or DEFAULT_STORE).resolve())

    @property
    def slides(self) -> Path:
        return self.root / "slides"

    @property
    def index(self) -> Path:
        """The slide index."""
        return self.slides / "index.parquet"

    @property
    def seen(self) -> Path:
        """What was seen of each input file at the last look."""
        return self.slides / "seen.parquet"

    def slide(self, slide: str) -> Path:
        return self.slides / slide

    def patch_table(self, slide: str) -> Path:
        return self.root / "patch_tables" / f"{slide}.parquet"

    def patch_task(self, task: str) -> Path:
        return self.root / "patch_tasks" / task

    def encoder(self, encoder: str) -> Path:
        return self.root / "encoders" / encoder

    def training(self, encoder: str) -> Path:
        """Where an encoder's training keeps its state until it is done."""
        return self.root / "encoders" / f".{encoder}.training.pt"

    def probe(self, encoder: str) -> Path:
        return self.root / "probes" / f"{encoder}.parquet"

    def grid(self, encoder: str, slide: str) -> Path:
        return self.root / "grids" / encoder / f"{slide}.zarr"

    def map(self, name: str, slide: str) -> Path:
        return self.root / "maps" / name / slide

    def map_scores(self, name: str) -> Path:
        """Scores of a map on the slides with a truth image."""
        return self.root / "maps" / f"{name}.parquet"

    def folds(self, target: str) -> Path:
        return self.root / "models" / target / "folds.parquet"

    def model(self, target: str, encoder: str) -> Path:
        return self.root / "models" / target / encoder

    def explanations(self, target: str, encoder: str) -> Path:
        return self.root / "explanations" / target / encoder

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def mlflow(self) -> Path:
        return self.root / "mlflow"

    def products(self) -> Iterator[Product]:
        """What lies where the layout has a place for it, kind by kind: no report, no database,
        nothing half made, nothing that somebody else put there, nothing behind a link."""
        root = self.root.resolve()
        for kind, pattern in _PLACES.items():
            place = re.compile(re.escape(pattern).replace(r"\*", "([^/.][^/]*)"))
            for path in sorted(self.root.glob(pattern)):
                name = path.relative_to(self.root).as_posix()
                names = place.fullmatch(f"{name}/" if pattern.endswith("/") else name)
                if names is not None and path.resolve() == root / name:
                    yield Product(kind, names.groups(), path)

    def leftovers(self) -> Iterator[Leftover]:
        """What a writer that died left beside its product, and what writers at work have there."""
        found: dict[Path, list[Path]] = {}
        for folder, folders, files in os.walk(self.root):
            for name in folders + files:
                mark = _MARKED.fullmatch(name)
                if mark is not None:
                    found.setdefault(Path(folder, mark["product"]), []).append(Path(folder, name))
            # products hold no others; what is half made is looked at from outside
            folders[:] = [name for name in folders if not _CLOSED.search(name)]
        for product, litter in sorted(found.items()):
            held = _is_locked(product)
            # a writer may have ended since
            if there := tuple(sorted(file for file in litter if held or os.path.lexists(file))):
                yield Leftover(product, there, held)


# what can lie where; each kind is a method of Store that takes the parts that the stars stand for
_PLACES = {
    "slide": "slides/*/",
    "patch_table": "patch_tables/*.parquet",
    "patch_task": "patch_tasks/*/",
    "encoder": "encoders/*/",
    "training": "encoders/.*.training.pt",
    "probe": "probes/*.parquet",
    "grid": "grids/*/*.zarr",
    "map": "maps/*/*/",
    "folds": "models/*/folds.parquet",
    "model": "models/*/*/",
    "explanations": "explanations/*/*/",
}
_MARKED = re.compile(r"\.(new|old|lock)\.(?P<product>.+)")
_CLOSED = re.compile(r"\.zarr$|^\.(new|old)\.|^(mlflow|dagster)$")


@dataclass(frozen=True)
class Product:
    """Something in the store.

    Attributes
    ----------
    kind
        The method of :class:`Store` that gives its place.
    names
        What that method takes: a slide, an encoder, ...
    """

    kind: str
    names: tuple[str, ...]
    path: Path

    def __str__(self) -> str:
        return f"{self.kind} {'|'.join(self.names)}"


@dataclass(frozen=True)
class Leftover:
    """Temporary files beside a product; ``held``: a living writer is at it."""

    product: Path
    files: tuple[Path, ...]
    held: bool

    def clear(self) -> None:
        """Remove the files, as the product's next writer would.

        Raises
        ------
        StoreBusyError
            There is a writer after all.
        """
        with exclusive(self.product, wait=False):
            pass


def remove(path: Path) -> None:
    """Remove a product; a reader finds it whole or not at all.

    Raises
    ------
    StoreBusyError
        Somebody is writing it.
    """
    with exclusive(path, wait=False), _naming(path):
        old = _beside(path, "old")
        os.replace(path, old)
        _remove(old)


class StoreError(Exception):
    """A product cannot be written; says which, why, and what to do about it."""

    def __init__(self, path: str | Path, reason: str, remedy: str) -> None:
        self.path = Path(path)
        self.reason = reason
        self.remedy = remedy
        # all three as args: an exception is rebuilt from them when it crosses processes
        super().__init__(str(path), reason, remedy)

    def __str__(self) -> str:
        return f"{self.path}: cannot be written ({self.reason}); {self.remedy}"


class StoreBusyError(StoreError):
    """Somebody else is writing the product."""


@contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Be the only writer of a product, among threads and processes, and among machines as far as
    the locks of their file system reach.

    :func:`whole_file` and :func:`whole_folder` hold it while they write. Who also wants the
    making of a product to happen once takes it around looking, making and writing; a thread
    that holds it already is let through. The system gives it back when a process dies.

    Parameters
    ----------
    wait : bool
        Wait for another writer to be done; else refuse.

    Raises
    ------
    StoreBusyError
        There is another writer (unless ``wait``).
    StoreError
        The folder cannot be written, or its file system has no locks.
    """
    product = path.parent.resolve() / path.name
    held: set[Path] = _held.__dict__.setdefault("products", set())
    if product in held:
        yield
        return
    lock = product.with_name(f".lock.{path.name}")
    with _naming(path):
        product.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = _locked(lock, wait)
        except BlockingIOError as error:
            raise StoreBusyError(path, "another process is at it", "run again later") from error
    held.add(product)
    try:
        with _naming(path):
            for litter in (_beside(product, "new"), _beside(product, "old")):
                _remove(litter)
        yield
    finally:
        held.discard(product)
        lock.unlink(missing_ok=True)
        fcntl.flock(file, fcntl.LOCK_UN)  # a forked child may hold the file open for longer
        os.close(file)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it into place if the block succeeds.

    Raises
    ------
    StoreError
        The disk is full, or the place cannot be written.
    """
    with exclusive(path), _naming(path):
        temporary = _beside(path, "new")
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a new temporary folder beside ``path``; if the block succeeds it takes its place.

    Linux swaps the two in one system call. Where it cannot (other systems, some network file
    systems) there is none for an instant.

    Raises
    ------
    StoreError
        The disk is full, or the place cannot be written.
    """
    with exclusive(path), _naming(path):
        temporary, old = _beside(path, "new"), _beside(path, "old")
        temporary.mkdir()
        try:
            yield temporary
            if not path.exists():
                os.replace(temporary, path)
            elif not _swap(temporary, path):
                os.replace(path, old)
                os.replace(temporary, path)
        finally:
            for litter in (temporary, old):
                shutil.rmtree(litter, ignore_errors=True)


_held = threading.local()
_REMEDIES = {
    code: remedy
    for remedy, codes in {
        "make room and run again": (errno.ENOSPC, errno.EDQUOT),
        "choose a place that you may write to": (errno.EACCES, errno.EPERM, errno.EROFS),
        "a file is where a folder must be: choose another place": (errno.EEXIST, errno.ENOTDIR),
        "keep it on a file system with locks (flock)": (
            errno.ENOLCK,
            errno.EOPNOTSUPP,
            errno.ENOSYS,
        ),
        "check the disk": (errno.EIO, errno.ESTALE),
    }.items()
    for code in codes
}


def _beside(path: Path, kind: str) -> Path:
    # the suffix stays last: writers choose their format by it
    return path.with_name(f".{kind}.{path.name}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Faults of the disk name the product and say what to do."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        raise StoreError(path, os.strerror(error.errno or 0), remedy) from error


def _locked(path: Path, wait: bool) -> int:
    """Descriptor of a lock file that this thread has locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the writer before removes its lock file: one that is gone locks nothing
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except OSError:
            os.close(file)
            raise
        os.close(file)


def _is_locked(path: Path) -> bool:
    """Whether a writer holds a product's lock; asking is over before another could notice."""
    try:
        file = os.open(path.with_name(f".lock.{path.name}"), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _swap(first: Path, second: Path) -> bool:
    """Exchange two folders in one system call; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if not rename(here, os.fsencode(first), here, os.fsencode(second), exchange):
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))

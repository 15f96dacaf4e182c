"""Slides in object stores: the same pixels as on a disk, in few requests, and never wrong ones."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from nic_core import object_stores
from nic_core.object_stores import ChangedError, RemoteError, RemoteUnavailableError
from nic_core.slides import SlideError, content_identity, local_copies, open_slide, remote
from nic_core.slides.files import SlideFiles, files_of_slide
from nic_core.slides.folders import find_slide_files
from nic_core.slides.remote import RemotePath, slide_path
from tests.object_stores.conftest import Bucket
from tests.object_stores.servers import WebServer
from tests.slides import vendors
from tests.slides.conftest import paint, write_tiff
from tests.slides.test_slide_vendors import FORMATS


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of 7 MB with a pyramid of JPEG tiles, as scanners write it."""
    path = tmp_path_factory.mktemp("slide") / "slide.tif"
    options = {"compression": "jpeg", "Q": 95, "tile_width": 256, "tile_height": 256}
    return write_tiff(path, paint(2100, 2600), mpp=0.5, **options)


def served(web: WebServer, file: Path) -> RemotePath:
    shutil.copy(file, web.folder / file.name)
    path = slide_path(f"{web.url}/{file.name}")
    assert isinstance(path, RemotePath)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_a_remote_slide_is_read_as_the_local_one(bucket: Bucket, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    local = FORMATS[name].write(folder)
    bucket.put_tree(folder)
    with (
        open_slide(local) as here,
        open_slide(bucket.folder / local.relative_to(folder).as_posix()) as there,
    ):
        assert there.engine == here.engine
        for field in ("mpp", "mpp_source", "scanner", "levels", "bounds", "images", "associated"):
            assert getattr(there, field) == getattr(here, field)
        region = (30, 20, 300, 250)
        for mpp in (here.mpp, 3.3 * here.mpp):
            np.testing.assert_array_equal(there.read(*region, mpp), here.read(*region, mpp))
        np.testing.assert_array_equal(there.thumbnail(200), here.thumbnail(200))


def test_any_file_of_a_remote_slide_opens_it(bucket: Bucket, tmp_path: Path) -> None:
    first = FORMATS["dicom"].write(tmp_path)
    images = {"a.ome.tif": paint(300, 400), "b.ome.tif": paint(40, 60)}
    vendors.write_ome_set(tmp_path, images, companion=True)
    bucket.put_tree(tmp_path)
    others = [p for p in first.parent.iterdir() if p != first]
    names = [*(f"{first.parent.name}/{p.name}" for p in others), first.parent.name]
    assert len({content_identity(bucket.folder / name) for name in names}) == 1
    for name in names:
        with open_slide(bucket.folder / name) as opened:
            assert opened.path == bucket.folder / first.parent.name / first.name
    with open_slide(bucket.folder / "set.companion.ome") as opened:
        assert opened.path.name == "a.ome.tif"


def test_opening_and_reading_take_few_requests(web: WebServer, slide: Path) -> None:
    path, size = served(web, slide), slide.stat().st_size
    with open_slide(path) as opened:
        assert len(web.requests) <= 12
        assert web.bytes_sent < size / 4
        web.requests.clear()
        opened.read(520, 520, 200, 200, opened.mpp)  # one tile
        assert len(web.requests) == 1
        assert web.bytes_sent < 100_000
        web.requests.clear()
        opened.read(0, 0, 2048, 2048, opened.mpp)  # 64 tiles in 8 rows
        assert len(web.requests) <= 8
        web.requests.clear()
        opened.read(0, 0, 2048, 2048, opened.mpp)
        assert not web.requests  # decoded tiles are kept


def test_identity_reads_samples_and_follows_the_etag(
    bucket: Bucket, web: WebServer, slide: Path
) -> None:
    path = served(web, slide)
    first = content_identity(path)
    assert web.bytes_sent < 1e6 < slide.stat().st_size
    assert content_identity(path) == first
    # a byte that is in no sample
    data = bytearray(slide.read_bytes())
    data[len(data) // 33 + 100_000] ^= 1
    (web.folder / slide.name).write_bytes(data)
    remote.forget()
    assert content_identity(path) != first
    one, two = bucket.put(slide, "a.tif"), bucket.put(slide, "b.tif")
    assert content_identity(one) == content_identity(two)


@pytest.mark.parametrize("fault", ["503", "cut", "other range", "short", "late"])
def test_a_failed_answer_is_asked_for_again(web: WebServer, slide: Path, fault: str) -> None:
    path = served(web, slide)
    with open_slide(slide) as here:
        expected = here.read(100, 100, 900, 900, here.mpp)
    web.faults.extend([fault, "", fault])
    with open_slide(path) as there:
        web.faults.extend([fault, "", fault])
        np.testing.assert_array_equal(there.read(100, 100, 900, 900, there.mpp), expected)
    assert not web.faults


@pytest.mark.parametrize("fault", ["503", "cut", "other range"])
def test_a_server_that_keeps_failing_is_an_error_of_its_own(
    web: WebServer, slide: Path, fault: str
) -> None:
    path = served(web, slide)
    with open_slide(path) as there:
        web.faults.extend([fault] * 100)
        with pytest.raises(RemoteUnavailableError, match=f"{path}: .*run it again"):
            there.read(100, 100, 900, 900, there.mpp)
        web.faults.clear()
        assert there.read(100, 100, 900, 900, there.mpp).shape == (900, 900, 3)
    remote.forget()
    web.faults.extend([fault] * 100)
    # not a SlideError: cells would count as undecodable, and a step would not be tried again
    with pytest.raises(RemoteUnavailableError):
        open_slide(path)


def test_a_server_without_ranges_is_named(web: WebServer, slide: Path) -> None:
    path = served(web, slide)
    web.faults.extend(["whole"] * 100)
    with pytest.raises(SlideError, match="does not send ranges of a file; use a server that does"):
        open_slide(path)


@pytest.mark.parametrize("etags", [True, False], ids=["ETag", "time and size only"])
def test_a_slide_that_is_replaced_while_it_is_read_is_refused(
    web: WebServer, slide: Path, tmp_path: Path, etags: bool
) -> None:
    web.etags = etags
    path = served(web, slide)
    pixels = paint(2100, 2600, seed=5)
    other = write_tiff(tmp_path / "other.tif", pixels, mpp=0.5, compression="jpeg")
    with open_slide(path) as there:
        shutil.copy(other, web.folder / slide.name)
        os.utime(web.folder / slide.name, (1e9, 1e9))
        with pytest.raises(ChangedError, match="removed while it was read; run it again"):
            there.read(100, 100, 900, 900, there.mpp)
    with open_slide(path) as there, open_slide(other) as here:
        np.testing.assert_array_equal(there.thumbnail(300), here.thumbnail(300))
    with open_slide(path) as there:
        (web.folder / slide.name).unlink()
        with pytest.raises(ChangedError):
            there.read(1500, 1500, 500, 500, there.mpp)


def test_damaged_and_missing_remote_slides_are_refused(
    bucket: Bucket, slide: Path, tmp_path: Path
) -> None:
    data = slide.read_bytes()
    cases = {"cut.tif": data[: len(data) // 2], "empty.tif": b"", "text.svs": b"text" * 100}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SlideError) as local:
            open_slide(tmp_path / name)
        path = bucket.put_bytes(name, content)
        with pytest.raises(SlideError) as found:
            open_slide(path)
        assert (found.value.slide, found.value.reason) == (str(path), local.value.reason)
    with pytest.raises(SlideError, match="none.tif: cannot be read .No such file"):
        open_slide(bucket.folder / "none.tif")
    with pytest.raises(SlideError, match="is a folder; give"):
        open_slide(bucket.folder)


def test_a_denied_access_names_the_variables(bucket: Bucket, slide: Path, monkeypatch) -> None:
    path = bucket.put(slide)
    remote.forget()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    remote.connect.cache_clear()
    with pytest.raises(SlideError, match="denies the access; check AWS_ACCESS_KEY_ID"):
        open_slide(path)


def test_a_bucket_lists_what_a_local_folder_does(bucket: Bucket, tmp_path: Path) -> None:
    for name in ("svs", "mirax", "dicom", "ome-zarr 0.5 yxc"):
        folder = tmp_path / name.partition(" ")[0]
        folder.mkdir()
        FORMATS[name].write(folder)
    (tmp_path / "notes.txt").write_text("no slide")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "a.svs").write_bytes(b"x")
    (tmp_path / "lost.zarr").mkdir()
    (tmp_path / "lost.zarr" / "0").write_bytes(b"x")
    bucket.put_tree(tmp_path)
    bucket.put_bytes("svs/", b"")  # as the consoles of buckets store a folder

    def names(root: Path | RemotePath) -> tuple[list[str], list[tuple[str, str]]]:
        slides, left = find_slide_files(root)
        return (
            [str(slide.path.relative_to(root)) for slide in slides],
            sorted((str(item.path.relative_to(root)), item.reason) for item in left),
        )

    assert names(bucket.folder) == names(tmp_path)
    assert len(names(tmp_path)[0]) == 4


def test_a_local_copy_is_made_once_and_removed_when_room_is_needed(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = tmp_path / "copies"
    source = FORMATS["ndpi"].write(tmp_path)
    one, two = bucket.put(source, "one.ndpi"), bucket.put(source, "two.ndpi")
    monkeypatch.setenv("NIC_SLIDE_CACHE_GB", str(1.5 * source.stat().st_size / 1e9))

    def copied() -> list[str]:
        return sorted(path.name for path in copies.rglob("*.ndpi"))

    with open_slide(one) as opened:
        assert "from a local copy" in opened.engine_reason
        assert copied() == ["one.ndpi"]
        with open_slide(one):
            assert copied() == ["one.ndpi"]
        # the copy that is in use stays, and the other slide does not fit beside it
        with pytest.raises(RemoteUnavailableError, match="raise NIC_SLIDE_CACHE_GB"):
            open_slide(two)
        assert copied() == ["one.ndpi"]
    with open_slide(two):
        assert copied() == ["two.ndpi"]
    monkeypatch.setenv("NIC_SLIDE_CACHE_GB", "1e-6")
    with pytest.raises(RemoteError, match="two.ndpi: .*; raise NIC_SLIDE_CACHE_GB"):
        open_slide(two)


def test_copies_that_are_being_made_count_in_full(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FORMATS["ndpi"].write(tmp_path)
    one, two = bucket.put(source, "one.ndpi"), bucket.put(source, "two.ndpi")
    monkeypatch.setenv("NIC_SLIDE_CACHE_GB", str(1.5 * source.stat().st_size / 1e9))
    copy = local_copies._copy

    def open_another(found: remote.RemoteObject, target: Path) -> None:
        monkeypatch.setattr(local_copies, "_copy", copy)
        with pytest.raises(RemoteUnavailableError, match="of local copies are in use"):
            open_slide(two)
        copy(found, target)

    monkeypatch.setattr(local_copies, "_copy", open_another)
    with open_slide(one) as opened:
        assert "from a local copy" in opened.engine_reason


def test_a_copy_that_fails_leaves_nothing_and_says_why(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bucket.put(FORMATS["ndpi"].write(tmp_path), "slide.ndpi")

    def fails(found: remote.RemoteObject, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(local_copies, "_copy", fails)
        with pytest.raises(RemoteError, match="slide.ndpi: .*No space left.*; free some space, or"):
            open_slide(path)
    assert not list((tmp_path / "copies").rglob("*.ndpi"))
    with open_slide(path) as opened:
        assert "from a local copy" in opened.engine_reason


def test_a_replaced_slide_is_copied_anew(bucket: Bucket, tmp_path: Path) -> None:
    first = vendors.write_ndpi(tmp_path / "a.ndpi", [paint(256, 256)], 0.5, macro=paint(64, 128))
    other = vendors.write_ndpi(tmp_path / "b.ndpi", [paint(256, 256, 1)], 0.5, macro=paint(64, 128))
    path = bucket.put(first, "slide.ndpi")
    with open_slide(path) as opened:
        before = opened.read(0, 0, 256, 256, 0.5)
    bucket.put(other, "slide.ndpi")
    remote.forget()
    with open_slide(path) as opened, open_slide(other) as here:
        after = opened.read(0, 0, 256, 256, 0.5)
        np.testing.assert_array_equal(after, here.read(0, 0, 256, 256, 0.5))
    assert (after != before).any()


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("s3://bucket//slide.svs", "empty part"),
        ("s3://bucket/../slide.svs", "empty part"),
        ("s3://", "empty part"),
        ("https://host/slide.svs?signature=1", "a query or a login"),
        ("https://me:secret@host/slide.svs", "a query or a login"),
    ],
)
def test_addresses_that_cannot_be_stored_are_refused(address: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        slide_path(address)


def test_addresses_are_paths_with_a_scheme() -> None:
    path = slide_path("S3://bucket/a b/slide.ome.tif")
    assert str(path) == "s3://bucket/a b/slide.ome.tif"
    assert (path.name, path.suffix) == ("slide.ome.tif", ".tif")
    assert str(path.parent) == "s3://bucket/a b"
    assert slide_path(str(path)) == path == pickle.loads(pickle.dumps(path))
    assert path.with_suffix(".mrxs") == slide_path("s3://bucket/a b/slide.ome.mrxs")
    assert path.relative_to(slide_path("s3://bucket")).as_posix() == "a b/slide.ome.tif"
    assert slide_path("data/a.svs") == Path("data/a.svs")


def test_files_of_an_http_server_are_named_one_by_one(web: WebServer, slide: Path) -> None:
    path = served(web, slide)
    with open_slide(str(path)) as opened:
        assert opened.width == 2600
    with pytest.raises(RemoteError, match="does not list the files of a folder; name the files"):
        find_slide_files(path.parent)


def test_a_slide_is_not_left_out_because_its_server_fails(
    web: WebServer, slide: Path, monkeypatch
) -> None:
    path = served(web, slide)
    web.faults.extend(["cut"] * 100)
    with pytest.raises(RemoteUnavailableError):
        files_of_slide(path)
    web.faults.clear()
    assert files_of_slide(path) == SlideFiles(path)


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    object_stores.connect.cache_clear()
    for name in ("obstore", "obstore.exceptions", "obstore.store"):
        monkeypatch.setitem(sys.modules, name, None)
    for address in ("s3://bucket/a.tif", "https://host/a.tif"):
        with pytest.raises(SlideError, match=r"not installed; install it: pip install .*\[s3\]"):
            open_slide(address)

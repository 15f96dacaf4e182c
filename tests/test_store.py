"""Atomic writes, locks, and the layout of the store."""

import ast
import ctypes
import errno
import fcntl
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import polars as pl
import pytest

from nic_core.store import (
    GridKey,
    MapKey,
    ModelKey,
    PatchTableKey,
    PatchTaskKey,
    PredictionKey,
    Product,
    Store,
    StoreBusyError,
    StoreError,
    atomic,
    atomic_file,
    atomic_folder,
    exclusive_lock,
    file_systems,
    lock_problem,
    remove_product,
)
from nic_core.store.layout import Key


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "a" / "table.parquet"
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.suffix == ".parquet"
    assert path.read_text() == "half"
    assert [p.name for p in path.parent.iterdir()] == ["table.parquet"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "table.parquet"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.parquet"]


def test_a_folder_is_replaced_atomically(tmp_path):
    path = tmp_path / "grid.zarr"
    for content in ("first", "second"):
        with atomic_folder(path) as temporary:
            (temporary / content).write_text(content)
    assert [p.name for p in path.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["grid.zarr"]


def test_a_failed_write_keeps_the_old_folder(tmp_path):
    path = tmp_path / "grid.zarr"
    with atomic_folder(path) as temporary:
        (temporary / "chunk").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(path) as temporary:
        (temporary / "chunk").write_text("new")
        raise RuntimeError
    assert (path / "chunk").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["grid.zarr"]


def test_the_environment_gives_the_root_of_the_store(tmp_path, monkeypatch):
    monkeypatch.setenv("NIC_STORE", str(tmp_path))
    store = Store.from_environment()
    assert (
        store.grid(GridKey(encoder="mtl-4", slide="s1")) == tmp_path / "grids" / "mtl-4" / "s1.zarr"
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


processes = multiprocessing.get_context("spawn")


def hold(path, ready):
    """A writer that does not finish."""
    with atomic_folder(path) as temporary:
        (temporary / "half").write_text("half")
        ready.set()
        time.sleep(600)


@pytest.fixture
def writer(tmp_path):
    """Another process in the middle of writing ``grid.zarr``."""
    ready = processes.Event()
    process = processes.Process(target=hold, args=(tmp_path / "grid.zarr", ready), daemon=True)
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_lock_of_another_process_is_respected(tmp_path, writer):
    path = tmp_path / "grid.zarr"
    before = names(tmp_path)
    with (
        pytest.raises(
            StoreBusyError,
            match=rf"grid.zarr: .*another process has locked it: process {writer.pid} on "
            rf"{re.escape(socket.gethostname())} since \d{{4}}-",
        ),
        exclusive_lock(path, wait=False),
    ):
        pass
    assert names(tmp_path) == before
    assert (tmp_path / ".new.grid.zarr" / "half").exists()
    with exclusive_lock(tmp_path / "other.zarr", wait=False):
        pass


def test_a_writer_waits_and_removes_files_of_a_killed_writer(tmp_path, writer):
    path = tmp_path / "grid.zarr"
    killer = threading.Timer(0.2, writer.kill)
    killer.start()
    with atomic_folder(path) as temporary:
        assert names(temporary) == []
        (temporary / "chunk").write_text("new")
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert names(tmp_path) == ["grid.zarr"]
    assert names(path) == ["chunk"]


def test_a_waiting_writer_logs_the_holder_of_the_lock(tmp_path, writer, monkeypatch, caplog):
    monkeypatch.setattr(atomic, "WAITING_LOGGED_AFTER", 0.0)
    caplog.set_level("INFO", logger="nic_core")
    killer = threading.Timer(0.2, writer.kill)
    killer.start()
    with exclusive_lock(tmp_path / "grid.zarr"):
        [line] = caplog.messages
    assert (
        f"waiting for grid.zarr, which another process has locked: process {writer.pid} on" in line
    )


def test_leftovers_of_an_interrupted_replacement_are_removed(tmp_path):
    path = tmp_path / "table.parquet"
    path.write_text("complete")
    (tmp_path / ".old.table.parquet").mkdir()
    (tmp_path / ".new.table.parquet").write_text("half")
    (tmp_path / ".new.other.parquet").write_text("file of another product")
    with exclusive_lock(path):
        pass
    assert names(tmp_path) == [".new.other.parquet", "table.parquet"]


def test_writers_in_threads_exclude_each_other(tmp_path):
    path = tmp_path / "count"
    path.write_text("0")

    def work():
        for _ in range(50):
            with exclusive_lock(path):
                count = int(path.read_text())
                with atomic_file(path) as temporary:  # a thread may take its own lock again
                    temporary.write_text(str(count + 1))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() == "300"
    assert names(tmp_path) == ["count"]


def replace_often(path, times):
    for number in range(times):
        with atomic_folder(path) as temporary:
            (temporary / "number").write_text(str(number))


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux exchanges folders in one system call"
)
def test_a_folder_exists_at_every_moment_of_its_replacement(tmp_path):
    path = tmp_path / "grid.zarr"
    replace_often(path, 1)
    process = threading.Thread(target=replace_often, args=(path, 300))
    process.start()
    checks = 0
    while process.is_alive():
        assert path.exists()
        checks += 1
    assert checks > 100


def test_a_folder_is_replaced_on_systems_without_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr("nic_core.store.atomic._exchange", lambda first, second: False)
    replace_often(tmp_path / "grid.zarr", 3)
    assert (tmp_path / "grid.zarr" / "number").read_text() == "2"
    assert names(tmp_path) == ["grid.zarr"]


def test_a_file_system_without_locks_is_an_error(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(StoreError, match=r"table.parquet: .*with locks \(flock\)"),
        atomic_file(tmp_path / "table.parquet"),
    ):
        pass


def test_a_full_disk_is_one_error_and_keeps_the_old_product(mount):
    folder = mount("size=64k")
    path = folder / "grid.zarr"
    replace_often(path, 1)
    with (
        pytest.raises(StoreError, match=r"grid.zarr: .*No space left on device.*free some space"),
        atomic_folder(path) as temporary,
    ):
        (temporary / "large").write_bytes(bytes(100_000))
    assert (path / "number").read_text() == "0"
    assert names(folder) == ["grid.zarr"]


@pytest.mark.parametrize("write", ["write_parquet", "write_csv"])
def test_a_full_disk_is_recognised_in_errors_of_polars(mount, write):
    path = mount("size=64k") / "table"
    table = pl.DataFrame({"number": range(100_000)})
    with (
        pytest.raises(StoreError, match=r"table: .*No space left on device.*free some space"),
        atomic_file(path) as temporary,
    ):
        getattr(table, write)(temporary)
    assert names(path.parent) == []


def test_an_error_of_a_library_about_a_full_disk_is_translated(tmp_path):
    with (
        pytest.raises(StoreError, match=r"table: .*No space left.*free some space"),
        atomic_file(tmp_path / "table"),
    ):
        raise RuntimeError("io: No space left on device (os error 28)")


def test_a_read_only_file_system_is_one_error(mount):
    folder = mount("ro")
    with (
        pytest.raises(StoreError, match=r"grid.zarr: .*Read-only file system.*write permission"),
        atomic_folder(folder / "grid.zarr"),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_without_write_permission_is_one_error(tmp_path):
    tmp_path.chmod(0o555)
    with (
        pytest.raises(StoreError, match=r"Permission denied.*write permission"),
        atomic_file(tmp_path / "table.parquet"),
    ):
        pass


def test_a_file_instead_of_a_folder_is_one_error(tmp_path):
    (tmp_path / "grids").write_text("")
    with (
        pytest.raises(StoreError, match="a file exists where a folder is needed"),
        atomic_folder(tmp_path / "grids" / "s.zarr"),
    ):
        pass


def test_errors_inside_the_block_are_not_changed(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "table.parquet"):
        (tmp_path / "gone").read_text()
    assert names(tmp_path) == []


def put(path):
    """Write a product: a file, or a folder with a file."""
    if path.suffix in (".parquet", ".pt", ".json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    else:
        path.mkdir(parents=True)
        (path / "part").write_text("x")


EVERY: dict[str, Key] = {
    "slide": "s1",
    "patch_table": PatchTableKey(geometry="128px-0.5um", slide="s1"),
    "patch_task": PatchTaskKey(geometry="128px-1um", task="nodes"),
    "encoder": "mtl",
    "encoder_probe": "mtl",
    "grid": GridKey(encoder="mtl", slide="s1"),
    "grid_manifest": "mtl",
    "embedding_colours": "mtl",
    "grid_preview": GridKey(encoder="mtl", slide="s1"),
    "target_folds": "growth",
    "target_grids": ModelKey(encoder="mtl", target="growth"),
    "slide_model": ModelKey(encoder="mtl", target="growth"),
    "explanation": ModelKey(encoder="mtl", target="growth"),
    "champion": "growth",
    "prediction_plan": "growth",
    "prediction": PredictionKey(champion="growth", slide="s1"),
    "probability_map": MapKey(map="tumour", slide="s1"),
    "map_scores": "tumour",
}


def test_the_store_lists_the_product_of_every_asset(tmp_path):
    store = Store(tmp_path)
    for asset, key in EVERY.items():
        put(getattr(store, asset)(key))
    assert list(store.products()) == [
        Product(asset, key, getattr(store, asset)(key)) for asset, key in EVERY.items()
    ]


def test_finished_folds_are_an_incomplete_slide_model(tmp_path):
    store, key = Store(tmp_path), ModelKey(encoder="mtl", target="growth.2")
    (store.slide_model_checkpoint(key) / "fold-0").mkdir(parents=True)
    path = store.slide_model_checkpoint(key)
    assert list(store.products()) == [Product("slide_model", key, path, complete=False)]


def test_a_checkpoint_is_an_incomplete_encoder(tmp_path):
    store = Store(tmp_path)
    put(store.encoder_checkpoint("mtl"))
    checkpoint = Product("encoder", "mtl", store.encoder_checkpoint("mtl"), complete=False)
    assert list(store.products()) == [checkpoint]


def test_files_outside_the_layout_are_not_listed(tmp_path):
    store = Store(tmp_path)
    for place in (
        "slide_index/slides.parquet",
        "slides/.new.s1",
        "grids/mtl/notes",
        "grids/mtl/.old.s1.zarr",
        "evaluation_report",
        "quality_report",
        "mlflow/artifacts",
        "dagster/storage",
        "mine/grids/mtl/s1.zarr",
    ):
        put(tmp_path / place)
    assert list(store.products()) == []


def test_a_removed_product_leaves_no_files(tmp_path):
    store = Store(tmp_path)
    for asset in ("grid", "target_folds"):
        path = getattr(store, asset)(EVERY[asset])
        put(path)
        remove_product(path)
        assert names(path.parent) == []


def test_a_product_that_is_being_written_is_not_removed(tmp_path, writer):
    replace_often(tmp_path / "other.zarr", 1)
    with pytest.raises(StoreBusyError):
        remove_product(tmp_path / "grid.zarr")


def test_leftovers_are_distinguished_from_files_of_live_writers(tmp_path, writer):
    [live] = Store(tmp_path).leftovers()
    assert live.locked
    assert live.product == tmp_path / "grid.zarr"
    with pytest.raises(StoreBusyError):
        live.remove()
    writer.kill()
    writer.join()
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / ".new.cells").write_text("half")
    leftovers = list(Store(tmp_path).leftovers())
    assert [(item.product.name, item.locked) for item in leftovers] == [
        ("grid.zarr", False),
        ("cells", False),
    ]
    assert [file.name for file in leftovers[0].files] == [".lock.grid.zarr", ".new.grid.zarr"]
    for item in leftovers:
        item.remove()
    assert names(tmp_path) == ["maps"]
    assert names(tmp_path / "maps") == []


def test_a_store_path_is_never_a_pattern_of_parquet_files():
    root = Path(__file__).parents[1]
    for path in (
        p for package in ("nic_core", "nic_assets") for p in (root / package).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pl.read_parquet":
                assert "glob=False" in ast.unparse(node), f"{path}:{node.lineno}"


# --- shared file systems ---------------------------------------------------------------------


@pytest.fixture
def without_exchange(monkeypatch):
    """``renameat2`` as on file systems that cannot exchange, with one of their error numbers."""

    def refuse(number):
        class Library:
            def renameat2(self, *_):
                ctypes.set_errno(number)
                return -1

        monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: Library())

    return refuse


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_missing_exchange_of_folders_is_logged_and_done_without(
    tmp_path, without_exchange, number, caplog
):
    without_exchange(number)
    path = tmp_path / "grid.zarr"
    for content in ("old", "new", "newest"):
        with atomic_folder(path) as temporary:
            (temporary / "content").write_text(content)
    assert (path / "content").read_text() == "newest"
    assert [file.name for file in tmp_path.iterdir()] == ["grid.zarr"]
    [record] = caplog.records
    assert str(tmp_path) in record.message
    assert "cannot exchange two folders" in record.message


def test_another_fault_of_an_exchange_is_an_error(tmp_path, without_exchange):
    path = tmp_path / "grid.zarr"
    path.mkdir()
    without_exchange(errno.EIO)
    with pytest.raises(StoreError, match="check the disk"), atomic_folder(path):
        pass
    assert path.is_dir()


def test_a_product_is_put_back_if_its_replacement_fails_half_way(
    tmp_path, without_exchange, monkeypatch
):
    path = tmp_path / "grid.zarr"
    path.mkdir()
    (path / "content").write_text("old")
    without_exchange(errno.EINVAL)
    rename = os.replace

    def fail_second(source, target):
        if Path(source).name.startswith(".new."):
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(atomic.os, "replace", fail_second)
    with pytest.raises(StoreError, match="check the disk"), atomic_folder(path) as temporary:
        (temporary / "content").write_text("new")
    assert (path / "content").read_text() == "old"


def test_a_product_whose_writer_was_killed_half_way_is_put_back(tmp_path):
    (tmp_path / ".old.grid.zarr").mkdir()
    (tmp_path / ".old.grid.zarr" / "content").write_text("old")
    (tmp_path / ".new.grid.zarr").mkdir()
    with exclusive_lock(tmp_path / "grid.zarr"):
        assert (tmp_path / "grid.zarr" / "content").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["grid.zarr"]


def test_a_product_whose_removal_was_interrupted_stays_removed(tmp_path, monkeypatch):
    path = tmp_path / "grid.zarr"
    path.mkdir()

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            remove_product(path)
    with exclusive_lock(path):
        assert not path.exists()


MOUNTINFO = r"""22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
40 22 0:40 / /data rw,relatime shared:5 - nfs4 host:/data rw,vers=4.2,local_lock=none
41 22 0:41 / /old\040nas rw,relatime - nfs nas:/v rw,vers=3,nolock,local_lock=all
42 22 0:42 / /scratch rw - lustre mds@tcp:/scratch rw,flock,lazystatfs
43 42 0:43 / /scratch/local rw - lustre mds@tcp:/scratch rw,localflock
44 22 0:44 / /home/me/bucket rw,nosuid - fuse.sshfs me@host: rw,user_id=0
45 40 0:45 / /data/tmp rw - nfs4 host:/tmp rw,local_lock=flock
46 40 0:46 / /data/tmp rw - tmpfs tmpfs rw"""


@pytest.mark.parametrize(
    ("folder", "problem"),
    [
        ("/store", None),
        ("/data/study/store", None),
        ("/scratch/store", None),
        ("/data/tmp/store", None),  # the later of two mounts at one point
        ("/old nas/store", r"/old nas \(nfs\) is mounted with local_lock=all, nolock: .* only"),
        ("/scratch/local/store", r"localflock: .* mount it with flock"),
        ("/home/me/bucket/store", "does not pass locks to other machines"),
    ],
)
def test_locks_that_do_not_leave_the_machine_are_found(tmp_path, monkeypatch, folder, problem):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTINFO)
    monkeypatch.setattr(file_systems, "MOUNTS", mounts)
    found = lock_problem(Path(folder))
    assert re.search(problem, found) if problem else found is None


def test_the_mounts_of_this_machine_are_read():
    if not file_systems.MOUNTS.exists():
        pytest.skip("only Linux has /proc/self/mountinfo")
    mounts = file_systems.parse_mounts(file_systems.MOUNTS.read_text())
    assert file_systems.mount_of(Path("/proc/self"), mounts).kind == "proc"

"""Dagster's records in SQLite files or on a PostgreSQL server, by one setting."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from nic_assets.partitions import SLIDES

ROOT = Path(__file__).parents[2]


@dg.asset(partitions_def=SLIDES)
def mask() -> None: ...


def programs() -> Path | None:
    """The folder of PostgreSQL's server programs, which Debian keeps out of PATH."""
    found = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return Path(found).parent if found else folders[-1] if folders else None


@pytest.fixture
def server() -> Iterator[str]:
    """The URL of a PostgreSQL server that lives as long as the test."""
    pytest.importorskip("dagster_postgres", reason="the extra 'postgres' is not installed")
    import psycopg2

    folder = programs()
    if folder is None:
        pytest.skip("no PostgreSQL server is installed")
    # it refuses to run as root; Debian's package brings a user for it
    user = "postgres" if os.getuid() == 0 else None
    home = Path(tempfile.mkdtemp(prefix="nic-postgres-"))
    if user:
        shutil.chown(home, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        subprocess.run(
            [folder / "initdb", "-D", home / "data", "-A", "trust", "-U", "nic", "--no-sync"],
            user=user,
            cwd=home,
            check=True,
            capture_output=True,
        )
        options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(home), "-c", "fsync=off"]
        process = subprocess.Popen(
            [folder / "postgres", "-D", home / "data", *options],
            user=user,
            cwd=home,
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"postgresql://nic:sesame@127.0.0.1:{port}/postgres"
            while True:
                try:
                    psycopg2.connect(url).close()
                    break
                except psycopg2.OperationalError:
                    assert process.poll() is None, "the PostgreSQL server did not start"
                    time.sleep(0.05)
            yield url
        finally:
            process.terminate()
            process.wait()
    finally:
        shutil.rmtree(home)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home with the project's own ``dagster.yaml``."""
    shutil.copy(ROOT / "dagster.yaml", tmp_path)
    monkeypatch.setenv("NIC_DAGSTER_STORAGE", str(tmp_path / "records"))
    monkeypatch.delenv("NIC_DAGSTER_POSTGRES", raising=False)
    return tmp_path


def remember(instance: dg.DagsterInstance) -> None:
    """A run, a partition and a pool."""
    instance.add_dynamic_partitions(SLIDES.name, ["s1"])
    assert dg.materialize([mask], instance=instance, partition_key="s1").success
    instance.event_log_storage.set_concurrency_slots("gpu", 2)


def remembers(instance: dg.DagsterInstance) -> bool:
    return (
        instance.get_materialized_partitions(mask.key) == {"s1"}
        and instance.get_runs_count() == 1
        and [pool.limit for pool in instance.event_log_storage.get_pool_limits()] == [2]
    )


def test_records_are_files_in_the_store_by_default(home):
    with dg.DagsterInstance.from_config(str(home)) as instance:
        remember(instance)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        assert remembers(instance)
    assert (home / "records" / "history" / "runs.db").exists()


def test_one_setting_keeps_them_on_a_server(home, server, monkeypatch):
    monkeypatch.setenv("NIC_DAGSTER_POSTGRES", server)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        remember(instance)
        handed_on = instance.get_ref()
    assert "sesame" not in str(handed_on)
    with dg.DagsterInstance.from_ref(handed_on) as instance:
        assert remembers(instance)
    assert not list(home.rglob("*.db"))


@pytest.mark.parametrize("url", ["mysql://u:pw@h/name", "postgresql:/u:pw@h", "u:pw@h:5432/name"])
def test_another_kind_of_url_is_refused_without_repeating_it(home, monkeypatch, url):
    monkeypatch.setenv("NIC_DAGSTER_POSTGRES", url)
    with pytest.raises(dg.DagsterInvalidDefinitionError, match="is no URL such as") as refused:
        dg.DagsterInstance.from_config(str(home))
    assert "pw" not in str(refused.value)


def test_a_missing_driver_names_its_extra(home, monkeypatch):
    monkeypatch.setenv("NIC_DAGSTER_POSTGRES", "postgresql://h/name")
    monkeypatch.setitem(sys.modules, "dagster_postgres", None)
    with pytest.raises(dg.DagsterInvalidDefinitionError, match=r"pip install -e '\.\[postgres\]'"):
        dg.DagsterInstance.from_config(str(home))

"""Dagster's records in SQLite files, or on a PostgreSQL server, by the choice of the home."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml

from nic_assets.partitions import SLIDES

ROOT = Path(__file__).parents[2]
SQLITE, POSTGRES = ROOT / "dagster.yaml", ROOT / "examples" / "postgres" / "dagster.yaml"


@dg.asset(partitions_def=SLIDES)
def mask() -> None: ...


def programs() -> Path | None:
    """Return the folder of PostgreSQL's server programs, which Debian does not add to PATH."""
    found = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return Path(found).parent if found else folders[-1] if folders else None


@pytest.fixture
def server() -> Iterator[str]:
    """The URL of a PostgreSQL server that runs during the test."""
    pytest.importorskip("dagster_postgres", reason="the extra 'postgres' is not installed")
    import psycopg2

    folder = programs()
    if folder is None:
        pytest.skip("PostgreSQL is not installed")
    # PostgreSQL refuses to run as root; Debian's package creates this user
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
            address = f"nic:sesame@127.0.0.1:{port}/postgres"
            while True:
                try:
                    psycopg2.connect(f"postgresql://{address}").close()
                    break
                except psycopg2.OperationalError:
                    assert process.poll() is None, "the PostgreSQL server did not start"
                    time.sleep(0.05)
            yield f"postgresql+psycopg2://{address}"
        finally:
            process.terminate()
            process.wait()
    finally:
        shutil.rmtree(home)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty Dagster home, with the records in ``records``."""
    monkeypatch.setenv("NIC_DAGSTER_STORAGE", str(tmp_path / "records"))
    monkeypatch.delenv("NIC_DAGSTER_POSTGRES", raising=False)
    return tmp_path


def write_records(instance: dg.DagsterInstance) -> None:
    """Record a run, a partition and a pool."""
    instance.add_dynamic_partitions(SLIDES.name, ["s1"])
    assert dg.materialize([mask], instance=instance, partition_key="s1").success
    instance.event_log_storage.set_concurrency_slots("gpu", 2)


def has_records(instance: dg.DagsterInstance) -> bool:
    return (
        instance.get_materialized_partitions(mask.key) == {"s1"}
        and instance.get_runs_count() == 1
        and [pool.limit for pool in instance.event_log_storage.get_pool_limits()] == [2]
    )


def test_records_are_files_in_the_store_by_default(home):
    shutil.copy(SQLITE, home)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        write_records(instance)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        assert has_records(instance)
    assert (home / "records" / "history" / "runs.db").exists()


@pytest.mark.integration
def test_the_postgres_home_keeps_records_on_a_server(home, server, monkeypatch):
    shutil.copy(POSTGRES, home)
    monkeypatch.setenv("NIC_DAGSTER_POSTGRES", server)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        write_records(instance)
        reference = instance.get_ref()  # what Dagster passes to other processes
    assert "sesame" not in str(reference)
    with dg.DagsterInstance.from_ref(reference) as instance:
        assert has_records(instance)
    assert not list(home.rglob("*.db"))


def test_both_homes_differ_in_their_storage_only():
    sqlite, postgres = (yaml.safe_load(path.read_text()) for path in (SQLITE, POSTGRES))
    assert sqlite.pop("storage") != postgres.pop("storage")
    assert sqlite == postgres


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (None, 'environment variable "NIC_DAGSTER_POSTGRES" which is not set'),
        ("u:pw@h:5432/name", "Could not parse SQLAlchemy URL"),
    ],
)
def test_an_unusable_url_is_refused_without_its_password(home, monkeypatch, url, reason):
    pytest.importorskip("dagster_postgres", reason="the extra 'postgres' is not installed")
    shutil.copy(POSTGRES, home)
    if url is not None:
        monkeypatch.setenv("NIC_DAGSTER_POSTGRES", url)
    with pytest.raises(Exception, match=reason) as refused:
        dg.DagsterInstance.from_config(str(home))
    assert "pw" not in str(refused.value)

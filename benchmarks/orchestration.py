"""Measure the overhead of orchestration by number of slides, without any computation.

    python benchmarks/orchestration.py overhead   # per slide, in single runs and in a batch
    python benchmarks/orchestration.py ticks      # sensors, partitions, definitions
    python benchmarks/orchestration.py pages      # requests of the UI's pages to the webserver

All files are in a temporary folder (``--folder``); Dagster's storage is SQLite, or for ``ticks``
and ``pages`` an empty PostgreSQL database (``--postgres postgresql://USER:PASSWORD@HOST:PORT/NAME``).
The definitions are those of the package for a cohort of files that are no slides. Only ``overhead``
runs an asset; it does nothing. The events of ``ticks`` and ``pages`` are recorded through Dagster
for the first and the last slide, and copied for the slides between them.
"""

import argparse
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
from dagster._core.storage.event_log.schema import SqlEventLogStorageTable
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage

from nic_assets.assets.inputs import add_slides
from nic_assets.build import build_defs
from nic_assets.orchestration.batches import Events, Product, batch_asset, materialize_each
from nic_assets.orchestration.executors import chosen_executor
from nic_assets.orchestration.internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)
from nic_assets.orchestration.staleness import stale_assets
from nic_assets.partitions import SLIDES
from nic_core import steps
from nic_core.cohort import load_cohort
from nic_core.cohort.scan import scan_files
from nic_core.store import Store

ENCODERS = 9
Result = TypeVar("Result")


def timed(label: str, work: Callable[[], Result], per: int = 1) -> Result:
    """Call ``work``; print its time on the clock and that of this process, divided by ``per``."""
    start, used = time.perf_counter(), time.process_time()
    result = work()
    seconds = (time.perf_counter() - start) / per
    processor = (time.process_time() - used) / per
    each = " each" if per > 1 else ""
    print(f"{label:<68} {1000 * seconds:10,.1f} ms, processor {1000 * processor:10,.1f} ms{each}")
    sys.stdout.flush()
    return result


# --- runs ------------------------------------------------------------------------------------


@batch_asset(partitions_def=SLIDES, code_version="1")
def nothing(context: dg.AssetExecutionContext) -> Events:
    """Do nothing for each slide."""
    yield from materialize_each(context, lambda key: Product(key), parse=str, expected=())


def nothing_job() -> dg.JobDefinition:
    """Return the job; the processes of the multiprocess executor load it by this function."""
    return dg.Definitions(
        assets=[nothing],
        jobs=[dg.define_asset_job("do_nothing", selection="nothing")],
        executor=chosen_executor(),
    ).resolve_job_def("do_nothing")


def overhead(folder: Path, slides: int, postgres: str | None) -> None:
    if postgres is not None:
        raise SystemExit("overhead is measured with SQLite; leave out --postgres")
    keys = [f"s{number:06d}" for number in range(slides)]
    # the fork server of the executor loads the package's definitions
    os.environ |= {"NIC_COHORT": str(cohort_of(folder / "c", 1)), "NIC_STORE": str(folder / "s")}
    home = folder / "dagster"
    home.mkdir()
    with dg.DagsterInstance.local_temp(str(home)) as instance:
        add_slides(instance, keys)
        job = nothing_job()

        def run(first: str, last: str) -> None:
            tags = {ASSET_PARTITION_RANGE_START_TAG: first, ASSET_PARTITION_RANGE_END_TAG: last}
            assert job.execute_in_process(instance=instance, tags=tags).success

        def one_by_one() -> None:
            for key in keys[:20]:
                run(key, key)

        def processes() -> None:
            for key in keys[20:23]:
                result = dg.execute_job(
                    dg.reconstructable(nothing_job),
                    instance=instance,
                    tags={"dagster/partition": key},
                )
                assert result.success

        timed("one run per slide, in this process", one_by_one, per=20)
        timed("one run per slide, one process per step", processes, per=3)
        timed(f"one run of {slides:,} slides", lambda: run(keys[0], keys[-1]), per=slides)


# --- ticks -----------------------------------------------------------------------------------


def cohort_of(folder: Path, slides: int) -> Path:
    """Write a cohort of slide files without an image, and nine encoders; return the cohort file."""
    (folder / "wsi").mkdir(parents=True)
    for number in range(slides):
        (folder / "wsi" / f"s{number:06d}.tif").write_text(str(number))
    encoders = "\n".join(f"- {{name: e{n}, objective: mean_rgb}}" for n in range(ENCODERS))
    path = folder / "cohort.yaml"
    path.write_text(f"name: big\nslides: {{folders: [{{path: wsi}}]}}\nencoders:\n{encoders}\n")
    return path


def ticks(folder: Path, slides: int, postgres: str | None) -> None:
    path = folder / "cohort.yaml"
    timed(f"{slides:,} files created", lambda: cohort_of(folder, slides))
    cohort, store = load_cohort(path), Store(folder / "store")
    defs = timed("definitions built", lambda: build_defs(cohort, store))
    graph = defs.resolve_asset_graph()
    first = timed(
        "sensor tick, all files new", lambda: scan_files(cohort, steps.read_file_snapshot(store))
    )
    timed(
        "sensor tick, all files stable",
        lambda: scan_files(cohort, steps.read_file_snapshot(store), first.fingerprints),
    )
    timed(
        "slide_index scans and reads all files",
        lambda: steps.write_slide_index(store, steps.scan_slides(cohort, store)),
    )
    timed("sensor tick, no change", lambda: scan_files(cohort, steps.read_file_snapshot(store)))
    size = len(json.dumps(first.fingerprints)) / 1000
    print(f"{'cursor of a tick with all files new':<68} {size:10,.1f} kB")
    keys = steps.read_slide_index(store)["slide"].to_list()
    with dg.DagsterInstance.from_config(str(home_of(folder, postgres))) as instance:
        timed(f"{slides:,} partitions added", lambda: add_slides(instance, keys))
        timed(f"{slides:,} partitions added again", lambda: add_slides(instance, keys))
        fill(instance, graph, keys)
        timed(
            f"staleness, first read of {slides * (ENCODERS + 2):,} events",
            lambda: stale_assets(instance, graph),
        )
        timed("staleness, no new event", lambda: stale_assets(instance, graph))
        made = graph.toposorted_asset_keys
        timed(
            "staleness of each asset by itself, as nic refresh with nothing to do",
            lambda: [
                stale_assets(instance, graph, only={key})
                for key in made
                if key in graph.materializable_asset_keys
            ],
        )
        tick = timed(
            "tick of sensor rebuild, first",
            lambda: dg.evaluate_automation_conditions(defs, instance),
        )
        timed(
            "tick of sensor rebuild, no new event",
            lambda: dg.evaluate_automation_conditions(defs, instance, cursor=tick.cursor),
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{'memory of this process, peak':<68} {peak:10,.1f} GB")


def home_of(folder: Path, postgres: str | None) -> Path:
    """Write the settings of a Dagster instance whose records are SQLite files or on a server."""
    home = folder / "home"
    home.mkdir()
    storage = "" if postgres is None else f"storage: {{postgres: {{postgres_url: '{postgres}'}}}}\n"
    (home / "dagster.yaml").write_text(f"telemetry: {{enabled: false}}\n{storage}")
    return home


def fill(instance: dg.DagsterInstance, graph: object, keys: list[str]) -> None:
    """Record every slide with its patch table and grids, and the encoders, as materialized."""
    encoders = [f"e{n}" for n in range(ENCODERS)]
    record(instance, graph, "encoder", ["encoder_entry"], encoders)
    start = time.perf_counter()
    for prefixes, asset, parents in (
        (("",), "slide", ["slide_file"]),
        (("128px-0.5um|",), "patch_table", ["slide"]),
        ([f"{name}|" for name in encoders], "grid", ["slide_file", "patch_table", "encoder"]),
    ):
        record(instance, graph, asset, parents, [prefix + keys[0] for prefix in prefixes])
        copy_events(instance, asset, keys[0], keys[1:-1])
        record(instance, graph, asset, parents, [prefix + keys[-1] for prefix in prefixes])
    print(f"{'events recorded':<68} {time.perf_counter() - start:10,.1f} s")


def record(
    instance: dg.DagsterInstance,
    graph: object,
    asset: str,
    parents: list[str],
    partitions: list[str],
) -> None:
    """Record partitions of an asset as materialized from the last events of its inputs."""
    version = graph.get(dg.AssetKey(asset)).code_version  # type: ignore[attr-defined]
    tags = {CODE_VERSION_TAG: version, DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}
    for parent in parents:
        key = dg.AssetKey(parent)
        last = instance.fetch_materializations(key, limit=1).records
        tags[get_input_data_version_tag(key)] = "INITIAL"
        tags[get_input_event_pointer_tag(key)] = str(last[0].storage_id) if last else "-1"
    # a slide's event has its thumbnail
    metadata: dict[str, Any] = {
        "cells": 1000,
        "preview": dg.MetadataValue.md("x" * (8000 * (asset == "slide"))),
    }
    for partition in partitions:
        instance.report_runless_asset_event(
            dg.AssetMaterialization(
                asset,
                partition=partition,
                metadata=metadata,
                tags={**tags, DATA_VERSION_TAG: partition},
            )
        )


def copy_events(instance: dg.DagsterInstance, asset: str, slide: str, others: list[str]) -> None:
    """Record the events of an asset of one slide for other slides too, without Dagster."""
    storage = instance.event_log_storage
    assert isinstance(storage, SqlEventLogStorage)
    table = SqlEventLogStorageTable
    with storage.index_connection() as connection:
        chosen = table.select().where(
            table.c.asset_key == dg.AssetKey(asset).to_string(),
            table.c.dagster_event_type == "ASSET_MATERIALIZATION",
        )
        rows = [dict(row) for row in connection.execute(chosen).mappings()]
    for row in rows:
        del row["id"]
        for first in range(0, len(others), 1000):
            copies = [
                {
                    **row,
                    "event": row["event"].replace(slide, other),
                    "partition": row["partition"].replace(slide, other),
                }
                for other in others[first : first + 1000]
            ]
            with storage.index_connection() as connection:
                connection.execute(table.insert(), copies)


# --- pages -----------------------------------------------------------------------------------

GRAPH_QUERY = """query { assetNodes { assetKey { path } dependencyKeys { path } groupName kinds
  opNames isPartitioned staleStatus } }"""
PAGE_QUERY = """query($key: [String!]!) { assetNodeOrError(assetKey: {path: $key}) {
  ... on AssetNode {
  partitionKeysByDimension { name partitionKeys }
  assetPartitionStatuses { ... on MultiPartitionStatuses { primaryDimensionName ranges {
    primaryDimStartKey primaryDimEndKey secondaryDim { ... on DefaultPartitionStatuses {
    materializedPartitions } } } } }
  partitionStats { numMaterialized numPartitions numFailed } } } }"""


def pages(folder: Path, slides: int, postgres: str | None) -> None:
    path = cohort_of(folder, slides)
    cohort, store = load_cohort(path), Store(folder / "store")
    graph = build_defs(cohort, store).resolve_asset_graph()
    home = home_of(folder, postgres)
    keys = [f"s{number:06d}" for number in range(slides)]
    with dg.DagsterInstance.from_config(str(home)) as instance:
        add_slides(instance, keys)
        fill(instance, graph, keys)
    environment = {
        **os.environ,
        "DAGSTER_HOME": str(home),
        "NIC_COHORT": str(path),
        "NIC_STORE": str(store.root),
    }
    with webserver(environment, folder) as ask:
        for _ in range(2):
            timed("asset graph with staleness", lambda: ask(GRAPH_QUERY, {}))
        for asset in ("slide", "grid"):
            for _ in range(2):
                timed(f"partitions of {asset}", partial(ask, PAGE_QUERY, {"key": [asset]}))


@contextmanager
def webserver(environment: dict[str, str], folder: Path) -> Iterator[Callable[..., object]]:
    """Start a webserver on a free port; yield a function that sends a GraphQL query."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [str(Path(sys.executable).with_name("dagster-webserver")), "-m", "nic_assets.definitions"]
        + ["--host", "127.0.0.1", "--port", str(port)],
        env=environment,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def ask(query: str, variables: dict[str, object]) -> object:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            found = json.load(answer)
        assert "errors" not in found, found
        return found

    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield ask
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("overhead", "ticks", "pages"))
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder")
    parser.add_argument("--postgres", help="URL of an empty PostgreSQL database")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        {"overhead": overhead, "ticks": ticks, "pages": pages}[options.what](
            Path(folder), options.slides, options.postgres
        )


if __name__ == "__main__":
    main()

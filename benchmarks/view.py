"""Measure the server of ``nic view``: tiles a second, the first view of a slide, memory.

    python benchmarks/view.py
    python benchmarks/view.py --slides data/demo/slides/demo-01-1.tif /path/to/real.svs

Two painted slides of 40,000 x 40,000 px, one with a pyramid and one without, and those of
``--slides`` become a study. Six connections, as many as a browser opens, ask a server on this
machine for tiles: all of a screen of 1280 x 800 px, screens at random places. Cold tiles were never
asked for before, warm ones are asked for again. Slides are in the cache of the operating system.
Server and client share the cores. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.compress import paint_slide
from nic_core import steps
from nic_core.cohort import load_cohort
from nic_core.parallel import cores
from nic_core.store import Store

SIDE = 40_000  # of the painted slides, level-0 px at 0.25 um/px
CONNECTIONS, SCREENS = 6, 10
ACROSS, DOWN = 6, 4  # tiles of 256 px on a screen of 1280 x 800 px, which cuts some


def write_study(folder: Path, slides: dict[str, Path]) -> tuple[Path, Path]:
    """Write a cohort of slides and a store with their records; return cohort file and store."""
    rows = [f"{name},{path.resolve()},{name}" for name, path in slides.items()]
    (folder / "slides.csv").write_text("\n".join(["slide,path,patient", *rows]) + "\n")
    path, store = folder / "cohort.yaml", Store(folder / "store")
    path.write_text(
        "name: view\nslides: {table: slides.csv}\n"
        "encoders: [{name: mean-rgb, objective: mean_rgb}]\n"
    )
    cohort = load_cohort(path)
    steps.make_slide_index(cohort, store)
    for name in slides:
        steps.make_slide(store, name)
    return path, store.root


def free_port() -> int:
    """Return a port of this machine that no program listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def serving(cohort: Path, store: Path, port: int) -> Iterator[int]:
    """Run ``nic view``; yield its process id."""
    command = ["-c", "from nic_core.cli import main; main()", "view", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, *command, "--cohort", str(cohort), "--store", str(store)],
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                fetch(http.client.HTTPConnection("127.0.0.1", port), "/api/study")
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield server.pid
    finally:
        server.terminate()
        server.wait()


def fetch(connection: http.client.HTTPConnection, url: str) -> bytes:
    """Return an answer; raise OSError if it is an error."""
    connection.request("GET", url)
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise OSError(f"{url}: {answer.status} {body.decode()}")
    return body


def fetch_all(port: int, urls: Sequence[str]) -> float:
    """Fetch addresses over six connections; return the seconds that it took."""
    own = threading.local()

    def one(url: str) -> None:
        if not hasattr(own, "connection"):
            own.connection = http.client.HTTPConnection("127.0.0.1", port)
        fetch(own.connection, url)

    start = time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        list(threads.map(one, urls))
    return time.perf_counter() - start


def screens(slide: str, width: int, height: int, zoom: int, count: int) -> list[str]:
    """Return the addresses of the tiles of screens at random places; each once."""
    side = 256 * 2**-zoom
    columns, rows = -(-width // side), -(-height // side)
    places = random.Random(zoom)
    tiles: dict[str, None] = {}
    for _ in range(count):
        left = places.randrange(max(1, columns - ACROSS + 1))
        top = places.randrange(max(1, rows - DOWN + 1))
        for row in range(top, min(rows, top + DOWN)):
            for column in range(left, min(columns, left + ACROSS)):
                tiles[f"/api/slides/{slide}/tiles/{zoom}/{column}/{row}.jpg"] = None
    return list(tiles)


def memory(process: int) -> float:
    """Return the most memory that a process had, MB."""
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slides", type=Path, nargs="*", default=[], help="other slides")
    options = parser.parse_args()
    console = Console(width=100)
    table = Table("slide", "zoom", "tiles", "cold, tiles/s", "warm, tiles/s")
    first = Table("slide", "first view", "tiles", "memory of the server until then, MB")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slides = {path.name.partition(".")[0]: path for path in options.slides}
        for kind in ("pyramid", "flat"):
            slides[f"painted-{kind}"] = folder / f"{kind}.tif"
            paint_slide(slides[f"painted-{kind}"], SIDE, pyramid=kind == "pyramid")
        port = free_port()
        with serving(*write_study(folder, slides), port) as process:
            console.print(f"{cores()} cores; started: {memory(process):.0f} MB")
            for slide in slides:
                start = time.perf_counter()
                connection = http.client.HTTPConnection("127.0.0.1", port)
                about = json.loads(fetch(connection, f"/api/slides/{slide}"))
                width, height, lowest = about["width"], about["height"], about["min_zoom"]
                fits = [
                    z for z in range(lowest, 1) if max(width / 1280, height / 800) * 2.0**z <= 1
                ]
                whole = fits[-1]
                urls = screens(slide, width, height, whole, 1)
                fetch_all(port, urls)
                seconds = time.perf_counter() - start
                first.add_row(slide, f"{seconds:.2f} s", str(len(urls)), f"{memory(process):.0f}")
                for zoom in sorted({0, -1, -2, -3, -4, -5} & set(range(lowest, 1)), reverse=True):
                    urls = screens(slide, width, height, zoom, SCREENS)
                    cold, warm = (fetch_all(port, urls) for _ in range(2))
                    rates = (f"{len(urls) / taken:.0f}" for taken in (cold, warm))
                    table.add_row(slide, str(zoom), str(len(urls)), *rates)
            console.print(f"at the end: {memory(process):.0f} MB")
    console.print(first)
    console.print(table)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
    main()

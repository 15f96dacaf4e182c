"""Measure encoding and compressing in precision int8 against float32, on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.int8    # one core
    python -m benchmarks.int8                      # all cores

The slides and the encoder are those of ``benchmarks/compress.py``. Rates are patches of 128 px at
0.5 um/px per second. The works run in turn, and the table has the median of the rounds, the lowest
and the highest; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.compress import (
    PATCH,
    PYRAMID,
    SINGLE_LEVEL,
    compress,
    paint_slide,
    published_encoder,
)
from nic_core.encoders.inference import BATCH
from nic_core.parallel import cores

PLAIN, FLOAT32, INT8 = "as published, float32", "prepared, float32", "int8"
BATCHES = 20  # of each thread in a round
ROUNDS = 5


def encode(module: nn.Module, threads: int) -> int:
    """Encode batches in every thread, as compression does; return the number of patches."""
    generator = torch.Generator().manual_seed(0)
    shape = BATCH, PATCH, PATCH, 3
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def work(_: int) -> None:
        with torch.inference_mode():
            for _ in range(BATCHES):
                module(pixels.permute(0, 3, 1, 2))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return threads * BATCHES * BATCH


def measure(works: dict[str, Callable[[], int]], reference: str) -> list[tuple[str, str, str]]:
    """Return name, rate and ratio to ``reference`` of each work; all run once before."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for number in range(ROUNDS + 1):
        for name, work in works.items():
            start = time.perf_counter()
            patches = work()
            if number:
                rates[name].append(patches / (time.perf_counter() - start))
    return [
        (
            name,
            f"{statistics.median(found):,.0f} ({min(found):,.0f} to {max(found):,.0f})",
            f"{statistics.median(a / b for a, b in zip(found, rates[reference], strict=True)):.2f}",
        )
        for name, found in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=12_000, help="side of the slides, px")
    options = parser.parse_args()
    threads = cores()
    torch.set_num_threads(1)
    encoder = published_encoder()
    prepared = {
        FLOAT32: encoder.prepare("cpu", "float32"),
        INT8: encoder.prepare("cpu", "int8"),
    }
    table = Table("threads", "work", "precision", "patches/s", "ratio to prepared float32")
    modules = {PLAIN: encoder.module, **{name: one.module for name, one in prepared.items()}}
    works = {name: partial(encode, module, threads) for name, module in modules.items()}
    for row in measure(dict(works), FLOAT32):
        table.add_row(str(threads), "encode alone", *row)
    with tempfile.TemporaryDirectory() as folder:
        for stored in (SINGLE_LEVEL, PYRAMID):
            path = Path(folder) / f"{stored == PYRAMID}.tif"
            paint_slide(path, options.side, pyramid=stored == PYRAMID)
            compressed = {
                name: partial(compress, path, one, threads) for name, one in prepared.items()
            }
            for row in measure(dict(compressed), FLOAT32):
                table.add_row(str(threads), f"compress, {stored}", *row)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

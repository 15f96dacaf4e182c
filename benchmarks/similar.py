"""Measure the exact search of similar cells: time for sizes and number types, and its parts.

    python -m benchmarks.similar
    python -m benchmarks.similar --cells 1000000

Random unit vectors stand for the embeddings of slides of 10,000 cells: the time does not depend on
their values. First the whole search in an index of 128 numbers a cell, as ``nic view`` does it,
while the index is in the page cache. Then one multiplication of all vectors with one, for float32
as in the index and for smaller types, which would need a second, exact pass over candidates. The
largest index takes 5 GB of disk, and as much memory while it is searched.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import torch

from benchmarks.conditions import conditions
from nic_core.grids.similar import CellIndex, similar_cells

NUMBERS, PER_SLIDE, SIDE = 128, 10_000, 100
SIZES = (100_000, 1_000_000, 10_000_000)
REPEATS = 7
_BLOCK = 1 << 16


def random_index(folder: Path, cells: int) -> CellIndex:
    """An index of random unit vectors in slides of 100 x 100 cells, in a file."""
    generator = np.random.default_rng(0)
    vectors = np.lib.format.open_memmap(
        folder / "vectors.npy", mode="w+", dtype=np.float32, shape=(cells, NUMBERS)
    )
    for start in range(0, cells, _BLOCK):
        block = generator.standard_normal((min(_BLOCK, cells - start), NUMBERS), np.float32)
        vectors[start : start + _BLOCK] = block / np.linalg.norm(block, axis=1, keepdims=True)
    vectors.flush()
    at = np.arange(cells) % PER_SLIDE
    slides = pl.DataFrame(
        {
            "slide": [f"s{i}" for i in range(cells // PER_SLIDE)],
            "cells": PER_SLIDE,
            "cell": 128.0,
            "x": 0.0,
            "y": 0.0,
        }
    )
    return CellIndex(
        np.load(folder / "vectors.npy", mmap_mode="r"),
        np.stack([at // SIDE, at % SIDE], axis=1).astype(np.int32),
        slides,
        np.arange(0, cells + 1, PER_SLIDE),
        patch=128,
        stride=128,
    )


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Median and longest of several runs after a first one."""
    function()
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken)), max(taken)


def report(name: str, cells: int, function: Callable[[], object]) -> None:
    median, longest = seconds(function)
    print(f"{name:<34} {cells:>11,} {median:>9.3f} {longest:>9.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", type=int, nargs="*", default=SIZES)
    sizes = parser.parse_args().cells
    print(f"{conditions()}; numpy {np.__version__}")
    print(f"{'':<34} {'cells':>11} {'median s':>9} {'longest s':>9}")
    for cells in sizes:
        with tempfile.TemporaryDirectory() as folder:
            index = random_index(Path(folder), cells)
            report("search, 12 cells", cells, partial(similar_cells, index, 5, count=12))
            query = np.array(index.vectors[5])
            report("float32 product", cells, partial(np.matmul, index.vectors, query))
            half = torch.empty((cells, NUMBERS), dtype=torch.float16)
            small = torch.empty((cells, NUMBERS), dtype=torch.int8)
            for start in range(0, cells, _BLOCK):
                block = torch.from_numpy(np.array(index.vectors[start : start + _BLOCK]))
                half[start : start + _BLOCK] = block.half()
                small[start : start + _BLOCK] = as_int8(block)
            one = torch.from_numpy(query)
            report("float16 product, not exact", cells, partial(torch.mv, half, one.half()))
            report(
                "int8 product, not exact",
                cells,
                partial(torch._int_mm, small, as_int8(one)[:, None]),
            )


def as_int8(values: torch.Tensor) -> torch.Tensor:
    """Numbers from -1/2 to 1/2 as whole ones."""
    return (values * 254).round().clamp(-127, 127).char()


if __name__ == "__main__":
    main()

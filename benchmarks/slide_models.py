"""What training slide models on large grids costs: time to load crops, and memory.

    python benchmarks/slide_models.py
    python benchmarks/slide_models.py --network small --side 24 --slides 40 --batches 2

The cohort is synthetic: grids of 400 x 400 cells (--side) and 128 numbers, a disc of tissue of
random embeddings, which compress badly. A few stores are written; all others are hard links to
them, so that the cohort is small on disk but every slide is opened and read by itself. Nothing is
learned.

Times are for whole epochs of training on a few batches: the network alone on crops in memory, and
with crops that are read, normalised and turned while it works. Memory is the peak of the process
after each step; what counts is that it does not grow with the number of slides.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch
from rich.console import Console
from rich.table import Table

from nic_core.grids import GRID_FORMAT, Grid, GridProvenance, open_grid, write_grid
from nic_core.models.crops import Crops, cohort_moments, normalise_for
from nic_core.models.networks import build_network, component_count
from nic_core.models.training import training_batches

EMBEDDING_SIZE, STORES = 128, 4


def write_cohort(folder: Path, slides: int, side: int) -> list[str]:
    """Write the stores and their links; slide ids."""
    y, x = np.mgrid[:side, :side] - side / 2
    names = [f"slide-{i:04d}" for i in range(slides)]
    for i, name in enumerate(names):
        if i >= STORES:
            shutil.copytree(folder / names[i % STORES], folder / name, copy_function=os.link)
            continue
        valid = np.hypot(y, x) < side * (0.25 + 0.05 * i)
        embeddings = (
            np.random.default_rng(i).normal(size=(EMBEDDING_SIZE, side, side)).astype(np.float16)
        )
        about = GridProvenance(
            format=GRID_FORMAT,
            slide=name,
            slide_identity=name,
            slide_mpp=0.25,
            slide_image=0,
            encoder="random",
            weights_hash="0",
            mpp=0.5,
            patch=128,
            stride=128,
            origin=(0.0, 0.0),
            unreadable=0,
            precision="float32",
            reading="patch",
            colours="stored",
            icc_profile=None,
            software="random numbers",
        )
        write_grid(folder / name, Grid(embeddings * valid, valid, about))
    return names


def peak() -> str:
    """Largest resident memory of the process so far, GB."""
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--network", choices=["published", "small", "local", "mil"], default="published"
    )
    parser.add_argument("--slides", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=4, help="batches of the timed epoch")
    parser.add_argument("--side", type=int, default=400, help="cells of grids and crops")
    arguments = parser.parse_args()
    console, memory = Console(), {"start": peak()}
    with tempfile.TemporaryDirectory() as place:
        slides = write_cohort(Path(place), arguments.slides, arguments.side)

        def grids(slide: str) -> Grid:
            return open_grid(Path(place) / slide)

        memory[f"{STORES} stores written"] = peak()
        table = pl.DataFrame({"slides": [[slide] for slide in slides]})
        components = component_count(arguments.network)
        moments = cohort_moments(table.with_columns(fold=0), grids, components=components)
        memory[f"moments of {len(slides)} slides"] = peak()
        normalise = normalise_for(arguments.network, moments.groups.values())
        crops = Crops(grids, normalise, arguments.side)
        random = np.random.default_rng(0)
        for _ in training_batches(table, crops, arguments.batch, random):
            pass
        memory[f"crops of {len(slides)} slides"] = peak()

        network = build_network(arguments.network, normalise.channels, 1).train()
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)

        def step(features: np.ndarray) -> None:
            optimiser.zero_grad(set_to_none=True)
            network(torch.from_numpy(features)).square().mean().backward()
            optimiser.step()

        # slides beyond the cache: each crop is read from its store
        few = table[-arguments.batch * arguments.batches :]
        held = next(training_batches(few, crops, arguments.batch, random))[1].copy()
        step(held)
        alone = loading = together = 0.0
        for _ in range(2):  # turn about, as the machine's speed drifts
            start = time.perf_counter()
            for _ in range(arguments.batches):
                step(held)
            alone += time.perf_counter() - start
            start = time.perf_counter()
            for _, features in training_batches(few, crops, arguments.batch, random):
                step(features)
            together += time.perf_counter() - start
            start = time.perf_counter()
            for _ in training_batches(few, crops, arguments.batch, random):
                pass
            loading += time.perf_counter() - start
        memory["training"] = peak()
    views = 2 * arguments.batches * arguments.batch
    times = Table("of a crop", "ms", title=f"{arguments.network}, {arguments.side} cells a side")
    for name, seconds in (
        ("network alone", alone),
        ("network and loading", together),
        ("loading alone", loading),
    ):
        times.add_row(name, f"{1000 * seconds / views:.3g}")
    console.print(times)
    console.print(f"loading adds {together / alone - 1:.0%} to an epoch of the network alone")
    peaks = Table("after", "peak memory", title=f"{len(slides)} slides")
    for name, size in memory.items():
        peaks.add_row(name, size)
    console.print(peaks)


if __name__ == "__main__":
    main()

"""Measure the memory that grids take: to write them, and to read them for a model.

    python -m benchmarks.grid_memory

Grids of 1, 4 and 16 times the area, of 128 and 2,560 numbers a cell, upright and in 8 orientations.
The slide is painted texture of which every cell is kept. Its patches have 8 px, and the encoder
repeats their mean, so that time goes into the grid; neither changes what memory a grid takes.
Each figure is the peak resident memory of a fresh process, which is about 500 MB after its imports:
of one that writes the grid, and of one that verifies and reads it. The largest grid has 4 GB
before compression, and takes minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import nn

from benchmarks.compress import paint_slide
from nic_core.cohort import Geometry
from nic_core.compression import compress_to_store
from nic_core.encoders.inference import PreparedEncoder
from nic_core.grids import open_grid, verify_grid
from nic_core.models.crops import Crops, cohort_moments
from nic_core.models.networks import Normalise
from nic_core.slides import open_slide
from nic_core.tiling.patches import patch_table
from nic_core.tiling.tissue import TissueMask

PATCH, MPP = 8, 0.5
SIDE = 81  # cells; 16 times the area has 324 x 324 cells
AREAS, SIZES, ORIENTATIONS = (1, 4, 16), (128, 2560), (1, 8)
CROP, COMPONENTS = 100, 48


@dataclass(frozen=True)
class Card:
    embedding_size: int
    name: str = "mean"
    patch: int = PATCH
    mpp: float = MPP
    weights_hash: str = ""


class RepeatedMean(nn.Module):
    """The mean of a patch, ``size`` times."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean((1, 2, 3))[:, None].expand(-1, self._size)


def write(slide_file: Path, store: Path, size: int, orientations: int) -> None:
    """Compress the slide; every cell is tissue."""
    card = Card(size)
    module, device = RepeatedMean(size), torch.device("cpu")
    encoder = PreparedEncoder(card, module, PATCH, MPP, device, "float32", "patch")
    with open_slide(slide_file) as slide:
        shape = int(slide.height * slide.mpp / 8), int(slide.width * slide.mpp / 8)
        mask = TissueMask(np.ones(shape, np.bool_), 8.0)
        cells = patch_table("s", slide, mask, Geometry(PATCH, MPP, PATCH), tissue=0.6)
        compress_to_store(
            store,
            slide,
            cells,
            encoder,
            slide_id="s",
            slide_identity="",
            orientations=orientations > 1,
        )


def read(store: Path, size: int) -> None:
    """Verify the hash; compute moments for network `published`, and crops for network `small`."""
    verify_grid(store)
    units = pl.DataFrame({"slides": [["s"]], "fold": [0]})
    cohort_moments(units, lambda _: open_grid(store), components=None)
    normalise = Normalise(torch.zeros(size), torch.ones(COMPONENTS, size))
    crops = Crops(lambda _: open_grid(store), normalise, CROP, cache_bytes=0)
    for orientation, centre in enumerate(crops.fixed_centres("s", 8, seed=0)):
        crops.crop_at("s", centre, orientation)


def peak_kib() -> int:
    """Return the peak resident memory of this process, KiB.

    Linux counts the memory of the parent into ``ru_maxrss`` of a new process, but not into this.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def measure(work: str, slide_file: Path, store: Path, size: int, orientations: int) -> float:
    """Do one kind of work in a fresh process; return its peak memory, MB."""
    command = [sys.executable, "-m", "benchmarks.grid_memory", "--work", work]
    command += [str(slide_file), str(store), str(size), str(orientations)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(out.stdout) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    chosen = parser.parse_args().work
    if chosen:
        work, slide_file, store = chosen[0], Path(chosen[1]), Path(chosen[2])
        size, orientations = map(int, chosen[3:])
        if work == "write":
            write(slide_file, store, size, orientations)
        else:
            read(store, size)
        print(peak_kib())
        return
    print("numbers | orientations | area | cells | grid, MB | write, MB | read, MB", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for area, size, orientations in product(AREAS, SIZES, ORIENTATIONS):
            cells = round(SIDE * area**0.5)
            slide_file = Path(folder) / f"{area}.tif"
            if not slide_file.exists():
                paint_slide(slide_file, cells * PATCH * 2, pyramid=False)
            with tempfile.TemporaryDirectory(dir=folder) as stores:
                store = Path(stores) / "s.zarr"
                peaks = [
                    measure(w, slide_file, store, size, orientations) for w in ("write", "read")
                ]
            row = size, orientations, area, cells**2, 2e-6 * size * orientations * cells**2
            print(*(f"{value:,.0f}" for value in (*row, *peaks)), sep=" | ", flush=True)


if __name__ == "__main__":
    main()

"""How fast slides are read and compressed, on a synthetic one.

    python benchmarks/compress.py                       # 20,000 px square at 0.25 um/px
    python benchmarks/compress.py --side 8000 --encoder data/store/encoders/mtl

The slide is a JPEG pyramid of texture in the colours of H&E, tissue all over: every cell is
read. Rates are patches of 128 px at 0.5 um/px per second; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pyvips
import torch
from rich.console import Console
from rich.table import Table
from scipy import ndimage
from torch import nn

from nic_core.compression import compress_slide
from nic_core.patches import patch_table
from nic_core.slides import Slide, open_slide
from nic_core.slides.blocks import plan_blocks, read_block
from nic_core.slides.engines import EngineName
from nic_core.tissue import TissueMask

PATCH, MPP, STORED = 128, 0.5, 0.25


class Rate(NamedTuple):
    what: str
    levels: str
    threads: int
    patches: float


def paint_slide(path: Path, side: int, *, pyramid: bool) -> None:
    """Write a slide; texture is repeated, so that any size is quick to make."""
    noise = np.random.default_rng(0).random((2, 2048, 2048))
    field = ndimage.gaussian_filter(noise[0], 1.5, mode="wrap")
    field = field + 5 * ndimage.gaussian_filter(noise[1], 12, mode="wrap")
    field = (field - field.min()) / np.ptp(field)
    pixels = np.array([238, 175, 208]) + field[..., None] * np.array([-150, -120, -80])
    image = pyvips.Image.new_from_array(pixels.astype(np.uint8), interpretation="srgb")
    times = -(-side // 2048)
    image.replicate(times, times).crop(0, 0, side, side).tiffsave(
        str(path),
        tile=True,
        tile_width=256,
        tile_height=256,
        pyramid=pyramid,
        compression="jpeg",
        Q=80,
        bigtiff=True,
        xres=1000 / STORED,
        yres=1000 / STORED,
    )


def all_cells(slide: Slide) -> pl.DataFrame:
    """Every cell that lies in the slide, kept."""
    shape = int(slide.height * slide.mpp / 8), int(slide.width * slide.mpp / 8)
    mask = TissueMask(np.ones(shape, np.bool_), 8.0)
    return patch_table("benchmark", slide, mask, patch=PATCH, mpp=MPP, tissue=0.6)


def timed(work: Callable[[], int]) -> float:
    """Patches per second."""
    start = time.perf_counter()
    done = work()
    return done / (time.perf_counter() - start)


def read_rate(path: Path, engine: EngineName, threads: int) -> float:
    with open_slide(path, engine=engine) as slide, ThreadPoolExecutor(threads) as pool:
        blocks = plan_blocks(all_cells(slide))

        def read() -> int:
            found = pool.map(lambda b: len(read_block(slide, b, patch=PATCH, mpp=MPP)[0]), blocks)
            return sum(found)

        return timed(read)


def encoder_rate(module: nn.Module, threads: int, *, batches: int = 20) -> float:
    """Patches per second of the encoder alone: one batch a core, as compression does."""
    pixels = torch.randint(0, 255, (32, PATCH, PATCH, 3), dtype=torch.uint8).permute(0, 3, 1, 2)

    def encode(_: int) -> int:
        with torch.inference_mode():
            return len(module(pixels))

    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(encode, range(threads)))  # warm
        return timed(lambda: sum(pool.map(encode, range(batches * threads))))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--side", type=int, default=20_000, help="px of the slide")
    arguments.add_argument("--encoder", type=Path, help="folder of a trained encoder")
    arguments.add_argument("--threads", type=int, default=2)
    options = arguments.parse_args()
    rates: list[Rate] = []
    with tempfile.TemporaryDirectory() as folder:
        slides = {
            f"{STORED} um/px only": Path(folder) / "single.tif",
            "pyramid": Path(folder) / "pyramid.tif",
        }
        for name, path in slides.items():
            paint_slide(path, options.side, pyramid=name == "pyramid")
        counts = sorted({1, options.threads})
        for name, path in slides.items():
            for engine in ("openslide", "tifffile"):
                rates += [
                    Rate(f"read, {engine}", name, n, read_rate(path, engine, n)) for n in counts
                ]
        if options.encoder is not None:
            from nic_core.encoders.files import load_encoder

            encoder = load_encoder(options.encoder)
            module = encoder.inference_module("cpu")
            rates += [Rate("encode", "", n, encoder_rate(module, n)) for n in counts]
            for name, path in slides.items():
                with open_slide(path) as slide:
                    table = all_cells(slide)

                    def compress(slide: Slide = slide, table: pl.DataFrame = table) -> int:
                        grid = compress_slide(
                            slide,
                            table,
                            encoder,
                            slide_id="benchmark",
                            slide_identity="",
                            device="cpu",
                            workers=options.threads,
                        )
                        return int(grid.valid.sum())

                    rates.append(Rate("compress", name, options.threads, timed(compress)))
    report = Table("", "stored", "threads", "patches/s")
    for rate in rates:
        report.add_row(rate.what, rate.levels, str(rate.threads), f"{rate.patches:,.0f}")
    console = Console()
    console.print(report)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    console.print(f"peak memory {peak:,.0f} MB, slide of {options.side:,} px square")


if __name__ == "__main__":
    main()

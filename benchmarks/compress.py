"""Measure the speed of reading, encoding and compressing slides.

    python benchmarks/compress.py
    python benchmarks/compress.py --peer tiatoolbox=/path/to/its/python --peer lazyslide=...

The slide is a JPEG image of texture in the colours of H&E. All of it counts as tissue, so every
cell is read. The encoder is the published network with random weights, which do not affect speed.
Rates are patches of 128 px at 0.5 um/px per second, the best of three runs. Run it on an idle
machine.

A peer is another package, installed in a separate environment, that processes the same slide and
cells with the same encoder (``benchmarks/peers.py``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyvips
import torch
from rich.console import Console
from rich.table import Table
from scipy import ndimage
from torch import nn

from nic_core.cohort import Geometry
from nic_core.compression import compress_slide
from nic_core.encoders.encoder import Encoder, EncoderCard
from nic_core.encoders.inference import BATCH, PreparedEncoder
from nic_core.encoders.networks import PatchEncoder, TellezEncoder
from nic_core.parallel import cores
from nic_core.slides import Slide, open_slide
from nic_core.slides.engines import EngineName
from nic_core.tiling.blocks import Block, map_in_order, plan_blocks, read_block
from nic_core.tiling.patches import patch_table
from nic_core.tiling.tissue import TissueMask
from nic_core.types import Pixels, Precision

PATCH, MPP, STORED = 128, 0.5, 0.25
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
READINGS: tuple[Literal["patch", "input"], ...] = ("patch", "input")
SINGLE_LEVEL, PYRAMID = "0.25 um/px only", "pyramid"


def texture() -> Pixels:
    """Return texture in the colours of H&E, uint8 (2048, 2048, 3), that can be repeated."""
    noise = np.random.default_rng(0).random((2, 2048, 2048))
    field = ndimage.gaussian_filter(noise[0], 1.5, mode="wrap")
    field = field + 5 * ndimage.gaussian_filter(noise[1], 12, mode="wrap")
    field = (field - field.min()) / np.ptp(field)
    coloured = np.array([238, 175, 208]) + field[..., None] * np.array([-150, -120, -80])
    pixels: Pixels = coloured.astype(np.uint8)
    return pixels


def paint_slide(path: Path, side: int, *, pyramid: bool) -> None:
    """Write a slide of ``side`` px a side, of repeated texture, which is fast for any size."""
    image = pyvips.Image.new_from_array(texture(), interpretation="srgb")
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


def published_encoder() -> Encoder:
    """Return the published network with random weights."""
    card = EncoderCard(
        name="published",
        architecture="tellez2020",
        objective="random weights",
        patch=PATCH,
        mpp=MPP,
        embedding_size=128,
        weights_hash="random",
    )
    return Encoder(card, PatchEncoder(TellezEncoder()).eval())


def all_cells(slide: Slide) -> pl.DataFrame:
    """Return a patch table in which every cell is kept."""
    shape = int(slide.height * slide.mpp / 8), int(slide.width * slide.mpp / 8)
    mask = TissueMask(np.ones(shape, np.bool_), 8.0)
    return patch_table("benchmark", slide, mask, Geometry(PATCH, MPP, PATCH), tissue=0.6)


def rate(work: Callable[[], int], times: int = 3) -> float:
    """Return patches per second, the best of several runs; ``work`` returns its patches."""
    best = 0.0
    for _ in range(times):
        start = time.perf_counter()
        patches = work()
        best = max(best, patches / (time.perf_counter() - start))
    return best


def read_rate(
    path: Path, threads: int, *, engine: EngineName | None = None, reading: str = "patch"
) -> float:
    """Return the rate of reading alone."""
    side, mpp = (PATCH, MPP) if reading == "patch" else (PATCH // 2, 2 * MPP)
    with open_slide(path, engine=engine) as slide:
        blocks = plan_blocks(all_cells(slide), side=8 * PATCH // side)

        def work(block: Block) -> int:
            scaled = reading == "input"
            return len(read_block(slide, block, patch=side, mpp=mpp, scaled=scaled)[0])

        return rate(lambda: sum(map_in_order(blocks, work, threads)))


def encode_rate(module: nn.Module, side: int, threads: int) -> float:
    """Return the rate of encoding alone, with one batch per thread, as in compression."""
    pixels = torch.randint(0, 256, (BATCH, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)

    def encode(batches: int) -> int:
        with torch.inference_mode():
            return sum(len(module(pixels)) for _ in range(batches))

    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        return rate(lambda: sum(pool.map(encode, [40] * threads)), times=5)


def compress(path: Path, encoder: PreparedEncoder, threads: int) -> int:
    """Compress a slide; return the number of its patches."""
    with open_slide(path) as slide:
        grid = compress_slide(
            slide,
            all_cells(slide),
            encoder,
            slide_id="benchmark",
            slide_identity="",
            workers=threads,
        )
        return int(grid.valid.sum())


def measure_speed(side: int, threads: int, peers: dict[str, str], console: Console) -> None:
    """Print tables of the rates; ``peers`` maps the name of a package to its Python."""
    encoder = published_encoder()
    with tempfile.TemporaryDirectory() as folder:
        slides = {name: Path(folder) / f"{i}.tif" for i, name in enumerate((SINGLE_LEVEL, PYRAMID))}
        for name, path in slides.items():
            paint_slide(path, side, pyramid=name == PYRAMID)

        table = Table("reading alone", "stored", "reading", *[f"{n} threads" for n in (1, threads)])
        for name, path in slides.items():
            for engine in ("tifffile", "libvips", "openslide"):
                rates = [read_rate(path, n, engine=engine) for n in (1, threads)]
                table.add_row(engine, name, "patch", *[f"{r:,.0f}" for r in rates])
            rates = [read_rate(path, n, reading="input") for n in (1, threads)]
            table.add_row("tifffile", name, "input", *[f"{r:,.0f}" for r in rates])
        console.print(table)

        table = Table("encoding alone", "input px", f"{threads} threads")
        plain = encode_rate(encoder.module, PATCH, threads)
        table.add_row("as published, float32", str(PATCH), f"{plain:,.0f}")
        alone: dict[tuple[str, str], float] = {}
        for precision in PRECISIONS:
            for reading in READINGS:
                prepared = encoder.prepare("cpu", precision, reading)
                alone[precision, reading] = encode_rate(prepared.module, prepared.side, threads)
                rate_alone = f"{alone[precision, reading]:,.0f}"
                table.add_row(f"prepared, {precision}", str(prepared.side), rate_alone)
        console.print(table)

        table = Table(
            "compression", "stored", "reading", "patches/s", "of encoding alone", "of the limit"
        )
        whole: dict[tuple[str, str, str], float] = {}
        for name, path in slides.items():
            for reading in READINGS:
                read = read_rate(path, threads, reading=reading)
                for precision in PRECISIONS:
                    prepared = encoder.prepare("cpu", precision, reading)
                    compressed = rate(partial(compress, path, prepared, threads))
                    whole[name, precision, reading] = compressed
                    encode = alone[precision, reading]
                    # decoding and encoding share the cores, so their times add up
                    limit = 1 / (1 / read + 1 / encode)
                    ratios = f"{compressed / encode:.2f}", f"{compressed / limit:.2f}"
                    table.add_row(precision, name, reading, f"{compressed:,.0f}", *ratios)
        console.print(table)

        if peers:
            script = Path(folder) / "encoder.pt"
            example = torch.zeros(2, 3, PATCH, PATCH, dtype=torch.uint8)
            torch.jit.trace(encoder.module, example).save(script)
            peer_script = Path(__file__).with_name("peers.py")
            table = Table(
                *("peer", "stored", "read", "nic / peer", "compress", "default", "input", "float32")
            )
            for name, path in slides.items():
                read = read_rate(path, threads)
                for peer, python in peers.items():
                    command = [
                        python,
                        "-W",
                        "ignore",
                        str(peer_script),
                        peer,
                        str(path),
                        str(script),
                    ]
                    out = subprocess.run(command, check=True, capture_output=True, text=True)
                    rates_of_peer = json.loads(out.stdout.splitlines()[-1])
                    times_faster = [
                        f"{whole[name, *settings] / rates_of_peer['compress']:.1f}x"
                        for settings in (
                            ("bfloat16", "patch"),
                            ("bfloat16", "input"),
                            ("float32", "patch"),
                        )
                    ]
                    reading_rates = (
                        f"{rates_of_peer['read']:,.0f}",
                        f"{read / rates_of_peer['read']:.1f}x",
                    )
                    compress_rate = f"{rates_of_peer['compress']:,.0f}"
                    table.add_row(peer, name, *reading_rates, compress_rate, *times_faster)
            console.print(table)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--side", type=int, default=20_000, help="side of the slide, px")
    arguments.add_argument("--threads", type=int, default=cores())
    arguments.add_argument(
        "--peer", action="append", default=[], help="NAME=PYTHON of another package"
    )
    options = arguments.parse_args()
    console = Console(width=110)
    peers = dict(item.split("=", 1) for item in options.peer)
    measure_speed(options.side, options.threads, peers, console)


if __name__ == "__main__":
    main()

"""Measure the speed of reading, encoding and compressing slides.

    python -m benchmarks.compress
    python -m benchmarks.compress --peer tiatoolbox=/path/to/its/python --peer lazyslide=...

The slide is a JPEG image of texture in the colours of H&E. All of it counts as tissue, so every
cell is read. The encoder is the published network with random weights, which do not affect speed.
Rates are patches of 128 px at 0.5 um/px per second. What is compared is measured in turn, round
after round, and each table has the median of the rounds; ratios have their range too. Each round
opens the slide anew, so that no tile is decoded already. Run it on an idle machine.

A peer is another package, installed in a separate environment, that processes the same slide and
cells with the same encoder (``benchmarks/peers.py``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import polars as pl
import pyvips
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import ndimage
from torch import nn

from benchmarks.conditions import conditions, in_turn, middle, rate, ratio
from nic_core.cohort import Geometry
from nic_core.compression import compress_slide
from nic_core.devices import resolve_precision
from nic_core.encoders.encoder import Encoder, EncoderCard
from nic_core.encoders.inference import BATCH, PreparedEncoder
from nic_core.encoders.networks import PatchEncoder, TellezEncoder
from nic_core.parallel import cores
from nic_core.slides import Slide, open_slide
from nic_core.slides.engines import EngineName
from nic_core.tiling.blocks import Block, map_in_order, plan_blocks, read_block
from nic_core.tiling.patches import patch_table
from nic_core.tiling.tissue import TissueMask
from nic_core.types import GridPrecision, Pixels, Reading

PATCH, MPP, STORED = 128, 0.5, 0.25
READINGS: tuple[Reading, ...] = get_args(Reading)
BATCHES = 40  # that a thread encodes in a round
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


def read(
    path: Path, threads: int, *, engine: EngineName | None = None, reading: Reading = "patch"
) -> int:
    """Open a slide and read all of its patches; return their number."""
    side, mpp = (PATCH, MPP) if reading == "patch" else (PATCH // 2, 2 * MPP)
    with open_slide(path, engine=engine) as slide:
        blocks = plan_blocks(all_cells(slide), side=8 * PATCH // side)

        def work(block: Block) -> int:
            scaled = reading == "input"
            return len(read_block(slide, block, patch=side, mpp=mpp, scaled=scaled)[0])

        return sum(map_in_order(blocks, work, threads))


def encode(module: nn.Module, side: int, threads: int) -> int:
    """Encode batches, one at a time in each thread, as in compression; return their patches."""
    pixels = torch.randint(0, 256, (BATCH, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)

    def share(batches: int) -> int:
        with torch.inference_mode():
            return sum(len(module(pixels)) for _ in range(batches))

    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(share, [BATCHES] * threads))


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


class Peer:
    """A process that reads or compresses slides with another package when it is asked to."""

    def __init__(self, name: str, python: str, encoder: Path) -> None:
        program = Path(__file__).with_name("peers.py")
        command = [python, "-W", "ignore", str(program), name, str(encoder)]
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def rate(self, what: Literal["read", "compress"], path: Path) -> float:
        """Return the patches per second that the process measures."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, str(path)]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:  # a package may print lines of its own
            if line.startswith("RATE "):
                return float(line.split()[1])
        raise RuntimeError(f"the process of {self.name} ended: see its messages above")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def measure_engines(slides: dict[str, Path], threads: int, rounds: int, console: Console) -> None:
    """Print the rates of reading alone for each engine, with one thread and with several."""
    counts = (1, threads)
    table = Table("reading alone", "stored", "reading", *[f"{n} threads" for n in counts])
    table.box = box.MARKDOWN
    kinds: list[tuple[EngineName, Reading]] = [
        *((name, "patch") for name in ("tifffile", "libvips", "openslide")),
        ("tifffile", "input"),
    ]
    for stored, path in slides.items():
        works = {
            f"{engine} {reading} {n}": partial(
                rate, partial(read, path, n, engine=engine, reading=reading)
            )
            for engine, reading in kinds
            for n in counts
        }
        rates = in_turn(works, rounds)
        for engine, reading in kinds:
            found = [middle(rates[f"{engine} {reading} {n}"]) for n in counts]
            table.add_row(engine, stored, reading, *found)
    console.print(table)


def measure_compression(
    slides: dict[str, Path],
    threads: int,
    rounds: int,
    precisions: Sequence[GridPrecision],
    peers: dict[str, str],
    console: Console,
) -> None:
    """Print the rates of compression beside its limit, and beside the packages in ``peers``.

    ``peers`` maps the name of a package to its Python.
    """
    encoder = published_encoder()
    own = Table("stored", "reading", "precision", "read", "encode", "compress", "of the limit")
    other = Table("peer", "stored", "read", "NIC / peer", "compress")
    for table in (own, other):
        table.box = box.MARKDOWN
    settings = [(reading, precision) for reading in READINGS for precision in precisions]
    for reading, precision in settings:
        other.add_column(f"{precision}, {reading}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = _start_peers(stack, peers, encoder, folder)
        for stored, path in slides.items():
            works: dict[str, Callable[[], float]] = {}
            for reading in READINGS:
                works[f"read {reading}"] = partial(
                    rate, partial(read, path, threads, reading=reading)
                )
            for reading, precision in settings:
                prepared = encoder.prepare("cpu", precision, reading)
                works[f"encode {reading} {precision}"] = partial(
                    rate, partial(encode, prepared.module, prepared.side, threads)
                )
                works[f"compress {reading} {precision}"] = partial(
                    rate, partial(compress, path, prepared, threads)
                )
            for peer in started:
                for what in ("read", "compress"):
                    works[f"{peer.name} {what}"] = partial(peer.rate, what, path)
            rates = in_turn(works, rounds)
            for reading, precision in settings:
                reads, encodes, whole = (
                    rates[name]
                    for name in (
                        f"read {reading}",
                        f"encode {reading} {precision}",
                        f"compress {reading} {precision}",
                    )
                )
                # decoding and encoding share the cores, so their times add up
                limits = [1 / (1 / r + 1 / e) for r, e in zip(reads, encodes, strict=True)]
                measured = [middle(values) for values in (reads, encodes, whole)]
                own.add_row(stored, reading, precision, *measured, ratio(whole, limits, 2))
            for peer in started:
                reads, whole = (rates[f"{peer.name} {what}"] for what in ("read", "compress"))
                faster = [ratio(rates[f"compress {r} {p}"], whole) for r, p in settings]
                compared = middle(reads), ratio(rates["read patch"], reads)
                other.add_row(peer.name, stored, *compared, middle(whole), *faster)
    console.print(own)
    if peers:
        console.print(other)


def _start_peers(
    stack: ExitStack, peers: dict[str, str], encoder: Encoder, folder: Path
) -> list[Peer]:
    """Start the processes of the peers, and let each work once, since first calls are slow."""
    script, small = folder / "encoder.pt", folder / "small.tif"
    example = torch.zeros(2, 3, PATCH, PATCH, dtype=torch.uint8)
    torch.jit.trace(encoder.module, example).save(script)
    paint_slide(small, 2048, pyramid=False)
    started = [Peer(name, python, script) for name, python in peers.items()]
    for peer in started:
        stack.callback(peer.close)
    for peer in started:
        for what in ("read", "compress"):
            peer.rate(what, small)
    return started


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--side", type=int, default=20_000, help="side of the slide, px")
    arguments.add_argument("--threads", type=int, default=cores())
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument(
        "--precision",
        action="append",
        choices=get_args(GridPrecision),
        help="precision to measure; may be repeated; default: float32, and what auto chooses here",
    )
    arguments.add_argument(
        "--peer", action="append", default=[], help="NAME=PYTHON of another package"
    )
    arguments.add_argument(
        "--engines", action="store_true", help="measure reading alone with each engine, and end"
    )
    options = arguments.parse_args()
    auto = resolve_precision("auto", torch.device("cpu"))
    precisions = options.precision or list(dict.fromkeys(("float32", auto)))
    peers = dict(item.split("=", 1) for item in options.peer)
    console = Console(width=150)
    console.print(conditions(), soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        slides = {name: Path(folder) / f"{i}.tif" for i, name in enumerate((SINGLE_LEVEL, PYRAMID))}
        for name, path in slides.items():
            paint_slide(path, options.side, pyramid=name == PYRAMID)
        if options.engines:
            measure_engines(slides, options.threads, options.rounds, console)
        else:
            measure_compression(slides, options.threads, options.rounds, precisions, peers, console)


if __name__ == "__main__":
    main()

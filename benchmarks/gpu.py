"""Test and measure what runs on a GPU, with one command.

    python -m benchmarks.gpu data/gpu          # with a CUDA device: about five minutes
    python -m benchmarks.gpu data/gpu --tiny   # tiny sizes, as on a machine without one

It runs the tests marked ``gpu``, trains encoders, compares embeddings with the CPU's, compresses
slides, trains the published grid CNN on large grids, and leases the GPU to several processes. All
data are made on the spot, and nothing needs Dagster. Each part runs in a process of its own: where
one fails, crashes or takes too long, the others still run. Results are written as ``gpu.json`` and
as a table, ``gpu.md``; the exit status is 1 if a part failed.

Without a CUDA device, everything runs on the CPU in tiny sizes. Such figures say nothing about
speed; they show that the command works.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

from benchmarks.compress import (
    MPP,
    PATCH,
    PYRAMID,
    SINGLE_LEVEL,
    all_cells,
    paint_slide,
    published_encoder,
    texture,
)
from benchmarks.conditions import processor
from benchmarks.slide_models import EMBEDDING_SIZE, write_cohort
from benchmarks.train_encoder import build_objective, learner, noise_task
from nic_core.cohort import EncoderSpec
from nic_core.cohort.settings import ModelSettings
from nic_core.cohort.targets import RegressionTarget
from nic_core.compression import compress_slide
from nic_core.compression.batch import compress_slides
from nic_core.compression.stream import GPU_BLOCK
from nic_core.devices import gpu_uuids, lease, leased_device
from nic_core.encoders.encoder import Encoder
from nic_core.encoders.inference import PreparedEncoder
from nic_core.encoders.training import train_encoder
from nic_core.grids import Grid, open_grid
from nic_core.models.crops import Crops, cohort_moments, normalise_for
from nic_core.models.training import fit_fold, training_batches
from nic_core.parallel import cores
from nic_core.slides import SlideSource, open_slide
from nic_core.tiling.blocks import Block, map_in_order, plan_blocks, read_block
from nic_core.types import Precision
from nic_core.version import __version__

PRECISIONS: tuple[Precision, ...] = ("bfloat16", "float32")
CROP = 400  # cells a side of the grids and crops of paper B
LIMIT = 240.0  # s a part
# largest rms distance from the CPU's float32 embeddings, relative to their spread [choice]
BOUNDS = {"bfloat16": 0.05, "float32": 0.01}

# processes are forked from a server that has done the slow imports and has not touched the GPU
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["nic_core.compression.batch", "nic_core.encoders.training", "nic_core.models.training"]
)


@dataclass(frozen=True)
class Sizes:
    """How much each part does."""

    patches: int = 4000  # of each of four patch tasks
    budget: int = 96_000  # patches seen by a training
    batches: tuple[int, ...] = (64, 512)  # patches per training step
    accuracy: float = 0.95  # balanced, that a training must reach; chance is 0.5
    compared: int = 4096  # patches that are embedded on both devices
    side: int = 30_000  # px a side of the slide that is compressed alone
    rounds: int = 3
    slides: int = 8  # that are compressed by several processes
    sides: int = 12_000  # px a side of each
    processes: tuple[int, ...] = (1, 2, 4, 8)
    grids: int = 64
    crops: int = 16  # per training step
    epochs: int = 3
    repeats: int = 10  # of short measurements


TINY = Sizes(
    patches=160,
    budget=48,
    batches=(16,),
    accuracy=0.0,
    compared=64,
    side=1024,
    rounds=1,
    slides=2,
    sides=1024,
    processes=(1, 2),
    grids=3,
    crops=2,
    epochs=1,
    repeats=1,
)


@dataclass(frozen=True)
class Figure:
    """A measured value; ``aim`` is what it is compared with, if anything."""

    what: str
    value: float
    unit: str
    aim: str | None = None


@dataclass(frozen=True)
class Report:
    """The outcome of a part; ``failed`` is the reason, or None."""

    part: str
    seconds: float
    figures: tuple[Figure, ...]
    failed: str | None = None


class CheckFailedError(AssertionError):
    """A result is outside of its bounds."""


def gpu_tests(sizes: Sizes) -> Iterator[Figure]:
    """Run the tests marked ``gpu``; without a CUDA device they are skipped."""
    project = Path(__file__).parents[1]
    files = [path for path in project.glob("tests/**/test_*.py") if "mark.gpu" in path.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = ["-m", "pytest", "-m", "gpu", "-rf", f"--junitxml={results}", *map(str, files)]
        ended = subprocess.run([sys.executable, *command], cwd=project, check=False)
        if not results.exists():
            raise CheckFailedError(f"pytest ended with status {ended.returncode}: see its output")
        suite = ElementTree.parse(results).getroot().find("testsuite")
        assert suite is not None
        count = {
            name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")
        }
    failed = count["failures"] + count["errors"]
    yield Figure("passed", count["tests"] - failed - count["skipped"], "tests")
    yield Figure("skipped", count["skipped"], "tests", "0 with a GPU")
    if ended.returncode:
        raise CheckFailedError(f"{failed} tests failed: see the output of pytest")


def encoder_training(sizes: Sizes) -> Iterator[Figure]:
    """Train the encoder with four tasks; time steps, and the whole training with validation."""
    names = tuple(f"task-{number}" for number in range(4))
    with leased_device() as device, tempfile.TemporaryDirectory() as folder:
        tasks = [noise_task(Path(folder), name, sizes.patches, k) for k, name in enumerate(names)]
        for batch in sizes.batches:
            for precision in PRECISIONS:
                spec = EncoderSpec(
                    name="benchmark",
                    objective="mtl",
                    tasks=names,
                    precision=precision,
                    batch=batch,
                    patches_seen=sizes.budget,
                )
                times: list[float] = []

                def progress(seen: int, total: int, times: list[float] = times) -> None:
                    times.append(time.perf_counter())

                trained = train_encoder(
                    spec,
                    tasks,
                    patch=PATCH,
                    mpp=MPP,
                    embedding_size=EMBEDDING_SIZE,
                    device=device,
                    progress=progress,
                )
                run = f"{precision}, {batch} patches a step"
                aim = "20,000 or more" if precision == "bfloat16" else None
                step = statistics.median(np.diff(times))
                yield Figure(f"{run}: steps", batch / step, "patches/s", aim)
                whole = batch * (len(times) - 1) / (times[-1] - times[0])
                yield Figure(f"{run}: steps and validation", whole, "patches/s")
                objective = build_objective(spec, tasks, torch.device(device))
                learn, generator = learner(objective, precision), torch.Generator(device)
                loaded = objective.batch(generator)
                alone = _duration(partial(learn, loaded), sizes.repeats)
                yield Figure(f"{run}: without loading", batch / alone, "patches/s")
                alone = _duration(partial(objective.batch, generator), sizes.repeats)
                yield Figure(f"{run}: loading and augmentation alone", batch / alone, "patches/s")
                steps = partial(_steps, objective, learn, generator)
                yield from _gpu_shares(f"{run}: steps", steps, device)
                reached = float(trained.history["validation/balanced_accuracy"].to_numpy().max())
                yield Figure(f"{run}: best balanced accuracy", reached, "")
                if reached < sizes.accuracy:
                    raise CheckFailedError(
                        f"{run}: balanced accuracy {reached:.2f}, expected {sizes.accuracy:.2f}"
                    )


def embeddings(sizes: Sizes) -> Iterator[Figure]:
    """Compare embeddings of textured patches with those of the CPU in float32."""
    pixels = _textured_patches(sizes.compared)
    encoder = published_encoder()
    _set_statistics(encoder, pixels)
    reference = _embed(encoder.prepare("cpu", "float32"), pixels)
    spread = math.sqrt(reference.var(axis=0).sum())
    failures = []
    with leased_device() as device:
        for precision in PRECISIONS:
            found = _embed(encoder.prepare(device, precision), pixels)
            distance = math.sqrt(((found - reference) ** 2).sum(axis=1).mean()) / spread
            bound = BOUNDS[precision]
            yield Figure(
                f"{precision}: distance from the CPU's float32, of the spread",
                100 * distance,
                "%",
                f"{bound:.0%} or less",
            )
            cosines = (found * reference).sum(1)
            cosines /= np.linalg.norm(found, axis=1) * np.linalg.norm(reference, axis=1)
            yield Figure(f"{precision}: lowest cosine", float(cosines.min()), "")
            if not distance <= bound:
                failures.append(f"{precision}: {distance:.2%} of the spread, bound {bound:.0%}")
    if failures:
        raise CheckFailedError("embeddings differ from the CPU's: " + "; ".join(failures))


def compression(sizes: Sizes) -> Iterator[Figure]:
    """Compress one slide: readers feed one GPU; compared with the readers alone."""
    with leased_device() as device, tempfile.TemporaryDirectory() as folder:
        encoder = published_encoder()
        prepared = {name: encoder.prepare(device, name) for name in PRECISIONS}
        for name in PRECISIONS:
            yield from _encoding_alone(prepared[name], sizes)
        for number, stored in enumerate((SINGLE_LEVEL, PYRAMID)):
            path = Path(folder) / f"{number}.tif"
            paint_slide(path, sizes.side, pyramid=stored == PYRAMID)
            with open_slide(path) as slide:
                table = all_cells(slide)
            works: dict[str, Callable[[], int]] = {
                "readers alone": partial(_read, path, table),
                **{name: partial(_compress, path, table, prepared[name]) for name in PRECISIONS},
            }
            rates: dict[str, list[float]] = {name: [] for name in works}
            for _ in range(sizes.rounds):  # in turn, as the speed of a machine drifts
                for work_name, work in works.items():
                    start = time.perf_counter()
                    patches = work()
                    rates[work_name].append(patches / (time.perf_counter() - start))
            for work_name, found in rates.items():
                aimed = stored == SINGLE_LEVEL and work_name == "bfloat16"
                aim = "30,000 or more" if aimed else None
                what = f"{stored}: {work_name}"
                yield Figure(what, statistics.median(found), "patches/s", aim)
                if len(found) > 1:
                    yield Figure(f"{what}, lowest", min(found), "patches/s")
                    yield Figure(f"{what}, highest", max(found), "patches/s")
            ratio = statistics.median(rates["bfloat16"]) / statistics.median(rates["readers alone"])
            yield Figure(f"{stored}: bfloat16 / readers alone", ratio, "", "0.9 or more")
            yield from _gpu_shares(f"{stored}: bfloat16", works["bfloat16"], device)


def several_slides(sizes: Sizes) -> Iterator[Figure]:
    """Compress slides into stores by one process and by several, which share GPU and cores.

    Includes what each slide needs besides its patches: opening, tissue mask, writing.
    """
    with leased_device() as device, tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "0.tif"
        paint_slide(first, sizes.sides, pyramid=False)
        slides = {"0": SlideSource(first)}
        for number in range(1, sizes.slides):
            path = first.with_name(f"{number}.tif")
            os.link(first, path)
            slides[str(number)] = SlideSource(path)
        for count in sizes.processes:
            out = Path(folder) / f"by-{count}"
            pipes = []
            for k in range(count):
                here, there = processes.Pipe()
                mine = {name: slides[name] for name in list(slides)[k::count]}
                threads = max(1, cores() // count)
                process = processes.Process(
                    target=_compress_share, args=(there, mine, out, device, threads), daemon=True
                )
                process.start()
                there.close()
                pipes.append(here)
            for pipe in pipes:
                pipe.recv()  # the process is ready
            start = time.perf_counter()
            for pipe in pipes:
                pipe.send("begin")
            cells = sum(pipe.recv() for pipe in pipes)
            seconds = time.perf_counter() - start
            what = f"{sizes.slides} slides of {sizes.sides:,} px, {count} process(es)"
            yield Figure(what, cells / seconds, "patches/s")


def grid_cnn(sizes: Sizes) -> Iterator[Figure]:
    """Train the published grid CNN on crops of 400 x 400 cells."""
    with leased_device() as device, tempfile.TemporaryDirectory() as folder:
        names = write_cohort(Path(folder), sizes.grids, CROP)

        def grids(slide: str) -> Grid:
            return open_grid(Path(folder) / slide)

        table = pl.DataFrame(
            {"unit": names, "slides": [[name] for name in names], "y": np.arange(len(names)) / 10}
        )
        train, validation = table[: -len(table) // 4], table[-len(table) // 4 :]
        moments = cohort_moments(train.with_columns(fold=0), grids, components=None)
        normalise = normalise_for("published", moments.groups.values())
        target = RegressionTarget(name="benchmark", kind="regression", column="y")

        def fit(epochs: int) -> list[float]:
            times = [time.perf_counter()]
            fit_fold(
                target,
                train,
                validation,
                grids,
                normalise,
                ModelSettings(network="published", epochs=epochs, batch=sizes.crops),
                crop=CROP,
                seed=0,
                device=device,
                progress=lambda: times.append(time.perf_counter()),
            )
            return times

        cuda = device.startswith("cuda")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = np.diff(fit(sizes.epochs))
        crops = f"{len(train)} slides in training, {len(validation)} in validation"
        yield Figure(f"epoch, {crops}", float(np.median(seconds)), "s")
        yield Figure("first epoch", float(seconds[0]), "s")
        if cuda:
            yield Figure("peak memory of the GPU", torch.cuda.max_memory_allocated() / 2**30, "GiB")
        source = Crops(grids, normalise, CROP, pinned=cuda)
        loading = partial(
            lambda random: [None for _ in training_batches(train, source, sizes.crops, random)],
            np.random.default_rng(0),
        )
        loading()  # fills the cache, as the first epoch does
        yield Figure("loading alone", len(train) / _duration(loading, 1), "crops/s")
        yield from _gpu_shares("training", partial(fit, 1), device)


def leases(sizes: Sizes) -> Iterator[Figure]:
    """Lease one GPU to processes in turn, and kill one that has it."""
    with tempfile.TemporaryDirectory() as folder:
        hold = partial(_Holder, Path(folder))
        first = hold()
        first.receives(60)
        second = hold()
        if second.receives_within(3):
            raise CheckFailedError("two processes had the lease of one GPU at a time")
        start = time.perf_counter()
        first.stop()
        second.receives(60)
        yield Figure("lease passed on after its end", time.perf_counter() - start, "s")
        third = hold()
        if third.receives_within(3):
            raise CheckFailedError("two processes had the lease of one GPU at a time")
        start = time.perf_counter()
        second.kill()
        free = third.receives(60)
        yield Figure("lease passed on after a kill", time.perf_counter() - start, "s")
        if math.isfinite(free):
            yield Figure("free memory of the GPU then", free, "%", "90 % or more")
            if free < 90:
                raise CheckFailedError(
                    f"the killed process left {100 - free:.0f} % of the memory in use"
                )
        third.stop()


Part = Callable[[Sizes], Iterator[Figure]]
PARTS: dict[str, Part] = {
    "tests": gpu_tests,
    "encoder training": encoder_training,
    "embeddings": embeddings,
    "compression": compression,
    "several slides": several_slides,
    "grid CNN": grid_cnn,
    "leases": leases,
}


class _Holder:
    """A process that leases the GPU, fills a part of its memory, and holds it until it is ended."""

    def __init__(self, folder: Path) -> None:
        self.pipe, there = processes.Pipe()
        self.process = processes.Process(target=_hold, args=(there, folder), daemon=True)
        self.process.start()
        there.close()

        self.pipe.recv()  # the process is asking for the lease

    def receives(self, seconds: float) -> float:
        """Wait for the lease; free memory of the GPU before it is filled, %; NaN on a CPU."""
        if not self.pipe.poll(seconds):
            raise CheckFailedError(f"no lease of the GPU within {seconds:.0f} s")
        return float(self.pipe.recv())

    def receives_within(self, seconds: float) -> bool:
        return self.pipe.poll(seconds)

    def stop(self) -> None:
        self.pipe.send("end")
        self.process.join()

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


def _hold(pipe: Connection, folder: Path) -> None:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = first  # one GPU, whatever the machine has
    with contextlib.ExitStack() as stack:
        free, gpus = math.nan, gpu_uuids()
        pipe.send("asking")
        if gpus:
            device = stack.enter_context(leased_device())
            available, total = torch.cuda.mem_get_info(device)
            free = 100 * available / total
            filled = torch.ones(available // 2, dtype=torch.uint8, device=device)
            torch.cuda.synchronize()
        else:
            stack.enter_context(lease(["simulated"], folder))
            filled = torch.ones(1)
        pipe.send(free)
        pipe.recv()
        del filled


def _textured_patches(count: int) -> NDArray[np.uint8]:
    """Return patches of texture in several brightnesses, uint8 (count, 128, 128, 3)."""
    random, whole = np.random.default_rng(0), texture()
    places = random.integers(0, len(whole) - PATCH, (count, 2))
    patches = np.stack([whole[y : y + PATCH, x : x + PATCH] for y, x in places])
    gain = random.uniform(0.5, 1, (count, 1, 1, 3))
    return (patches * gain).astype(np.uint8)


def _set_statistics(encoder: Encoder, pixels: NDArray[np.uint8]) -> None:
    """Give BatchNorm the statistics of some patches, as a training would."""
    encoder.module.train()
    with torch.no_grad():
        for _ in range(20):
            encoder.module(torch.from_numpy(pixels[:64]).permute(0, 3, 1, 2))
    encoder.module.eval()


def _embed(encoder: PreparedEncoder, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    with torch.inference_mode():
        parts = torch.from_numpy(pixels).permute(0, 3, 1, 2).split(256)
        found = [encoder.module(part.to(encoder.device)).double().cpu() for part in parts]
    return torch.cat(found).numpy()


def _encoding_alone(encoder: PreparedEncoder, sizes: Sizes) -> Iterator[Figure]:
    """Encode one block again and again: from the GPU's memory, and from the host's."""
    count = min(GPU_BLOCK**2, sizes.compared)
    pixels = torch.from_numpy(_textured_patches(count))
    there = pixels.to(encoder.device).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def encode() -> None:
        encoder.module(there).half().cpu()

    @torch.inference_mode()
    def copy_and_encode() -> None:
        held = pixels.pin_memory() if encoder.device.type == "cuda" else pixels
        encoder.module(held.to(encoder.device).permute(0, 3, 1, 2)).half().cpu()

    for what, work in (("encoding alone", encode), ("copying and encoding alone", copy_and_encode)):
        rate = len(pixels) / _duration(work, sizes.repeats)
        yield Figure(f"{encoder.precision}: {what}, one block at a time", rate, "patches/s")


def _read(path: Path, table: pl.DataFrame) -> int:
    """Read the patches of a slide that is opened anew, with as many threads as compression."""
    with open_slide(path) as slide:

        def work(block: Block) -> int:
            return len(read_block(slide, block, patch=PATCH, mpp=MPP)[0])

        return sum(map_in_order(plan_blocks(table, side=GPU_BLOCK), work, cores()))


def _compress(path: Path, table: pl.DataFrame, encoder: PreparedEncoder) -> int:
    with open_slide(path) as slide:
        grid = compress_slide(slide, table, encoder, slide_id="benchmark", slide_identity="")
    return int(grid.valid.sum())


def _compress_share(
    pipe: Connection, slides: dict[str, SlideSource], out: Path, device: str, threads: int
) -> None:
    """Compress a process's share of the slides when told to; send the number of patches."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    encoder = published_encoder().prepare(device)
    _embed(encoder, _textured_patches(GPU_BLOCK**2))
    pipe.send("ready")
    pipe.recv()
    report = compress_slides(slides, encoder, out)
    if failed := report.filter(pl.col("status") != "compressed")["reason"].to_list():
        raise CheckFailedError(f"slides that were not compressed: {failed}")
    pipe.send(int(report["cells"].sum()))


def _steps(objective: Any, learn: Callable[[object], float], generator: torch.Generator) -> None:
    """Train for some steps, each with a new batch."""
    for _ in range(20):
        learn(objective.batch(generator))


def _duration(work: Callable[[], object], times: int) -> float:
    """Return the median duration of a function that waits for its result, s."""
    work()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _gpu_shares(what: str, work: Callable[[], object], device: str) -> Iterator[Figure]:
    """Shares of the time in which the GPU computes or copies; nothing on a CPU."""
    if not device.startswith("cuda"):
        return
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    spans: dict[str, list[tuple[float, float]]] = {"kernels": [], "copies": []}
    for event in profiled.events() or ():
        if event.device_type.name == "CUDA":
            kind = "copies" if event.name.startswith(("Memcpy", "Memset")) else "kernels"
            spans[kind].append((event.time_range.start, event.time_range.end))
    busy = _union([span for kind in spans.values() for span in kind]) / 1e6 / seconds
    yield Figure(f"{what}: GPU busy", 100 * busy, "% of the time")
    for kind, found in spans.items():
        share = _union(found) / 1e6 / seconds
        yield Figure(f"{what}: GPU busy with {kind}", 100 * share, "% of the time")


def _union(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, -math.inf
    for low, high in sorted(spans):
        total += max(0.0, high - max(low, end))
        end = max(end, high)
    return total


def run_part(name: str, sizes: Sizes) -> Report:
    """Run a part in a process of its own; whatever happens to it, return a report."""
    here, there = processes.Pipe(duplex=False)
    start = time.perf_counter()
    process = processes.Process(target=_work, args=(there, name, sizes))
    process.start()
    there.close()
    figures: list[Figure] = []
    failed = None
    try:
        while here.poll(max(0.0, LIMIT - (time.perf_counter() - start))):
            message = here.recv()
            if not isinstance(message, Figure):
                failed = message
                break
            print(f"    {message.what}: {_shown(message)}", flush=True)
            figures.append(message)
        else:
            failed = f"it took more than {LIMIT:.0f} s"
            process.kill()
        process.join()
    except EOFError:
        process.join()
        failed = f"its process ended with exit code {process.exitcode}"
    return Report(name, time.perf_counter() - start, tuple(figures), failed)


def _work(pipe: Connection, name: str, sizes: Sizes) -> None:
    """Send the figures of a part as they are measured, then None or the reason of a failure."""
    try:
        for figure in PARTS[name](sizes):
            pipe.send(figure)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    pipe.send(None)


def machine() -> dict[str, Any]:
    """Describe the machine, in a process of its own: asking for the GPU's name starts CUDA."""
    with processes.Pool(1) as pool:
        gpu = pool.apply(_gpu)
    return {
        **gpu,
        "processor": processor(),
        "cores": cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "nic": __version__,
        "date": date.today().isoformat(),
    }


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"gpu": None, "gpu_memory_gib": None, "cuda": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def as_markdown(about: dict[str, Any], reports: Sequence[Report]) -> str:
    """Return the table for the documentation."""
    on = about["gpu"] or "CPU only (no CUDA device)"
    lines = [
        f"**{on}**, {about['cores']} cores of {about['processor']}, torch {about['torch']}, "
        f"{about['date']}"
        + (", **tiny sizes: not a measurement of speed**" if about["tiny"] else ""),
        "",
        "| part | measured | | aim |",
        "|---|---|---|---|",
    ]
    for report in reports:
        for figure in report.figures:
            lines.append(
                f"| {report.part} | {figure.what} | {_shown(figure)} | {figure.aim or ''} |"
            )
        if report.failed:
            lines.append(f"| {report.part} | **failed** | {report.failed} | |")
    return "\n".join(lines) + "\n"


def _shown(figure: Figure) -> str:
    value = f"{figure.value:,.0f}" if abs(figure.value) >= 100 else f"{figure.value:.3g}"
    return f"{value} {figure.unit}".strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of gpu.json and gpu.md")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, as without a CUDA device")
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="run this part only; may be repeated"
    )
    options = parser.parse_args(arguments)
    about = machine()
    about["tiny"] = options.tiny or about["gpu"] is None
    sizes = TINY if about["tiny"] else Sizes()
    options.out.mkdir(parents=True, exist_ok=True)
    reports = []
    for name in options.part or PARTS:
        print(name, flush=True)
        report = run_part(name, sizes)
        reports.append(report)
        print(f"  {report.failed or 'passed'} ({report.seconds:.0f} s)", flush=True)
        # after each part, so that an interruption loses nothing
        found = {**about, "parts": [asdict(report) for report in reports]}
        (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.out / "gpu.md").write_text(as_markdown(about, reports))
    return int(any(report.failed for report in reports))


if __name__ == "__main__":
    sys.exit(main())

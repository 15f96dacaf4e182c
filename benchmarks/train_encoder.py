"""Benchmark of a training step: loading and augmentation against forward and backward pass.

    python benchmarks/train_encoder.py
    python benchmarks/train_encoder.py --objective vae --precision float32 --threads 1

Patches are noise in memory-mapped files, the format of a patch task; their content does not affect
the time. The measurements run in alternating rounds and the median round is reported, so that other
load on the machine affects all of them equally; an idle machine is still better.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nic_core.cohort import EncoderSpec
from nic_core.devices import resolve_device, resolve_precision
from nic_core.encoders import augmentation
from nic_core.encoders.augmentation import HEAVY, augment
from nic_core.encoders.encoder import build_encoder
from nic_core.encoders.networks import channels_last
from nic_core.encoders.objectives.sampling import pool_stored
from nic_core.encoders.patch_tasks import (
    TABLE_SCHEMA,
    PatchDataset,
    load_patch_task,
    save_patch_task,
)
from nic_core.encoders.training import OBJECTIVES
from nic_core.types import Precision

PATCH, MPP, EMBEDDING_SIZE = 128, 0.5, 128
CLASSES = ("one", "other")


def noise_task(folder: Path, name: str, patches: int, seed: int) -> PatchDataset:
    """Write a patch task of noise: images of 2 x 2 patches, four images per patient.

    Patches of the second class are half as bright, so that there is something to learn.
    """
    pixels = np.random.default_rng(seed).integers(0, 256, (patches, PATCH, PATCH, 3), np.uint8)
    pixels[np.arange(patches) // 4 % 2 == 1] //= 2
    rows = []
    for index in range(patches):
        label = index // 4 % 2
        row, column = index // 2 % 2, index % 2
        place = PATCH * column, PATCH * row, row, column
        split = ("train", "train", "train", "validation", "test")[index // 16 % 5]
        group = f"patient-{index // 16}"
        rows.append((index, f"{index // 4}.png", *place, CLASSES[label], label, group, split))
    table = pl.DataFrame(rows, schema=TABLE_SCHEMA, orient="row")
    save_patch_task(folder / name, PatchDataset(name, "none", CLASSES, MPP, pixels, table))
    return load_patch_task(folder / name)


def build_objective(spec: EncoderSpec, tasks: Sequence[PatchDataset], device: torch.device) -> Any:
    """Return the objective of an encoder with its networks, as at the start of a training."""
    torch.manual_seed(0)
    encoder = build_encoder(spec.architecture, patch=PATCH, embedding_size=EMBEDDING_SIZE).to(
        device
    )
    objective = OBJECTIVES[spec.objective](encoder, tasks, batch=spec.batch, validation=64, seed=0)
    channels_last(objective.networks)
    objective.networks.train()
    return objective


def learner(objective: Any, precision: Precision) -> Callable[[object], float]:
    """Return a function that trains on one batch: forward, backward, optimiser; the loss."""
    optimizer = torch.optim.Adam(
        objective.networks.parameters(), lr=objective.learning_rate, fused=True
    )

    def learn(batch: object) -> float:
        with torch.autocast(objective.device.type, torch.bfloat16, precision == "bfloat16"):
            loss = objective.losses(batch)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss)

    return learn


def alternate(
    functions: dict[str, Callable[[], object]], rounds: int, repeats: int
) -> dict[str, float]:
    """Return the median time of each function in ms, over alternating rounds."""
    for function in functions.values():
        for _ in range(3):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            times[name].append((time.perf_counter() - start) * 1000 / repeats)
    return {name: median(found) for name, found in times.items()}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument(
        "--objective", choices=("mtl", "vae", "contrastive", "bigan"), default="mtl"
    )
    arguments.add_argument("--tasks", type=int, default=4)
    arguments.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=15)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    device = resolve_device("auto")
    names = tuple(f"task-{number}" for number in range(options.tasks))
    spec = EncoderSpec(
        name="benchmark",
        objective=options.objective,
        tasks=names,
        precision=options.precision,
    )
    precision = resolve_precision(spec.precision, device)
    with tempfile.TemporaryDirectory() as folder:
        tasks = [noise_task(Path(folder), name, 800, k) for k, name in enumerate(names)]
        objective = build_objective(spec, tasks, device)
        learn = learner(objective, precision)
        generator = torch.Generator(device).manual_seed(0)
        loaded = objective.batch(generator)
        functions: dict[str, Callable[[], object]] = {
            "forward, backward, optimiser": lambda: learn(loaded),
            "loading and augmentation": lambda: objective.batch(generator),
            "complete step": lambda: learn(objective.batch(generator)),
        }
        step = alternate(functions, options.rounds, 4)
        shares = [(task, task.rows("train")[: spec.batch // len(tasks)]) for task in tasks]
        parts = alternate(
            {
                "reading and pooling": lambda: [
                    pool_stored(torch.from_numpy(task.patches[rows]), 2) for task, rows in shares
                ],
                **augmentation_parts(spec.batch, generator),
            },
            options.rounds,
            4,
        )
    seen = objective.patches_per_step
    console = Console()
    setting = f"{options.objective}, {options.tasks} tasks, {precision}"
    report = Table(
        setting, "ms per step", "patches/s", title=f"{options.threads} threads, {device}"
    )
    for name, milliseconds in step.items():
        report.add_row(name, f"{milliseconds:.1f}", f"{seen * 1000 / milliseconds:,.0f}")
    console.print(report)
    learning, complete = step["forward, backward, optimiser"], step["complete step"]
    console.print(f"loading and augmentation: {1 - learning / complete:.1%} of the step")
    report = Table(f"batch of {spec.batch}, pooled to 64 px", "ms")
    for name, milliseconds in parts.items():
        report.add_row(name, f"{milliseconds:.2f}")
    console.print(report)


def augmentation_parts(batch: int, generator: torch.Generator) -> dict[str, Callable[[], Tensor]]:
    """Return functions for the augmentation of a batch and for each of its parts."""
    device = generator.device
    pooled = torch.rand(batch, 3, PATCH // 2, PATCH // 2, device=device)
    grid = augmentation._sampling_grid(pooled, generator, HEAVY)
    return {
        "augmentation": lambda: augment(pooled, generator),
        "  spatial changes: sampling grid": lambda: augmentation._sampling_grid(
            pooled, generator, HEAVY
        ),
        "  spatial changes: resampling": lambda: torch.nn.functional.grid_sample(
            pooled, grid, padding_mode="reflection", align_corners=False
        ),
        "  stain, hue, saturation, contrast, brightness": lambda: augmentation._jitter_colour(
            pooled, generator, HEAVY
        ),
        "  noise": lambda: torch.randn(pooled.shape, generator=generator, device=device),
    }


if __name__ == "__main__":
    main()

"""What only a CUDA device can show: its results against the CPU's, its memory, its leases."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from benchmarks.compress import MPP, PATCH, all_cells, paint_slide, published_encoder
from benchmarks.train_encoder import EMBEDDING_SIZE, noise_task
from nic_core.cohort import EncoderSpec
from nic_core.compression import compress_slide
from nic_core.devices import gpu_uuids, leased_device, resolve_device, resolve_precision
from nic_core.encoders.inference import MemoryBoundModule
from nic_core.encoders.training import train_encoder
from nic_core.grids import Grid
from nic_core.slides import open_slide
from tests.models.conftest import plant
from tests.models.test_cross_validation import QUICK, RIM, evaluate, primary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "slide.tif"
    paint_slide(path, 5000, pyramid=True)
    return path


def compressed(
    path: Path, device: str, *, reading: str = "patch", orientations: bool = False
) -> Grid:
    prepared = published_encoder_with_fixed_weights().prepare(device, "float32", reading)
    with open_slide(path) as opened:
        table = all_cells(opened).with_columns(kept=pl.int_range(pl.len()) % 7 != 3)
        reason = pl.when(~pl.col("kept")).then(pl.lit("background", table.schema["reason"]))
        table = table.with_columns(reason=reason)
        return compress_slide(
            opened,
            table,
            prepared,
            slide_id="benchmark",
            slide_identity="",
            orientations=orientations,
        )


def published_encoder_with_fixed_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return published_encoder()


@pytest.mark.parametrize(
    "options", [{}, {"reading": "input"}, {"orientations": True}], ids=["patch", "input", "turned"]
)
def test_a_grid_compressed_on_the_gpu_is_that_of_the_cpu(slide, options):
    there, here = compressed(slide, "cuda", **options), compressed(slide, "cpu", **options)
    np.testing.assert_array_equal(there.valid, here.valid)
    for name in ("embeddings", "orientations") if options.get("orientations") else ("embeddings",):
        found, expected = (getattr(grid, name).astype(float) for grid in (there, here))
        spread = expected[..., here.valid].std(axis=-1).mean()
        assert np.abs(found - expected).max() < 0.1 * spread
        assert np.sqrt(((found - expected) ** 2).mean()) < 0.01 * spread


def test_automatic_precision_of_a_gpu_with_bfloat16_is_bfloat16():
    assert resolve_device("auto").type == "cuda"
    has = torch.cuda.get_device_capability() >= (8, 0)
    assert resolve_precision("auto", resolve_device("auto")) == ("bfloat16" if has else "float32")


def test_a_batch_that_exceeds_the_memory_is_halved_until_it_fits():
    free, _ = torch.cuda.mem_get_info()
    calls = []

    class Hungry(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            calls.append(len(pixels))
            torch.empty(len(pixels), free // 3, dtype=torch.uint8, device="cuda")
            return pixels.flatten(1).float().sum(1, keepdim=True)

    pixels = torch.ones(8, 3, 4, 4, dtype=torch.uint8, device="cuda")
    found = MemoryBoundModule(Hungry())(pixels)
    assert calls == [8, 4, 2, 2, 2, 2]
    assert found.flatten().tolist() == [48.0] * 8


class Interrupted(Exception):
    """Raised to end a training."""


def test_an_interrupted_training_on_the_gpu_resumes(tmp_path):
    task = noise_task(tmp_path, "task", 320, 0)
    spec = EncoderSpec(name="e", objective="mtl", tasks=("task",), patches_seen=24 * 64, batch=32)
    checkpoint, seen = tmp_path / "checkpoint", []

    def interrupt(patches: int, total: int) -> None:
        seen.append(patches)
        if len(seen) == 20:
            raise Interrupted

    def train(progress):
        return train_encoder(
            spec,
            [task],
            patch=PATCH,
            mpp=MPP,
            embedding_size=EMBEDDING_SIZE,
            device="cuda",
            checkpoint=checkpoint,
            progress=progress,
        )

    with pytest.raises(Interrupted):
        train(interrupt)
    seen.clear()
    trained = train(lambda patches, total: seen.append(patches))
    assert seen[0] == 19 * 32
    epochs = trained.history["epoch"].to_list()
    assert epochs == list(range(1, len(epochs) + 1))
    assert len(epochs) >= 10  # it was interrupted in the tenth
    assert trained.history["validation/balanced_accuracy"].max() > 0.9
    assert {tensor.device.type for tensor in trained.encoder.module.state_dict().values()} == {
        "cpu"
    }


def test_slide_models_trained_on_the_gpu_learn_and_return_to_the_cpu():
    result = evaluate(plant(40), RIM, QUICK.model_copy(update={"epochs": 40}), device="cuda")
    assert primary(result)["value"] > 0.85


def hold(pipe: Connection) -> None:
    gpu_uuids()
    pipe.send("asking")
    with leased_device() as device:
        torch.ones(1 << 20, device=device)
        pipe.send(device)
        pipe.recv()


@pytest.mark.skipif(
    torch.cuda.device_count() > 1, reason="a second process would lease another GPU"
)
def test_a_second_process_waits_for_the_gpu_of_a_killed_one():
    assert len(gpu_uuids()) == 1
    context = multiprocessing.get_context("spawn")
    started = []
    for _ in range(2):
        here, there = context.Pipe()
        process = context.Process(target=hold, args=(there,), daemon=True)
        process.start()
        there.close()
        started.append((here, process))
        assert here.recv() == "asking"
        if len(started) == 1:
            assert here.poll(60)
            assert here.recv() == "cuda:0"
    (_, first), (pipe, second) = started
    assert not pipe.poll(3)
    os.kill(first.pid, signal.SIGKILL)
    assert pipe.poll(60)
    assert pipe.recv() == "cuda:0"
    pipe.send("end")
    second.join()

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import pyvips
import torch

from nic_core.encoders import Encoder, EncoderCard
from nic_core.encoders.patch_tasks import TABLE_SCHEMA, PatchDataset

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = Path(os.environ.get("NIC_REAL_DATA") or REPOSITORY.parent / "shared" / "real-data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set NIC_REAL_DATA")
    return folder


@pytest.fixture(scope="session")
def published(real_data: Path) -> Path:
    folder = real_data.parent / "published-encoders"
    if not folder.is_dir():
        pytest.skip(f"no released encoders at {folder}")
    return folder


def texture(rng: np.random.Generator, side: int, kind: int) -> np.ndarray:
    """Draw stripes; their direction and spacing depend on ``kind``, their colour does not."""
    y, x = np.mgrid[:side, :side]
    angle, period = [(0.0, 16), (np.pi / 4, 16), (0.0, 40)][kind]
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period + rng.uniform(0, 6))
    colour = rng.uniform(80, 180, 3)
    return (
        (colour + 50 * wave[..., None] + rng.normal(0, 5, (side, side, 3)))
        .clip(0, 255)
        .astype(np.uint8)
    )


def make_dataset(
    name: str = "stripes",
    classes: tuple[str, ...] = ("fine", "coarse"),
    kinds: tuple[int, ...] = (0, 2),
    *,
    each: int = 60,
    side: int = 128,
    seed: int = 0,
) -> PatchDataset:
    rng = np.random.default_rng(seed)
    rows, patches = [], []
    for number, label in enumerate(classes):
        for k in range(each):
            split = ("train", "train", "train", "validation", "test")[k % 5]
            group = f"{split}-{k % 10}"
            rows.append((len(rows), f"{label}/{k}.png", 0, 0, 0, 0, label, number, group, split))
            patches.append(texture(rng, side, kinds[number]))
    table = pl.DataFrame(rows, schema=TABLE_SCHEMA, orient="row")
    return PatchDataset(name, "none", classes, 0.5, np.stack(patches), table)


def write_image(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyvips.Image.new_from_array(pixels).write_to_file(str(path))
    return path


def encoder_of(module: torch.nn.Module, architecture: str, embedding_size: int) -> Encoder:
    """An encoder of patches of 128 px whose weights were not hashed."""
    card = EncoderCard(
        name="e",
        architecture=architecture,
        objective="vae",
        patch=128,
        mpp=0.5,
        embedding_size=embedding_size,
        weights_hash="0",
    )
    return Encoder(card, module)

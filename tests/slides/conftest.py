"""Small painted slides in every container that libvips and tifffile can write."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pyvips
import tifffile
from scipy import ndimage

GLASS = (242, 241, 243)


def paint(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Paint noise of two scales in the colours of H&E, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    fine, coarse = rng.random((2, height, width))
    field = ndimage.gaussian_filter(fine, 1.0) + 4 * ndimage.gaussian_filter(coarse, 6.0)
    field = (field - field.min()) / np.ptp(field)
    pink, purple = np.array([235, 170, 205]), np.array([95, 55, 130])
    return np.rint(pink + field[..., None] * (purple - pink)).astype(np.uint8)


def vips(pixels: np.ndarray) -> pyvips.Image:
    return pyvips.Image.new_from_array(pixels, interpretation="srgb")


def write_tiff(path: Path, pixels: np.ndarray, *, mpp: float, **options: object) -> Path:
    """Write a tiled pyramidal TIFF; lossless by default."""
    settings = {
        "tile": True,
        "tile_width": 128,
        "tile_height": 128,
        "pyramid": True,
        "compression": "deflate",
    } | options
    vips(pixels).tiffsave(str(path), xres=1000 / mpp, yres=1000 / mpp, **settings)
    return path


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    return paint(700, 900)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> dict[str, Path]:
    """The same image as several kinds of slide, 0.25 um/px, lossless."""
    folder = tmp_path_factory.mktemp("slides")
    paths = {
        "tiff": write_tiff(folder / "tiff.tif", pixels, mpp=0.25),
        "bigtiff": write_tiff(folder / "bigtiff.tif", pixels, mpp=0.25, bigtiff=True),
        "subifd": write_tiff(folder / "subifd.tif", pixels, mpp=0.25, subifd=True),
        "strips": write_tiff(folder / "strips.tif", pixels, mpp=0.25, tile=False, pyramid=False),
        "single": write_tiff(folder / "single.tif", pixels, mpp=0.25, pyramid=False),
    }
    description = "Aperio Image Library v11\n900x700 (128x128) RGB|AppMag = 40|MPP = 0.2500"
    paths["svs"] = folder / "aperio.svs"
    tifffile.imwrite(paths["svs"], pixels, tile=(128, 128), description=description, metadata=None)
    paths["ome"] = folder / "image.ome.tif"
    physical = {f"PhysicalSize{axis}": 0.25 for axis in "XY"}
    with tifffile.TiffWriter(paths["ome"]) as writer:
        options = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib"}
        writer.write(pixels, subifds=1, metadata={"axes": "YXS", **physical}, **options)
        writer.write(reduced(pixels, 2), subfiletype=1, **options)
    paths["jpeg2000"] = folder / "jpeg2000.tif"
    tifffile.imwrite(
        paths["jpeg2000"],
        pixels,
        tile=(128, 128),
        photometric="rgb",
        compression="jpeg2000",
        resolution=(40_000, 40_000),
        resolutionunit="CENTIMETER",
    )
    paths["png"] = folder / "region.png"
    vips(pixels).pngsave(str(paths["png"]))
    return paths


def reduced(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Block means, rounded half up; incomplete blocks are dropped."""
    height, width = (length // factor for length in pixels.shape[:2])
    blocks = pixels[: height * factor, : width * factor].astype(np.int64)
    sums = blocks.reshape(height, factor, width, factor, 3).sum(axis=(1, 3))
    return ((2 * sums + factor**2) // (2 * factor**2)).astype(np.uint8)


def area_mean(
    level: np.ndarray, x: float, y: float, width: int, height: int, scale: float
) -> np.ndarray:
    """Reference implementation: area means of a level (white outside), before rounding."""

    def weights(start: float, count: int, length: int) -> np.ndarray:
        edges = start + scale * np.arange(count + 1)
        index = np.arange(length)
        low = np.maximum(edges[:-1, None], index)
        high = np.minimum(edges[1:, None], index + 1)
        return np.clip(high - low, 0, None) / scale

    down = weights(y, height, level.shape[0])
    across = weights(x, width, level.shape[1])
    inside = np.einsum("ry,yxc,sx->rsc", down, level.astype(np.float64), across, optimize=True)
    return inside + 255 * (1 - np.outer(down.sum(axis=1), across.sum(axis=1)))[..., None]


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[str], Path]:
    """Write a slide of 16 JPEG tiles with tile 5 damaged: the whole tile, or its middle."""

    def make(part: str) -> Path:
        path = write_tiff(
            tmp_path / f"{part}.tif", paint(512, 512), mpp=0.5, compression="jpeg", pyramid=False
        )
        with tifffile.TiffFile(path) as tiff:
            offset, count = tiff.pages[0].dataoffsets[5], tiff.pages[0].databytecounts[5]
        noise = random.Random(1).randbytes(count)
        start, stop = {"tile": (0, count), "middle": (count // 3, 2 * count // 3)}[part]
        with path.open("r+b") as file:
            file.seek(offset + start)
            file.write(noise[start:stop])
        return path

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real slides, which are not part of the project."""
    default = Path(__file__).parents[3] / "shared" / "real-data"
    folder = Path(os.environ.get("NIC_REAL_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"no real slides at {folder} (set NIC_REAL_DATA)")
    return folder

"""Measure how much an ICC profile, applied to the pixels, changes the embeddings of a slide.

    python benchmarks/colours.py ENCODER SLIDE... [--mpp UM]

ENCODER is a released Keras file (``.h5``) or an encoder folder. A slide with a profile is
compressed with the colours ``stored`` and ``srgb``. A slide without one is rewritten with each of
two profiles: Display P3, and the same primaries with gamma 1.8. The table gives the mean change of
the pixels, the cosine of the two embeddings of a cell (mean and 1st percentile) and their rms
distance, relative to the spread of the stored embeddings between the slide's cells.
"""

from __future__ import annotations

import argparse
import struct
import tempfile
from pathlib import Path

import numpy as np
import pyvips
import tifffile
from rich.console import Console
from rich.table import Table

from nic_core.cohort import Geometry
from nic_core.compression import compress_slide
from nic_core.encoders import load_encoder
from nic_core.encoders.encoder import Encoder
from nic_core.encoders.keras_import import import_keras_encoder
from nic_core.slides import open_slide
from nic_core.tiling.patches import patch_table
from nic_core.tiling.tissue import tissue_mask
from nic_core.types import Colours

_CURVE = b"para\0\0\0\0"  # a parametric tone curve; its kind and gamma follow


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("encoder", type=Path)
    parser.add_argument("slides", type=Path, nargs="+")
    parser.add_argument("--mpp", type=float)
    options = parser.parse_args()
    keras = options.encoder.suffix == ".h5"
    encoder = (
        import_keras_encoder(options.encoder, "encoder") if keras else load_encoder(options.encoder)
    )
    table = Table(
        "slide", "profile", "mean change (of 255)", "cosine", "1st percentile", "distance"
    )
    p3 = bytes(pyvips.Operation.call("profile_load", "p3"))
    with tempfile.TemporaryDirectory() as folder:
        for path in options.slides:
            with open_slide(path, mpp=options.mpp) as slide:
                own = slide.icc_profile
                tagged = {own.description: path} if own else {}
                if own is None:
                    pixels = slide.read(0, 0, slide.width, slide.height, slide.mpp)
                    for name, profile in (("Display P3", p3), ("gamma 1.8", with_gamma(p3, 1.8))):
                        tagged[name] = Path(folder) / f"{path.stem}-{name}.tif"
                        scale = (10_000 / slide.mpp, 10_000 / slide.mpp)
                        tifffile.imwrite(
                            tagged[name],
                            pixels,
                            photometric="rgb",
                            tile=(256, 256),
                            compression="zlib",
                            iccprofile=profile,
                            resolution=scale,
                            resolutionunit="CENTIMETER",
                            metadata=None,
                        )
            for name, file in tagged.items():
                table.add_row(path.name, name, *measure(file, encoder, options.mpp))
    Console().print(table)


def measure(path: Path, encoder: Encoder, mpp: float | None) -> list[str]:
    """Compare a slide's embeddings in both colours; return the last four columns of the table."""
    prepared = encoder.prepare("cpu", "float32")
    found, means = {}, {}
    colours: tuple[Colours, ...] = ("stored", "srgb")
    with open_slide(path, mpp=mpp) as slide:
        card = encoder.card
        cells = patch_table(
            "s", slide, tissue_mask(slide), Geometry(card.patch, card.mpp, card.patch), tissue=0.6
        )
    for name in colours:
        with open_slide(path, mpp=mpp, colours=name) as slide:
            grid = compress_slide(slide, cells, prepared, slide_id="s", slide_identity="")
            means[name] = slide.thumbnail(1000).astype(float)
        found[name] = grid.embeddings[:][:, grid.valid].T.astype(np.float64)
    stored, srgb = found["stored"], found["srgb"]
    lengths = np.linalg.norm(stored, axis=1) * np.linalg.norm(srgb, axis=1)
    cosine = (stored * srgb).sum(axis=1) / lengths
    spread = np.sqrt(((stored - stored.mean(axis=0)) ** 2).sum(axis=1).mean())
    distance = np.sqrt(((stored - srgb) ** 2).sum(axis=1).mean())
    change = np.abs(means["stored"] - means["srgb"]).mean()
    values = (cosine.mean(), np.percentile(cosine, 1))
    return [f"{change:.1f}", *(f"{v:.4f}" for v in values), f"{distance / spread:.0%}"]


def with_gamma(profile: bytes, gamma: float) -> bytes:
    """Return a matrix profile with pure gamma curves instead of its parametric ones."""
    at = profile.index(_CURVE) + len(_CURVE)
    changed = bytearray(profile)
    changed[at : at + 8] = struct.pack(">HHi", 0, 0, round(gamma * 65536))
    return bytes(changed)


if __name__ == "__main__":
    main()

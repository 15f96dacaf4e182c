"""Measure another package on the same slide, cells and encoder; run it with that package's Python.

    echo '["read", "slide.tif"]' | python benchmarks/peers.py lazyslide ENCODER.pt

``python -m benchmarks.compress --peer`` writes the slides and the encoder, and starts this program.
ENCODER.pt is a TorchScript network from uint8 (B, 3, 128, 128) to embeddings. Each line of the
input is a JSON array: ``read`` (read alone) or ``compress`` (read and encode), and a slide, which
is opened anew and not timed. The answer is a line ``RATE`` with patches per second, at the
package's defaults (batches of 32).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

PATCH, MPP, BATCH = 128, 0.5, 32
KEEP_ALIVE: list[object] = []


@cache
def declare_torchvision() -> None:
    """Declare the operators of torchvision, which the benchmark does not use.

    One built for another torch cannot register them, and fails to import.
    """
    import torch

    declared = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        declared.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
    KEEP_ALIVE.append(declared)


def lazyslide(slide: Path, encoder: Path) -> tuple[Callable[[], int], Callable[[], int]]:
    """Return the functions that read and that encode the slide with LazySlide."""
    import lazyslide as zs
    import numpy as np
    import torch

    declare_torchvision()
    from shapely import box
    from wsidata import open_wsi
    from wsidata.io import add_tissues

    wsi = open_wsi(str(slide))
    height, width = wsi.properties.shape
    add_tissues(wsi, "tissues", [box(0, 0, width, height)])
    zs.pp.tile_tissues(wsi, PATCH, mpp=MPP, background_filter=False)

    def read() -> int:
        return sum(1 for _ in wsi.iter.tile_images("tiles"))

    def encode() -> int:
        zs.tl.feature_extraction(
            wsi,
            model=torch.jit.load(encoder).eval(),
            model_name="encoder",
            # uint8 (H, W, 3) to (3, H, W)
            transform=lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
            batch_size=BATCH,
            pbar=False,
        )
        return len(wsi.shapes["tiles"])

    return read, encode


def tiatoolbox(slide: Path, encoder: Path) -> tuple[Callable[[], int], Callable[[], int]]:
    """Return the functions that read and that encode the slide with TIAToolbox."""
    import torch

    declare_torchvision()
    from tiatoolbox.models.dataset import WSIPatchDataset
    from torch.utils.data import DataLoader

    patches = WSIPatchDataset(
        slide,
        patch_input_shape=(PATCH, PATCH),
        stride_shape=(PATCH, PATCH),
        resolution=MPP,
        units="mpp",
        auto_get_mask=False,
    )
    network = torch.jit.load(encoder).eval()

    def read() -> int:
        return sum(len(batch["image"]) for batch in DataLoader(patches, batch_size=BATCH))

    def encode() -> int:
        count = 0
        with torch.inference_mode():
            for batch in DataLoader(patches, batch_size=BATCH):
                count += len(network(batch["image"].permute(0, 3, 1, 2)))
        return count

    return read, encode


def hs2p(slide: Path, encoder: Path) -> tuple[Callable[[], int], Callable[[], int]]:
    """Return the functions that read and that encode the slide with hs2p."""
    import numpy as np
    import torch
    from hs2p import SlideSpec, TilingConfig, tile_slide
    from hs2p.wsi import iter_tile_arrays_from_result
    from PIL import Image

    with Image.new("L", (64, 64), 1) as whole:
        mask = Path(tempfile.mkdtemp()) / "mask.png"
        whole.save(mask)
    spec = SlideSpec(sample_id="slide", image_path=slide, mask_path=mask)
    tiling = TilingConfig(
        requested_spacing_um=MPP, requested_tile_size_px=PATCH, tolerance=0.05, overlap=0.0
    )
    result = tile_slide(spec, tiling=tiling)
    network = torch.jit.load(encoder).eval()

    def batches() -> Iterator[np.ndarray]:
        waiting = []
        for tile in iter_tile_arrays_from_result(result=result):
            # tiles are returned at their stored resolution
            waiting.append(np.asarray(Image.fromarray(tile).reduce(len(tile) // PATCH)))
            if len(waiting) == BATCH:
                yield np.stack(waiting)
                waiting = []
        if waiting:
            yield np.stack(waiting)

    def read() -> int:
        return sum(len(batch) for batch in batches())

    def encode() -> int:
        with torch.inference_mode():
            return sum(
                len(network(torch.from_numpy(batch).permute(0, 3, 1, 2))) for batch in batches()
            )

    return read, encode


PEERS = {"lazyslide": lazyslide, "tiatoolbox": tiatoolbox, "hs2p": hs2p}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("peer", choices=PEERS)
    arguments.add_argument("encoder", type=Path)
    options = arguments.parse_args()
    for line in sys.stdin:
        what, slide = json.loads(line)
        read, encode = PEERS[options.peer](Path(slide), options.encoder)
        start = time.perf_counter()
        count = read() if what == "read" else encode()
        print(f"RATE {count / (time.perf_counter() - start)}", flush=True)


if __name__ == "__main__":
    main()

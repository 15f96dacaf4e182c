"""Files of features, written as the code of TRIDENT, CLAM, STAMP and slide2vec writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

Points = np.ndarray


def random_features(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)


def _save_h5(path: Path, assets: dict, attributes: dict) -> None:
    """TRIDENT's ``save_h5``, and CLAM's ``save_hdf5``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, values in assets.items():
            shape = (None, *values.shape[1:])
            chunks = (1, *values.shape[1:])
            dataset = file.create_dataset(key, data=values, maxshape=shape, chunks=chunks)
            for name, value in attributes.get(key, {}).items():
                dataset.attrs[name] = "None" if value is None else value


def trident(
    path: Path,
    *,
    width: int = 8192,
    height: int = 6144,
    source_mag: float = 40,
    target_mag: float = 20,
    patch: int = 256,
    overlap: int = 0,
    keep: Callable[[int, int], bool] = lambda column, row: (column + row) % 3 != 0,
    size: int = 8,
    with_dimensions: bool = True,
) -> Points:
    """``WSIPatcher`` and ``extract_patch_features``: the first patch overlaps no other."""
    downsample = (10 / target_mag) / (10 / source_mag)
    side, shared = round(patch * downsample), round(overlap * downsample)

    def place(number: int) -> int:
        return number * side - shared * max(number - 1, 0)

    columns = [column for column in range(width // (side - shared) + 2) if place(column) < width]
    rows = [row for row in range(height // (side - shared) + 2) if place(row) < height]
    kept = [(place(c), place(r)) for c in columns for r in rows if keep(c, r)]
    coords = np.array(kept, np.int64)
    attributes = {
        "patch_size": patch,
        "patch_size_level0": patch * source_mag // target_mag,
        "level0_magnification": source_mag,
        "target_magnification": target_mag,
        "overlap": overlap,
        "name": path.stem,
        "savetodir": str(path.parent),
    }
    if with_dimensions:
        attributes |= {"level0_width": width, "level0_height": height}
    features = random_features(len(coords), size)
    _save_h5(path, {"features": features, "coords": coords}, {"coords": attributes})
    return coords


def clam(
    features: Path,
    patches: Path | None = None,
    *,
    contours: tuple[tuple[int, int, int, int], ...] = ((300, 700, 4000, 3000),),
    patch: int = 256,
    level: int = 1,
    downsample: float = 2.0,
    step: int = 256,
    level_dim: tuple[int, int] = (4096, 3072),
    size: int = 8,
) -> Points:
    """``process_contours`` and ``extract_features_fp``: each contour has a lattice of its own.

    The features have no attributes; ``patches`` are the coordinates with theirs. ``features`` with
    the suffix ``.pt`` has no coordinates.
    """
    found = []
    for x, y, width, height in contours:
        jump = step * int(downsample)
        across, down = np.arange(x, x + width, jump), np.arange(y, y + height, jump)
        columns, rows = np.meshgrid(across, down, indexing="ij")
        found.append(np.stack([columns.ravel(), rows.ravel()], axis=1))
    coords = np.concatenate(found)
    values = random_features(len(coords), size)
    features.parent.mkdir(parents=True, exist_ok=True)
    if features.suffix == ".pt":
        torch.save(torch.from_numpy(values), features)
    else:
        _save_h5(features, {"features": values, "coords": coords.astype(np.int32)}, {})
    if patches is not None:
        attributes = {
            "patch_size": patch,
            "patch_level": level,
            "downsample": (downsample, downsample),
            "downsampled_level_dim": level_dim,
            "level_dim": level_dim,
            "name": patches.stem,
            "save_path": str(patches.parent),
        }
        _save_h5(patches, {"coords": coords}, {"coords": attributes})
    return coords


def stamp(
    path: Path,
    *,
    mpp: float = 0.25,
    width: int = 8192,
    height: int = 6144,
    tile_um: float = 256.0,
    tile_px: int = 224,
    size: int = 8,
) -> Points:
    """``_supertiles``, ``_tiles`` and ``extract_``; returns the true corners, level-0 px."""
    each = max(int(1024 * mpp // tile_um), 1)
    side = math.ceil(tile_um / mpp)
    um, px = [], []
    for y in range(0, height, side * each):
        for x in range(0, width, side * each):
            for down in range(each):
                for across in range(each):
                    um.append((x * mpp + across * tile_um, y * mpp + down * tile_um))
                    px.append((x + across * side, y + down * side))
    # supertiles are decoded by threads, in any order
    order = np.random.default_rng(1).permutation(len(um))
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["coords"] = np.array(um, np.float32)[order]
        file["feats"] = random_features(len(um), size).astype(np.float16)
        file.attrs["stamp_version"] = "2.1.0"
        file.attrs["extractor"] = "uni"
        file.attrs["unit"] = "um"
        file.attrs["tile_size_um"] = tile_um
        file.attrs["tile_size_px"] = tile_px
        file.attrs["code_hash"] = "0" * 8
        file.attrs["feat_type"] = "tile"
    return np.array(px)[order]


def slide2vec(
    folder: Path,
    name: str,
    *,
    form: str = "pt",
    mpp: float = 0.25,
    width: int = 8192,
    height: int = 6144,
    patch: int = 256,
    step: int | None = None,
    size: int = 8,
) -> Points:
    """``write_tile_embeddings`` and hs2p's ``_save_tiling_result``."""
    side = round(patch * 0.5 / mpp)
    jump = side if step is None else step
    x, y = np.meshgrid(np.arange(32, width, jump), np.arange(96, height, jump), indexing="ij")
    points = np.stack([x.ravel(), y.ravel()], axis=1)
    features = random_features(len(points), size).astype(np.float16)
    (folder / "tile_embeddings").mkdir(parents=True, exist_ok=True)
    (folder / "tiles").mkdir(exist_ok=True)
    index = np.arange(len(points), dtype=np.int32)
    path = folder / "tile_embeddings" / f"{name}.{form}"
    if form == "pt":
        torch.save(torch.from_numpy(features), path)
    else:
        np.savez_compressed(path, features=features, tile_index=index)
    sidecar = {"sample_id": name, "artifact_type": "tile_embeddings", "format": form}
    path.with_name(f"{name}.meta.json").write_text(json.dumps(sidecar))
    np.savez_compressed(
        folder / "tiles" / f"{name}.coordinates.npz",
        tile_index=index,
        x=points[:, 0].astype(np.int64),
        y=points[:, 1].astype(np.int64),
        tissue_fractions=np.ones(len(points), np.float32),
    )
    tiling = {
        "requested_tile_size_px": patch,
        "requested_spacing_um": 0.5,
        "tile_size_lv0": side,
        "step_px_lv0": jump,
        "n_tiles": len(points),
    }
    slide = {"dimensions": [width, height], "base_spacing_um": mpp, "level_downsamples": [1.0]}
    meta = {"provenance": {"sample_id": name}, "slide": slide, "tiling": tiling}
    (folder / "tiles" / f"{name}.coordinates.meta.json").write_text(json.dumps(meta))
    return points

"""Write a study of two encoders of different geometry on the same real slides.

    python examples/geometries/make_cohort.py FOLDER --out data/geometries

FOLDER contains ``MANIFEST.csv`` (columns path, kind, task, organ, label, group, mpp) and the files
that it lists. The slides are the 165 colon regions of GlaS, each saved as a TIFF file with its
um/px, and two whole slides without a label; the target is the grade of a region. ``mtl-4`` takes
patches of 128 px at 0.5 um/px and is trained on four patch tasks of other organs, each at its own
um/px. ``vit-s`` takes patches of 224 px at 0.5 um/px: the network of ``--preset`` with the weights
of ``--weights``, or else a ViT-S/16 with random weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import polars as pl
import pyvips
import yaml

# organ, um/px of the images, um/px of the patches. An image of idc (50 px) is one patch of 128 px
# at 1.5625. The resolution of lc25000 (camera images) is unpublished; 0.5 is an assumption
TASKS = {
    "idc": ("breast", 4.0, 4.0 * 50 / 128),
    "lc25000": ("lung and colon", 0.5, 1.0),
    "nct_crc": ("colon", 0.5, 0.5),
    "osteosarcoma": ("bone", 1.0, 1.0),
}
# osteosarcoma has two patients, so it is split by tissue block, which the file name contains
BLOCK = r"((?:Case-4-[A-Z]|P9-[A-Z])\d+)"
# classes with one image each, too few for training
TOO_RARE = ("BACK", "DEB")
WHOLE = ("her2st_C2", "CMU-1-Small-Region")  # slides without a label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with MANIFEST.csv")
    parser.add_argument("--out", type=Path, default=Path("data/geometries"))
    parser.add_argument("--preset", help="name of the published network of --weights")
    parser.add_argument("--weights", type=Path, help="file of weights; default: random weights")
    arguments = parser.parse_args()
    if (arguments.preset is None) != (arguments.weights is None):
        parser.error("give both of --preset and --weights, or neither")
    folder: Path = arguments.folder.resolve()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    manifest = pl.read_csv(folder / "MANIFEST.csv", infer_schema=False)
    for task in TASKS:
        patches = manifest.filter(
            (pl.col("task") == task) & ~pl.col("label").is_in(TOO_RARE)
        ).select(
            path=pl.format("{}/{}", pl.lit(str(folder)), "path"),
            label="label",
            group=pl.col("path").str.extract(BLOCK) if task == "osteosarcoma" else "group",
        )
        patches.write_csv(out / f"{task}.csv")
    slides, labels = _slides(manifest, folder, out / "slides")
    slides.write_csv(out / "slides.csv")
    labels.write_csv(out / "labels.csv")
    if arguments.weights is None:
        second = _random_encoder(out / "vit-s.safetensors")
    else:
        second = {"preset": arguments.preset, "file": str(arguments.weights.resolve())}
    (out / "cohort.yaml").write_text(yaml.safe_dump(_cohort(second), sort_keys=False))
    print(f"{out / 'cohort.yaml'}: {slides.height} slides, {labels.height} with a grade")


def _slides(manifest: pl.DataFrame, folder: Path, saved: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Save the regions as TIFF files; return the slide table and the label table."""
    saved.mkdir(exist_ok=True)
    slides, labels = [], []
    for row in manifest.filter(task="glas_grade", kind="region775").iter_rows(named=True):
        name = Path(row["path"]).stem
        per_mm = 1000 / float(row["mpp"])
        image = pyvips.Image.new_from_file(str(folder / row["path"])).copy(xres=per_mm, yres=per_mm)
        image.tiffsave(str(saved / f"{name}.tif"), tile=True, compression="deflate", resunit="cm")
        slides.append((name, str((saved / f"{name}.tif").resolve()), row["group"], row["mpp"]))
        labels.append((name, row["label"]))
    for row in manifest.filter(kind="slide").iter_rows(named=True):
        if (name := Path(row["path"]).stem) in WHOLE:
            slides.append((name, str(folder / row["path"]), row["group"], None))
    return (
        pl.DataFrame(slides, schema=["slide", "path", "patient", "mpp"], orient="row"),
        pl.DataFrame(labels, schema=["slide", "grade"], orient="row"),
    )


def _random_encoder(path: Path) -> dict[str, object]:
    """Write a ViT-S/16 with random weights; return the fields of its entry."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    name = "vit_small_patch16_224"
    save_file(timm.create_model(name, num_classes=0).state_dict(), path)
    half = [0.5, 0.5, 0.5]
    network = {
        "patch": 224,
        "mpp": 0.5,
        "embedding_size": 384,
        "preprocess": {"mean": half, "std": half},
        "timm": {"model": name, "tokens": "class"},
    }
    return {"file": path.name, "network": network}


def _cohort(second: dict[str, object]) -> dict[str, object]:
    return {
        "name": "geometries",
        "slides": {"table": "slides.csv"},
        "labels": "labels.csv",
        "patch_tasks": [
            {
                "name": name,
                "organ": organ,
                "mpp": mpp,
                "train_mpp": train_mpp,
                "table": f"{name}.csv",
            }
            for name, (organ, mpp, train_mpp) in TASKS.items()
        ],
        "encoders": [
            {
                "name": "mtl-4",
                "objective": "mtl",
                "tasks": list(TASKS),
                "patches_seen": 20_000,
                "learning_rate": 2e-3,
            },
            {"name": "vit-s", "objective": "imported", **second},
        ],
        "targets": [
            {
                "name": "grade",
                "kind": "classification",
                "column": "grade",
                "classes": ["benign", "malignant"],
            }
        ],
        "settings": {
            "patch": 128,
            "mpp": 0.5,
            "models": {"network": "small", "crop_um": 512, "epochs": 30, "crops_at_test": 1},
        },
    }


if __name__ == "__main__":
    main()

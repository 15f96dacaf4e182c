"""Write the cohort file and tables of the IDC example from a folder of real patches and slides.

    python examples/idc/make_cohort.py FOLDER --out data/idc [--hold-out 8863]

FOLDER contains ``MANIFEST.csv`` (columns path, kind, task, organ, label, group), the patches of the
tasks idc, lc25000, nct_crc and osteosarcoma, and the IDC slides with their label images. The
encoder is trained on all four tasks. The patches of the patient given with ``--hold-out`` are not
used for training, so the tumour map of this patient's slide is an evaluation on a new patient.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import polars as pl
import yaml

# a cell of the label images is 50 px at 4 um/px = 200 um, which is 128 px at this resolution
PATCH = 128
MPP = 50 * 4.0 / PATCH

# organ and um/px; the resolution of lc25000 (camera images) is unpublished, 0.5 is an assumption
TASKS = {
    "idc": ("breast", 4.0),
    "lc25000": ("lung and colon", 0.5),
    "nct_crc": ("colon", 0.5),
    "osteosarcoma": ("bone", 1.0),
}
# osteosarcoma has two patients, so it is split by tissue block, which the file name contains
BLOCK = r"((?:Case-4-[A-Z]|P9-[A-Z])\d+)"
# classes with one image each, too few for training
TOO_RARE = {"nct_crc": ("BACK", "DEB")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with MANIFEST.csv")
    parser.add_argument("--out", type=Path, default=Path("data/idc"), help="folder of the cohort")
    parser.add_argument("--hold-out", default="8863", help="patient not used for training")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    manifest = pl.read_csv(folder / "MANIFEST.csv", infer_schema=False)
    for task in TASKS:
        patches = manifest.filter(
            (pl.col("task") == task) & ~pl.col("label").is_in(TOO_RARE.get(task, ()))
        ).select(
            path=pl.format("{}/{}", pl.lit(str(folder)), "path"),
            label="label",
            group=pl.col("path").str.extract(BLOCK) if task == "osteosarcoma" else "group",
        )
        patches.write_csv(out / f"{task}.csv")
    _slide_table(manifest, folder).write_csv(out / "slides.csv")
    (out / "cohort.yaml").write_text(yaml.safe_dump(_cohort(arguments.hold_out), sort_keys=False))
    print(f"{out / 'cohort.yaml'}: {len(TASKS)} patch tasks, patient {arguments.hold_out} held out")


def _slide_table(manifest: pl.DataFrame, folder: Path) -> pl.DataFrame:
    rows = [
        {
            "slide": Path(row["path"]).stem,
            "path": str(folder / row["path"]),
            "patient": row["group"],
            "truth": str(folder / row["path"].replace(".tif", "_labels.png")),
        }
        for row in manifest.filter(pl.col("task") == "idc_slide", kind="slide").iter_rows(
            named=True
        )
    ]
    rows.append(
        {
            "slide": "CMU-1-Small-Region",
            "path": str(folder / "slides/CMU-1-Small-Region.svs"),
            "patient": "CMU-1",
            "truth": None,
        }
    )
    return pl.DataFrame(
        rows, schema=dict.fromkeys(("slide", "path", "patient", "truth"), pl.String)
    )


def _cohort(held_out: str) -> dict[str, object]:
    tasks: list[dict[str, object]] = [
        {"name": name, "organ": organ, "mpp": mpp, "table": f"{name}.csv"}
        for name, (organ, mpp) in TASKS.items()
    ]
    tasks[0]["test_groups"] = [held_out]
    return {
        "name": "idc",
        "slides": {"table": "slides.csv"},
        "patch_tasks": tasks,
        "encoders": [
            {
                "name": "mtl-4",
                "objective": "mtl",
                "tasks": list(TASKS),
                "patches_seen": 40_000,
                "learning_rate": 2e-3,
            }
        ],
        "maps": [{"name": "idc", "encoder": "mtl-4", "task": "idc", "label": "idc"}],
        "settings": {"patch": PATCH, "mpp": MPP},
    }


if __name__ == "__main__":
    main()

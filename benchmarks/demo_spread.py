"""Spread of the demo's results over seeds, in float32 and in bfloat16.

    python benchmarks/demo_spread.py data/demo data/spread --seeds 0 1 2

A seed sets the initial weights and batches of the encoder, the folds, and the initial weights of
the slide models. The slides, patches and labels are the same in every run. Each run appends its
metrics to ``results.jsonl`` in the output folder; the table at the end gives mean and standard
deviation over the seeds of each precision.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import polars as pl

from nic_core import steps
from nic_core.cohort import Cohort, load_cohort
from nic_core.models.kinds import kind_of
from nic_core.store import ModelKey, PatchTableKey, PatchTaskKey, Store
from nic_core.types import Precision

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


def variant(cohort: Cohort, seed: int, precision: Precision) -> Cohort:
    """The cohort with another seed and precision of its encoders and slide models."""
    settings = cohort.settings
    changed = settings.model_copy(
        update={
            "models": settings.models.model_copy(update={"seed": seed}),
            "compression": settings.compression.model_copy(update={"precision": precision}),
        }
    )
    encoders = tuple(
        encoder.model_copy(update={"seed": seed, "precision": precision})
        for encoder in cohort.encoders
    )
    return cohort.model_copy(update={"settings": changed, "encoders": encoders})


def prepare(cohort: Cohort, store: Store) -> None:
    """Make the products that do not depend on seed or precision."""
    steps.make_slide_index(cohort, store)
    for slide in steps.read_slide_index(store)["slide"]:
        steps.make_slide(store, slide)
        for geometry in cohort.geometries:
            steps.make_patch_table(cohort, store, PatchTableKey(geometry=geometry, slide=slide))
    for task, geometries in cohort.task_geometries.items():
        for geometry in geometries:
            steps.make_patch_task(cohort, store, PatchTaskKey(geometry=geometry, task=task))


def run(cohort: Cohort, store: Store) -> list[dict[str, object]]:
    """Train encoders and slide models; return the rows of all metrics."""
    for encoder in cohort.encoders:
        steps.make_encoder(cohort, store, encoder.name)
        prepared = steps.prepare_encoder(cohort, store, encoder.name)
        for slide in steps.read_slide_index(store)["slide"]:
            steps.make_grid(cohort, store, prepared, slide)
        steps.make_grid_manifest(store, encoder.name)
    rows: list[dict[str, object]] = []
    for target in cohort.targets:
        steps.make_target_folds(cohort, store, target.name)
        primary = kind_of(target).primary_metric
        for encoder in cohort.encoders:
            key = ModelKey(encoder=encoder.name, target=target.name)
            steps.make_target_grids(store, key)
            result, _ = steps.make_slide_model(cohort, store, key)
            rows += [
                {"target": target.name, "primary": primary, "encoder": encoder.name, **row}
                for row in result.metrics.to_dicts()
            ]
    return rows


def summary(results: pl.DataFrame) -> pl.DataFrame:
    """Mean, deviation and number of seeds of each target's primary metric, cross-validated."""
    return (
        results.filter(pl.col("metric") == pl.col("primary"), split="cv")
        .group_by("target", "encoder", "model", "precision", maintain_order=True)
        .agg(
            pl.col("value").mean().alias("mean"),
            pl.col("value").std().alias("deviation"),
            pl.col("value").min().alias("lowest"),
            pl.col("value").max().alias("highest"),
            seeds=pl.len(),
        )
        .sort("target", "encoder", "model", "precision")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("demo", type=Path, help="folder that `nic demo` painted")
    parser.add_argument("out", type=Path, help="folder for the store and results.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    cohort, store = load_cohort(given.demo / "cohort.yaml"), Store(given.out.resolve() / "store")
    results = given.out / "results.jsonl"
    prepare(cohort, store)
    for seed in given.seeds:
        for precision in PRECISIONS:
            start = time.perf_counter()
            rows = run(variant(cohort, seed, precision), store)
            with results.open("a") as file:
                for row in rows:
                    file.write(json.dumps({"seed": seed, "precision": precision, **row}) + "\n")
            print(f"seed {seed}, {precision}: {time.perf_counter() - start:.0f} s", flush=True)
    with pl.Config(tbl_rows=-1, float_precision=3):
        print(summary(pl.read_ndjson(results, infer_schema_length=None)))


if __name__ == "__main__":
    main()

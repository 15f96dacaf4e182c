"""Tests of the study on composed slides: results of several seeds, differences, hand-made grids."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import spearmanr

from nic_core.cohort import RegressionTarget
from studies import composed
from studies.features import ColourAndTexture

pytestmark = pytest.mark.slow

TARGET = RegressionTarget(kind="regression", name="proliferation", column="score")
UNITS = 40


def predictions(noise: float, seed: int, model: str = "network") -> pl.DataFrame:
    """Predictions for units in an order that depends on the seed."""
    y = np.random.default_rng(0).normal(size=UNITS)
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "model": model,
            "unit": [f"s{i:02d}" for i in range(UNITS)],
            "patient": [f"p{i // 2:02d}" for i in range(UNITS)],
            "y": y,
            "prediction": y + noise * rng.normal(size=UNITS),
        }
    )[rng.permutation(UNITS).tolist()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seeds of two encoders with two networks, and one with exchanged labels."""
    for encoder, noise in (("good-1", 0.3), ("bad", 3.0)):
        for seed in range(2):
            tables = [predictions(noise, seed), predictions(5, 2 + seed, "mean_embedding")]
            for network in composed.NETWORKS:
                work = composed.Work(encoder, network, seed)
                work.path(tmp_path, TARGET.name).parent.mkdir(parents=True, exist_ok=True)
                pl.concat(tables).write_parquet(work.path(tmp_path, TARGET.name))
    work = composed.Work("bad", "small", 0, permuted=True)
    predictions(9, 1).write_parquet(work.path(tmp_path, TARGET.name))
    return tmp_path


def test_results_are_gathered_by_encoder_model_and_labels(folder: Path) -> None:
    found = {(r.encoder, r.model, r.labels): r for r in composed.gather(folder, TARGET)}
    models = ("small", "mil", "mean_embedding")
    expected = {(e, m, "own") for e in ("good-1", "bad") for m in models}
    assert set(found) == expected | {("bad", "small", "permuted")}
    assert {len(r.predictions) for key, r in found.items() if key[2] == "own"} == {2}


def test_a_metric_is_the_mean_over_seeds(folder: Path) -> None:
    (results,) = (
        r for r in composed.gather(folder, TARGET) if (r.encoder, r.model) == ("good-1", "mil")
    )
    found = composed.interval(TARGET, results)
    each = [spearmanr(p["y"], p["prediction"]).statistic for p in results.predictions]
    assert found.value == pytest.approx(np.mean(each))
    assert found.low < found.value < found.high


def test_differences_are_paired_and_antisymmetric(folder: Path) -> None:
    found = {(r.encoder, r.model, r.labels): r for r in composed.gather(folder, TARGET)}
    good, bad = found["good-1", "small", "own"], found["bad", "small", "own"]
    forth, back = composed.difference(TARGET, good, bad), composed.difference(TARGET, bad, good)
    assert forth.low > 0
    assert forth.value == pytest.approx(-back.value)
    assert forth.low == pytest.approx(-back.high)
    assert composed.difference(TARGET, good, good).value == 0


def test_tables_and_picture_have_every_encoder(folder: Path) -> None:
    found = {TARGET.name: composed.gather(folder, TARGET)}
    names = list(composed.metrics_table([TARGET], found).columns[0].cells)
    assert names == ["bad"] * 3 + ["good-1"] * 3 + ["bad, exchanged labels"]
    assert composed.differences_table([TARGET], found).row_count == 4
    assert len(composed.picture([TARGET], found).axes) == 1


def test_hand_made_features_are_those_of_the_probes() -> None:
    pixels = torch.randint(0, 255, (2, 3, 128, 128), dtype=torch.uint8)
    prepared = composed.hand_made_features()
    expected = ColourAndTexture().embed(pixels.permute(0, 2, 3, 1).numpy())
    assert prepared.module(pixels).numpy() == pytest.approx(expected, rel=1e-5)


def test_encoders_of_one_name_are_refused() -> None:
    options = Namespace(released=None, encoders=[Path("a/mtl"), Path("b/mtl")])
    with pytest.raises(SystemExit, match="two have one name"):
        composed._encoders(options)

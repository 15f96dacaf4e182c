"""Tests of the study of heatmaps: planted causes, removal of cells, agreement of folds."""

from __future__ import annotations

import json
from argparse import Namespace

import numpy as np
import polars as pl
import pytest
import torch

from nic_core.cohort import RegressionTarget
from nic_core.demo.tissues import Tissue
from nic_core.models.kinds import kind_of
from nic_core.models.networks import FoldModel, Normalise, occupied
from studies import maps
from studies.planted import planted_causes
from tests.models.conftest import ArrayGrid

pytestmark = pytest.mark.slow

SCORE = RegressionTarget(name="score", kind="regression", column="score")


def truth() -> np.ndarray:
    """Return the truth of 24 x 24 cells: two nests, one with a capsule, and a band."""
    y, x = np.indices((48, 48))
    image = np.full((48, 48), Tissue.STROMA, np.uint8)
    for cy, cx, capsule in ((12, 12, True), (34, 14, False)):
        distance = np.hypot(y - cy, x - cx)
        if capsule:
            image[distance < 9] = Tissue.RIM
        image[distance < 6.4] = Tissue.TUMOUR
    image[8:11, 30:46] = Tissue.RIM
    return image


def test_causes_of_growth_are_the_borders_of_nests_and_bands():
    found = {c.name: c for c in planted_causes("growth", truth(), (24, 24), 0.0)}
    assert {name: cause.sign for name, cause in found.items()} == {
        "capsule": 1,
        "bare border": -1,
        "band": -1,
    }
    assert found["capsule"].cells[6, 2]  # left of the first nest
    assert not found["capsule"].cells[6, 6]  # in the nest
    assert found["bare border"].cells[17, 11]  # right of the second nest
    assert found["band"].cells[4, 18:22].all()
    for cause in found.values():
        assert not (cause.cells & ~cause.known).any()
        for other in found.values():
            if other is not cause:
                assert not (cause.cells & other.cells).any()
                assert not (cause.known & other.cells).any()


@pytest.mark.parametrize(("signal", "sign"), [(1.0, 1), (-1.0, -1)])
def test_the_cause_of_proliferation_is_the_tumour(signal, sign):
    (cause,) = planted_causes("proliferation", truth(), (24, 24), signal)
    assert (cause.name, cause.sign) == ("tumour", sign)
    assert cause.cells[6, 6]
    assert not cause.cells[4, 20]
    assert cause.known.all()
    assert planted_causes("proliferation", truth(), (24, 24), 0.1) == []


def test_growth_without_capsules_has_the_higher_risk():
    signs = {c.name: c.sign for c in planted_causes("survival", truth(), (24, 24), 1.0)}
    assert signs == {"tumour": 1, "capsule": -1, "bare border": 1, "band": 1}


def test_a_grid_smaller_or_larger_than_the_truth_is_padded():
    for shape in ((20, 25), (26, 24)):
        found = planted_causes("growth", truth(), shape, 0.0)
        assert {cause.cells.shape for cause in found} == {shape}


class Mean(torch.nn.Module):
    """The mean of the first feature."""

    def forward(self, grid):
        return grid[:, :1].sum((2, 3)) / occupied(grid).sum((2, 3))


@pytest.mark.parametrize(("direction", "sign"), [(1, 1), (-1, -1)])
def test_removing_the_cells_that_raise_the_output_lowers_it(direction, sign):
    random = np.random.default_rng(0)
    grid = ArrayGrid(random.normal(size=(2, 9, 11)).astype(np.float16), np.ones((9, 11), bool))
    model = FoldModel(Normalise(torch.zeros(2), torch.ones(2)), Mean(), kind_of(SCORE)).eval()
    heat = direction * grid.embeddings[0].astype(float)
    output = kind_of(SCORE).explained_output(None)
    effect = maps.removal_effect(model, grid, heat, output, crop=12)
    assert np.sign(effect) == sign
    assert abs(effect) > 1


def test_agreement_is_the_mean_correlation_of_pairs():
    heat = np.arange(12, dtype=float).reshape(3, 4)
    heat[0, 0] = np.nan
    assert maps.fold_agreement([heat, 2 * heat + 1]) == pytest.approx(1)
    assert maps.fold_agreement([heat, -heat]) == pytest.approx(-1)
    assert maps.fold_agreement([heat, heat, -heat]) == pytest.approx(-1 / 3)


def test_intervals_resample_patients():
    one = pl.DataFrame({"patient": ["a"] * 50 + ["b"], "auc": [1.0] * 50 + [0.0]})
    value, low, high = maps.mean_interval(one)
    assert value == pytest.approx(50 / 51)
    assert (low, high) == (0, 1)


def test_a_finished_row_is_kept_and_other_stores_are_refused(
    mean_rgb_study, tiny_cohort, tmp_path, capsys
):
    _, store = mean_rgb_study
    options = Namespace(
        cohort=tiny_cohort,
        store=store.root,
        out=tmp_path,
        networks=["small"],
        encoders=["mean-rgb"],
    )
    rows = tmp_path / "rows"
    rows.mkdir()
    for target in ("growth", "survival"):  # finished rows are not computed again
        for end in ("", "-exchanged"):
            (rows / f"mean-rgb-{target}-small{end}.parquet").write_bytes(b"")
    maps.run(options)
    assert capsys.readouterr().out.count(" s\n") == 2  # of proliferation
    for path in rows.glob("*.parquet"):
        if not path.stat().st_size:
            path.unlink()
    found = pl.read_parquet(rows / "mean-rgb-proliferation-small.parquet")
    assert set(found["method"]) == {*maps.methods("small"), maps.RANDOM_WEIGHTS}
    maps.show(Namespace(folder=tmp_path))
    assert "labels exchanged" in capsys.readouterr().out
    (tmp_path / "settings.json").write_text(json.dumps({"cohort": "another"}))
    with pytest.raises(SystemExit, match="made with {'cohort': 'another'"):
        maps.run(options)

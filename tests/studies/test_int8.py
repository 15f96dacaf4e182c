"""Tests of the study of int8: networks applied to other grids, differences of embeddings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nic_core.grids import open_grid
from nic_core.models.cross_validation import NETWORK
from nic_core.models.kinds import kind_of, prediction_array
from nic_core.steps import read_slide_model
from nic_core.store import GridKey, ModelKey
from studies.int8 import held_out, mixed_predictions, similarities

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(mean_rgb_study):
    cohort, store = mean_rgb_study
    target = next(target for target in cohort.targets if target.name == "growth")
    key = ModelKey(encoder="mean-rgb", target=target.name)
    return read_slide_model(store.slide_model(key))[0]


@pytest.fixture(scope="module")
def grids(mean_rgb_study, model):
    _, store = mean_rgb_study
    slides = model.predictions["slides"].explode().unique()
    return {
        slide: open_grid(store.grid(GridKey(encoder="mean-rgb", slide=slide))) for slide in slides
    }


def test_on_its_own_grids_a_network_predicts_as_before(model, grids):
    rows = held_out(model, NETWORK)
    found = mixed_predictions(model, rows, grids)
    np.testing.assert_allclose(found, prediction_array(kind_of(model.target), rows), atol=1e-5)


def test_other_grids_change_the_predictions_and_the_similarity(model, grids):
    rows = held_out(model, NETWORK)
    other = {
        name: replace(grid, embeddings=np.asarray(grid.embeddings[:]) * np.float16(0.5))
        for name, grid in grids.items()
    }
    found = mixed_predictions(model, rows, other)
    assert not np.allclose(found, prediction_array(kind_of(model.target), rows), atol=1e-5)
    near = similarities(grids, other)
    assert len(near) == len(grids)
    assert all(one.cosine == pytest.approx(1, abs=1e-3) for one in near)
    assert all(one.distance > 0.5 for one in near)

"""Explanations: sums over cells, sign, integrated gradients, orientations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn

from nic_core.cohort import ClassificationTarget, RegressionTarget, SurvivalTarget, Target
from nic_core.models import explanation
from nic_core.models.crops import Crops
from nic_core.models.explanation import explain, held_out_networks
from nic_core.models.kinds import kind_of
from nic_core.models.networks import (
    FoldModel,
    GatedAttentionMIL,
    HasCellOutputs,
    Normalise,
    PublishedGridCNN,
    SmallGridCNN,
    build_network,
    occupied,
)
from nic_core.orientations import orient
from tests.models.conftest import ArrayGrid

pytestmark = pytest.mark.slow

REGRESSION = RegressionTarget(name="grade", kind="regression", column="grade")
CLASSES = ClassificationTarget(
    name="kind", kind="classification", column="kind", classes=("a", "b", "c")
)
SURVIVAL = SurvivalTarget(name="os", kind="survival", time="t", event="e", unit="days")


def make_grid(rows: int, columns: int, embedding_size: int = 4, seed: int = 0) -> ArrayGrid:
    random = np.random.default_rng(seed)
    valid = random.random((rows, columns)) < 0.8
    embeddings = random.normal(size=(embedding_size, rows, columns)) * valid
    return ArrayGrid(embeddings.astype(np.float16), valid)


def fold(network: nn.Module, target: Target = REGRESSION, embedding_size: int = 4) -> FoldModel:
    normalise = Normalise(torch.zeros(embedding_size), torch.ones(embedding_size))
    model = FoldModel(normalise, network, kind_of(target))
    model.eval().requires_grad_(False)
    return model


def random_network(kind: type[nn.Module] = SmallGridCNN, outputs: int = 1, seed: int = 0):
    torch.manual_seed(seed)
    network = kind(4, outputs)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    return network.eval()


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["small", "local", "mil"]),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    outputs=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_the_output_is_the_mean_of_the_outputs_of_cells(name, rows, columns, outputs, seed):
    torch.manual_seed(seed)
    network = build_network(name, 4, outputs, positions=name == "mil" and seed % 2 == 0).eval()
    tissue = torch.rand(3, 1, rows, columns) < 0.7
    tissue[:, :, 0, 0] = True
    grid = torch.randn(3, 4, rows, columns) * tissue
    assert isinstance(network, HasCellOutputs)
    with torch.no_grad():
        each = network.cell_outputs(grid)
        assert not each[~tissue.expand_as(each)].any()
        mean = each.sum((2, 3)) / occupied(grid).sum((2, 3))
        torch.testing.assert_close(mean, network(grid), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("side", "name"), [(7, "small"), (3, "local"), (1, "mil")])
def test_a_cell_output_depends_on_the_cells_of_its_field(side, name):
    torch.manual_seed(0)
    network = build_network(name, 4, 1).eval()
    grid = torch.randn(1, 4, 15, 15)
    changed = grid.clone()
    # two cells change places, so the slide's mean and the sum of its attention stay the same
    changed[0, :, 7, 7], changed[0, :, 7, 8] = grid[0, :, 7, 8], grid[0, :, 7, 7]
    with torch.no_grad():
        before, after = network.cell_outputs(grid), network.cell_outputs(changed)
    moved = (before - after).abs()[0, 0] > 1e-6
    field = side // 2
    expected = torch.zeros(15, 15, dtype=torch.bool)
    expected[7 - field : 8 + field, 7 - field : 9 + field] = True
    assert not moved[~expected].any()
    assert moved[7, 7 - field]
    assert moved[7, 8 + field]


@pytest.mark.parametrize("name", ["small", "local", "mil"])
@pytest.mark.parametrize("target", [REGRESSION, CLASSES, SURVIVAL])
def test_the_mean_heat_is_the_prediction(name, target):
    torch.manual_seed(1)
    model = fold(build_network(name, 4, kind_of(target).outputs).eval(), target)
    if target is not CLASSES:
        model.shift.fill_(-3)
        model.scale.fill_(2)
    grid = make_grid(9, 12)
    heat = explain([model], grid, target, crop=14)
    crops, centre = Crops(lambda _: grid, model.normalise, 14), (5, 6)
    views = torch.stack([torch.from_numpy(crops.crop_at("a", centre, k)) for k in range(8)])
    output = kind_of(target).explained_output(None)
    with torch.no_grad():
        expected = output(model.network(views), model.shift, model.scale).mean()
        if target is not CLASSES:  # the prediction, minus the training mean of a regression
            reference = model.shift if target is REGRESSION else 0
            torch.testing.assert_close(expected, model.predict(views).mean() - reference)
    assert np.nanmean(heat) == pytest.approx(expected.item(), abs=1e-4)


class Products(nn.Module):
    """A network without cell outputs: a product of sums of two features."""

    def forward(self, features):
        return (features[:, 0].sum((1, 2)) * features[:, 1].sum((1, 2)))[:, None]


def test_integrated_gradients_add_up_to_the_output():
    model, grid = fold(Products()), make_grid(9, 12)
    heat = explain([model], grid, REGRESSION, crop=14)
    x = torch.from_numpy(grid.embeddings.astype(np.float32))[None]
    assert np.nanmean(heat) == pytest.approx(model.network(x).item(), rel=1e-4)
    # of a product of two sums, each cell gets half of its part in either
    first, second = grid.embeddings[0].astype(float), grid.embeddings[1].astype(float)
    expected = (first * second.sum() + second * first.sum()) / 2 * grid.valid.sum()
    np.testing.assert_allclose(heat[grid.valid], expected[grid.valid], rtol=1e-3, atol=1e-2)


class Marked(nn.Module):
    """A trained network in the small: the mean of feature 0, which marks the cause."""

    def cell_outputs(self, grid):
        return grid[:, :1] * occupied(grid)

    def forward(self, grid):
        return self.cell_outputs(grid).sum((2, 3)) / occupied(grid).sum((2, 3))


def test_cells_that_raise_the_output_are_hot():
    grid = make_grid(12, 12)
    heat = explain([fold(Marked())], grid, REGRESSION, crop=12)
    np.testing.assert_allclose(heat[grid.valid], grid.embeddings[0][grid.valid], rtol=1e-3)


def test_random_weights_do_not_find_the_cause():
    scores = []
    for seed in range(40):
        grid = make_grid(12, 12, seed=seed)
        cause = grid.embeddings[0] > 0.5
        heat = explain([fold(random_network(seed=seed))], grid, REGRESSION, crop=12)
        scores.append(roc_auc_score(cause[grid.valid], heat[grid.valid]))
    assert abs(np.mean(scores) - 0.5) < 3 * np.std(scores) / np.sqrt(40)


@pytest.mark.parametrize("shape", [(10, 14), (16, 16), (26, 16), (34, 22)])
@pytest.mark.parametrize("k", range(1, 8))
def test_heatmap_of_a_rotated_grid_is_rotated(shape, k):
    models = [fold(random_network(seed=seed)) for seed in (0, 1)]
    grid = make_grid(*shape)
    turned = ArrayGrid(orient(grid.embeddings, k), orient(grid.valid, k))
    heat = explain(models, grid, REGRESSION, crop=16)
    assert heat.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(heat), ~grid.valid)
    np.testing.assert_allclose(
        explain(models, turned, REGRESSION, crop=16), orient(heat, k), atol=1e-6
    )


def test_published_network_explains_every_cell(monkeypatch):
    monkeypatch.setattr(explanation, "STEPS", 1)  # each of the 8 orientations takes a second
    models = [fold(random_network(PublishedGridCNN))]
    grid = make_grid(384, 3)  # even side: other orientations cover the last cell
    heat = explain(models, grid, REGRESSION, crop=384)
    np.testing.assert_array_equal(np.isnan(heat), ~grid.valid)
    assert np.nanstd(heat) > 0


def test_heatmap_is_the_mean_over_networks():
    models = [fold(random_network(seed=seed)) for seed in range(3)]
    grid = make_grid(12, 12)
    each = [explain([model], grid, REGRESSION, crop=12) for model in models]
    np.testing.assert_allclose(
        explain(models, grid, REGRESSION, crop=12), np.mean(each, 0), atol=1e-6
    )


def test_heatmap_has_sign_and_scale_of_the_prediction():
    model, grid = fold(random_network(), SURVIVAL), make_grid(12, 12)
    heat = explain([model], grid, SURVIVAL, crop=12)
    model.scale.fill_(-2)
    np.testing.assert_allclose(explain([model], grid, SURVIVAL, crop=12), -2 * heat, atol=1e-6)


def test_class_is_explained_against_all_others():
    models = [fold(random_network(outputs=3), CLASSES)]
    grid = make_grid(12, 12)
    by_class = [explain(models, grid, CLASSES, crop=12, label=c) for c in CLASSES.classes]
    np.testing.assert_array_equal(explain(models, grid, CLASSES, crop=12), by_class[2])
    assert not np.allclose(by_class[0], by_class[2], equal_nan=True)
    # a number added to all outputs changes no class probability
    models[0].network.output.bias += 3
    np.testing.assert_allclose(
        explain(models, grid, CLASSES, crop=12, label="a"), by_class[0], atol=1e-6
    )
    two = ClassificationTarget(
        name="kind", kind="classification", column="kind", classes=("a", "b")
    )
    binary = [fold(random_network(outputs=2), two)]
    np.testing.assert_allclose(
        explain(binary, grid, two, crop=12, label="a"),
        -explain(binary, grid, two, crop=12, label="b"),
        atol=1e-6,
    )


def test_heat_of_mil_is_attention_times_the_output_of_the_cell():
    torch.manual_seed(0)
    network, grid = GatedAttentionMIL(4, 1).eval(), make_grid(9, 12)
    x = torch.from_numpy(grid.embeddings.astype(np.float32))[None]
    with torch.no_grad():
        hidden = network.embed(x)
        output = network.output(hidden.movedim(1, -1))[0, ..., 0].numpy()
        expected = network.attention(x)[0].numpy() * grid.valid.sum() * output
    heat = explain([fold(network)], grid, REGRESSION, crop=14)
    np.testing.assert_allclose(heat[grid.valid], expected[grid.valid], rtol=1e-4, atol=1e-6)


def test_held_out_networks_were_trained_without_the_patient():
    models = [fold(random_network(seed=seed)) for seed in range(4)]
    assert list(held_out_networks(models, 2)) == [models[2]]
    assert list(held_out_networks(models, None)) == models


def test_unknown_class_and_empty_grid_raise():
    models, grid = [fold(random_network())], make_grid(6, 6)
    with pytest.raises(ValueError, match="no class 'x'; it has a, b, c"):
        explain(models, grid, CLASSES, crop=6, label="x")
    with pytest.raises(ValueError, match=r"'grade' \(regression\) has no class 'a'"):
        explain(models, grid, REGRESSION, crop=6, label="a")
    empty = ArrayGrid(np.zeros((4, 6, 6), np.float16), np.zeros((6, 6), bool))
    with pytest.raises(ValueError, match="no tissue cell"):
        explain(models, empty, REGRESSION, crop=6)

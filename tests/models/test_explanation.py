"""Grad-CAM: arithmetic, geometry and orientations; attention weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nic_core.cohort import ClassificationTarget, RegressionTarget, SurvivalTarget, Target
from nic_core.models.explanation import HasAttention, explain, grad_cam, held_out_networks
from nic_core.models.kinds import kind_of
from nic_core.models.networks import FoldModel, Normalise, PublishedGridCNN, SmallGridCNN
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


class OneConvolution(nn.Module):
    """The sum of the maps: every weight is 1 and the heatmap is the map itself."""

    def __init__(self, stride: int, padding: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 1, 3, stride, padding, bias=False)
        nn.init.ones_(self.convolution.weight)
        self.normalisation = nn.BatchNorm2d(1, eps=0)

    def forward(self, grid):
        return self.normalisation(self.convolution(grid)).sum((2, 3))


@settings(max_examples=60, deadline=None)
@given(
    side=st.integers(3, 40),
    where=st.tuples(st.integers(0, 39), st.integers(0, 39)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
)
def test_heat_of_one_cell_stays_within_its_receptive_fields(side, where, stride, padding):
    row, column = (min(i, side - 1) for i in where)
    features = torch.zeros(1, 1, side, side)
    features[0, 0, row, column] = 1
    heat, covered = grad_cam(OneConvolution(stride, padding).eval(), features, lambda raw: raw)
    # with stride 2 and no padding, the last cell of an even side is in no receptive field
    seen = side - 1 if stride == 2 and not padding and side % 2 == 0 else side
    np.testing.assert_array_equal(covered.any(0), np.arange(side) < seen)
    if not covered[row, column]:
        assert not heat[covered].any()
        return
    distance = np.maximum(*np.abs(np.indices(heat.shape) - [[[row]], [[column]]]))
    assert heat[distance <= 1].max() > 0
    assert not heat[covered & (distance > 2)].any()
    if stride == 1:  # each 3 x 3 field that contains the cell assigns the heat to its own centre
        inner = slice(1 - padding, side - 1 + padding)
        np.testing.assert_array_equal(heat[inner, inner] > 0, distance[inner, inner] <= 1)


def test_grad_cam_is_the_weighted_sum_of_the_first_maps():
    network = random_network()
    features = torch.from_numpy(make_grid(9, 9).embeddings.astype(np.float32))[None]
    first = network.convolutions[0]
    tissue = (features != 0).any(1, keepdim=True).float()
    centred = (features - features.sum((2, 3), keepdim=True) / tissue.sum()) * tissue
    maps = first(centred).detach()
    # the spatial mean of the gradients, by finite differences
    step = 1e-3
    weights = []
    with torch.no_grad():
        network.double()
        for k in range(maps.shape[1]):
            ends = []
            for sign in (1, -1):
                moved = maps.double().clone()
                moved[:, k] += sign * step
                out = network.convolutions[1:](moved) * tissue
                ends.append(network.output(out.sum((2, 3)) / tissue.sum()).item())
            weights.append((ends[0] - ends[1]) / (2 * step) / maps[0, 0].numel())
    network.float()
    expected = np.tensordot(weights, maps[0].double().numpy(), 1)
    heat, _ = grad_cam(network, features, lambda raw: raw[:, 0])
    np.testing.assert_allclose(heat, expected, rtol=2e-3, atol=1e-5)


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


def test_published_network_explains_every_cell():
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


class SquareAttention(nn.Module):
    """Attention proportional to the first feature's square."""

    def forward(self, features):
        return features.mean((1, 2, 3))[:, None]

    def attention(self, features):
        weight = features[:, 0] ** 2
        return weight / weight.sum((1, 2), keepdim=True)


def test_attention_is_divided_by_its_mean():
    network, grid = SquareAttention(), make_grid(9, 12)
    assert isinstance(network, HasAttention)
    heat = explain([fold(network)], grid, REGRESSION, crop=14)
    square = grid.embeddings[0].astype(np.float64) ** 2
    np.testing.assert_allclose(
        heat[grid.valid], square[grid.valid] / square.sum() * grid.valid.sum(), rtol=1e-3
    )
    assert np.nanmean(heat) == pytest.approx(1)


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

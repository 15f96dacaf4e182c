"""Networks on grids: published shapes, background, attention, export."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nic_core.cohort import (
    ClassificationTarget,
    CohortError,
    ModelSettings,
    RegressionTarget,
    SurvivalTarget,
)
from nic_core.models.files import ensemble_module
from nic_core.models.kinds import kind_of
from nic_core.models.networks import (
    FoldModel,
    GatedAttentionMIL,
    Normalise,
    PublishedGridCNN,
    SmallGridCNN,
    build_network,
    check_crop,
    crop_cells,
)

TARGETS = (
    RegressionTarget(name="score", kind="regression", column="y"),
    ClassificationTarget(name="kind", kind="classification", column="y", classes=("a", "b", "c")),
    SurvivalTarget(name="death", kind="survival", time="t", event="e", unit="days"),
)


def test_published_network_has_the_published_shapes():
    network = PublishedGridCNN(128, 1).eval()
    sides, x = [400], torch.zeros(1, 128, 400, 400)
    with torch.no_grad():
        for layer in network.convolutions:
            x = layer(x)
            sides.append(x.shape[-1])
        assert sides == [400, 199, 99, 49, 24, 11, 5, 3, 1]
        assert network.output(network.dense(x)).shape == (1, 1)


def test_published_network_has_the_published_parameter_count():
    network = PublishedGridCNN(3, 2)
    first = 3 * 9 + 3 * 128 + 128
    others = 7 * (128 * 9 + 128 * 128 + 128)
    norms = 9 * 2 * 128
    dense = 128 * 128 + 128 + 128 * 2 + 2
    assert sum(p.numel() for p in network.parameters()) == first + others + norms + dense


@pytest.mark.parametrize("crop", [383, 446])
def test_allowed_crops_are_reduced_to_one_cell(crop):
    check_crop("published", crop)
    with torch.no_grad():
        assert PublishedGridCNN(1, 1).eval()(torch.zeros(1, 1, crop, crop)).shape == (1, 1)


@pytest.mark.parametrize("crop", [24, 382, 447])
def test_other_crops_raise_with_a_remedy(crop):
    with pytest.raises(CohortError, match=r"383 to 446.*use network 'small'"):
        check_crop("published", crop)
    check_crop("small", crop)


@pytest.mark.parametrize(
    ("crop_um", "cell_um", "cells"),
    [(25_600, 64, 400), (25_600, 112, 229), (25_600, 32, 800), (100, 112, 1), (1536, 64.0001, 24)],
)
def test_a_crop_has_the_whole_cells_nearest_to_its_um(crop_um, cell_um, cells):
    assert crop_cells(ModelSettings(network="small", crop_um=crop_um), cell_um) == cells


@given(st.floats(100, 1e5), st.floats(1, 500))
def test_two_encoders_see_the_same_field_of_view_up_to_a_cell(crop_um, cell_um):
    crop = crop_cells(ModelSettings(network="mil", crop_um=max(crop_um, cell_um)), cell_um)
    assert abs(crop * cell_um - max(crop_um, cell_um)) <= cell_um / 2 * (1 + 1e-9)


@pytest.mark.parametrize("cell_um", [32, 112, 0.243 * 256])
def test_a_refused_crop_states_the_um_that_the_network_takes(cell_um):
    with pytest.raises(CohortError, match="crop_um 1000 is .* takes crops of 383 to 446") as error:
        crop_cells(ModelSettings(crop_um=1000), cell_um)
    low, high = map(float, str(error.value).split("a value from ")[1].split(" to "))
    assert crop_cells(ModelSettings(crop_um=low), cell_um) == 383
    assert crop_cells(ModelSettings(crop_um=high), cell_um) == 446


def test_a_crop_smaller_than_a_cell_is_refused():
    with pytest.raises(CohortError, match="crop_um 50 is less than half a cell of 112 um"):
        crop_cells(ModelSettings(network="small", crop_um=50), 112)


@pytest.mark.parametrize("positions", [False, True])
def test_attention_sums_to_one_over_tissue(positions):
    torch.manual_seed(0)
    network = GatedAttentionMIL(4, 2, positions=positions).eval()
    grid = torch.randn(2, 4, 9, 7) * (torch.rand(2, 1, 9, 7) < 0.6)
    weights = network.attention(grid)
    assert weights.shape == (2, 9, 7)
    assert (weights[grid.any(1) == 0] == 0).all()
    assert (weights[grid.any(1)] > 0).all()
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(2))
    wider = torch.zeros(2, 4, 20, 20)
    wider[:, :, 5:14, 8:15] = grid
    torch.testing.assert_close(network(wider), network(grid))
    torch.testing.assert_close(network.attention(wider)[:, 5:14, 8:15], weights)


def test_attention_pooling_equals_the_published_formula():
    torch.manual_seed(0)
    network = GatedAttentionMIL(3, 1).eval()
    grid = torch.randn(1, 3, 4, 5)
    cells = grid[0].flatten(1).T
    with torch.no_grad():
        linear = [m.weight.flatten(1) for m in (network.embed[0], network.content, network.gate)]
        bias = [m.bias for m in (network.embed[0], network.content, network.gate)]
        h = torch.relu(cells @ linear[0].T + bias[0])
        gated = torch.tanh(h @ linear[1].T + bias[1]) * torch.sigmoid(h @ linear[2].T + bias[2])
        a = (gated @ network.score.weight.flatten()).softmax(0)
        torch.testing.assert_close(network(grid)[0], network.output(a @ h))
        torch.testing.assert_close(network.attention(grid).flatten(), a)


def test_attention_pooling_ignores_positions_by_default():
    torch.manual_seed(0)
    grid = torch.randn(1, 4, 6, 6)
    shuffled = grid.flatten(2)[:, :, torch.randperm(36)].reshape(grid.shape)
    without = GatedAttentionMIL(4, 1).eval()
    torch.testing.assert_close(without(grid), without(shuffled))
    aware = GatedAttentionMIL(4, 1, positions=True).eval()
    assert not torch.allclose(aware(grid), aware(shuffled), atol=1e-4)


def test_attention_is_finite_without_tissue_and_with_huge_scores():
    network = GatedAttentionMIL(2, 1).eval()
    assert torch.isfinite(network(torch.zeros(1, 2, 3, 3))).all()
    assert not network.attention(torch.zeros(1, 2, 3, 3)).any()
    with torch.no_grad():
        network.score.weight *= 1e6
        grid = torch.randn(1, 2, 3, 3, requires_grad=True)
    network(grid).sum().backward()
    assert torch.isfinite(grid.grad).all()


def test_small_network_ignores_the_position_of_the_grid():
    network = SmallGridCNN(4, 2).eval()
    grid = torch.randn(1, 4, 9, 9)
    crop = torch.zeros(1, 4, 24, 24)
    one, other = crop.clone(), crop.clone()
    one[:, :, 3:12, 4:13] = grid
    other[:, :, 11:20, 8:17] = grid
    torch.testing.assert_close(network(one), network(other))


def test_background_is_zero_after_normalisation():
    normalise = Normalise(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.5]]))
    embeddings = torch.zeros(1, 2, 1, 2)
    embeddings[0, :, 0, 1] = torch.tensor([3.0, 4.0])
    assert normalise(embeddings)[0, 0, 0].tolist() == [0.0, 3.0]


def make(target, network="small", channels=6):
    torch.manual_seed(0)
    weight = torch.randn(4, channels) if network == "small" else torch.rand(channels) + 0.5
    features = 4 if network == "small" else channels
    kind = kind_of(target)
    network = build_network(network, features, kind.outputs)
    return FoldModel(Normalise(torch.randn(channels), weight), network, kind).eval()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.kind)
def test_ensemble_is_the_mean_of_folds_and_can_be_exported(target):
    models = [make(target) for _ in range(3)]
    models[0].scale.fill_(2.0)
    module = ensemble_module(models)
    example = torch.randn(2, 6, 24, 24)
    example[:, :, :8] = 0
    exported = torch.export.export(
        module, (example,), dynamic_shapes={"embeddings": {0: torch.export.Dim("batch", min=1)}}
    ).module()
    for batch in (1, 5):
        x = torch.randn(batch, 6, 24, 24)
        x[:, :, :, 20:] = 0
        with torch.no_grad():
            expected = torch.stack([m(x) for m in models]).mean(0)
            torch.testing.assert_close(module(x), expected)
            torch.testing.assert_close(exported(x), expected)
    if target.kind == "classification":
        assert np.allclose(module(example).sum(1), 1)

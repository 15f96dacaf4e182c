"""Tests that the optimised encoder gives the embeddings of the published network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nic_core.encoders.encoder import with_embedding
from nic_core.encoders.inference import (
    FoldedEncoder,
    FusedEncoder,
    MemoryBoundModule,
    fast_module,
)
from nic_core.encoders.networks import (
    MeanRGB,
    PatchEncoder,
    StridedEncoder,
    TellezEncoder,
    pool_patches,
    pooled_side,
)
from nic_core.torch_internals import has_fused_convolution
from tests.encoders.conftest import encoder_of
from tests.encoders.test_networks import random_patches, with_random_statistics

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
EMBEDDINGS = ["dense", "pooled", "both"]


def exact(
    network: TellezEncoder, pixels: torch.Tensor, pooling: int, embedding: str = "dense"
) -> torch.Tensor:
    """Compute the published network in float64."""
    pooled = pool_patches(pixels, pooling).double() / 255 * 2 - 1
    with torch.inference_mode():
        maps = network.double().convolutions(pooled)
        flat = maps.flatten(2)
        texture = torch.cat([flat.mean(2), flat.var(2, correction=0).sqrt()], 1)
        parts = {"dense": [network(pooled)], "pooled": [texture]}
        return torch.cat(parts.get(embedding, [network(pooled), texture]), 1)


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@settings(max_examples=8, deadline=None)
@given(
    patch=st.integers(31, 80).map(lambda side: 2 * side),
    seed=st.integers(0, 99),
    pooling=st.sampled_from([1, 2]),
    embedding=st.sampled_from(EMBEDDINGS),
)
def test_folding_keeps_the_embeddings(patch: int, seed: int, pooling: int, embedding: str):
    torch.manual_seed(seed)
    network = TellezEncoder(16, pooled_side(patch))
    with_random_statistics(network, seed)
    pixels = random_patches(3, patch if pooling == 2 else patch // 2, seed)
    with torch.inference_mode():
        folded = FoldedEncoder(network, pooling, embedding)(pixels)
    assert deviation(folded, exact(network, pixels, pooling, embedding)) < 2e-6


@pytest.mark.skipif(not has_fused_convolution(), reason="this PyTorch has no fused convolution")
@pytest.mark.parametrize("count", [1, 7, 32, 33])
@pytest.mark.parametrize("pooling", [1, 2])
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_fusing_keeps_the_embeddings_for_any_batch_size(count: int, pooling: int, embedding: str):
    network = with_random_statistics(TellezEncoder())
    pixels = random_patches(count, 64 * pooling).contiguous(memory_format=torch.channels_last)
    module = fast_module(
        network, pooling=pooling, device=CPU, precision="float32", embedding=embedding
    )
    assert isinstance(module, FusedEncoder)
    with torch.inference_mode():
        found = module(pixels)
    assert deviation(found, exact(network, pixels, pooling, embedding)) < 2e-6


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("pooling", [1, 2])
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_bfloat16_embeddings_have_the_same_direction(
    fuse: bool, pooling: int, embedding: str, monkeypatch
):
    if fuse and not has_fused_convolution():
        pytest.skip("this PyTorch has no fused convolution")
    monkeypatch.setattr("nic_core.encoders.inference.has_fused_convolution", lambda: fuse)
    network = with_random_statistics(TellezEncoder())
    pixels = random_patches(8, 64 * pooling)
    module = fast_module(
        network, pooling=pooling, device=CPU, precision="bfloat16", embedding=embedding
    )
    with torch.inference_mode():
        found = module(pixels)
    assert found.dtype == torch.float32
    expected = exact(network, pixels, pooling, embedding).float()
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.9995


def test_prepared_encoder_records_side_resolution_and_precision():
    encoder = encoder_of(PatchEncoder(with_random_statistics(TellezEncoder())), "tellez2020", 128)
    prepared = encoder.prepare("cpu", "float32", "input")
    assert (prepared.side, prepared.mpp, prepared.reading, prepared.precision) == (
        64,
        1.0,
        "input",
        "float32",
    )
    prepared = encoder.prepare("cpu", "bfloat16", "patch")
    assert (prepared.side, prepared.mpp, prepared.reading, prepared.precision) == (
        128,
        0.5,
        "patch",
        "bfloat16",
    )
    assert prepared.on_cpu


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_both_readings_give_the_same_embeddings(embedding: str):
    network = with_random_statistics(TellezEncoder())
    encoder = with_embedding(encoder_of(PatchEncoder(network), "tellez2020", 128), embedding)
    small = random_patches(5, 64)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    with torch.inference_mode():
        by_input = encoder.prepare("cpu", "float32", "input").module(small)
        by_patch = encoder.prepare("cpu", "float32", "patch").module(large)
    assert deviation(by_input, by_patch) < 2e-6


def test_without_pooling_both_readings_are_the_patch():
    network = with_random_statistics(StridedEncoder(16))
    encoder = encoder_of(PatchEncoder(network), "tellez2019", 16)
    prepared = encoder.prepare("cpu", "bfloat16", "input")
    assert (prepared.side, prepared.mpp, prepared.reading) == (128, 0.5, "patch")
    pixels = random_patches(6)
    with torch.inference_mode():
        plain = encoder.module(pixels)
        low = prepared.module(pixels).float()
        full = encoder.prepare("cpu", "float32").module(pixels)
    assert torch.allclose(plain, full, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
    assert torch.nn.functional.cosine_similarity(low, plain).min() > 0.9995


def test_mean_rgb_stays_in_float32():
    prepared = encoder_of(MeanRGB(), "mean_rgb", 3).prepare("cpu", "bfloat16")
    assert prepared.precision == "float32"
    pixels = random_patches(4)
    expected = pixels.double().mean((2, 3)) / 255 * 2 - 1
    np.testing.assert_allclose(prepared.module(pixels).double(), expected, atol=1e-6)


def test_prepare_does_not_change_the_encoder():
    encoder = encoder_of(PatchEncoder(with_random_statistics(TellezEncoder())), "tellez2020", 128)
    before = {name: tensor.clone() for name, tensor in encoder.module.state_dict().items()}
    encoder.prepare("cpu", "bfloat16", "input")
    after = encoder.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Bounded(torch.nn.Module):
    """A network that runs out of memory for more than ``most`` patches; ``sizes`` are its calls."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.sizes: list[int] = []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(pixels))
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return pixels.float().mean((2, 3))


@given(most=st.integers(1, 20), patches=st.integers(1, 40))
def test_a_full_memory_halves_the_batch_and_keeps_every_embedding(most: int, patches: int):
    network = Bounded(most)
    module = MemoryBoundModule(network)
    pixels = random_patches(patches, 4)
    torch.testing.assert_close(module(pixels), pixels.float().mean((2, 3)))
    network.sizes.clear()
    torch.testing.assert_close(module(pixels), pixels.float().mean((2, 3)))
    assert max(network.sizes) <= most  # the second call does not run out of memory
    if patches <= most:
        assert network.sizes == [patches]


def test_a_patch_that_does_not_fit_the_memory_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        MemoryBoundModule(Bounded(0))(random_patches(3, 4))

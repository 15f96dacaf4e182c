"""The encoder as compression runs it against the network as it is published."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nic_core.devices import resolve_precision
from nic_core.encoders.encoder import Encoder, EncoderCard
from nic_core.encoders.inference import FoldedEncoder, FusedEncoder, can_fuse, fast_module
from nic_core.encoders.networks import (
    MeanRGB,
    PatchEncoder,
    StridedEncoder,
    TellezEncoder,
    pool_patches,
    pooled_side,
)
from tests.encoders.test_networks import random_patches, with_random_statistics

CPU = torch.device("cpu")


def exact(network: TellezEncoder, pixels: torch.Tensor, pooling: int) -> torch.Tensor:
    """The plain network in float64."""
    pooled = pool_patches(pixels, pooling).double() / 255 * 2 - 1
    with torch.inference_mode():
        return network.double()(pooled)


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@settings(max_examples=8, deadline=None)
@given(
    patch=st.integers(31, 80).map(lambda side: 2 * side),
    seed=st.integers(0, 99),
    pooling=st.sampled_from([1, 2]),
)
def test_folding_keeps_the_function(patch: int, seed: int, pooling: int):
    torch.manual_seed(seed)
    network = TellezEncoder(16, pooled_side(patch))
    with_random_statistics(network, seed)
    pixels = random_patches(3, patch if pooling == 2 else patch // 2, seed)
    with torch.inference_mode():
        folded = FoldedEncoder(network, pooling)(pixels)
    assert deviation(folded, exact(network, pixels, pooling)) < 2e-6


@pytest.mark.skipif(not can_fuse(), reason="PyTorch without oneDNN: nothing to fuse")
@pytest.mark.parametrize("count", [1, 7, 32, 33])
@pytest.mark.parametrize("pooling", [1, 2])
def test_fusing_keeps_the_function_for_any_batch(count: int, pooling: int):
    network = with_random_statistics(TellezEncoder())
    pixels = random_patches(count, 64 * pooling).contiguous(memory_format=torch.channels_last)
    module = fast_module(network, pooling=pooling, device=CPU, precision="float32")
    assert isinstance(module, FusedEncoder)
    with torch.inference_mode():
        found = module(pixels)
    assert deviation(found, exact(network, pixels, pooling)) < 2e-6


def test_without_fused_convolutions_the_folded_ones_serve(monkeypatch):
    monkeypatch.setattr("nic_core.encoders.inference.can_fuse", lambda: False)
    network = with_random_statistics(TellezEncoder())
    module = fast_module(network, pooling=2, device=CPU, precision="float32")
    assert isinstance(module, FoldedEncoder)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("pooling", [1, 2])
def test_bfloat16_codes_point_the_same_way(fuse: bool, pooling: int, monkeypatch):
    if fuse and not can_fuse():
        pytest.skip("PyTorch without oneDNN: nothing to fuse")
    monkeypatch.setattr("nic_core.encoders.inference.can_fuse", lambda: fuse)
    network = with_random_statistics(TellezEncoder())
    pixels = random_patches(8, 64 * pooling)
    module = fast_module(network, pooling=pooling, device=CPU, precision="bfloat16")
    with torch.inference_mode():
        found = module(pixels)
    assert found.dtype == torch.float32
    expected = exact(network, pixels, pooling).float()
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.9995


@pytest.mark.parametrize(("has", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_only_where_the_device_has_it(has: bool, expected: str, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: has)
    for device in (CPU, torch.device("cuda")):
        assert resolve_precision("auto", device) == expected
        assert resolve_precision("float32", device) == "float32"


def encoder_of(module: torch.nn.Module, architecture: str, embedding_size: int) -> Encoder:
    card = EncoderCard(
        name="e",
        architecture=architecture,
        objective="vae",
        patch=128,
        mpp=0.5,
        embedding_size=embedding_size,
        weights_hash="0",
    )
    return Encoder(card, module)


def test_a_prepared_encoder_says_what_it_reads_and_how():
    encoder = encoder_of(PatchEncoder(with_random_statistics(TellezEncoder())), "tellez2020", 128)
    ready = encoder.prepare("cpu", "float32", "input")
    assert (ready.side, ready.mpp, ready.reading, ready.precision) == (64, 1.0, "input", "float32")
    ready = encoder.prepare("cpu", "bfloat16", "patch")
    assert (ready.side, ready.mpp, ready.reading, ready.precision) == (
        128,
        0.5,
        "patch",
        "bfloat16",
    )
    assert ready.on_cpu


def test_both_readings_are_one_function_of_the_pooled_pixels():
    encoder = encoder_of(PatchEncoder(with_random_statistics(TellezEncoder())), "tellez2020", 128)
    small = random_patches(5, 64)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    with torch.inference_mode():
        by_input = encoder.prepare("cpu", "float32", "input").module(small)
        by_patch = encoder.prepare("cpu", "float32", "patch").module(large)
    assert deviation(by_input, by_patch) < 2e-6


def test_a_network_that_pools_nothing_reads_the_patch_either_way():
    network = with_random_statistics(StridedEncoder(16))
    encoder = encoder_of(PatchEncoder(network), "tellez2019", 16)
    ready = encoder.prepare("cpu", "bfloat16", "input")
    assert (ready.side, ready.mpp, ready.reading) == (128, 0.5, "patch")
    pixels = random_patches(6)
    with torch.inference_mode():
        plain = encoder.module(pixels)
        low = ready.module(pixels).float()
        full = encoder.prepare("cpu", "float32").module(pixels)
    assert torch.allclose(plain, full, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
    assert torch.nn.functional.cosine_similarity(low, plain).min() > 0.9995


def test_a_mean_stays_in_float32():
    ready = encoder_of(MeanRGB(), "mean_rgb", 3).prepare("cpu", "bfloat16")
    assert ready.precision == "float32"
    pixels = random_patches(4)
    expected = pixels.double().mean((2, 3)) / 255 * 2 - 1
    np.testing.assert_allclose(ready.module(pixels).double(), expected, atol=1e-6)


def test_preparing_leaves_the_encoder_as_it_is():
    encoder = encoder_of(PatchEncoder(with_random_statistics(TellezEncoder())), "tellez2020", 128)
    before = {name: tensor.clone() for name, tensor in encoder.module.state_dict().items()}
    encoder.prepare("cpu", "bfloat16", "input")
    after = encoder.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nic_core.encoders.networks import (
    ClassHead,
    MeanRGB,
    PatchEncoder,
    TellezEncoder,
    flatten_hwc,
    pooled_side,
)


def with_random_statistics(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give BatchNorm random statistics and weights, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.3, 3, generator=generator)
            with torch.no_grad():
                layer.weight.uniform_(0.5, 1.5, generator=generator)
                layer.bias.normal_(generator=generator)
    return module.eval()


def random_patches(count: int, side: int = 128, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def test_encoder_has_the_released_number_of_parameters():
    # trainable parameters and running statistics, which Keras counts too
    network = TellezEncoder()
    trainable = sum(p.numel() for p in network.parameters())
    statistics = sum(b.numel() for n, b in network.named_buffers() if "running" in n)
    assert trainable + statistics == 595_968


def test_feature_maps_shrink_as_published():
    network = TellezEncoder()
    sides, maps = [], torch.zeros(2, 3, 64, 64)
    for layer in network.convolutions:
        maps = layer(maps)
        if isinstance(layer, nn.Conv2d):
            sides.append(maps.shape[-1])
    assert sides == [31, 15, 7, 3]
    assert network.dense.in_features == 1152


def test_blocks_are_convolution_leaky_relu_batch_norm():
    layers = list(TellezEncoder().convolutions)
    assert [type(layer) for layer in layers] == [nn.Conv2d, nn.LeakyReLU, nn.BatchNorm2d] * 4
    assert {layer.negative_slope for layer in layers[1::3]} == {0.2}
    assert {(layer.eps, layer.momentum) for layer in layers[2::3]} == {(1e-3, 0.2)}
    assert {layer.padding for layer in layers[0::3]} == {(0, 0)}


def test_flatten_order_is_height_width_channel():
    maps = np.arange(2 * 5 * 3 * 4, dtype=np.float32).reshape(2, 5, 3, 4)  # B, C, H, W
    expected = maps.transpose(0, 2, 3, 1).reshape(2, -1)
    assert np.array_equal(flatten_hwc(torch.from_numpy(maps)).numpy(), expected)


def test_pixels_are_averaged_and_scaled_to_minus_one_to_one():
    class Probe(nn.Module):
        pooling = 2

        def forward(self, pooled: torch.Tensor) -> torch.Tensor:
            return pooled

    pixels = random_patches(2)
    expected = pixels.double().unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)) / 255 * 2 - 1
    assert torch.allclose(PatchEncoder(Probe())(pixels).double(), expected, atol=1e-6)


def test_mean_rgb_is_the_scaled_mean_of_each_channel():
    pixels = random_patches(3)
    expected = pixels.double().mean((2, 3)) / 255 * 2 - 1
    assert torch.allclose(MeanRGB()(pixels).double(), expected, atol=1e-6)


def test_head_is_dense_256_batch_norm_leaky_relu_dense():
    head = ClassHead(128, 9)
    assert [type(layer) for layer in head.layers] == [
        nn.Linear,
        nn.BatchNorm1d,
        nn.LeakyReLU,
        nn.Linear,
    ]
    assert head(torch.zeros(4, 128)).shape == (4, 9)


@pytest.mark.parametrize("side", [0, 3, 30])
def test_a_patch_too_small_for_the_network_is_refused(side: int):
    with pytest.raises(ValueError, match="too small"):
        TellezEncoder(side=side)


def test_an_odd_patch_is_refused():
    with pytest.raises(ValueError, match="odd"):
        pooled_side(127)


def test_exported_encoder_maps_patch_to_embedding():
    encoder = with_random_statistics(PatchEncoder(TellezEncoder()))
    batch = torch.export.Dim("batch", min=2, max=1024)
    exported = torch.export.export(
        encoder, (random_patches(4),), dynamic_shapes={"pixels": {0: batch}}
    )
    pixels = random_patches(7, seed=1)
    assert torch.allclose(exported.module()(pixels), encoder(pixels), atol=1e-5)

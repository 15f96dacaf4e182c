"""The encoder as compression runs it: the same function with less work.

Three rewrites of the published network (:class:`~nic_core.encoders.networks.TellezEncoder`) are
exact, since each moves one linear map into another:

1. every BatchNorm stands after LeakyReLU and before a layer that pads nothing, so its scale and
   shift move into that layer's weights; so does the scaling of pixels to [-1, +1];
2. the mean over p x p px moves into the first convolution, which becomes one of 3p x 3p px with
   stride 2p on the patch's own pixels;
3. on CPUs with oneDNN, weights lie as its kernels want them and LeakyReLU is part of the
   convolution: no pass over the maps of its own, no reordering a batch.

The fourth, bfloat16, is not exact: it is a setting, and grids record it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from nic_core.encoders.networks import FILTERS, SLOPE, TellezEncoder, channels_last, flatten_hwc
from nic_core.types import Precision, Reading

BATCH = 32  # patches whose maps stay in a core's cache: faster than more


class Card(Protocol):
    """What compression needs to know of an encoder."""

    @property
    def name(self) -> str: ...
    @property
    def patch(self) -> int: ...
    @property
    def mpp(self) -> float: ...
    @property
    def embedding_size(self) -> int: ...
    @property
    def weights_hash(self) -> str: ...


@dataclass(frozen=True)
class PreparedEncoder:
    """An encoder on its device, ready for many patches.

    Attributes
    ----------
    card : EncoderCard
    module : nn.Module
        uint8 (B, 3, side, side), fastest channels-last, to embeddings (B, C), float32 or ``precision``.
    side : int
        Of what it reads, px.
    mpp : float
        um/px of what it reads: the patch's, or the coarser one of the network's own input.
    device : torch.device
    precision : str
        ``float32`` or ``bfloat16``.
    reading : str
        ``patch``: the patch's own pixels; ``input``: pixels of the network's input, which is
        the patch pooled, read from the slide at that um/px.
    """

    card: Card
    module: nn.Module
    side: int
    mpp: float
    device: torch.device
    precision: Precision
    reading: Reading

    @property
    def on_cpu(self) -> bool:
        """Whether it encodes on the cores that also decode slides."""
        return self.device.type == "cpu"


def fast_module(
    network: TellezEncoder, *, pooling: int, device: torch.device, precision: Precision
) -> nn.Module:
    """The published network by the rewrites above.

    Parameters
    ----------
    pooling : int
        Pixels a side of the input whose mean the network sees: 1 for its own resolution.

    Returns
    -------
    nn.Module
        uint8 (B, 3, side * pooling, side * pooling) to float32 (B, C).
    """
    folded = FoldedEncoder(network, pooling).to(device)
    if precision == "bfloat16":
        folded.convolutions.bfloat16()
    return FusedEncoder(folded) if device.type == "cpu" and can_fuse() else folded


def autocast(module: nn.Module, device: torch.device, precision: Precision) -> nn.Module:
    """Any other module, its convolutions and products in ``precision``."""
    return module if precision == "float32" else _Autocast(module, device.type)


class FoldedEncoder(nn.Module):
    """The same function as a :class:`TellezEncoder` on pixels, with fewer operations.

    Takes uint8 (B, 3, side * pooling, side * pooling); rewrites 1 and 2 of this module.
    """

    def __init__(self, network: TellezEncoder, pooling: int) -> None:
        super().__init__()
        # what the input of the next linear layer must be multiplied with and shifted by
        scale = torch.full((3,), 2 / 255, dtype=torch.float64)
        shift = torch.full((3,), -1.0, dtype=torch.float64)
        layers: list[nn.Module] = []
        for layer in network.convolutions:
            if isinstance(layer, nn.Conv2d):
                step = 1 if layers else pooling
                folded = nn.Conv2d(layer.in_channels, layer.out_channels, 3 * step, stride=2 * step)
                weight = layer.weight.double()
                bias = _shifted_bias(layer, weight, shift.view(1, -1, 1, 1))
                weight = (weight * scale.view(1, -1, 1, 1)) / step**2
                spread = weight.repeat_interleave(step, 2).repeat_interleave(step, 3)
                _set(folded, spread, bias)
                layers += [folded, nn.LeakyReLU(SLOPE, inplace=True)]
            elif isinstance(layer, nn.BatchNorm2d):
                scale, shift = _affine_of(layer)
        self.convolutions = nn.Sequential(*layers)
        self.dense = nn.Linear(network.dense.in_features, network.dense.out_features)
        positions = network.dense.in_features // FILTERS
        weight = network.dense.weight.double()
        bias = _shifted_bias(network.dense, weight, shift.repeat(positions))
        _set(self.dense, weight * scale.repeat(positions), bias)
        channels_last(self.eval().requires_grad_(False))

    @property
    def dtype(self) -> torch.dtype:
        """Of the convolutions."""
        return next(self.convolutions.parameters()).dtype

    def forward(self, pixels: Tensor) -> Tensor:
        maps: Tensor = self.convolutions(pixels.to(self.dtype))
        # the last sum in float32 costs nothing, and embeddings keep all the digits that grids store
        embeddings: Tensor = self.dense(flatten_hwc(maps).float())
        return embeddings


class FusedEncoder(nn.Module):
    """A :class:`FoldedEncoder` through oneDNN's fused convolutions (rewrite 3).

    They are what ``torch.compile`` emits on CPUs, called without its compiler and its minute of
    start-up.
    """

    def __init__(self, folded: FoldedEncoder) -> None:
        super().__init__()
        self.dense, self.dtype = folded.dense, folded.dtype
        layers = [layer for layer in folded.convolutions if isinstance(layer, nn.Conv2d)]
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        self._convolutions = [
            (reorder(c.weight, [0, 0], c.stride, [1, 1], 1, None), c.bias, list(c.stride))
            for c in layers
        ]

    def forward(self, pixels: Tensor) -> Tensor:
        maps = pixels.to(self.dtype)
        for weight, bias, stride in self._convolutions:
            maps = torch.ops.mkldnn._convolution_pointwise(
                maps, weight, bias, [0, 0], stride, [1, 1], 1, "leaky_relu", [SLOPE], ""
            )
        embeddings: Tensor = self.dense(flatten_hwc(maps).float())
        return embeddings


def can_fuse() -> bool:
    """Whether this build of PyTorch has oneDNN's fused convolutions (x86 CPUs)."""
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


class _Autocast(nn.Module):
    def __init__(self, module: nn.Module, device: str) -> None:
        super().__init__()
        self.module = module
        self._device = device

    def forward(self, pixels: Tensor) -> Tensor:
        with torch.autocast(self._device, dtype=torch.bfloat16):
            embeddings: Tensor = self.module(pixels)
        return embeddings


def _affine_of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _shifted_bias(layer: nn.Conv2d | nn.Linear, weight: Tensor, shift: Tensor) -> Tensor:
    """The bias of a layer whose input is shifted."""
    assert layer.bias is not None
    return layer.bias.double() + (weight * shift).flatten(1).sum(1)


@torch.no_grad()
def _set(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> None:
    assert layer.bias is not None
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)

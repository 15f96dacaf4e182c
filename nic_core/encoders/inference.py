"""Fast inference: the same function as the trained encoder, with fewer operations.

Three optimisations of the published network (:class:`~nic_core.encoders.networks.TellezEncoder`)
are exact up to rounding, because each folds one linear map into another:

1. Every BatchNorm follows LeakyReLU and precedes a layer without padding, so its scale and shift
   are folded into the weights of that layer. So is the scaling of pixels to [-1, +1]. The last
   one is applied to the pooled statistics instead of the maps, if the embedding has them.
2. The mean over p x p px is folded into the first convolution, which then has 3p x 3p px and
   stride 2p on the pixels of the patch.
3. On CPUs with oneDNN, weights are stored in the layout of its kernels and LeakyReLU is fused into
   the convolution, which saves a pass over the feature maps and a reordering for each batch.

Two more are not exact: bfloat16, and int8 (:mod:`nic_core.encoders.int8`). They are settings, and
each grid records them.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nic_core.devices import single_threaded_torch
from nic_core.encoders.networks import (
    FILTERS,
    SLOPE,
    TellezEncoder,
    channels_last,
    flatten_hwc,
    pooled_statistics,
)
from nic_core.parallel import cores
from nic_core.torch_internals import convolve_leaky_relu, has_fused_convolution, reorder_weight
from nic_core.types import Embedding, GridPrecision, Pixels, Precision, Reading

BATCH = 32  # patches; the feature maps of a larger batch exceed a core's cache


class Card(Protocol):
    """The fields of an encoder card that compression requires."""

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
    """An encoder optimised for inference on one device.

    Attributes
    ----------
    card : EncoderCard
    module : nn.Module
        Maps uint8 (B, 3, side, side), fastest in channels-last layout, to embeddings (B, C) in
        float32 or ``precision``.
    side : int
        Side of the pixels that ``module`` takes, px.
    mpp : float
        Resolution of these pixels, um/px.
    device : torch.device
    precision : str
        ``float32``, ``bfloat16`` or ``int8``.
    reading : str
        ``patch``: ``module`` takes the pixels of the patch. ``input``: it takes the pooled patch,
        which is read from the slide at the coarser resolution of the network's input.
    """

    card: Card
    module: nn.Module
    side: int
    mpp: float
    device: torch.device
    precision: GridPrecision
    reading: Reading

    @property
    def on_cpu(self) -> bool:
        """Whether encoding shares the CPU with the decoding of slides."""
        return self.device.type == "cpu"


def embed_patches(encoder: PreparedEncoder, pixels: Pixels) -> NDArray[np.float32]:
    """Embed patches: uint8 (B, side, side, 3) to float32 (B, C)."""
    embeddings = np.empty((len(pixels), encoder.card.embedding_size), np.float32)

    @torch.inference_mode()
    def encode(start: int) -> None:
        part = torch.tensor(pixels[start : start + BATCH], device=encoder.device)
        found = encoder.module(part.permute(0, 3, 1, 2))
        embeddings[start : start + BATCH] = found.float().cpu().numpy()

    starts = range(0, len(pixels), BATCH)
    if encoder.on_cpu:
        with single_threaded_torch(), ThreadPoolExecutor(cores()) as pool:
            deque(pool.map(encode, starts), maxlen=0)  # raises what a call raised
    else:
        deque(map(encode, starts), maxlen=0)
    return embeddings


def fast_module(
    network: TellezEncoder,
    *,
    pooling: int,
    device: torch.device,
    precision: Precision,
    embedding: Embedding = "dense",
) -> nn.Module:
    """Return the published network with the optimisations of this module.

    Parameters
    ----------
    network : TellezEncoder
    pooling : int
        Pooling factor that is folded into the first convolution; 1 if the input is pooled already.
    device : torch.device
    precision : str
        ``float32`` or ``bfloat16``.
    embedding : str
        What the embedding contains; see :class:`~nic_core.encoders.networks.PatchEncoder`.

    Returns
    -------
    nn.Module
        Maps uint8 (B, 3, side * pooling, side * pooling) to float32 (B, C).
    """
    folded = FoldedEncoder(network, pooling, embedding).to(device)
    if precision == "bfloat16":
        folded.convolutions.bfloat16()
    fused = device.type == "cpu" and has_fused_convolution()
    return FusedEncoder(folded) if fused else folded


def autocast(module: nn.Module, device: torch.device, precision: Precision) -> nn.Module:
    """Run the convolutions and matrix products of any module in ``precision``."""
    return module if precision == "float32" else _Autocast(module, device.type)


class MemoryBoundModule(nn.Module):
    """Run a module on as many patches at once as fit the memory of the GPU.

    When the GPU has no memory left, the number of patches is halved, and later calls start with the
    halved number. Nothing changes where the memory suffices.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._most: int | None = None  # patches at once; None: any number

    def forward(self, pixels: Tensor) -> Tensor:
        """Map uint8 (B, 3, P, P) to (B, C).

        Raises
        ------
        torch.OutOfMemoryError
            One patch does not fit the memory.
        """
        done: list[Tensor] = []
        start = 0
        while start < len(pixels):
            part = pixels[start : start + (self._most or len(pixels))]
            try:
                done.append(self.module(part))
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self._most = len(part) // 2
            else:
                start += len(part)
        return done[0] if len(done) == 1 else torch.cat(done)


class FoldedEncoder(nn.Module):
    """A :class:`TellezEncoder` on pixels with optimisations 1 and 2 of this module.

    Takes uint8 (B, 3, side * pooling, side * pooling).
    """

    def __init__(
        self, network: TellezEncoder, pooling: int, embedding: Embedding = "dense"
    ) -> None:
        super().__init__()
        # scale and shift of the next linear layer's input
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
        self.readout = _Readout(network.dense, scale, shift, embedding)
        channels_last(self.eval().requires_grad_(False))

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the convolutions."""
        return next(self.convolutions.parameters()).dtype

    def forward(self, pixels: Tensor) -> Tensor:
        embeddings: Tensor = self.readout(self.convolutions(pixels.to(self.dtype)))
        return embeddings


class _Readout(nn.Module):
    """Embedding of the last feature maps before their BatchNorm, float32 (B, C).

    ``scale`` and ``shift`` (float64, one number a channel) are those of the BatchNorm.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, dense: nn.Linear, scale: Tensor, shift: Tensor, embedding: Embedding
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.dense = nn.Linear(dense.in_features, dense.out_features)
        positions = dense.in_features // FILTERS
        weight = dense.weight.double()
        bias = _shifted_bias(dense, weight, shift.repeat(positions))
        _set(self.dense, weight * scale.repeat(positions), bias)
        # mean and deviation of scale * x + shift
        self.register_buffer("scale", torch.cat([scale, scale.abs()]).float())
        self.register_buffer("shift", torch.cat([shift, torch.zeros_like(shift)]).float())

    def forward(self, maps: Tensor) -> Tensor:
        # float32 costs nothing here and keeps every digit that the float16 grids store
        maps = maps.float()
        parts: list[Tensor] = []
        if self.embedding != "pooled":
            parts.append(self.dense(flatten_hwc(maps)))
        if self.embedding != "dense":
            parts.append(pooled_statistics(maps) * self.scale + self.shift)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class FusedEncoder(nn.Module):
    """A :class:`FoldedEncoder` on oneDNN's fused convolutions (optimisation 3 of this module).

    ``torch.compile`` generates the same calls on CPUs, after a minute of compilation.
    """

    def __init__(self, folded: FoldedEncoder) -> None:
        super().__init__()
        self.readout, self.dtype = folded.readout, folded.dtype
        layers = [layer for layer in folded.convolutions if isinstance(layer, nn.Conv2d)]
        self._convolutions = [
            (reorder_weight(layer), layer.bias, list(layer.stride)) for layer in layers
        ]

    def forward(self, pixels: Tensor) -> Tensor:
        maps = pixels.to(self.dtype)
        for weight, bias, stride in self._convolutions:
            assert bias is not None
            maps = convolve_leaky_relu(maps, weight, bias, stride, SLOPE)
        embeddings: Tensor = self.readout(maps)
        return embeddings


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
    """Return the bias that replaces a shift of the layer's input."""
    assert layer.bias is not None
    return layer.bias.double() + (weight * shift).flatten(1).sum(1)


@torch.no_grad()
def _set(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> None:
    assert layer.bias is not None
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)

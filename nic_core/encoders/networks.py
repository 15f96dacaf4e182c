"""Section 2, encoder networks: from patches to embeddings.

:class:`TellezEncoder` is the architecture of the released multitask and BiGAN encoders [model]:
4 strided 3x3 convolutions with **valid** padding, LeakyReLU *before* BatchNorm, flattening in
height, width, channel order, one linear layer. Keras' BatchNorm momentum 0.8 is 0.2 in PyTorch.
:class:`StridedEncoder` is the architecture of the VAE and of contrastive training [B] (section 3).
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from nic_core.types import Embedding

FILTERS = 128
CONVOLUTIONS = 4
POOLING = 2
SLOPE = 0.2
BN_EPSILON = 1e-3
BN_MOMENTUM = 0.2


def pool_patches(pixels: Tensor, pooling: int = POOLING) -> Tensor:
    """Average p x p pixels: uint8 or float (B, 3, P, P) to float32 (B, 3, P/p, P/p)."""
    pixels = pixels.float()
    return pixels if pooling == 1 else functional.avg_pool2d(pixels, pooling)


def flatten_hwc(maps: Tensor) -> Tensor:
    """Flatten (B, C, H, W) to (B, H*W*C), the order of Keras."""
    return maps.permute(0, 2, 3, 1).flatten(1)


def pooled_statistics(maps: Tensor) -> Tensor:
    """Return mean and standard deviation of each channel over positions, without their place.

    (B, C, H, W) to float32 (B, 2 C): the means, then the deviations, of the H*W values (division by
    H*W, not by H*W - 1) [choice].
    """
    deviations, means = torch.std_mean(maps.float(), dim=(2, 3), correction=0)
    return torch.cat([means, deviations], 1)


def full_size(embedding: Embedding, dense_size: int) -> int:
    """Return the length of an embedding of the published network; ``dense_size``: of its code."""
    pooled = 2 * FILTERS
    return {"dense": dense_size, "pooled": pooled, "both": dense_size + pooled}[embedding]


def channels_last(module: nn.Module) -> None:
    """Convert convolution weights to channels-last layout, which is faster on CPUs."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def convolved_side(side: int) -> int:
    """Return the side of the last feature map: 64 px -> 31 -> 15 -> 7 -> 3."""
    for _ in range(CONVOLUTIONS):
        side = (side - 3) // 2 + 1
    return side


def initialise_as_keras(module: nn.Module) -> None:
    """Draw initial weights as the released encoders are configured [model].

    Convolutions: He uniform; dense layers: Glorot uniform; biases: 0.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


class ConvolutionalEncoder(nn.Module):
    """Base of both networks: ``convolutions``, a sequence of blocks of three layers.

    A block is one convolution with its BatchNorm and LeakyReLU. Frozen blocks are not trained, and
    their BatchNorm keeps its statistics.
    """

    BLOCK = 3  # layers

    convolutions: nn.Sequential
    _frozen_layers = 0

    def freeze(self, blocks: int) -> None:
        """Exclude the first ``blocks`` convolution blocks from training."""
        self._frozen_layers = blocks * self.BLOCK
        self.convolutions[: self._frozen_layers].requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of every layer; frozen blocks stay in evaluation mode."""
        super().train(mode)
        self.convolutions[: self._frozen_layers].eval()
        return self


class TellezEncoder(ConvolutionalEncoder):
    """Pooled patch in [-1, 1], float32 (B, 3, side, side), to embedding, float32 (B, C).

    595,968 parameters at the published size, side 64 and embedding size 128 [model]. Other sides
    are [choice]; only the dense layer depends on them.

    Raises
    ------
    ValueError
        ``side`` is less than 31 px, too small for 4 convolutions with valid padding.
    """

    def __init__(self, embedding_size: int = 128, side: int = 64) -> None:
        super().__init__()
        last = convolved_side(side)
        if last < 1:
            raise ValueError(f"a pooled patch of {side} px is too small; use 31 px or more")
        self.embedding_size = embedding_size
        self.side = side
        layers: list[nn.Module] = []
        for channels in (3, *[FILTERS] * (CONVOLUTIONS - 1)):
            layers += [
                nn.Conv2d(channels, FILTERS, kernel_size=3, stride=2),
                nn.LeakyReLU(SLOPE, inplace=True),
                nn.BatchNorm2d(FILTERS, eps=BN_EPSILON, momentum=BN_MOMENTUM),
            ]
        self.convolutions = nn.Sequential(*layers)
        self.dense = nn.Linear(last * last * FILTERS, embedding_size)
        initialise_as_keras(self)

    @property
    def pooling(self) -> int:
        """Pooling factor between the patch and the network's input."""
        return POOLING

    def features(self, pooled: Tensor) -> Tensor:
        """Return the input of the last linear layer, float32 (B, features)."""
        return flatten_hwc(self.convolutions(pooled))

    def forward(self, pooled: Tensor) -> Tensor:
        embeddings: Tensor = self.dense(self.features(pooled))
        return embeddings


class StridedEncoder(ConvolutionalEncoder):
    """Patch in [-1, 1], float32 (B, 3, side, side), to embedding, float32 (B, C) [B].

    5 convolutions 3x3 with stride 2 and 32, 64, 128, 256, 512 filters, each with BatchNorm and
    LeakyReLU; dense 512; a linear layer to the embedding. [choice]: padding of 1 px (a side of 128
    px ends at 4 x 4, where the published decoder begins), slope 0.2 of LeakyReLU, and BatchNorm and
    LeakyReLU after the dense layer.

    Raises
    ------
    ValueError
        ``side`` is not a multiple of 32.
    """

    FILTERS = (32, 64, 128, 256, 512)
    HIDDEN = 512

    def __init__(self, embedding_size: int = 128, side: int = 128) -> None:
        super().__init__()
        if side % 2 ** len(self.FILTERS):
            raise ValueError(
                f"a patch of {side} px cannot be encoded: the side must be a multiple of "
                f"{2 ** len(self.FILTERS)} px"
            )
        self.embedding_size = embedding_size
        self.side = side
        layers: list[nn.Module] = []
        for channels, filters in zip((3, *self.FILTERS), self.FILTERS, strict=False):
            layers += [
                nn.Conv2d(channels, filters, kernel_size=3, stride=2, padding=1),
                nn.BatchNorm2d(filters, eps=BN_EPSILON, momentum=BN_MOMENTUM),
                nn.LeakyReLU(SLOPE, inplace=True),
            ]
        self.convolutions = nn.Sequential(*layers)
        last = side // 2 ** len(self.FILTERS)
        self.hidden = nn.Sequential(
            nn.Linear(last * last * self.FILTERS[-1], self.HIDDEN),
            nn.BatchNorm1d(self.HIDDEN, eps=BN_EPSILON, momentum=BN_MOMENTUM),
            nn.LeakyReLU(SLOPE),
        )
        self.dense = nn.Linear(self.HIDDEN, embedding_size)
        initialise_as_keras(self)

    @property
    def pooling(self) -> int:
        """Pooling factor between the patch and the network's input: none."""
        return 1

    def features(self, pixels: Tensor) -> Tensor:
        """Return the input of the last linear layer, float32 (B, 512)."""
        features: Tensor = self.hidden(flatten_hwc(self.convolutions(pixels)))
        return features

    def forward(self, pixels: Tensor) -> Tensor:
        embeddings: Tensor = self.dense(self.features(pixels))
        return embeddings


class PatchEncoder(nn.Module):
    """uint8 (B, 3, P, P) to embedding, float32 (B, C): pooling, scaling to [-1, 1], network.

    The module contains every operation between stored pixels and the embedding, so an exported
    module is the complete encoder.

    Parameters
    ----------
    network
    embedding : str
        ``dense``: the code of the network's last layer. ``pooled``: mean and standard deviation
        over positions of the last feature maps (:func:`pooled_statistics`), float32 (B, 256) for
        :class:`TellezEncoder`. ``both``: the dense code, then the pooled numbers [choice].
    """

    def __init__(
        self, network: TellezEncoder | StridedEncoder, embedding: Embedding = "dense"
    ) -> None:
        super().__init__()
        self.network = network
        self.embedding = embedding

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = pool_patches(pixels, self.network.pooling).mul(2 / 255).sub_(1)
        if self.embedding == "dense":
            code: Tensor = self.network(pooled)
            return code
        maps = self.network.convolutions(pooled)
        texture = pooled_statistics(maps)
        if self.embedding == "pooled":
            return texture
        return torch.cat([self.network.dense(flatten_hwc(maps)), texture], 1)


class MeanRGB(nn.Module):
    """uint8 (B, 3, P, P) to the mean of each channel in [-1, 1], float32 (B, 3)."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.float().mean(dim=(2, 3)).mul_(2 / 255).sub_(1)


class ClassHead(nn.Module):
    """Embedding (B, C) to logits (B, classes): dense 256, BatchNorm, LeakyReLU, dense [B].

    The convolutions of the released encoders have LeakyReLU before BatchNorm [model]; the text on
    the head says "BN + LeakyReLU" [B].
    """

    HIDDEN = 256

    def __init__(self, embedding_size: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(embedding_size, self.HIDDEN),
            nn.BatchNorm1d(self.HIDDEN, eps=BN_EPSILON, momentum=BN_MOMENTUM),
            nn.LeakyReLU(SLOPE),
            nn.Linear(self.HIDDEN, classes),
        )
        initialise_as_keras(self)

    def forward(self, embeddings: Tensor) -> Tensor:
        logits: Tensor = self.layers(embeddings)
        return logits


def pooled_side(patch: int) -> int:
    """Return the side of the pooled patch, px.

    Raises
    ------
    ValueError
        ``patch`` is odd.
    """
    if patch % POOLING:
        raise ValueError(
            f"patch size {patch} px is odd; the encoder averages {POOLING} x {POOLING} px, so use "
            "an even size"
        )
    return patch // POOLING

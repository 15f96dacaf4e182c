"""Networks on grids of patch embeddings: two CNNs, and pooling by gated attention.

A :class:`FoldModel` is what one fold learns: it takes a raw crop of a grid and gives a
prediction in the target's own terms, so normalisation can neither be forgotten nor differ
between training and use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from nic_core.cohort import CohortError, NetworkName

PUBLISHED_STRIDES = (2, 2, 2, 2, 2, 2, 1, 1)
PUBLISHED_CROPS = (383, 446)  # cells a side that the eight layers bring to exactly 1 x 1
SMALL_COMPONENTS = 48
WAVELENGTHS = (8, 32, 128, 512)  # cells [choice]
Kind = Literal["regression", "classification", "survival"]


class PublishedGridCNN(nn.Module):
    """The grid CNN of paper B.

    Eight depthwise-separable 3 x 3 convolutions with 128 filters and valid padding, each with
    batch normalisation, LeakyReLU and feature-wise dropout of 0.2; stride 2 except in layers 7
    and 8, so 400 cells become 199, 99, 49, 24, 11, 5, 3, 1. Then dense 128 with batch
    normalisation and LeakyReLU, and the output. Slope 0.2 and no dropout after the dense layer
    are [choice].

    Input float (B, channels, side, side) with 0 for background and a side of 383 to 446;
    output float (B, outputs).
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        width = 128
        layers: list[nn.Module] = []
        for i, stride in enumerate(PUBLISHED_STRIDES):
            inputs = channels if i == 0 else width
            layers.append(
                nn.Sequential(
                    nn.Conv2d(inputs, inputs, 3, stride, groups=inputs, bias=False),
                    nn.Conv2d(inputs, width, 1),
                    nn.BatchNorm2d(width),
                    nn.LeakyReLU(0.2),
                    nn.Dropout2d(0.2),
                )
            )
        self.convolutions = nn.Sequential(*layers)
        self.dense = nn.Sequential(
            nn.Flatten(), nn.Linear(width, width), nn.BatchNorm1d(width), nn.LeakyReLU(0.2)
        )
        self.output = nn.Linear(width, outputs)

    def forward(self, grid: Tensor) -> Tensor:
        out: Tensor = self.output(self.dense(self.convolutions(grid)))
        return out


class SmallGridCNN(nn.Module):
    """A network for small grids and cohorts of some dozens [choice].

    Features are first centred by their mean over the crop's tissue, which takes out what is the
    same all over a slide: stain and scanner, and also its average composition. Three 3 x 3
    convolutions with batch normalisation and LeakyReLU then see a neighbourhood of 7 x 7 cells;
    the mean over tissue cells says how much of the slide looks like what each filter found; a
    linear output. No dropout: with so few filters it costs more than it saves. Meant for few
    input channels: see :class:`Normalise` with a projection.

    Input float (B, channels, rows, columns) with 0 for background; output float (B, outputs).
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        width = 16
        layers: list[nn.Module] = []
        for inputs in (channels, width, width):
            layers += [
                nn.Conv2d(inputs, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
        self.convolutions = nn.Sequential(*layers)
        self.output = nn.Linear(width, outputs)

    def forward(self, grid: Tensor) -> Tensor:
        tissue = occupied(grid)
        cells = tissue.sum((2, 3), keepdim=True).clamp(min=1)
        centred = (grid - grid.sum((2, 3), keepdim=True) / cells) * tissue
        maps = self.convolutions(centred) * tissue
        out: Tensor = self.output((maps.sum((2, 3), keepdim=True) / cells).flatten(1))
        return out


class GatedAttentionMIL(nn.Module):
    """Gated-attention pooling of a crop's cells (Ilse, Tomczak and Welling, ICML 2018).

    Each cell is embedded by itself (dense 64, ReLU, dropout 0.25 [choice]). The weight of a cell
    is the softmax over tissue cells of w . (tanh(V h) * sigmoid(U h)), with 32 units [choice];
    background has weight 0. The weighted mean of the embeddings gives the output. Where cells lie
    is unknown to it, so that it says what arrangement adds; with ``positions`` each cell also has
    sines and cosines of its row and column, counted from the middle of the crop's tissue
    [choice].

    Input float (B, channels, rows, columns) with 0 for background; output float (B, outputs).
    """

    def __init__(self, channels: int, outputs: int, *, positions: bool = False) -> None:
        super().__init__()
        width, units = 64, 32
        self.positions = positions
        inputs = channels + (4 * len(WAVELENGTHS) if positions else 0)
        self.embed = nn.Sequential(nn.Conv2d(inputs, width, 1), nn.ReLU(), nn.Dropout(0.25))
        self.content = nn.Conv2d(width, units, 1)
        self.gate = nn.Conv2d(width, units, 1)
        self.score = nn.Conv2d(units, 1, 1, bias=False)
        self.output = nn.Linear(width, outputs)

    def forward(self, grid: Tensor) -> Tensor:
        embedded, weights = self._attend(grid)
        out: Tensor = self.output((embedded * weights).sum((2, 3)))
        return out

    def attention(self, features: Tensor) -> Tensor:
        """Weight of each cell, float (B, rows, columns): 0 for background, sum 1 over a crop
        with tissue."""
        return self._attend(features)[1][:, 0]

    def _attend(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        tissue = occupied(grid)
        if self.positions:
            grid = torch.cat([grid, position_waves(tissue)], 1)
        embedded = self.embed(grid)
        score = self.score(torch.tanh(self.content(embedded)) * torch.sigmoid(self.gate(embedded)))
        # a crop without tissue has no weights: 0 rather than 0 / 0
        score = score - score.masked_fill(tissue == 0, -torch.inf).amax((2, 3), keepdim=True).clamp(
            min=torch.finfo(score.dtype).min
        )
        weights = torch.exp(score.clamp(max=0)) * tissue
        return embedded, weights / weights.sum((2, 3), keepdim=True).clamp(min=1e-12)


def position_waves(tissue: Tensor) -> Tensor:
    """Where each cell lies, (B, 1, rows, columns) to (B, 4 * waves, rows, columns), 0 for
    background.

    Sines and cosines of row and column at :data:`WAVELENGTHS`, from the tissue's mean position.
    """
    waves = []
    cells = tissue.sum((2, 3), keepdim=True).clamp(min=1)
    for axis in (2, 3):
        at = torch.arange(tissue.shape[axis], dtype=tissue.dtype, device=tissue.device)
        at = at[:, None] if axis == 2 else at
        at = at - (tissue * at).sum((2, 3), keepdim=True) / cells
        for length in WAVELENGTHS:
            angle = at * (2 * torch.pi / length)
            waves += [torch.sin(angle) * tissue, torch.cos(angle) * tissue]
    return torch.cat(waves, 1)


class Normalise(nn.Module):
    """Embeddings to network features; background stays 0 (B: normalisation comes before filling).

    ``weight`` (C,) scales each centred embedding, ``weight`` (k, C) projects them.
    """

    mean: Tensor
    weight: Tensor

    def __init__(self, mean: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("weight", weight)

    @property
    def channels(self) -> int:
        """Number of features that come out."""
        return self.weight.shape[0]

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings float (B, C, H, W), 0 in all C where background, to features (B, k, H, W)."""
        centred = embeddings - self.mean[:, None, None]
        if self.weight.ndim == 1:
            features = centred * self.weight[:, None, None]
        else:
            features = torch.einsum("kc,bchw->bkhw", self.weight, centred)
        return features * occupied(embeddings)


class FoldModel(nn.Module):
    """Normalisation, network and output scale of one fold.

    ``forward`` maps raw crops float (B, C, side, side) to predictions float (B, outputs):
    values in the target's unit (regression), class probabilities (classification), or a risk
    of which a higher value means an earlier event (survival).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, normalise: Normalise, network: nn.Module, kind: Kind) -> None:
        super().__init__()
        self.normalise = normalise
        self.network = network
        self.kind = kind
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @property
    def device(self) -> torch.device:
        """Where it works."""
        return self.shift.device

    def predict(self, features: Tensor) -> Tensor:
        """Predictions from features that are already normalised."""
        return self.finish(self.network(features))

    def finish(self, raw: Tensor) -> Tensor:
        """Network outputs as predictions."""
        if self.kind == "classification":
            return raw.softmax(1)
        return raw * self.scale + self.shift

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.predict(self.normalise(embeddings))


class Ensemble(nn.Module):
    """Mean of the folds' predictions: raw crops float (B, C, side, side) to (B, outputs)."""

    def __init__(self, models: Sequence[FoldModel]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, embeddings: Tensor) -> Tensor:
        return torch.stack([model(embeddings) for model in self.models]).mean(0)


def occupied(grid: Tensor) -> Tensor:
    """1 where a cell (B, C, H, W) has any nonzero number, else 0; float (B, 1, H, W)."""
    return (grid != 0).any(1, keepdim=True).to(grid.dtype)


def build_network(
    name: NetworkName, channels: int, outputs: int, *, positions: bool = False
) -> nn.Module:
    """The network of that name for features of so many channels."""
    if name == "published":
        return PublishedGridCNN(channels, outputs)
    if name == "mil":
        return GatedAttentionMIL(channels, outputs, positions=positions)
    return SmallGridCNN(channels, outputs)


def component_count(name: NetworkName) -> int | None:
    """Principal components of the embeddings that a network is given [choice]; None: all embeddings."""
    return None if name == "published" else SMALL_COMPONENTS


def check_crop(name: NetworkName, crop: int) -> None:
    """Raise ``CohortError`` if the network cannot take crops of that many cells a side."""
    low, high = PUBLISHED_CROPS
    if name == "published" and not low <= crop <= high:
        raise CohortError(
            f"settings.models: network 'published' takes crops of {low} to {high} cells a side, "
            f"not {crop}; use network 'small' or 'mil' for small grids"
        )

"""Networks on grids of embeddings: the grid CNN of paper B, small CNNs, attention pooling.

:class:`PublishedGridCNN` is the network of paper B. :class:`SmallGridCNN` and
:class:`GatedAttentionMIL` are for small grids and cohorts [choice]; their output is a mean over
cells (:class:`HasCellOutputs`). :class:`FoldModel` is what one fold of the cross-validation trains:
it contains the normalisation of embeddings, so training and prediction always use the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nic_core.cohort import CohortError, ModelSettings, NetworkName
from nic_core.models.kinds import TargetKind

PUBLISHED_STRIDES = (2, 2, 2, 2, 2, 2, 1, 1)
PUBLISHED_CROPS = (383, 446)  # sides, in cells, that the eight layers reduce to exactly 1 x 1
SMALL_COMPONENTS = 48
SMALL_KERNELS = (3, 3, 3)  # a receptive field of 7 x 7 cells
LOCAL_KERNELS = (3, 1, 1)  # 3 x 3 cells
WAVELENGTHS = (8, 32, 128, 512)  # cells [choice]


@runtime_checkable
class HasCellOutputs(Protocol):
    """A network whose output is the mean of outputs of its cells."""

    def cell_outputs(self, grid: Tensor) -> Tensor:
        """Return the outputs of each cell, float (B, outputs, rows, columns).

        ``grid`` is float (B, k, rows, columns), 0 in background, where the outputs are 0. The mean
        over the tissue cells of a crop is the network's output for it.
        """


class PublishedGridCNN(nn.Module):
    """The grid CNN of paper B.

    Eight depthwise-separable 3 x 3 convolutions with 128 filters and valid padding, each followed
    by batch normalisation, LeakyReLU and feature-wise dropout of 0.2. The stride is 2 except in
    layers 7 and 8, so 400 cells become 199, 99, 49, 24, 11, 5, 3, 1. Then a dense layer of 128
    units with batch normalisation and LeakyReLU, and the output. The LeakyReLU slope of 0.2 and
    no dropout after the dense layer are [choice].

    Input: float (B, channels, side, side), 0 in background, side 383 to 446 cells. Output: float
    (B, outputs).
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
    """A CNN for small grids and cohorts of a few dozen slides [choice].

    Features are first centred by their mean over the crop's tissue. This removes what is constant
    over a slide: stain and scanner, but also the slide's average composition. Three convolutions
    with batch normalisation and LeakyReLU follow; then the mean of each filter's map over tissue
    cells, and a linear output. There is no dropout: with so few filters it lowers the accuracy more
    than it prevents overfitting. The network is meant for few input channels; see
    :class:`Normalise` with a projection.

    Input: float (B, channels, rows, columns), 0 in background. Output: float (B, outputs).

    Parameters
    ----------
    channels, outputs
        Numbers of input features and of outputs.
    kernels
        Sides of the three convolutions, odd numbers of cells. They decide how many cells around a
        cell its outputs depend on, besides the mean of the slide.
    """

    def __init__(
        self, channels: int, outputs: int, *, kernels: tuple[int, int, int] = SMALL_KERNELS
    ) -> None:
        super().__init__()
        width = 16
        layers: list[nn.Module] = []
        for inputs, side in zip((channels, width, width), kernels, strict=True):
            layers += [
                nn.Conv2d(inputs, width, side, padding=side // 2, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
        self.convolutions = nn.Sequential(*layers)
        self.output = nn.Linear(width, outputs)

    def forward(self, grid: Tensor) -> Tensor:
        maps = self._maps(grid)
        # the mean comes first: one linear layer a crop instead of one a cell
        mean = maps.sum((2, 3)) / occupied(grid).sum((2, 3)).clamp(min=1)
        out: Tensor = self.output(mean)
        return out

    def cell_outputs(self, grid: Tensor) -> Tensor:
        """See :class:`HasCellOutputs`: the linear layer, applied to the maps of each cell."""
        each: Tensor = self.output(self._maps(grid).movedim(1, -1)).movedim(-1, 1)
        return each * occupied(grid)

    def _maps(self, grid: Tensor) -> Tensor:
        tissue = occupied(grid)
        cells = tissue.sum((2, 3), keepdim=True).clamp(min=1)
        centred = (grid - grid.sum((2, 3), keepdim=True) / cells) * tissue
        maps: Tensor = self.convolutions(centred) * tissue
        return maps


class GatedAttentionMIL(nn.Module):
    """Gated-attention pooling of a crop's cells (Ilse, Tomczak and Welling, ICML 2018).

    Each cell is mapped to a hidden vector h by itself (dense 64, ReLU, dropout 0.25 [choice]).
    Its weight is the softmax over tissue cells of w . (tanh(V h) * sigmoid(U h)), with 32 units
    [choice]; background has weight 0. The output is linear in the weighted mean of h. The
    network does not use the positions of cells, so a comparison with a CNN shows what the
    arrangement adds. With ``positions``, each cell also gets sines and cosines of its row and
    column, relative to the centre of the crop's tissue [choice].

    Input: float (B, channels, rows, columns), 0 in background. Output: float (B, outputs).
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
        hidden, weights = self._attend(grid)
        out: Tensor = self.output((hidden * weights).sum((2, 3)))
        return out

    def attention(self, features: Tensor) -> Tensor:
        """Return the weight of each cell, float (B, rows, columns).

        Background has weight 0; the weights of a crop with tissue sum to 1.
        """
        return self._attend(features)[1][:, 0]

    def cell_outputs(self, grid: Tensor) -> Tensor:
        """See :class:`HasCellOutputs`: attention, relative to its mean, times the output of h."""
        hidden, weights = self._attend(grid)
        each: Tensor = self.output(hidden.movedim(1, -1)).movedim(-1, 1)
        return each * weights * occupied(grid).sum((2, 3), keepdim=True)

    def _attend(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        tissue = occupied(grid)
        if self.positions:
            grid = torch.cat([grid, position_waves(tissue)], 1)
        hidden = self.embed(grid)
        score = self.score(torch.tanh(self.content(hidden)) * torch.sigmoid(self.gate(hidden)))
        # a crop without tissue has a maximum of -inf: the clamp gives weights of 0 instead of NaN
        score = score - score.masked_fill(tissue == 0, -torch.inf).amax((2, 3), keepdim=True).clamp(
            min=torch.finfo(score.dtype).min
        )
        weights = torch.exp(score.clamp(max=0)) * tissue
        return hidden, weights / weights.sum((2, 3), keepdim=True).clamp(min=1e-12)


def position_waves(tissue: Tensor) -> Tensor:
    """Return sines and cosines of the row and column of each cell.

    The wavelengths are :data:`WAVELENGTHS`; positions are relative to the tissue's mean position.

    Parameters
    ----------
    tissue : float (B, 1, rows, columns)
        1 in tissue, 0 in background.

    Returns
    -------
    float (B, 4 * wavelengths, rows, columns), 0 in background
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
    """Linear map from embeddings to features; background stays 0.

    Paper B requires that features are normalised before background is filled with 0.

    Parameters
    ----------
    mean : float (C,)
        Subtracted from each embedding.
    weight : float (C,) or (k, C)
        (C,) scales each number of the centred embedding; (k, C) projects it to k features.
    """

    mean: Tensor
    weight: Tensor

    def __init__(self, mean: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("weight", weight)

    @property
    def channels(self) -> int:
        """Number of features."""
        return self.weight.shape[0]

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map embeddings float (B, C, H, W), 0 in all C in background, to features (B, k, H, W)."""
        centred = embeddings - self.mean[:, None, None]
        if self.weight.ndim == 1:
            features = centred * self.weight[:, None, None]
        else:
            features = torch.einsum("kc,bchw->bkhw", self.weight, centred)
        return features * occupied(embeddings)


class FoldModel(nn.Module):
    """Normalisation, network and scale of predictions of one fold.

    ``forward`` maps crops of embeddings float (B, C, side, side) to predictions float
    (B, outputs): values in the target's unit (regression), class probabilities (classification),
    or a risk (survival; higher means an earlier event).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, normalise: Normalise, network: nn.Module, kind: TargetKind) -> None:
        super().__init__()
        self.normalise = normalise
        self.network = network
        self.kind = kind
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.shift.device

    def predict(self, features: Tensor) -> Tensor:
        """Return predictions for features that are already normalised."""
        return self.activate(self.network(features))

    def activate(self, outputs: Tensor) -> Tensor:
        """Convert network outputs to predictions; see :meth:`TargetKind.activate`."""
        return self.kind.activate(outputs, self.shift, self.scale)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.predict(self.normalise(embeddings))


class Ensemble(nn.Module):
    """Mean prediction of the folds: crops of embeddings (B, C, side, side) to (B, outputs)."""

    def __init__(self, models: Sequence[FoldModel]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, embeddings: Tensor) -> Tensor:
        return torch.stack([model(embeddings) for model in self.models]).mean(0)


def occupied(grid: Tensor) -> Tensor:
    """Return 1 where a cell of (B, C, H, W) has a nonzero number, else 0; float (B, 1, H, W)."""
    return (grid != 0).any(1, keepdim=True).to(grid.dtype)


def build_network(
    name: NetworkName, channels: int, outputs: int, *, positions: bool = False
) -> nn.Module:
    """Return a new network with random weights.

    Parameters
    ----------
    name
        Value of ``settings.models.network``.
    channels
        Number of input features (:attr:`Normalise.channels`).
    outputs
        Number of outputs (:attr:`TargetKind.outputs`).
    positions
        For network ``mil``: use the positions of cells.
    """
    if name == "published":
        return PublishedGridCNN(channels, outputs)
    if name == "mil":
        return GatedAttentionMIL(channels, outputs, positions=positions)
    kernels = LOCAL_KERNELS if name == "local" else SMALL_KERNELS
    return SmallGridCNN(channels, outputs, kernels=kernels)


def component_count(name: NetworkName) -> int | None:
    """Return how many principal components a network gets [choice]; None: no projection."""
    return None if name == "published" else SMALL_COMPONENTS


def empty_fold_model(
    name: NetworkName, kind: TargetKind, *, embedding_size: int, positions: bool
) -> FoldModel:
    """Return a model of the shapes that a training gives, to load its tensors into."""
    components = component_count(name)
    shape = (
        (embedding_size,)
        if components is None
        else (min(components, embedding_size), embedding_size)
    )
    normalise = Normalise(torch.zeros(embedding_size), torch.zeros(shape))
    network = build_network(name, normalise.channels, kind.outputs, positions=positions)
    return FoldModel(normalise, network, kind)


def check_crop(name: NetworkName, crop: int) -> None:
    """Raise ``CohortError`` if a network cannot process crops of ``crop`` x ``crop`` cells."""
    low, high = PUBLISHED_CROPS
    if name == "published" and not low <= crop <= high:
        raise CohortError(
            f"network 'published' takes crops of {low} to {high} cells a side, not {crop}; use "
            "network 'small', 'local' or 'mil', which take crops of any size"
        )


def crop_cells(settings: ModelSettings, cell_um: float) -> int:
    """Return the side of a crop in cells: ``settings.crop_um``, rounded to whole cells.

    So the crops of encoders with other cells show the same field of view, up to half a cell.

    Parameters
    ----------
    settings
        Network and side of a crop.
    cell_um
        Side of a cell, um (:attr:`nic_core.grids.GridProvenance.cell_um`).

    Raises
    ------
    CohortError
        The crop is smaller than a cell, or the network cannot process that many cells.
    """
    crop = round(settings.crop_um / cell_um)
    if crop < 1:
        raise CohortError(
            f"crop_um {settings.crop_um:g} is less than half a cell of {cell_um:g} um; set crop_um "
            f"to {cell_um:g} or more"
        )
    try:
        check_crop(settings.network, crop)
    except CohortError as error:
        low, high = (cells * cell_um for cells in PUBLISHED_CROPS)
        raise CohortError(
            f"crop_um {settings.crop_um:g} is {crop} cells of {cell_um:g} um: "
            f"{error}, or set crop_um to a value from {low:g} to {high:g}"
        ) from error
    return crop

"""Explanations: Grad-CAM heatmaps of grid CNNs (paper B), attention weights of attention networks.

Grad-CAM as in paper B: the gradients of the output with respect to the maps of the first
convolution, their spatial means as weights, and the weighted sum of the maps. The sign is kept: a
positive value increases the output, a negative one decreases it. Not published, and [choice]:

- the maps are the output of the (separable) convolution, before batch normalisation;
- the output is the value (regression), the risk (survival), or the log-odds of a class against
  all others (classification); for two classes this is the single output unit of paper B;
- a map's value is assigned to the centre cell of its 3 x 3 receptive field; cells between the
  centres of a strided convolution are interpolated;
- heatmaps are averaged over the 8 orientations, as predictions are, and over crops half a crop
  apart where a grid is larger than the network's crop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nic_core.cohort import Target
from nic_core.models.crops import Crops, GridData, crop_windows
from nic_core.models.kinds import kind_of
from nic_core.models.networks import FoldModel, occupied
from nic_core.orientations import ORIENTATIONS, undo


@runtime_checkable
class HasAttention(Protocol):
    """A network that computes a weight for each cell."""

    def attention(self, features: Tensor) -> Tensor:
        """Return the weights of cells, float (B, rows, columns): 0 in background, sum 1.

        ``features`` is float (B, k, rows, columns), 0 in background.
        """


def explain(
    networks: Sequence[FoldModel],
    grid: GridData,
    target: Target,
    *,
    crop: int,
    label: str | None = None,
) -> NDArray[np.float32]:
    """Compute the heatmap of a grid, averaged over networks.

    Networks with attention (:class:`HasAttention`) give their weights, divided by the mean weight
    over the crop's tissue: they say how much a cell contributes, not in which direction. All other
    networks give Grad-CAM.

    Parameters
    ----------
    networks
        Networks of one target that were not trained on this patient; see
        :func:`held_out_networks`.
    grid
        Grid of one slide.
    crop
        Side of the crops that the networks were trained on, in cells.
    label
        Class to explain; None: the last one. For classification only.

    Returns
    -------
    float32 (rows, columns)
        NaN where the grid has no embedding.

    Raises
    ------
    ValueError
        The target has no class ``label``, or the grid has no tissue.
    """
    output = kind_of(target).explained_output(label)
    valid = np.asarray(grid.valid)
    if not valid.any():
        raise ValueError("the grid has no tissue cell, so there is nothing to explain")
    total, count = np.zeros(valid.shape), np.zeros(valid.shape)
    for model in networks:
        model.eval()
        crops = Crops(lambda _: grid, model.normalise, crop)
        for centre in _centres(valid, crop):
            in_grid, in_crop = crop_windows(valid.shape, centre, crop)
            for k in range(ORIENTATIONS):
                features = torch.from_numpy(crops.crop_at("", centre, k))[None]
                heat, covered = _heat(model, features, output)
                total[in_grid] += undo(np.where(covered, heat, 0), k)[in_crop]
                count[in_grid] += undo(covered, k)[in_crop]
    return np.where(valid & (count > 0), total / np.maximum(count, 1), np.nan).astype(np.float32)


def is_directed(networks: Sequence[FoldModel]) -> bool:
    """Return whether the heat of :func:`explain` has a sign: not the attention of networks."""
    return not all(isinstance(model.network, HasAttention) for model in networks)


def heat_meaning(target: Target, *, directed: bool, label: str | None = None) -> str:
    """Return what heat means, in a sentence.

    Parameters
    ----------
    directed
        Whether it has a sign (:func:`is_directed`); positive heat is drawn in red.
    label
        As in :func:`explain`.
    """
    if not directed:
        return (
            "Attention: the weight of a cell in the prediction, in either direction; 1 is the mean "
            "of the slide."
        )
    towards = kind_of(target).explained_name(label)
    return f"Red cells speak for {towards}, blue cells against it."


def heat_caption(networks: Sequence[FoldModel], target: Target, *, label: str | None = None) -> str:
    """Return the target and what its heat means, for a picture."""
    meaning = heat_meaning(target, directed=is_directed(networks), label=label)
    return f"{target.name}. {meaning}"


def held_out_networks(networks: Sequence[FoldModel], fold: int | None) -> Sequence[FoldModel]:
    """Return the networks that were trained without a patient.

    Parameters
    ----------
    networks
        One per fold.
    fold
        Fold in which the patient was held out; None for split ``test`` and new slides.

    Returns
    -------
    All networks if ``fold`` is None, else the network of that fold only. The network of the fold
    before it was not trained on the patient either, but its epoch was chosen with the patient's
    label.
    """
    return networks if fold is None else networks[fold : fold + 1]


def grad_cam(
    network: nn.Module, features: Tensor, output: Callable[[Tensor], Tensor]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Compute Grad-CAM of one crop, interpolated to cells.

    Parameters
    ----------
    network
        In evaluation mode. Its first ``Conv2d`` defines the geometry of the maps; its first
        ``BatchNorm2d`` receives the maps.
    features : float (1, k, side, side)
    output
        Function from the network's outputs (1, outputs) to the number to explain.

    Returns
    -------
    float32 (side, side), bool (side, side)
        The heatmap, and the cells that are within a receptive field of the maps.
    """
    convolution = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    normalisation = next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    captured: list[Tensor] = []

    def capture(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        # a leaf tensor: no gradient is needed before the maps
        captured.append(inputs[0].detach().requires_grad_())
        return captured[-1]

    handle = normalisation.register_forward_pre_hook(capture)
    try:
        with torch.enable_grad():
            value = output(network(features)).sum()
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(value, captured[0])
    weights = gradient.mean((2, 3), keepdim=True)
    maps = (weights * captured[0]).sum(1)[0].detach().double().numpy()
    (down, covered_rows), (across, covered_columns) = (
        _interpolation(features.shape[2 + axis], maps.shape[axis], convolution, axis)
        for axis in (0, 1)
    )
    heat = down @ maps @ across.T
    return heat.astype(np.float32), covered_rows[:, None] & covered_columns


def _interpolation(
    cells: int, positions: int, convolution: nn.Conv2d, axis: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return how a map's positions are interpolated to cells along an axis.

    Returns
    -------
    float64 (cells, positions), bool (cells,)
        Weight of each position in each cell; the cells within a receptive field.
    """
    side, stride = convolution.kernel_size[axis], convolution.stride[axis]
    padding = convolution.padding[axis]
    assert isinstance(padding, int)  # none of our networks uses "same" or "valid"
    start = np.arange(positions) * stride - padding
    at = np.arange(cells)
    centres = start + (side - 1) / 2
    weights = np.stack([np.interp(at, centres, row) for row in np.eye(positions)], axis=1)
    return weights, (at >= start[0]) & (at < start[-1] + side)


def _heat(
    model: FoldModel, features: Tensor, output: Callable[[Tensor, Tensor], Tensor]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the heatmap of one crop by attention or Grad-CAM, and the cells that it covers."""
    if isinstance(model.network, HasAttention):
        with torch.no_grad():
            heat = model.network.attention(features)[0] * occupied(features).sum()
        return heat.float().numpy(), np.ones(heat.shape, np.bool_)
    return grad_cam(model.network, features, lambda raw: output(raw, model.activate(raw)))


def _centres(valid: NDArray[np.bool_], crop: int) -> Iterator[tuple[int, int]]:
    """Yield the centres of crops that together cover the grid; crops without tissue are omitted."""
    down, across = (_starts(length, crop) for length in valid.shape)
    for top in down:
        for left in across:
            low = max(top, 0), max(left, 0)
            if valid[low[0] : top + crop, low[1] : left + crop].any():
                yield top + crop // 2, left + crop // 2


def _starts(length: int, crop: int) -> list[int]:
    """Return the first cells of crops along an axis, at most half a crop apart.

    No crop extends beyond the grid, unless the grid is shorter than the crop: then it is centred
    in one crop.
    """
    if length <= crop:
        return [-((crop - length) // 2)]
    count = 1 + -(-(length - crop) // max(1, crop // 2))
    return [int(start) for start in np.linspace(0, length - crop, count).round()]

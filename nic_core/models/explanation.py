"""What in a grid speaks for a prediction: Grad-CAM of the grid CNNs, attention of others.

Grad-CAM as in paper B: gradients of the output with respect to the first
convolution's maps, their spatial means as weights, weighted sum of the maps. The sign is kept: a
high value speaks for a higher output, a low one for a lower. What B leaves open [choice]:

- the maps are what the (separable) convolution itself gives, before batch normalisation;
- the output is the value (regression), the risk (survival), or the log-odds of a class against
  all others (classification); for two classes that is the one output unit of B;
- a map's value belongs to the cell at the centre of its 3 x 3 receptive field; cells between the
  centres of a strided convolution are interpolated;
- the 8 orientations are averaged, as for predictions; so are, where a grid is larger than the
  network's crop, crops half a crop apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nic_core.cohort import Target
from nic_core.grids.orientations import ORIENTATIONS, undo
from nic_core.models.crops import Crops, GridLike, windows
from nic_core.models.networks import FoldModel, occupied


@runtime_checkable
class Attentive(Protocol):
    """A network that says itself how much it looks at each cell."""

    def attention(self, features: Tensor) -> Tensor:
        """Features float (B, k, rows, columns), 0 for background, to weights of the cells,
        float (B, rows, columns): 0 for background, sum 1."""


def explain(
    networks: Sequence[FoldModel],
    grid: GridLike,
    target: Target,
    *,
    crop: int,
    label: str | None = None,
) -> NDArray[np.float32]:
    """Heat of every cell, the mean over networks.

    Networks with attention (:class:`Attentive`) give it in multiples of its mean over the crop's
    tissue: how much a cell counts, not in which direction. All others give Grad-CAM.

    Parameters
    ----------
    networks
        Of one target, trained without this patient: see :func:`held_out_networks`.
    crop
        Cells a side of the crops that they were trained on.
    label
        Class to explain; default: the last one.

    Returns
    -------
    float32 (rows, columns)
        NaN where the grid has no embedding.

    Raises
    ------
    ValueError
        The target has no class ``label``, or the grid no tissue.
    """
    output = _output(target, label)
    valid = np.asarray(grid.valid)
    if not valid.any():
        raise ValueError("the grid has no tissue cell: there is nothing to explain")
    total, count = np.zeros(valid.shape), np.zeros(valid.shape)
    for model in networks:
        model.eval()
        crops = Crops(lambda _: grid, model.normalise, crop)
        for centre in _centres(valid, crop):
            inner, outer = windows(valid.shape, centre, crop)
            for k in range(ORIENTATIONS):
                features = torch.from_numpy(crops.at("", centre, k))[None]
                heat, covered = _heat(model, features, output)
                total[inner] += undo(np.where(covered, heat, 0), k)[outer]
                count[inner] += undo(covered, k)[outer]
    return np.where(valid & (count > 0), total / np.maximum(count, 1), np.nan).astype(np.float32)


def held_out_networks(networks: Sequence[FoldModel], fold: int | None) -> Sequence[FoldModel]:
    """The networks that have not seen a patient.

    Parameters
    ----------
    networks
        One a fold.
    fold
        In which the patient was held out; None (split ``test``, or a new slide): all of them.

    Returns
    -------
    Of a patient in cross-validation the network of that fold alone: the one before it did not
    train on the patient, but chose its epoch by it.
    """
    return networks if fold is None else networks[fold : fold + 1]


def grad_cam(
    network: nn.Module, features: Tensor, output: Callable[[Tensor], Tensor]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Grad-CAM of one crop, in cells.

    Parameters
    ----------
    network
        In evaluation mode; its first ``Conv2d`` says where the maps lie, its first
        ``BatchNorm2d`` is given them.
    features : float (1, k, side, side)
    output
        The number to explain, of what the network returns.

    Returns
    -------
    float32 (side, side), bool (side, side)
        The heat, and the cells that some place of the maps sees.
    """
    convolution = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    normalisation = next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    seen: list[Tensor] = []

    def catch(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        # a leaf: whatever comes before needs no gradient
        seen.append(inputs[0].detach().requires_grad_())
        return seen[-1]

    handle = normalisation.register_forward_pre_hook(catch)
    try:
        with torch.enable_grad():
            value = output(network(features)).sum()
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(value, seen[0])
    weights = gradient.mean((2, 3), keepdim=True)
    maps = (weights * seen[0]).sum(1)[0].detach().double().numpy()
    places = [
        _placement(features.shape[2 + axis], maps.shape[axis], convolution, axis) for axis in (0, 1)
    ]
    heat = places[0][0] @ maps @ places[1][0].T
    return heat.astype(np.float32), places[0][1][:, None] & places[1][1]


def _placement(
    cells: int, positions: int, convolution: nn.Conv2d, axis: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Weights (cells, positions) of a map's positions in each cell along an axis, and the cells
    within a receptive field."""
    side, stride = convolution.kernel_size[axis], convolution.stride[axis]
    padding = convolution.padding[axis]
    assert isinstance(padding, int)  # none of our networks pads by name
    start = np.arange(positions) * stride - padding
    at = np.arange(cells)
    centres = start + (side - 1) / 2
    weights = np.stack([np.interp(at, centres, row) for row in np.eye(positions)], axis=1)
    return weights, (at >= start[0]) & (at < start[-1] + side)


def _heat(
    model: FoldModel, features: Tensor, output: Callable[[FoldModel, Tensor], Tensor]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    if isinstance(model.network, Attentive):
        with torch.no_grad():
            heat = model.network.attention(features)[0] * occupied(features).sum()
        return heat.float().numpy(), np.ones(heat.shape, np.bool_)
    return grad_cam(model.network, features, lambda raw: output(model, raw))


def _output(target: Target, label: str | None) -> Callable[[FoldModel, Tensor], Tensor]:
    """The number that is explained, of a model and its network's output (B, outputs)."""
    if target.kind != "classification":
        if label is not None:
            raise ValueError(f"target '{target.name}' ({target.kind}) has no class '{label}'")
        return lambda model, raw: model.finish(raw)[:, 0]
    if label is not None and label not in target.classes:
        raise ValueError(
            f"target '{target.name}' has no class '{label}'; it has {', '.join(target.classes)}"
        )
    index = len(target.classes) - 1 if label is None else target.classes.index(label)
    others = [i for i in range(len(target.classes)) if i != index]
    return lambda model, raw: raw[:, index] - raw[:, others].logsumexp(1)


def _centres(valid: NDArray[np.bool_], crop: int) -> Iterator[tuple[int, int]]:
    """Centres of crops that together cover the grid, those with tissue alone."""
    down, across = (_starts(length, crop) for length in valid.shape)
    for top in down:
        for left in across:
            low = max(top, 0), max(left, 0)
            if valid[low[0] : top + crop, low[1] : left + crop].any():
                yield top + crop // 2, left + crop // 2


def _starts(length: int, crop: int) -> list[int]:
    """First cells of crops along an axis, half a crop apart or less; one that is cut by no edge
    of the grid, or that has the whole of it in its middle."""
    if length <= crop:
        return [-((crop - length) // 2)]
    count = 1 + -(-(length - crop) // max(1, crop // 2))
    return [int(start) for start in np.linspace(0, length - crop, count).round()]

"""Explanations: the value of each cell for the output of a network on grids.

The mean of the values over a slide's tissue is the network's output for the slide, as far as one
crop covers it. High values increase the output, low values decrease it. Not published, all of this
is [choice]; the Grad-CAM of paper B was replaced, because it found most planted causes of the demo
cohort no better than chance (docs/explanation/heatmaps.md).

- Networks whose output is a mean over cells (:class:`~nic_core.models.networks.HasCellOutputs`):
  the outputs of the cells, which is exact. For a CNN with mean pooling this is the class activation
  map (Zhou et al., CVPR 2016); for attention pooling it is attention times the output of the cell.
- Other networks: integrated gradients (Sundararajan et al., ICML 2017) from the features 0, the
  mean embedding of the training cohort, times the number of tissue cells, plus the output for a
  grid of mean embeddings.
- The output is the value minus the mean of the training labels (regression), the risk (survival),
  or the log-odds of a class (of more than two: its output minus the mean of the others).
- Values are means over the 8 orientations, as predictions are, and over crops half a crop apart
  where a grid is larger than the network's crop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nic_core.cohort import Target
from nic_core.models.crops import Crops, GridData, crop_windows
from nic_core.models.kinds import kind_of
from nic_core.models.kinds.base import ExplainedOutput
from nic_core.models.networks import FoldModel, HasCellOutputs, occupied
from nic_core.models.training import fitting_threads
from nic_core.orientations import ORIENTATIONS, undo

STEPS = 8  # of integrated gradients; the sum over cells is then off by about 1 % [choice]


def explain(
    networks: Sequence[FoldModel],
    grid: GridData,
    target: Target,
    *,
    crop: int,
    label: str | None = None,
) -> NDArray[np.float32]:
    """Compute the heatmap of a grid, averaged over networks.

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
        In units of the explained output; NaN where the grid has no embedding.

    Raises
    ------
    ValueError
        The target has no class ``label``, or the grid has no tissue.
    """
    output = kind_of(target).explained_output(label)
    return mean_over_views(
        networks, grid, lambda model, features: cell_values(model, features, output), crop=crop
    )


def mean_over_views(
    networks: Sequence[FoldModel],
    grid: GridData,
    values: Callable[[FoldModel, Tensor], Tensor],
    *,
    crop: int,
    orientations: Sequence[int] = range(ORIENTATIONS),
) -> NDArray[np.float32]:
    """Average values of cells over networks, crops that cover the grid, and orientations.

    Parameters
    ----------
    values
        Function from a network and a crop of features float (1, k, crop, crop), 0 in background,
        to the values of its cells, float (crop, crop).
    networks, grid, crop
        See :func:`explain`.
    orientations
        Orientations of the crops.

    Returns
    -------
    float32 (rows, columns)
        NaN where the grid has no embedding.

    Raises
    ------
    ValueError
        The grid has no tissue.
    """
    valid = np.asarray(grid.valid)
    if not valid.any():
        raise ValueError("the grid has no tissue cell, so there is nothing to explain")
    total, count = np.zeros(valid.shape), np.zeros(valid.shape)
    with fitting_threads(crop):
        for model in networks:
            model.eval()
            crops = Crops(lambda _: grid, model.normalise, crop)
            for centre in _centres(valid, crop):
                in_grid, in_crop = crop_windows(valid.shape, centre, crop)
                for k in orientations:
                    features = torch.from_numpy(crops.crop_at("", centre, k))[None]
                    heat = values(model, features).numpy()
                    total[in_grid] += undo(heat, k)[in_crop]
                    count[in_grid] += 1
    return np.where(valid, total / np.maximum(count, 1), np.nan).astype(np.float32)


def heat_meaning(target: Target, *, label: str | None = None) -> str:
    """Return what heat means, in a sentence.

    Parameters
    ----------
    label
        As in :func:`explain`.
    """
    towards = kind_of(target).explained_name(label)
    return (
        f"Red cells speak for {towards}, blue cells against it; their mean is the network's output."
    )


def heat_caption(target: Target, *, label: str | None = None) -> str:
    """Return the target and what its heat means, for a picture."""
    return f"{target.name}. {heat_meaning(target, label=label)}"


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


def cell_values(model: FoldModel, features: Tensor, output: ExplainedOutput) -> Tensor:
    """Return the value of each cell of one crop, in one orientation.

    Parameters
    ----------
    features : float (1, k, side, side)
        Normalised embeddings, 0 in background.
    output
        What is explained: :meth:`TargetKind.explained_output`.

    Returns
    -------
    float (side, side)
    """

    def explained(outputs: Tensor) -> Tensor:
        return output(outputs, model.shift, model.scale)

    if isinstance(model.network, HasCellOutputs):
        with torch.no_grad():
            each = model.network.cell_outputs(features)[0]
        return explained(each.flatten(1).T).reshape(each.shape[1:])
    # imports pyplot, which only this network needs
    from captum.attr import IntegratedGradients

    attributions = IntegratedGradients(lambda grid: explained(model.network(grid))).attribute(
        features, n_steps=STEPS, method="gausslegendre", internal_batch_size=1
    )
    with torch.no_grad():
        average = explained(model.network(torch.zeros_like(features)))
    found: Tensor = attributions.sum(1)[0] * occupied(features).sum() + average
    return found.detach()


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

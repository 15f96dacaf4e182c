"""Training of one fold's network (paper B): optimiser, learning rate, loss, kept epoch.

Also test-time prediction: the mean over crops in 8 orientations (paper B).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from nic_core.cohort import ModelSettings, Target
from nic_core.devices import resolve_device
from nic_core.models.crops import (
    SMALL_CROP,
    Crops,
    GridSource,
    View,
    augment_features,
)
from nic_core.models.kinds import kind_of, primary_value
from nic_core.models.networks import (
    FoldModel,
    HasCellOutputs,
    Normalise,
    build_network,
    check_crop,
    occupied,
)
from nic_core.orientations import ORIENTATIONS

if TYPE_CHECKING:
    from nic_core.tracker import Tracker

L2 = 1e-5  # paper B: penalty L2 * sum of squares of kernels
CELL_PENALTY = 0.1  # of network local: on the mean absolute output of cells [choice]
LOWEST_RATE = 1e-5  # paper B
WARM_UP = 0.3  # fraction of epochs in which the one-cycle learning rate rises [choice]
PATIENCE = 10  # epochs without a better validation metric before the rate falls [choice]
VALIDATION_VIEWS = 4  # fixed crops of each slide, each in another orientation [choice]
_BATCH_BYTES = 1 << 28  # largest batch of features for prediction


class TrainingError(RuntimeError):
    """A network cannot be trained on this target."""


@dataclass(frozen=True)
class FittedFold:
    """The result of training one fold.

    Attributes
    ----------
    model
        The trained model in evaluation mode, on the device that it was trained on.
    best_epoch
        The epoch whose weights are kept.
    history
        One row per epoch: ``epoch``, ``loss``, ``validation_loss``, ``validation_metric`` and
        ``learning_rate``.
    """

    model: FoldModel
    best_epoch: int
    history: pl.DataFrame


def fit_fold(
    target: Target,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    grids: GridSource,
    normalise: Normalise,
    settings: ModelSettings,
    *,
    crop: int,
    seed: int,
    device: str = "auto",
    tracker: Tracker | None = None,
    name: str = "",
    progress: Callable[[], None] | None = None,
) -> FittedFold:
    """Train a network on training units and keep the best epoch by validation units.

    The optimiser is Adam. For network ``published`` the learning rate falls tenfold when the
    validation metric (Spearman's rho, ROC AUC, Harrell's C) stops rising, down to 1e-5 (paper B).
    For the other networks it rises over the first 30 % of epochs and falls along a cosine
    [choice]: with about ten validation patients the metric is too coarse for a plateau rule. The
    kept epoch has the best validation metric and, of equal ones, the lowest validation loss
    [choice]; an undefined metric ranks last. In each epoch every unit is used once, with one
    random crop in a random orientation of one of its slides. Equal seeds give equal networks on
    the CPU of one machine.

    Parameters
    ----------
    train, validation
        Rows of the target table, of different patients.
    grids
        Opens the grid of a slide.
    normalise
        Estimated from the slides in ``train`` (:func:`nic_core.models.crops.normalise_for`).
    crop
        Side of a crop in cells (:func:`nic_core.models.networks.crop_cells`).
    seed
        Seed of the weights, batches, crops and augmentation.
    device
        ``auto``, ``cpu`` or ``cuda``.
    tracker
        Receives the history.
    name
        Prefix of the metrics' names in the tracker.
    progress
        Called after each epoch.

    Raises
    ------
    TrainingError
        A loss is not finite.
    ValueError
        The device does not exist.
    CohortError
        The network cannot process crops of ``crop`` cells.
    """
    check_crop(settings.network, crop)
    kind = kind_of(target)
    torch_device = resolve_device(device)
    random = np.random.default_rng(seed)
    cuda = torch_device.type == "cuda"
    crops = Crops(grids, normalise, crop, pinned=cuda)
    with torch.random.fork_rng(devices=[torch_device] if cuda else []):
        torch.manual_seed(seed)
        network = build_network(
            settings.network,
            normalise.channels,
            kind.outputs,
            positions=settings.positions,
        )
        model = FoldModel(normalise, network, kind)
        shift, scale = kind.output_scale(train)
        model.shift.fill_(shift)
        model.scale.fill_(scale)
        model.to(torch_device)
        optimiser = torch.optim.Adam(_parameter_groups(network), lr=settings.learning_rate)
        schedule = _schedule(optimiser, settings)
        best: tuple[tuple[float, float], int, dict[str, Tensor]] | None = None
        history = []
        for epoch in range(settings.epochs):
            rate = float(optimiser.param_groups[0]["lr"])
            loss = _train_epoch(model, optimiser, train, crops, settings, random)
            validation_loss, metric = _validate(model, validation, crops, settings)
            row = {
                "loss": loss,
                "validation_loss": validation_loss,
                "validation_metric": metric,
                "learning_rate": rate,
            }
            for key in ("loss", "validation_loss"):
                if not math.isfinite(row[key]):
                    raise TrainingError(
                        f"target '{target.name}' {name}: {key} is {row[key]} in epoch {epoch}; "
                        "lower settings.models.learning_rate"
                    )
            history.append({"epoch": epoch, **row})
            if tracker is not None:
                tracker.metrics({f"{name}{k}": v for k, v in row.items()}, step=epoch)
            ranked = metric if math.isfinite(metric) else -math.inf
            schedule(ranked)
            if best is None or (ranked, -validation_loss) > best[0]:
                best = (ranked, -validation_loss), epoch, copy.deepcopy(network.state_dict())
            if progress is not None:
                progress()
    assert best is not None  # epochs >= 1
    network.load_state_dict(best[2])
    model.eval().requires_grad_(False)
    return FittedFold(model, best[1], pl.DataFrame(history))


@contextmanager
def fitting_threads(crop: int) -> Iterator[None]:
    """Use one thread of torch and of BLAS for small crops, whose layers are too short for several.

    For training, prediction and explanation alike. Threads that wait for each other compute in a
    loop meanwhile: several are slower than one, and much slower beside other work.

    Parameters
    ----------
    crop
        Side of a crop in cells.
    """
    before, single = torch.get_num_threads(), crop <= SMALL_CROP
    torch.set_num_threads(1 if single else before)
    try:
        with threadpool_limits(1 if single else None, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def predict_units(
    model: FoldModel, table: pl.DataFrame, crops: Crops, *, count: int, seed: int
) -> NDArray[np.float64]:
    """Predict units at test time: the mean over ``count`` crops x 8 orientations (paper B).

    A unit with several slides gets the mean of its slides' predictions [choice]. The centres of
    crops depend on slide and seed only, so all folds use the same ones, and encoders with other
    cells use nearly the same places on the slide (:meth:`Crops.fixed_centres`).

    Parameters
    ----------
    table
        Units with the column ``slides`` (list of ids).

    Returns
    -------
    float64 (units, outputs)
    """
    model.eval()
    views = [
        [
            (slide, centre, orientation)
            for slide in slides
            for centre in crops.fixed_centres(slide, count, seed)
            for orientation in range(ORIENTATIONS)
        ]
        for slides in table["slides"]
    ]
    return _mean_over_views(model.predict, crops, views, model.device).double().numpy()


def batches(
    table: pl.DataFrame, size: int, random: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Yield the row numbers of one epoch in random batches of nearly equal size.

    A batch has at most ``size`` rows, and at least two, which batch normalization needs: three rows
    are one batch even if ``size`` is 2. If the table has the column ``event``, every batch gets at
    least one event [choice], because a batch without one has no Cox gradient. If there are fewer
    events than batches, there are fewer and larger batches.
    """
    rows = random.permutation(table.height)
    count = min(math.ceil(len(rows) / size), max(1, len(rows) // 2))
    if "event" in table.columns:
        event = table["event"].to_numpy()[rows]
        rows = np.concatenate([rows[event], rows[~event]])
        count = min(count, int(event.sum()))
    for i in range(count):
        yield rows[i::count]


def training_batches(
    train: pl.DataFrame, crops: Crops, size: int, random: np.random.Generator
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield one epoch's :func:`batches` of row numbers, each with one random crop per unit.

    The crops are valid until the next batch is requested; see :meth:`Crops.load`.
    """
    slides = train["slides"].to_list()
    return crops.load(
        (
            rows,
            [crops.random_view(slides[i][random.integers(len(slides[i]))], random) for i in rows],
        )
        for rows in batches(train, size, random)
    )


def _schedule(optimiser: torch.optim.Optimizer, settings: ModelSettings) -> Callable[[float], None]:
    """Return a function of the validation metric that sets the next epoch's learning rate."""
    if settings.network == "published":
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimiser, mode="max", factor=0.1, patience=PATIENCE, min_lr=LOWEST_RATE
        )
        return plateau.step
    cycle = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda epoch: _one_cycle(epoch, settings.epochs)
    )
    return lambda _: cycle.step()


def _one_cycle(epoch: int, epochs: int) -> float:
    """Return the fraction of the highest rate: a linear rise, then half a cosine towards 0."""
    rise = max(1, round(WARM_UP * epochs))
    if epoch < rise:
        return (epoch + 1) / rise
    return (1 + math.cos(math.pi * (epoch - rise + 1) / (epochs - rise + 1))) / 2


def _train_epoch(
    model: FoldModel,
    optimiser: torch.optim.Optimizer,
    train: pl.DataFrame,
    crops: Crops,
    settings: ModelSettings,
    random: np.random.Generator,
) -> float:
    """Train one epoch; return the mean loss of its batches."""
    model.train()
    losses = []
    for rows, features in training_batches(train, crops, settings.batch, random):
        augmented = augment_features(
            _to_device(features, model.device),
            noise=settings.feature_noise,
            dropout=settings.feature_dropout,
        )
        if settings.network == "local":
            outputs, penalty = _outputs_of_cells(model.network, augmented)
            loss = model.kind.loss(outputs, train[rows], model.shift, model.scale) + penalty
        else:
            outputs = model.network(augmented)
            loss = model.kind.loss(outputs, train[rows], model.shift, model.scale)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.item())  # waits for the device, so the crops may be overwritten
    return float(np.mean(losses))


def _outputs_of_cells(network: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return a network's outputs (B, outputs), and the penalty on those of single cells.

    The penalty makes the output of most cells nearly 0, so that few cells make up the output of a
    slide. Outputs of classes count by their difference from the mean of all classes, which alone
    changes probabilities.
    """
    assert isinstance(network, HasCellOutputs)
    each, cells = network.cell_outputs(features), occupied(features).sum((2, 3)).clamp(min=1)
    relative = each - each.mean(1, keepdim=True) if each.shape[1] > 1 else each
    return each.sum((2, 3)) / cells, CELL_PENALTY * relative.abs().sum() / cells.sum()


@torch.no_grad()
def _validate(
    model: FoldModel,
    table: pl.DataFrame,
    crops: Crops,
    settings: ModelSettings,
) -> tuple[float, float]:
    """Return loss and primary metric of the validation units."""
    model.eval()
    views = [
        [
            (slide, centre, i * ORIENTATIONS // VALIDATION_VIEWS)
            for slide in slides
            for i, centre in enumerate(crops.fixed_centres(slide, VALIDATION_VIEWS, settings.seed))
        ]
        for slides in table["slides"]
    ]
    outputs = _mean_over_views(model.network, crops, views, model.device).to(model.device)
    prediction = model.activate(outputs).double().cpu().numpy()
    loss = model.kind.loss(outputs, table, model.shift, model.scale).item()
    return loss, primary_value(model.kind, table, prediction)


@torch.no_grad()
def _mean_over_views(
    module: Callable[[Tensor], Tensor],
    crops: Crops,
    views: Sequence[Sequence[View]],
    device: torch.device,
) -> Tensor:
    """Return the mean output over each unit's views, (units, outputs) on the CPU.

    Every slide has the same number of views, so the slides of a unit have equal weights.
    """
    flat = [view for unit in views for view in unit]
    step = max(1, _BATCH_BYTES // (4 * math.prod(crops.shape)))
    parts = ((None, flat[i : i + step]) for i in range(0, len(flat), step))
    # .cpu() waits for the device, so the crops may be overwritten
    outputs = [module(_to_device(features, device)).cpu() for _, features in crops.load(parts)]
    per_unit = torch.split(torch.cat(outputs), [len(unit) for unit in views])
    return torch.stack([unit.mean(0) for unit in per_unit])


def _to_device(features: NDArray[np.float32], device: torch.device) -> Tensor:
    """Copy crops to a device; asynchronously if they are in page-locked memory."""
    return torch.from_numpy(features).to(device, non_blocking=True)


def _parameter_groups(network: nn.Module) -> list[dict[str, object]]:
    """Return kernels, with the L2 penalty of paper B, and other parameters, without.

    Adam's weight decay adds ``factor * weight`` to the gradient, which is the gradient of
    ``factor / 2`` times the sum of squares.
    """
    kernels = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    return [{"params": kernels, "weight_decay": 2 * L2}, {"params": others, "weight_decay": 0.0}]

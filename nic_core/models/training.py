"""Training of one fold's network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from nic_core.cohort import ModelSettings, Target
from nic_core.devices import resolve_device
from nic_core.grids.orientations import ORIENTATIONS
from nic_core.models.crops import (
    SMALL_CROP,
    Crops,
    GridMoments,
    GridSource,
    View,
    disturb,
    normalise_for,
)
from nic_core.models.losses import cox_loss
from nic_core.models.metrics import (
    PRIMARY,
    Metric,
    classification_metrics,
    regression_metrics,
    survival_metrics,
)
from nic_core.models.networks import FoldModel, build_network, check_crop

if TYPE_CHECKING:
    from nic_core.tracker import Tracker

L2 = 1e-5  # B: penalty L2 * sum of squares of kernels
LOWEST_RATE = 1e-5  # B
WARM_UP = 0.3  # part of the epochs in which a rate that is not B's rises [choice]
PATIENCE = 10  # epochs without a better validation metric before the rate falls [choice]
VALIDATION_VIEWS = 4  # fixed crops of each slide, each in another orientation [choice]
_BATCH_BYTES = 1 << 28  # features that a network is given at once outside of training


class TrainingError(RuntimeError):
    """A network could not be trained on this target."""


@dataclass(frozen=True)
class FittedFold:
    """A trained fold: its model (evaluation mode, on the device that it was trained on), best
    epoch and one history row an epoch.

    ``history`` has ``epoch``, ``loss``, ``validation_loss``, ``validation_metric`` and
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
    moments: Mapping[str, GridMoments],
    settings: ModelSettings,
    *,
    seed: int,
    device: str = "auto",
    tracker: Tracker | None = None,
    name: str = "",
) -> FittedFold:
    """Train a network on some units and keep the epoch that is best on others.

    Adam. For network ``published`` the rate falls tenfold when the validation metric (Spearman's
    rho, ROC AUC, Harrell's C) stops rising, down to 1e-5 (B); for the others it rises over the
    first 30 % of epochs and falls along a cosine [choice]: with some ten validation patients the
    metric is too coarse to steer by. The epoch with the best validation metric is kept, of equal
    ones that with the lower validation loss [choice]; one whose metric is undefined comes last.
    An epoch shows each unit once: one random crop, turned at random, of one of its slides
    drawn at random; the next batch's are cut while the network has this one. Equal seeds
    give equal networks on one machine's CPU.

    Parameters
    ----------
    train, validation
        Rows of the target table; patients must differ.
    moments
        Of every slide in ``train``.
    device
        ``auto``, ``cpu`` or ``cuda``.
    tracker
        Receives the history, each name prefixed by ``name``.

    Raises
    ------
    TrainingError
        The loss is no longer finite.
    ValueError
        There is no such device.
    """
    check_crop(settings.network, settings.crop)
    at = resolve_device(device)
    random = np.random.default_rng(seed)
    slides = [slide for row in train["slides"] for slide in row]
    normalise = normalise_for(settings.network, [moments[slide] for slide in slides])
    cuda = at.type == "cuda"
    crops = Crops(grids, normalise, settings.crop, pinned=cuda)
    with torch.random.fork_rng(devices=[at] if cuda else []):
        torch.manual_seed(seed)
        network = build_network(
            settings.network,
            normalise.channels,
            output_count(target),
            positions=settings.positions,
        )
        model = FoldModel(normalise, network, target.kind)
        if target.kind == "regression":
            y = train["y"].to_numpy()
            model.shift.fill_(y.mean())
            model.scale.fill_(y.std())
        model.to(at)
        optimiser = torch.optim.Adam(_parameter_groups(network), lr=settings.learning_rate)
        schedule = _schedule(optimiser, settings)
        best: tuple[tuple[float, float], int, dict[str, Tensor]] | None = None
        history = []
        for epoch in range(settings.epochs):
            rate = float(optimiser.param_groups[0]["lr"])
            loss = _train_epoch(model, optimiser, target, train, crops, settings, random)
            validation_loss, metric = _validate(model, target, validation, crops, settings)
            row = {
                "loss": loss,
                "validation_loss": validation_loss,
                "validation_metric": metric,
                "learning_rate": rate,
            }
            wrong = next((k for k in ("loss", "validation_loss") if not math.isfinite(row[k])), "")
            if wrong:
                raise TrainingError(
                    f"target '{target.name}' {name}: {wrong} is {row[wrong]} in epoch {epoch}; "
                    "lower settings.models.learning_rate"
                )
            history.append({"epoch": epoch, **row})
            if tracker is not None:
                tracker.metrics({f"{name}{k}": v for k, v in row.items()}, step=epoch)
            comparable = metric if math.isfinite(metric) else -math.inf
            schedule(comparable)
            if best is None or (comparable, -validation_loss) > best[0]:
                best = (comparable, -validation_loss), epoch, copy.deepcopy(network.state_dict())
    assert best is not None  # epochs >= 1
    network.load_state_dict(best[2])
    model.eval().requires_grad_(False)
    return FittedFold(model, best[1], pl.DataFrame(history))


@contextmanager
def fitting_threads(settings: ModelSettings) -> Iterator[None]:
    """One torch thread on small grids, for layers that are too short to be shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if settings.crop <= SMALL_CROP else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def output_count(target: Target) -> int:
    """Outputs of a network for the target: one, or one a class."""
    return len(target.classes) if target.kind == "classification" else 1


def predict_units(
    model: FoldModel, table: pl.DataFrame, crops: Crops, *, count: int, seed: int
) -> NDArray[np.float64]:
    """Test-time prediction: ``count`` crops x 8 orientations averaged a slide (B).

    A unit of several slides has the mean of its slides' predictions [choice]. Centres depend on
    slide and seed only, so that all folds and encoders see the same places.

    Returns
    -------
    float64 (units, outputs)
    """
    model.eval()
    views = [
        [
            (slide, centre, orientation)
            for slide in slides
            for centre in crops.fixed(slide, count, seed)
            for orientation in range(ORIENTATIONS)
        ]
        for slides in table["slides"]
    ]
    return _mean_of_views(model.predict, crops, views, model.device).double().numpy()


def target_metrics(
    target: Target,
    table: pl.DataFrame,
    prediction: NDArray[np.float64],
    survival: NDArray[np.float64] | None = None,
    horizons: NDArray[np.float64] | None = None,
) -> dict[str, Metric]:
    """The target's metrics of predictions (units, outputs).

    ``survival`` and ``horizons``: see :func:`nic_core.models.metrics.survival_metrics`.
    """
    if target.kind == "regression":
        return regression_metrics(table["y"].to_numpy(), prediction[:, 0])
    if target.kind == "classification":
        return classification_metrics(table["y"].to_numpy(), prediction)
    time, event = table["time"].to_numpy(), table["event"].to_numpy()
    return survival_metrics(time, event, prediction[:, 0], survival, horizons)


def primary_metric(target: Target, table: pl.DataFrame, prediction: NDArray[np.float64]) -> float:
    """Value of the metric that the target is judged by; NaN where undefined."""
    metric = target_metrics(target, table, prediction)[PRIMARY[target.kind]]
    return float(metric(np.ones((1, table.height)))[0])


def batches(
    table: pl.DataFrame, size: int, random: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Rows of one epoch in random batches of nearly equal size, at most ``size``.

    With an ``event`` column deaths are dealt out first, so that every batch has one: there are
    never more batches than deaths (then some are larger than ``size``).
    """
    rows = random.permutation(table.height)
    count = math.ceil(len(rows) / size)
    if "event" in table.columns:
        event = table["event"].to_numpy()[rows]
        rows = np.concatenate([rows[event], rows[~event]])
        count = min(count, int(event.sum()))
    for i in range(count):
        yield rows[i::count]


def training_batches(
    train: pl.DataFrame, crops: Crops, size: int, random: np.random.Generator
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """An epoch's :func:`batches` of rows, each with a random crop of one of its slides.

    The crops are good until the next batch is asked for: see :meth:`Crops.ahead`.
    """
    slides = train["slides"].to_list()
    return crops.ahead(
        (rows, [crops.draw(slides[i][random.integers(len(slides[i]))], random) for i in rows])
        for rows in batches(train, size, random)
    )


def _schedule(optimiser: torch.optim.Optimizer, settings: ModelSettings) -> Callable[[float], None]:
    """What is called with the validation metric after each epoch to set the next one's rate."""
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
    """Part of the highest rate: a linear rise, then half a cosine towards 0."""
    rise = max(1, round(WARM_UP * epochs))
    if epoch < rise:
        return (epoch + 1) / rise
    return (1 + math.cos(math.pi * (epoch - rise + 1) / (epochs - rise + 1))) / 2


def _train_epoch(
    model: FoldModel,
    optimiser: torch.optim.Optimizer,
    target: Target,
    train: pl.DataFrame,
    crops: Crops,
    settings: ModelSettings,
    random: np.random.Generator,
) -> float:
    model.train()
    losses = []
    for rows, features in training_batches(train, crops, settings.batch, random):
        raw = model.network(
            disturb(
                _on(model.device, features),
                noise=settings.feature_noise,
                dropout=settings.feature_dropout,
            )
        )
        loss = _loss(model, target, train[rows], raw)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.item())  # waits for the device: the crops may be overwritten
    return float(np.mean(losses))


def _loss(model: FoldModel, target: Target, rows: pl.DataFrame, raw: Tensor) -> Tensor:
    """The target's loss of network outputs; squared errors in units of the labels' deviation."""
    if target.kind == "regression":
        y = torch.tensor(rows["y"].to_numpy(), dtype=raw.dtype, device=raw.device)
        return functional.mse_loss(raw[:, 0], (y - model.shift) / model.scale)
    if target.kind == "classification":
        return functional.cross_entropy(raw, torch.tensor(rows["y"].to_numpy(), device=raw.device))
    time, event = (torch.tensor(rows[k].to_numpy(), device=raw.device) for k in ("time", "event"))
    return cox_loss(raw[:, 0], time, event)


@torch.no_grad()
def _validate(
    model: FoldModel,
    target: Target,
    table: pl.DataFrame,
    crops: Crops,
    settings: ModelSettings,
) -> tuple[float, float]:
    """Loss and primary metric of the validation units."""
    model.eval()
    views = [
        [
            (slide, centre, i * ORIENTATIONS // VALIDATION_VIEWS)
            for slide in slides
            for i, centre in enumerate(crops.fixed(slide, VALIDATION_VIEWS, settings.seed))
        ]
        for slides in table["slides"]
    ]
    raw = _mean_of_views(model.network, crops, views, model.device).to(model.device)
    metric = primary_metric(target, table, model.finish(raw).double().cpu().numpy())
    return _loss(model, target, table, raw).item(), metric


@torch.no_grad()
def _mean_of_views(
    module: Callable[[Tensor], Tensor],
    crops: Crops,
    views: Sequence[Sequence[View]],
    device: torch.device,
) -> Tensor:
    """Mean output over each unit's views, (units, outputs) on the CPU, of a module on a device;
    each slide has equally many."""
    flat = [view for of_unit in views for view in of_unit]
    step = max(1, _BATCH_BYTES // (4 * math.prod(crops.shape)))
    parts = ((None, flat[i : i + step]) for i in range(0, len(flat), step))
    # the copy back waits for the device: the crops may be overwritten
    outputs = [module(_on(device, features)).cpu() for _, features in crops.ahead(parts)]
    per_unit = torch.split(torch.cat(outputs), [len(of_unit) for of_unit in views])
    return torch.stack([of_unit.mean(0) for of_unit in per_unit])


def _on(device: torch.device, features: NDArray[np.float32]) -> Tensor:
    """Crops on a device; from page-locked memory the copy runs while the caller goes on."""
    return torch.from_numpy(features).to(device, non_blocking=True)


def _parameter_groups(network: nn.Module) -> list[dict[str, object]]:
    """Kernels with the L2 penalty of B; biases and batch normalisation without.

    Adam's weight decay adds its factor times the weight to the gradient, which is that of
    factor / 2 times the sum of squares.
    """
    kernels = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    return [{"params": kernels, "weight_decay": 2 * L2}, {"params": others, "weight_decay": 0.0}]

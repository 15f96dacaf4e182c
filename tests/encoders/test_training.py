from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score
from torch import nn
from typer.testing import CliRunner

from nic_core.cli import app
from nic_core.cohort import EncoderSpec
from nic_core.encoders import (
    EncoderError,
    load_encoder,
    save_encoder,
    task_probabilities,
    train_encoder,
    training_loop,
)
from nic_core.encoders.encoder import Encoder
from nic_core.encoders.figures import augmentation_sheet
from nic_core.encoders.networks import PatchEncoder, TellezEncoder
from nic_core.encoders.objectives.base import Selection, Validation
from nic_core.encoders.objectives.mtl import FEWEST_TO_CHOOSE, Multitask, uncertainty_loss
from nic_core.encoders.patch_tasks import PatchDataset
from nic_core.encoders.scores import score_task
from nic_core.models.metrics import classification_metrics, score
from nic_core.reports import encoder_results

from .conftest import REPOSITORY, make_dataset, texture, write_image

pytestmark = pytest.mark.slow

SIZES = {"patch": 62, "mpp": 0.5, "embedding_size": 16}


def make_tasks(side: int = 62):
    return [
        make_dataset(side=side),
        make_dataset("directions", ("x", "xy", "wide"), (0, 1, 2), side=side, seed=1),
    ]


@pytest.fixture(scope="module")
def tasks():
    return make_tasks()


def spec(**changes: object) -> EncoderSpec:
    values = {
        "name": "mtl-2",
        "objective": "mtl",
        "tasks": ("stripes", "directions"),
        "patches_seen": 1920,
        "batch": 32,
        "learning_rate": 3e-3,
    }
    return EncoderSpec(**values | changes)


class Recorder:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.names: set[str] = set()

    def metrics(self, values, step):
        self.steps.append(step)
        self.names |= set(values)


@pytest.fixture(scope="module")
def trained(tasks):
    recorder, seen = Recorder(), []
    result = train_encoder(
        spec(), tasks, **SIZES, device="cpu", tracker=recorder,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    return result, recorder, seen


def test_multitask_training_learns_both_tasks(trained):
    result, _, _ = trained
    scores = result.encoder.card.scores
    assert scores["stripes"].balanced_accuracy > 0.8
    assert scores["directions"].balanced_accuracy > 0.6
    rows = encoder_results(result.encoder.card).filter(metric="balanced accuracy")
    assert rows.select("low", "high").rows() == [s.interval for s in scores.values()]
    assert (rows["low"] <= rows["value"]).all()
    assert (rows["value"] <= rows["high"]).all()
    assert np.sum(scores["directions"].confusion) == scores["directions"].n == 36


def test_history_has_losses_and_validation_values_of_each_epoch(trained):
    history = trained[0].history
    assert {
        "epoch", "patches", "learning_rate", "loss", "loss/stripes", "loss/directions",
        "validation/stripes/balanced_accuracy", "validation/stripes/auc",
        "validation/directions/auc", "validation/balanced_accuracy",
    } <= set(history.columns)  # fmt: skip
    assert history["patches"].is_sorted()
    assert history["learning_rate"].is_sorted(descending=True)


def test_tracker_and_progress_receive_the_whole_training(trained):
    result, recorder, seen = trained
    assert recorder.steps == result.history["epoch"].to_list()
    assert {
        "loss", "loss/stripes", "validation/stripes/balanced_accuracy", "validation/stripes/auc",
        "validation/stripes/f1",
    } <= recorder.names  # fmt: skip
    assert seen == [(32 * step, 1920) for step in range(1, len(seen) + 1)]
    assert seen[-1][0] == result.history["patches"][-1]


def test_the_result_has_confusion_matrices_of_every_epoch(trained):
    result, _, _ = trained
    cells = result.confusion
    assert cells["epoch"].unique().to_list() == result.history["epoch"].to_list()
    for row in result.history.iter_rows(named=True):
        for task, classes in result.encoder.card.tasks.items():
            matrix = cells.filter(epoch=row["epoch"], task=task)
            assert len(matrix) == len(classes) ** 2
            right = matrix.filter(pl.col("true") == pl.col("predicted")).sort("true")["patches"]
            all_of = matrix.group_by("true").agg(pl.col("patches").sum()).sort("true")["patches"]
            recall = (right / all_of).mean()
            assert recall == pytest.approx(row[f"validation/{task}/balanced_accuracy"])


def test_training_repeats_bit_by_bit_for_one_seed(tasks):
    def weights(seed: int) -> str:
        encoder = train_encoder(spec(patches_seen=128, seed=seed), tasks, **SIZES).encoder
        return encoder.card.weights_hash

    torch.manual_seed(123)  # the state of the global generator must have no effect
    first = weights(0)
    torch.manual_seed(321)
    assert first == weights(0)
    assert first != weights(1)


class Killed(Exception):
    pass


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.encoders.test_training import SIZES, make_tasks, spec, train_encoder
import torch

def progress(done, total):
    if done > 500:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
train_encoder(spec(patches_seen=960), make_tasks(), **SIZES, device="cpu",
              checkpoint=Path(sys.argv[1]), progress=progress)
"""


@pytest.mark.parametrize(
    "settings",
    [
        {"task_weights": "uncertainty"},
        {"objective": "vae"},
        {"objective": "contrastive"},
        {"objective": "bigan"},  # its dropout uses the global generator
    ],
    ids=["mtl", "vae", "contrastive", "bigan"],
)
def test_every_objective_resumes_to_the_same_weights(tmp_path, settings):
    tasks, sizes = make_tasks(64), SIZES | {"patch": 64}

    def kill(done: int, _: int) -> None:
        if done > 48:
            raise Killed

    small = spec(patches_seen=96, batch=16, learning_rate=2e-3, **settings)
    checkpoint = tmp_path / "training.pt"
    with pytest.raises(Killed):
        train_encoder(small, tasks, **sizes, checkpoint=checkpoint, progress=kill)
    resumed = train_encoder(small, tasks, **sizes, checkpoint=checkpoint)
    whole = train_encoder(small, tasks, **sizes)
    assert resumed.encoder.card == whole.encoder.card
    assert resumed.history.equals(whole.history)


def test_resume_restores_best_weights_rate_and_patience(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "SHORTEST_EPOCH", 1)
    values = [0.5, 0.7, *[0.6] * 30]  # the best epoch is before every kill
    endless = spec(patches_seen=None, batch=64)

    class Stops(Bowl):
        def validate(self) -> Validation:
            if len(self.weights) == until:
                raise Killed
            return super().validate()

    until = -1
    objective = Stops(values, tasks[0])
    whole, _ = training_loop.fit(objective, endless, learning_rate=1e-2)
    best = objective.networks["encoder"].weight.item()
    assert best == objective.weights[1]
    # within the patience, after a drop of the rate, at the minimum
    for until in (4, 8, len(whole) - 1):
        checkpoint = tmp_path / f"{until}.pt"
        torch.manual_seed(0)
        with pytest.raises(Killed):
            killed = Stops(values, tasks[0])
            killed.networks.load_state_dict(objective.start)
            training_loop.fit(killed, endless, learning_rate=1e-2, checkpoint=checkpoint)
        again = Bowl(values[until:], tasks[0])
        resumed, _ = training_loop.fit(again, endless, learning_rate=1e-2, checkpoint=checkpoint)
        assert resumed.equals(whole)
        assert again.networks["encoder"].weight.item() == best


def test_without_selection_the_last_weights_are_kept(tasks):
    class Fixed(Bowl):
        selection = None

    objective = Fixed([0.9, *[0.1] * 30], tasks[0])
    training_loop.fit(objective, spec(patches_seen=640, batch=64), learning_rate=1e-2)
    assert objective.networks["encoder"].weight.item() == objective.weights[-1]
    assert len(set(objective.weights)) == len(objective.weights)


def test_a_process_killed_by_sigkill_resumes_to_the_same_weights(tasks, tmp_path):
    checkpoint = tmp_path / ".training.pt"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(checkpoint)], cwd=REPOSITORY)
    assert killed.returncode == -signal.SIGKILL
    small, first, recorder = spec(patches_seen=960), [], Recorder()
    resumed = train_encoder(
        small, tasks, **SIZES, device="cpu", checkpoint=checkpoint, tracker=recorder,
        progress=lambda done, _: first.append(done),
    )  # fmt: skip
    complete = Recorder()
    whole = train_encoder(small, tasks, **SIZES, device="cpu", tracker=complete)
    assert first[0] > 400
    assert resumed.encoder.card == whole.encoder.card
    assert resumed.history.equals(whole.history)
    assert recorder.steps == complete.steps
    assert resumed.confusion.equals(whole.confusion)


def test_a_refit_repeats_the_steps_and_rates_of_the_kept_epoch(tasks):
    class Twice(Bowl):
        splits = ("train",)

        def train_on(self, splits: tuple[str, ...]) -> None:
            self.splits = splits

        def losses(self, batch: None) -> dict[str, torch.Tensor]:
            self.seen = [*getattr(self, "seen", []), self.splits]
            return super().losses(batch)

    objective = Twice([k / 100 for k in range(18)] + [0.01] * 6, tasks[0])
    history, _ = training_loop.fit(
        objective, spec(patches_seen=24 * 128, batch=64, refit="all"), learning_rate=3e-3
    )
    training, refit = (history.filter(phase=phase) for phase in ("training", "refit"))
    epochs = len(training)
    assert epochs > 18
    assert refit["learning_rate"].to_list() == training["learning_rate"][:18].to_list()
    assert len(set(refit["learning_rate"])) > 1
    assert refit["patches"].to_list() == [(epochs + k) * 128 for k in range(1, 19)]
    assert refit["validation/value"].null_count() == 18
    assert history.filter("kept")["epoch"].to_list() == [epochs + 18]
    assert objective.seen == [("train",)] * 2 * epochs + [("train", "validation")] * 36
    # from the same start: the losses do not depend on the batch here
    assert refit["loss"].to_list() == training["loss"][:18].to_list()
    assert objective.networks["encoder"].weight.item() == objective.weights[17]


def test_a_refit_draws_patches_of_both_splits_from_the_same_start(tasks):
    small = spec(patches_seen=96, batch=16)
    plain = train_encoder(small, tasks, **SIZES)
    refit = train_encoder(small.model_copy(update={"refit": "all"}), tasks, **SIZES)
    both = refit.history.filter(phase="training").drop("kept").equals(plain.history.drop("kept"))
    assert both
    assert refit.encoder.card.weights_hash != plain.encoder.card.weights_hash
    kept = refit.encoder.card.training["kept_weights"]
    assert kept.startswith("the refit on train and validation, as many steps as up to epoch ")
    assert refit.encoder.card.training["patches_seen"] == 96
    moved = [
        replace(
            task,
            table=task.table.with_columns(
                split=pl.when(pl.col("split") == "validation")
                .then(pl.lit("train"))
                .otherwise("split")
            ),
        )
        for task in tasks
    ]
    first = Multitask(PatchEncoder(TellezEncoder(16, 31)), tasks, batch=16, validation=9, seed=0)
    other = Multitask(PatchEncoder(TellezEncoder(16, 31)), moved, batch=16, validation=9, seed=0)
    first.train_on(("train", "validation"))
    for one, same in zip(first.sampler.rows, other.sampler.rows, strict=True):
        assert set(one) == set(same)


@pytest.mark.parametrize("after", [48, 120])
@pytest.mark.parametrize("objective", ["mtl", "vae", "contrastive"])
def test_a_refit_resumes_in_either_phase_to_the_same_weights(tmp_path, after, objective):
    tasks, sizes = make_tasks(64), SIZES | {"patch": 64}
    small = spec(patches_seen=96, batch=16, learning_rate=2e-3, objective=objective, refit="all")
    seen: list[int] = []

    def kill(done: int, _: int) -> None:
        seen.append(done)
        if done > after:
            raise Killed

    checkpoint = tmp_path / "training.pt"
    whole = train_encoder(small, tasks, **sizes)
    if whole.history["patches"][-1] <= after:
        pytest.skip("the refit is shorter")
    with pytest.raises(Killed):
        train_encoder(small, tasks, **sizes, checkpoint=checkpoint, progress=kill)
    before = seen[-1]
    seen.clear()
    resumed = train_encoder(
        small, tasks, **sizes, checkpoint=checkpoint, progress=lambda done, _: seen.append(done)
    )
    assert seen[0] == before  # the epoch that was interrupted
    assert resumed.encoder.card == whole.encoder.card
    assert resumed.history.equals(whole.history)


def few_validation(task: PatchDataset, keep: int) -> PatchDataset:
    """The task with ``keep`` validation patches of each class; the others are test patches."""
    rank = pl.col("index").rank("ordinal").over("class", "split")
    split = pl.when((pl.col("split") == "validation") & (rank > keep)).then(pl.lit("test"))
    return replace(task, table=task.table.with_columns(split=split.otherwise("split")))


def test_small_validation_splits_do_not_choose_the_weights(tasks):
    small = few_validation(tasks[0], FEWEST_TO_CHOOSE - 1)
    result = train_encoder(
        spec(patches_seen=96, batch=16, objective="supervised", tasks=("stripes",)),
        [small],
        **SIZES,
    )
    last = result.history["epoch"].max()
    assert result.history.filter("kept")["epoch"].to_list() == [last]
    assert result.encoder.card.training["kept_weights"] == (
        f"epoch {last} of {last}, the last, because no task can choose (stripes: fewer than 10 "
        "validation patches of a class)"
    )
    enough = few_validation(tasks[0], FEWEST_TO_CHOOSE)
    encoder = PatchEncoder(TellezEncoder(16, 31))
    assert Multitask(encoder, [small], batch=8, validation=99, seed=0).selection.keep == "last"
    assert Multitask(encoder, [enough], batch=8, validation=99, seed=0).selection.keep == "best"


def test_a_small_validation_split_has_no_part_in_the_choice(tasks):
    small = few_validation(tasks[0], 2)
    result = train_encoder(spec(patches_seen=160, batch=16), [small, tasks[1]], **SIZES)
    history = result.history
    chosen = history["validation/balanced_accuracy"].to_list()
    assert chosen == history["validation/directions/balanced_accuracy"].to_list()
    assert history.filter("kept")["epoch"][0] == 1 + int(np.argmax(chosen))
    assert "(without stripes: fewer than 10" in result.encoder.card.training["kept_weights"]


class Planted:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", ["code", "truncated", "other", "list", "weights", "old"])
def test_invalid_checkpoints_are_refused_without_running_code(tasks, tmp_path, content):
    checkpoint, trace = tmp_path / "training.pt", tmp_path / "ran"
    objects = {
        "code": {"format": Planted(trace)},
        "list": [1],
        "weights": {"w": torch.zeros(1)},
        "old": {"fingerprint": "", "networks": {}},
    }
    if content in objects:
        torch.save(objects[content], checkpoint)
    else:
        checkpoint.write_bytes(b"PK\x03\x04 cut" if content == "truncated" else b"other")
    with pytest.raises(EncoderError, match="'mtl-2': .*training.pt is not a checkpoint .*delete"):
        train_encoder(spec(), tasks, **SIZES, checkpoint=checkpoint)
    assert not trace.exists()


def test_a_checkpoint_of_another_training_is_ignored(tasks, tmp_path, caplog):
    def kill(done: int, _: int) -> None:
        if done > 200:
            raise Killed

    checkpoint = tmp_path / "training.pt"
    with pytest.raises(Killed):
        train_encoder(spec(), tasks, **SIZES, checkpoint=checkpoint, progress=kill)
    other = spec(patches_seen=128, seed=5)
    result = train_encoder(other, tasks, **SIZES, checkpoint=checkpoint)
    assert "training from the start" in caplog.text
    assert result.encoder.card == train_encoder(other, tasks, **SIZES).encoder.card


class Bowl:
    """An objective with given validation values, to test the schedule of the training loop."""

    selection = Selection("validation/value", "max")
    patches_per_step = 64

    def __init__(self, values: list[float], task: PatchDataset) -> None:
        self.networks = nn.ModuleDict({"encoder": nn.Linear(1, 1)})
        self.start = copy.deepcopy(self.networks.state_dict())
        self.heads = {}
        self.tasks = (task,)
        self.values = iter(values)
        self.weights: list[float] = []

    def batch(self, generator: torch.Generator) -> None:
        return None

    def losses(self, batch: None) -> dict[str, torch.Tensor]:
        return {"loss": self.networks["encoder"].weight.square().sum()}

    def validate(self) -> Validation:
        self.weights.append(self.networks["encoder"].weight.item())
        return Validation({"validation/value": next(self.values)})


@pytest.mark.parametrize("first", [1e-2, 1e-1])
def test_without_budget_the_rate_falls_at_plateaus(tasks, monkeypatch, first):
    monkeypatch.setattr(training_loop, "SHORTEST_EPOCH", 1)
    objective = Bowl([0.5, 0.6, 0.7] + [0.6] * 100, tasks[0])
    history, _ = training_loop.fit(
        objective, spec(patches_seen=None, batch=64), learning_rate=first
    )
    # best in epoch 3; each later rate lasts for the patience of 3 epochs and one more
    later = [rate for rate in (1e-2, 1e-3, 1e-4) if rate < first]
    rates = [first] * 7 + [rate for rate in later for _ in range(4)] + [1e-5]
    assert np.allclose(history["learning_rate"], rates)
    assert history["patches"][0] == 128  # a pass over 72 training patches, in whole steps
    assert objective.networks["encoder"].weight.item() == objective.weights[2]


def test_with_budget_the_rate_falls_without_a_plateau(tasks):
    objective = Bowl([k / 100 for k in range(24)], tasks[0])
    history, _ = training_loop.fit(
        objective, spec(patches_seen=24 * 64, batch=64), learning_rate=3e-3
    )
    # an epoch is one step; the rate drops after 60 % and after 85 % of the budget
    assert np.allclose(history["learning_rate"], [3e-3] * 15 + [3e-4] * 6 + [3e-5] * 3)


def test_without_budget_a_bigan_trains_200_000_steps(tasks):
    class Fixed(Bowl):
        selection = None

    totals = []

    def stop(done: int, total: int) -> None:
        totals.append(total)
        raise Killed

    with pytest.raises(Killed):
        training_loop.fit(
            Fixed([], tasks[0]), spec(patches_seen=None), learning_rate=2e-4, progress=stop
        )
    assert totals == [200_000 * 64]


def test_bfloat16_training_keeps_float32_weights_and_similar_losses(tasks):
    exact, reduced = (
        train_encoder(spec(patches_seen=640, precision=precision), tasks, **SIZES, device="cpu")
        for precision in ("float32", "bfloat16")
    )
    # later epochs differ as much as between two seeds
    assert np.allclose(exact.history["loss"][:2], reduced.history["loss"][:2], rtol=0.02)
    assert exact.encoder.card.weights_hash != reduced.encoder.card.weights_hash
    assert reduced.encoder.card.training["precision"] == "bfloat16"
    assert {p.dtype for p in reduced.encoder.module.parameters()} == {torch.float32}


def test_uncertainty_weights_start_equal_and_fall_for_high_losses():
    losses = {"easy": torch.tensor(0.1), "hard": torch.tensor(2.0)}
    variances = {name: nn.Parameter(torch.zeros(())) for name in losses}
    assert uncertainty_loss(losses, variances).item() == pytest.approx(1.05)
    optimizer = torch.optim.SGD(variances.values(), lr=0.5)
    for _ in range(400):
        optimizer.zero_grad()
        uncertainty_loss(losses, variances).backward()
        optimizer.step()
    # at the minimum of exp(-s) * loss + s / 2, the variance exp(s) is twice the loss
    for name, loss in losses.items():
        assert variances[name].exp().item() == pytest.approx(2 * loss.item(), rel=1e-2)


def test_uncertainty_weighting_is_an_option_of_multitask_training(trained, tasks):
    result = train_encoder(spec(patches_seen=640, task_weights="uncertainty"), tasks, **SIZES)
    weights = result.history["weight/stripes"].to_numpy()
    assert 0.5 < weights[0] < 2
    assert len(np.unique(weights)) == len(weights)
    assert result.encoder.card.training["task_weights"] == "uncertainty"
    assert set(result.encoder.heads) == {"stripes", "directions"}
    assert not any(name.startswith("weight/") for name in trained[0].history.columns)


def test_the_best_validated_weights_are_kept(trained, tasks):
    result, _, _ = trained
    best = result.history["validation/balanced_accuracy"].max()
    accuracies = []
    for task in tasks:
        rows = task.rows("validation")
        embeddings = result.encoder.embed(task.patches[rows])
        probabilities = task_probabilities(result.encoder, task.name, embeddings)
        accuracies.append(balanced_accuracy_score(task.labels[rows], probabilities.argmax(1)))
    assert np.mean(accuracies) == pytest.approx(best, abs=1e-9)


def test_batches_are_balanced_by_task_and_class(tasks):
    few = tasks[0].table.with_columns(
        split=pl.when((pl.col("class") == 1) & (pl.col("index") % 3 > 0))
        .then(pl.lit("test"))
        .otherwise("split")
    )
    rare = type(tasks[0])("stripes", "none", tasks[0].classes, 0.5, tasks[0].patches, few)
    objective = Multitask(
        PatchEncoder(TellezEncoder(16, 31)), [rare, tasks[1]], batch=64, validation=10, seed=0
    )
    generator = torch.Generator().manual_seed(0)
    batches = [objective.batch(generator) for _ in range(20)]
    assert {tuple(len(labels) for labels in batch.labels) for batch in batches} == {(32, 32)}
    share = torch.cat([batch.labels[0] for batch in batches]).float().mean()
    assert abs(share - 0.5) < 0.06
    assert batches[0].inputs.min() >= -1
    assert batches[0].inputs.max() <= 1


def test_a_diverging_training_raises_an_error(tasks):
    what = r"'mtl-2': the loss of task 'directions' became (nan|inf) in epoch 1, .*; lower the"
    with pytest.raises(EncoderError, match=what):
        train_encoder(spec(learning_rate=1e30), tasks, **SIZES)
    what = r"'mtl-2': the validation of task 'stripes' became nan in epoch 1, after 64 patches"
    with pytest.raises(EncoderError, match=what):
        train_encoder(spec(learning_rate=1e30, patches_seen=64, batch=64), tasks, **SIZES)
    what = r"'vae': the loss '(kl|mse)' became .* lower the encoder's learning_rate \(now 1e\+30\)$"
    vae = spec(name="vae", objective="vae", learning_rate=1e30, precision="float32")
    with pytest.raises(EncoderError, match=what):
        train_encoder(vae, make_tasks(64), **SIZES | {"patch": 64})
    # divergence in the last step is visible only in the validation
    pairs = spec(objective="contrastive", learning_rate=1e30, patches_seen=32)
    with pytest.raises(EncoderError, match="the validation 'accuracy' became nan in epoch 1"):
        train_encoder(pairs, tasks, **SIZES)
    gan = spec(objective="bigan", learning_rate=1e30, patches_seen=32)
    with pytest.raises(EncoderError, match="the (loss|validation) '.*' became (nan|inf)"):
        train_encoder(gan, make_tasks(64), **SIZES | {"patch": 64})


def test_mean_rgb_is_not_trained(tasks):
    mean = EncoderSpec(name="mean", objective="mean_rgb")
    result = train_encoder(mean, [], **SIZES)
    assert result.history.is_empty()
    embeddings = result.encoder.embed(tasks[0].patches[:5])
    expected = tasks[0].patches[:5].mean((1, 2)) / 255 * 2 - 1
    assert np.allclose(embeddings, expected, atol=1e-6)
    assert result.encoder.card.embedding_size == 3


def test_tasks_that_differ_from_the_spec_are_refused(tasks):
    with pytest.raises(EncoderError, match="trains on"):
        train_encoder(spec(), tasks[:1], **SIZES)
    with pytest.raises(EncoderError, match=r"patches of 128 px, .* 'stripes' has 62 px"):
        train_encoder(spec(), tasks, patch=128, mpp=0.5, embedding_size=16)


def test_a_saved_encoder_is_loaded_unchanged(trained, tasks, tmp_path):
    encoder = trained[0].encoder
    save_encoder(tmp_path / "e", encoder)
    loaded = load_encoder(tmp_path / "e")
    assert loaded.card == encoder.card
    pixels = tasks[0].patches[:40]
    assert np.array_equal(loaded.embed(pixels), encoder.embed(pixels))
    embeddings = loaded.embed(pixels)
    for task in ("stripes", "directions"):
        probabilities = task_probabilities(loaded, task, embeddings)
        assert np.array_equal(probabilities, task_probabilities(encoder, task, embeddings))
        assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    assert not loaded.module.training


def test_prepared_module_gives_the_same_embeddings(trained, tasks):
    encoder = trained[0].encoder
    pixels = torch.from_numpy(tasks[1].patches[:20]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        plain, fast = encoder.module(pixels), encoder.prepare("cpu", "float32").module(pixels)
    assert torch.allclose(plain, fast, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


def test_modified_or_missing_files_are_refused(trained, tmp_path):
    encoder: Encoder = trained[0].encoder
    with pytest.raises(EncoderError, match="no encoder here"):
        load_encoder(tmp_path)
    save_encoder(tmp_path, encoder)
    save_encoder(tmp_path / "mean", train_encoder(
        EncoderSpec(name="mean", objective="mean_rgb"), [], **SIZES).encoder)  # fmt: skip
    (tmp_path / "weights.safetensors").write_bytes(
        (tmp_path / "mean" / "weights.safetensors").read_bytes()
    )
    with pytest.raises(EncoderError, match="hash differs"):
        load_encoder(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(EncoderError, match="weights.safetensors: not a safetensors file"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": None}, r"format 4 \(it has no format number\)"),
        ({"format": 2}, r"format 4 \(it has format 2\)"),
        ({"code": 16}, "field 'code': Extra inputs are not permitted"),
        ({"embedding_size": None}, "field 'embedding_size': Field required"),
    ],
)
def test_cards_of_another_format_are_refused(trained, tmp_path, change, message):
    save_encoder(tmp_path, trained[0].encoder)
    card = json.loads((tmp_path / "card.json").read_text()) | change
    card = {name: value for name, value in card.items() if value is not None}
    (tmp_path / "card.json").write_text(json.dumps(card))
    remedy = "; train the encoder again, or import its file again"
    with pytest.raises(EncoderError, match=f"{tmp_path}/card.json: .*{message}{remedy}"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_card_is_refused(trained, tmp_path, content):
    save_encoder(tmp_path, trained[0].encoder)
    (tmp_path / "card.json").write_bytes(content)
    with pytest.raises(EncoderError, match="card.json: not an encoder card .*; train the encoder"):
        load_encoder(tmp_path)


def test_embedding_and_probabilities_refuse_wrong_shapes(trained):
    encoder = trained[0].encoder
    with pytest.raises(EncoderError, match="takes uint8"):
        encoder.embed(np.zeros((2, 64, 64, 3), np.uint8))
    with pytest.raises(EncoderError, match="takes uint8"):
        encoder.embed(np.zeros((2, 62, 62, 3), np.float32))
    with pytest.raises(EncoderError, match="no head for task 'other'; it has: stripes"):
        task_probabilities(encoder, "other", np.zeros((2, 16), np.float32))
    with pytest.raises(EncoderError, match="embeddings"):
        task_probabilities(encoder, "stripes", np.zeros((2, 3), np.float32))


def test_scores_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 300)
    probabilities = rng.dirichlet(np.ones(4), 300) + 0.3 * np.eye(4)[labels]
    probabilities /= probabilities.sum(1, keepdims=True)
    scores = score_task(labels, probabilities)
    predicted = probabilities.argmax(1)
    assert scores.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert scores.auc == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr"))
    assert scores.f1 == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_interval_is_the_bootstrap_over_patients():
    rng = np.random.default_rng(0)
    labels, patients = rng.integers(0, 3, 120), [f"p{i}" for i in rng.integers(0, 9, 120)]
    probabilities = rng.dirichlet(np.ones(3), 120) + 0.4 * np.eye(3)[labels]
    metric = {"accuracy": classification_metrics(labels, probabilities)["balanced_accuracy"]}
    expected = score(metric, patients, resamples=1000, seed=0)["accuracy"]
    found = score_task(labels, probabilities, patients)
    assert found.balanced_accuracy == pytest.approx(expected.value)
    assert found.interval == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert score_task(labels, probabilities, ["one"] * 120).interval is None
    assert score_task(labels, probabilities).interval is None


def test_scores_exclude_classes_without_patches():
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1]])
    scores = score_task(np.array([0, 1, 1]), probabilities)
    assert scores.balanced_accuracy == 1
    assert scores.auc == 1
    assert score_task(np.array([1, 1]), probabilities[1:]).auc is None


def test_augmentation_sheet_shows_two_patches_per_task(tasks):
    figure = augmentation_sheet(tasks)
    figure.canvas.draw()
    assert len(figure.axes) == 4 * 8
    titles = {axes.get_title(loc="left") for axes in figure.axes} - {""}
    assert {"stripes: fine", "stripes: coarse"} < titles
    assert len(titles) == 4


def test_train_command_makes_patch_tasks_and_encoder(tmp_path):
    for label, kind in (("fine", 0), ("coarse", 2)):
        for number in range(20):
            pixels = texture(np.random.default_rng(number), 64, kind)
            write_image(tmp_path / "stripes" / label / f"{number}.png", pixels)
    (tmp_path / "cohort.yaml").write_text(
        "name: stripes\n"
        "slides: {folders: [{path: .}]}\n"
        "patch_tasks: [{name: stripes, organ: none, mpp: 0.5, folder: stripes}]\n"
        "encoders:\n"
        "  - {name: e, objective: supervised, tasks: [stripes], patches_seen: 128, batch: 16}\n"
        "settings: {patch: 64}\n"
    )
    arguments = ["--cohort", f"{tmp_path / 'cohort.yaml'}", "--store", f"{tmp_path / 'store'}"]
    runner = CliRunner()
    done = runner.invoke(app, ["encoder", "train", "e", *arguments])
    assert done.exit_code == 0, done.output
    assert "128/128" in done.output
    encoder = load_encoder(tmp_path / "store" / "encoders" / "e")
    assert encoder.card.training["patches_seen"] == 128
    made = tmp_path / "store" / "patch_tasks" / "64px-0.5um" / "stripes"
    first = made.stat().st_ino
    runner.invoke(app, ["encoder", "train", "e", *arguments])
    assert made.stat().st_ino == first  # unchanged, so not made again
    file = tmp_path / "cohort.yaml"
    file.write_text(file.read_text().replace("folder:", "classes: [fine, coarse], folder:"))
    runner.invoke(app, ["encoder", "train", "e", *arguments])
    card = load_encoder(tmp_path / "store" / "encoders" / "e").card
    assert card.tasks == {"stripes": ("fine", "coarse")}
    assert encoder.card.tasks == {"stripes": ("coarse", "fine")}
    unknown = runner.invoke(app, ["encoder", "train", "f", *arguments])
    assert unknown.exit_code == 1
    assert "'f'" in unknown.output
    assert "Traceback" not in unknown.output

"""Tests of the study of fine-tuning: each ingredient does what it is named for."""

from __future__ import annotations

import copy

import numpy as np
import polars as pl
import pytest
import torch

from nic_core.cohort import EncoderSpec
from nic_core.encoders.encoder import build_encoder
from nic_core.encoders.patch_tasks import PatchDataset
from nic_core.encoders.training_loop import fit
from studies.fine_tuning import PARTS, FineTuning, Way
from studies.tissue_tasks import dataset

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module")
def task() -> PatchDataset:
    """A task of two textures, of six patients."""
    rng = np.random.default_rng(0)
    label = np.arange(48) % 2
    grain = rng.integers(0, 120, (48, 64, 64, 3))
    smooth = grain.mean((1, 2), keepdims=True) + grain // 8
    pixels = np.where(label[:, None, None, None], grain, smooth).astype(np.uint8)
    places = pl.DataFrame(
        {
            "source": [f"image {i}" for i in range(48)],
            "x": 0,
            "y": 0,
            "row": 0,
            "column": 0,
            "label": np.array(["smooth", "grainy"])[label],
            "group": [f"patient {i // 2 % 6}" for i in range(48)],
        }
    )
    return dataset("texture", "none", ("smooth", "grainy"), 0.5, pixels, places, seed=0)


def tuned(task: PatchDataset, way: Way) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return the change of each tensor of the encoder, and the distance in each epoch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_encoder("tellez2020", patch=64, embedding_size=8)
        before = copy.deepcopy(network.state_dict())
        objective = FineTuning(network, [task], way, batch=16, validation=16, seed=0)
        spec = EncoderSpec(
            name="tuned",
            objective="mtl",
            tasks=("texture", "other"),
            batch=16,
            patches_seen=16 * way.steps,
            precision="float32",
        )
        # the last weights, whatever the validation says
        objective.selection = None
        history, _ = fit(objective, spec, learning_rate=way.rate)
    after = network.state_dict()
    changes = {name: (after[name].double() - before[name].double()).abs().max() for name in after}
    return changes, history["distance"].to_list()


def statistics(changes: dict[str, torch.Tensor]) -> float:
    return max(float(change) for name, change in changes.items() if "running" in name)


def weights(changes: dict[str, torch.Tensor]) -> float:
    return max(float(change) for name, change in changes.items() if name.endswith("weight"))


def test_kept_statistics_do_not_move_but_weights_do(task):
    changes, _ = tuned(task, Way(steps=STEPS, keep_statistics=True))
    assert statistics(changes) == 0
    assert weights(changes) > 0


def test_statistics_move_by_default(task):
    changes, _ = tuned(task, Way(steps=STEPS))
    assert statistics(changes) > 0


def test_the_encoder_stays_while_only_heads_are_trained(task):
    changes, distances = tuned(task, Way(steps=STEPS, heads_first=STEPS))
    assert statistics(changes) == weights(changes) == 0
    assert set(distances) == {0.0}


def test_replay_keeps_the_embedding_nearer_to_the_start(task):
    free, replayed = (
        tuned(task, Way(steps=30, rate=2e-3, keep_statistics=True, replay=replay))[1][-1]
        for replay in (0.0, 10.0)
    )
    assert 0 < replayed < free / 2


def test_no_patient_is_in_two_parts():
    patients = [patient for part in PARTS for patient in part]
    assert len(patients) == len(set(patients)) == 10

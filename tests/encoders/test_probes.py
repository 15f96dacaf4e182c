from __future__ import annotations

import pytest

from nic_core.cohort import EncoderSpec
from nic_core.encoders import train_encoder
from nic_core.encoders.probes import knn_probe, linear_probe

from .conftest import make_dataset


@pytest.fixture(scope="module")
def encoders():
    task = make_dataset(side=62)
    sizes = {"patch": 62, "mpp": 0.5, "code": 16, "device": "cpu"}
    mean = train_encoder(EncoderSpec(name="mean", objective="mean_rgb"), [], **sizes).encoder
    spec = EncoderSpec(
        name="one", objective="supervised", tasks=("stripes",), patches_seen=960, batch=32,
        learning_rate=3e-3,
    )  # fmt: skip
    return mean, train_encoder(spec, [task], **sizes).encoder


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_probes_tell_a_trained_encoder_from_mean_colour(encoders, probe):
    mean, trained = encoders
    unseen = make_dataset("unseen", side=62, seed=9)
    assert probe(trained, unseen).auc > 0.85
    assert probe(mean, unseen).auc < 0.75

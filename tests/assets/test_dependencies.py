"""What the platform's dependencies must do, in their lowest versions too (``make test-lowest``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.models import infer_signature

pytestmark = pytest.mark.slow


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Path]:
    """The folder of an MLflow database of its own."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.create_experiment("networks", artifact_location=(tmp_path / "artifacts").as_uri())
    yield tmp_path
    mlflow.set_tracking_uri(before)


def test_a_network_is_registered_without_a_pickle_and_loaded_again(registry):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    patches = np.zeros((2, 3, 8, 8), np.float32)
    with torch.inference_mode():
        codes = network(torch.from_numpy(patches)).numpy()
    mlflow.set_experiment("networks")
    with mlflow.start_run():
        info = mlflow.pytorch.log_model(
            network,
            name="network",
            input_example=patches,
            signature=infer_signature(patches, codes),
            pip_requirements=["torch"],
        )
        mlflow.register_model(info.model_uri, "network")

    files = {path.name for path in (registry / "artifacts").rglob("*") if path.is_file()}
    assert "model.pt2" in files
    assert not {name for name in files if name.endswith((".pth", ".pkl"))}
    again = mlflow.pytorch.load_model("models:/network/1")
    np.testing.assert_array_equal(again(torch.from_numpy(patches)).detach().numpy(), codes)

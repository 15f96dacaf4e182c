from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from nic_core.encoders import EncoderError, load_encoder, save_encoder
from nic_core.encoders.keras_import import import_keras_encoder
from nic_core.encoders.patch_sources import read_image


@pytest.mark.parametrize("name", ["multitask-4", "bigan"])
def test_released_encoders_give_the_reference_embedding(published: Path, name: str, tmp_path):
    reference = json.loads((published / "reference_embeddings.json").read_text())
    expected = np.array(reference["outputs"][name]["embedding"])
    pixels = read_image(published / "example_128.jpg")[None]
    encoder = import_keras_encoder(published / f"encoder_{name}.h5", name)
    with torch.inference_mode():
        plain = encoder.module(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    assert np.abs(plain[0] - expected).max() < 1e-4
    assert np.abs(encoder.embed(pixels)[0] - expected).max() < 1e-4
    save_encoder(tmp_path, encoder)
    assert np.array_equal(load_encoder(tmp_path).embed(pixels), encoder.embed(pixels))


def test_released_mean_rgb_gives_the_mean_of_scaled_pixels(published: Path):
    pixels = read_image(published / "example_128.jpg")[None]
    encoder = import_keras_encoder(published / "encoder_mean-rgb.h5", "mean-rgb")
    assert encoder.card.embedding_size == 3
    assert np.allclose(encoder.embed(pixels), pixels.mean((1, 2)) / 255 * 2 - 1, atol=1e-6)


def test_error_names_the_layer_that_differs(published: Path, tmp_path):
    path = tmp_path / "other.h5"
    shutil.copyfile(published / "encoder_multitask-4.h5", path)
    with h5py.File(path, "r+") as file:
        config = file.attrs["model_config"].replace('"padding": "valid"', '"padding": "same"')
        file.attrs["model_config"] = config
    with pytest.raises(EncoderError, match=r"layer 1 \(Conv2D\) has padding same, not valid"):
        import_keras_encoder(path, "x")


def test_weights_of_another_shape_are_refused(published: Path, tmp_path):
    path = tmp_path / "other.h5"
    shutil.copyfile(published / "encoder_multitask-4.h5", path)
    with h5py.File(path, "r+") as file:
        del file["model_weights/encoded/encoded/kernel:0"]
        file["model_weights/encoded/encoded/kernel:0"] = np.zeros((1152, 64), np.float32)
    with pytest.raises(EncoderError, match=r"encoded/kernel are \(1152, 64\)"):
        import_keras_encoder(path, "x")


def test_other_files_are_refused(tmp_path: Path):
    with pytest.raises(EncoderError, match="not a readable HDF5"):
        import_keras_encoder(tmp_path / "none.h5", "x")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(EncoderError, match="not a readable HDF5"):
        import_keras_encoder(tmp_path / "text.h5", "x")
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"] = np.zeros(3)
    with pytest.raises(EncoderError, match="no Keras model"):
        import_keras_encoder(tmp_path / "data.h5", "x")


def released(path: Path, change) -> Path:
    """Write a minimal file in the released format; ``change`` edits it."""
    layers = [{"class_name": "InputLayer", "config": {"name": "input"}}]
    with h5py.File(path, "w") as file:
        model = {"class_name": "Sequential", "config": {"layers": layers}}
        file.attrs["model_config"] = json.dumps(model)
        file.create_group("model_weights")
        change(file)
    return path


def damage(text: str):
    def change(file: h5py.File) -> None:
        file.attrs["model_config"] = text

    return change


def without_weights(file: h5py.File) -> None:
    del file["model_weights"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage("{"), "model_config is not JSON"),
        (damage("[1, 2]"), "layer without class or settings"),
        (damage('{"class_name": "Model", "config": 3}'), "model without layers"),
        (damage('{"class_name": "Model", "config": [{"config": {}}]}'), "layer without class"),
        (without_weights, "it has no weights"),
        (lambda file: None, "has batch_input_shape None"),
    ],
)
def test_error_names_the_damage_of_a_file(change, message, tmp_path: Path):
    with pytest.raises(EncoderError, match=message):
        import_keras_encoder(released(tmp_path / "m.h5", change), "x")


def test_a_truncated_file_is_refused(published: Path, tmp_path: Path):
    data = (published / "encoder_multitask-4.h5").read_bytes()
    for share in (0.01, 0.5, 0.99):
        (tmp_path / "cut.h5").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(EncoderError, match="not a readable HDF5"):
            import_keras_encoder(tmp_path / "cut.h5", "x")


def test_another_keras_model_is_refused(tmp_path: Path):
    layers = [{"class_name": "Dense", "config": {"name": "dense", "units": 3}}]
    with h5py.File(tmp_path / "m.h5", "w") as file:
        model = {"class_name": "Sequential", "config": layers}
        file.attrs["model_config"] = json.dumps(model)
        file.create_group("model_weights")
    with pytest.raises(EncoderError, match="layer 0 is Dense, not InputLayer"):
        import_keras_encoder(tmp_path / "m.h5", "x")

"""Import of the encoders that the authors released as Keras 2 HDF5 files [model].

The files are read with h5py, without Keras. The layer configuration is compared layer by layer
with :class:`~nic_core.encoders.networks.TellezEncoder`, and weights are copied by name. Keras
stores convolution kernels as (height, width, in, out) and dense kernels as (in, out), and flattens
in height, width, channel order, as ``TellezEncoder`` does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor, nn

from nic_core.encoders.encoder import (
    Architecture,
    Encoder,
    EncoderCard,
    encoder_tensors,
    weights_hash,
)
from nic_core.encoders.errors import EncoderError
from nic_core.encoders.networks import (
    BN_EPSILON,
    CONVOLUTIONS,
    FILTERS,
    POOLING,
    SLOPE,
    PatchEncoder,
    TellezEncoder,
)
from nic_core.encoders.objectives.mean_rgb import EMBEDDING_SIZE, mean_rgb_module

PATCH = 128
MPP = 0.5
RELEASED = {
    "encoder_multitask-4.h5": 128,
    "encoder_bigan.h5": 128,
    "encoder_mean-rgb.h5": EMBEDDING_SIZE,
}
"""Released files that were imported and compared with the authors' embeddings: embedding size."""
LICENCE = "MIT"  # of the authors' repository

Layer = dict[str, Any]


def import_keras_encoder(path: Path, name: str) -> Encoder:
    """Import the encoder of a released Keras HDF5 file, without heads.

    Supported are the multitask and BiGAN encoders (``tellez2020``) and mean-RGB. Patches are
    128 px at 0.5 um/px. The files do not record the training, so the card's objective is
    ``imported`` and its source is the name and sha256 of the file.

    Parameters
    ----------
    path : Path
        The HDF5 file.
    name : str
        Name of the encoder.

    Raises
    ------
    EncoderError
        The file is not HDF5, not a Keras model, or a model of another architecture; the message
        names the first layer that differs.
    """
    try:
        with h5py.File(path) as file:
            layers = _layers(path, file)
            weights = _weights(path, file)
    except (OSError, RuntimeError) as error:  # RuntimeError: h5py, inside a damaged file
        raise EncoderError(f"{path}: not a readable HDF5 file ({error})") from error

    kinds = [layer["class_name"] for layer in layers]
    if kinds == ["InputLayer", "GlobalAveragePooling2D"]:
        architecture: Architecture = "mean_rgb"
        module: nn.Module = mean_rgb_module()
        embedding_size = EMBEDDING_SIZE
    else:
        architecture = "tellez2020"
        embedding_size = _check_architecture(path, layers)
        network = TellezEncoder(embedding_size, PATCH // POOLING)
        _copy_weights(path, layers, weights, network)
        module = PatchEncoder(network)
    module.eval().requires_grad_(False)
    card = EncoderCard(
        name=name,
        architecture=architecture,
        objective="imported",
        patch=PATCH,
        mpp=MPP,
        embedding_size=embedding_size,
        weights_hash=weights_hash(architecture, encoder_tensors(module, {})),
        source=f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}",
    )
    return Encoder(card, module)


def _layers(path: Path, file: h5py.File) -> list[Layer]:
    """Return the model's layers in order, including those of nested models."""
    config = file.attrs.get("model_config")
    if config is None:
        raise EncoderError(
            f"{path}: no Keras model in this HDF5 file (attribute 'model_config' is missing); "
            "save the complete model, not only its weights"
        )
    try:
        return list(_flat(path, json.loads(config)))
    except (ValueError, TypeError) as error:  # TypeError: the attribute is not text
        raise _refusal(path, f"its model_config is not JSON ({error})") from error


def _flat(path: Path, model: object) -> Iterator[Layer]:
    match model:
        case {"class_name": "Model" | "Functional" | "Sequential", "config": config}:
            layers = config.get("layers") if isinstance(config, dict) else config
            if not isinstance(layers, list):
                raise _refusal(path, "its model_config has a model without layers")
            for layer in layers:
                yield from _flat(path, layer)
        case {"class_name": str(kind), "config": dict(settings)}:
            yield {"class_name": kind, "config": settings}
        case _:
            raise _refusal(path, "its model_config has a layer without class or settings")


def _weights(path: Path, file: h5py.File) -> dict[str, Tensor]:
    """Return arrays by ``<layer>/<weight>``, including those of nested models."""
    found: dict[str, Tensor] = {}

    def visit(name: str, item: object) -> None:
        # all weights of the released encoders are float32
        if isinstance(item, h5py.Dataset) and item.dtype == "float32":
            key = "/".join(name.removesuffix(":0").split("/")[-2:])
            found[key] = torch.from_numpy(item[()])

    group = file.get("model_weights")
    if not isinstance(group, h5py.Group):
        raise _refusal(path, "it has no weights (group 'model_weights' is missing)")
    group.visititems(visit)
    return found


def _check_architecture(path: Path, layers: list[Layer]) -> int:
    """Return the embedding size; raise if a layer differs from the published encoder."""
    side = PATCH // POOLING
    convolution = {
        "filters": FILTERS,
        "kernel_size": [3, 3],
        "strides": [2, 2],
        "padding": "valid",
        "data_format": "channels_last",
        "dilation_rate": [1, 1],
        "activation": "linear",
        "use_bias": True,
    }
    norm = {"axis": -1, "epsilon": BN_EPSILON, "center": True, "scale": True}
    block: list[tuple[str, Layer]] = [
        ("Conv2D", convolution),
        ("LeakyReLU", {"alpha": SLOPE}),
        ("BatchNormalization", norm),
    ]
    expected = [
        ("InputLayer", {"batch_input_shape": [None, side, side, 3]}),
        *block * CONVOLUTIONS,
        ("Flatten", {}),
        ("Dense", {"activation": "linear", "use_bias": True}),
    ]
    for number, (layer, (kind, settings)) in enumerate(zip(layers, expected, strict=False)):
        if layer["class_name"] != kind:
            raise _refusal(path, f"layer {number} is {layer['class_name']}, not {kind}")
        for setting, wanted in settings.items():
            value = layer["config"].get(setting)
            same = (
                abs(value - wanted) < 1e-6
                if isinstance(wanted, float) and isinstance(value, float)
                else value == wanted
            )
            if not same:
                raise _refusal(path, f"layer {number} ({kind}) has {setting} {value}, not {wanted}")
    if len(layers) != len(expected):
        raise _refusal(path, f"it has {len(layers)} layers, not {len(expected)}")
    embedding_size = layers[-1]["config"].get("units")
    if not isinstance(embedding_size, int) or embedding_size < 1:
        raise _refusal(path, f"its last layer has {embedding_size} units")
    return embedding_size


def _copy_weights(
    path: Path, layers: list[Layer], weights: dict[str, Tensor], network: TellezEncoder
) -> None:
    targets = [*network.convolutions, nn.Flatten(), network.dense]
    for layer, target in zip(layers[1:], targets, strict=True):
        name = layer["config"].get("name")
        arrays: dict[str, Tensor | None]
        match target:
            case nn.Conv2d():
                arrays = {"kernel": target.weight.permute(2, 3, 1, 0), "bias": target.bias}
            case nn.Linear():
                arrays = {"kernel": target.weight.T, "bias": target.bias}
            case nn.BatchNorm2d():
                arrays = {
                    "gamma": target.weight,
                    "beta": target.bias,
                    "moving_mean": target.running_mean,
                    "moving_variance": target.running_var,
                }
            case _:
                arrays = {}
        for weight, view in arrays.items():
            assert view is not None
            array = weights.get(f"{name}/{weight}")
            if array is None:
                raise _refusal(path, f"weights {name}/{weight} are missing")
            if array.shape != view.shape:
                found, wanted = tuple(array.shape), tuple(view.shape)
                raise _refusal(path, f"weights {name}/{weight} are {found}, not {wanted}")
            with torch.no_grad():
                view.copy_(array)


def _refusal(path: Path, problem: str) -> EncoderError:
    return EncoderError(f"{path}: not one of the released encoders: {problem}")

"""int8 inference of the published network on CPUs, by OpenVINO: faster, and not exact.

Convolutions multiply int8 weights with uint8 feature maps; the readout stays in float32. No patches
are needed for calibration, so the same weights always give the same int8 network [choice]:

- **Ranges of feature maps.** Every BatchNorm that follows a convolution stores the mean and the
  variance of each channel over the patches of the training. Channels are divided by their standard
  deviation, which the next convolution's weights undo, so that one scale suits all channels of a
  layer (as in cross-layer equalisation, Nagel et al. 2019). A layer's range then reaches from
  ``LOWEST`` to ``HIGHEST`` deviations from the channels' means.
- **Weights.** Each output channel has its own scale. The first convolution takes the pixels
  themselves, in 8 bits exactly. Neighbouring pixels are alike, so its rounding errors must not add
  up: each error is carried to the next weight of the kernel (:func:`_carried`). Where the kernel
  repeats every weight over the 2 x 2 px that are averaged, this gives a weight two more bits.

OpenVINO's own tool for quantization, NNCF, calibrates on patches, needs four more packages and
reports its use over the network. OpenVINO itself reports when it is imported; here it does not
(:func:`_openvino`).
"""

from __future__ import annotations

import sys
import threading
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nic_core.encoders.errors import EncoderError
from nic_core.encoders.inference import FoldedEncoder
from nic_core.encoders.networks import SLOPE, TellezEncoder
from nic_core.parallel import cores
from nic_core.torch_internals import cpu_has_vnni
from nic_core.types import Embedding

LOWEST, HIGHEST = 4.0, 16.0
"""Range of the feature maps below and above the channels' means, standard deviations [choice].

LeakyReLU shortens what is negative. Half the upper range is more exact on patches like those of the
training, and cuts off values of stains and scanners that the training did not have.
"""

STEPS = 127  # of int8 on each side of zero
LEVELS = 256  # of uint8

Floats = NDArray[np.float64]


def int8_network(name: str, network: nn.Module | None, device: torch.device) -> TellezEncoder:
    """Return the network of encoder ``name`` if it can compute in int8 on a device.

    Raises
    ------
    EncoderError
        The device is not a CPU with int8 dot products, OpenVINO is not installed, or the network is
        not that of the published encoders.
    """
    remedy = "set the precision to auto or float32"
    if not isinstance(network, TellezEncoder):
        raise EncoderError(
            f"encoder '{name}': precision int8 is for the architecture tellez2020; {remedy}"
        )
    if device.type != "cpu":
        raise EncoderError(
            f"encoder '{name}': precision int8 is for CPUs, and the device is {device}; {remedy}, "
            "or the device to cpu"
        )
    if not cpu_has_vnni():
        raise EncoderError(
            f"encoder '{name}': precision int8 needs a processor with int8 dot products "
            f"(AVX512-VNNI), which this one does not have; {remedy}"
        )
    if find_spec("openvino") is None:
        raise EncoderError(
            f"encoder '{name}': precision int8 needs OpenVINO: pip install "
            f"'nic-pathology[openvino]'; or {remedy}"
        )
    return network


class Int8Encoder(nn.Module):
    """A :class:`TellezEncoder` in int8, on one CPU core for each thread that calls it.

    Maps uint8 (B, 3, side * pooling, side * pooling) to float32 (B, C). :func:`int8_network` checks
    what it requires.

    Parameters
    ----------
    network : TellezEncoder
        Its BatchNorms hold the statistics of the training.
    pooling : int
        Pooling factor that is folded into the first convolution; 1 if the input is pooled already.
    embedding : str
        What the embedding contains; see :class:`~nic_core.encoders.networks.PatchEncoder`.
    """

    def __init__(self, network: TellezEncoder, pooling: int, embedding: Embedding) -> None:
        openvino = _openvino()
        super().__init__()
        folded = FoldedEncoder(network, pooling, embedding)
        self.readout = folded.readout
        model = _model(network, folded, pooling)
        threads = cores()
        # one core for each request; other programs may use the cores as well, so none is reserved
        settings = {
            "NUM_STREAMS": threads,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._compiled = openvino.Core().compile_model(model, "CPU", settings)
        self._requests = threading.local()

    def forward(self, pixels: Tensor) -> Tensor:
        if not hasattr(self._requests, "own"):
            self._requests.own = self._compiled.create_infer_request()
        # channels-last pixels are not copied
        rows = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        # the maps are the request's memory, which its next call overwrites; the readout copies them
        maps = self._requests.own.infer([rows], share_inputs=True, share_outputs=True)[0]
        embeddings: Tensor = self.readout(torch.from_numpy(maps))
        return embeddings


def _openvino() -> ModuleType:
    """Import OpenVINO, an extra, without its reports of use.

    Where the package openvino_telemetry is imported, OpenVINO sends an event to a server each time
    that it is imported itself; where it is absent, OpenVINO sends nothing.
    """
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    return import_module("openvino")


def _model(network: TellezEncoder, folded: FoldedEncoder, pooling: int) -> Any:
    """Return the convolutions as OpenVINO's model: uint8 (B, side, side, 3) to float32 maps.

    FakeQuantize marks where values become 8-bit integers; OpenVINO's compiler replaces the
    operations between by integer ones.
    """
    openvino = _openvino()
    operators = openvino.opset13
    side = network.side * pooling
    convolutions = [layer for layer in folded.convolutions if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in network.convolutions if isinstance(layer, nn.BatchNorm2d)]
    pixels = operators.parameter([-1, side, side, 3], openvino.Type.u8)
    maps = operators.transpose(operators.convert(pixels, "f32"), np.array([0, 3, 1, 2]))
    # of the input's channels: what they are divided by; of all channels: lowest and highest value
    scale, bounds = np.ones(3), (0.0, 255.0)
    for index, layer in enumerate(convolutions):
        assert layer.bias is not None
        weight, bias = layer.weight.double().numpy(), layer.bias.double().numpy()
        weight = weight * scale[:, None, None]
        low, high = np.float32(bounds[0]), np.float32(bounds[1])
        maps = operators.fake_quantize(maps, low, high, low, high, LEVELS)
        if index < len(convolutions) - 1:  # the last maps go to the readout in float32
            scale, bounds = _range(norms[index])
            weight, bias = weight / scale[:, None, None, None], bias / scale
        steps, size = _quantized(weight, None if index else pooling)
        kernel = operators.multiply(operators.convert(steps, "f32"), size)
        maps = operators.convolution(maps, kernel, list(layer.stride), [0, 0], [0, 0], [1, 1])
        maps = operators.add(maps, bias.astype(np.float32).reshape(1, -1, 1, 1))
        maps = operators.prelu(maps, np.array([SLOPE], np.float32))
    return openvino.Model([operators.result(maps)], [pixels], "encoder")


def _range(norm: nn.BatchNorm2d) -> tuple[Floats, tuple[float, float]]:
    """Return the deviation of each channel, and the range of all channels after division by it."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    deviation = (norm.running_var.double() + norm.eps).sqrt().numpy()
    mean = norm.running_mean.double().numpy() / deviation
    # zero is one of the levels, which integer kernels require
    low, high = min(float(mean.min()) - LOWEST, 0.0), max(float(mean.max()) + HIGHEST, 0.0)
    step = (high - low) / (LEVELS - 1)
    zero = round(-low / step)
    return deviation, (-zero * step, (LEVELS - 1 - zero) * step)


def _quantized(weight: Floats, pooling: int | None) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return weights as int8 (O, I, k, k), and the size of a step for each output (O, 1, 1, 1).

    ``pooling`` is that of the first convolution, whose rounding errors are carried; others: None.
    """
    largest = np.abs(weight).max((1, 2, 3), keepdims=True)
    largest = np.where(largest > 0, largest, 1.0)  # a channel without weights
    # a carried error adds up to one step to the largest weight
    size = largest / (STEPS if pooling is None else STEPS - 1)
    steps = np.round(weight / size) if pooling is None else _carried(weight / size, pooling)
    return steps.astype(np.int8), size.astype(np.float32)


def _carried(steps: Floats, pooling: int) -> Floats:
    """Round (O, I, k, k) so that every run of weights of one colour keeps its sum within one step.

    Runs are in the order of the kernel's blocks of ``pooling`` x ``pooling`` equal weights, and
    within each block: the sum of a block, and that of the whole kernel, are almost exact.
    """
    outputs, inputs, side, _ = steps.shape
    blocks = side // pooling
    shape = outputs, inputs, blocks, pooling, blocks, pooling
    in_order = steps.reshape(shape).transpose(0, 1, 2, 4, 3, 5)
    sums = np.round(np.cumsum(in_order.reshape(outputs, inputs, -1), axis=-1))
    rounded = np.diff(sums, prepend=0, axis=-1).reshape(in_order.shape)
    return rounded.transpose(0, 1, 2, 4, 3, 5).reshape(steps.shape)

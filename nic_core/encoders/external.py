"""Networks from elsewhere as encoders: TorchScript, ``torch.export``, timm.

One protocol: a network maps float32 (B, 3, side, side), preprocessed as its entry says, to
(B, embedding), for any B, each patch on its own. :class:`ExternalEncoder` makes it an encoder's module.

A TorchScript or exported archive is a program, and reading it can run parts of it: take one only
from whom you would take embedding. What is kept out: pickled Python objects, compiled libraries and,
of an exported graph, any operator but those of tensors and numbers. What is not: TorchScript's
operators read and write files, and torch evaluates an exported archive's symbolic shapes as
Python. Weights alone (safetensors, or a checkpoint read with ``weights_only``) run nothing.
"""

from __future__ import annotations

import copy
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from nic_core.cohort import ExternalNetwork, Preprocess, TimmModel
from nic_core.encoders.errors import EncoderError

# the graphs of an archive, since torch 2.8 and before
_GRAPHS = re.compile(r"(^|/)(models/[^/]+\.json|serialized_exported_program\.json)$")
_REFUSED_MEMBERS = re.compile(r"/aotinductor/|/(opaque|custom)_obj_[^/]*$")
_OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims?)\.(?!from_file\b)\w+\.\w+"
    r"|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
    r"|torch\.sym_\w+|math\.\w+"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_)"
)


class ExternalEncoder(nn.Module):
    """uint8 (B, 3, P, P) to embedding, float32 (B, C), by a network that was made elsewhere.

    Pixels are divided by 255, resized (bilinear, antialiased) where the network's input is of
    another side, and standardised by the entry's mean and standard deviation. ``archive`` is the
    file of a network that is a program of its own: it cannot be written anew, only copied.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, preprocess: Preprocess, archive: Path | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.archive = archive
        self.side = preprocess.resize
        for name, values in (("mean", preprocess.mean), ("std", preprocess.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        scaled = pixels.float() / 255
        if self.side is not None and self.side != scaled.shape[-1]:
            side = (self.side, self.side)
            scaled = functional.interpolate(scaled, side, mode="bilinear", antialias=True)
        # an exported graph may view its input as lying in the usual order
        embeddings: Tensor = self.network(((scaled - self.mean) / self.std).contiguous())
        return embeddings.float()

    def train(self, mode: bool = True) -> ExternalEncoder:
        """Nothing: the network stays as it came; an exported one cannot change its mode."""
        return self

    def on(self, device: torch.device) -> ExternalEncoder:
        """This module on ``device``: itself if it is there."""
        return self if self.mean.device.type == device.type else copy.deepcopy(self).to(device)


def read_torchscript(path: Path) -> nn.Module:
    """A TorchScript network, on the CPU, in evaluation mode.

    Raises
    ------
    EncoderError
        Missing, or no TorchScript archive.
    """
    try:
        network: nn.Module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    except (ValueError, RuntimeError) as error:
        raise EncoderError(f"{path}: not a TorchScript network: {_first_line(error)}") from error
    return network.eval()


def read_exported(path: Path) -> nn.Module:
    """A network from a ``torch.export`` archive.

    Raises
    ------
    EncoderError
        Missing, no such archive, one of another version of torch, or one that holds more than
        tensors and a graph of tensor operators.
    """
    _refuse_unsafe(path)
    try:
        with _tensors_only():
            return torch.export.load(path).module()
    except Exception as error:  # of many types, by what is wrong and by torch's version
        raise EncoderError(
            f"{path}: torch {torch.__version__} cannot read this export ({_first_line(error)}); "
            "export it again with this version"
        ) from error


def timm_network(timm_model: TimmModel) -> nn.Module:
    """A timm model with initial weights and without classifier, in evaluation mode.

    Raises
    ------
    EncoderError
        timm is missing or does not import, or has no such model.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch
        raise EncoderError(
            f"model '{timm_model.model}' needs timm, which does not import "
            f"({_first_line(error)}): pip install 'nic[timm]', with the torchvision of your torch"
        ) from error
    try:
        network: nn.Module = timm.create_model(
            timm_model.model, pretrained=False, num_classes=0, **timm_model.arguments
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise EncoderError(f"timm model '{timm_model.model}': {_first_line(error)}") from error
    return network.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from safetensors or a torch checkpoint that holds nothing else.

    Raises
    ------
    EncoderError
        Unreadable, or with other objects than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
        raise EncoderError(
            f"{path}: not a file of weights alone ({_first_line(error)}); "
            "save the network's state_dict as safetensors"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise EncoderError(f"{path}: not a state_dict; save the network's state_dict")
    return tensors


def check_module(name: str, module: nn.Module, network: ExternalNetwork) -> None:
    """Try a foreign encoder on random patches.

    Raises
    ------
    EncoderError
        It takes other input, gives other output, or a patch's embedding depends on chance or on the
        rest of its batch.
    """
    generator = torch.Generator().manual_seed(0)
    size = (3, 3, network.patch, network.patch)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    side = network.preprocess.resize or network.patch
    try:
        with torch.inference_mode():
            embeddings, alone = module(pixels), module(pixels[:1])
    except Exception as error:  # whatever a foreign network raises
        raise EncoderError(
            f"encoder '{name}': its network does not take float32 (B, 3, {side}, {side}) for B of "
            f"1 and of 3 ({_first_line(error)}); export it with a dynamic batch, or set 'resize' "
            "to the side it takes"
        ) from error
    wanted = (3, network.embedding_size)
    if tuple(embeddings.shape) != wanted or not embeddings.isfinite().all():
        raise EncoderError(
            f"encoder '{name}': its network gives {tuple(embeddings.shape)} for 3 patches, not finite "
            f"numbers {wanted}; set 'embedding', or export it with its pooling"
        )
    if not torch.allclose(
        embeddings[:1], alone, rtol=1e-3, atol=1e-4 * float(embeddings.abs().max())
    ):
        raise EncoderError(
            f"encoder '{name}': a patch's embedding depends on the rest of its batch, or on chance; "
            "export the network in evaluation mode"
        )


def _refuse_unsafe(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            graphs = [json.loads(archive.read(name)) for name in names if _GRAPHS.search(name)]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise EncoderError(f"{path}: not a torch.export archive: {_first_line(error)}") from error
    if not graphs:
        raise EncoderError(f"{path}: not a torch.export archive: it holds no graph")
    refused = [name for name in names if _REFUSED_MEMBERS.search(name)]
    refused += [op for op in sorted(_targets(graphs)) if not _OPERATORS.fullmatch(op)]
    if refused or len(set(names)) < len(names):
        raise EncoderError(
            f"{path}: holds more than tensors and tensor operators: "
            f"{', '.join(refused[:3]) or 'two members of one name'}; it is not loaded"
        )


def _targets(part: Any) -> set[str]:
    """What the nodes of a serialized graph, and of the graphs within it, call."""
    if isinstance(part, list):
        return {target for item in part for target in _targets(item)}
    if not isinstance(part, dict):
        return set()
    own = {str(part["target"])} if {"target", "inputs", "outputs"} <= part.keys() else set()
    return own.union(*map(_targets, part.values()))


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Every ``torch.load`` in this block unpickles tensors and nothing else.

    Torch's reader of exported archives asks for arbitrary objects where that fails.
    """
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

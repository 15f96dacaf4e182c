"""External networks as encoders: TorchScript, ``torch.export`` and timm.

An external network maps float32 (B, 3, side, side), preprocessed as its entry in the cohort file
specifies, to (B, C) for any B, and the embedding of a patch does not depend on the other patches.
:class:`ExternalEncoder` wraps it as the module of an encoder.

Security: a TorchScript or exported archive is a program, and reading it can execute parts of it.
Only load archives from sources whose code you would run. Refused are pickled Python objects,
compiled libraries and, in exported graphs, every operator except those on tensors and numbers. Not
prevented: TorchScript operators can read and write files, and PyTorch evaluates the symbolic shapes
of an exported archive as Python. Files of weights (safetensors, or a checkpoint read with
``weights_only``) execute nothing.
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

from nic_core.cohort import ExternalNetwork, Preprocess, TimmModel, Tokens
from nic_core.encoders.errors import EncoderError
from nic_core.version import DISTRIBUTION

_LFS_POINTER = b"version https://git-lfs"  # how such a file begins
# paths of the graphs inside an archive: since PyTorch 2.8, and before
_GRAPHS = re.compile(r"(^|/)(models/[^/]+\.json|serialized_exported_program\.json)$")
_REFUSED_MEMBERS = re.compile(r"/aotinductor/|/(opaque|custom)_obj_[^/]*$")
_OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims?)\.(?!from_file\b)\w+\.\w+"
    r"|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
    r"|torch\.sym_\w+|math\.\w+"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_)"
)


class ExternalEncoder(nn.Module):
    """uint8 (B, 3, P, P) to embedding, float32 (B, C), by an external network.

    Pixels are divided by 255, resized (bilinear, antialiased) to the entry's ``resize`` if the
    patch has another side, cropped to its central ``crop`` x ``crop`` px, and standardised by the
    entry's mean and standard deviation. The network returns embeddings or, with ``tokens``, the
    tokens of a vision transformer, which :func:`pool_tokens` pools. ``archive`` is the file of a
    TorchScript or exported network, which can only be copied, not written.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        preprocess: Preprocess,
        archive: Path | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.archive = archive
        self.side = preprocess.resize
        self.crop = preprocess.crop
        self.tokens = tokens
        for name, values in (("mean", preprocess.mean), ("std", preprocess.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        scaled = pixels.float() / 255
        if self.side is not None and self.side != scaled.shape[-1]:
            side = (self.side, self.side)
            scaled = functional.interpolate(scaled, side, mode="bilinear", antialias=True)
        if self.crop is not None:
            first = (scaled.shape[-1] - self.crop) // 2
            inner = slice(first, first + self.crop)
            scaled = scaled[..., inner, inner]
        # an exported graph may contain views that require a contiguous input
        embeddings: Tensor = self.network(((scaled - self.mean) / self.std).contiguous())
        if self.tokens is not None:
            prefix: int = self.network.num_prefix_tokens  # type: ignore[assignment]
            embeddings = pool_tokens(embeddings, self.tokens, prefix)
        return embeddings.float()

    def train(self, mode: bool = True) -> ExternalEncoder:
        """Do nothing: the network stays in evaluation mode, as an exported graph must."""
        return self

    def on(self, device: torch.device) -> ExternalEncoder:
        """Return this module if it is on ``device``, otherwise a copy on ``device``."""
        return self if self.mean.device.type == device.type else copy.deepcopy(self).to(device)


def pool_tokens(output: Tensor, tokens: Tokens, prefix: int) -> Tensor:
    """Pool the output tokens of a vision transformer.

    Parameters
    ----------
    output : float (B, prefix + N, C)
        The class token, the register tokens, and the tokens of N squares of the patch.
    tokens : str
        ``class``: the class token, (B, C). ``mean``: the mean of the N patch tokens, (B, C).
        ``class+mean``: the first and then the second, (B, 2 C).
    prefix : int
        Number of class and register tokens.
    """
    if tokens == "class":
        return output[:, 0]
    mean = output[:, prefix:].mean(1)
    return mean if tokens == "mean" else torch.cat((output[:, 0], mean), 1)


def read_torchscript(path: Path) -> nn.Module:
    """Read a TorchScript network onto the CPU, in evaluation mode.

    Raises
    ------
    EncoderError
        The file is missing or is not a TorchScript archive.
    """
    try:
        network: nn.Module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    except (ValueError, RuntimeError) as error:
        raise EncoderError(f"{path}: not a TorchScript network: {_first_line(error)}") from error
    return network.eval()


def read_exported(path: Path) -> nn.Module:
    """Read a network from a ``torch.export`` archive.

    Raises
    ------
    EncoderError
        The file is missing, is not such an archive, was exported by an incompatible version of
        PyTorch, or contains more than tensors and a graph of tensor operators.
    """
    _refuse_unsafe(path)
    try:
        with _tensors_only():
            return torch.export.load(path).module()
    except Exception as error:  # PyTorch raises many types, which differ between versions
        raise EncoderError(
            f"{path}: PyTorch {torch.__version__} cannot read this exported network "
            f"({_first_line(error)}); export it again with this version"
        ) from error


def timm_network(timm_model: TimmModel) -> nn.Module:
    """Return a timm model with initial weights and without classifier, in evaluation mode.

    With ``tokens`` the model returns all its tokens, else embeddings.

    Raises
    ------
    EncoderError
        timm is not installed, cannot be imported, or has no such model; or the model has no class
        token, which ``tokens`` requires.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another PyTorch
        raise EncoderError(
            f"model '{timm_model.model}' needs timm, which cannot be imported "
            f"({_first_line(error)}); run pip install '{DISTRIBUTION}[timm]', with the torchvision "
            "release that matches your PyTorch"
        ) from error
    arguments: dict[str, Any] = dict(timm_model.arguments)
    if isinstance(layer := arguments.get("mlp_layer"), str):
        if not hasattr(timm.layers, layer):
            raise EncoderError(
                f"timm model '{timm_model.model}': timm.layers has no mlp_layer '{layer}'"
            )
        arguments["mlp_layer"] = getattr(timm.layers, layer)
    if timm_model.tokens is not None:
        arguments["global_pool"] = ""
    try:
        network: nn.Module = timm.create_model(
            timm_model.model, pretrained=False, num_classes=0, **arguments
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise EncoderError(f"timm model '{timm_model.model}': {_first_line(error)}") from error
    if timm_model.tokens is not None and not getattr(network, "has_class_token", False):
        raise EncoderError(
            f"timm model '{timm_model.model}' is not a vision transformer with a class token: "
            "leave 'tokens' out"
        )
    return network.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors file or a PyTorch checkpoint of tensors only.

    A checkpoint may hold the tensors under one key, beside numbers and texts, and their names may
    begin with ``module.``, which training on several GPUs adds.

    Raises
    ------
    EncoderError
        The file cannot be read, contains objects of other types, or holds several networks.
    """
    remedy = "save the network's state_dict as safetensors"
    try:
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise EncoderError(
                    f"{path}: a pointer of Git LFS, not the weights; run 'git lfs pull' in its "
                    "repository, or download the file itself"
                )
        tensors: Any
        if path.suffix.lower() == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # PyTorch's message recommends to execute the file
        raise EncoderError(
            f"{path}: not a checkpoint, or one with other objects than tensors, which reading it "
            f"would execute; {remedy}"
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise EncoderError(
            f"{path}: not a file of weights only ({_first_line(error)}); {remedy}"
        ) from error
    found = {"": tensors} if _is_weights(tensors) else {}
    if not found and isinstance(tensors, dict):
        found = {str(key): part for key, part in tensors.items() if _is_weights(part)}
    if len(found) != 1:
        problem = f"it holds several: {', '.join(found)}" if found else "it holds none"
        raise EncoderError(f"{path}: not one state_dict of tensors ({problem}); {remedy}")
    (weights,) = found.values()
    prefix = "module." if all(name.startswith("module.") for name in weights) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def _is_weights(part: object) -> bool:
    return (
        isinstance(part, dict) and bool(part) and all(isinstance(t, Tensor) for t in part.values())
    )


def check_module(name: str, module: nn.Module, network: ExternalNetwork) -> None:
    """Check the module of an external network on random patches.

    Raises
    ------
    EncoderError
        Its input or output has another shape than ``network`` declares, or the embedding of a
        patch is random or depends on the rest of the batch.
    """
    generator = torch.Generator().manual_seed(0)
    size = (3, 3, network.patch, network.patch)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    side = network.preprocess.input_side(network.patch)
    try:
        with torch.inference_mode():
            embeddings, alone = module(pixels), module(pixels[:1])
    except Exception as error:  # an external network may raise anything
        raise EncoderError(
            f"encoder '{name}': the network does not accept float32 (B, 3, {side}, {side}) for "
            f"B = 1 and B = 3 ({_first_line(error)}); export it with a dynamic batch size, or set "
            "'resize' to the side of its input"
        ) from error
    wanted = (3, network.embedding_size)
    if tuple(embeddings.shape) != wanted or not embeddings.isfinite().all():
        raise EncoderError(
            f"encoder '{name}': the network's output for 3 patches has shape "
            f"{tuple(embeddings.shape)}, but finite numbers {wanted} are required; correct "
            "'embedding_size', or export the network with its pooling"
        )
    if not torch.allclose(
        embeddings[:1], alone, rtol=1e-3, atol=1e-4 * float(embeddings.abs().max())
    ):
        raise EncoderError(
            f"encoder '{name}': the embedding of a patch is random or depends on the rest of the "
            "batch; export the network in evaluation mode"
        )


def _refuse_unsafe(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            graphs = [json.loads(archive.read(name)) for name in names if _GRAPHS.search(name)]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise EncoderError(f"{path}: not a torch.export archive: {_first_line(error)}") from error
    if not graphs:
        raise EncoderError(f"{path}: not a torch.export archive: it contains no graph")
    refused = [name for name in names if _REFUSED_MEMBERS.search(name)]
    refused += [op for op in sorted(_targets(graphs)) if not _OPERATORS.fullmatch(op)]
    if refused or len(set(names)) < len(names):
        raise EncoderError(
            f"{path}: refused, because it contains more than tensors and tensor operators: "
            f"{', '.join(refused[:3]) or 'two members with the same name'}; export the network "
            "without custom operators"
        )


def _targets(part: Any) -> set[str]:
    """Return the operators that a serialized graph and its nested graphs call."""
    if isinstance(part, list):
        return {target for item in part for target in _targets(item)}
    if not isinstance(part, dict):
        return set()
    own = {str(part["target"])} if {"target", "inputs", "outputs"} <= part.keys() else set()
    return own.union(*map(_targets, part.values()))


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Restrict every ``torch.load`` in this block to tensors.

    Otherwise ``torch.export.load`` retries a failed ``torch.load`` with arbitrary objects.
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

"""The encoder object: a network with its classification heads and its card."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from torch import Tensor, nn

from nic_core.cohort import Preprocess, TimmModel
from nic_core.devices import resolve_device, resolve_precision
from nic_core.encoders.errors import EncoderError
from nic_core.encoders.external import ExternalEncoder
from nic_core.encoders.inference import (
    MemoryBoundModule,
    PreparedEncoder,
    autocast,
    embed_patches,
    fast_module,
)
from nic_core.encoders.int8 import Int8Encoder, int8_network
from nic_core.encoders.networks import (
    ClassHead,
    MeanRGB,
    PatchEncoder,
    StridedEncoder,
    TellezEncoder,
    channels_last,
    convolved_side,
    full_size,
    pooled_side,
)
from nic_core.encoders.scores import TaskScores
from nic_core.types import Embedding, GridPrecision, Reading, RequestedGridPrecision

Architecture = Literal[
    "mean_rgb", "tellez2020", "tellez2019", "timm", "torchscript", "torch.export", "features"
]


class InitialWeightsRecord(BaseModel):
    """The encoder that a training started from.

    Attributes
    ----------
    origin
        The encoder of the study, the file with its sha256, or the registered version.
    weights_hash
        Of that encoder.
    mpp
        Resolution of its patches, um/px.
    training_recorded
        Whether the data are known that it, and the encoders that it started from in turn, were
        trained on. They are not for a released Keras encoder.
    frozen_blocks
        Number of first convolution blocks that were not trained.
    heads
        Tasks whose heads were taken over.
    data
        Patch task -> content hash of these datasets, as far as they are known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    origin: str
    weights_hash: str
    mpp: PositiveFloat
    training_recorded: bool
    frozen_blocks: int
    heads: tuple[str, ...]
    data: dict[str, str] = {}


class EncoderCard(BaseModel):
    """Metadata of an encoder, stored as ``card.json`` beside its weights.

    Attributes
    ----------
    format
        Version of this schema; :func:`~nic_core.encoders.files.read_card` refuses others.
    tasks
        Classification heads: task -> classes, in the order of the logits.
    task_mpp
        Patch task -> um/px of the patches that the training saw.
    patch, mpp
        Side of a patch, px, and its resolution on slides, um/px.
    embedding_size
        Length C of an embedding.
    embedding
        What an embedding contains; see :class:`~nic_core.encoders.networks.PatchEncoder`.
    dense_size
        Length of the dense code, the input of the heads, where it differs from the embedding's.
    pixels
        Scaling of the pixels before the network; None without a network.
    timm
        The timm model, for architecture ``timm``.
    preset
        Name of the published network (:mod:`nic_core.cohort.presets`), if the entry named one.
    weights_hash
        sha256 of architecture and weights; for an external network, of preprocessing and file; for
        architecture ``features``, which has no network, of the files with the embeddings.
    training
        Settings of the training, and which weights were kept.
    initial_weights
        The encoder that the training started from; None: random weights.
    data
        Patch task -> content hash of the dataset trained on.
    scores
        Scores on the test split of each task.
    source
        Origin of the weights of an imported encoder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[4] = 4
    name: str
    architecture: Architecture
    objective: str
    tasks: dict[str, tuple[str, ...]] = {}
    task_mpp: dict[str, PositiveFloat] = {}
    patch: PositiveInt
    mpp: PositiveFloat
    embedding_size: PositiveInt
    embedding: Embedding = "dense"
    dense_size: PositiveInt | None = None
    pixels: Literal["uint8 RGB / 255 * 2 - 1"] | Preprocess | None = "uint8 RGB / 255 * 2 - 1"
    timm: TimmModel | None = None
    preset: str | None = None
    weights_hash: str
    training: dict[str, int | float | str] = {}
    initial_weights: InitialWeightsRecord | None = None
    data: dict[str, str] = {}
    scores: dict[str, TaskScores] = {}
    software: dict[str, str] = {}
    source: str | None = None

    @property
    def code_size(self) -> int:
        """Length of the dense code, the input of the heads."""
        return self.dense_size or self.embedding_size

    @property
    def function(self) -> str:
        """Architecture, preprocessing and embedding, which the hash covers besides the weights."""
        if isinstance(self.pixels, Preprocess):
            return f"{self.architecture} {self.timm!r} {self.pixels!r}"
        if self.embedding != "dense":
            return f"{self.architecture} {self.embedding}"
        return self.architecture

    @property
    def training_recorded(self) -> bool:
        """Whether all data that the weights were trained on are known (:attr:`seen_data`)."""
        start = self.initial_weights
        return self.objective not in ("imported", "features") and (
            start is None or start.training_recorded
        )

    @property
    def seen_data(self) -> dict[str, str]:
        """Patch task -> content hash of every known dataset that the weights were trained on."""
        earlier = {} if self.initial_weights is None else self.initial_weights.data
        return earlier | self.data


@dataclass(frozen=True)
class Encoder:
    """A frozen network that maps patches to embeddings, with its heads and its card.

    Attributes
    ----------
    card : EncoderCard
    module : nn.Module
        Maps uint8 (B, 3, P, P) to float32 (B, C), including pixel scaling and pooling.
    heads : mapping of str to nn.Module
        For each supervised task, maps embeddings (B, C) to logits (B, classes).
    """

    card: EncoderCard
    module: nn.Module
    heads: Mapping[str, nn.Module] = field(default_factory=dict)

    def prepare(
        self,
        device: str = "auto",
        precision: RequestedGridPrecision = "auto",
        reading: Reading = "patch",
    ) -> PreparedEncoder:
        """Optimise the encoder for inference; in float32 its embeddings stay the same.

        Parameters
        ----------
        device : str
            ``auto`` (CUDA if available), ``cpu``, ``cuda`` or ``cuda:1``.
        precision : str
            ``float32``, ``bfloat16``, ``int8``, or ``auto``: bfloat16 if the device has matrix
            units for it, else float32. Mean-RGB is computed in float32 in any case.
        reading : str
            ``patch``, or ``input``: pixels at the resolution of the network's input. For a network
            without pooling ``input`` is the same as ``patch``.

        Raises
        ------
        ValueError
            The device does not exist.
        EncoderError
            The precision is int8, which the network, the device or the installation does not
            permit; see :func:`~nic_core.encoders.int8.int8_network`.
        """
        at = resolve_device(device)
        network = self.module.network if isinstance(self.module, PatchEncoder) else None
        chosen: GridPrecision
        if isinstance(self.module, MeanRGB):
            chosen = "float32"  # a mean is not faster in another precision
        else:
            chosen = precision if precision == "int8" else resolve_precision(precision, at)
        pooling = network.pooling if network is not None and reading == "input" else 1
        if chosen == "int8":
            published = int8_network(self.card.name, network, at)
            factor = published.pooling // pooling
            module: nn.Module = Int8Encoder(published, factor, self.card.embedding)
        elif isinstance(network, TellezEncoder):
            module = fast_module(
                network,
                pooling=network.pooling // pooling,
                device=at,
                precision=chosen,
                embedding=self.card.embedding,
            )
        elif isinstance(self.module, ExternalEncoder):
            module = MemoryBoundModule(autocast(self.module.on(at), at, chosen))
        else:
            module = copy.deepcopy(self.module).eval()
            channels_last(module)
            module = autocast(module.to(at), at, chosen)
        return PreparedEncoder(
            card=self.card,
            module=module,
            side=self.card.patch // pooling,
            mpp=self.card.mpp * pooling,
            device=at,
            precision=chosen,
            reading="patch" if pooling == 1 else "input",
        )

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed patches: uint8 (B, P, P, 3) to float32 (B, C).

        Raises
        ------
        EncoderError
            The patches have another dtype or shape.
        """
        side = self.card.patch
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (side, side, 3):
            raise EncoderError(
                f"encoder '{self.card.name}' takes uint8 patches (B, {side}, {side}, 3), "
                f"not {pixels.dtype} {pixels.shape}"
            )
        return embed_patches(self._prepared, pixels)

    @cached_property
    def _prepared(self) -> PreparedEncoder:
        return self.prepare(precision="float32")


def task_probabilities(
    encoder: Encoder, task: str, embeddings: NDArray[np.floating]
) -> NDArray[np.float32]:
    """Classify embeddings (N, C) with the encoder's head of ``task``.

    Returns
    -------
    ndarray
        Class probabilities, float32 (N, classes), in the order of ``encoder.card.tasks[task]``.

    Raises
    ------
    EncoderError
        The encoder has no head for ``task``, or the embeddings have another length, or lack the
        dense code, which is the input of the heads.
    """
    if task not in encoder.heads:
        known = ", ".join(encoder.heads) or "none"
        raise EncoderError(
            f"encoder '{encoder.card.name}' has no head for task '{task}'; it has: {known}"
        )
    if encoder.card.embedding == "pooled":
        raise EncoderError(
            f"encoder '{encoder.card.name}' has pooled embeddings, but its heads take the dense "
            "code; set 'embedding: both' or 'embedding: dense'"
        )
    if embeddings.ndim != 2 or embeddings.shape[1] != encoder.card.embedding_size:
        raise EncoderError(
            f"encoder '{encoder.card.name}' has embeddings of shape "
            f"(N, {encoder.card.embedding_size}), not {embeddings.shape}"
        )
    head = encoder.heads[task].eval()
    device = next(head.parameters()).device
    with torch.inference_mode():
        code = embeddings[:, : encoder.card.code_size].astype(np.float32)
        logits = head(torch.as_tensor(code, device=device))
        probabilities: NDArray[np.float32] = logits.softmax(1).cpu().numpy()
    return probabilities


def build_encoder(architecture: str, *, patch: int, embedding_size: int) -> PatchEncoder:
    """Return an encoder network with initial weights for patches of ``patch`` x ``patch`` px.

    ``embedding_size`` is the length of the dense code, which is its embedding.
    """
    if architecture == "tellez2019":
        return PatchEncoder(StridedEncoder(embedding_size, patch))
    return PatchEncoder(TellezEncoder(embedding_size, pooled_side(patch)))


def with_embedding(encoder: Encoder, embedding: Embedding) -> Encoder:
    """Return the same weights and heads with another content of the embedding.

    Raises
    ------
    EncoderError
        The network is not that of the published encoders of 2020, or its last feature maps have
        one position only.
    """
    module, card = encoder.module, encoder.card
    if embedding == card.embedding:
        return encoder
    if not isinstance(module, PatchEncoder) or not isinstance(module.network, TellezEncoder):
        raise EncoderError(
            f"encoder '{card.name}': 'embedding: {embedding}' is for the architecture tellez2020, "
            f"not {card.architecture}; leave 'embedding' out"
        )
    if convolved_side(module.network.side) < 2:
        raise EncoderError(
            f"encoder '{card.name}': the last feature maps of patches of {card.patch} px have one "
            "position, so they have no deviation over positions; leave 'embedding' out, or use "
            "patches of 94 px or more"
        )
    code = card.code_size
    changed = card.model_copy(
        update={
            "embedding": embedding,
            "embedding_size": full_size(embedding, code),
            "dense_size": None if embedding == "dense" else code,
        }
    )
    tensors = encoder_tensors(module, encoder.heads)
    changed = changed.model_copy(update={"weights_hash": weights_hash(changed.function, tensors)})
    return Encoder(changed, PatchEncoder(module.network, embedding), encoder.heads)


def build_module(card: EncoderCard) -> nn.Module:
    """Return a module of the card's architecture with initial weights."""
    if card.architecture == "mean_rgb":
        return MeanRGB()
    encoder = build_encoder(card.architecture, patch=card.patch, embedding_size=card.code_size)
    return PatchEncoder(encoder.network, card.embedding)


def build_heads(tasks: Mapping[str, tuple[str, ...]], code_size: int) -> dict[str, nn.Module]:
    """Return a classification head with initial weights for each task."""
    return {task: ClassHead(code_size, len(classes)) for task, classes in tasks.items()}


def encoder_tensors(module: nn.Module, heads: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return all tensors of an encoder by name (``encoder.*``, ``heads.<task>.*``), on the CPU."""
    parts = {"encoder": module, **{f"heads.{task}": head for task, head in heads.items()}}
    return {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, owner in parts.items()
        for name, tensor in owner.state_dict().items()
    }


def weights_hash(function: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of ``function`` and of names, shapes, dtypes, bytes of the tensors.

    ``function`` is that of the card (:attr:`EncoderCard.function`); for the networks of the papers
    with their dense code it is the architecture.
    """
    digest = hashlib.sha256(function.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}{tuple(tensor.shape)}{dtype}".encode())
        # viewed as bytes, because NumPy has no bfloat16
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""Encoder files: the project's own folders, and encoders from elsewhere.

An encoder folder holds ``card.json`` and ``weights.safetensors`` or, of a network that is a
program of its own, the archive it came in (``network.pt``, ``network.pt2``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nic_core.cohort import ImportedEncoder, Preprocess
from nic_core.encoders import external as foreign
from nic_core.encoders.encoder import (
    Encoder,
    EncoderCard,
    build_heads,
    build_module,
    encoder_tensors,
    weights_hash,
)
from nic_core.encoders.errors import EncoderError
from nic_core.encoders.external import ExternalEncoder
from nic_core.encoders.keras_import import import_keras_encoder

WEIGHTS = "weights.safetensors"
CARD = "card.json"
CLASSIFIERS = ("fc.", "head.", "classifier.")  # as timm's models name theirs
PROGRAMS = {"torchscript": "network.pt", "torch.export": "network.pt2"}


def save_encoder(folder: Path, encoder: Encoder) -> None:
    """Write the encoder's weights, heads and card into ``folder`` (made if missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    module, architecture = encoder.module, encoder.card.architecture
    if isinstance(module, ExternalEncoder) and module.archive is not None:
        shutil.copyfile(module.archive, folder / PROGRAMS[architecture])
    else:
        save_file(encoder_tensors(module, encoder.heads), folder / WEIGHTS)
    (folder / CARD).write_text(encoder.card.model_dump_json(indent=2) + "\n")


def read_card(folder: Path) -> EncoderCard:
    """The card of an encoder that :func:`save_encoder` wrote.

    Raises
    ------
    EncoderError
        It is missing, or no card.
    """
    try:
        return EncoderCard.model_validate_json((folder / CARD).read_bytes())
    except OSError as error:
        raise EncoderError(f"{folder}: no encoder here ({error}); train or import one") from error
    except ValidationError as error:
        raise EncoderError(f"{folder}: not an encoder file: {error}") from error


def load_encoder(folder: Path) -> Encoder:
    """Read an encoder that :func:`save_encoder` wrote, on the CPU, in evaluation mode.

    No pickled object is read. Of a program (TorchScript, ``torch.export``) nothing runs before
    its hash is found to be the card's; see :mod:`nic_core.encoders.external`.

    Raises
    ------
    EncoderError
        A file is missing or unreadable, the tensors do not fit the card's architecture, or
        they are not those whose hash the card holds.
    """
    card, tensors = _recorded(folder)
    if card.architecture in PROGRAMS:
        return Encoder(card, _program(card, folder / PROGRAMS[card.architecture]))
    try:
        module = _timm(card) if card.architecture == "timm" else build_module(card)
        heads = build_heads(card.tasks, card.embedding_size)
        _load(module, "encoder.", tensors)
        for task, head in heads.items():
            _load(head, f"heads.{task}.", tensors)
    except (RuntimeError, ValueError) as error:  # of torch and of sizes that no network has
        raise EncoderError(f"{folder}: weights do not fit the card: {error}") from error
    return Encoder(card, module, heads)


def verify_encoder(folder: Path) -> None:
    """Compare an encoder's weights with the hash in its card; nothing of it is run.

    Raises
    ------
    EncoderError
        As of :func:`load_encoder`.
    """
    _recorded(folder)


def import_encoder(entry: ImportedEncoder, *, patch: int, mpp: float) -> Encoder:
    """The encoder of a cohort's entry, from its local file, under the entry's name.

    Parameters
    ----------
    patch, mpp
        The cohort's patch size, px, and resolution, um/px; the encoder's must be the same.

    Raises
    ------
    EncoderError
        The file is missing or is not what its entry says, or its patches are not the cohort's.
    """
    if not entry.file.exists():
        raise EncoderError(f"encoder '{entry.name}': {entry.file} does not exist")
    match entry.kind:
        case "keras":
            encoder = import_keras_encoder(entry.file, entry.name)
        case "folder":
            loaded = load_encoder(entry.file)
            card = loaded.card.model_copy(update={"name": entry.name})
            encoder = dataclasses.replace(loaded, card=card)
        case "timm" | "torchscript" | "torch.export" as architecture:
            encoder = _import_network(entry, architecture)
    card = encoder.card
    if (card.patch, card.mpp) != (patch, mpp):
        raise EncoderError(
            f"encoder '{entry.name}' takes patches of {card.patch} px at {card.mpp:g} um/px, but "
            f"the cohort's settings are patch: {patch}, mpp: {mpp:g}; change those, or leave the "
            "encoder out"
        )
    return encoder


def _recorded(folder: Path) -> tuple[EncoderCard, dict[str, Tensor]]:
    """Card and tensors (none of a program) of a folder whose weights have the card's hash."""
    card = read_card(folder)
    tensors: dict[str, Tensor] = {}
    try:
        if card.architecture in PROGRAMS:
            found = _archive_hash(card, folder / PROGRAMS[card.architecture])
        else:
            tensors = load_file(folder / WEIGHTS)
            found = weights_hash(_network(card), tensors)
    except OSError as error:
        raise EncoderError(f"{folder}: no encoder here ({error}); train or import one") from error
    except SafetensorError as error:
        raise EncoderError(f"{folder}: not an encoder file: {error}") from error
    if found != card.weights_hash:
        raise EncoderError(
            f"{folder}: the weights are not those of the card (hash differs); "
            "restore both files from one source, or train again"
        )
    return card, tensors


def _import_network(
    entry: ImportedEncoder, architecture: Literal["timm", "torchscript", "torch.export"]
) -> Encoder:
    network, path = entry.network, entry.file
    assert network is not None  # the entry's own validation
    with path.open("rb") as file:
        identity = hashlib.file_digest(file, "sha256").hexdigest()
    card = EncoderCard(
        name=entry.name,
        architecture=architecture,
        objective="imported",
        patch=network.patch,
        mpp=network.mpp,
        embedding_size=network.embedding_size,
        pixels=network.preprocess,
        timm=network.timm,
        weights_hash="",
        software={"torch": torch.__version__},
        source=f"{path.name} sha256:{identity}",
    )
    if architecture == "timm":
        module = _timm(card)
        _fill(module.network, path, foreign.read_weights(path))
        found = weights_hash(_network(card), encoder_tensors(module, {}))
    else:
        module = _program(card, path)
        found = _archive_hash(card, path)
    module.requires_grad_(False)
    foreign.check_module(entry.name, module, network)
    return Encoder(card.model_copy(update={"weights_hash": found}), module)


def _timm(card: EncoderCard) -> ExternalEncoder:
    assert card.timm is not None
    assert isinstance(card.pixels, Preprocess)
    return ExternalEncoder(foreign.timm_network(card.timm), card.pixels)


def _program(card: EncoderCard, archive: Path) -> ExternalEncoder:
    assert isinstance(card.pixels, Preprocess)
    read = (
        foreign.read_exported if card.architecture == "torch.export" else foreign.read_torchscript
    )
    return ExternalEncoder(read(archive), card.pixels, archive)


def _fill(network: nn.Module, path: Path, tensors: dict[str, Tensor]) -> None:
    """Load a checkpoint into a network; it may hold a classifier that the network lacks."""
    try:
        missing, other = network.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # sizes differ
        raise EncoderError(f"{path}: weights do not fit the network: {error}") from error
    other = [name for name in other if not name.startswith(CLASSIFIERS)]
    if missing or other:
        raise EncoderError(
            f"{path}: weights do not fit the network: missing {missing[:3]}, unknown {other[:3]}"
        )


def _network(card: EncoderCard) -> str:
    """What the hash of an encoder's weights covers beside them: all that makes the function."""
    if isinstance(card.pixels, Preprocess):
        return f"{card.architecture} {card.timm!r} {card.pixels!r}"
    return card.architecture


def _archive_hash(card: EncoderCard, archive: Path) -> str:
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(_network(card).encode())
    return digest.hexdigest()


def _load(module: nn.Module, prefix: str, tensors: dict[str, Tensor]) -> None:
    module.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    module.eval().requires_grad_(False)

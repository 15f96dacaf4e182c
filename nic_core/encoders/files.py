"""Files of encoders: save, load and verify encoder folders, and import external encoders.

An encoder folder contains ``card.json`` and either ``weights.safetensors`` or the archive of a
TorchScript or exported network (``network.pt``, ``network.pt2``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nic_core.cohort import FILE_KINDS, ExternalNetwork, Geometry, ImportedEncoder, Preprocess
from nic_core.cohort.presets import PRESETS
from nic_core.encoders.encoder import (
    Encoder,
    EncoderCard,
    build_heads,
    build_module,
    encoder_tensors,
    weights_hash,
    with_embedding,
)
from nic_core.encoders.errors import EncoderError
from nic_core.encoders.external import (
    ExternalEncoder,
    check_module,
    read_exported,
    read_torchscript,
    read_weights,
    timm_network,
)
from nic_core.encoders.folder_names import CARD, PROGRAMS, WEIGHTS
from nic_core.encoders.keras_import import import_keras_encoder
from nic_core.encoders.weight_names import timm_names

CARD_FORMAT: int = EncoderCard.model_fields["format"].default
CLASSIFIERS = ("fc.", "head.", "classifier.")  # names of the classifier in timm's models


def save_encoder(folder: Path, encoder: Encoder) -> None:
    """Write the encoder's weights, heads and card into ``folder``, created if necessary."""
    save_card(folder, encoder.card)
    module, architecture = encoder.module, encoder.card.architecture
    if isinstance(module, ExternalEncoder) and module.archive is not None:
        shutil.copyfile(module.archive, folder / PROGRAMS[architecture])
    else:
        save_file(encoder_tensors(module, encoder.heads), folder / WEIGHTS)


def save_card(folder: Path, card: EncoderCard) -> None:
    """Write a card into ``folder``, created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).write_text(card.model_dump_json(indent=2) + "\n")


def read_card(folder: Path) -> EncoderCard:
    """Read the card of an encoder folder.

    Raises
    ------
    EncoderError
        The card is missing, damaged or of another format.
    """
    path = folder / CARD
    remedy = "train the encoder again, or import its file again"
    try:
        content = path.read_bytes()
        values = json.loads(content)
        found = values.get("format") if isinstance(values, dict) else None
        if found != CARD_FORMAT:
            which = "no format number" if found is None else f"format {found}"
            raise EncoderError(
                f"{path}: not an encoder card of format {CARD_FORMAT} (it has {which}); {remedy}"
            )
        return EncoderCard.model_validate_json(content)
    except OSError as error:
        raise EncoderError(f"{folder}: no encoder here ({error}); train or import one") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise EncoderError(f"{path}: field '{field}': {first['msg']}; {remedy}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EncoderError(f"{path}: not an encoder card ({error}); {remedy}") from error


def load_encoder(folder: Path) -> Encoder:
    """Load an encoder folder onto the CPU, in evaluation mode.

    No pickled object is read. A TorchScript or exported network is loaded only if its hash equals
    that of the card; see :mod:`nic_core.encoders.external`.

    Raises
    ------
    EncoderError
        A file is missing or unreadable, the tensors do not match the card's architecture, or their
        hash differs from that of the card; or the folder has a card alone, since its embeddings
        were computed by other software (objective ``features``).
    """
    card, tensors = _recorded(folder)
    if card.architecture == "features":
        raise EncoderError(
            f"encoder '{card.name}' has no network, since its embeddings were computed by other "
            "software (objective 'features'); use an encoder with a network"
        )
    if card.architecture in PROGRAMS:
        return Encoder(card, _program(card, folder / PROGRAMS[card.architecture]))
    try:
        module = _timm(card) if card.architecture == "timm" else build_module(card)
        heads = build_heads(card.tasks, card.code_size)
        _load(module, "encoder.", tensors)
        for task, head in heads.items():
            _load(head, f"heads.{task}.", tensors)
    except (RuntimeError, ValueError) as error:  # shapes differ, or sizes that no network has
        raise EncoderError(
            f"{folder}: the weights do not match the card: {error}; restore both files from one "
            "source, or train again"
        ) from error
    return Encoder(card, module, heads)


def verify_encoder(folder: Path) -> None:
    """Compare the hash of an encoder's weights with its card, without loading the network.

    An encoder of objective ``features`` has no weights.

    Raises
    ------
    EncoderError
        A file is missing or unreadable, or the hash differs from that of the card.
    """
    _recorded(folder)


def import_encoder(entry: ImportedEncoder, geometry: Geometry) -> Encoder:
    """Import the encoder of a cohort file's entry from its local file.

    Parameters
    ----------
    entry : ImportedEncoder
        Gives the encoder's name and file.
    geometry : Geometry
        Patch and um/px by the cohort file (:meth:`nic_core.cohort.Cohort.geometry`); those of the
        file must be the same.

    Raises
    ------
    EncoderError
        The file is missing, contradicts the entry, or takes patches of another size or resolution.
    """
    if not entry.file.exists():
        source = (
            "" if entry.preset is None else f", or ask for it at {PRESETS[entry.preset].address}"
        )
        raise EncoderError(
            f"encoder '{entry.name}': {entry.file} does not exist; correct 'file' in the cohort "
            f"file{source}"
        )
    name = f"encoder '{entry.name}'"
    network = entry.network
    if entry.preset is not None:
        name, network = f"{name} (preset '{entry.preset}')", _preset_network(entry)
    match entry.kind:
        case "keras":
            encoder = import_keras_encoder(entry.file, entry.name)
        case "folder":
            loaded = load_encoder(entry.file)
            card = loaded.card.model_copy(update={"name": entry.name})
            encoder = dataclasses.replace(loaded, card=card)
        case "timm" | "torchscript" | "torch.export" as architecture:
            assert network is not None  # validated by ImportedEncoder
            encoder = _import_network(entry, network, architecture)
    card = encoder.card
    if (card.patch, card.mpp) != (geometry.patch, geometry.mpp):
        raise EncoderError(
            f"{name}: {entry.file.name} takes patches of {card.patch} px at {card.mpp:g} um/px, "
            f"but its entry says {geometry.patch} px at {geometry.mpp:g}; write 'patch: "
            f"{card.patch}' and 'mpp: {card.mpp:g}' in the entry"
        )
    return encoder if entry.embedding is None else with_embedding(encoder, entry.embedding)


def load_initial_weights(path: Path, name: str) -> Encoder:
    """Load an encoder that a training can start from: a Keras file or an encoder folder.

    ``name`` is the encoder that is to be trained, for messages.

    Raises
    ------
    EncoderError
        The file does not exist or is not such an encoder.
    """
    if not path.exists():
        raise EncoderError(
            f"encoder '{name}': {path} does not exist; correct 'initial_weights.file' in the "
            "cohort file"
        )
    return load_encoder(path) if path.is_dir() else import_keras_encoder(path, path.stem)


def initial_weights_version(path: Path) -> str:
    """Return a version of the weights at ``path`` without loading them.

    It is the weights hash of an encoder folder, and the sha256 of a file.

    Raises
    ------
    EncoderError
        The folder has no valid card, or the file cannot be read.
    """
    if path.is_dir():
        return read_card(path).weights_hash
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EncoderError(f"{path}: cannot be read ({error.strerror})") from error


def _preset_network(entry: ImportedEncoder) -> ExternalNetwork:
    """Return the network of the entry's preset, without ``timm`` if the file is a graph."""
    assert entry.preset is not None
    network = PRESETS[entry.preset].network
    if entry.mpp is not None:
        network = network.model_copy(update={"mpp": entry.mpp})
    if entry.kind != "timm":
        return network.model_copy(update={"timm": None})
    if network.timm is None:
        graphs = [suffix for suffix, kind in FILE_KINDS.items() if kind.startswith("torch")]
        raise EncoderError(
            f"encoder '{entry.name}': timm does not have the network of preset '{entry.preset}', "
            f"so the weights in {entry.file.name} cannot be used alone; export the network with "
            f"its weights and pooling, and give that file ({', '.join(graphs)})"
        )
    return network


def _recorded(folder: Path) -> tuple[EncoderCard, dict[str, Tensor]]:
    """Return the card and the tensors (none for a program) after comparing their hash."""
    card = read_card(folder)
    tensors: dict[str, Tensor] = {}
    try:
        if card.architecture == "features":
            found = card.weights_hash
        elif card.architecture in PROGRAMS:
            found = _archive_hash(card, folder / PROGRAMS[card.architecture])
        else:
            tensors = load_file(folder / WEIGHTS)
            found = weights_hash(card.function, tensors)
    except OSError as error:
        raise EncoderError(f"{folder}: no encoder here ({error}); train or import one") from error
    except SafetensorError as error:
        raise EncoderError(
            f"{folder / WEIGHTS}: not a safetensors file ({error}); train or import the encoder "
            "again"
        ) from error
    if found != card.weights_hash:
        raise EncoderError(
            f"{folder}: the weights do not belong to the card (hash differs); "
            "restore both files from one source, or train again"
        )
    return card, tensors


def _import_network(
    entry: ImportedEncoder,
    network: ExternalNetwork,
    architecture: Literal["timm", "torchscript", "torch.export"],
) -> Encoder:
    path = entry.file
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
        preset=entry.preset,
        weights_hash="",
        software={"torch": torch.__version__},
        source=f"{path.name} sha256:{identity}",
    )
    if architecture == "timm":
        module = _timm(card)
        _fill(module.network, path, timm_names(read_weights(path)))
        found = weights_hash(card.function, encoder_tensors(module, {}))
    else:
        module = _program(card, path)
        found = _archive_hash(card, path)
    module.requires_grad_(False)
    check_module(entry.name, module, network)
    return Encoder(card.model_copy(update={"weights_hash": found}), module)


def _timm(card: EncoderCard) -> ExternalEncoder:
    assert card.timm is not None
    assert isinstance(card.pixels, Preprocess)
    return ExternalEncoder(timm_network(card.timm), card.pixels, tokens=card.timm.tokens)


def _program(card: EncoderCard, archive: Path) -> ExternalEncoder:
    assert isinstance(card.pixels, Preprocess)
    read = read_exported if card.architecture == "torch.export" else read_torchscript
    return ExternalEncoder(read(archive), card.pixels, archive)


def _fill(network: nn.Module, path: Path, tensors: dict[str, Tensor]) -> None:
    """Load a checkpoint into a network; the checkpoint may contain a classifier in addition."""
    sizes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(own.shape)}"
        for name, own in network.state_dict().items()
        if name in tensors and tensors[name].shape != own.shape
    ]
    # not loaded where sizes differ: PyTorch's error has a line for each tensor
    missing, other = ([], []) if sizes else network.load_state_dict(tensors, strict=False)
    unknown = [name for name in other if not name.startswith(CLASSIFIERS)]
    if missing or unknown or sizes:
        raise EncoderError(
            f"{path}: the weights do not match the network: missing {missing[:3]}, "
            f"unknown {unknown[:3]}, of another size {sizes[:3]}; correct 'file', or the 'preset' "
            "or 'network.timm' of the encoder"
        )


def _archive_hash(card: EncoderCard, archive: Path) -> str:
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(card.function.encode())
    return digest.hexdigest()


def _load(module: nn.Module, prefix: str, tensors: dict[str, Tensor]) -> None:
    module.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    module.eval().requires_grad_(False)

"""The encoder file: a folder with ``weights.safetensors`` and ``card.json``."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nic_core.encoders.encoder import (
    Encoder,
    EncoderCard,
    EncoderError,
    build_heads,
    build_module,
    encoder_tensors,
    weights_hash,
)

WEIGHTS = "weights.safetensors"
CARD = "card.json"


def save_encoder(folder: Path, encoder: Encoder) -> None:
    """Write the encoder's weights, heads and card into ``folder`` (made if missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(encoder_tensors(encoder.module, encoder.heads), folder / WEIGHTS)
    (folder / CARD).write_text(encoder.card.model_dump_json(indent=2) + "\n")


def load_encoder(folder: Path) -> Encoder:
    """Read an encoder that :func:`save_encoder` wrote, on the CPU, in evaluation mode.

    Raises
    ------
    EncoderError
        A file is missing or unreadable, the tensors do not fit the card's architecture, or
        they are not those whose hash the card holds.
    """
    try:
        card = EncoderCard.model_validate_json((folder / CARD).read_bytes())
        tensors = load_file(folder / WEIGHTS)
    except OSError as error:
        raise EncoderError(f"{folder}: no encoder here ({error}); train or import one") from error
    except (ValidationError, SafetensorError) as error:
        raise EncoderError(f"{folder}: not an encoder file: {error}") from error
    if weights_hash(card.architecture, tensors) != card.weights_hash:
        raise EncoderError(
            f"{folder}: the weights are not those of the card (hash differs); "
            "restore both files from one source, or train again"
        )
    module = build_module(card)
    heads = build_heads(card.tasks, card.code)
    try:
        _load(module, "encoder.", tensors)
        for task, head in heads.items():
            _load(head, f"heads.{task}.", tensors)
    except RuntimeError as error:  # torch's only complaint about foreign tensors
        raise EncoderError(f"{folder}: weights do not fit the card: {error}") from error
    return Encoder(card, module, heads)


def _load(module: nn.Module, prefix: str, tensors: dict[str, Tensor]) -> None:
    module.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    module.eval().requires_grad_(False)

"""Networks as torch.export archives (pt2), which load without this package and without pickle."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from mlflow.models import infer_signature


@contextmanager
def archive_of(network: torch.nn.Module, example: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Yield the arguments by which ``mlflow.pytorch`` writes a network as an archive.

    Parameters
    ----------
    example
        An input that fixes the signature: the first axis is the batch, the others are constant.
    """
    with torch.no_grad():
        output = network(example)
    shown, returned = (tensor.detach().cpu().numpy() for tensor in (example, output))
    with warnings.catch_warnings():
        # PyTorch warns of tensors that share memory, although it writes them correctly
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        yield {
            "serialization_format": "pt2",
            "signature": infer_signature(shown, returned),
            "input_example": shown,
        }


def requirements_of(*packages: str) -> list[str]:
    """Return the installed versions as requirements.

    They are without a local part such as ``+cpu``, which no index has.
    """
    return [f"{name}=={version(name).partition('+')[0]}" for name in packages]

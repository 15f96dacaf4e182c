"""Encoders: patch tasks, networks, objectives, training and files."""

from nic_core.encoders.encoder import Encoder, EncoderCard, task_probabilities
from nic_core.encoders.errors import EncoderError
from nic_core.encoders.files import import_encoder, load_encoder, save_encoder
from nic_core.encoders.patch_tasks import (
    PatchDataset,
    build_patch_task,
    load_patch_task,
    save_patch_task,
)
from nic_core.encoders.training import Trained, train_encoder

__all__ = [
    "Encoder",
    "EncoderCard",
    "EncoderError",
    "PatchDataset",
    "Trained",
    "build_patch_task",
    "import_encoder",
    "load_encoder",
    "load_patch_task",
    "save_encoder",
    "save_patch_task",
    "task_probabilities",
    "train_encoder",
]

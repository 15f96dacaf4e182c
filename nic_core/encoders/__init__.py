"""Encoders: networks that map a patch to an embedding, their patch tasks, training and files.

Docstrings of this package name the section of the method that they implement, and its source.
Section 2 is the encoder network (:mod:`~nic_core.encoders.networks`); section 3 is the training of
encoders (:mod:`~nic_core.encoders.objectives`, :mod:`~nic_core.encoders.training_loop`,
:mod:`~nic_core.encoders.augmentation`).

[A] Tellez et al., MIDL 2020 (arXiv 2004.07041); [B] Tellez et al., TPAMI 2019 (arXiv 1811.02840);
[model] layer configuration in the authors' released encoders; [code] behaviour of their released
scripts; [choice] not published, chosen by this project.
"""

from nic_core.encoders.encoder import Encoder, EncoderCard, task_probabilities
from nic_core.encoders.errors import EncoderError
from nic_core.encoders.files import (
    import_encoder,
    initial_weights_version,
    load_encoder,
    load_initial_weights,
    save_encoder,
)
from nic_core.encoders.patch_tasks import (
    PatchDataset,
    build_patch_task,
    load_patch_task,
    save_patch_task,
)
from nic_core.encoders.training import InitialEncoder, Trained, train_encoder

__all__ = [
    "Encoder",
    "EncoderCard",
    "EncoderError",
    "InitialEncoder",
    "PatchDataset",
    "Trained",
    "build_patch_task",
    "import_encoder",
    "initial_weights_version",
    "load_encoder",
    "load_initial_weights",
    "load_patch_task",
    "save_encoder",
    "save_patch_task",
    "task_probabilities",
    "train_encoder",
]

from .encoder import Encoder, EncoderCard, task_probabilities
from .errors import EncoderError
from .files import (
    import_encoder,
    initial_weights_version,
    load_encoder,
    load_initial_weights,
    save_encoder,
)
from .patch_tasks import (
    PatchDataset,
    build_patch_task,
    load_patch_task,
    save_patch_task,
)
from .training import InitialEncoder, Trained, train_encoder

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

"""Entries ``encoders`` of the cohort file: encoders that are trained, imported or registered."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from nic_core.cohort.fields import Entry, Name, UserPath, no_duplicates
from nic_core.types import RequestedPrecision


class EncoderSpec(Entry):
    """An encoder to train: its objective, the patch tasks it sees and the seed.

    ``patches_seen`` counts patches through the network over the whole training and is the
    quantity to hold equal when encoders are compared [choice]. Without one (``null``) training
    lasts as published: ``bigan`` 200,000 steps, the others until the learning rate is at its floor
    and brings nothing more. ``supervised`` is ``mtl`` with
    one task; ``vae``, ``contrastive`` and ``bigan`` use the tasks' patches without labels.
    """

    name: Name
    objective: Literal["mean_rgb", "mtl", "supervised", "vae", "contrastive", "bigan"]
    tasks: tuple[str, ...] = ()
    seed: int = 0
    patches_seen: PositiveInt | None = 200_000
    batch: PositiveInt = 64
    learning_rate: PositiveFloat | None = Field(
        default=None,
        description="default: the published one of the objective, 1e-3 for vae, 2e-4 for bigan, "
        "1e-2 for the others",
    )
    architecture: Literal["tellez2020", "tellez2019"] = Field(
        default="tellez2020",
        description="tellez2019 is the network published for vae and contrastive; the default "
        "compares objectives at equal architecture [choice]",
    )
    task_weights: Literal["equal", "uncertainty"] = Field(
        default="equal",
        description="of mtl's losses: equal, or by learned uncertainty (Kendall et al. 2018)",
    )
    precision: RequestedPrecision = Field(
        default="auto",
        description="of the forward and backward pass; auto is bfloat16 on a GPU or CPU with "
        "matrix units for it, else float32 [choice]",
    )

    @model_validator(mode="after")
    def _tasks_fit_objective(self) -> Self:
        if self.objective != "mean_rgb" and not self.tasks:
            raise ValueError(
                f"encoder '{self.name}': objective '{self.objective}' needs at least one task"
            )
        if self.objective == "supervised" and len(self.tasks) > 1:
            raise ValueError(
                f"encoder '{self.name}': objective 'supervised' takes one task; "
                "'mtl' is the objective of several"
            )
        if self.task_weights == "uncertainty" and self.objective != "mtl":
            raise ValueError(
                f"encoder '{self.name}': task_weights 'uncertainty' weighs the tasks of objective "
                f"'mtl'; '{self.objective}' has one loss: leave it out"
            )
        if self.architecture == "tellez2019" and self.objective not in ("vae", "contrastive"):
            raise ValueError(
                f"encoder '{self.name}': architecture 'tellez2019' is for vae and contrastive"
            )
        if self.objective == "mean_rgb" and self.tasks:
            raise ValueError(f"encoder '{self.name}': 'mean_rgb' is not trained and takes no tasks")
        no_duplicates(f"encoder '{self.name}': tasks", self.tasks)
        return self

    def check_patch(self, patch: int) -> None:
        """Raises ValueError where its networks cannot take patches of so many px a side."""
        if self.objective == "mean_rgb":
            return
        # the network of 2020 convolves without padding; that of 2019, and what draws patches,
        # halves a side of 128 px five times
        least, step = (62, 2) if self.architecture == "tellez2020" else (32, 32)
        if self.objective in ("vae", "bigan"):
            step = 32
        first = -(-least // step) * step
        if patch < first or patch % step:
            raise ValueError(
                f"encoder '{self.name}': {self.objective} with {self.architecture} takes patches "
                f"of {first}, {first + step}, {first + 2 * step}, ... px, not {patch}"
            )


Three = tuple[float, float, float]


class Preprocess(Entry):
    """What a foreign network wants of its pixels: ``(RGB / 255 - mean) / std``."""

    mean: Three = Field(description="of red, green and blue, in 0..1")
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    resize: PositiveInt | None = Field(
        default=None, description="px a side of the network's input, where it is not the patch's"
    )


class TimmModel(Entry):
    """A network of the timm library: its name there, and arguments of ``timm.create_model``."""

    model: str
    arguments: dict[str, bool | int | float | str] = {}


class ExternalNetwork(Entry):
    """What a foreign network's file does not say: the patches it takes and the embeddings it gives."""

    patch: PositiveInt = Field(description="px a side, before `preprocess`")
    mpp: PositiveFloat = Field(description="um/px")
    embedding_size: PositiveInt = Field(description="numbers a patch")
    preprocess: Preprocess
    timm: TimmModel | None = Field(default=None, description="for a file of weights alone")


FileKind = Literal["folder", "keras", "timm", "torchscript", "torch.export"]
FILE_KINDS: dict[str, FileKind] = {
    "": "folder",
    ".h5": "keras",
    ".hdf5": "keras",
    ".safetensors": "timm",
    ".bin": "timm",
    ".pth": "timm",
    ".pt": "torchscript",
    ".ts": "torchscript",
    ".pt2": "torch.export",
}


class ImportedEncoder(Entry):
    """An encoder that was trained elsewhere, in a local file.

    It is a folder that this project wrote, or by its suffix one of the released Keras encoders
    (``.h5``), a TorchScript (``.pt``, ``.ts``) or ``torch.export`` (``.pt2``) network, or the
    weights (``.safetensors``, ``.bin``, ``.pth``) of a timm model. ``network`` describes the
    last three.
    """

    name: Name
    objective: Literal["imported"]
    file: UserPath
    network: ExternalNetwork | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """None: it is not trained here."""
        return ()

    @property
    def kind(self) -> FileKind:
        return "folder" if self.file.is_dir() else FILE_KINDS[self.file.suffix.lower()]

    @model_validator(mode="after")
    def _network_fits_file(self) -> Self:
        if not self.file.is_dir() and self.file.suffix.lower() not in FILE_KINDS:
            known = ", ".join(suffix for suffix in FILE_KINDS if suffix)
            raise ValueError(
                f"encoder '{self.name}': {self.file.name} is no encoder file; "
                f"known: a folder, {known}"
            )
        if (self.network is None) != (self.kind in ("folder", "keras")):
            problem = (
                f"{self.file.name} needs 'network': patch, mpp, embedding and preprocess"
                if self.network is None
                else f"{self.file.name} says itself what 'network' would say: leave it out"
            )
            raise ValueError(f"encoder '{self.name}': {problem}")
        if self.network is not None and (self.network.timm is None) == (self.kind == "timm"):
            raise ValueError(
                f"encoder '{self.name}': 'network.timm' names the model of a file of weights "
                f"(.safetensors, .bin, .pth), and of no other; the file is {self.file.name}"
            )
        return self


class RegisteredEncoder(Entry):
    """An encoder of the team's registry: whatever version carries the alias.

    The version is looked up whenever inputs are; an alias that moves to other weights makes the
    encoder stale, and with it its grids and their models.
    """

    name: Name
    objective: Literal["registered"]
    version: str = Field(
        pattern=r"^encoder-[\w.-]+@[\w-]+$",
        description="registered model and alias: encoder-mtl-4@champion",
    )

    @property
    def tasks(self) -> tuple[str, ...]:
        """None: it is not trained here."""
        return ()


EncoderEntry = Annotated[
    EncoderSpec | ImportedEncoder | RegisteredEncoder, Field(discriminator="objective")
]

"""Entries ``encoders`` of the cohort file: encoders that are trained, imported or registered."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from nic_core.cohort.fields import Entry, Name, UserPath, check_unique
from nic_core.types import Embedding, FeaturesFormat, RequestedPrecision

REGISTERED_VERSION = r"^encoder-[\w.-]+@[\w-]+$"  # model@alias
BLOCKS = {"tellez2020": 4, "tellez2019": 5}  # convolution blocks of the architectures


class InitialWeights(Entry):
    """An encoder whose weights a training starts from: ``encoder``, ``file`` or ``version``."""

    encoder: str | None = Field(default=None, description="another encoder of this study")
    file: UserPath | None = Field(
        default=None,
        description="Keras file of a released encoder (.h5, .hdf5), or folder of an encoder that "
        "this project wrote",
    )
    version: str | None = Field(
        default=None,
        pattern=REGISTERED_VERSION,
        description="registered model and alias, for example encoder-mtl-4@champion",
    )
    freeze: NonNegativeInt = Field(
        default=0,
        description="number of first convolution blocks (convolution, BatchNorm, LeakyReLU) that "
        "keep these weights and statistics",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [name for name in ("encoder", "file", "version") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                "give one of encoder (a name), file (a path) and version (model@alias), not "
                f"{' and '.join(given) or 'none'}"
            )
        if self.file is not None and not self.file.is_dir():
            kind = FILE_KINDS.get(self.file.suffix.lower())
            if kind not in ("keras", "folder"):
                raise ValueError(
                    f"{self.file.name} is neither a Keras file of a released encoder (.h5, .hdf5) "
                    "nor the folder of an encoder that this project wrote; give one of these"
                )
        return self


class _EncoderEntry(Entry):
    """The name of an encoder, and the patches that it takes (its geometry)."""

    name: Name
    patch: PositiveInt | None = Field(
        default=None, description="side of a patch, px at `mpp`; default: `settings.patch`"
    )
    mpp: PositiveFloat | None = Field(
        default=None, description="um/px of a patch; default: `settings.mpp`"
    )
    stride: PositiveInt | None = Field(
        default=None,
        description="side of a grid cell, px at `mpp`; a cell is the central square of its patch, "
        "so patches overlap if the stride is smaller than the patch; default: the patch",
    )


class EncoderSpec(_EncoderEntry):
    """An encoder to train.

    ``supervised`` is ``mtl`` with one task. ``vae``, ``contrastive`` and ``bigan`` use the patches
    of the tasks without their labels. ``mean_rgb`` is not trained.
    """

    objective: Literal["mean_rgb", "mtl", "supervised", "vae", "contrastive", "bigan"]
    embedding_size: PositiveInt | None = Field(
        default=None,
        description="length of the dense code; default: `settings.embedding_size`; 3 for mean_rgb",
    )
    tasks: tuple[str, ...] = Field(default=(), description="names of patch tasks to train on")
    seed: int = 0
    patches_seen: PositiveInt | None = Field(
        default=200_000,
        description="number of patches, with repetitions, that pass through the network during "
        "training; keep it equal when encoders are compared [choice]. null: train as long as "
        "published, which is 200,000 steps for bigan and, for the others, until the lowest "
        "learning rate brings no more improvement",
    )
    batch: PositiveInt = Field(default=64, description="patches per training step")
    learning_rate: PositiveFloat | None = Field(
        default=None,
        description="default: with `initial_weights` 2e-4 [choice]; otherwise the published rate "
        "of the objective, 1e-3 for vae, 2e-4 for bigan, 1e-2 for the others",
    )
    initial_weights: InitialWeights | None = Field(
        default=None, description="default: random weights, as published"
    )
    refit: Literal["all"] | None = Field(
        default=None,
        description="all: after the training, train again from the same start on the train and "
        "validation splits together, for as many steps as gave the kept weights and at the same "
        "rates, and keep the weights at the end",
    )
    embedding: Embedding = Field(
        default="dense",
        description="dense: the code of the last layer (published); pooled: mean and standard "
        "deviation over positions of the 128 last feature maps; both: one after the other. The "
        "heads are trained on the dense code in each case",
    )
    architecture: Literal["tellez2020", "tellez2019"] = Field(
        default="tellez2020",
        description="tellez2019 is the network published for vae and contrastive; the default "
        "compares all objectives at equal architecture [choice]",
    )
    task_weights: Literal["equal", "uncertainty"] = Field(
        default="equal",
        description="weights of the losses of mtl: equal, or by learned uncertainty (Kendall et "
        "al. 2018)",
    )
    precision: RequestedPrecision = Field(
        default="auto",
        description="precision of the forward and backward pass; auto is bfloat16 on a GPU or CPU "
        "with matrix units for it, else float32 [choice]",
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
                "use 'mtl' for several tasks"
            )
        if self.task_weights == "uncertainty" and self.objective != "mtl":
            raise ValueError(
                f"encoder '{self.name}': task_weights 'uncertainty' applies to objective 'mtl' "
                f"only; leave it out for '{self.objective}'"
            )
        if self.architecture == "tellez2019" and self.objective not in ("vae", "contrastive"):
            raise ValueError(
                f"encoder '{self.name}': architecture 'tellez2019' is for the objectives vae and "
                "contrastive only"
            )
        if self.objective == "mean_rgb" and self.tasks:
            raise ValueError(f"encoder '{self.name}': 'mean_rgb' is not trained and takes no tasks")
        for field in ("initial_weights", "refit"):
            if self.objective == "mean_rgb" and getattr(self, field) is not None:
                raise ValueError(
                    f"encoder '{self.name}': 'mean_rgb' is not trained; leave '{field}' out"
                )
        if self.refit is not None and self.objective == "bigan":
            raise ValueError(
                f"encoder '{self.name}': objective 'bigan' chooses nothing by its validation "
                "splits, so there is no number of steps to repeat; leave 'refit' out"
            )
        if self.embedding != "dense" and (
            self.objective == "mean_rgb" or self.architecture != "tellez2020"
        ):
            raise ValueError(
                f"encoder '{self.name}': embedding '{self.embedding}' needs the feature maps of "
                "architecture 'tellez2020'; leave 'embedding' out"
            )
        blocks = BLOCKS[self.architecture]
        if self.initial_weights is not None and self.initial_weights.freeze > blocks:
            raise ValueError(
                f"encoder '{self.name}': freeze: {self.initial_weights.freeze} is more than the "
                f"{blocks} convolution blocks of {self.architecture}"
            )
        check_unique(f"encoder '{self.name}': tasks", self.tasks)
        return self

    @property
    def registered_start(self) -> RegisteredEncoder | None:
        """Entry of the registered encoder that the training starts from; None without one."""
        start = self.initial_weights
        if start is None or start.version is None:
            return None
        return RegisteredEncoder(name=self.name, objective="registered", version=start.version)

    def check_patch(self, patch: int) -> None:
        """Check that the networks of the encoder accept patches of ``patch`` px a side.

        Raises
        ------
        ValueError
            They do not.
        """
        if self.objective == "mean_rgb":
            return
        # the network of 2020 convolves without padding; that of 2019 and the decoders of vae and
        # bigan change the side by a factor of two five times
        least, step = (62, 2) if self.architecture == "tellez2020" else (32, 32)
        if self.embedding != "dense":
            least = 94  # below, the last maps have one position and no deviation
        if self.objective in ("vae", "bigan"):
            step = 32
        first = -(-least // step) * step
        if patch < first or patch % step:
            raise ValueError(
                f"encoder '{self.name}': {self.objective} with {self.architecture} needs patches "
                f"of {first}, {first + step}, {first + 2 * step}, ... px"
                f"{'' if self.embedding == 'dense' else f' for embedding {self.embedding}'}, "
                f"not {patch}"
            )


class Preprocess(Entry):
    """Preprocessing of an external network's input.

    The pixels are divided by 255, resized, cropped, and standardised: ``(RGB - mean) / std``.
    """

    mean: tuple[float, float, float] = Field(description="of red, green and blue, 0 to 1")
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(
        description="of red, green and blue, 0 to 1"
    )
    resize: PositiveInt | None = Field(
        default=None,
        description="side that the patch is resized to, px; default: the side of the patch",
    )
    crop: PositiveInt | None = Field(
        default=None,
        description="side of the central square of the resized patch that is the network's input, "
        "px; default: the resized patch",
    )

    def input_side(self, patch: int) -> int:
        """Return the side of the network's input, px, for patches of ``patch`` px a side."""
        return self.crop or self.resize or patch


Tokens = Literal["class", "class+mean", "mean"]


class TimmModel(Entry):
    """A model of the timm library."""

    model: str = Field(description="name of the model in timm")
    arguments: dict[str, bool | int | float | str] = Field(
        default={},
        description="further arguments of `timm.create_model`; `mlp_layer` is a name in "
        "`timm.layers`",
    )
    tokens: Tokens | None = Field(
        default=None,
        description="output tokens of a vision transformer that make the embedding: the class "
        "token, the mean of the patch tokens, or the first and then the second; register tokens "
        "are left out; default: the pooling of the timm model",
    )

    @model_validator(mode="after")
    def _one_pooling(self) -> Self:
        if self.tokens is not None and "global_pool" in self.arguments:
            raise ValueError(
                f"timm model '{self.model}': 'tokens' and the argument 'global_pool' both set the "
                "pooling; leave one of them out"
            )
        return self


class ExternalNetwork(Entry):
    """Input and output of an external network, which its file does not state."""

    patch: PositiveInt = Field(description="side of a patch, px, before `preprocess`")
    mpp: PositiveFloat = Field(description="um/px of a patch")
    embedding_size: PositiveInt = Field(description="length of an embedding")
    preprocess: Preprocess
    timm: TimmModel | None = Field(
        default=None, description="the model, if the file contains weights only"
    )

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        crop, side = self.preprocess.crop, self.preprocess.resize or self.patch
        if crop is not None and (crop > side or (side - crop) % 2):
            raise ValueError(
                f"crop: {crop} px is not a central square of {side} px; it must be smaller by an "
                "even number of px"
            )
        return self


PresetName = Literal[
    "uni",
    "uni2-h",
    "virchow",
    "virchow2",
    "h-optimus-0",
    "h-optimus-1",
    "prov-gigapath",
    "phikon",
    "phikon-v2",
    "ctranspath",
    "conch",
    "kaiko-vits16",
    "kaiko-vits8",
    "kaiko-vitb16",
    "kaiko-vitb8",
    "kaiko-vitl14",
    "resnet50",
]
"""Published networks whose description is known (:mod:`nic_core.cohort.presets`)."""


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


class ImportedEncoder(_EncoderEntry):
    """An encoder that was trained elsewhere, imported from a local file or folder.

    Supported are a folder written by this project and, by suffix, a Keras encoder released with
    the paper (``.h5``, ``.hdf5``), a TorchScript network (``.pt``, ``.ts``), a ``torch.export``
    network (``.pt2``), and the weights of a timm model (``.safetensors``, ``.bin``, ``.pth``). The
    last three need a description of the network: the name of a published one (``preset``), or
    ``network``. It states the patch; a preset's um/px can be replaced by ``mpp``.
    """

    objective: Literal["imported"]
    file: UserPath
    preset: PresetName | None = Field(
        default=None, description="name of a published network; `nic encoder list` lists them"
    )
    network: ExternalNetwork | None = None
    embedding: Embedding | None = Field(
        default=None,
        description="what an embedding of the published network contains, as for encoders that "
        "are trained; default: as the file says, dense for a Keras file",
    )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Always empty, since no patch task of the cohort trains it."""
        return ()

    @property
    def kind(self) -> FileKind:
        """Kind of the file, by its suffix."""
        return "folder" if self.file.is_dir() else FILE_KINDS[self.file.suffix.lower()]

    @model_validator(mode="after")
    def _network_fits_file(self) -> Self:
        if not self.file.is_dir() and self.file.suffix.lower() not in FILE_KINDS:
            supported = ", ".join(suffix for suffix in FILE_KINDS if suffix)
            raise ValueError(
                f"encoder '{self.name}': {self.file.name} is not an encoder file; "
                f"supported: a folder, {supported}"
            )
        if self.embedding is not None and self.kind not in ("folder", "keras"):
            raise ValueError(
                f"encoder '{self.name}': 'embedding' is for the networks of the paper, not for "
                f"{self.file.name}; leave it out"
            )
        described = self.network is not None or self.preset is not None
        if self.network is not None and self.preset is not None:
            raise ValueError(
                f"encoder '{self.name}': 'preset' and 'network' both describe the network; "
                "leave one of them out"
            )
        if described == (self.kind in ("folder", "keras")):
            problem = (
                f"{self.file.name} describes its network itself: leave "
                f"'{'network' if self.preset is None else 'preset'}' out"
                if described
                else f"{self.file.name} needs 'preset', the name of a published network, or "
                "'network': patch, mpp, embedding_size and preprocess"
            )
            raise ValueError(f"encoder '{self.name}': {problem}")
        stated = [
            field
            for field, is_stated in (
                ("patch", described),
                ("mpp", self.network is not None),
            )
            if is_stated and getattr(self, field) is not None
        ]
        if stated:
            by = "network" if self.network is not None else "preset"
            raise ValueError(
                f"encoder '{self.name}': leave '{stated[0]}' out, since '{by}' states it"
            )
        if self.network is not None and (self.network.timm is None) == (self.kind == "timm"):
            raise ValueError(
                f"encoder '{self.name}': 'network.timm' is required for files of weights "
                f"(.safetensors, .bin, .pth) and not allowed for others; "
                f"the file is {self.file.name}"
            )
        return self


class RegisteredEncoder(_EncoderEntry):
    """An encoder of the model registry: the version that an alias points to.

    The alias is resolved whenever the inputs are scanned. If it points to other weights, the
    encoder, its grids and their models become stale.
    """

    objective: Literal["registered"]
    version: str = Field(
        pattern=REGISTERED_VERSION,
        description="registered model and alias, for example encoder-mtl-4@champion",
    )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Always empty, since no patch task of the cohort trains it."""
        return ()


class ReusedEncoder(Entry):
    """The weights of another encoder of the study, applied at another um/px or stride.

    For example for a probability map of a task that was seen at another um/px than the encoder's.
    """

    name: Name
    objective: Literal["reused"]
    encoder: str = Field(description="name of the encoder whose weights and heads are used")
    mpp: PositiveFloat | None = Field(
        default=None, description="um/px of a patch; default: that of `encoder`"
    )
    stride: PositiveInt | None = Field(
        default=None, description="side of a grid cell, px at `mpp`; default: the patch"
    )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Always empty, since no patch task of the cohort trains it."""
        return ()


class FeaturesEncoder(_EncoderEntry):
    """Embeddings that other software computed: a folder with a file for each slide.

    Its grids are read from the files, so that no pixel of a slide is read. Without a network, there
    are no probes, probability maps, or predictions of other slides. The patches that it states
    must be those of the files.
    """

    objective: Literal["features"]
    folder: UserPath = Field(
        description="folder, with subfolders, of files that are named by slide id or by the name "
        "of the slide's file without its suffix"
    )
    format: FeaturesFormat | None = Field(
        default=None, description="layout of the files; default: recognised by their content"
    )
    embedding_size: PositiveInt = Field(description="length of an embedding in the files")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Always empty, since no patch task of the cohort trains it."""
        return ()


EncoderEntry = Annotated[
    EncoderSpec | FeaturesEncoder | ImportedEncoder | RegisteredEncoder | ReusedEncoder,
    Field(discriminator="objective"),
]

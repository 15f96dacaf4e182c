"""The user's file: which slides, which patch tasks, which encoders, which targets.

One ``cohort.yaml`` describes a study. :func:`load_cohort` validates it and turns every
relative path into an absolute one (relative to the file), so the rest of the library never
asks where the file stood. An error names the file, the line and the field.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol, Self, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails

COHORT_VARIABLE = "NIC_COHORT"
DEFAULT_COHORT = Path("data/demo/cohort.yaml")


class CohortError(ValueError):
    """The cohort file, or a table that it names, cannot be used as it is."""


def _resolve(path: Path, info: ValidationInfo) -> Path:
    base: Path = (info.context or {}).get("base", Path.cwd())
    path = path.expanduser()
    return path if path.is_absolute() else (base / path).resolve()


def _check_name(name: str) -> str:
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name[0] in ".-":
        raise ValueError(
            "a name becomes a folder and a partition key: use letters, digits, '-', '_' and '.'"
        )
    return name


def _check_task_name(name: str) -> str:
    # PyTorch joins the names of nested modules with dots, and a task names its head
    if "." in _check_name(name):
        raise ValueError("a patch task's name holds no '.'")
    return name


def _check_cron(text: str) -> str:
    if len(text.split()) != 5:
        raise ValueError("a cron schedule has five fields: '0 20 * * *' is every day at 20:00")
    return text


def _check_time_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise ValueError(f"'{name}' is no time zone; 'Europe/Amsterdam' is one") from error
    return name


UserPath = Annotated[Path, AfterValidator(_resolve)]
Cron = Annotated[str, AfterValidator(_check_cron)]
TimeZone = Annotated[str, AfterValidator(_check_time_zone)]
Name = Annotated[str, AfterValidator(_check_name)]
TaskName = Annotated[str, AfterValidator(_check_task_name)]
Fraction = Annotated[float, Field(ge=0, le=1)]
AskedPrecision = Literal["auto", "float32", "bfloat16"]
NetworkName = Literal["published", "small", "mil"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _NamedItem(Protocol):
    @property
    def name(self) -> str: ...


_Named = TypeVar("_Named", bound=_NamedItem)


class SlideFolder(_Model):
    """Every file of a folder that matches a pattern is a slide, named by its stem."""

    path: UserPath
    pattern: str = "**/*.tif"
    patient: str | None = Field(
        default=None,
        description="regular expression on the stem; its group 'patient' is the patient. "
        "Without it each slide is a patient of its own.",
    )


class Slides(_Model):
    """Where the slides are: folders with patterns, a table, or both.

    The table (CSV or parquet) has the columns ``slide``, ``path``, ``patient`` and, where
    known, ``mpp`` (um/px at level 0, overrides the file's), ``mask`` (a ready tissue mask),
    ``truth`` (a label image for scoring maps) and ``split`` (``cv`` or ``test``).
    """

    folders: tuple[SlideFolder, ...] = ()
    table: UserPath | None = None

    @model_validator(mode="after")
    def _some_source(self) -> Self:
        if not self.folders and self.table is None:
            raise ValueError("name at least one folder under 'folders' or a 'table'")
        return self


class Hdf5Images(_Model):
    """Images and labels in HDF5 as PatchCamelyon ships them: a file each, a row an image."""

    images: UserPath = Field(description="file with the dataset `x`, uint8 (N, H, W, 3)")
    labels: UserPath = Field(description="file with the dataset `y`, N class numbers")
    meta: UserPath | None = Field(
        default=None, description="CSV or parquet, a row an image, with the group column"
    )
    split: Literal["train", "validation", "test"] | None = Field(
        default=None, description="the published split that these images are"
    )


class AnnotatedSlides(_Model):
    """Patches cut from slides where people have annotated regions.

    The table (CSV or parquet) has a row a slide: ``path``, ``annotations`` (QuPath GeoJSON or
    ASAP XML), the group column and, where known, ``mpp`` (um/px at level 0, overrides the
    file's), ``mask`` (a ready tissue mask) and ``split``. The study's grid is laid over each
    slide; a tissue cell has the label that covers most of it.
    """

    table: UserPath
    share: Fraction = Field(
        default=0.5, description="of a cell's area, what its label must exceed [choice]"
    )
    rest: str | None = Field(
        default=None,
        description="label of tissue cells that no region touches; without it they are left out",
    )
    most: PositiveInt | None = Field(
        default=None, description="patches of a class from one slide, drawn at random; null: all"
    )


class PatchTask(_Model):
    """A labelled set of patches that encoders train on.

    Exactly one source: ``table`` (CSV or parquet, image paths relative to the table),
    ``folder`` (one sub-folder a class), ``hdf5`` or ``slides``. ``mpp`` is declared, never
    guessed; only slides know their own.
    """

    name: TaskName
    organ: str
    mpp: PositiveFloat | Literal["unknown"] | None = Field(
        default=None,
        description="um/px of the stored images; `unknown`: their pixels are taken as they are",
    )
    table: UserPath | None = None
    folder: UserPath | None = None
    hdf5: tuple[Hdf5Images, ...] = ()
    slides: AnnotatedSlides | None = None
    classes: tuple[str, ...] | None = Field(
        default=None,
        min_length=2,
        description="the classes in their order, other labels are left out; default: every label, "
        "sorted. Of hdf5: what the class numbers 0, 1, ... mean (required)",
    )
    path_column: str = "path"
    label_column: str = "label"
    group_column: str | None = Field(
        default="group", description="patient; rows without one are a group each"
    )
    group_pattern: str | None = Field(
        default=None,
        description="of a folder: regular expression on an image's name; its group 'group' is the "
        "patient. Without it each image is a group of its own.",
    )
    where: dict[str, str] = Field(default={}, description="keep the table's rows with these values")
    test_groups: tuple[str, ...] = Field(
        default=(), description="groups that are always held out, whatever the seed"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = (self.table, self.folder, self.hdf5 or None, self.slides)
        if sum(source is not None for source in sources) != 1:
            raise ValueError(
                f"patch task '{self.name}': give one of 'table', 'folder', 'hdf5' and 'slides'"
            )
        return self

    @model_validator(mode="after")
    def _resolution_declared(self) -> Self:
        if self.slides is None and self.mpp is None:
            raise ValueError(
                f"patch task '{self.name}': give 'mpp', the um/px of its images; if nobody knows "
                "it, 'mpp: unknown' takes their pixels as they are"
            )
        if self.slides is not None and self.mpp is not None:
            raise ValueError(
                f"patch task '{self.name}': slides have their own um/px; where it is wrong or "
                "missing, give it in the column 'mpp' of their table"
            )
        return self

    @model_validator(mode="after")
    def _options_fit_source(self) -> Self:
        if self.classes is not None:
            _no_duplicates(f"patch task '{self.name}': classes", self.classes)
        if self.group_pattern is not None and self.folder is None:
            raise ValueError(f"patch task '{self.name}': 'group_pattern' is for a folder")
        if self.hdf5:
            if self.classes is None:
                raise ValueError(
                    f"patch task '{self.name}': HDF5 holds class numbers; give what 0, 1, ... mean "
                    "under 'classes'"
                )
            if len({part.split is None for part in self.hdf5}) == 2:
                raise ValueError(
                    f"patch task '{self.name}': give 'split' for every part of 'hdf5' or for none"
                )
            if self.group_column is not None and any(part.meta is None for part in self.hdf5):
                raise ValueError(
                    f"patch task '{self.name}': give each part of 'hdf5' its 'meta' table with the "
                    f"column '{self.group_column}', or set 'group_column: null'"
                )
        return self


class EncoderSpec(_Model):
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
    precision: AskedPrecision = Field(
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
        _no_duplicates(f"encoder '{self.name}': tasks", self.tasks)
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


class Preprocess(_Model):
    """What a foreign network wants of its pixels: ``(RGB / 255 - mean) / std``."""

    mean: Three = Field(description="of red, green and blue, in 0..1")
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    resize: PositiveInt | None = Field(
        default=None, description="px a side of the network's input, where it is not the patch's"
    )


class TimmModel(_Model):
    """A network of the timm library: its name there, and arguments of ``timm.create_model``."""

    model: str
    arguments: dict[str, bool | int | float | str] = {}


class ForeignNetwork(_Model):
    """What a foreign network's file does not say: the patches it takes and the codes it gives."""

    patch: PositiveInt = Field(description="px a side, before `preprocess`")
    mpp: PositiveFloat = Field(description="um/px")
    code: PositiveInt = Field(description="numbers a patch")
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


class ReadyEncoder(_Model):
    """An encoder that was trained elsewhere, in a local file.

    It is a folder that this project wrote, or by its suffix one of the released Keras encoders
    (``.h5``), a TorchScript (``.pt``, ``.ts``) or ``torch.export`` (``.pt2``) network, or the
    weights (``.safetensors``, ``.bin``, ``.pth``) of a timm model. ``network`` describes the
    last three.
    """

    name: Name
    objective: Literal["imported"]
    file: UserPath
    network: ForeignNetwork | None = None

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
                f"{self.file.name} needs 'network': patch, mpp, code and preprocess"
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


class RegisteredEncoder(_Model):
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
    EncoderSpec | ReadyEncoder | RegisteredEncoder, Field(discriminator="objective")
]


class _TargetBase(_Model):
    name: Name
    level: Literal["slide", "patient"] = "slide"


class RegressionTarget(_TargetBase):
    """A number a slide or patient; trained with MSE, scored by Spearman's rho."""

    kind: Literal["regression"]
    column: str


class ClassificationTarget(_TargetBase):
    """A class a slide or patient; cross-entropy, ROC AUC.

    Of two classes the second is the positive one.
    """

    kind: Literal["classification"]
    column: str
    classes: tuple[str, ...] = Field(min_length=2)


class SurvivalTarget(_TargetBase):
    """Time to event with right censoring; Cox partial likelihood, C-index."""

    kind: Literal["survival"]
    time: str
    event: str = Field(description="column: 1 the event was seen, 0 censored")
    unit: Literal["days", "weeks", "months", "years"]


Target = Annotated[
    RegressionTarget | ClassificationTarget | SurvivalTarget, Field(discriminator="kind")
]


class ProbabilityMap(_Model):
    """A per-cell probability of one class, read from an MTL encoder's own head.

    Where the slide table has a ``truth`` image (one pixel a region, stretched over the
    slide), the map is scored by AUC: ``positive`` values against the rest, ``ignore`` left out.
    """

    name: Name
    encoder: str
    task: str
    label: str
    positive: tuple[int, ...] = (1,)
    ignore: tuple[int, ...] = (255,)


class ModelSettings(_Model):
    """How slide models are trained; the defaults are paper B's, or [choice]."""

    network: NetworkName = Field(
        default="published",
        description="grid CNN of the paper, a small one, or gated-attention pooling of cells",
    )
    positions: bool = Field(default=False, description="tell network mil where each cell lies")
    crop: PositiveInt = Field(default=400, description="cells a side; smaller grids are padded")
    feature_noise: NonNegativeFloat = Field(
        default=0.0, description="deviation of noise on normalised features in training"
    )
    feature_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability that training sees a whole feature of a crop as 0",
    )
    folds: int = Field(default=4, ge=3)
    seeds: PositiveInt = Field(
        default=1,
        description="initialisations to train every fold from; more than one says how far "
        "figures depend on it",
    )
    epochs: PositiveInt = 60
    batch: PositiveInt = 16
    learning_rate: PositiveFloat = 1e-2
    crops_at_test: PositiveInt = 10
    bootstrap: PositiveInt = 1000
    seed: int = 0
    permute_labels: int | None = Field(
        default=None,
        description="seed to exchange labels between patients with: a control that must come "
        "out at chance",
    )

    @model_validator(mode="after")
    def _positions_are_for_mil(self) -> Self:
        if self.positions and self.network != "mil":
            raise ValueError(f"positions: network '{self.network}' sees them anyway; for mil alone")
        return self


class CompressionSettings(_Model):
    """How slides are compressed; see docs/grids.md for what each choice costs and changes."""

    precision: AskedPrecision = Field(
        default="auto",
        description="auto: bfloat16 on a GPU or CPU with matrix units for it",
    )
    reading: Literal["patch", "input"] = Field(
        default="patch",
        description="read the patch's pixels and pool them in the network (published), or read "
        "at the resolution of the network's input",
    )
    orientations: bool = Field(default=False, description="encode in all 8 orientations")


class Settings(_Model):
    """Constants of the method; the defaults are the papers'."""

    patch: PositiveInt = Field(default=128, description="px a side, at `mpp`")
    mpp: PositiveFloat = Field(default=0.5, description="um/px")
    code: PositiveInt = Field(default=128, description="numbers a patch")
    tissue: Fraction = Field(default=0.6, description="a cell is kept above this tissue fraction")
    compression: CompressionSettings = CompressionSettings()
    models: ModelSettings = ModelSettings()


class Automation(_Model):
    """When whatever is missing or stale is made without being asked for [choice].

    From each tick of ``opens`` to the next of ``closes``, every partition is asked for once, and
    again only if what it is made from changes. With ``closes: null`` there is no closing time:
    ``opens`` then says how often a failed one is tried again.
    """

    opens: Cron = "0 20 * * *"
    closes: Cron | None = "0 6 * * *"
    timezone: TimeZone = "UTC"
    look: PositiveInt = Field(default=60, description="seconds between two looks of each sensor")


class Cohort(_Model):
    """A validated ``cohort.yaml``; see ``docs/cohort.md`` for a commented example."""

    name: Name
    slides: Slides
    labels: UserPath | None = Field(
        default=None, description="CSV or parquet keyed by `slide` or `patient`"
    )
    patch_tasks: tuple[PatchTask, ...] = ()
    encoders: tuple[EncoderEntry, ...]
    targets: tuple[Target, ...] = ()
    maps: tuple[ProbabilityMap, ...] = ()
    settings: Settings = Settings()
    automation: Automation | None = Automation()

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        for field in ("patch_tasks", "encoders", "targets", "maps"):
            _no_duplicates(field, [item.name for item in getattr(self, field)])
        if not self.encoders:
            raise ValueError("name at least one encoder under 'encoders'")
        tasks = [task.name for task in self.patch_tasks]
        for encoder in self.encoders:
            for task in encoder.tasks:
                _known(f"encoder '{encoder.name}': patch task", task, tasks)
            if isinstance(encoder, EncoderSpec):
                encoder.check_patch(self.settings.patch)
        encoders = {encoder.name: encoder for encoder in self.encoders}
        for m in self.maps:
            _known(f"map '{m.name}': encoder", m.encoder, list(encoders))
            _known(
                f"map '{m.name}': task of encoder '{m.encoder}'", m.task, encoders[m.encoder].tasks
            )
        if self.targets and self.labels is None:
            raise ValueError("targets need a 'labels' table")
        return self

    def encoder(self, name: str) -> EncoderSpec | ReadyEncoder | RegisteredEncoder:
        """The encoder of that name; raises :class:`CohortError` with the known ones."""
        return _pick("encoder", name, self.encoders)

    def with_encoder(self, entry: EncoderEntry) -> Self:
        """This cohort with another entry for the encoder of that name."""
        changed = (entry if known.name == entry.name else known for known in self.encoders)
        return self.model_copy(update={"encoders": tuple(changed)})

    def patch_task(self, name: str) -> PatchTask:
        return _pick("patch task", name, self.patch_tasks)

    def target(self, name: str) -> Target:
        return _pick("target", name, self.targets)

    def probability_map(self, name: str) -> ProbabilityMap:
        return _pick("map", name, self.maps)


def cohort_path() -> Path:
    """The cohort file in force: ``$NIC_COHORT``, else ``data/demo/cohort.yaml``."""
    return Path(os.environ.get(COHORT_VARIABLE) or DEFAULT_COHORT)


def load_cohort(path: Path | None = None) -> Cohort:
    """Read and validate a cohort file (default: :func:`cohort_path`).

    Raises
    ------
    CohortError
        The file is missing, is no YAML, or a field is wrong; one line a problem, each as
        ``file:line: field: what is wrong``.
    """
    path = cohort_path() if path is None else path
    try:
        text = path.read_text()
    except OSError as error:
        raise CohortError(
            f"{path}: cannot read the cohort file ({error.strerror}); "
            f"set {COHORT_VARIABLE} to yours, or run `make demo` for the demo cohort"
        ) from error
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CohortError(f"{path}: not valid YAML: {error}") from error
    try:
        return Cohort.model_validate(data, context={"base": path.resolve().parent})
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            line, field = _place(tree, problem)
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{path}:{line}: {field}: {message}")
        raise CohortError("\n".join(lines)) from error


def _place(node: yaml.Node | None, problem: ErrorDetails) -> tuple[int, str]:
    """Line of the deepest YAML node on the way to a pydantic error, and the field's name."""
    location = problem["loc"]
    if problem["type"] == "union_tag_invalid":
        location = (*location, problem["ctx"]["discriminator"].strip("'"))
    line, field = 1, []
    for step in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == step), None)
            # a discriminated union adds its tag to the location: it has no node of its own
            if pair is None:
                continue
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            node = node.value[step]
            line = node.start_mark.line + 1
        field.append(str(step))
    if problem["type"] == "missing":
        field.append(str(location[-1]))
    return line, ".".join(field) or "cohort"


def _no_duplicates(field: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{field}: name {twice} stands more than once")


def _known(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"{what} '{name}' is not defined; known: {', '.join(known) or 'none'}")


def _pick(what: str, name: str, items: Sequence[_Named]) -> _Named:
    for item in items:
        if item.name == name:
            return item
    known = ", ".join(item.name for item in items) or "none"
    raise CohortError(f"no {what} '{name}' in the cohort; known: {known}")

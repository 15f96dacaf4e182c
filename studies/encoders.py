"""The encoders of the study on real tissue: what each is trained on, from which start, how long.

An arm is one encoder. All arms of a group see the same number of patches, except where that is what
the group varies.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import polars as pl
import torch
import yaml
from pydantic import BaseModel, ConfigDict

from nic_core.cohort import EncoderSpec
from nic_core.cohort.encoders import InitialWeights
from nic_core.demo.painted import PAINTED_TASKS, paint_task
from nic_core.demo.variety import ORDINARY, WIDE, Variety
from nic_core.encoders import Encoder, EncoderCard, PatchDataset, load_patch_task, train_encoder
from nic_core.encoders.encoder import build_encoder, encoder_tensors, weights_hash
from nic_core.encoders.files import load_initial_weights
from nic_core.encoders.keras_import import import_keras_encoder
from nic_core.encoders.patch_tasks import save_patch_task
from nic_core.encoders.training import InitialEncoder
from nic_core.parallel import cores
from nic_core.store import atomic_folder
from studies.tissue_tasks import PATCH, dataset

log = logging.getLogger(__name__)

MPP = 0.5
EMBEDDING_SIZE = 128
Learned = Literal["mtl", "vae", "contrastive", "bigan"]
UNSUPERVISED: tuple[Learned, ...] = ("vae", "contrastive", "bigan")
REFERENCES = ("mean_rgb", "colour_and_texture", "untrained")
RELEASED = {
    "released_mtl": "encoder_multitask-4.h5",
    "released_bigan": "encoder_bigan.h5",
}
# kinds of encoders -> their names in tables
NAMES: Mapping[str, str] = {
    "mean_rgb": "mean RGB",
    "colour_and_texture": "44 colour and texture features",
    "untrained": "untrained network",
    "released_mtl": "released MTL-4",
    "released_bigan": "released BiGAN",
    "vae": "VAE",
    "bigan": "BiGAN",
}
VARIETIES: Mapping[str, Variety] = {
    "ordinary": ORDINARY,
    "wide stain": Variety(stain=True),
    "wide optics": Variety(optics=True),
    "wide scale": Variety(scale=True),
    "wide shapes": Variety(shapes=True),
    "wide": WIDE,
}

Group = Literal[
    "reference", "real", "painted", "single", "curve", "patients", "variety", "tuned", "mixed"
]


class Budget(BaseModel):
    """Of the encoders of one group: patches seen by each, and trainings that differ in seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patches_seen: int
    seeds: int


class Painted(BaseModel):
    """Size of a painted task, and the sets of tasks that encoders are trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patches: int
    patients: int
    # the last is also the set of the curves, of the varieties and of the single tasks
    sets: tuple[tuple[str, ...], ...]


class Configuration(BaseModel):
    """Budgets and tasks of the study; ``tissue.yaml`` explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unseen: tuple[str, ...]
    real_tasks: tuple[str, ...]
    pairs: tuple[str, ...]
    painted: Painted
    budgets: dict[Group, Budget]
    unsupervised_seeds: int
    learning_rates: dict[str, float]
    curve: tuple[int, ...]
    patients: tuple[int, ...]


@dataclass(frozen=True)
class Arm:
    """One encoder of the study.

    Attributes
    ----------
    name
        Of its files.
    kind
        What its row of the table is called; the arms of a kind differ in seed and tasks.
    real, painted
        Patch tasks of the training, by name.
    patients
        Patients of each painted task whose patches are trained on; None: all.
    start
        Name of the arm, or of the released encoder, whose weights the training starts from.
    """

    name: str
    group: Group
    kind: str
    seed: int = 0
    objective: Learned | None = None
    real: tuple[str, ...] = ()
    painted: tuple[str, ...] = ()
    variety: str = "ordinary"
    patients: int | None = None
    patches_seen: int = 0
    learning_rate: float | None = None
    start: str | None = None


def read_configuration(path: Path) -> Configuration:
    """Read a configuration file of the study."""
    return Configuration.model_validate(yaml.safe_load(path.read_text()))


def arms(c: Configuration) -> Iterator[Arm]:
    """Yield the encoders of the study, each after the one that it starts from."""
    for kind in (*REFERENCES, *RELEASED):
        yield Arm(kind, "reference", kind)
    every = c.painted.sets[-1]
    for seed in range(c.budgets["painted"].seeds):
        for names in reversed(c.painted.sets):
            yield _mtl(c, "painted", seed, painted=names)
    for seed in range(c.budgets["real"].seeds):
        yield _mtl(c, "real", seed, real=c.real_tasks)
    for seed in range(c.budgets["tuned"].seeds):
        for start in (f"painted-mtl-{len(every)}-{seed}", *RELEASED):
            yield _mtl(c, "tuned", seed, real=c.real_tasks, start=start)
    for seed in range(c.budgets["mixed"].seeds):
        yield _mtl(c, "mixed", seed, painted=every, real=c.real_tasks)
    for seed in range(c.unsupervised_seeds):
        for objective in UNSUPERVISED:
            real = c.pairs if objective == "contrastive" else c.real_tasks
            yield _unsupervised(c, "real", objective, seed, real=real)
            yield _unsupervised(c, "painted", objective, seed, painted=every)
    for seed in range(c.budgets["variety"].seeds):
        for variety in VARIETIES:
            if variety != "ordinary":
                yield _mtl(c, "variety", seed, painted=every, variety=variety)
    for seed in range(c.budgets["curve"].seeds):
        for patches in c.curve:
            yield _mtl(c, "curve", seed, painted=every, patches_seen=patches)
            yield _unsupervised(
                c, "curve", "contrastive", seed, painted=every, patches_seen=patches
            )
    for seed in range(c.budgets["patients"].seeds):
        for patients in c.patients:
            yield _mtl(c, "patients", seed, painted=every, patients=patients)
    for seed in range(c.budgets["single"].seeds):
        for name in every:
            yield _mtl(c, "single", seed, painted=(name,))
    # a task of the real ones is judged by the encoders of the five others
    for seed in range(c.budgets["real"].seeds):
        for names in combinations(c.real_tasks, len(c.real_tasks) - 1):
            yield _mtl(c, "real", seed, real=names)


def _mtl(
    c: Configuration,
    group: Group,
    seed: int,
    *,
    real: tuple[str, ...] = (),
    painted: tuple[str, ...] = (),
    variety: str = "ordinary",
    patients: int | None = None,
    patches_seen: int | None = None,
    start: str | None = None,
) -> Arm:
    tasks = [
        f"{len(names)} {what}" for names, what in ((painted, "painted"), (real, "real")) if names
    ]
    kind, name = f"MTL, {' and '.join(tasks)} tasks", [group, "mtl", str(len(real) + len(painted))]
    if group == "single":
        kind, name = f"single painted task, {painted[0]}", [group, painted[0]]
    if start is not None:
        origin = NAMES.get(start, "MTL on painted tasks")
        kind = f"{origin}, tuned on {tasks[0]} tasks"
        name = [group, start]
    if variety != "ordinary":
        kind += f", {variety}"
        name.append(variety.replace(" ", "_"))
    if patients is not None:
        kind += f", {patients} patients"
        name.append(str(patients))
    if patches_seen is not None:
        kind += f", {patches_seen:,} patches"
        name.append(str(patches_seen))
    if 1 < len(real) < len(c.real_tasks):
        name.append(f"without_{next(task for task in c.real_tasks if task not in real)}")
    return Arm(
        "-".join([*name, str(seed)]),
        group,
        kind,
        seed,
        "mtl",
        real,
        painted,
        variety,
        patients,
        patches_seen or c.budgets[group].patches_seen,
        c.learning_rates["tuned" if start is not None else "mtl"],
        start,
    )


def _unsupervised(
    c: Configuration,
    group: Group,
    objective: Learned,
    seed: int,
    *,
    real: tuple[str, ...] = (),
    painted: tuple[str, ...] = (),
    patches_seen: int | None = None,
) -> Arm:
    what = "real patches" if real else "painted patches"
    kind = f"{NAMES.get(objective, objective)}, {what}"
    name: list[str] = [group, objective]
    if patches_seen is not None:
        kind += f", {patches_seen:,}"
        name.append(str(patches_seen))
    return Arm(
        "-".join([*name, str(seed)]),
        group,
        kind,
        seed,
        objective,
        real,
        painted,
        patches_seen=patches_seen or c.budgets[group].patches_seen,
        learning_rate=c.learning_rates.get(objective),
    )


# --- making --------------------------------------------------------------------------------------


def painted_dataset(name: str, variety: str, size: Painted, cache: Path) -> PatchDataset:
    """Return a painted patch task; its patches are painted once and kept under ``cache``."""
    kept = cache / f"painted-{name}-{variety.replace(' ', '_')}"
    if not kept.exists():
        task = next(task for task in PAINTED_TASKS if task.name == name)
        made = paint_task(
            task,
            patches=size.patches,
            patients=size.patients,
            seed=0,
            variety=VARIETIES[variety],
            processes=cores(),
        )
        group = pl.Series("group", [f"{name} {patient}" for patient in made.groups])
        row = pl.int_range(len(group), eager=True)
        places = pl.DataFrame(
            {
                "source": group,  # a patient has one sheet
                "x": 0,
                "y": 0,
                # the places of patches on the sheet are not kept: no two are adjacent
                "row": 2 * row,
                "column": 0,
                "label": [task.classes[label] for label in made.labels],
                "group": group,
            }
        )
        with atomic_folder(kept) as partial:
            patches = dataset(name, task.organ, task.classes, MPP, made.pixels, places, seed=0)
            save_patch_task(partial, patches)
    return load_patch_task(kept)


def with_patients(task: PatchDataset, patients: int) -> PatchDataset:
    """Return a patch task with the patches of this many training patients; the others stay."""
    train = task.table.filter(split="train")["group"].unique(maintain_order=True)
    if len(train) < patients:
        raise ValueError(f"{task.name} has {len(train)} training patients, not {patients}")
    kept = task.table.filter(~pl.col("group").is_in(train[patients:].implode()))
    table = kept.with_columns(index=pl.int_range(pl.len()).cast(kept.schema["index"]))
    return dataclasses.replace(task, patches=task.patches[kept["index"].to_numpy()], table=table)


def train_arm(
    arm: Arm, tasks: list[PatchDataset], encoders: Path, released: Path, checkpoint: Path
) -> Encoder:
    """Train or import the encoder of an arm.

    Parameters
    ----------
    tasks
        The datasets of ``arm.real`` and ``arm.painted``.
    encoders
        Folder with the encoders of other arms.
    released
        Folder with the Keras files of the released encoders.
    """
    if arm.kind in RELEASED:
        return import_keras_encoder(released / RELEASED[arm.kind], arm.name)
    if arm.kind == "untrained":
        return untrained_encoder(PATCH, EMBEDDING_SIZE, arm.seed)
    start = None
    if arm.start is not None:
        file = released / RELEASED[arm.start] if arm.start in RELEASED else encoders / arm.start
        start = InitialEncoder(load_initial_weights(file, arm.name), arm.start)
    spec = EncoderSpec(
        name=arm.name,
        objective=arm.objective or "mean_rgb",
        tasks=tuple(task.name for task in tasks),
        seed=arm.seed,
        patches_seen=arm.patches_seen or None,
        learning_rate=arm.learning_rate,
        initial_weights=None if start is None else InitialWeights(encoder=arm.start),
    )
    return train_encoder(
        spec,
        tasks,
        patch=PATCH,
        mpp=MPP,
        embedding_size=EMBEDDING_SIZE,
        initial=start,
        checkpoint=checkpoint,
    ).encoder


def untrained_encoder(patch: int, embedding_size: int, seed: int) -> Encoder:
    """Return an encoder with random weights for patches of ``patch`` px."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build_encoder("tellez2020", patch=patch, embedding_size=embedding_size)
    card = EncoderCard(
        name="untrained",
        architecture="tellez2020",
        objective="untrained",
        patch=patch,
        mpp=MPP,
        embedding_size=embedding_size,
        weights_hash=weights_hash("tellez2020", encoder_tensors(module, {})),
    )
    return Encoder(card, module.eval().requires_grad_(False))

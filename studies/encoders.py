"""The encoders of the study on real tissue: what each is trained on, from which start, how long.

An arm is one encoder. All arms of a group see the same number of patches, except where that is what
the group varies.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch
import yaml
from nic_core.demo.painted import PAINTED_TASKS, paint_task
from nic_core.demo.variety import ORDINARY, WIDE, Variety
from pydantic import BaseModel, ConfigDict

from nic_core.cohort import EncoderSpec
from nic_core.cohort.encoders import InitialWeights
from nic_core.encoders import Encoder, EncoderCard, PatchDataset, load_patch_task, train_encoder
from nic_core.encoders.encoder import build_encoder, encoder_tensors, weights_hash
from nic_core.encoders.files import load_encoder
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
VARIETIES: Mapping[str, Variety] = {
    "wide": WIDE,
    "ordinary": ORDINARY,
    "no_stain": Variety(stain=False, optics=True, scale=True, shapes=True),
    "no_optics": Variety(stain=True, optics=False, scale=True, shapes=True),
    "no_scale": Variety(stain=True, optics=True, scale=False, shapes=True),
    "no_shapes": Variety(stain=True, optics=True, scale=True, shapes=False),
}

Group = Literal["reference", "real", "painted", "curve", "variety", "tuned", "mixed"]


class Painted(BaseModel):
    """Size of a painted task: patches and painted patients."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patches: int
    patients: int


class Tuning(BaseModel):
    """Budget of a training that starts from another encoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patches_seen: int
    learning_rate: float


class Configuration(BaseModel):
    """Budgets and tasks of the study; ``tissue.yaml`` explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeds: int
    patches_seen: int
    learning_rates: dict[str, float]
    unseen: tuple[str, ...]
    real_tasks: tuple[str, ...]
    pairs: tuple[str, ...]
    painted: Painted
    counts: tuple[int, ...]
    curve: tuple[int, ...]
    tuning: Tuning


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
    variety: str = "wide"
    patches_seen: int = 0
    learning_rate: float | None = None
    start: str | None = None


def read_configuration(path: Path) -> Configuration:
    """Read a configuration file of the study."""
    return Configuration.model_validate(yaml.safe_load(path.read_text()))


def arms(c: Configuration) -> Iterator[Arm]:
    """Yield the encoders of the study, those first that others start from or compare with."""
    for kind in (*REFERENCES, *RELEASED):
        yield Arm(kind, "reference", kind)
    names = tuple(task.name for task in PAINTED_TASKS)
    for seed in range(c.seeds):
        yield _mtl(c, "painted", f"MTL, {len(names)} painted tasks", seed, painted=names)
        yield _mtl(c, "real", f"MTL, {len(c.real_tasks)} real tasks", seed, real=c.real_tasks)
        for start in (*RELEASED, f"painted-mtl-{len(names)}-{seed}"):
            origin = "painted MTL" if start.startswith("painted") else start.replace("_", " ")
            yield Arm(
                f"tuned-{start}-{seed}" if start in RELEASED else f"tuned-painted-{seed}",
                "tuned",
                f"{origin}, tuned on {len(c.real_tasks)} real tasks",
                seed,
                "mtl",
                real=c.real_tasks,
                patches_seen=c.tuning.patches_seen,
                learning_rate=c.tuning.learning_rate,
                start=start,
            )
        kind = f"MTL, {len(names)} painted and {len(c.real_tasks)} real tasks"
        yield _mtl(c, "mixed", kind, seed, painted=names, real=c.real_tasks)
    for seed in range(c.seeds):
        for objective in UNSUPERVISED:
            rate = c.learning_rates.get(objective)
            real = c.pairs if objective == "contrastive" else c.real_tasks
            for group, from_real, from_painted in (
                ("real", real, ()),
                ("painted", (), names),
            ):
                yield Arm(
                    f"{group}-{objective}-{seed}",
                    "real" if from_real else "painted",
                    f"{objective}, {group} patches",
                    seed,
                    objective,
                    real=from_real,
                    painted=from_painted,
                    patches_seen=c.patches_seen,
                    learning_rate=rate,
                )
    for seed in range(c.seeds):
        for count in c.counts:
            chosen = _subset(names, count, seed)
            yield _mtl(c, "painted", f"MTL, {count} painted tasks", seed, painted=chosen)
        for variety in VARIETIES:
            if variety != "wide":
                kind = f"MTL, {len(names)} painted tasks, {variety.replace('_', ' ')}"
                yield _mtl(c, "variety", kind, seed, painted=names, variety=variety)
    for patches in c.curve:
        kind = f"MTL, {len(names)} painted tasks, {patches:,} patches"
        yield _mtl(c, "curve", kind, 0, painted=names, patches_seen=patches)
    for count in range(1, len(c.real_tasks)):
        for number, chosen in enumerate(combinations(c.real_tasks, count)):
            if count in (1, len(c.real_tasks) - 1):
                yield _mtl(c, "real", f"MTL, {count} real tasks", number, real=chosen)


def _mtl(
    c: Configuration,
    group: Group,
    kind: str,
    seed: int,
    *,
    real: tuple[str, ...] = (),
    painted: tuple[str, ...] = (),
    variety: str = "wide",
    patches_seen: int | None = None,
) -> Arm:
    about = [group, "mtl", str(len(real) + len(painted))]
    about += [variety] if variety != "wide" else []
    about += [str(patches_seen)] if patches_seen else []
    return Arm(
        "-".join([*about, str(seed)]),
        group,
        kind,
        seed,
        "mtl",
        real,
        painted,
        variety,
        patches_seen or c.patches_seen,
        c.learning_rates.get("mtl"),
    )


def _subset(names: tuple[str, ...], count: int, seed: int) -> tuple[str, ...]:
    chosen = np.random.default_rng((seed, count)).choice(len(names), count, replace=False)
    return tuple(names[number] for number in sorted(chosen))


# --- making --------------------------------------------------------------------------------------


def painted_dataset(name: str, variety: str, size: Painted, cache: Path) -> PatchDataset:
    """Return a painted patch task; its patches are painted once and kept under ``cache``."""
    kept = cache / f"painted-{name}-{variety}"
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
        weights = (
            import_keras_encoder(file, arm.start) if arm.start in RELEASED else load_encoder(file)
        )
        start = InitialEncoder(weights, arm.start)
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

"""What fine-tuning a released encoder costs on tissue that it read well, and which ingredient does.

    python -m studies.fine_tuning run FOLDER --released encoder_multitask-4.h5 --out OUT
    python -m studies.fine_tuning show OUT

FOLDER has ``MANIFEST.csv`` (:mod:`studies.tissue_tasks`). The released encoder is tuned on four
small real tasks, in several ways that differ from the first in one ingredient each. Every way is
trained three times, each time without a third of the patients of IDC. Judged are, by balanced
accuracy:

- the probe of IDC on the patients that were kept back, fitted to the other patients;
- the encoder's own head for IDC on the same patients;
- the probes of GlaS grade and of GlaS gland / stroma, which no way was tuned on
  (:mod:`studies.protocol`).

``run`` keeps one file per way, part and seed, and continues where it was interrupted.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Unpack

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from nic_core.cohort import EncoderSpec, PatchTask
from nic_core.encoders import Encoder, PatchDataset, build_patch_task, load_patch_task
from nic_core.encoders.encoder import build_encoder
from nic_core.encoders.keras_import import import_keras_encoder
from nic_core.encoders.networks import PatchEncoder
from nic_core.encoders.objectives.base import Sizes
from nic_core.encoders.objectives.mtl import Multitask, MultitaskBatch, class_probabilities
from nic_core.encoders.probes import Embedder, embed_in_parts
from nic_core.encoders.splits import split_by_group
from nic_core.encoders.training_loop import fit
from nic_core.store import atomic_file, atomic_folder
from studies.protocol import (
    UNIT_SCHEMA,
    balanced_probe,
    paired_difference,
    probe_units,
    score,
)
from studies.settings import check_settings
from studies.tissue_tasks import MANIFEST_TASKS, PATCH, TissueTask, tissue_tasks

TUNED_ON = ("idc", "lc25000", "nct_crc", "osteosarcoma")
UNSEEN = ("glas_grade", "glas_gland")
# patients of IDC, a third of them a part; each part has both classes
PARTS = (
    ("8863", "8917", "8951", "8957"),
    ("8865", "8955", "8956"),
    ("8913", "8959", "8975"),
)
BATCH = 64
MOST_PATCHES = 250  # of a patient and class of IDC, in its probe
BEFORE = "not_tuned"
HEAD = "idc, head"


@dataclass(frozen=True)
class Way:
    """How the encoder is tuned.

    Attributes
    ----------
    rate
        Learning rate; the default of the library.
    steps
        Batches of 64 patches.
    heads_first
        Steps in which only the heads are trained, before the encoder is.
    keep_statistics
        BatchNorm keeps the running statistics of the start, and normalises batches with them.
    replay
        Weight of the squared distance of an embedding from that of the start, in units of the
        variance of the start's embeddings.
    mpp
        um/px of the patches of all tasks; None: each task's own.
    """

    rate: float = 2e-4
    steps: int = 120
    heads_first: int = 0
    keep_statistics: bool = False
    replay: float = 0.0
    mpp: float | None = None


WAYS = {
    "default": Way(),
    "statistics_kept": Way(keep_statistics=True),
    "replay": Way(replay=1.0),
    "heads_first": Way(heads_first=40),
    "rate_5e-5": Way(rate=5e-5),
    "40_steps": Way(steps=40),
    "at_0.5_um": Way(mpp=0.5),
}


class FineTuning(Multitask):
    """Multitask training with the ingredients of a :class:`Way`."""

    def __init__(
        self,
        encoder: PatchEncoder,
        tasks: list[PatchDataset],
        way: Way,
        **sizes: Unpack[Sizes],
    ) -> None:
        super().__init__(encoder, tasks, **sizes)
        self.way = way
        self.steps = 0
        self.start = copy.deepcopy(encoder.network).eval().requires_grad_(False)

    def losses(self, batch: MultitaskBatch) -> dict[str, Tensor]:
        network = self.encoder.network
        # called once a step, after the training loop has set the mode of every layer
        if self.way.keep_statistics:
            for layer in network.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.eval()
        self.steps += 1
        with torch.no_grad():
            before = self.start(batch.inputs)
        embeddings = before if self.steps <= self.way.heads_first else network(batch.inputs)
        parts = embeddings.split([len(labels) for labels in batch.labels])
        losses = {
            f"loss/{task.name}": functional.cross_entropy(self.heads[task.name](part), labels)
            for task, part, labels in zip(self.tasks, parts, batch.labels, strict=True)
        }
        distance = (embeddings - before).square().mean() / before.var(0).mean()
        loss = torch.stack(list(losses.values())).mean() + self.way.replay * distance
        return {"loss": loss, **losses, "distance": distance}


# --- running ---------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    out: Path = options.out
    check_settings(
        out,
        {
            "released": options.released.name,
            "ways": {name: dataclasses.asdict(way) for name, way in WAYS.items()},
        },
    )
    released = import_keras_encoder(options.released, options.released.stem)
    tasks = {task.name: task for task in tissue_tasks(options.folder, out / "patch_tasks")}
    for seed, name in product(range(options.seeds), (BEFORE, *options.ways)):
        for part, patients in enumerate(PARTS):
            run_name = f"{name}-{part}-{seed}"
            path = out / "rows" / f"{run_name}.parquet"
            if path.exists() or (name == BEFORE and seed > 0):
                continue
            start = time.monotonic()
            encoder: Encoder = released
            units: list[pl.DataFrame] = []
            if name != BEFORE:
                folder = out / "encoders" / run_name
                if not folder.exists():
                    with atomic_folder(folder) as partial:
                        _tune(released, tasks, WAYS[name], patients, seed, out, partial)
                encoder, units = _load(released, folder)
            units.append(_kept_back(encoder, tasks["idc"], patients))
            if part == 0:  # the parts differ in patients of IDC only
                units += [probe_units(encoder, tasks[task]) for task in UNSEEN]
            with atomic_file(path) as partial:
                pl.concat(units).write_parquet(partial)
            print(f"{run_name}: {time.monotonic() - start:.0f} s", flush=True)


def _load(released: Encoder, folder: Path) -> tuple[Encoder, list[pl.DataFrame]]:
    """Return a tuned encoder, and what its head for IDC said of the patients kept back."""
    network = copy.deepcopy(released.module)
    network.load_state_dict(torch.load(folder / "encoder.pt", weights_only=True))
    return Encoder(released.card, network), [pl.read_parquet(folder / "head.parquet")]


def _tune(
    released: Encoder,
    tasks: dict[str, TissueTask],
    way: Way,
    patients: tuple[str, ...],
    seed: int,
    out: Path,
    folder: Path,
) -> None:
    """Fine-tune the released encoder without ``patients`` of IDC.

    ``folder`` gets its weights, and the classes that its head for IDC gives to ``patients``.
    """
    sets = [tasks[name].dataset for name in TUNED_ON]
    if way.mpp is not None:
        sets = [_rescaled(data, way.mpp, out / "patch_tasks") for data in sets]
    sets[0] = _without(sets[0], patients)
    spec = EncoderSpec(
        name="tuned",
        objective="mtl",
        tasks=TUNED_ON,
        batch=BATCH,
        patches_seen=BATCH * way.steps,
        seed=seed,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_encoder(
            "tellez2020", patch=PATCH, embedding_size=released.card.embedding_size
        )
        network.load_state_dict(released.module.state_dict())
        objective = FineTuning(network, sets, way, batch=BATCH, validation=BATCH, seed=seed)
        fit(objective, spec, learning_rate=way.rate)
    idc = sets[0]
    rows = idc.rows("test")
    head = class_probabilities(network, objective.heads[idc.name], idc, rows, torch.device("cpu"))
    _units(HEAD, idc, rows, head.argmax(1)).write_parquet(folder / "head.parquet")
    torch.save(network.state_dict(), folder / "encoder.pt")


def _without(data: PatchDataset, patients: tuple[str, ...]) -> PatchDataset:
    """Return a patch task with the patches of ``patients`` as its test split."""
    splits = split_by_group(
        data.labels, data.table["group"].to_list(), seed=0, test_groups=patients
    )
    return dataclasses.replace(data, table=data.table.with_columns(split=pl.Series(splits)))


def _rescaled(data: PatchDataset, mpp: float, cache: Path) -> PatchDataset:
    """Return the patches of a task's images at another um/px."""
    folder = cache / f"{data.name}-{mpp}"
    if not folder.exists():
        own = MANIFEST_TASKS[data.name].mpp
        task = PatchTask(
            name=data.name, organ=data.organ, mpp=own, table=cache / f"{data.name}.csv"
        )
        with atomic_folder(folder) as partial:
            build_patch_task(task, patch=PATCH, mpp=mpp, seed=0, folder=partial)
    return load_patch_task(folder)


def _kept_back(encoder: Embedder, task: TissueTask, patients: tuple[str, ...]) -> pl.DataFrame:
    """Classify the patches of ``patients`` by a probe that was fitted to the other patients."""
    data = task.dataset
    place = pl.int_range(pl.len()).shuffle(seed=0).over("group", "class")
    rows = data.table.filter(place < MOST_PATCHES)["index"].to_numpy()
    embeddings = embed_in_parts(encoder, data.patches, rows)
    kept = data.table["group"].is_in(patients).to_numpy()[rows]
    labels = data.labels[rows]
    probe = balanced_probe(labels[~kept]).fit(embeddings[~kept], labels[~kept])
    return _units(task.name, data, rows[kept], probe.predict(embeddings[kept]))


def _units(
    name: str, data: PatchDataset, rows: NDArray[np.int64], predicted: NDArray[np.integer]
) -> pl.DataFrame:
    table = data.table[rows]
    return pl.DataFrame(
        {
            "task": name,
            "division": 0,
            "unit": rows,
            "group": table["group"],
            "class": table["class"],
            "predicted": predicted,
        },
        UNIT_SCHEMA,
    )


# --- showing ---------------------------------------------------------------------------------


def show(options: argparse.Namespace) -> None:
    found = _read(options.out)
    judged = (TUNED_ON[0], HEAD, *UNSEEN)
    table = Table(
        "way", "seeds", *judged, title="balanced accuracy; difference to not tuned [95 %]"
    )
    for name in (BEFORE, *WAYS):
        if name not in found:
            continue
        cells = []
        for task in judged:
            runs = found[name].get(task, [])
            cells.append(_cell(runs, [] if name == BEFORE else found[BEFORE].get(task, [])))
        table.add_row(name, str(len(found[name][TUNED_ON[0]])), *cells)
    Console(width=150).print(table)


def _read(out: Path) -> dict[str, dict[str, list[pl.DataFrame]]]:
    """Return by way and task the units of every complete run.

    IDC: of a seed, the three parts together. Other tasks: of each encoder.
    """
    found: dict[str, dict[str, list[pl.DataFrame]]] = {}
    for name in (BEFORE, *WAYS):
        for seed in range(len(list((out / "rows").glob(f"{name}-0-*.parquet")))):
            paths = [out / "rows" / f"{name}-{part}-{seed}.parquet" for part in range(len(PARTS))]
            parts = [pl.read_parquet(path) for path in paths if path.exists()]
            if len(parts) < len(PARTS):
                continue  # not finished
            way = found.setdefault(name, {})
            for task in (TUNED_ON[0], HEAD):
                if len(units := pl.concat(parts).filter(task=task)):
                    way.setdefault(task, []).append(units)
            for task in UNSEEN:
                way.setdefault(task, []).extend(
                    units for part in parts if len(units := part.filter(task=task))
                )
    return found


def _cell(runs: list[pl.DataFrame], before: list[pl.DataFrame]) -> str:
    if not runs:
        return ""
    value, low, high = score(runs)
    if not before:
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"
    difference, low, high = paired_difference(runs, before)
    return f"{value:.2f} ({difference:+.2f} [{low:+.2f}, {high:+.2f}])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path, help="folder with MANIFEST.csv")
    running.add_argument("--released", type=Path, required=True, help="Keras file of the encoder")
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--seeds", type=int, default=1)
    running.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    running.set_defaults(command=run)
    showing = commands.add_parser("show")
    showing.add_argument("out", type=Path)
    showing.set_defaults(command=show)
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()

"""Study on real tissue: do labels of other organs teach an encoder more than no labels?

    python -m studies.tissue run REALDATA --released FOLDER --out FOLDER [--groups real painted]
    python -m studies.tissue show FOLDER [--picture study.png]

``run`` trains or imports each encoder of the configuration (``studies/tissue.yaml``) and probes it
on every real task (:mod:`studies.protocol`). One file per encoder is written under ``rows``; an
interrupted run continues where it stopped. ``show`` prints the tables of what is finished. The
tasks ``unseen`` of the configuration are in no training. On another task an encoder is judged only
if the task was not in its training; a configuration with two trained tasks of the same images, or
with an unseen and a trained one, is refused.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import polars as pl
import torch
from matplotlib.figure import Figure

from nic_core.encoders import Encoder
from nic_core.encoders.files import load_encoder, save_encoder
from nic_core.store import atomic_file, atomic_folder
from studies.encoders import (
    NAMES,
    Arm,
    Configuration,
    Group,
    arms,
    painted_dataset,
    read_configuration,
    train_arm,
    with_patients,
)
from studies.features import ColourAndTexture
from studies.protocol import paired_difference, probe_units, score
from studies.tables import markdown_table
from studies.tissue_tasks import TissueTask, tissue_tasks

CONFIGURATION = Path(__file__).with_name("tissue.yaml")


def run(options: argparse.Namespace) -> None:
    """Train, probe and write every encoder that has no row yet."""
    out: Path = options.out
    configuration = _settings(out, options.config)
    tasks = tissue_tasks(options.folder, out / "patch_tasks")
    by_name = {task.name: task for task in tasks}
    check_images(configuration, by_name)
    for arm in arms(configuration):
        path = _row(out, arm)
        if path.exists() or arm.group not in options.groups:
            continue
        start = time.monotonic()
        encoder = _encoder(arm, configuration, by_name, out, options.released)
        units = [probe_units(encoder, task) for task in tasks]
        with atomic_file(path) as partial:
            pl.concat(units).write_parquet(partial)
        scores = " ".join(f"{u['task'][0]} {score([u])[0]:.3f}" for u in units)
        print(f"{arm.name}: {time.monotonic() - start:.0f} s: {scores}", flush=True)


def check_images(configuration: Configuration, tasks: Mapping[str, TissueTask]) -> None:
    """Exit if an encoder would be judged on images that another task had in its training."""
    trained = [tasks[name].tissue for name in configuration.real_tasks]
    unseen = {tasks[name].tissue for name in configuration.unseen}
    shared = {tissue for tissue in trained if tissue in unseen or trained.count(tissue) > 1}
    if shared:
        raise SystemExit(
            f"the images of {', '.join(sorted(shared))} belong to several tasks; real_tasks may "
            "have one of these tasks, and none if unseen has one"
        )


def _encoder(
    arm: Arm,
    configuration: Configuration,
    tasks: dict[str, TissueTask],
    out: Path,
    released: Path,
) -> ColourAndTexture | Encoder:
    if arm.kind == "colour_and_texture":
        return ColourAndTexture()
    kept = out / "encoders" / arm.name
    if not kept.exists():
        data = [tasks[name].dataset for name in arm.real]
        for name in arm.painted:
            task = painted_dataset(name, arm.variety, configuration.painted, out / "patch_tasks")
            data.append(task if arm.patients is None else with_patients(task, arm.patients))
        checkpoint = out / "checkpoints" / f"{arm.name}.pt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        encoder = train_arm(arm, data, kept.parent, released, checkpoint)
        with atomic_folder(kept) as partial:
            save_encoder(partial, encoder)
        checkpoint.unlink(missing_ok=True)
    return load_encoder(kept)


def _settings(out: Path, file: Path | None) -> Configuration:
    """Return the configuration of the folder, written at the first run; exit if it differs."""
    kept = out / "configuration.json"
    asked = None if file is None else read_configuration(file)
    if not kept.exists():
        asked = asked or read_configuration(CONFIGURATION)
        with atomic_file(kept) as partial:
            partial.write_text(asked.model_dump_json(indent=2) + "\n")
    found = Configuration.model_validate(json.loads(kept.read_text()))
    if asked is not None and asked != found:
        raise SystemExit(f"{out} was made with another configuration; give another --out")
    return found


def _row(out: Path, arm: Arm) -> Path:
    return out / "rows" / f"{arm.name}.parquet"


# --- showing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """The finished encoders of one row of the tables.

    Attributes
    ----------
    units
        Task -> the units of each of its encoders that was not trained on the task's images.
    """

    name: str
    group: Group
    supervised: bool
    units: dict[str, list[pl.DataFrame]]


def show(options: argparse.Namespace) -> None:
    """Print the tables of what is finished, as Markdown, and draw the picture."""
    kinds, configuration = finished(options.folder)
    for table in (
        _scores(kinds, configuration.unseen),
        _differences(kinds, configuration.unseen),
        _scores(kinds, configuration.real_tasks),
    ):
        print(f"{table}\n")
    if options.picture is not None:
        picture(kinds, configuration).savefig(options.picture, dpi=110)


def finished(out: Path) -> tuple[list[Kind], Configuration]:
    """Read the rows of a folder."""
    configuration = _settings(out, None)
    kinds: dict[str, Kind] = {}
    for arm in arms(configuration):
        if not _row(out, arm).exists():
            continue
        supervised = arm.objective == "mtl" or arm.kind == "released_mtl"
        kind = kinds.setdefault(arm.kind, Kind(arm.kind, arm.group, supervised, {}))
        for (task,), units in pl.read_parquet(_row(out, arm)).group_by("task", maintain_order=True):
            own = kind.units.setdefault(str(task), [])
            if task not in arm.real:
                own.append(units)
    return list(kinds.values()), configuration


def _scores(kinds: list[Kind], tasks: Sequence[str]) -> str:
    """Return the table of scores with intervals; encoders that saw all the tasks are left out."""
    rows = [
        [
            NAMES.get(kind.name, kind.name),
            str(max(len(kind.units[task]) for task in tasks)),
            *(_cell(score(kind.units[task])) if kind.units[task] else "" for task in tasks),
        ]
        for kind in kinds
        if any(kind.units[task] for task in tasks)
    ]
    return markdown_table(["encoder", "trainings", *tasks], rows)


def _differences(kinds: list[Kind], tasks: Sequence[str]) -> str:
    """Return the table of differences from the best encoder without labels, and from features."""
    trained = [kind for kind in kinds if kind.group != "reference" or kind.name == "released_bigan"]
    without = [kind for kind in trained if not kind.supervised]
    features = [kind for kind in kinds if kind.name == "colour_and_texture"]
    pairs = []
    for task in tasks:
        best = max(without, key=lambda kind: score(kind.units[task])[0], default=None)
        pairs += [(task, other) for other in [*([best] if best else []), *features]]
    rows = [
        [
            NAMES.get(kind.name, kind.name),
            *(
                _cell(paired_difference(kind.units[task], other.units[task]), signed=True)
                for task, other in pairs
            ),
        ]
        for kind in kinds
        if kind.supervised
    ]
    return markdown_table(
        [
            "encoder",
            *(f"{task} minus {NAMES.get(other.name, other.name)}" for task, other in pairs),
        ],
        rows,
    )


def _cell(found: tuple[float, float, float], *, signed: bool = False) -> str:
    value, low, high = found
    return f"{value:{'+' if signed else ''}.2f} [{low:.2f}, {high:.2f}]"


def picture(kinds: list[Kind], configuration: Configuration) -> Figure:
    """Plot scores with intervals, one panel per unseen task; one colour for each group."""
    figure = Figure(figsize=(12, 1.5 + 0.24 * len(kinds)), layout="constrained")
    panels = figure.subplots(1, len(configuration.unseen), sharey=True, squeeze=False)[0]
    groups = list(dict.fromkeys(kind.group for kind in kinds))
    for axes, task in zip(panels, configuration.unseen, strict=True):
        for place, kind in enumerate(kinds):
            value, low, high = score(kind.units[task])
            axes.errorbar(
                value,
                place,
                xerr=[[value - low], [high - value]],
                fmt="s" if kind.supervised else "o",
                mfc=None if kind.supervised else "white",
                color=f"C{groups.index(kind.group)}",
                ms=4,
            )
        axes.axvline(0.5, color="0.7", lw=0.8, ls=":")
        axes.set_title(task.replace("_", " "), fontsize=10)
        axes.set_xlabel("balanced accuracy by patient, 95 % interval", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(kinds)), [NAMES.get(kind.name, kind.name) for kind in kinds])
    panels[0].tick_params(axis="y", labelsize=7)
    panels[0].invert_yaxis()
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run")
    runner.set_defaults(work=run)
    runner.add_argument("folder", type=Path, help="folder with MANIFEST.csv")
    runner.add_argument("--released", type=Path, required=True, help="folder of Keras encoders")
    runner.add_argument("--out", type=Path, required=True)
    runner.add_argument("--config", type=Path, help="default: studies/tissue.yaml")
    runner.add_argument("--groups", nargs="*", choices=get_args(Group), default=get_args(Group))
    runner.add_argument("--threads", type=int, default=2)
    shower = commands.add_parser("show")
    shower.set_defaults(work=show)
    shower.add_argument("folder", type=Path)
    shower.add_argument("--picture", type=Path)
    options = parser.parse_args(arguments)
    if "threads" in options:
        torch.set_num_threads(options.threads)
    options.work(options)


if __name__ == "__main__":
    main()

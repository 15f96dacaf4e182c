"""Measure how much each CPU-bound step slows down beside other work on the same cores.

    python -m benchmarks.competitor data/demo/cohort.yaml data/store
    python -m benchmarks.competitor data/demo/cohort.yaml data/store --step explanation

Each step of a finished study is done again, in a copy of its store: alone, and beside one process
for each core that computes without a pause. The two take turns. A step that loses only the time
that the others use takes twice as long. One that takes longer loses time otherwise, mostly because
its threads wait for each other while they hold a core; its CPU time then grows too. All steps use
as many threads as they do alone on the machine.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.conditions import conditions, ratio
from nic_core.cohort import Cohort, EncoderSpec, load_cohort
from nic_core.encoders.patch_tasks import load_patch_task
from nic_core.encoders.training import train_encoder
from nic_core.grids import open_grid
from nic_core.models.explanation import explain
from nic_core.models.files import load_model
from nic_core.parallel import cores
from nic_core.steps.encoders import make_encoder_probe
from nic_core.steps.grids import make_grid, prepare_encoder
from nic_core.steps.keys import patch_task_keys
from nic_core.steps.predictions import load_champion, make_prediction, planned
from nic_core.steps.slide_models import make_slide_model
from nic_core.steps.slides import make_patch_table, make_slide
from nic_core.store import GridKey, ModelKey, PatchTableKey, PredictionKey, Store
from nic_core.tiling.patches import read_patch_table

NOT_COPIED = ("dagster", "mlflow", "explanations", "predictions", "evaluation_report")
AT_LEAST = 1.5  # s of a measurement; a shorter step is repeated
EPOCHS = 2  # of each fold
PATCHES = 320  # seen by the training of the encoder
MOST = 2.2  # aim for the time beside others, relative to that alone


def steps(cohort: Cohort, store: Store) -> dict[str, Callable[[], object]]:
    """Return the steps, with the first trained encoder and the first target of the study."""
    encoder = next(
        e for e in cohort.networks if isinstance(e, EncoderSpec) and e.objective == "mtl"
    )
    key = ModelKey(encoder=encoder.name, target=cohort.targets[0].name)
    model = load_model(store.slide_model(key))
    geometry = cohort.geometry(encoder.name)
    # the slide with the most cells
    slide = max(
        (path.name for path in (store.root / "slides").iterdir()),
        key=lambda name: int(
            read_patch_table(store.patch_table(PatchTableKey(geometry=geometry.name, slide=name)))[
                "kept"
            ].sum()
        ),
    )
    prepared = prepare_encoder(cohort, store, encoder.name)
    grid = open_grid(store.grid(GridKey(encoder=encoder.name, slide=slide)))
    target = next(target.name for target in cohort.targets if store.champion(target.name).exists())
    champion = load_champion(cohort, store, target)
    assert champion is not None
    predicted = PredictionKey(champion=target, slide=slide)
    row = planned(store, predicted)
    models = cohort.settings.models.model_copy(update={"epochs": EPOCHS})
    settings = cohort.settings.model_copy(update={"models": models})
    short = cohort.model_copy(update={"settings": settings})
    tasks = [
        load_patch_task(store.patch_task(task))
        for task in patch_task_keys(cohort, encoder.name).values()
    ]

    def train() -> None:
        train_encoder(
            encoder.model_copy(update={"patches_seen": PATCHES}),
            tasks,
            patch=geometry.patch,
            mpp=geometry.mpp,
            embedding_size=prepared.card.embedding_size,
            device="cpu",
        )

    return {
        "tissue mask": lambda: make_slide(store, slide),
        "patch table": lambda: make_patch_table(
            cohort, store, PatchTableKey(geometry=geometry.name, slide=slide)
        ),
        f"compression, {prepared.precision}": lambda: make_grid(cohort, store, prepared, slide),
        "encoder, training": train,
        "encoder, probes": lambda: make_encoder_probe(cohort, store, encoder.name),
        "slide model, training": lambda: make_slide_model(short, store, key, device="cpu"),
        "prediction": lambda: make_prediction(cohort, store, champion, predicted, row),
        "explanation": lambda: explain(
            model.networks, grid, model.card.target, crop=model.card.crop
        ),
    }


@contextmanager
def competitors() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Start a process on each core that computes without a pause; yield what lets them work."""
    spawn = multiprocessing.get_context("spawn")
    places = sorted(os.sched_getaffinity(0))[: cores()]
    started = [spawn.Process(target=_compute, args=(core,), daemon=True) for core in places]
    for process in started:
        process.start()

    def send(number: signal.Signals) -> None:
        for process in started:
            assert process.pid is not None
            os.kill(process.pid, number)

    @contextmanager
    def working() -> Iterator[None]:
        send(signal.SIGCONT)
        try:
            yield
        finally:
            send(signal.SIGSTOP)

    try:
        send(signal.SIGSTOP)
        yield working
    finally:
        for process in started:
            process.kill()


def _compute(core: int) -> None:
    os.sched_setaffinity(0, {core})
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("store", type=Path, help="complete store of the cohort; it is copied")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", action="append", default=[], help="measure this step only")
    options = parser.parse_args()
    console = Console(width=120)
    console.print(conditions(), soft_wrap=True)
    table = Table("step", "alone, s", "cores used", "time beside / alone", "CPU time", "aim")
    table.box = box.MARKDOWN
    with tempfile.TemporaryDirectory() as folder, competitors() as working:
        root = Path(folder) / "store"
        shutil.copytree(options.store, root, ignore=shutil.ignore_patterns(*NOT_COPIED))
        for name, step in steps(load_cohort(options.cohort), Store(root)).items():
            if options.step and name not in options.step:
                continue
            once = _times(step, 1)[0]
            repeats = max(1, math.ceil(AT_LEAST / once))
            alone, beside = [], []
            for _ in range(options.rounds):
                alone.append(_times(step, repeats))
                with working():
                    beside.append(_times(step, repeats))
            wall, cpu = (
                ([times[i] for times in alone], [times[i] for times in beside]) for i in (0, 1)
            )
            slower = statistics.median(b / a for a, b in zip(*wall, strict=True))
            table.add_row(
                name,
                f"{statistics.median(wall[0]) / repeats:.2f}",
                f"{statistics.median(c / w for w, c in alone):.1f}",
                ratio(wall[1], wall[0], 2),
                ratio(cpu[1], cpu[0], 2),
                "met" if slower <= MOST else f"missed: {MOST} or less",
            )
            console.print(f"{name}: {slower:.2f}")
    console.print(table)


def _times(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return the wall time and the CPU time of this process, s."""
    start = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        work()
    return time.perf_counter() - start[0], time.process_time() - start[1]


if __name__ == "__main__":
    main()

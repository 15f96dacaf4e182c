"""Kill the processes of a study at random moments, and verify the store after each kill.

    python benchmarks/kills.py OUT --kills 100

A small demo cohort is materialized once without interruption, then in rounds with interruptions.
SIGKILL ends either a run (a refresh, which is one process) or a step of a run (started by
``dagster asset materialize``, one process per step, which retries killed steps). After every kill,
each product in the store must be complete. After the next materialization, no lock and no temporary
file may be left, and all grids, weights and predictions must equal those without interruption.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import dagster as dg
import polars as pl
import yaml

from nic_assets.operations.refresh import main as refresh_main
from nic_core.demo.cohort import make_demo
from nic_core.encoders.files import read_card
from nic_core.grids import grid_hash
from nic_core.models.files import load_model
from nic_core.steps import digest
from nic_core.steps.slide_models import PREDICTIONS
from nic_core.steps.verification import verify_store
from nic_core.store import Store

MATERIALIZE = ("-m", "dagster", "asset", "materialize")
DEFINITIONS = ("-f", str(Path(__file__).with_name("killed_definitions.py")))
STEPS = (
    ("encoder", "--partition", "mtl"),
    ("grid", "--partition-range", "mtl|demo-01-1...mtl|demo-10-1"),
    ("slide_model", "--partition", "mtl|growth"),
)
KILLS_A_RUN = 8
LONGEST = 2.0  # s after the start of a step, within which it is killed
HOME = """telemetry: {enabled: false}
concurrency: {pools: {granularity: op, default_limit: 1}}
run_monitoring: {enabled: true}
"""

# runs are forked from a server process that has done the slow imports, as steps are
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["torch", "mlflow", "nic_assets.build", "nic_assets.operations.refresh"]
)


@dataclass(frozen=True)
class Study:
    """A cohort file with its own store and Dagster home."""

    cohort: Path
    root: Path

    @property
    def store(self) -> Store:
        return Store(self.root / "store")

    @property
    def environment(self) -> dict[str, str]:
        return {
            "NIC_COHORT": str(self.cohort),
            "NIC_STORE": str(self.store.root),
            "DAGSTER_HOME": str(self.root / "home"),
            "PYTHONWARNINGS": "ignore",
        }

    def instance(self) -> dg.DagsterInstance:
        """Create the Dagster home; one process must do so before others use it."""
        home = self.root / "home"
        home.mkdir(parents=True, exist_ok=True)
        (home / "dagster.yaml").write_text(HOME)
        return dg.DagsterInstance.from_config(str(home))

    @property
    def log(self) -> str:
        """The end of the log of all refreshes."""
        return (self.root / "log.txt").read_text()[-5000:]

    def start_refresh(self) -> BaseProcess:
        """Start ``nic refresh`` in another process."""
        process = processes.Process(target=_refresh, args=(self.environment, self.root))
        process.start()
        return process

    def refresh(self) -> float:
        """Refresh the study without interruption; return the duration in s."""
        started = time.monotonic()
        process = self.start_refresh()
        process.join()
        if process.exitcode:
            raise SystemExit(f"failed:\n{self.log}")
        return time.monotonic() - started

    def start_materialize(self, asset: str, *partition: str) -> subprocess.Popen[bytes]:
        """Start ``dagster asset materialize``: a run with one process per step."""
        command = [sys.executable, *MATERIALIZE, *DEFINITIONS, "--select", asset, *partition]
        with (self.root / "log.txt").open("a") as log:  # a pipe would fill up and block the process
            return subprocess.Popen(
                command,
                env=os.environ | self.environment | {"PYTHONPATH": str(Path(__file__).parents[1])},
                cwd=self.root,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def results(self) -> dict[str, str]:
        """Return the hashes of all grids, weights and predictions, by product."""
        found = {}
        for product in self.store.products():
            match product.asset:
                case "grid":
                    found[str(product)] = grid_hash(product.path)
                case "encoder":
                    found[str(product)] = read_card(product.path).weights_hash
                case "slide_model":
                    found[str(product)] = digest(
                        load_model(product.path).card.networks,
                        pl.read_parquet(product.path / PREDICTIONS).rows(),
                    )
        return found

    def broken(self) -> list[str]:
        """Return the problems of incomplete products."""
        return [found.problem for found in verify_store(self.store) if found.problem is not None]

    def litter(self) -> list[str]:
        """Return the names of locks and temporary files."""
        return [file.name for item in self.store.leftovers() for file in item.files]


def _refresh(environment: dict[str, str], root: Path) -> None:
    os.environ.update(environment)
    os.chdir(root)
    with (root / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.exit(refresh_main())


def kill_refresh(study: Study, moment: float) -> bool:
    """Kill a refresh after ``moment`` s; return False if it had finished before."""
    process = study.start_refresh()
    process.join(moment)
    process.kill()
    process.join()
    if problems := study.broken():
        raise SystemExit(f"incomplete products after killing a run: {problems}")
    if process.exitcode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the refresh failed before it was killed:\n{study.log}")
    return process.exitcode != 0


def kill_steps(study: Study, kills: int, chance: random.Random, *asset: str) -> int:
    """Kill the step of a run up to ``kills`` times; return the number of kills."""
    process = study.start_materialize(*asset)
    done = 0
    while process.poll() is None:
        step = _step(process.pid) if done < kills else None
        if step is None:
            time.sleep(0.02)
            continue
        time.sleep(chance.uniform(0, LONGEST))
        try:
            os.kill(step, signal.SIGKILL)
        except ProcessLookupError:  # the step had finished
            continue
        done += 1
        while _alive(step):
            time.sleep(0.01)
        if problems := study.broken():
            raise SystemExit(f"incomplete products after killing a step: {problems}")
    if process.returncode:
        raise SystemExit(f"the run failed after its step was killed:\n{study.log}")
    return done


def _step(run: int) -> int | None:
    """Return the process id of a run's step: a child of Dagster's fork server."""
    for child in _children(run):
        if b"forkserver" in _command(child):
            for step in _children(child):
                return step
    return None


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(c) for task in tasks for c in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def compare(study: Study, expected: dict[str, str]) -> None:
    """Exit with a message unless the study is complete, clean, and has the expected results."""
    if problems := study.broken():
        raise SystemExit(f"incomplete products: {problems}")
    if litter := study.litter():
        raise SystemExit(f"locks or temporary files are left: {litter}")
    found = study.results()
    if found != expected:
        differing = {k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k)}
        raise SystemExit(f"results differ from those without interruption: {sorted(differing)}")


def quick_demo(folder: Path) -> Path:
    """Write a cohort of twelve small slides, one encoder and one target, with fast settings."""
    path = make_demo(folder, slides=12, patches_per_task=60, side=1024, workers=1)
    cohort = yaml.safe_load(path.read_text())
    cohort["patch_tasks"] = cohort["patch_tasks"][:2]
    cohort["maps"] = []
    cohort["encoders"] = [
        {
            "name": "mtl",
            "objective": "mtl",
            "tasks": [task["name"] for task in cohort["patch_tasks"]],
            "patches_seen": 256,  # ten epochs
            "batch": 16,
        }
    ]
    cohort["targets"] = [target for target in cohort["targets"] if target["name"] == "growth"]
    cohort["settings"]["models"] |= {"crop_um": 512, "epochs": 4, "bootstrap": 50}
    quick = folder / "quick.yaml"
    quick.write_text(yaml.safe_dump(cohort))
    return quick


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, chance = arguments.out.resolve(), random.Random(arguments.seed)
    cohort = quick_demo(out / "demo")

    undisturbed = Study(cohort, out / "undisturbed")
    with undisturbed.instance():
        seconds = undisturbed.refresh()
    expected = undisturbed.results()
    print(f"without interruption: {seconds:.0f} s, {len(expected)} results", flush=True)

    kills: Counter[str] = Counter()
    for number in itertools.count(1):
        study = Study(cohort, out / f"killed-{number}")
        with study.instance():
            pass
        while kills.total() < arguments.kills and kill_refresh(
            study, chance.uniform(0, seconds / 12)
        ):
            kills["run"] += 1
        study.refresh()
        compare(study, expected)
        for asset, *partition in STEPS:
            left = min(KILLS_A_RUN, arguments.kills - kills.total())
            kills["step"] += kill_steps(study, left, chance, asset, *partition)
            compare(study, expected)
        print(f"round {number}: killed {dict(kills)}; same results", flush=True)
        if kills.total() >= arguments.kills:
            break


if __name__ == "__main__":
    main()

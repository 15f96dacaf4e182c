"""Measure how long commands take to start, as ratios to commands that do as little as possible.

    python benchmarks/start_up.py --rounds 7

Each command is paired with a reference, and both run in turn (A B A B ...). Printed are the
processor time of a command with all its descendants, median and range, and the median of the
ratios of a round. Wall time is printed too; other processes lengthen it.
"""

import argparse
import contextlib
import ctypes
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nic_core.demo import make_demo

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent

# an empty asset, materialized by the executor of processes that the study's assets have too
EMPTY_ASSET = """
import dagster as dg


@dg.asset
def nothing() -> None: ...


defs = dg.Definitions([nothing], executor=dg.multiprocess_executor)
"""
# a command line of one command
EMPTY_COMMAND = """
import typer

app = typer.Typer(add_completion=False)


@app.command()
def nothing() -> None: ...


app()
"""


@dataclass(frozen=True)
class Cost:
    """Seconds of one execution: of the processors, and on the clock."""

    processor: float
    wall: float


def run(command: Sequence[str], environment: Mapping[str, str]) -> Cost:
    """Run a command and wait for all of its descendants, which :func:`adopt_orphans` requires."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    if process.wait() != 0:
        raise SystemExit(f"exit status {process.returncode}: {' '.join(command)}")
    wall = time.perf_counter() - start
    with contextlib.suppress(ChildProcessError):  # no process of its group is left
        while True:
            os.waitpid(-process.pid, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Cost(used, wall)


def adopt_orphans() -> None:
    """Let this process become the parent of its descendants whose parent ends before them.

    The server process from which Dagster forks steps is one. Without a parent that waits for it,
    its processor time would be lost.
    """
    subreaper = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
    if ctypes.CDLL(None, use_errno=True).prctl(subreaper, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    adopt_orphans()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cohort = make_demo(folder / "demo", seed=0, slides=2, patches_per_task=40, side=768)
        (folder / "empty_asset.py").write_text(EMPTY_ASSET)
        (folder / "empty_command.py").write_text(EMPTY_COMMAND)
        shutil.copy(ROOT / "dagster.yaml", folder)
        environment = {
            **os.environ,
            "NIC_COHORT": str(cohort),
            "NIC_STORE": str(folder / "store"),
            "NIC_DAGSTER_STORAGE": str(folder / "records"),
            "DAGSTER_HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        slide = next(iter(sorted((folder / "demo" / "slides").glob("*.tif"))))
        make = [str(PROGRAMS / "dagster"), "asset", "materialize"]
        study = [*make, "-m", "nic_assets.definitions"]
        run([*study, "--select", "slide_index"], environment)  # adds the partitions
        help_of_nothing = [sys.executable, str(folder / "empty_command.py"), "--help"]
        empty = [*make, "-f", str(folder / "empty_asset.py"), "--select", "nothing"]
        pairs = {
            "nic --help": ([str(PROGRAMS / "nic"), "--help"], help_of_nothing),
            "nic inspect SLIDE": ([str(PROGRAMS / "nic"), "inspect", str(slide)], help_of_nothing),
            "dagster asset materialize: slide": (
                [*study, "--select", "slide", "--partition", slide.stem],
                empty,
            ),
            "dagster asset materialize: slide_index": ([*study, "--select", "slide_index"], empty),
        }
        print(f"{'':<42}{'processor, s':>24}{'wall, s':>10}{'reference, s':>15}{'ratio':>8}")
        for label, (command, reference) in pairs.items():
            costs, base = [], []
            for _ in range(options.rounds):
                base.append(run(reference, environment))
                costs.append(run(command, environment))
            used = sorted(cost.processor for cost in costs)
            middle = statistics.median(used)
            shown = f"{middle:.2f} ({used[0]:.2f} to {used[-1]:.2f})"
            wall = statistics.median(cost.wall for cost in costs)
            ratio = statistics.median(
                cost.processor / other.processor for cost, other in zip(costs, base, strict=True)
            )
            of_base = statistics.median(cost.processor for cost in base)
            print(f"{label:<42}{shown:>24}{wall:>10.2f}{of_base:>15.2f}{ratio:>8.2f}", flush=True)


if __name__ == "__main__":
    main()

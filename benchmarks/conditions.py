"""Conditions of a measurement of speed: processor, load, date, and rounds that alternate."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from nic_core.devices import resolve_device, resolve_precision
from nic_core.parallel import cores

# instructions of the CPU that networks compute with, as the kernel names them
_INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "BF16",
    "avx512_fp16": "FP16",
    "amx_tile": "AMX",
}


def processor() -> str:
    """Return the name of the processor."""
    return _cpuinfo("model name") or platform.machine()


def instructions() -> str:
    """Return the vector and matrix instructions of the processor."""
    flags = set(_cpuinfo("flags").split())
    found = [name for flag, name in _INSTRUCTIONS.items() if flag in flags]
    missing = [name for name in ("AMX",) if name not in found]
    return ", ".join([*found, *(f"no {name}" for name in missing)])


def _cpuinfo(field: str) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    values = [line.partition(":")[2].strip() for line in lines if line.startswith(field)]
    return values[0] if values else ""


def conditions() -> str:
    """Return one line for the head of a table; the load is that before the measurement."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    auto = resolve_precision("auto", resolve_device("cpu"))
    return (
        f"{processor()} ({instructions()}), {cores()} cores, load {load}, torch "
        f"{version('torch')}, {date.today().isoformat()}; precision auto is {auto} on this CPU"
    )


def in_turn(works: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call each function once a round, in turn, as the speed of a machine drifts.

    Parameters
    ----------
    works : mapping of callables
        Each returns what it measured.
    rounds : int

    Returns
    -------
    dict
        One value a round for each name.
    """
    measured: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            measured[name].append(work())
    return measured


def rate(work: Callable[[], int]) -> float:
    """Return patches per second; ``work`` returns its patches."""
    start = time.perf_counter()
    patches = work()
    return patches / (time.perf_counter() - start)


def middle(values: Sequence[float]) -> str:
    """Return the median as text."""
    return f"{statistics.median(values):,.0f}"


def ratio(above: Sequence[float], below: Sequence[float], digits: int = 1) -> str:
    """Return the median ratio of two series over the rounds, with the lowest and the highest."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, mid, high = (
        f"{value:.{digits}f}" for value in (min(ratios), statistics.median(ratios), max(ratios))
    )
    return f"{mid} ({low} to {high})"

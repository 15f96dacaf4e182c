"""The GPUs of a machine, one to a process.

A GPU-bound step takes one with :func:`leased_device` for as long as it works. The lease is a
lock of the system, under the GPU's own UUID: it holds whatever indices ``CUDA_VISIBLE_DEVICES``
gives, among all processes of a user on the machine whoever started them, and a process that dies
gives it back.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from nic_core.store import StoreBusyError, exclusive_lock
from nic_core.torch_internals import cpu_has_amx
from nic_core.types import Precision, RequestedPrecision

PATIENCE = 1.0  # s between two looks for a free GPU

log = logging.getLogger(__name__)


def resolve_device(device: str) -> torch.device:
    """``auto``: the CUDA device if there is one, else the CPU.

    Raises
    ------
    ValueError
        There is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device '{device}' is none: give auto, cpu or cuda") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device '{device}' is not here: PyTorch finds no such CUDA device")
    return found


def resolve_precision(precision: RequestedPrecision, device: torch.device) -> Precision:
    """``auto``: bfloat16 where the device has matrix units for it, else float32.

    Those are CUDA devices since Ampere and CPUs with AMX. A CPU that multiplies bfloat16 in its
    vector units alone is slower with it than with float32, in training as in inference.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and cpu_has_amx()
    return "bfloat16" if fast else "float32"


def gpu_names() -> list[str]:
    """The UUID of each CUDA device that this process sees, by its index."""
    return [
        str(torch.cuda.get_device_properties(index).uuid)
        for index in range(torch.cuda.device_count())
    ]


@contextmanager
def leased_device() -> Iterator[str]:
    """A device of one's own: ``cuda:1``, or ``cpu`` on a machine without GPUs.

    Waits while every GPU is in use. In the block the GPU is the thread's current one, which
    page-locked memory belongs to. The CPU is not leased: who wants turns there has to see to it.
    """
    names = gpu_names()
    if not names:
        yield "cpu"
        return
    with leased(names) as index, torch.cuda.device(index):
        try:
            yield f"cuda:{index}"
        finally:
            # a process that lives on leaves the next holder its memory
            torch.cuda.empty_cache()


@contextmanager
def leased(names: Sequence[str], folder: Path | None = None) -> Iterator[int]:
    """Hold one of ``names`` that nobody else holds, waiting for it; gives its place.

    Parameters
    ----------
    names
        At least one. Whoever shares something calls it by the same name.
    folder
        Where the locks lie; default: one of this user and machine.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"nic-devices-{os.getuid()}"
    with ExitStack() as stack:
        while (place := _free_place(names, folder, stack)) is None:
            log.info("waits for one of %d GPUs: all are in use", len(names))
            time.sleep(PATIENCE)
        yield place


def _free_place(names: Sequence[str], folder: Path, stack: ExitStack) -> int | None:
    for place, name in enumerate(names):
        try:
            stack.enter_context(exclusive_lock(folder / name, wait=False))
        except StoreBusyError:
            continue
        return place
    return None

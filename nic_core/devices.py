"""Devices: choose device and precision, and lease a GPU to one step at a time.

A step that needs a GPU leases one with :func:`leased_device` while it works. A lease is a file lock
named by the UUID of the GPU. It is therefore independent of the indices that
``CUDA_VISIBLE_DEVICES`` assigns, valid among all processes of a user on the machine, and released
by the operating system when a process dies.
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

POLL_SECONDS = 1.0  # time between two attempts to lease a GPU
WAITING_LOGGED_EVERY = 60.0  # s between two lines of a step that waits for a GPU

log = logging.getLogger(__name__)


def resolve_device(device: str) -> torch.device:
    """Return a PyTorch device by name.

    Parameters
    ----------
    device : str
        ``auto`` (a CUDA device if there is one, else the CPU) or a PyTorch name such as ``cuda:1``.

    Raises
    ------
    ValueError
        The device does not exist.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device '{device}' does not exist; give auto, cpu or cuda") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device '{device}' is not available: PyTorch finds {torch.cuda.device_count()} CUDA "
            "devices; give auto or cpu"
        )
    return resolved


def resolve_precision(precision: RequestedPrecision, device: torch.device) -> Precision:
    """Return the precision to use; ``auto`` depends on the device.

    ``auto`` is bfloat16 if the device has matrix units for it, which are CUDA devices since Ampere
    and CPUs with AMX, else float32. A CPU that has bfloat16 only in its vector units is slower with
    it than with float32, both in training and in inference.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and cpu_has_amx()
    return "bfloat16" if fast else "float32"


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Make PyTorch use one core in every thread that starts in this block.

    PyTorch's own threads wait for each other at every layer: on cores that other work shares, two
    of them encode slower than one. A thread for each batch has nothing to wait for.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def gpu_uuids() -> list[str]:
    """Return the UUIDs of the CUDA devices that this process sees, by index."""
    return [
        str(torch.cuda.get_device_properties(index).uuid)
        for index in range(torch.cuda.device_count())
    ]


@contextmanager
def leased_device() -> Iterator[str]:
    """Lease a GPU for a block of code; wait while all GPUs are leased.

    Inside the block the GPU is the current device of the thread, which page-locked memory depends
    on. The CPU is not leased: several callers may use it at once.

    Yields
    ------
    str
        Name of the device, such as ``cuda:1``; ``cpu`` on a machine without GPUs.
    """
    uuids = gpu_uuids()
    if not uuids:
        yield "cpu"
        return
    with lease(uuids) as index, torch.cuda.device(index):
        try:
            yield f"cuda:{index}"
        finally:
            # the process may live on; free the memory for the next holder of the lease
            torch.cuda.empty_cache()


@contextmanager
def lease(names: Sequence[str], folder: Path | None = None) -> Iterator[int]:
    """Lock one of several names for a block of code; wait while all are locked.

    Parameters
    ----------
    names : sequence of str
        At least one name. All processes must use the same names for the same resources.
    folder : Path, optional
        Folder of the lock files; default: a temporary folder of this user.

    Yields
    ------
    int
        Index of the locked name.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"nic-devices-{os.getuid()}"
    log_at = time.monotonic()
    with ExitStack() as stack:
        while isinstance(leased := _lock_first_free(names, folder, stack), list):
            if time.monotonic() >= log_at:
                log.info("waiting for a GPU: %s", "; ".join(leased))
                log_at = time.monotonic() + WAITING_LOGGED_EVERY
            time.sleep(POLL_SECONDS)
        yield leased


def _lock_first_free(names: Sequence[str], folder: Path, stack: ExitStack) -> int | list[str]:
    """Return the index of the locked name; if all are in use, the process that holds each name."""
    holders = []
    for index, name in enumerate(names):
        try:
            stack.enter_context(exclusive_lock(folder / name, wait=False))
        except StoreBusyError as error:
            holders.append(f"{name}: {error.reason}")
            continue
        return index
    return holders

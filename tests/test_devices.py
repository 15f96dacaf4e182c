"""Leases of GPUs among threads and processes; the number of cores, and how threads wait."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nic_core import devices
from nic_core.devices import gpu_uuids, lease, leased_device
from nic_core.parallel import cores

GPUS = ["GPU-a", "GPU-b"]


class Holder:
    """A process that leases one of the GPUs until it is stopped."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        context = multiprocessing.get_context("fork")
        self.here, there = context.Pipe()
        self.process = context.Process(target=self._hold, args=(there, folder, names))
        self.process.start()
        there.close()

    @staticmethod
    def _hold(pipe: Connection, folder: Path, names: list[str]) -> None:
        with lease(names, folder) as index:
            pipe.send(names[index])
            pipe.recv()

    def gpu(self) -> str:
        return self.here.recv()

    def waits(self) -> bool:
        return not self.here.poll(0.3)

    def stop(self) -> None:
        self.here.send("done")
        self.process.join()

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


@pytest.fixture
def hold(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "POLL_SECONDS", 0.02)
    started = []

    def start(names: list[str] = GPUS) -> Holder:
        started.append(Holder(tmp_path, names))
        return started[-1]

    yield start
    for holder in started:
        holder.process.kill()
        holder.process.join()


def test_processes_lease_different_gpus_and_an_extra_one_waits(hold):
    first, second = hold(), hold()
    held = {first.gpu(), second.gpu()}
    assert held == set(GPUS)
    third = hold()
    assert third.waits()
    first.stop()
    assert third.gpu() in held


def test_a_step_that_waits_for_a_gpu_logs_the_process_that_uses_it(
    hold, tmp_path, monkeypatch, caplog
):
    holder = hold(["GPU-a"])
    holder.gpu()
    caplog.set_level("INFO", logger="nic_core")
    threading.Timer(0.2, holder.kill).start()
    with lease(["GPU-a"], tmp_path):
        [line] = caplog.messages
    assert line.startswith("waiting for a GPU: GPU-a: ")
    assert f"process {holder.process.pid} on" in line


def test_a_killed_process_releases_its_gpu(hold):
    first, second = hold(), hold()
    gpu = first.gpu()
    second.gpu()
    third = hold()
    assert third.waits()
    first.kill()
    assert third.gpu() == gpu


def test_a_lease_is_independent_of_the_index_of_the_gpu(hold):
    assert hold(["GPU-a", "GPU-b"]).gpu() == "GPU-a"
    assert hold(["GPU-b", "GPU-a"]).gpu() == "GPU-b"


def test_threads_of_a_process_lease_different_gpus(tmp_path):
    indices = []

    def work() -> None:
        with lease(GPUS, tmp_path) as index:
            indices.append(index)

    with lease(GPUS, tmp_path) as index:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert [index, *indices] == [0, 1]


def test_a_machine_without_gpus_uses_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with leased_device() as device, leased_device() as other:
        assert (device, other) == ("cpu", "cpu")


def test_gpus_are_identified_by_uuid(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=GPUS[index])
    )
    assert gpu_uuids() == GPUS


def test_omp_num_threads_limits_the_number_of_cores(monkeypatch):
    bound = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cores() == 1
    for value in (str(bound + 1), "", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert cores() == bound


def test_threads_that_wait_give_up_their_core():
    # PyTorch reads it when it is loaded
    assert os.environ["OMP_WAIT_POLICY"].lower() == "passive"

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
from nic_core.devices import gpu_names, leased, leased_device
from nic_core.parallel import cores

GPUS = ["GPU-a", "GPU-b"]


class Holder:
    """A process that holds one of the GPUs until it is told to stop."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        context = multiprocessing.get_context("fork")
        self.here, there = context.Pipe()
        self.process = context.Process(target=self._hold, args=(there, folder, names))
        self.process.start()
        there.close()

    @staticmethod
    def _hold(pipe: Connection, folder: Path, names: list[str]) -> None:
        with leased(names, folder) as place:
            pipe.send(names[place])
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
    monkeypatch.setattr(devices, "PATIENCE", 0.02)
    started = []

    def start(names: list[str] = GPUS) -> Holder:
        started.append(Holder(tmp_path, names))
        return started[-1]

    yield start
    for holder in started:
        holder.process.kill()
        holder.process.join()


def test_processes_get_different_gpus_and_one_too_many_waits(hold):
    first, second = hold(), hold()
    held = {first.gpu(), second.gpu()}
    assert held == set(GPUS)
    third = hold()
    assert third.waits()
    first.stop()
    assert third.gpu() in held


def test_a_killed_process_gives_its_gpu_back(hold):
    first, second = hold(), hold()
    gpu = first.gpu()
    second.gpu()
    third = hold()
    assert third.waits()
    first.kill()
    assert third.gpu() == gpu


def test_a_gpu_is_the_same_one_under_another_index(hold):
    assert hold(["GPU-a", "GPU-b"]).gpu() == "GPU-a"
    assert hold(["GPU-b", "GPU-a"]).gpu() == "GPU-b"


def test_threads_of_a_process_get_different_gpus(tmp_path):
    found = []

    def work() -> None:
        with leased(GPUS, tmp_path) as place:
            found.append(place)

    with leased(GPUS, tmp_path) as place:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert [place, *found] == [0, 1]


def test_a_machine_without_gpus_works_on_its_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with leased_device() as device, leased_device() as other:
        assert (device, other) == ("cpu", "cpu")


def test_gpus_are_known_by_their_uuid(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=GPUS[index])
    )
    assert gpu_names() == GPUS


def test_cores_are_those_that_the_environment_allows(monkeypatch):
    bound = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cores() == 1
    for said in (str(bound + 1), "", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert cores() == bound

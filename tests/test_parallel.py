"""Functions computed ahead in other processes: results, errors, killed processes."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from nic_core.parallel import MAX_WAITING, ahead, process_pool
from nic_core.slides import SlideError

pytestmark = pytest.mark.slow


def work(item: str) -> tuple[str, int, str]:
    """Return item, process id and threads; the items "bad" and "kill" fail."""
    if item == "bad":
        raise SlideError("bad.tif", "it is truncated", "copy it again")
    if item == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return item, os.getpid(), os.environ.get("OMP_NUM_THREADS", "")


def test_items_are_computed_in_processes_of_one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    items = [f"s{number}" for number in range(3 * 2 * MAX_WAITING)]
    with ahead(work, items, processes=2) as fetch:
        results = [fetch(item) for item in items if item != "s5"]
    assert [result[0] for result in results] == [item for item in items if item != "s5"]
    assert os.getpid() not in {result[1] for result in results}
    assert {result[2] for result in results} == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_an_exception_is_raised_for_its_item_only():
    with ahead(work, ["a", "bad", "b"], processes=2) as fetch:
        assert fetch("a")[0] == "a"
        with pytest.raises(SlideError, match="copy it again"):
            fetch("bad")
        assert fetch("b")[0] == "b"


def test_a_killed_process_raises_broken_process_pool():
    with (
        ahead(work, ["kill", "a"], processes=2) as fetch,
        pytest.raises(BrokenProcessPool),
    ):
        fetch("kill")


def test_a_few_items_are_computed_in_the_calling_process():
    with ahead(work, ["a", "b", "c"]) as fetch:
        assert fetch("b")[1] == os.getpid()


def wait(folder: str) -> None:
    """Take longer than the test, and say so."""
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


class Interrupt(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("inherited", [signal.SIG_DFL, signal.SIG_IGN])
def test_an_interruption_ends_the_processes_within_their_work(tmp_path, inherited, request):
    before = signal.signal(signal.SIGTERM, inherited)
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, before))
    with pytest.raises(Interrupt), process_pool(2) as pool:
        for _ in range(4):
            pool.submit(wait, str(tmp_path))
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        raise Interrupt
    for process in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(process.name), 0)

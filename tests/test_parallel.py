"""Work done ahead by other processes: the same results and errors as here."""

from __future__ import annotations

import os
import signal
from concurrent.futures.process import BrokenProcessPool

import pytest

from nic_core.parallel import AHEAD, ahead
from nic_core.slides import SlideError


def where(item: str) -> tuple[str, int, str]:
    """Also what the next tests ask for by the item's name."""
    if item == "bad":
        raise SlideError("bad.tif", "it is cut short", "copy it again")
    if item == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return item, os.getpid(), os.environ.get("OMP_NUM_THREADS", "")


def test_each_item_is_worked_on_in_another_process_of_one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    items = [f"s{number}" for number in range(3 * 2 * AHEAD)]
    with ahead(where, items, processes=2) as made:
        results = [made(item) for item in items if item != "s5"]
    assert [result[0] for result in results] == [item for item in items if item != "s5"]
    assert os.getpid() not in {result[1] for result in results}
    assert {result[2] for result in results} == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_an_error_is_that_of_its_item_alone():
    with ahead(where, ["a", "bad", "b"], processes=2) as made:
        assert made("a")[0] == "a"
        with pytest.raises(SlideError, match="copy it again"):
            made("bad")
        assert made("b")[0] == "b"


def test_a_killed_process_ends_the_work():
    with ahead(where, ["kill", "a"], processes=2) as made, pytest.raises(BrokenProcessPool):
        made("kill")


def test_a_few_items_are_not_worth_a_process():
    with ahead(where, ["a", "b", "c"]) as made:
        assert made("b")[1] == os.getpid()

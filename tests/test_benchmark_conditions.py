"""Rounds and ratios of the programs that measure speed."""

from __future__ import annotations

import torch

from benchmarks.conditions import conditions, in_turn, ratio
from nic_core.devices import resolve_precision


def test_works_take_turns_in_each_round():
    calls: list[str] = []

    def work(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    measured = in_turn({"a": lambda: work("a"), "b": lambda: work("b")}, rounds=3)
    assert calls == ["a", "b"] * 3
    assert measured == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}


def test_ratio_is_the_median_over_rounds_with_its_range():
    # the ratios of the rounds are 2, 4 and 3; the ratio of the medians would be 2
    assert ratio([2.0, 40.0, 3.0], [1.0, 10.0, 1.0]) == "3.0 (2.0 to 4.0)"


def test_conditions_name_the_precision_of_this_cpu():
    chosen = resolve_precision("auto", torch.device("cpu"))
    assert conditions().endswith(f"precision auto is {chosen} on this CPU")

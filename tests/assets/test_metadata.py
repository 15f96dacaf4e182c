"""Messages of long steps: progress, time left, durations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nic_assets.orchestration import metadata
from nic_assets.orchestration.metadata import duration, log_progress


@pytest.fixture
def clock(monkeypatch):
    """The time in s, which a test sets."""
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(metadata, "time", SimpleNamespace(monotonic=lambda: now.time))
    return now


def test_progress_is_logged_every_half_minute_with_the_time_left(clock):
    lines: list[str] = []
    progress = log_progress(SimpleNamespace(log=SimpleNamespace(info=lines.append)), "epochs")
    for epoch in range(1, 11):
        clock.time += 20.0
        progress(epoch, 100)
    # 20 s an epoch
    assert lines == [
        "2 of 100 epochs, about 33 min left",
        "4 of 100 epochs, about 32 min left",
        "6 of 100 epochs, about 31 min left",
        "8 of 100 epochs, about 31 min left",
        "10 of 100 epochs, about 30 min left",
    ]


def test_work_of_an_earlier_attempt_does_not_count_as_speed(clock):
    lines: list[str] = []
    progress = log_progress(SimpleNamespace(log=SimpleNamespace(info=lines.append)), "epochs")
    progress(50, 100)
    clock.time += 60.0
    progress(60, 100)
    assert lines == ["60 of 100 epochs, about 4 min left"]


def test_short_work_logs_nothing(clock):
    progress = log_progress(SimpleNamespace(log=SimpleNamespace(info=pytest.fail)), "cells")
    clock.time += 29.0
    progress(100, 100)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (9000, "2.5 h")]
)
def test_durations_are_given_in_readable_units(seconds, text):
    assert duration(seconds) == text

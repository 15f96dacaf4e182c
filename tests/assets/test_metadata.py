"""Messages of long steps: progress, time left, durations."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from PIL import Image

from nic_assets.orchestration import metadata
from nic_assets.orchestration.metadata import duration, log_progress
from nic_core.pictures import new_figure


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


def test_a_figure_of_lines_is_a_drawing_that_stays_sharp():
    figure = new_figure(4, 3)
    figure.subplots().plot([1, 2, 3])
    assert metadata.figure(figure, "curve").md_str.startswith("![curve](data:image/svg+xml;base64,")


def test_a_figure_of_many_points_is_stored_as_pixels():
    figure = new_figure(4, 3)
    figure.subplots().scatter(*np.random.default_rng(0).random((2, 5000)))
    text = metadata.figure(figure, "points").md_str
    assert text.startswith("![points](data:image/png;base64,")
    picture = base64.b64decode(text.partition("base64,")[2].rstrip(")"))
    with Image.open(io.BytesIO(picture)) as image:
        assert image.size == (384, 288)


def test_small_numbers_of_a_table_are_not_rounded_to_zero():
    shown = metadata.table(pl.DataFrame({"p": [0.0000123456], "x": [40234.5678]}))
    assert shown.records[0].data == {"p": 0.00001235, "x": 40234.6}


def test_short_work_logs_nothing(clock):
    progress = log_progress(SimpleNamespace(log=SimpleNamespace(info=pytest.fail)), "cells")
    clock.time += 29.0
    progress(100, 100)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (9000, "2.5 h")]
)
def test_durations_are_given_in_readable_units(seconds, text):
    assert duration(seconds) == text

"""Numbers and tables as text."""

from __future__ import annotations

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from nic_core.numbers import format_number, rounded
from nic_core.tables import interval, terminal_table

IDS = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=70)
SCORES = st.floats(-1e6, 1e6).map(lambda value: f"{value:.3f}")


def shown(table, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1149.6, "1150"),
        (123456789.0, "123456789"),
        (365, "365"),
        (12.5, "12.5"),
        (0.00058, "0.000580"),
        (-0.0376, "-0.0376"),
        (0, "0"),
        (2.5e-7, "2.50e-07"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_have_three_significant_digits(value, text):
    assert format_number(value) == text


@given(st.floats(1e-4, 1e15))
def test_a_number_is_near_its_text_and_has_no_exponent(value):
    text = format_number(value)
    assert "e" not in text
    assert float(text) == pytest.approx(value, rel=0.005)
    assert format_number(-value) == f"-{text}"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_rounding_keeps_four_digits_and_the_first_decimal(value):
    assert rounded(value) == pytest.approx(value, rel=5e-4, abs=0)
    assert abs(rounded(value) - value) <= 0.05 + abs(value) * 1e-12


def test_coordinates_and_small_p_values_survive_rounding():
    assert rounded(40234.56) == 40234.6
    assert rounded(0.000012345) == 0.00001234 or rounded(0.000012345) == 0.00001235


@given(st.lists(st.tuples(IDS, IDS, SCORES, SCORES, SCORES), min_size=1, max_size=4))
def test_no_id_and_no_number_is_cut_at_80_columns(rows):
    table = terminal_table(("slide", "patient"), ("value", "low", "high"), rows, title="t" * 90)
    text = shown(table)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    words = text.split()
    for *_, value, low, high in rows:
        assert {value, low, high} <= set(words)
    # a folded id has its letters in the lines of its column
    letters = "".join(words)
    for slide, *_ in rows:
        assert slide[:8] in letters


def test_an_id_longer_than_a_line_is_folded():
    name = "-".join(f"{k:03d}" for k in range(40))
    words = shown(terminal_table(("slide",), ("count",), [(name, "7 cells")])).split()
    assert name in "".join(word for word in words if "-" in word)


def test_square_brackets_of_ids_are_printed():
    assert "[red]slide[/red]" in shown(terminal_table(("slide",), (), [("[red]slide[/red]",)]))
    assert "error" in shown(terminal_table(("kind",), (), [(Text("error", "red"),)]))


def test_an_undefined_interval_is_empty():
    assert interval(None, 1.0) == interval(0.0, None) == ""
    assert interval(-0.5, 0.25) == "-0.500 to 0.250"

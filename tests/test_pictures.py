"""Styles of series, captions and colour keys of pictures."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nic_core.pictures import (
    WIDTH,
    draw_shares,
    encoder_styles,
    new_figure,
    save_figure,
    save_figures,
    series_styles,
    with_caption,
    with_colour_key,
)


def test_the_first_36_series_look_different():
    styles = series_styles(36)
    assert len(set(styles)) == 36
    assert all(a.colour != b.colour for a, b in pairwise(styles))
    assert all(a.marker != b.marker for a, b in pairwise(styles))


def test_more_encoders_do_not_change_the_style_of_the_first():
    assert encoder_styles(["a", "b"]) == {
        name: style for name, style in encoder_styles(["a", "b", "c"]).items() if name != "c"
    }


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 700),
    caption=st.text(max_size=200),
)
@settings(max_examples=30, deadline=None)
def test_a_picture_stays_at_its_place_above_its_key(height, width, caption):
    picture = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    for drawn in (
        with_caption(picture, caption),
        with_colour_key(picture, low="-0.5", high="1150", caption=caption),
    ):
        np.testing.assert_array_equal(drawn[:height, :width], picture)
        assert drawn.shape[0] > height
        assert drawn.dtype == np.uint8


def test_the_key_goes_from_blue_to_red():
    drawn = with_colour_key(np.full((10, 400, 3), 255, np.uint8), low="0", high="1", caption="x")
    red, blue = drawn[10:, :, 0].astype(int), drawn[10:, :, 2].astype(int)
    assert np.argmax((blue - red).max(0)) < np.argmax((red - blue).max(0))
    assert (red - blue).max() > 60
    assert (blue - red).max() > 60


def test_long_captions_are_wrapped_and_not_cut():
    narrow = np.zeros((5, 50, 3), np.uint8)
    one, many = (with_caption(narrow, "word " * count) for count in (1, 60))
    assert one.shape[1] == many.shape[1]
    assert many.shape[0] > one.shape[0] + 50
    # no letter touches the right edge
    assert (many[5:, -4:] == 255).all()


def test_files_of_figures_have_print_quality(tmp_path):
    figure = new_figure(2, 1)
    save_figure(figure, tmp_path / "a.png")
    from PIL import Image

    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (400, 200)
    save_figures({}, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    save_figures({"roc": figure}, tmp_path / "figures")
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["roc.png"]


@pytest.mark.parametrize("count", [2, 9])
def test_a_confusion_matrix_names_classes_and_colours(count):
    classes = [f"class-{k}" for k in range(count)]
    figure = new_figure(WIDTH, 5)
    axes = figure.subplots()
    draw_shares(axes, np.diag(np.arange(count)), classes, unit="slides")
    figure.canvas.draw()
    assert [label.get_text() for label in axes.get_yticklabels()] == classes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert "slides of a true class" in figure.axes[1].get_ylabel()
    assert axes.yaxis.get_inverted()

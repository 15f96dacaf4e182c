"""The eight orientations of an array."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nic_core.orientations import ORIENTATIONS, orient, undo

orientations = st.integers(0, ORIENTATIONS - 1)


@st.composite
def arrays(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    return np.arange(np.prod(shape)).reshape(shape)


def same(a, b):
    return a.shape == b.shape and (a == b).all()


@given(arrays(), orientations)
def test_undo_inverts_orient_and_orient_inverts_undo(array, k):
    assert same(undo(orient(array, k), k), array)
    assert same(orient(undo(array, k), k), array)


@given(orientations, orientations)
def test_two_orientations_in_a_row_equal_one_orientation(first, second):
    array = np.arange(12).reshape(3, 4)
    both = orient(orient(array, first), second)
    assert sum(same(both, orient(array, k)) for k in range(ORIENTATIONS)) == 1


@given(orientations)
def test_an_image_is_oriented_like_its_channels(k):
    image = np.random.default_rng(k).integers(0, 256, (3, 5, 3))
    assert same(
        orient(image, k, axes=(-3, -2)), orient(image.transpose(2, 0, 1), k).transpose(1, 2, 0)
    )


def test_orientations_agree_with_pillow():
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    for k in range(ORIENTATIONS):
        pillow = Image.fromarray(image)
        if k >= 4:
            pillow = pillow.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pillow = pillow.rotate(90 * (k % 4), expand=True)  # counter-clockwise
        assert same(orient(image, k, axes=(0, 1)), np.asarray(pillow))


@pytest.mark.parametrize("k", [-1, 8])
def test_an_unknown_orientation_is_refused(k):
    for turn in (orient, undo):
        with pytest.raises(ValueError, match="orientation"):
            turn(np.zeros((2, 2)), k)

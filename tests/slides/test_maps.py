"""Probability maps: cells, truth images, scores, overlays."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nic_core.cohort import CohortError, ProbabilityMap
from nic_core.encoders import Encoder, EncoderCard
from nic_core.grids import Grid
from nic_core.maps import MAP_SCHEMA, overlay, probability_map, score_maps, truth_of_cells
from tests.provenance import provenance

MAP = ProbabilityMap(name="tumour", encoder="e", task="t", label="tumour")


def labels(folder: Path, values: np.ndarray) -> Path:
    path = folder / "truth.png"
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def grid_of(embeddings: np.ndarray, valid: np.ndarray) -> Grid:
    return Grid(np.where(valid, embeddings, 0).astype(np.float16), valid, provenance())


def encoder_of(head: torch.nn.Module) -> Encoder:
    card = EncoderCard(
        name="e",
        architecture="tellez2020",
        objective="mtl",
        tasks={"t": ("normal", "tumour")},
        patch=128,
        mpp=0.5,
        embedding_size=2,
        weights_hash="w",
    )
    return Encoder(card, torch.nn.Identity(), {"t": head})


def test_the_map_has_a_probability_at_every_valid_cell():
    valid = np.array([[True, False], [True, True]])
    embeddings = np.array([[[0, 9], [1, 2]], [[3, 9], [1, 0]]])
    head = torch.nn.Linear(2, 2, bias=False)
    head.weight.data = torch.eye(2)
    cells = probability_map(grid_of(embeddings, valid), encoder_of(head), MAP, None)
    assert cells.schema == MAP_SCHEMA
    assert cells.select("row", "column").rows() == [(0, 0), (1, 0), (1, 1)]
    expected = 1 / (1 + np.exp(np.array([-3.0, 0.0, 2.0])))
    np.testing.assert_allclose(cells["probability"].to_numpy(), expected, rtol=1e-5)
    assert cells["truth"].null_count() == 3


def test_an_unknown_class_is_refused_with_the_known_ones():
    valid = np.ones((1, 1), bool)
    unknown = MAP.model_copy(update={"label": "stroma"})
    with pytest.raises(CohortError, match="no class 'stroma'; its classes are normal, tumour"):
        probability_map(
            grid_of(np.zeros((2, 1, 1)), valid), encoder_of(torch.nn.Identity()), unknown, None
        )


def test_a_truth_image_of_one_pixel_per_cell_is_copied(tmp_path):
    values = np.array([[0, 1, 255], [1, 0, 0]])
    truth = truth_of_cells(
        labels(tmp_path, values), MAP, width=150, height=100, mpp=0.5, cell=50, shape=(2, 3)
    )
    np.testing.assert_array_equal(truth, [[0, 1, -1], [1, 0, 0]])


@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_the_truth_of_a_cell_is_the_majority_of_its_area(tmp_path_factory, cells, pixels, seed):
    values = np.random.default_rng(seed).choice([0, 1, 255], (cells * pixels, cells * pixels))
    truth = truth_of_cells(
        labels(tmp_path_factory.mktemp("truth"), values),
        MAP,
        width=cells * pixels * 7,
        height=cells * pixels * 7,
        mpp=0.5,
        cell=pixels * 7,
        shape=(cells, cells),
    )
    for row in range(cells):
        for column in range(cells):
            part = values[row * pixels :, column * pixels :][:pixels, :pixels]
            known = (part != 255).sum()
            majority = int((part == 1).sum() > known / 2)
            assert truth[row, column] == (majority if known >= part.size / 2 else -1)


def test_the_truth_outside_the_slide_is_unknown(tmp_path):
    truth = truth_of_cells(
        labels(tmp_path, np.ones((2, 2))),
        MAP,
        width=100,
        height=100,
        mpp=0.5,
        cell=100,
        shape=(1, 2),
    )
    np.testing.assert_array_equal(truth, [[1, -1]])


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_the_truth_of_cells_does_not_depend_on_the_grid(tmp_path_factory, down, right, seed):
    values = np.random.default_rng(seed).choice([0, 1, 255], (6, 8))
    path = labels(tmp_path_factory.mktemp("truth"), values)

    def truth(cell: float, shape: tuple[int, int], **place: tuple[float, float]) -> np.ndarray:
        return truth_of_cells(
            path, MAP, width=8 * 64, height=6 * 64, mpp=0.5, cell=cell, shape=shape, **place
        )

    plain = truth(64, (6, 8))
    np.testing.assert_array_equal(truth(32, (12, 16)), plain.repeat(2, 0).repeat(2, 1))
    later = truth(64, (6, 8), origin=(64.0 * right, 64.0 * down))
    np.testing.assert_array_equal(later[: 6 - down, : 8 - right], plain[down:, right:])
    earlier = truth(32, (16, 16), origin=(-32.0 * right, -32.0 * down))
    assert (earlier[:down] == -1).all()  # outside the slide
    np.testing.assert_array_equal(
        earlier[down : down + 12, right:], plain.repeat(2, 0).repeat(2, 1)[:, : 16 - right]
    )


def test_a_slide_with_cells_of_one_class_has_no_auc():
    rows = [("a", i, 0, p, t) for i, (p, t) in enumerate([(0.9, True), (0.1, False), (0.5, None)])]
    rows += [("b", 0, 0, 0.3, False), ("b", 1, 0, 0.2, False)]
    scores = score_maps(pl.DataFrame(rows, schema=MAP_SCHEMA, orient="row"))
    assert scores.rows() == [("a", 1.0, 2, 1)]


def test_the_overlay_colours_only_the_cells_of_the_map():
    cells = pl.DataFrame([("s", 0, 1, 1.0, None)], schema=MAP_SCHEMA, orient="row")
    white = np.full((20, 40, 3), 255, np.uint8)
    drawn = overlay(white, cells, width=400, height=200, cell=100)
    changed = (drawn != 255).any(2)
    assert changed[:10, 10:20].all()
    assert changed.sum() == 100
    red, _, blue = drawn[5, 15]
    assert red > blue


@pytest.mark.parametrize("origin", [(0.0, 0.0), (50.0, 100.0), (-150.0, -50.0)])
def test_the_overlay_of_other_cells_colours_the_same_place(origin):
    white = np.full((20, 40, 3), 255, np.uint8)
    # the area of x 100 to 200, y 100 to 200 level-0 px in cells of 50 px
    left, top = (round((100 - corner) / 50) for corner in origin)
    rows = [("s", top + i, left + j, 1.0, None) for i in range(2) for j in range(2)]
    cells = pl.DataFrame(rows, schema=MAP_SCHEMA, orient="row")
    drawn = overlay(white, cells, width=400, height=200, cell=50, origin=origin)
    assert (drawn[10:20, 10:20] != 255).any(2).all()
    assert (drawn != 255).any(2).sum() == 100


def test_the_overlay_of_an_empty_map_is_the_thumbnail():
    empty = pl.DataFrame(schema=MAP_SCHEMA)
    white = np.full((20, 40, 3), 255, np.uint8)
    np.testing.assert_array_equal(overlay(white, empty, width=400, height=200, cell=100), white)

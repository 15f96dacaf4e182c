"""Crops: position, padding, orientation, normalisation, cache."""

import threading

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from nic_core.grids import Grid, open_grid, write_grid
from nic_core.grids.moments import grid_moments
from nic_core.models.crops import (
    Crops,
    augment_features,
    centre_weights,
    cohort_moments,
    crop_windows,
    fit_normalise,
    prefetch,
)
from nic_core.models.networks import Normalise
from nic_core.orientations import orient
from tests.provenance import provenance

from .conftest import ArrayGrid

pytestmark = pytest.mark.slow


def identity(channels):
    return Normalise(torch.zeros(channels), torch.ones(channels))


def grid_of(embeddings, valid=None):
    embeddings = np.asarray(embeddings, np.float16)
    return ArrayGrid(embeddings, np.ones(embeddings.shape[1:], bool) if valid is None else valid)


def moments_of(grid):
    return grid_moments("s", grid.embeddings, grid.valid, within=True)


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 16),
    st.integers(0, 11),
    st.integers(0, 11),
)
@settings(max_examples=100, deadline=None)
def test_crop_is_a_window_of_the_zero_padded_grid(rows, columns, crop, row, column):
    row, column = row % rows, column % columns
    embeddings = 1 + np.arange(rows * columns, dtype=np.float32).reshape(1, rows, columns)
    padded = np.pad(embeddings, ((0, 0), (crop, crop), (crop, crop)))
    top, left = row - crop // 2 + crop, column - crop // 2 + crop
    crops = Crops(lambda _: grid_of(embeddings), identity(1), crop)
    np.testing.assert_array_equal(
        crops.crop_at("s", (row, column), 0), padded[:, top : top + crop, left : left + crop]
    )


def test_centre_probability_is_squared_distance_to_background():
    valid = np.zeros((9, 9), bool)
    valid[2:7, 1:8] = True
    weights = centre_weights(valid)
    distance = ndimage.distance_transform_edt(valid)
    np.testing.assert_allclose(weights, distance**2 / (distance**2).sum())
    # the crop is smaller than the grid, so centres are not shifted
    crops = Crops(lambda _: grid_of(np.ones((1, 9, 9)), valid), identity(1), 3)
    drawn = np.zeros((9, 9))
    for cell in crops.fixed_centres("s", 20000, seed=0):
        drawn[cell] += 1
    np.testing.assert_allclose(drawn / 20000, weights, atol=0.01)


def test_grid_edge_counts_as_background():
    weights = centre_weights(np.ones((5, 5), bool))
    assert weights[2, 2] == weights.max()
    assert weights[0, 0] == weights.min() > 0


def test_grid_that_fits_into_the_crop_is_shifted_but_never_cut():
    embeddings = np.random.default_rng(0).normal(size=(2, 7, 9)).astype(np.float32)
    crops = Crops(lambda _: grid_of(embeddings), identity(2), 12)
    places = set()
    for centre in crops.fixed_centres("s", 50, seed=0):
        crop = crops.crop_at("s", centre, 0)
        assert np.count_nonzero(crop) == embeddings.size
        places.add(tuple(np.argwhere(crop[0])[0]))
    assert len(places) > 5


def tissue_grid(cell_um: float, pieces: np.ndarray, side_um: float) -> ArrayGrid:
    """A grid of round pieces of tissue (x, y, radius in um); a cell has tissue at its centre."""
    centres = (np.arange(int(np.ceil(side_um / cell_um))) + 0.5) * cell_um
    x, y, radius = pieces.T[:, :, None, None]
    return grid_of(
        np.ones((1, len(centres), len(centres))),
        (np.hypot(centres - x, centres[:, None] - y) < radius).any(0),
    )


@given(st.sampled_from([32.0, 62.2, 112.0, 128.0]), st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_grids_with_other_cells_have_crops_at_the_same_places(cell_um, seed):
    random, side = np.random.default_rng(seed), 20_000.0
    pieces = np.column_stack([random.uniform(4000, 16000, (3, 2)), random.uniform(1500, 4000, 3)])
    places = []
    for um in (64.0, cell_um):
        grid = tissue_grid(um, pieces, side)
        crops = Crops(lambda _, grid=grid: grid, identity(1), round(6400 / um))
        places.append((np.array(crops.fixed_centres("s", 40, seed)) + 0.5) * um)
    apart = np.abs(places[0] - places[1]).max(axis=1)
    # a few are farther apart, where tissue that only one grid has shifts the drawn cell
    assert np.median(apart) <= 64 + cell_um
    assert np.mean(apart < 640) >= 0.8


def test_crop_has_eight_orientations():
    embeddings = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)
    crops = Crops(lambda _: grid_of(embeddings), identity(2), 3)
    upright = crops.crop_at("s", (1, 1), 0)
    turned = [crops.crop_at("s", (1, 1), k) for k in range(8)]
    assert len({crop.tobytes() for crop in turned}) == 8
    for k, crop in enumerate(turned):
        np.testing.assert_array_equal(crop, orient(upright, k))


def test_crops_use_stored_orientations_if_the_grid_has_them():
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(8, 2, 5, 4)).astype(np.float16)
    grid = ArrayGrid(embeddings[0], np.ones((5, 4), bool), embeddings)
    for cache in (1 << 20, 0):
        crops = Crops(lambda _: grid, identity(2), 5, cache_bytes=cache)
        for k in range(8):
            expected = np.zeros((2, 5, 5), np.float32)
            expected[:, :, :4] = embeddings[k]
            np.testing.assert_array_equal(crops.crop_at("s", (2, 2), k), orient(expected, k))


@pytest.mark.parametrize("components", [None, 2])
def test_crops_equal_the_output_of_normalise(components):
    random = np.random.default_rng(0)
    valid = random.random((8, 8)) < 0.6
    embeddings = (random.normal(size=(4, 8, 8)) + 2) * valid
    embeddings[:, 3, 3] = 0  # an embedding of 0 counts as background in both
    valid[3, 3] = True
    grid = grid_of(embeddings, valid)
    normalise = fit_normalise([moments_of(grid)], components=components)
    raw = torch.from_numpy(grid.embeddings.astype(np.float32))[None]
    np.testing.assert_allclose(
        Crops(lambda _: grid, normalise, 8).crop_at("s", (4, 4), 0), normalise(raw)[0], atol=1e-5
    )


def test_augmentation_keeps_background_and_mean():
    features = torch.ones(400, 6, 4, 4)
    features[:, :, 0] = 0
    generator = torch.Generator().manual_seed(0)
    noisy = augment_features(features, noise=0.5, dropout=0, generator=generator)
    assert not noisy[:, :, 0].any()
    assert noisy[:, :, 1:].mean().item() == pytest.approx(1, abs=0.01)
    assert noisy[:, :, 1:].std().item() == pytest.approx(0.5, abs=0.01)
    dropped = augment_features(features, noise=0, dropout=0.25, generator=generator)[:, :, 1:]
    whole = dropped.flatten(2)
    assert (whole == whole[:, :, :1]).all()
    assert (whole[:, :, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert dropped.mean().item() == pytest.approx(1, abs=0.04)
    assert augment_features(features, noise=0, dropout=0) is features


def test_prefetch_keeps_order_works_ahead_and_raises_errors():
    made = []

    def items():
        for i in range(4):
            made.append(i)
            yield i
        raise RuntimeError("broken grid")

    ahead = prefetch(items())
    assert next(ahead) == 0
    with pytest.raises(RuntimeError, match="broken grid"):
        assert list(ahead) == [1, 2, 3]
    assert made == [0, 1, 2, 3]
    assert list(prefetch(iter([]))) == []
    early = prefetch(iter(range(9)))
    next(early)
    early.close()  # a loop that stops early leaves no thread
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_fixed_centres_depend_on_slide_and_seed_only():
    grid = grid_of(np.ones((1, 30, 30)))
    a, b = Crops(lambda _: grid, identity(1), 8), Crops(lambda _: grid, identity(1), 8)
    b.fixed_centres("another", 3, seed=0)
    assert a.fixed_centres("s", 5, seed=0) == b.fixed_centres("s", 5, seed=0)
    assert a.fixed_centres("s", 5, seed=0) != a.fixed_centres("s", 5, seed=1)
    assert a.fixed_centres("s", 5, seed=0) != a.fixed_centres("t", 5, seed=0)


def test_uncached_slides_are_read_by_window_with_equal_result(tmp_path):
    embeddings = np.random.default_rng(0).normal(size=(3, 40, 40)).astype(np.float16)
    array = zarr.create_array(tmp_path / "z", shape=embeddings.shape, dtype="f2", chunks=(3, 8, 8))
    array[:] = embeddings

    reads = []

    class Watched:
        shape = embeddings.shape

        def __getitem__(self, key):
            part = array[key]
            reads.append(part.size)
            return part

    lazy = ArrayGrid(Watched(), np.ones((40, 40), bool))
    normalise = Normalise(torch.ones(3), torch.full((3,), 2.0))
    bounded = Crops(lambda _: lazy, normalise, 10, cache_bytes=1000)
    cached = Crops(lambda _: grid_of(embeddings), normalise, 10)
    for centre in ((0, 0), (20, 20), (39, 5)):
        np.testing.assert_array_equal(
            bounded.crop_at("s", centre, 3), cached.crop_at("s", centre, 3)
        )
    assert max(reads) <= 3 * 10 * 10


@pytest.mark.parametrize("cache", [0, 1 << 22, 1 << 30])
@pytest.mark.parametrize("components", [None, 2])
def test_crops_from_stores_equal_crops_from_memory(tmp_path, cache, components):
    random = np.random.default_rng(0)
    grids = {}
    for name, side in (("a", 150), ("b", 101), ("c", 30)):
        valid = random.random((side, side + 20)) < 0.9
        valid[: side // 2, :70] = False  # the largest grid has a chunk without tissue
        embeddings = (random.normal(size=(3, *valid.shape)) * valid).astype(np.float16)
        grids[name] = grid_of(embeddings, valid)
        about = provenance(slide=name)
        write_grid(tmp_path / name, Grid(embeddings, valid, about))
    normalise = fit_normalise(map(moments_of, grids.values()), components=components)
    stored = Crops(lambda s: open_grid(tmp_path / s), normalise, 120, cache_bytes=cache)
    held = Crops(grids.__getitem__, normalise, 120)
    views = [held.random_view("abc"[i % 3], random) for i in range(18)]
    batches = [views[:8], views[8:12], views[12:]]
    given = stored.load(enumerate(batches))
    for (i, features), batch in zip(given, batches, strict=True):
        for crop, view in zip(features, batch, strict=True):
            np.testing.assert_allclose(crop, held.crop_at(*view), atol=1e-5)
        assert batches[i] is batch


def test_pinned_crops_use_page_locked_memory(monkeypatch):
    grid = grid_of(np.ones((2, 6, 6), np.float16), np.ones((6, 6), bool))
    normalise = Normalise(torch.zeros(2), torch.ones(2))
    empty, locked = torch.empty, []

    def lock(size: int, *, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        locked.append(empty(size))
        return locked[-1]

    monkeypatch.setattr(torch, "empty", lock)
    views = [[("a", (3, 3), k)] for k in range(4)]
    given = Crops({"a": grid}.__getitem__, normalise, 6, pinned=True).load(enumerate(views))
    for i, features in given:
        assert (features == 1).all()
        assert np.shares_memory(features, locked[i % 2].numpy())
    assert len(locked) == 2  # two buffers in turn


def test_crop_window_is_cut_at_the_edge_of_the_grid():
    inner, place = crop_windows((4, 4), (0, 3), 2)
    assert inner == (slice(0, 1), slice(2, 4))
    assert place == (slice(1, 2), slice(0, 2))


def test_normalised_embeddings_have_mean_0_and_deviation_1():
    random = np.random.default_rng(0)
    grids = {}
    for s in "ab":
        valid = random.random((20, 20)) < 0.5
        embeddings = (random.normal(size=(4, 20, 20)) * [[[1]], [[2]], [[3]], [[0]]] + 5) * valid
        grids[s] = grid_of(embeddings, valid)
    normalise = fit_normalise(map(moments_of, grids.values()), components=None)
    cells = np.concatenate(
        [
            normalise(torch.from_numpy(g.embeddings.astype(np.float32))[None])[0].numpy()[
                :, g.valid
            ]
            for g in grids.values()
        ],
        axis=1,
    )
    np.testing.assert_allclose(cells.mean(1), 0, atol=1e-3)
    np.testing.assert_allclose(cells.std(1), [1, 1, 1, 0], atol=1e-3)
    np.testing.assert_allclose(
        moments_of(grids["a"]).mean,
        grids["a"].embeddings[:, grids["a"].valid].astype(float).mean(1),
    )


@settings(max_examples=25, deadline=None)
@given(
    slides=st.integers(2, 7),
    size=st.integers(1, 6),
    components=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 99),
)
def test_moments_of_folds_give_the_normalisation_of_all_cells(slides, size, components, seed):
    random = np.random.default_rng(seed)
    spread, grids, units = 2.0 ** -np.arange(size)[:, None, None], {}, []
    for name in map(str, range(slides)):
        valid = random.random(random.integers(4, 12, 2)) < 0.8
        valid[0, :2] = True
        embeddings = (random.normal(size=(size, *valid.shape)) * spread + 1) * valid
        grids[name] = grid_of(embeddings, valid)
        units.append(([name], int(name) % 2))
    units += [(["0", "1"], 0), (["0"], None)]  # a slide of two units counts twice
    table = pl.DataFrame(units, schema=["slides", "fold"], orient="row")
    moments = cohort_moments(table, grids.__getitem__, components=components)
    assert all(m.within is None for m in moments.slides.values())
    assert {m.within is None for m in moments.groups.values()} == {components is None}
    found = fit_normalise(moments.groups.values(), components=components)

    used = [s for names, fold in units if fold is not None for s in names]
    cells = [grids[s].embeddings[:, grids[s].valid].astype(float) for s in used]
    whole = np.concatenate(cells, 1)
    np.testing.assert_allclose(found.mean, whole.mean(1), rtol=1e-5, atol=1e-6)
    if components is None:
        np.testing.assert_allclose(found.weight, 1 / whole.std(1), rtol=1e-4)
        return
    centred = np.concatenate([c - c.mean(1, keepdims=True) for c in cells], 1)
    vectors, values, _ = np.linalg.svd(centred / whole.shape[1] ** 0.5, full_matrices=False)
    deviation = values[:components]
    expected = (vectors[:, :components] / np.sqrt(deviation * deviation[0])).T
    # the sign of an axis is arbitrary
    products = np.abs((expected * found.weight.numpy()).sum(1))
    np.testing.assert_allclose(products, (expected**2).sum(1), rtol=1e-3)
    np.testing.assert_allclose((found.weight.numpy() ** 2).sum(1), (expected**2).sum(1), rtol=1e-4)


def test_components_need_a_scatter_matrix():
    grid = grid_of(np.ones((2, 3, 3)))
    without = grid_moments("s", grid.embeddings, grid.valid)
    with pytest.raises(ValueError, match="need moments with a scatter matrix"):
        fit_normalise([without], components=1)
    with pytest.raises(ValueError, match="need moments with a scatter matrix"):
        fit_normalise([without + moments_of(grid)], components=1)


def test_components_follow_variation_within_slides():
    random = np.random.default_rng(0)
    grids = {}
    for i in range(10):
        embeddings = random.normal(size=(3, 15, 15)) * [[[3]], [[1]], [[0.1]]]
        embeddings[2] += (
            50 * random.normal()
        )  # stain: a large shift that is constant over the slide
        grids[str(i)] = grid_of(embeddings)
    moments = map(moments_of, grids.values())
    weight = fit_normalise(moments, components=2).weight.numpy()
    assert weight.shape == (2, 3)
    # divided by the root of the deviation times the first deviation
    np.testing.assert_allclose(weight, [[1 / 3, 0, 0], [0, 1 / 3**0.5, 0]], atol=0.03)


@pytest.mark.parametrize(
    ("embeddings", "valid", "words"),
    [
        (np.zeros((1, 2, 2)), np.zeros((2, 2), bool), "slide 's'.*no tissue"),
        (np.full((1, 2, 2), np.nan), np.ones((2, 2), bool), "slide 's'.*not finite"),
    ],
)
def test_empty_and_not_finite_grids_raise_with_the_slide(embeddings, valid, words):
    with pytest.raises(ValueError, match=words):
        moments_of(grid_of(embeddings, valid))

"""Search by content: against brute force in float64, and its rules of neighbours and slides."""

from __future__ import annotations

import shutil

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nic_core.cohort import CohortError
from nic_core.grids import Grid, GridError, grid_hash, write_grid
from nic_core.grids.similar import open_index, similar_cells, write_index
from nic_core.steps.grids import MANIFEST_SCHEMA, open_cell_index
from nic_core.store import GridKey, Store
from tests.provenance import provenance

CELL = 256.0  # level-0 px: 128 px at 0.5 um/px of a slide with 0.25 um/px


def grid_of(slide, embeddings, valid, **fields):
    """A grid of float16 (C, rows, columns); embeddings of cells that are not valid are set to 0."""
    about = provenance(slide=slide, mpp=0.5, slide_mpp=0.25, patch=128, **fields)
    return Grid(np.where(valid, embeddings, 0).astype(np.float16), valid, about)


def random_grids(seed, slides=4, shape=(6, 5), size=8):
    generator = np.random.default_rng(seed)
    return {
        f"s{i}": grid_of(
            f"s{i}",
            # a large part in common, as real embeddings have
            3 + generator.normal(size=(size, *shape)),
            generator.random(shape) < 0.7,
            stride=128,
            origin=(10.0 * i, 5.0),
        )
        for i in range(slides)
    }


def indexed(folder, grids, key="key"):
    paths = {slide: folder / f"{slide}.zarr" for slide in grids}
    for slide, grid in grids.items():
        write_grid(paths[slide], grid)
    write_index(folder / "index", key, paths)
    return open_index(folder / "index", key)


def brute_force(grids, slide, row, column):
    """Cosine of every cell to one cell, after the mean is subtracted; by slide, row and column."""
    cells = {
        (name, int(r), int(c)): np.asarray(grid.embeddings)[:, r, c].astype(np.float64)
        for name, grid in grids.items()
        for r, c in np.argwhere(grid.valid)
    }
    mean = np.mean(list(cells.values()), axis=0)
    query = cells[slide, row, column] - mean
    return {
        place: float(query @ (x - mean) / np.linalg.norm(query) / np.linalg.norm(x - mean))
        for place, x in cells.items()
    }


def greedy(expected, query, count, per_slide, apart):
    """The rules of the search, one cell after the other."""
    chosen = []
    for place in sorted(expected, key=lambda p: -expected[p]):
        near = [p for p in [query, *chosen] if p[0] == place[0]]
        distances = [max(abs(p[1] - place[1]), abs(p[2] - place[2])) for p in near]
        of_slide = sum(p[0] == place[0] for p in chosen)
        if place != query and of_slide < per_slide and all(d >= apart for d in distances):
            chosen.append(place)
    return chosen[:count]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Random grids and their index."""
    grids = random_grids(0)
    return grids, indexed(tmp_path_factory.mktemp("similar"), grids)


@settings(max_examples=40, deadline=None)
@given(
    cell=st.integers(0, 60),
    count=st.integers(1, 40),
    per_slide=st.integers(1, 9),
    apart=st.integers(0, 4),
)
def test_the_search_equals_brute_force(cohort, cell, count, per_slide, apart):
    grids, index = cohort
    query = (index.slides["slide"][index.slide_of(cell)], *map(int, index.places[cell]))
    expected = brute_force(grids, *query)
    found = similar_cells(
        index, index.position(*query), count=count, per_slide=per_slide, apart=apart
    )
    assert [(f.slide, f.row, f.column) for f in found] == greedy(
        expected, query, count, per_slide, apart
    )
    for cell in found:
        assert cell.similarity == pytest.approx(
            expected[cell.slide, cell.row, cell.column], abs=1e-5
        )


def test_places_are_centres_in_level_0_px(cohort):
    _, index = cohort
    [cell, *_] = similar_cells(index, 0, count=1)
    origin = 10.0 * int(cell.slide[1:])
    assert (cell.x, cell.y) == (origin + (cell.column + 0.5) * CELL, 5 + (cell.row + 0.5) * CELL)
    assert cell.size == CELL


def test_patches_of_overlapping_grids_do_not_overlap(tmp_path):
    everywhere = np.ones((12, 12), np.bool_)
    embeddings = np.random.default_rng(0).normal(size=(4, 12, 12))
    grid = grid_of("one", embeddings, everywhere, stride=32, origin=(0.0, 0.0))
    index = indexed(tmp_path, {"one": grid})
    found = similar_cells(index, 0, count=9, per_slide=9)
    places = np.array([(0, 0), *((f.row, f.column) for f in found)])
    distances = np.abs(places[:, None] - places[None]).max(axis=2)
    assert distances[~np.eye(len(places), dtype=bool)].min() >= 5  # a patch is four cells wide
    assert found[0].size == 128 / 0.25 * 0.5


def test_a_cell_equal_to_the_mean_has_no_similar_ones(tmp_path):
    valid = np.ones((1, 4), np.bool_)
    same = grid_of("same", np.full((3, 1, 4), 2.5), valid, stride=128, origin=(0.0, 0.0))
    index = indexed(tmp_path, {"same": same})
    with pytest.raises(ValueError, match="mean of all cells"):
        similar_cells(index, 0, count=1)


def test_unknown_slides_and_empty_cells_are_refused(cohort):
    grids, index = cohort
    row, column = map(int, np.argwhere(~grids["s0"].valid)[0])
    with pytest.raises(KeyError, match="no embedding at row"):
        index.position("s0", row, column)
    with pytest.raises(KeyError, match="no grid in the index"):
        index.position("other", 0, 0)


def test_grids_of_different_weights_are_refused(tmp_path):
    grids = random_grids(1, slides=2)
    about = grids["s1"].provenance.model_copy(update={"weights_hash": "other"})
    grids["s1"] = Grid(grids["s1"].embeddings, grids["s1"].valid, about)
    with pytest.raises(GridError, match="has other weights"):
        indexed(tmp_path, grids)


def test_a_damaged_index_is_reported(tmp_path):
    indexed(tmp_path, random_grids(1))
    (tmp_path / "index" / "places.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(GridError, match="index of cells is damaged"):
        open_index(tmp_path / "index", "key")


@pytest.fixture
def stored(tmp_path):
    """A store with the grids of an encoder and their manifest."""
    store, rows = Store(tmp_path), []
    for slide, grid in random_grids(5).items():
        path = store.grid(GridKey(encoder="mtl", slide=slide))
        write_grid(path, grid)
        rows.append((slide, grid_hash(path), int(grid.valid.sum())))
    write_manifest(store, rows)
    return store, rows


def write_manifest(store, rows):
    store.grid_manifest("mtl").parent.mkdir(exist_ok=True)
    pl.DataFrame(rows, MANIFEST_SCHEMA, orient="row").write_parquet(store.grid_manifest("mtl"))


def test_the_index_is_made_once_for_a_manifest(stored):
    store, rows = stored
    assert len(open_cell_index(store, "mtl").vectors) == sum(cells for *_, cells in rows)
    # without the grids it cannot be made again
    shutil.rmtree(store.root / "grids")
    assert len(open_cell_index(store, "mtl").vectors) == sum(cells for *_, cells in rows)


def test_another_manifest_makes_another_index(stored):
    store, rows = stored
    open_cell_index(store, "mtl")
    write_manifest(store, [*rows[:2], ("without", None, 0)])
    assert open_cell_index(store, "mtl").slides["slide"].to_list() == ["s0", "s1"]


def test_a_grid_newer_than_its_manifest_is_refused(stored):
    store, _ = stored
    write_grid(store.grid(GridKey(encoder="mtl", slide="s2")), random_grids(6)["s2"])
    with pytest.raises(GridError, match="changed after the grid manifest was made"):
        open_cell_index(store, "mtl")


def test_a_study_without_grids_has_no_index(stored):
    store, _ = stored
    write_manifest(store, [("s0", None, 0)])
    with pytest.raises(CohortError, match="no slide has a grid"):
        open_cell_index(store, "mtl")

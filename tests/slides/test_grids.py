"""The grid store, opened by our code and by the OME-Zarr packages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import ome_zarr.io
import ome_zarr.reader
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ome_zarr_models.v05.image import Image

from nic_core.grids import (
    Grid,
    GridError,
    GridProvenance,
    grid_hash,
    grid_preview,
    open_grid,
    write_grid,
)


def make(count: int = 16, rows: int = 9, columns: int = 13, seed: int = 0, **about) -> Grid:
    rng = np.random.default_rng(seed)
    valid = rng.random((rows, columns)) < 0.6
    codes = rng.normal(size=(count, rows, columns)).astype(np.float16) * valid
    provenance = {
        "slide": "s1",
        "slide_identity": "ab" * 16,
        "slide_mpp": 0.25,
        "encoder": "mtl",
        "weights_hash": "cd" * 16,
        "mpp": 0.5,
        "patch": 128,
    } | about
    return Grid(codes, valid, GridProvenance(**provenance))


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 130),
    rows=st.integers(1, 140),
    columns=st.integers(1, 70),
    seed=st.integers(0, 9),
)
def test_a_grid_survives_the_disk(tmp_path_factory, count, rows, columns, seed):
    path = tmp_path_factory.mktemp("grids") / "s.zarr"
    grid = make(count, rows, columns, seed)
    write_grid(path, grid)
    again = open_grid(path)
    np.testing.assert_array_equal(again.codes[:], grid.codes)
    np.testing.assert_array_equal(again.valid, grid.valid)
    assert again.provenance == grid.provenance
    assert again.shape == grid.shape == (count, rows, columns)
    assert grid_hash(again) == grid_hash(grid) == grid_hash(path)


def test_a_large_store_is_a_few_files_and_a_crop_reads_a_part(tmp_path):
    rows, columns = 600, 700
    rng = np.random.default_rng(0)
    valid = np.ones((rows, columns), bool)
    grid = Grid(rng.random((16, rows, columns)).astype(np.float16), valid, make().provenance)
    path = tmp_path / "s.zarr"
    write_grid(path, grid)
    assert sum(p.is_file() for p in path.rglob("*")) <= 3 + 2 * 4
    codes = open_grid(path).codes
    assert isinstance(codes, zarr.Array)
    np.testing.assert_array_equal(codes[:, 100:500, 250:650], grid.codes[:, 100:500, 250:650])
    assert codes.chunks == (16, 64, 64)
    assert codes.shards == (16, 512, 512)


def test_ome_zarr_opens_it_at_its_place_on_the_slide(tmp_path):
    path = tmp_path / "s.zarr"
    grid = make()
    write_grid(path, grid)
    location = ome_zarr.io.parse_url(path)
    (node,) = list(ome_zarr.reader.Reader(location)())[:1]
    np.testing.assert_array_equal(np.asarray(node.data[0]), grid.codes)
    assert [axis["name"] for axis in node.metadata["axes"]] == ["c", "y", "x"]
    (transforms,) = node.metadata["coordinateTransformations"]
    scale, translation = transforms[0]["scale"], transforms[1]["translation"]
    assert scale == [1, 64, 64]
    # the centre of the first cell lies 32 um from the slide's corner, its first px 0.125 um
    assert translation == [0, 31.875, 31.875]


def test_the_metadata_are_valid_ome_zarr_0_5(tmp_path):
    path = tmp_path / "s.zarr"
    write_grid(path, make())
    image = Image.from_zarr(zarr.open_group(path, mode="r"))
    (multiscale,) = image.ome_attributes.multiscales
    assert [axis.unit for axis in multiscale.axes][1:] == ["micrometer", "micrometer"]
    assert zarr.open_array(path / "0").metadata.dimension_names == ("c", "y", "x")


def test_the_hash_follows_the_content_alone():
    grid = make()
    about = grid.provenance
    same = Grid(grid.codes, grid.valid, about.model_copy(update={"software": "other"}))
    assert grid_hash(same) == grid_hash(grid)
    codes = grid.codes.copy()
    row, column = np.argwhere(grid.valid)[0]
    codes[3, row, column] += 1
    assert grid_hash(Grid(codes, grid.valid, about)) != grid_hash(grid)
    zero = Grid(np.zeros_like(grid.codes), grid.valid, about)
    assert grid_hash(zero) != grid_hash(Grid(zero.codes, np.zeros_like(grid.valid), about))
    assert grid_hash(make(patch=64)) != grid_hash(grid)


def test_a_store_is_replaced_whole(tmp_path):
    path = tmp_path / "grids" / "s.zarr"
    write_grid(path, make(seed=1))
    write_grid(path, make(rows=4, seed=2))
    assert open_grid(path).shape == (16, 4, 13)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: Grid(g.codes, g.valid[:-1], g.provenance), "do not fit"),
        (lambda g: Grid(g.codes * np.float16(np.nan), g.valid, g.provenance), "finite"),
        (lambda g: Grid(g.codes, g.valid & False, g.provenance), "must be 0"),
    ],
)
def test_a_wrong_grid_is_not_written(tmp_path, change, message):
    path = tmp_path / "s.zarr"
    with pytest.raises(GridError, match=message):
        write_grid(path, change(make()))
    assert not list(tmp_path.iterdir())


def test_what_is_no_grid_is_refused(tmp_path):
    with pytest.raises(GridError, match=r"gone.zarr: no grid store"):
        open_grid(tmp_path / "gone.zarr")
    other = tmp_path / "other.zarr"
    zarr.create_group(other)
    with pytest.raises(GridError, match="no grid store"):
        open_grid(other)
    (tmp_path / "file.zarr").write_text("")
    with pytest.raises(GridError, match="no grid store"):
        open_grid(tmp_path / "file.zarr")


def test_a_store_cut_short_is_refused(tmp_path):
    path = tmp_path / "s.zarr"
    write_grid(path, make())
    (path / "0" / "zarr.json").unlink()
    with pytest.raises(GridError, match="no grid store"):
        open_grid(path)


@pytest.mark.parametrize("count", [1, 2, 3, 128])
def test_the_preview_shows_codes_in_colour_and_background_white(count):
    grid = make(count)
    picture = grid_preview(grid, cell=3)
    assert picture.shape == (27, 39, 3)
    assert picture.dtype == np.uint8
    cells = picture[1::3, 1::3]
    assert (cells[~grid.valid] == 255).all()
    assert (cells[grid.valid] < 255).any(axis=1).all()
    if count >= 3:
        assert np.ptp(cells[grid.valid].astype(int), axis=0).min() > 150


def test_the_preview_of_hardly_anything_is_a_picture():
    grid = make()
    for kept in (0, 1):
        valid = np.zeros_like(grid.valid)
        valid.ravel()[:kept] = True
        codes = grid.codes * valid
        assert grid_preview(Grid(codes, valid, grid.provenance)).shape == (36, 52, 3)


def test_a_stale_place_is_named(tmp_path: Path):
    with pytest.raises(GridError, match="compress the slide again"):
        open_grid(tmp_path)

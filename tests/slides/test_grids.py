"""The grid store, opened by our embedding and by the OME-Zarr packages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import ome_zarr.io
import ome_zarr.reader
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ome_zarr_models.v05.image import Image
from zarr.storage import WrapperStore

from nic_core.grids import (
    Grid,
    GridError,
    GridProvenance,
    grid_hash,
    grid_preview,
    open_grid,
    write_grid,
)
from nic_core.grids.chunks import ChunkError
from nic_core.grids.orientations import orient, undo
from nic_core.store import StoreError


def make(
    count: int = 16, rows: int = 9, columns: int = 13, seed: int = 0, turned: bool = False, **about
) -> Grid:
    rng = np.random.default_rng(seed)
    valid = rng.random((rows, columns)) < 0.6
    embeddings = rng.normal(size=(count, rows, columns)).astype(np.float16) * valid
    others = rng.normal(size=(7, count, rows, columns)).astype(np.float16) * valid
    orientations = np.concatenate([embeddings[None], others]) if turned else None
    provenance = {
        "slide": "s1",
        "slide_identity": "ab" * 16,
        "slide_mpp": 0.25,
        "encoder": "mtl",
        "weights_hash": "cd" * 16,
        "mpp": 0.5,
        "patch": 128,
    } | about
    return Grid(embeddings, valid, GridProvenance(**provenance), orientations)


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 130),
    rows=st.integers(1, 140),
    columns=st.integers(1, 70),
    seed=st.integers(0, 9),
    turned=st.booleans(),
)
def test_a_grid_survives_the_disk(tmp_path_factory, count, rows, columns, seed, turned):
    path = tmp_path_factory.mktemp("grids") / "s.zarr"
    grid = make(count, rows, columns, seed, turned)
    write_grid(path, grid)
    again = open_grid(path)
    np.testing.assert_array_equal(again.embeddings[:], grid.embeddings)
    np.testing.assert_array_equal(again.valid, grid.valid)
    assert again.provenance == grid.provenance
    assert again.shape == grid.shape == (count, rows, columns)
    assert grid_hash(again) == grid_hash(grid) == grid_hash(path)
    assert (again.orientations is not None) == turned
    for k in range(8 if turned else 1):
        embeddings = again.oriented(k)
        assert (embeddings.shape, embeddings.dtype) == (grid.shape, np.float16)
        np.testing.assert_array_equal(embeddings[:], grid.oriented(k))
        np.testing.assert_array_equal(embeddings[:, :2, 1:], grid.oriented(k)[:, :2, 1:])


def test_a_stored_grid_is_copied_with_its_orientations(tmp_path):
    write_grid(tmp_path / "one.zarr", make(turned=True))
    write_grid(tmp_path / "two.zarr", open_grid(tmp_path / "one.zarr"))
    copy = open_grid(tmp_path / "two.zarr")
    assert grid_hash(copy) == grid_hash(make(turned=True))
    assert copy.orientations.shape == (8, *copy.shape)
    with pytest.raises(IndexError):
        copy.orientations[8]


@pytest.mark.parametrize("k", range(8))
def test_a_turned_grid_is_that_of_the_turned_slide(k):
    # an encoder that sees a patch's first pixel alone: which of its pixels that is, tells how it
    # was turned
    slide = np.arange(6 * 8, dtype=np.float16).reshape(6, 8)

    def encode(pixels):
        return pixels[::2, ::2][None]

    upright = [undo(encode(orient(slide, j)), j) for j in range(8)]
    mask = np.ones((3, 4), bool)
    mask[0, 1] = False
    stacked = np.stack(upright) * mask
    grid = Grid(stacked[0], mask, make().provenance, stacked)
    embeddings, valid = grid.turned(k)
    np.testing.assert_array_equal(embeddings[:, valid], encode(orient(slide, k))[:, valid])
    np.testing.assert_array_equal(valid, orient(mask, k))


def test_orientations_that_were_not_made_are_an_error():
    assert make().oriented(0) is not None
    with pytest.raises(GridError, match="'s1' is upright alone: compress the slide again"):
        make().oriented(3)


class Counting(WrapperStore):
    """Counts reads and their bytes."""

    def __init__(self, store):
        super().__init__(store)
        self.reads, self.bytes = [], 0

    async def get(self, key, prototype, byte_range=None):
        found = await super().get(key, prototype, byte_range)
        self.reads.append(key)
        self.bytes += len(found) if found is not None else 0
        return found


@pytest.mark.parametrize("k", [0, 5])
def test_blocks_are_the_chunks_of_a_window_as_zarr_reads_them(tmp_path, k):
    grid = make(5, 130, 600, turned=True)
    write_grid(tmp_path / "s.zarr", grid)
    embeddings, seen = open_grid(tmp_path / "s.zarr").oriented(k), np.zeros((130, 600), int)
    window = slice(60, 129), slice(500, 600)
    for cells in embeddings.blocks(window):
        np.testing.assert_array_equal(embeddings.block(cells), grid.oriented(k)[:, *cells])
        seen[cells] += 1
    # chunks of 64 cells, cut off at the edge, each once
    assert (seen[:, 448:] == 1).all()
    assert not seen[:, :448].any()


def test_blocks_of_a_shard_that_was_not_written_are_empty(tmp_path):
    grid = make(2, 4, 530)
    grid.embeddings[:, :, 512:] = 0
    write_grid(tmp_path / "s.zarr", grid)
    assert not (tmp_path / "s.zarr/0/c/0/0/1").exists()
    embeddings = open_grid(tmp_path / "s.zarr").embeddings
    assert not embeddings.block((slice(0, 4), slice(512, 530))).any()


def test_a_store_in_another_layout_is_one_block(tmp_path):
    grid = make(3, 20, 30)
    group = zarr.open_group(tmp_path / "s.zarr", mode="w", zarr_format=3)
    group.attrs["nic"] = grid.provenance.model_dump()
    group.create_array("0", data=grid.embeddings, chunks=(1, 8, 8))
    group.create_array("valid", data=grid.valid)
    embeddings, window = open_grid(tmp_path / "s.zarr").embeddings, (slice(3, 17), slice(5, 30))
    assert list(embeddings.blocks(window)) == [window]
    np.testing.assert_array_equal(embeddings.block(window), grid.embeddings[:, 3:17, 5:30])


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_chunk_is_named(tmp_path, damage):
    write_grid(tmp_path / "s.zarr", make())
    embeddings, shard = open_grid(tmp_path / "s.zarr").embeddings, tmp_path / "s.zarr/0/c/0/0/0"
    whole = shard.read_bytes()
    # cut short, or with other bytes in the chunk's place
    shard.write_bytes(bytes(len(whole) - 20) + whole[-20:] if damage is None else damage)
    with pytest.raises(ChunkError, match=r"c/0/0/0: damaged .*compress the slide again"):
        embeddings.block((slice(0, 9), slice(0, 13)))


def test_a_large_store_is_a_few_files_and_a_crop_costs_few_reads(tmp_path):
    rows, columns = 600, 700  # 4 shards
    embeddings = np.random.default_rng(0).random((8, 16, rows, columns)).astype(np.float16)
    valid = np.ones((rows, columns), bool)
    upright, turned = tmp_path / "upright.zarr", tmp_path / "turned.zarr"
    write_grid(upright, Grid(embeddings[0], valid, make().provenance))
    write_grid(turned, Grid(embeddings[0], valid, make().provenance, embeddings))
    assert sum(p.is_file() for p in upright.rglob("*")) == 3 + 2 * 4
    assert sum(p.is_file() for p in turned.rglob("*")) == 4 + 9 * 4
    grid = open_grid(turned)
    for k in (0, 5):
        array = zarr.open_array(turned / ("orientations" if k else "0"), mode="r")
        counting = Counting(array.store)
        array = zarr.open_array(counting, mode="r")
        counting.reads.clear()
        window = np.s_[:, 100:500, 250:650]
        crop = array[(k - 1, *window)] if k else array[window]
        np.testing.assert_array_equal(crop, embeddings[k][window])
        np.testing.assert_array_equal(grid.oriented(k)[window], embeddings[k][window])
        # one index of each shard, and the chunks: 7 x 8 of 64 x 64 cells hold 400 x 400
        assert len(set(counting.reads)) == 2
        assert len(counting.reads) == 2 + 7 * 8
        assert counting.bytes < 1.5 * crop.nbytes


@pytest.mark.parametrize("turned", [False, True])
def test_ome_zarr_opens_it_at_its_place_on_the_slide(tmp_path, turned):
    path = tmp_path / "s.zarr"
    grid = make(turned=turned)
    write_grid(path, grid)
    location = ome_zarr.io.parse_url(path)
    (node,) = list(ome_zarr.reader.Reader(location)())[:1]
    np.testing.assert_array_equal(np.asarray(node.data[0]), grid.embeddings)
    assert [axis["name"] for axis in node.metadata["axes"]] == ["c", "y", "x"]
    (transforms,) = node.metadata["coordinateTransformations"]
    scale, translation = transforms[0]["scale"], transforms[1]["translation"]
    assert scale == [1, 64, 64]
    # the centre of the first cell lies 32 um from the slide's corner, its first px 0.125 um
    assert translation == [0, 31.875, 31.875]


@pytest.mark.parametrize("turned", [False, True])
def test_the_metadata_are_valid_ome_zarr_0_5(tmp_path, turned):
    path = tmp_path / "s.zarr"
    write_grid(path, make(turned=turned))
    image = Image.from_zarr(zarr.open_group(path, mode="r"))
    (multiscale,) = image.ome_attributes.multiscales
    assert [axis.unit for axis in multiscale.axes][1:] == ["micrometer", "micrometer"]
    assert zarr.open_array(path / "0").metadata.dimension_names == ("c", "y", "x")


def test_the_hash_follows_the_content_alone():
    grid = make()
    about = grid.provenance
    same = Grid(grid.embeddings, grid.valid, about.model_copy(update={"software": "other"}))
    assert grid_hash(same) == grid_hash(grid)
    embeddings = grid.embeddings.copy()
    row, column = np.argwhere(grid.valid)[0]
    embeddings[3, row, column] += 1
    assert grid_hash(Grid(embeddings, grid.valid, about)) != grid_hash(grid)
    zero = Grid(np.zeros_like(grid.embeddings), grid.valid, about)
    assert grid_hash(zero) != grid_hash(Grid(zero.embeddings, np.zeros_like(grid.valid), about))
    assert grid_hash(make(patch=64)) != grid_hash(grid)
    turned = make(turned=True)
    assert grid_hash(turned) != grid_hash(grid)
    turned.orientations[3, 0, row, column] += 1
    assert grid_hash(turned) != grid_hash(make(turned=True))


def test_a_store_without_the_newer_provenance_was_made_the_only_way_there_was(tmp_path):
    path = tmp_path / "s.zarr"
    write_grid(path, make())
    group = zarr.open_group(path, mode="r+")
    newer = ("stride", "precision", "reading")
    older = {name: value for name, value in group.attrs["nic"].items() if name not in newer}
    group.attrs["nic"] = older
    about = open_grid(path).provenance
    assert (about.stride, about.precision, about.reading) == (128, "float32", "patch")


@pytest.mark.parametrize(
    "change", [{"stride": 64}, {"precision": "int8"}, {"reading": "fast"}, {"tomorrow": 1}]
)
def test_provenance_that_is_not_understood_is_refused(tmp_path, change):
    path = tmp_path / "s.zarr"
    write_grid(path, make())
    group = zarr.open_group(path, mode="r+")
    group.attrs["nic"] = group.attrs["nic"] | change
    (name,) = change
    with pytest.raises(GridError, match=rf"(?s)provenance: .*{name}.*compress the slide"):
        open_grid(path)


def test_a_store_is_replaced_whole(tmp_path):
    path = tmp_path / "grids" / "s.zarr"
    write_grid(path, make(seed=1))
    write_grid(path, make(rows=4, seed=2))
    assert open_grid(path).shape == (16, 4, 13)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: Grid(g.embeddings, g.valid[:-1], g.provenance), "do not fit"),
        (lambda g: Grid(g.embeddings * np.float16(np.nan), g.valid, g.provenance), "finite"),
        (lambda g: Grid(g.embeddings, g.valid & False, g.provenance), "must be 0"),
        (
            lambda g: replace(g, orientations=np.stack([g.embeddings] * 7)),
            "orientations .* do not fit",
        ),
        (
            lambda g: replace(g, orientations=np.stack([g.embeddings] * 7 + [g.embeddings + 1])),
            "orientation 7: .* must be 0",
        ),
    ],
)
def test_a_wrong_grid_is_not_written(tmp_path, change, message):
    path = tmp_path / "s.zarr"
    with pytest.raises(GridError, match=message):
        write_grid(path, change(make()))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_one_error_and_leaves_the_old_store_alone(mount):
    folder = mount("size=4m")
    path = folder / "s.zarr"
    write_grid(path, make())
    rng = np.random.default_rng(0)
    embeddings = rng.random((4, 1100, 1100)).astype(np.float16)  # 9 shards
    large = Grid(embeddings, np.ones((1100, 1100), bool), make().provenance)
    for _ in range(3):
        with pytest.raises(StoreError, match=r"s.zarr: .*No space left on device"):
            write_grid(path, large)
        assert list(folder.iterdir()) == [path]
        assert grid_hash(path) == grid_hash(make())


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
        embeddings = grid.embeddings * valid
        assert grid_preview(Grid(embeddings, valid, grid.provenance)).shape == (36, 52, 3)


def test_a_stale_place_is_named(tmp_path: Path):
    with pytest.raises(GridError, match="compress the slide again"):
        open_grid(tmp_path)

"""The grid store, read by this package and by the OME-Zarr packages."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import replace
from unittest import mock

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
    GridPart,
    GridProvenance,
    draw_grid,
    grid_hash,
    open_grid,
    verify_grid,
    write_grid,
    write_parts,
)
from nic_core.grids.chunks import ChunkError, tissue_blocks
from nic_core.grids.moments import grid_moments
from nic_core.grids.shards import Layout, layout_of
from nic_core.orientations import orient, undo
from nic_core.store import StoreError
from tests.provenance import provenance


def make(
    size: int = 16,
    rows: int = 9,
    columns: int = 13,
    seed: int = 0,
    orientations: bool = False,
    **changes,
) -> Grid:
    """A random grid of embeddings of ``size`` numbers; ``changes`` of its provenance."""
    rng = np.random.default_rng(seed)
    valid = rng.random((rows, columns)) < 0.6
    embeddings = rng.normal(size=(size, rows, columns)).astype(np.float16) * valid
    others = rng.normal(size=(7, size, rows, columns)).astype(np.float16) * valid
    eight = np.concatenate([embeddings[None], others]) if orientations else None
    return Grid(embeddings, valid, provenance(**changes), eight)


@settings(max_examples=15, deadline=None)
@given(
    size=st.integers(1, 130),
    rows=st.integers(1, 140),
    columns=st.integers(1, 70),
    seed=st.integers(0, 9),
    orientations=st.booleans(),
)
def test_a_grid_is_read_back_unchanged(tmp_path_factory, size, rows, columns, seed, orientations):
    path = tmp_path_factory.mktemp("grids") / "s.zarr"
    grid = make(size, rows, columns, seed, orientations)
    write_grid(path, grid)
    again = open_grid(path)
    np.testing.assert_array_equal(again.embeddings[:], grid.embeddings)
    np.testing.assert_array_equal(again.valid, grid.valid)
    assert again.provenance == grid.provenance
    assert again.shape == grid.shape == (size, rows, columns)
    assert grid_hash(again) == grid_hash(grid) == grid_hash(path)
    assert (again.orientations is not None) == orientations
    for k in range(8 if orientations else 1):
        embeddings = again.oriented(k)
        assert (embeddings.shape, embeddings.dtype) == (grid.shape, np.float16)
        np.testing.assert_array_equal(embeddings[:], grid.oriented(k))
        np.testing.assert_array_equal(embeddings[:, :2, 1:], grid.oriented(k)[:, :2, 1:])


def test_a_stored_grid_can_be_written_again_with_orientations(tmp_path):
    write_grid(tmp_path / "one.zarr", make(orientations=True))
    write_grid(tmp_path / "two.zarr", open_grid(tmp_path / "one.zarr"))
    copy = open_grid(tmp_path / "two.zarr")
    assert grid_hash(copy) == grid_hash(make(orientations=True))
    assert copy.orientations.shape == (8, *copy.shape)
    with pytest.raises(IndexError):
        copy.orientations[8]


@pytest.mark.parametrize("k", range(8))
def test_turned_gives_the_grid_of_the_turned_slide(k):
    # this encoder returns a patch's first pixel, which differs between orientations
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


def test_a_grid_without_orientations_refuses_to_give_one():
    assert make().oriented(0) is not None
    with pytest.raises(GridError, match="'s1' has no orientations; compress the slide again"):
        make().oriented(3)


class Counting(WrapperStore):
    """Counts reads and bytes."""

    def __init__(self, store):
        super().__init__(store)
        self.reads, self.bytes = [], 0

    async def get(self, key, prototype, byte_range=None):
        found = await super().get(key, prototype, byte_range)
        self.reads.append(key)
        self.bytes += len(found) if found is not None else 0
        return found


@pytest.mark.parametrize("k", [0, 5])
def test_blocks_of_a_window_equal_what_zarr_reads(tmp_path, k):
    grid = make(5, 130, 600, orientations=True)
    write_grid(tmp_path / "s.zarr", grid)
    embeddings, reads = open_grid(tmp_path / "s.zarr").oriented(k), np.zeros((130, 600), int)
    window = slice(60, 129), slice(500, 600)
    for cells in embeddings.blocks(window):
        np.testing.assert_array_equal(embeddings.block(cells), grid.oriented(k)[:, *cells])
        reads[cells] += 1
    # chunks of 64 cells, trimmed at the edge of the grid, each once
    assert (reads[:, 448:] == 1).all()
    assert not reads[:, :448].any()


def test_blocks_of_an_absent_shard_are_zero(tmp_path):
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
def test_a_damaged_chunk_is_an_error_that_names_it(tmp_path, damage):
    write_grid(tmp_path / "s.zarr", make())
    embeddings, shard = open_grid(tmp_path / "s.zarr").embeddings, tmp_path / "s.zarr/0/c/0/0/0"
    whole = shard.read_bytes()
    # truncated, or with other bytes in the chunk
    shard.write_bytes(bytes(len(whole) - 20) + whole[-20:] if damage is None else damage)
    with pytest.raises(ChunkError, match=r"c/0/0/0: damaged .*compress the slide again"):
        embeddings.block((slice(0, 9), slice(0, 13)))
    with pytest.raises(GridError, match=r"c/0/0/0: damaged [^;]*; compress the slide again$"):
        verify_grid(tmp_path / "s.zarr")


def test_a_large_store_has_few_files_and_a_crop_few_reads(tmp_path):
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
        # two reads of shard indexes and 7 x 8 chunks of 64 x 64 cells
        assert len(set(counting.reads)) == 2
        assert len(counting.reads) == 2 + 7 * 8
        assert counting.bytes < 1.5 * crop.nbytes


@pytest.mark.parametrize(
    ("size", "chunk", "shard"),
    [(1, 64, 512), (128, 64, 512), (512, 64, 512), (1024, 32, 256), (1536, 32, 256)]
    + [(2560, 16, 128), (50_000, 4, 32)],
)
def test_the_wider_embeddings_are_the_smaller_are_chunks(size, chunk, shard):
    layout = layout_of((size, 600, 700))
    assert (layout.chunk, layout.shard) == ((chunk, chunk), (shard, shard))
    assert 2 * size * chunk**2 <= 4 << 20
    assert 2 * size * shard**2 <= 256 << 20


sides = st.integers(0, 5).map(lambda power: 2**power)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 70), chunk=sides, times=sides)
def test_windows_cover_each_cell_once_from_left_to_right(rows, columns, chunk, times):
    with mock.patch.multiple("nic_core.grids.shards", _CHUNK=chunk, _SHARD=chunk * times):
        layout = layout_of((3, rows, columns))
    last, shards = np.full(rows, -1), []
    for window in layout.windows():
        along = window[1].start, window[1].stop
        assert (last[window[0]] == along[0] - 1).all()
        last[window[0]] = along[1] - 1
        places = zip(window, layout.shard, layout.chunk, strict=True)
        shards.append(tuple(part.start // whole for part, whole, _ in places))
        assert all(part.start % side == 0 for part, side in zip(window, layout.chunk, strict=True))
    assert (last == columns - 1).all()
    # the windows of a shard follow each other
    assert len(set(shards)) == 1 + sum(a != b for a, b in itertools.pairwise(shards))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    chunk=sides,
    times=sides,
    seed=st.integers(0, 9),
    orientations=st.booleans(),
)
def test_the_hash_does_not_depend_on_chunks_and_shards(
    tmp_path_factory, rows, columns, chunk, times, seed, orientations
):
    grid = make(3, rows, columns, seed, orientations)  # with -0 outside of the mask
    path = tmp_path_factory.mktemp("grids") / "s.zarr"
    with mock.patch.multiple("nic_core.grids.shards", _CHUNK=chunk, _SHARD=chunk * times):
        write_grid(path, grid)
    assert grid_hash(path) == grid_hash(grid)
    verify_grid(path)
    # zarr itself reads the same numbers
    group = zarr.open_group(path, mode="r")
    assert group["0"].chunks == (3, min(chunk, rows), min(chunk, columns))
    np.testing.assert_array_equal(group["0"][:].view("u2"), grid.embeddings.view("u2"))
    np.testing.assert_array_equal(group["valid"][:], grid.valid)
    if orientations:
        others = np.asarray(grid.orientations[1:])
        np.testing.assert_array_equal(group["orientations"][:].view("u2"), others.view("u2"))


def moments_of(grid: Grid):
    return grid_moments("s", grid.embeddings, grid.valid, within=True)


def parts_of(layout: Layout):
    """Parts of random numbers; the last row of chunks is not tissue."""
    for row, column in layout.windows():
        valid = np.full((row.stop - row.start, column.stop - column.start), row.start < 512)
        rng = np.random.default_rng([row.start, column.start])
        embeddings = rng.random((1, layout.shape[0], *valid.shape), np.float32)
        yield GridPart((row, column), embeddings.astype(np.float16) * valid, valid)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_area_of_a_grid(tmp_path):
    """Peak of what Python and NumPy allocate, for writing a grid and for reading all of it."""

    def write(path, side):
        shape, about = (32, side, side), provenance()
        write_parts(path, shape, parts_of(layout_of(shape)), lambda _: about, orientations=1)

    def read_cells(grid):
        for _ in tissue_blocks(grid.embeddings, grid.valid):
            pass

    peaks = {}
    for side in (192, 576):
        path = tmp_path / f"{side}.zarr"
        work = {
            "write": lambda path=path, side=side: write(path, side),
            "hash": lambda path=path: verify_grid(path),
            "cells": lambda path=path: read_cells(open_grid(path)),
            "moments": lambda path=path: moments_of(open_grid(path)),
            "preview": lambda path=path: draw_grid(open_grid(path), cell=1),
        }
        for name, function in work.items():
            tracemalloc.start()
            function()
            peaks[name, side] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    cells = 576**2 - 192**2
    grown = {name: (peaks[name, 576] - peaks[name, 192]) / cells for name in work}
    # bytes a cell: of 64 bytes of embeddings none is held, but the mask is, and a preview's values
    assert max(grown[name] for name in ("write", "hash", "cells", "moments")) < 8
    assert grown["preview"] < 64


def test_a_part_that_cannot_be_made_keeps_the_old_store(tmp_path):
    path, layout = tmp_path / "s.zarr", layout_of((4, 600, 20))
    write_grid(path, make())

    def broken():
        yield from list(parts_of(layout))[:9]  # the second shard has begun
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_parts(path, layout.shape, broken(), lambda _: provenance(), orientations=1)
    assert list(tmp_path.iterdir()) == [path]
    assert grid_hash(path) == grid_hash(make())


@pytest.mark.parametrize("orientations", [False, True])
def test_ome_zarr_reads_the_position_on_the_slide(tmp_path, orientations):
    path = tmp_path / "s.zarr"
    grid = make(orientations=orientations)
    write_grid(path, grid)
    location = ome_zarr.io.parse_url(path)
    (node,) = list(ome_zarr.reader.Reader(location)())[:1]
    np.testing.assert_array_equal(np.asarray(node.data[0]), grid.embeddings)
    assert [axis["name"] for axis in node.metadata["axes"]] == ["c", "y", "x"]
    (transforms,) = node.metadata["coordinateTransformations"]
    scale, translation = transforms[0]["scale"], transforms[1]["translation"]
    assert scale == [1, 64, 64]
    # the centre of the first cell is 32 um from the slide's corner, that of its first px 0.125 um
    assert translation == [0, 31.875, 31.875]


@pytest.mark.parametrize("orientations", [False, True])
def test_the_metadata_are_valid_ome_zarr_0_5(tmp_path, orientations):
    path = tmp_path / "s.zarr"
    write_grid(path, make(orientations=orientations))
    image = Image.from_zarr(zarr.open_group(path, mode="r"))
    (multiscale,) = image.ome_attributes.multiscales
    assert [axis.unit for axis in multiscale.axes][1:] == ["micrometer", "micrometer"]
    assert zarr.open_array(path / "0").metadata.dimension_names == ("c", "y", "x")


def test_the_hash_depends_on_the_content_only():
    grid = make()
    provenance = grid.provenance
    same = Grid(grid.embeddings, grid.valid, provenance.model_copy(update={"software": "other"}))
    assert grid_hash(same) == grid_hash(grid)
    embeddings = grid.embeddings.copy()
    row, column = np.argwhere(grid.valid)[0]
    embeddings[3, row, column] += 1
    assert grid_hash(Grid(embeddings, grid.valid, provenance)) != grid_hash(grid)
    zero = Grid(np.zeros_like(grid.embeddings), grid.valid, provenance)
    assert grid_hash(zero) != grid_hash(
        Grid(zero.embeddings, np.zeros_like(grid.valid), provenance)
    )
    assert grid_hash(make(patch=64, stride=64)) != grid_hash(grid)
    turned = make(orientations=True)
    assert grid_hash(turned) != grid_hash(grid)
    turned.orientations[3, 0, row, column] += 1
    assert grid_hash(turned) != grid_hash(make(orientations=True))


def change_provenance(path, change):
    group = zarr.open_group(path, mode="r+")
    group.attrs["nic"] = change(group.attrs["nic"])


def test_a_store_of_an_older_format_is_refused(tmp_path):
    path = tmp_path / "s.zarr"
    write_grid(path, make())
    # format 1 had no field `format`, and early stores neither stride, precision nor reading
    newer = (
        "format",
        "stride",
        "origin",
        "precision",
        "reading",
        "slide_image",
        "colours",
        "icc_profile",
    )
    change_provenance(path, lambda p: {name: p[name] for name in p if name not in newer})
    message = r"s.zarr: was written by an older version \(format 1\); compress the slide again"
    for read in (open_grid, verify_grid):
        with pytest.raises(GridError, match=message):
            read(path)


@pytest.mark.parametrize("name", list(GridProvenance.model_fields)[1:])
def test_provenance_that_lacks_a_field_is_refused(tmp_path, name):
    path = tmp_path / "s.zarr"
    write_grid(path, make())
    change_provenance(path, lambda p: {field: p[field] for field in p if field != name})
    with pytest.raises(GridError, match=f"invalid provenance .{name}: Field required"):
        open_grid(path)


def test_a_store_without_a_recorded_hash_is_not_verified(tmp_path):
    path = tmp_path / "s.zarr"
    write_grid(path, make())
    verify_grid(path)
    del zarr.open_group(path, mode="r+").attrs["nic_hash"]
    with pytest.raises(GridError, match="no recorded hash; compress the slide again"):
        verify_grid(path)


@pytest.mark.parametrize(
    "change",
    [{"format": 5}, {"stride": 129}, {"precision": "int4"}, {"reading": "fast"}, {"unknown": 1}],
)
def test_invalid_provenance_is_refused(tmp_path, change):
    path = tmp_path / "s.zarr"
    write_grid(path, make())
    change_provenance(path, lambda p: p | change)
    (name,) = change
    with pytest.raises(GridError, match=rf"invalid provenance .*{name}.*compress the slide again"):
        open_grid(path)


def test_a_store_is_replaced_atomically(tmp_path):
    path = tmp_path / "grids" / "s.zarr"
    write_grid(path, make(seed=1))
    write_grid(path, make(rows=4, seed=2))
    assert open_grid(path).shape == (16, 4, 13)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: Grid(g.embeddings, g.valid[:-1], g.provenance), "do not match"),
        (lambda g: Grid(g.embeddings * np.float16(np.nan), g.valid, g.provenance), "finite"),
        (lambda g: Grid(g.embeddings, g.valid & False, g.provenance), "must be 0"),
        (
            lambda g: replace(g, orientations=np.stack([g.embeddings] * 7)),
            "shape of the orientations, .* does not match",
        ),
        (
            lambda g: replace(g, orientations=np.stack([g.embeddings] * 7 + [g.embeddings + 1])),
            "orientation 7: .* must be 0",
        ),
    ],
)
def test_an_invalid_grid_is_not_written(tmp_path, change, message):
    path = tmp_path / "s.zarr"
    with pytest.raises(GridError, match=message):
        write_grid(path, change(make()))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_error_and_keeps_the_old_store(mount):
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


def test_a_missing_store_or_another_zarr_group_is_refused(tmp_path):
    with pytest.raises(GridError, match=r"gone.zarr: not a grid store"):
        open_grid(tmp_path / "gone.zarr")
    other = tmp_path / "other.zarr"
    zarr.create_group(other)
    with pytest.raises(GridError, match="not a grid store"):
        open_grid(other)
    (tmp_path / "file.zarr").write_text("")
    with pytest.raises(GridError, match="not a grid store"):
        open_grid(tmp_path / "file.zarr")


def test_a_store_without_an_array_is_refused(tmp_path):
    path = tmp_path / "s.zarr"
    write_grid(path, make())
    (path / "0" / "zarr.json").unlink()
    with pytest.raises(GridError, match="not a grid store"):
        open_grid(path)

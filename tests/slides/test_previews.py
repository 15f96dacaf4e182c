"""Previews of grids, read by this package, by the OME-Zarr packages and by JavaScript readers."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import ome_zarr.io
import ome_zarr.reader
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ome_zarr_models.v05.image import Image
from sklearn.decomposition import PCA

from nic_core.grids import (
    EmbeddingColours,
    Grid,
    GridError,
    draw_grid,
    embedding_colours,
    open_grid,
    preview,
    read_colours,
    verify_preview,
    write_colours,
    write_grid,
    write_preview,
    write_previews,
)
from nic_core.grids.preview import COLOURS_FILE, colour_cells
from nic_core.maps.heatmaps import ZARR, write_heatmap
from nic_core.slides import content_identity, open_slide
from tests.provenance import provenance

VIEWERS = Path(__file__).parents[1] / "viewers"


def make(size: int = 8, rows: int = 9, columns: int = 13, seed: int = 0, **changes) -> Grid:
    """A grid with embeddings of correlated numbers; ``changes`` of its provenance."""
    rng = np.random.default_rng(seed)
    valid = rng.random((rows, columns)) < 0.6
    valid[rows // 2, columns // 2] = True
    mixed = np.tensordot(rng.normal(size=(size, 4)), rng.normal(size=(4, rows, columns)), 1)
    return Grid((mixed * valid).astype(np.float16), valid, provenance(**changes))


def stored(folder: Path, *grids: Grid) -> list[Path]:
    paths = [folder / f"{number}.zarr" for number in range(len(grids))]
    for path, grid in zip(paths, grids, strict=True):
        write_grid(path, grid)
    return paths


def cells(grid: Grid) -> np.ndarray:
    """The embeddings (n, C) of the valid cells, by row and column."""
    return np.asarray(grid.embeddings[:], np.float64)[:, grid.valid].T


def test_the_components_are_those_of_all_grids_together(tmp_path):
    grids = [make(seed=seed, rows=70 + seed, columns=90) for seed in range(3)]
    colours = embedding_colours(stored(tmp_path, *grids))
    embeddings = np.concatenate([cells(grid) for grid in grids])
    assert (colours.slides, colours.cells) == (3, 6_000)
    # 2,000 cells of each grid against a PCA of all
    reference = PCA(3).fit(embeddings)
    for own, other in zip(colours.components, reference.components_, strict=True):
        assert abs(np.dot(own, other)) > 0.99
    assert np.allclose(colours.mean, reference.mean_, atol=0.1)


def test_components_of_few_cells_equal_another_implementation(tmp_path):
    grids = [make(seed=seed) for seed in range(2)]
    colours = embedding_colours(stored(tmp_path, *grids))
    embeddings = np.concatenate([cells(grid) for grid in grids])
    reference = PCA(3, svd_solver="full").fit(embeddings)
    signs = np.sign(np.sum(colours.components * reference.components_, axis=1))
    np.testing.assert_allclose(
        colours.components, signs[:, None] * reference.components_, atol=1e-9
    )
    values = reference.transform(embeddings) * signs
    np.testing.assert_allclose(colours.low, np.percentile(values, 2, axis=0))
    np.testing.assert_allclose(colours.high, np.percentile(values, 98, axis=0))
    largest = np.abs(colours.components).argmax(axis=1)
    assert (np.array(colours.components)[[0, 1, 2], largest] > 0).all()
    red = np.clip((values[:, 0] - colours.low[0]) / (colours.high[0] - colours.low[0]), 0, 1)
    drawn = np.concatenate([colour_cells(grid, colours)[grid.valid] for grid in grids])
    np.testing.assert_array_equal(drawn[:, 0], np.round(red * 235))


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 12), seed=st.integers(0, 99), rows=st.integers(1, 9))
def test_equal_embeddings_have_equal_colours_on_every_slide(tmp_path_factory, size, seed, rows):
    first, second = make(size, rows, seed=seed), make(size, 4, seed=seed + 1)
    row, column = np.argwhere(second.valid)[0]
    source = np.argwhere(first.valid)[-1]
    second.embeddings[:, row, column] = first.embeddings[:, source[0], source[1]]
    paths = stored(tmp_path_factory.mktemp("grids"), first, second)
    colours = embedding_colours(paths)
    one, other = (colour_cells(open_grid(path), colours) for path in paths)
    np.testing.assert_array_equal(one[tuple(source)], other[row, column])
    assert (one[~first.valid] == 255).all()
    assert (one[first.valid] <= 235).all()


def test_colours_are_the_same_in_every_computation(tmp_path):
    paths = stored(tmp_path, *(make(seed=seed, rows=200) for seed in range(3)))
    assert embedding_colours(paths) == embedding_colours(paths)
    assert embedding_colours(paths).hash != embedding_colours(paths[:2]).hash


def test_many_grids_give_fewer_cells_each(tmp_path, monkeypatch):
    paths = stored(tmp_path, *(make(seed=seed) for seed in range(5)), make(rows=1, columns=3))
    monkeypatch.setattr(preview, "_CELLS_PER_GRID", 20)
    assert embedding_colours(paths[:1]).cells == 20
    monkeypatch.setattr(preview, "_CELLS_IN_ALL", 60)
    expected = 5 * 10 + open_grid(paths[5]).valid.sum()
    assert embedding_colours(paths).cells == expected
    monkeypatch.setattr(preview, "_CELLS_IN_ALL", 2)
    assert embedding_colours(paths).cells == 6  # one of each grid


def test_grids_of_other_weights_have_no_common_colours(tmp_path):
    paths = stored(tmp_path, make(), make(weights_hash="ef" * 16))
    with pytest.raises(GridError, match=r"1.zarr: its encoder has other weights than .*0.zarr"):
        embedding_colours(paths)
    colours = embedding_colours(paths[:1])
    with pytest.raises(GridError, match="slide 's1' by encoder 'mtl' is of other weights"):
        write_preview(tmp_path / "p.zarr", open_grid(paths[1]), colours)
    assert not (tmp_path / "p.zarr").exists()


def empty(rows: int = 4, columns: int = 5) -> Grid:
    return Grid(
        np.zeros((8, rows, columns), np.float16), np.zeros((rows, columns), bool), provenance()
    )


def test_grids_without_embeddings_give_no_colours_but_white_previews(tmp_path):
    paths = stored(tmp_path, empty(), make())
    for none in ([], paths[:1]):
        with pytest.raises(GridError, match="no cell with an embedding, so no colours"):
            embedding_colours(none)
    write_previews(paths, tmp_path / "previews")
    assert (zarr.open_array(tmp_path / "previews/0.zarr/0")[:] == 255).all()
    assert (zarr.open_array(tmp_path / "previews/1.zarr/0")[:] < 255).any()
    assert read_colours(tmp_path / "previews" / COLOURS_FILE) == embedding_colours(paths)


def test_a_damaged_chunk_is_named(tmp_path):
    (path,) = stored(tmp_path, make())
    (path / "0/c/0/0/0").write_bytes(b"junk")
    for read in (lambda: embedding_colours([path]), lambda: draw_grid(open_grid(path))):
        with pytest.raises(GridError, match=r"0.zarr/0/c/0/0/0: damaged"):
            read()


@pytest.mark.parametrize("size", [1, 2, 3, 128])
def test_a_drawn_grid_has_coloured_cells_and_white_background(size):
    grid = make(size)
    picture = draw_grid(grid, cell=3)
    assert picture.shape == (27, 39, 3)
    assert picture.dtype == np.uint8
    drawn = picture[1::3, 1::3]
    assert (drawn[~grid.valid] == 255).all()
    assert (drawn[grid.valid] < 255).any(axis=1).all()
    if size >= 3:
        assert np.ptp(drawn[grid.valid].astype(int), axis=0).min() > 150
    assert (np.ptp(drawn[grid.valid].astype(int), axis=0)[size:] == 0).all()  # grey


def test_a_grid_of_no_or_one_cell_can_be_drawn():
    assert (draw_grid(empty()) == 255).all()
    one = make(rows=1, columns=1)
    assert draw_grid(one).shape == (4, 4, 3)
    assert (draw_grid(one) == 118).all()  # without a range a component is grey


def test_the_file_of_colours_is_read_back_unchanged(tmp_path):
    colours = embedding_colours(stored(tmp_path, make()))
    write_colours(tmp_path / "colours" / "mtl.json", colours)
    again = read_colours(tmp_path / "colours" / "mtl.json")
    assert (again, again.hash) == (colours, colours.hash)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:100], "Invalid JSON"),
        (lambda text: text.replace('"format":1', '"format":2'), "format: "),
        (lambda text: text.replace('"mean":[', '"mean":[0.5,'), "not three components"),
        (lambda text: text.replace('"low":[', '"low":[NaN,'), "."),
    ],
)
def test_a_damaged_file_of_colours_is_refused(tmp_path, change, message):
    path = tmp_path / "mtl.json"
    write_colours(path, embedding_colours(stored(tmp_path, make())))
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(GridError, match=rf"mtl.json: not a file of colours \(.*{message}"):
        read_colours(path)
    with pytest.raises(GridError, match=r"gone.json: cannot be read \(No such file"):
        read_colours(tmp_path / "gone.json")


def colours_of(size: int) -> EmbeddingColours:
    """Colours of :func:`make`'s encoder: the first three numbers, from -2 to 2."""
    return EmbeddingColours(
        format=1,
        encoder="mtl",
        weights_hash="cd" * 16,
        slides=1,
        cells=1,
        mean=[0] * size,
        components=np.eye(3, size).tolist(),
        low=[-2] * 3,
        high=[2] * 3,
    )


def test_ome_zarr_reads_place_scale_and_colours(tmp_path):
    path = tmp_path / "s.zarr"
    # cells of 64 px at 0.5 um/px; the grid begins 1,000 px right of and 500 px below the corner
    grid = make(stride=64, origin=(1000.0, 500.0))
    picture = write_preview(path, grid, colours_of(8))
    (node,) = list(ome_zarr.reader.Reader(ome_zarr.io.parse_url(path))())[:1]
    np.testing.assert_array_equal(np.moveaxis(np.asarray(node.data[0]), 0, 2), picture)
    assert [axis["name"] for axis in node.metadata["axes"]] == ["c", "y", "x"]
    (transforms,) = node.metadata["coordinateTransformations"]
    assert transforms[0]["scale"] == [1, 32, 32]
    # half a cell minus half a level-0 pixel of 0.25 um
    assert transforms[1]["translation"] == [0, 125 + 15.875, 250 + 15.875]
    shown = [np.asarray(colour[1]).tolist() for colour in node.metadata["colormap"]]
    assert shown == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert node.metadata["contrast_limits"] == [[0, 255]] * 3


def test_the_metadata_are_valid_ome_zarr_0_5(tmp_path):
    write_preview(tmp_path / "s.zarr", make(), colours_of(8))
    group = zarr.open_group(tmp_path / "s.zarr", mode="r")
    image = Image.from_zarr(group)
    (multiscale,) = image.ome_attributes.multiscales
    assert [axis.unit for axis in multiscale.axes][1:] == ["micrometer", "micrometer"]
    assert image.ome_attributes.omero is not None
    assert group.attrs["nic_colours"] == colours_of(8).hash
    assert group["0"].metadata.dimension_names == ("c", "y", "x")


def test_a_large_grid_has_levels_of_half_the_size(tmp_path):
    path = tmp_path / "s.zarr"
    picture = write_preview(path, make(3, 1301, 2101), colours_of(3))
    group = zarr.open_group(path, mode="r")
    assert [group[str(k)].shape for k in range(3)] == [
        (3, 1301, 2101),
        (3, 651, 1051),
        (3, 326, 526),
    ]
    assert "3" not in group
    pairs = picture[:1300, :2100].reshape(650, 2, 1050, 2, 3).astype(float)
    means = pairs.mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(group["1"][:, :650, :1050] - means).max() <= 0.5
    np.testing.assert_array_equal(group["1"][:, 650, 1050], picture[1300, 2100])  # the corner
    datasets = group.attrs["ome"]["multiscales"][0]["datasets"]
    for level, dataset in enumerate(datasets):
        scale, translation = (t[t["type"]] for t in dataset["coordinateTransformations"])
        assert scale == [1, 64 * 2**level, 64 * 2**level]
        # the top-left corner of every level is that of the slide
        assert translation[1:] == [32 * 2**level - 0.125] * 2
    assert verify_preview(path)


def damage_pixels(path: Path) -> None:
    array = zarr.open_array(path / "0", mode="r+")
    array[1, 2, 3] ^= 1


def damage_place(path: Path) -> None:
    metadata = path / "zarr.json"
    metadata.write_text(metadata.read_text().replace("31.875", "32.875"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_pixels, "its hash differs"),
        (damage_place, "its hash differs"),
        (lambda path: (path / "0/c/1/0/0").unlink(), "its hash differs"),
        (lambda path: (path / "0/c/1/0/0").write_bytes(b"junk"), "not a preview"),
        (lambda path: (path / "0/zarr.json").unlink(), "not a preview"),
        (lambda path: (path / "zarr.json").write_text("{}"), "not a preview"),
        (shutil.rmtree, "not a preview"),
    ],
)
def test_a_changed_preview_does_not_verify(tmp_path, damage, message):
    path = tmp_path / "s.zarr"
    write_preview(path, make(), colours_of(8))
    assert verify_preview(path) == verify_preview(path)
    damage(path)
    with pytest.raises(GridError, match=rf"s.zarr: .*{message}"):
        verify_preview(path)


def test_the_hash_depends_on_pixels_and_place(tmp_path):
    def written(grid: Grid) -> str:
        write_preview(tmp_path / "s.zarr", grid, colours_of(8))
        return verify_preview(tmp_path / "s.zarr")

    assert written(make()) == written(make(unreadable=3))
    assert written(make()) != written(make(seed=1))
    assert written(make()) != written(make(origin=(1.0, 0.0)))


def read_in_javascript(store: Path) -> dict:
    """What zarrita and the loader of Viv read from an OME-Zarr image."""
    if shutil.which("node") is None or not (VIEWERS / "node_modules").is_dir():
        pytest.skip("needs node, and: npm install --no-package-lock --prefix tests/viewers")
    done = subprocess.run(
        ["node", VIEWERS / "read.mjs", store], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def sha256(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("rows", "columns"), [(9, 13), (1, 1), (5, 3), (600, 4), (4, 1030), (1100, 1500)]
)
def test_javascript_readers_read_every_pixel_of_a_preview(tmp_path, rows, columns):
    path = tmp_path / "s.zarr"
    write_preview(path, make(3, rows, columns), colours_of(3))
    group = zarr.open_group(path, mode="r")
    ome = group.attrs["ome"]
    levels = [group[d["path"]][:] for d in ome["multiscales"][0]["datasets"]]
    read = read_in_javascript(path)
    assert read["zarrita"] == [
        {"dtype": "uint8", "shape": list(level.shape), "sha256": sha256(level)} for level in levels
    ]
    assert [level["planes"] for level in read["viv"]["levels"]] == [
        [{"width": p.shape[1], "height": p.shape[0], "sha256": sha256(p)} for p in level]
        for level in levels
    ]
    assert read["viv"]["levels"][0]["dtype"] == "Uint8"
    assert read["viv"]["omero"] == ome["omero"]
    assert read["viv"]["multiscales"] == ome["multiscales"]


@pytest.mark.integration
def test_javascript_readers_read_a_heatmap(files, tmp_path):
    heat = np.random.default_rng(0).normal(size=(7, 9)).astype(np.float32)
    heat[:3] = np.nan
    about = provenance(slide_identity=content_identity(files["tiff"]), patch=50, stride=50)
    with open_slide(files["tiff"]) as slide:
        write_heatmap(
            tmp_path / "heat",
            heat,
            about,
            slide,
            name="s1",
            caption="",
            pictures=False,
        )
    read = read_in_javascript(tmp_path / "heat" / ZARR)
    assert read["zarrita"] == [{"dtype": "float32", "shape": [7, 9], "sha256": sha256(heat)}]
    assert read["viv"]["levels"][0]["planes"][0]["sha256"] == sha256(heat)

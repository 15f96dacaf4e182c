"""Features of other software become grids, and grids are exported for other software."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt
from typer.testing import CliRunner

from nic_core.cli import app
from nic_core.cohort.geometry import Geometry
from nic_core.grids import Grid, GridError, grid_hash, write_grid
from nic_core.grids.export import export_grid
from nic_core.grids.features import FeaturesError, features_hash, find_features, read_features
from nic_core.grids.lattice import SlideFacts, features_grid
from tests.provenance import provenance
from tests.slides import feature_files
from tests.slides.feature_files import Points, random_features

SLIDE = SlideFacts("s1", "ab" * 16, 0, 0.25, 8192, 6144)
GEOMETRY = Geometry(256, 0.5, 256)


def grid_of(
    folder: Path,
    slide: SlideFacts = SLIDE,
    geometry: Geometry = GEOMETRY,
    *,
    size: int = 8,
    format: str | None = None,
) -> Grid:
    """The grid of a slide's features, found in a folder."""
    path, found = find_features(folder, slide.slide, Path("s1.svs"), format)
    features = read_features(path, found, slide_mpp=slide.mpp)
    return features_grid(
        features, slide, geometry, embedding_size=size, encoder="uni", weights_hash="00"
    )


def check_places(grid: Grid, corners: Points, features: np.ndarray, side: float) -> None:
    """Each patch is in the cell at whose place it was cut, and no other cell has an embedding."""
    about = grid.provenance
    assert grid.valid.sum() == len(corners)
    cells = (corners + side / 2 - about.origin) / about.cell  # of the centres of the patches
    columns, rows = np.floor(cells).astype(int).T
    assert np.abs(cells - np.floor(cells) - 0.5).max() < 0.03
    np.testing.assert_array_equal(grid.embeddings[:, rows, columns].T, features.astype(np.float16))


# --- each writer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "geometry", "mpp"),
    [
        ({}, GEOMETRY, 0.25),
        ({"with_dimensions": False}, GEOMETRY, 0.2525),  # 40x of Aperio
        ({"overlap": 128}, Geometry(256, 0.5, 128), 0.25),
        ({"source_mag": 40, "target_mag": 15}, Geometry(256, 0.667, 256), 0.25),  # 683 px
        ({"patch": 224, "source_mag": 20, "target_mag": 20}, Geometry(224, 0.5, 224), 0.46),
        ({"patch": 512, "target_mag": 10}, Geometry(512, 1.0, 512), 0.25),
    ],
)
def test_features_of_trident_become_a_grid(tmp_path, arguments, geometry, mpp):
    corners = feature_files.trident(tmp_path / "s1.h5", **arguments)
    grid = grid_of(tmp_path, replace(SLIDE, mpp=mpp), geometry)
    source, target = arguments.get("source_mag", 40), arguments.get("target_mag", 20)
    side = round(geometry.patch * source / target)
    check_places(grid, corners, random_features(len(corners)), side)
    assert grid.provenance.patch == geometry.patch
    assert grid.provenance.stride == geometry.stride
    assert grid.provenance.mpp == pytest.approx(side * mpp / geometry.patch)
    assert grid.provenance.precision is None


def test_first_patches_of_an_odd_overlap_are_off_the_lattice(tmp_path):
    # TRIDENT begins to overlap after the first patch: 0, 512, 960, ... with a stride of 448
    geometry = Geometry(256, 0.5, 224)
    feature_files.trident(tmp_path / "s1.h5", overlap=32)
    with pytest.raises(FeaturesError, match=r"are off the lattice of 448 level-0 px \(rows"):
        grid_of(tmp_path, geometry=geometry)
    keep = lambda column, row: column > 0 and row > 0  # noqa: E731
    corners = feature_files.trident(tmp_path / "s1.h5", overlap=32, keep=keep)
    check_places(
        grid_of(tmp_path, geometry=geometry), corners, random_features(len(corners)), side=512
    )


@pytest.mark.parametrize("suffix", ["h5", "pt"])
def test_features_of_clam_become_a_grid(tmp_path, suffix):
    path = tmp_path / f"{suffix}_files" / f"s1.{suffix}"
    corners = feature_files.clam(path, tmp_path / "patches" / "s1.h5")
    grid = grid_of(tmp_path)
    check_places(grid, corners, random_features(len(corners)), side=512)
    assert grid.provenance.origin == (300, 700)


def test_features_of_clam_without_attributes_use_the_entry(tmp_path):
    corners = feature_files.clam(tmp_path / "s1.h5")
    slide = replace(SLIDE, mpp=0.2525)
    grid = grid_of(tmp_path, slide)
    check_places(grid, corners, random_features(len(corners)), side=512)
    assert grid.provenance.mpp == pytest.approx(0.505)


def test_two_contours_of_clam_on_different_lattices_are_refused(tmp_path):
    contours = ((300, 700, 4000, 3000), (5000, 100, 1000, 1000))
    feature_files.clam(tmp_path / "s1.h5", contours=contours)
    with pytest.raises(FeaturesError, match="4 of 52 patches are off the lattice of 512"):
        grid_of(tmp_path)


def test_contours_of_clam_on_one_lattice_become_a_grid(tmp_path):
    contours = ((300, 700, 1000, 1000), (300 + 512 * 8, 700 + 512, 1000, 1000))
    corners = feature_files.clam(tmp_path / "s1.h5", contours=contours)
    check_places(grid_of(tmp_path), corners, random_features(len(corners)), side=512)


@pytest.mark.parametrize("mpp", [0.25, 0.499, 0.503, 1.01])
def test_features_of_stamp_become_a_grid(tmp_path, mpp):
    slide = replace(SLIDE, mpp=mpp)
    corners = feature_files.stamp(tmp_path / "s1.h5", mpp=mpp)
    grid = grid_of(tmp_path, slide, Geometry(224, 256 / 224, 224))
    stored = random_features(len(corners))
    check_places(grid, corners, stored, side=np.ceil(256 / mpp))


@pytest.mark.parametrize("form", ["pt", "npz"])
def test_features_of_slide2vec_become_a_grid(tmp_path, form):
    corners = feature_files.slide2vec(tmp_path, "s1", form=form, step=256)
    grid = grid_of(tmp_path, geometry=Geometry(256, 0.5, 128))
    check_places(grid, corners, random_features(len(corners)), side=512)
    assert grid.provenance.origin == (32 + 128, 96 + 128)


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_a_table_of_spots_becomes_a_grid(tmp_path, suffix):
    anndata = pytest.importorskip("anndata")
    x, y = np.meshgrid(np.arange(5), np.arange(4))
    centres = 300 + 512.0 * np.stack([x.ravel(), y.ravel()], axis=1)
    features = random_features(20)
    table = anndata.AnnData(features, obsm={"spatial": centres})
    path = tmp_path / f"s1.{suffix}"
    table.write_h5ad(path) if suffix == "h5ad" else table.write_zarr(path)
    check_places(grid_of(tmp_path), centres - 256, features, side=512)


@settings(max_examples=40, deadline=None)
@given(
    stride=st.floats(40, 700),
    start=st.tuples(st.floats(0, 900), st.floats(0, 900)),
    seed=st.integers(0, 99),
)
def test_rounded_coordinates_of_any_stride_become_a_grid(tmp_path_factory, stride, start, seed):
    folder = tmp_path_factory.mktemp("features")
    kept = np.random.default_rng(seed).random((23, 31)) < 0.7
    columns, rows = np.nonzero(kept)
    corners = np.round(np.array(start) + stride * np.stack([columns, rows], axis=1))
    with h5py.File(folder / "s1.h5", "w") as file:
        file["features"] = random_features(len(corners))
        file["coords"] = corners.astype(np.int32)
    slide = replace(SLIDE, width=30_000, height=30_000)
    grid = grid_of(folder, slide, Geometry(256, stride * 0.25 / 256, 256))
    first = np.array([columns.min(), rows.min()])
    expected = np.zeros((rows.max() + 1 - first[1], columns.max() + 1 - first[0]), bool)
    expected[rows - first[1], columns - first[0]] = True
    np.testing.assert_array_equal(grid.valid, expected)


# --- refusals ----------------------------------------------------------------------------------


def edited(folder: Path, **datasets: object) -> None:
    """A file of TRIDENT whose datasets or attributes of ``coords`` are replaced."""
    feature_files.trident(folder / "s1.h5")
    with h5py.File(folder / "s1.h5", "a") as file:
        for name, value in datasets.items():
            if name in ("features", "coords"):
                attributes = dict(file[name].attrs)
                del file[name]
                file[name] = value(file) if callable(value) else value
                file[name].attrs.update(attributes)
            else:
                file["coords"].attrs[name] = value


def moved(row: int, by: tuple[int, int]) -> Points:
    coords = np.array(feature_files_coords())
    coords[row] += by
    return coords


def feature_files_coords() -> Points:
    return np.array(
        [(512 * c, 512 * r) for c in range(16) for r in range(12) if (c + r) % 3 != 0], np.int64
    )


def features_with(row: int, value: float) -> np.ndarray:
    features = random_features(len(feature_files_coords()))
    features[row, 3] = value
    return features


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"coords": moved(7, (37, 0))}, r"1 of 128 patches are off .* \(row 7; the first"),
        (
            {"coords": moved(1, (0, -512))},
            r"2 patches are repeated \(rows 0, 1; the first",
        ),
        (
            {"coords": moved(5, (90_000, 0))},
            r"\(row 5\) are outside of slide 's1'",
        ),
        (
            {"features": features_with(9, np.nan)},
            r"1 of 128 embeddings are not finite .* \(row 9",
        ),
        ({"features": features_with(0, 7e4)}, "largest number is 65504; scale the embeddings"),
        ({"features": random_features(128, 16)}, "have 16 numbers, but .* 'embedding_size: 8'"),
        ({"features": random_features(120)}, r"features \(120, 8\) and coordinates \(128, 2\) do"),
        ({"features": np.ones((128, 8), int)}, "numbers of type int64, not floating-point"),
        ({"features": np.ones(8)}, r"features \(8,\) and coordinates"),
        ({"patch_size": 224}, "patches of 224 px, but the encoder's entry states 'patch: 256'"),
        ({"overlap": 64}, "a stride of 192 px, but the encoder's entry states 'stride: 256'"),
        (
            {"level0_width": 9000},
            r"slide of \(9000, 6144\) px .* 's1' has \(8192",
        ),
        (
            {"target_magnification": 40},
            "have 0.25 um/px, but the encoder's entry states 0.5",
        ),
    ],
)
def test_features_that_are_no_grid_are_refused(tmp_path, datasets, message):
    edited(tmp_path, **datasets)
    with pytest.raises(FeaturesError, match=message) as caught:
        grid_of(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "s1.h5"))
    assert "\n" not in str(caught.value)


def test_a_file_without_patches_is_refused(tmp_path):
    edited(tmp_path, features=np.ones((0, 8)), coords=np.ones((0, 2)))
    with pytest.raises(FeaturesError, match="has no patches; exclude the slide"):
        grid_of(tmp_path)


def test_another_level_0_resolution_than_the_slide_is_refused(tmp_path):
    feature_files.slide2vec(tmp_path, "s1")
    with pytest.raises(FeaturesError, match="0.25 um/px at level 0, but slide 's1' has 0.24"):
        grid_of(tmp_path, replace(SLIDE, mpp=0.24))


def test_other_coordinates_beside_the_features_are_refused(tmp_path):
    feature_files.clam(tmp_path / "h5_files" / "s1.h5")
    contours = ((0, 0, 4000, 3000),)
    feature_files.clam(tmp_path / "x.h5", tmp_path / "patches" / "s1.h5", contours=contours)
    with pytest.raises(FeaturesError, match=r"patches/s1.h5 has other coordinates; remove"):
        grid_of(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"not a file of features", b"\x89HDF\r\n\x1a\n" + b"0" * 99]
)
@pytest.mark.parametrize("suffix", ["h5", "pt", "npz"])
def test_damaged_files_are_refused_in_one_line(tmp_path, suffix, content):
    (tmp_path / f"s1.{suffix}").write_bytes(content)
    with pytest.raises(FeaturesError) as caught:
        grid_of(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_pickled_object_is_not_loaded(tmp_path):
    coordinates = tmp_path / "h5_files" / "s1.h5"
    feature_files.clam(tmp_path / "x.h5", coordinates)
    (tmp_path / "pt_files").mkdir()
    torch.save(Path("x"), tmp_path / "pt_files" / "s1.pt")
    with pytest.raises(FeaturesError, match="cannot be read as features in the format clam"):
        grid_of(tmp_path)


def test_a_tensor_of_bfloat16_is_read(tmp_path):
    corners = feature_files.clam(tmp_path / "pt_files" / "s1.pt", tmp_path / "patches" / "s1.h5")
    features = random_features(len(corners))
    torch.save(torch.from_numpy(features).bfloat16(), tmp_path / "pt_files" / "s1.pt")
    rounded = torch.from_numpy(features).bfloat16().float().numpy()
    check_places(grid_of(tmp_path), corners, rounded, side=512)


# --- the file of a slide -----------------------------------------------------------------------


def test_a_file_is_found_by_slide_id_or_by_the_name_of_the_slide(tmp_path):
    feature_files.trident(tmp_path / "features_uni" / "scan-7.h5")
    for slide in ("scan-7.svs", "scan-7.ome.tif", "scan-7.ndpi"):
        found, _ = find_features(tmp_path, "patient-3", Path(slide))
        assert found == tmp_path / "features_uni" / "scan-7.h5"
    assert find_features(tmp_path, "scan-7", Path("x.svs"))[1] == "trident"


def test_two_files_for_a_slide_are_refused(tmp_path):
    feature_files.trident(tmp_path / "uni" / "s1.h5")
    feature_files.stamp(tmp_path / "stamp" / "s1.h5")
    with pytest.raises(
        FeaturesError,
        match=r"slide 's1': stamp/s1.h5 \(stamp\), uni/s1.h5 \(trident\); name one subfolder",
    ):
        grid_of(tmp_path)
    assert find_features(tmp_path, "s1", Path("s1.svs"), "stamp")[1] == "stamp"


def test_a_missing_file_is_named(tmp_path):
    feature_files.trident(tmp_path / "other.h5")
    with pytest.raises(FeaturesError, match="of slide 's1'; add a file named 's1' or 'scan' "):
        find_features(tmp_path, "s1", Path("scan.svs"))
    with pytest.raises(FeaturesError, match="no such folder; correct 'folder'"):
        find_features(tmp_path / "none", "s1", Path("s1.svs"))


def test_files_without_features_are_named(tmp_path):
    feature_files.clam(tmp_path / "x.h5", tmp_path / "patches" / "s1.h5")
    with pytest.raises(FeaturesError, match="patches/s1.h5 has coordinates but no features"):
        grid_of(tmp_path)
    with pytest.raises(FeaturesError, match="other/s1.h5 is in no known layout .datasets: imgs"):
        (tmp_path / "other").mkdir()
        (tmp_path / "patches" / "s1.h5").unlink()
        with h5py.File(tmp_path / "other" / "s1.h5", "w") as file:
            file["imgs"] = np.zeros(3)
        grid_of(tmp_path)
    feature_files.clam(tmp_path / "pt_files" / "s1.pt")
    with pytest.raises(FeaturesError, match=r"pt_files/s1.pt: no coordinates; put 's1.h5'"):
        grid_of(tmp_path)


def test_the_hash_of_a_folder_follows_names_and_contents(tmp_path):
    feature_files.trident(tmp_path / "s1.h5")
    before = features_hash(tmp_path)
    assert features_hash(tmp_path) == before
    (tmp_path / "s1.h5").rename(tmp_path / "s2.h5")
    renamed = features_hash(tmp_path)
    with h5py.File(tmp_path / "s2.h5", "a") as file:
        file["features"][0, 0] += 1
    assert len({before, renamed, features_hash(tmp_path)}) == 3
    with pytest.raises(FeaturesError, match="no files of features"):
        features_hash(tmp_path / "none")


# --- export ------------------------------------------------------------------------------------


def make(
    seed: int = 0, rows: int = 6, columns: int = 9, orientations: bool = False, **changes: object
) -> Grid:
    rng = np.random.default_rng(seed)
    valid = rng.random((rows, columns)) < 0.6
    valid[rng.integers(rows), rng.integers(columns)] = True
    stack = np.where(valid, rng.normal(size=(8, 5, rows, columns)), 0).astype(np.float16)
    return Grid(stack[0], valid, provenance(**changes), stack if orientations else None)


def read_back(folder: Path, grid: Grid) -> Grid:
    about = grid.provenance
    slide = SlideFacts(about.slide, "ef" * 16, 0, about.slide_mpp, 20_000, 20_000)
    geometry = Geometry(about.patch, about.mpp, about.stride)
    return grid_of(folder, slide, geometry, size=grid.shape[0])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    stride=st.sampled_from([128, 64, 100]),
    mpp=st.sampled_from([0.5, 0.51, 0.4671]),
    slide_mpp=st.sampled_from([0.25, 0.2525, 0.5]),
    origin=st.tuples(st.floats(0, 900), st.floats(0, 900)),
)
def test_an_exported_grid_is_read_back_unchanged(
    tmp_path_factory, seed, rows, columns, stride, mpp, slide_mpp, origin
):
    folder = tmp_path_factory.mktemp("export")
    grid = make(
        seed,
        rows,
        columns,
        stride=stride,
        mpp=mpp,
        slide_mpp=slide_mpp,
        origin=origin,
        unreadable=2,
    )
    export_grid(grid, folder, "trident-h5")
    again = read_back(folder, grid)
    assert grid_hash(again) == grid_hash(grid)
    own = {"slide_identity": "ef" * 16, "encoder": "uni", "weights_hash": "00"}
    assert again.provenance == grid.provenance.model_copy(update=own)


def test_an_export_in_the_layout_of_trident_states_its_attributes(tmp_path):
    grid = make(stride=64, origin=(96.0, 32.0))
    (path,) = export_grid(grid, tmp_path, "trident-h5")
    rows, columns = np.nonzero(grid.valid)
    with h5py.File(path) as file:
        assert file["features"].dtype == np.float32
        np.testing.assert_array_equal(file["features"], grid.embeddings[:, rows, columns].T)
        # cells of 128 level-0 px in the middle of patches of 256
        expected = np.stack([96 + 128 * columns - 64, 32 + 128 * rows - 64], axis=1)
        np.testing.assert_array_equal(file["coords"], expected)
        stated = dict(file["coords"].attrs)
    assert (stated["patch_size"], stated["patch_size_level0"], stated["overlap"]) == (128, 256, 64)
    assert (stated["level0_magnification"], stated["target_magnification"]) == (40, 20)


def test_an_export_of_another_slide_or_patch_is_refused(tmp_path):
    grid = make()
    (path,) = export_grid(grid, tmp_path, "trident-h5")
    with pytest.raises(FeaturesError, match=r"a stride of 128 px, but .* states 256"):
        grid_of(tmp_path, size=5)
    path.rename(tmp_path / "other.h5")
    other = SlideFacts("s2", "ef" * 16, 0, 0.25, 9000, 9000)
    features = read_features(tmp_path / "other.h5", "trident", slide_mpp=0.25)
    with pytest.raises(FeaturesError, match="is the grid of slide 's1', not of 's2'"):
        features_grid(
            features,
            other,
            Geometry(128, 0.5, 128),
            embedding_size=5,
            encoder="e",
            weights_hash="00",
        )


@pytest.mark.parametrize("format", ["anndata", "spatialdata"])
def test_exported_tables_are_read_back_unchanged(tmp_path, format):
    pytest.importorskip(format)
    grid = make(stride=64, origin=(96.5, 32.0))
    (path,) = export_grid(grid, tmp_path, format)
    export_grid(grid, tmp_path, format)  # replaces the first
    assert grid_hash(read_back(tmp_path, grid)) == grid_hash(grid)
    assert find_features(tmp_path, "s1", Path("s1.svs")) == (path, format)


def test_an_exported_spatialdata_store_opens(tmp_path):
    spatialdata = pytest.importorskip("spatialdata")
    grid = make(stride=64, origin=(96.0, 32.0))
    (path,) = export_grid(grid, tmp_path, "spatialdata")
    data = spatialdata.read_zarr(path)
    table, cells = data.tables["embeddings"], data.shapes["cells"]
    rows, columns = np.nonzero(grid.valid)
    np.testing.assert_array_equal(table.X, grid.embeddings[:, rows, columns].T)
    np.testing.assert_allclose(cells.geometry.centroid.x, table.obsm["spatial"][:, 0])
    np.testing.assert_allclose(cells.geometry.area, 128.0**2)
    annotated, _ = spatialdata.join_spatialelement_table(
        sdata=data, spatial_element_names="cells", table_name="embeddings"
    )
    assert len(annotated["cells"]) == len(table)


def test_exported_parquet_holds_the_grid(tmp_path):
    grid = make(origin=(96.0, 32.0))
    (path,) = export_grid(grid, tmp_path, "parquet")
    table = pl.read_parquet(path)
    again = np.zeros(grid.shape, np.float16)
    again[:, table["row"], table["column"]] = table["embedding"].to_numpy().T
    np.testing.assert_array_equal(again, grid.embeddings)
    np.testing.assert_array_equal(table["x"], 96 + 256 * table["column"].to_numpy())
    assert table["slide"].unique().to_list() == ["s1"]
    assert b'"origin": [96.0, 32.0]' in pq.read_schema(path).metadata[b"nic"]


def authors_distance_map(features: np.ndarray) -> np.ndarray:
    """``compute_single_distance_map`` of the authors' ``featurize_wsi.py``."""
    features = features.astype("float32").std(axis=0)
    features[features != 0] = 1
    squared = np.square(distance_transform_edt(features) / distance_transform_edt(features).max())
    return squared / squared.sum()


def authors_turn(features: np.ndarray, degrees: int, flip: str) -> np.ndarray:
    """``rot_flip_array`` of the same file, for axes (1, 2)."""
    features = np.rot90(features, degrees // 90, (1, 2))
    return np.flip(features, 2) if flip == "horizontal" else features


def test_exported_arrays_are_those_of_the_authors(tmp_path):
    grid = make()
    paths = export_grid(grid, tmp_path, "npy-tellez")
    assert [path.name for path in paths] == ["s1_features.npy", "s1_features_distance_map.npy"]
    features, weights = map(np.load, paths)
    assert features.dtype == np.float16
    np.testing.assert_array_equal(features, grid.embeddings)
    np.testing.assert_allclose(weights, authors_distance_map(features))


def test_exported_orientations_are_the_augmentations_of_the_authors(tmp_path):
    # with an encoder that does not see orientation, a turned slide gives the turned grid
    grid = make()
    same = replace(grid, orientations=np.repeat(np.asarray(grid.embeddings)[None], 8, axis=0))
    export_grid(same, tmp_path, "npy-tellez")
    names = sorted(path.name for path in tmp_path.glob("*_features.npy"))
    assert len(names) == 8
    for name in names:
        _, degrees, flip, _ = name.split("_")
        features = np.load(tmp_path / name)
        expected = authors_turn(np.asarray(grid.embeddings), int(degrees), flip)
        np.testing.assert_array_equal(features, expected)
        weights = np.load(tmp_path / name.replace(".npy", "_distance_map.npy"))
        np.testing.assert_allclose(weights, authors_distance_map(features))


def test_a_grid_without_background_has_equal_weights(tmp_path):
    grid = replace(make(), valid=np.ones((6, 9), bool))
    export_grid(grid, tmp_path, "npy-tellez")
    np.testing.assert_allclose(np.load(tmp_path / "s1_features_distance_map.npy"), 1 / 54)


def test_a_grid_without_embeddings_is_not_exported(tmp_path):
    grid = make()
    empty = Grid(np.zeros(grid.shape, np.float16), np.zeros((6, 9), bool), grid.provenance)
    with pytest.raises(GridError, match="'s1' has no embedding to export"):
        export_grid(empty, tmp_path, "parquet")


def test_the_command_exports_grids_and_names_those_it_cannot(tmp_path):
    for slide in ("s1", "s2"):
        write_grid(tmp_path / "grids" / f"{slide}.zarr", make(slide=slide))
    out, missing = tmp_path / "out", tmp_path / "none.zarr"
    stores = [str(tmp_path / "grids" / f"{slide}.zarr") for slide in ("s1", "s2")]
    command = ["grid", "export", *stores, "--format", "trident-h5", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert re.search(r"s1\.h5: \d+ embeddings of 5 numbers", result.output)
    assert sorted(path.name for path in out.iterdir()) == ["s1.h5", "s2.h5"]
    failed = CliRunner().invoke(app, [*command[:2], str(missing), *command[2:]])
    assert failed.exit_code == 1
    assert "not a grid store" in failed.output
    assert "s2.h5" in failed.output
    write_grid(tmp_path / "again.zarr", make(slide="s1"))
    twice = CliRunner().invoke(app, [*command[:2], str(tmp_path / "again.zarr"), *command[2:]])
    assert twice.exit_code == 1
    assert "is a grid of slide 's1', as" in twice.output.replace("\n", " ")

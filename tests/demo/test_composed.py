"""Tests of composed slides: material, quilting, arrangement, cohort, command."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import pyvips
import typer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from nic_core.cli.demo import demo
from nic_core.cohort import load_cohort
from nic_core.demo import make_composed, material
from nic_core.demo.composed import FOLDS, compose_slide
from nic_core.demo.layout import arrange_slide
from nic_core.demo.material import MEAN_LIGHT, WINDOW, find_windows, material_folds, read_material
from nic_core.demo.painter import ordinary_stain
from nic_core.demo.quilting import least_paths, quilt
from nic_core.demo.tissues import Tissue
from nic_core.steps import make_slide_index, make_target_folds
from nic_core.store import Store

pytestmark = pytest.mark.slow

SLIDES, SIDE = 12, 1280
REAL = Path(__file__).parents[3] / "shared" / "real-data"
needs_real = pytest.mark.skipif(
    not (REAL / "MANIFEST.csv").exists(), reason="needs ../shared/real-data"
)


def region(seed: int, malignant: bool) -> tuple[np.ndarray, np.ndarray]:
    """A region of smooth noise with a white hole; its left half is gland, coarser if malignant."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(
        rng.normal(size=(300, 320, 3)), (6 if malignant else 2,) * 2 + (0,)
    )
    colour = rng.uniform(110, 210, 3)
    pixels = np.clip(colour + 20 * noise / noise.std(), 0, 255).astype(np.uint8)
    pixels[40:70, 40:70] = 250
    glands = np.zeros((300, 320), bool)
    glands[:, :160] = True
    return pixels, glands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Invented material of eight patients, in the form of the real one."""
    root = tmp_path_factory.mktemp("material")
    rows = []
    for patient in range(8):
        for label in ("benign", "malignant"):
            path = f"patches/glas/{label}/P{patient}.png"
            mask = path.replace("/glas/", "/glas_mask/")
            pixels, glands = region(patient, label == "malignant")
            for name, image in ((path, pixels), (mask, glands.astype(np.uint8) * 255)):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                pyvips.Image.new_from_array(image).pngsave(str(root / name))
            rows += [
                (path, "region775", "glas_grade", label, f"P{patient}", 0.62),
                (mask, "mask", "glas_grade", "255 gland", f"P{patient}", 0.62),
            ]
    rows.append(("patches/other/1.png", "patch", "other", "x", "Q", 0.5))
    schema = ["path", "kind", "task", "label", "group", "mpp"]
    pl.DataFrame(rows, schema, orient="row").write_csv(root / "MANIFEST.csv")
    return root


@pytest.fixture(scope="module")
def pool(folder: Path) -> material.Pool:
    """The windows of two patients."""
    regions = read_material(folder)
    return material.read_pool(folder, regions.filter(pl.col("patient").is_in(["P0", "P1"])))


@pytest.fixture(scope="module")
def root(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("composed") / "cohort"
    make_composed(root, folder, slides=SLIDES, side=SIDE, workers=2)
    return root


# --- material ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Tissue.GLAND, Tissue.RIM])
def test_windows_have_the_share_of_gland_of_their_kind(kind: Tissue) -> None:
    pixels, glands = region(1, malignant=False)
    source = find_windows(pixels, glands, kind)
    assert source is not None
    for row, column in source.corners:
        share = glands[row : row + WINDOW, column : column + WINDOW].mean()
        assert share <= 0.05 if kind is Tissue.RIM else share >= 0.35


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [Tissue.TUMOUR, Tissue.RIM])
def test_windows_of_every_region_and_kind_have_one_mean_colour(seed: int, kind: Tissue) -> None:
    source = find_windows(*region(seed, malignant=True), kind)
    assert source is not None
    means = [source.pixels[r : r + WINDOW, c : c + WINDOW].mean((0, 1)) for r, c in source.corners]
    # grey levels are rounded
    assert np.mean(means, axis=0) == pytest.approx(MEAN_LIGHT, abs=0.6)


def test_a_region_without_room_for_a_window_gives_none() -> None:
    pixels, glands = region(0, malignant=False)
    assert find_windows(pixels[:100], glands[:100], Tissue.GLAND) is None
    assert find_windows(pixels, np.ones_like(glands), Tissue.RIM) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_every_fold_of_material_has_both_labels(numbers: list[tuple[int, int]]) -> None:
    rows = [
        (f"P{patient}", label)
        for patient, counts in enumerate(numbers)
        for label, count in zip(material.LABELS, counts, strict=True)
        for _ in range(count)
    ]
    table = pl.DataFrame(rows, {"patient": pl.String, "label": pl.String}, orient="row")
    if any(sum(counts[i] > 0 for counts in numbers) < FOLDS for i in range(2)):
        with pytest.raises(ValueError, match="cannot be divided into 4 folds"):
            material_folds(table, FOLDS)
        return
    assume(all(sum(counts[i] > 0 for counts in numbers) >= 2 * FOLDS for i in range(2)))
    folds = material_folds(table, FOLDS)
    assert set(folds) == set(table["patient"])
    found = table.with_columns(fold=pl.col("patient").replace_strict(folds))
    assert found.select("fold", "label").n_unique() == 2 * FOLDS


def test_folds_of_material_do_not_depend_on_the_order_of_rows(folder: Path) -> None:
    table = read_material(folder)
    assert material_folds(table, FOLDS) == material_folds(table.reverse(), FOLDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pl.col("path").str.replace("glas_mask/benign/P3", "lost"), "mask .*P3.png is not in the"),
        (pl.col("label").str.replace("^benign", "Benign"), "label 'Benign' is not one of"),
        (pl.col("task").str.replace("glas_grade", "grade"), "no regions of task glas_grade"),
        (pl.lit(None, pl.String).alias("group"), "no patient"),
        (pl.int_range(pl.len()).alias("mpp"), "16 different um/px"),
        (pl.col("path").alias("file"), "no column path"),
    ],
)
def test_incomplete_material_is_refused(
    folder: Path, tmp_path: Path, change: pl.Expr, message: str
) -> None:
    table = pl.read_csv(folder / "MANIFEST.csv").with_columns(change)
    table = table.drop("path") if "file" in table.columns else table
    table.write_csv(tmp_path / "MANIFEST.csv")
    with pytest.raises(ValueError, match=message):
        read_material(tmp_path)


def test_a_mask_of_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    mask = tmp_path / "copy" / "patches/glas_mask/benign/P0.png"
    pyvips.Image.new_from_array(np.zeros((10, 20), np.uint8)).pngsave(str(mask))
    with pytest.raises(ValueError, match=r"P0.png: 20 x 10 px, but its region has 320 x 300"):
        material.read_pool(tmp_path / "copy", read_material(tmp_path / "copy"))


# --- quilting and arrangement --------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=5))
def test_the_least_path_is_the_best_of_all_paths(rows: list[list[int]]) -> None:
    error = np.array(rows, np.float32)
    (path,) = least_paths(error[None])
    every = [
        error[range(len(rows)), columns].sum()
        for columns in product(range(3), repeat=len(rows))
        if (abs(np.diff(columns)) <= 1).all()
    ]
    assert (abs(np.diff(path)) <= 1).all()
    assert error[range(len(rows)), path].sum() == min(every)


@settings(max_examples=10)
@given(st.integers(0, 31), st.integers(0, 31))
def test_a_quilt_covers_the_part_and_keeps_a_plain_colour(down: int, right: int) -> None:
    where = np.zeros((150, 170), bool)
    where[20:120, 30:90] = True
    plain = np.full((2, 64, 64, 3), (10, 20, 30), np.uint8)
    pixels, places = quilt(where, 64, (down, right), lambda row, column: plain)
    assert (pixels[where] == (10, 20, 30)).all()
    assert (places[where] >= 0).all()


def test_a_window_that_repeats_its_neighbour_is_preferred() -> None:
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (64, 96, 3), np.uint8)

    def draw(row: int, column: int) -> np.ndarray:
        right = texture[:, 32 * column : 32 * column + 64]
        return np.stack([rng.integers(0, 255, right.shape, np.uint8), right])

    first = draw(0, 0)[1:]
    where = np.ones((32, 64), bool)
    pixels, _ = quilt(where, 64, (0, 0), lambda row, column: draw(row, column) if column else first)
    assert (pixels == texture[:32, :64]).all()


@pytest.mark.parametrize("seed", range(3))
def test_areas_and_parts_are_the_same_in_both_growth_patterns(seed: int) -> None:
    first, second = (
        arrange_slide(np.random.default_rng(seed), SIDE, capsules)
        for capsules in ((True, True, True), (False, True, False))
    )
    assert (first.parts == second.parts).all()
    areas = [np.bincount(a.tissue.ravel(), minlength=8) for a in (first, second)]
    assert abs(areas[0] - areas[1]).max() <= 3  # a raster point for each nest
    assert (first.tissue[first.parts % 2 == 1] == Tissue.RIM).all()


def test_slides_of_one_tissue_are_equal_whatever_their_labels(pool: material.Pool) -> None:
    """Nothing but tissue differs: not the windows' lattice, nor borders, nor how they are mixed."""
    one = dict.fromkeys(pool, pool[Tissue.GLAND])
    first, second = (
        compose_slide(
            np.random.default_rng(3),
            one,
            SIDE,
            capsules=capsules,
            malignant=share,
            stain=ordinary_stain(),
        )
        for capsules, share in (((True, True, True), 1.0), ((False, False, True), 0.2))
    )
    assert (first[0] == second[0]).all()
    assert (first[1] != second[1]).any()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_nests_have_the_planned_share_of_malignant_glands(
    pool: material.Pool, share: float
) -> None:
    arrangement = arrange_slide(np.random.default_rng(3), SIDE, (True,) * 3)
    nests = (arrangement.tissue == Tissue.TUMOUR).mean()
    _, truth = compose_slide(
        np.random.default_rng(3),
        pool,
        SIDE,
        capsules=(True,) * 3,
        malignant=share,
        stain=ordinary_stain(),
    )
    assert (truth == Tissue.TUMOUR).mean() == pytest.approx(share * nests, abs=0.025)


# --- cohort --------------------------------------------------------------------------------------


def test_no_material_patient_is_in_two_folds(root: Path) -> None:
    used = pl.read_csv(root / "truth" / "material.csv")
    assert used.group_by("patient").agg(pl.col("fold").n_unique())["fold"].to_list() == [1] * 8
    assert used.select("fold", "label").n_unique() == 2 * FOLDS


def test_folds_of_the_label_table_are_those_of_the_study(root: Path, tmp_path: Path) -> None:
    cohort, store = load_cohort(root / "cohort.yaml"), Store(tmp_path)
    make_slide_index(cohort, store)
    labels = pl.read_csv(root / "labels.csv")
    for target in cohort.targets:
        table = make_target_folds(cohort, store, target.name).table
        folds = table.explode("slides").select(slide="slides", fold=pl.col("fold") + 1)
        assert folds.sort("slide").equals(labels.select("slide", "fold").sort("slide"))
    assert labels.group_by("fold").agg(pl.col("growth").n_unique())["growth"].to_list() == [2] * 4


def test_composed_slides_are_pyramids_with_the_materials_resolution(root: Path) -> None:
    for row in pl.read_csv(root / "slides.csv").head(2).iter_rows(named=True):
        image = pyvips.Image.new_from_file(str(root / row["path"]))
        assert (image.width, image.height) == (SIDE, SIDE)
        assert 1000 / image.xres == pytest.approx(0.62)
        truth = pyvips.Image.new_from_file(str(root / row["truth"])).numpy()
        assert set(np.unique(truth)) <= {Tissue.BACKGROUND, Tissue.GLAND, Tissue.TUMOUR, Tissue.RIM}
        assert image.numpy()[[0, 0, -1, -1], [0, -1, 0, -1]].min() > 200  # empty slide


def test_same_parameters_are_composed_once_and_identically(
    root: Path, folder: Path, tmp_path: Path
) -> None:
    stamp = (root / "labels.csv").stat().st_mtime_ns
    make_composed(root, folder, slides=SLIDES, side=SIDE)
    assert (root / "labels.csv").stat().st_mtime_ns == stamp
    # another cohort in the folder is replaced
    shutil.copytree(root, tmp_path / "two")
    (tmp_path / "two" / "recipe.json").write_text("{}")
    make_composed(tmp_path / "two", folder, slides=SLIDES, side=SIDE, workers=1)
    for path in root.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(root)).read_bytes()


def test_a_folder_with_other_files_is_not_composed_into(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("precious")
    with pytest.raises(FileExistsError, match="no demo cohort"):
        make_composed(tmp_path, folder, slides=8, side=SIDE)


@pytest.mark.parametrize("wrong", [{"slides": 7}, {"side": 1000}])
def test_sizes_too_small_for_composed_slides_are_refused(
    folder: Path, tmp_path: Path, wrong: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="a composed cohort needs"):
        make_composed(tmp_path / "demo", folder, **wrong)
    assert not (tmp_path / "demo").exists()


app = typer.Typer()
app.command()(demo)


def test_demo_command_composes_slides(root: Path, folder: Path) -> None:
    stamp = (root / "cohort.yaml").stat().st_mtime_ns
    sizes = f"--slides {SLIDES} --side {SIDE}".split()
    done = CliRunner().invoke(app, [str(root), "--composed", str(folder), *sizes])
    assert done.exit_code == 0, done.output
    assert done.stdout.split()[-1] == str(root / "cohort.yaml")
    assert (root / "cohort.yaml").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--external", "4", "--patches", "1500"], "have no --patches, --external"),
        (["--slides", "2"], "needs slides >= 8"),
    ],
)
def test_demo_command_refuses_options_of_painted_slides(
    folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = CliRunner().invoke(app, [str(tmp_path / "x"), "--composed", str(folder), *options])
    assert done.exit_code == 1
    assert message in done.output
    done = CliRunner().invoke(app, [str(tmp_path / "x"), "--composed", str(tmp_path)])
    assert done.exit_code == 1
    assert "MANIFEST.csv does not exist" in done.output


@needs_real
def test_mean_colour_of_a_cell_does_not_tell_kinds_of_real_tissue() -> None:
    regions = read_material(REAL)
    folds = material_folds(regions, FOLDS)
    own = regions.filter(pl.col("patient").replace_strict(folds) == 0)
    pool = material.read_pool(REAL, own)
    pixels, truth = compose_slide(
        np.random.default_rng(0),
        pool,
        SIDE,
        capsules=(True, False, True),
        malignant=0.7,
        stain=ordinary_stain(),
    )
    colours = pixels.reshape(20, 64, 20, 64, 3).mean((1, 3)).reshape(-1, 3)
    kinds = truth.ravel()
    for one, other in ((Tissue.TUMOUR, Tissue.GLAND), (Tissue.RIM, Tissue.GLAND)):
        where = np.isin(kinds, (one, other))
        for channel in colours.T:
            assert 0.3 < roc_auc_score(kinds[where] == one, channel[where]) < 0.7

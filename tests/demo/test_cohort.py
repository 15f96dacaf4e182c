"""Tests of the demo cohort: files, reproducibility, difficulty of the targets, command."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import pyvips
import typer
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sksurv.metrics import concordance_index_censored
from typer.testing import CliRunner

from nic_core.cli.demo import demo
from nic_core.cohort import load_cohort
from nic_core.demo import make_demo
from nic_core.demo.figures import contact_sheet, slide_sheet
from nic_core.demo.painted import paint_task
from nic_core.demo.patches import TASKS
from nic_core.demo.plan import plan_cohort
from nic_core.demo.tissues import Tissue

pytestmark = pytest.mark.slow

SLIDES, PATCHES, SIDE = 40, 60, 768


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "cohort"
    steps: list[tuple[int, int, str]] = []
    make_demo(
        folder,
        slides=SLIDES,
        patches_per_task=PATCHES,
        side=SIDE,
        workers=2,
        progress=lambda *step: steps.append(step),
    )
    assert [done for done, _, _ in steps] == list(range(1, len(steps) + 1))
    assert steps[-1][0] == steps[-1][1]
    return folder


def _small(folder: Path, workers: int, seed: int = 0) -> Path:
    make_demo(folder, seed=seed, slides=2, patches_per_task=9, side=SIDE, workers=workers)
    return folder


def test_cohort_file_is_valid_and_lists_the_written_data(root: Path) -> None:
    cohort = load_cohort(root / "cohort.yaml")
    assert [t.name for t in cohort.patch_tasks] == [
        "lymph_node",
        "breast_mitosis",
        "prostate_epithelium",
        "colorectal",
    ]
    assert {t.kind for t in cohort.targets} == {"regression", "classification", "survival"}
    for task in cohort.patch_tasks:
        assert task.table is not None
        table = pl.read_parquet(task.table)
        assert len(table) == PATCHES
        counts = table["label"].value_counts()["count"]
        assert counts.max() - counts.min() <= 1
        assert table["group"].n_unique() == 4
        for path in table["path"]:
            image = pyvips.Image.new_from_file(str(task.table.parent / path))
            assert (image.width, image.height, image.bands) == (128, 128, 3)


def test_slides_are_tiled_pyramids_with_resolution(root: Path) -> None:
    table = pl.read_csv(root / "slides.csv")
    assert table.columns == ["slide", "path", "patient", "truth", "split"]
    assert len(table) == SLIDES
    for row in table.head(3).iter_rows(named=True):
        image = pyvips.Image.new_from_file(str(root / row["path"]))
        assert (image.width, image.height) == (SIDE, SIDE)
        assert 1000 / image.xres == pytest.approx(0.5)  # um/px
        assert 1000 / image.yres == pytest.approx(0.5)
        assert image.get("n-pages") >= 2
        half = pyvips.Image.new_from_file(str(root / row["path"]), page=1)
        assert half.width == SIDE // 2
        truth = pyvips.Image.new_from_file(str(root / row["truth"])).numpy()
        assert truth.shape[:2] == (SIDE // 64, SIDE // 64)
        assert set(np.unique(truth)) <= {int(t) for t in Tissue}
        pixels = image.numpy()
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.min() > 200  # empty slide


def test_labels_match_the_slides(root: Path) -> None:
    slides, labels = pl.read_csv(root / "slides.csv"), pl.read_csv(root / "labels.csv")
    assert labels.columns == ["slide", "patient", "score", "growth", "time", "event"]
    assert labels["slide"].to_list() == slides["slide"].to_list()
    by_patient = labels.group_by("patient").agg(pl.col("time", "event").n_unique())
    assert (by_patient["time"] == 1).all()
    assert (by_patient["event"] == 1).all()
    split = slides.group_by("patient").agg(pl.col("split").n_unique())
    assert (split["split"] == 1).all()
    assert slides["patient"].n_unique() < SLIDES
    mitoses = pl.read_csv(root / "truth" / "mitoses.csv")
    assert set(mitoses["slide"]) <= set(slides["slide"])
    assert mitoses.select(pl.col("x", "y").max()).max_horizontal().item() < SIDE


def test_mean_colour_of_tissue_does_not_predict_targets(root: Path) -> None:
    labels = pl.read_csv(root / "labels.csv").join(
        pl.read_csv(root / "truth" / "causes.csv"), on="slide"
    )
    colours = []
    for slide in labels["slide"]:
        image = pyvips.Image.new_from_file(str(root / "slides" / f"{slide}.tif")).shrink(64, 64)
        truth = pyvips.Image.new_from_file(str(root / "truth" / f"{slide}.png")).numpy()
        tissue = truth.reshape(image.height, image.width) != Tissue.BACKGROUND
        pixels = image.numpy()[tissue]
        colours.append(np.concatenate([pixels.mean(0), pixels.std(0), [tissue.mean()]]))
    features = np.array(colours)
    groups = labels["patient"].to_numpy()
    folds = GroupKFold(4, shuffle=True, random_state=0)
    ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 3, 9)))
    logistic = make_pipeline(StandardScaler(), LogisticRegression(C=0.3))
    growth = (labels["growth"] == "desmoplastic").to_numpy()
    for name in ("score", "risk"):
        values = labels[name].to_numpy()
        held_out = cross_val_predict(ridge, features, values, cv=folds, groups=groups)
        assert spearmanr(held_out, values).statistic < 0.35, name
    held_out = cross_val_predict(
        logistic, features, growth, cv=folds, groups=groups, method="predict_proba"
    )
    assert roc_auc_score(growth, held_out[:, 1]) < 0.70


@pytest.mark.parametrize("seed", range(4))
def test_targets_are_as_difficult_as_designed(seed: int) -> None:
    planned, labels = plan_cohort(seed, 48)
    assert 0.85 < spearmanr(labels["signal"], labels["score"]).statistic < 0.95
    patients = labels.unique("patient", maintain_order=True)
    assert len(patients) == 40
    assert patients["event"].mean() == pytest.approx(0.65, abs=0.03)
    oracle = concordance_index_censored(
        patients["event"].to_numpy().astype(bool),
        patients["time"].to_numpy(),
        patients["risk"].to_numpy(),
    )[0]
    assert 0.72 < oracle < 0.9
    share = np.array([np.mean(s.capsules) for s in planned])
    desmoplastic = (labels["growth"] == "desmoplastic").to_numpy()
    assert roc_auc_score(desmoplastic, share) > 0.95
    for split in ("cv", "test"):
        part = labels.filter(pl.col("split") == split)
        assert part["growth"].n_unique() == 2


def test_same_parameters_are_painted_once_and_identically(tmp_path: Path) -> None:
    one, two = _small(tmp_path / "one", 1), _small(tmp_path / "two", 2)
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file())
    before = {file: (one / file).read_bytes() for file in files}
    for file in files:
        assert before[file] == (two / file).read_bytes(), file
    stamp = (one / "labels.csv").stat().st_mtime_ns
    _small(one, 2)
    assert (one / "labels.csv").stat().st_mtime_ns == stamp
    _small(one, 2, seed=7)
    for file in (Path("slides/demo-01-1.tif"), Path("labels.csv")):
        assert (one / file).read_bytes() != before[file]
    assert sorted(tmp_path.iterdir()) == [one, two]  # no temporary files


def test_an_external_cohort_shares_nothing_with_the_study(root: Path, tmp_path: Path) -> None:
    path = make_demo(
        tmp_path / "demo", slides=2, patches_per_task=12, side=768, external=6, workers=1
    )
    alone = make_demo(tmp_path / "alone", slides=2, patches_per_task=12, side=768, workers=1)
    for file in ("slides/demo-01-1.tif", "slides.csv", "labels.csv"):
        assert (path.parent / file).read_bytes() == (alone.parent / file).read_bytes()
    (external,) = load_cohort(path).external
    assert external.slides.table is not None
    slides, labels = pl.read_csv(external.slides.table), pl.read_csv(external.labels)
    assert slides["slide"].to_list() == labels["slide"].to_list()
    assert slides["patient"].to_list() == labels["patient"].to_list()
    assert set(external.subgroups) <= set(slides.columns)
    own = pl.read_csv(path.parent / "slides.csv")
    for column in ("slide", "patient"):
        assert not set(slides[column]) & set(own[column])
    for file in slides["path"]:
        assert (external.slides.table.parent / file).exists()
    assert not load_cohort(alone).external


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="no demo cohort"):
        _small(tmp_path, 1)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("wrong", [{"slides": 1}, {"side": 100}, {"patches_per_task": 3}])
def test_sizes_too_small_for_a_cohort_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a demo cohort needs"):
        make_demo(tmp_path / "demo", **wrong)
    assert not (tmp_path / "demo").exists()


app = typer.Typer()
app.command()(demo)


def test_demo_command_prints_the_cohort_file_and_pictures(root: Path, tmp_path: Path) -> None:
    sizes = f"--slides {SLIDES} --patches {PATCHES} --side {SIDE}".split()
    stamp = (root / "cohort.yaml").stat().st_mtime_ns
    done = CliRunner().invoke(app, [str(root), *sizes, "--pictures", str(tmp_path)])
    assert done.exit_code == 0, done.output
    pictures = [str(tmp_path / f"demo-{kind}.png") for kind in ("patches", "slides")]
    assert done.stdout.split()[-3:] == [str(root / "cohort.yaml"), *pictures]
    assert all(Path(path).stat().st_size > 10_000 for path in pictures)
    assert (root / "cohort.yaml").stat().st_mtime_ns == stamp  # the cohort was not painted again


def test_demo_command_has_the_defaults_of_make_demo() -> None:
    command, function = (inspect.signature(f).parameters for f in (demo, make_demo))
    for option, parameter in (
        ("slides", "slides"),
        ("patches", "patches_per_task"),
        ("side", "side"),
        ("external", "external"),
        ("seed", "seed"),
        ("workers", "workers"),
    ):
        assert command[option].default == function[parameter].default


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--slides", "1"], "slides >= 2"), ([], "no demo cohort")]
)
def test_demo_command_prints_errors_in_one_line(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    done = CliRunner().invoke(app, [str(tmp_path), *arguments])
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output


def test_pictures_show_every_class(root: Path) -> None:
    assert len(contact_sheet(root, columns=4).axes) == 15
    assert slide_sheet(root, 2, side=100).shape == (100, 200, 3)


def test_ordinary_painted_patches_are_those_of_the_demo(root: Path) -> None:
    for task in TASKS:
        painted = paint_task(task, patches=PATCHES, patients=4, seed=0)
        table = pl.read_parquet(root / "patch_tasks" / f"{task.name}.parquet")
        assert [task.classes[label] for label in painted.labels] == table["label"].to_list()
        for pixels, path in zip(painted.pixels, table["path"], strict=True):
            written = pyvips.Image.new_from_file(str(root / "patch_tasks" / path)).numpy()
            np.testing.assert_array_equal(pixels, written)

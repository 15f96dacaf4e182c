from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import pyvips
from hypothesis import given, settings
from hypothesis import strategies as st

from nic_core.cohort import CohortError, PatchTask
from nic_core.encoders import EncoderError
from nic_core.encoders.patch_sources import read_image, rescale
from nic_core.encoders.patch_tasks import (
    TABLE_SCHEMA,
    build_patch_task,
    cut_patches,
    leaks,
    load_patch_task,
    save_patch_task,
)

from .conftest import make_dataset, write_image


def noise(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """12 patients with one image of class a and one of class b, and a row of another task."""
    rows = []
    for patient in range(12):
        for number, label in enumerate("ab"):
            path = f"images/{patient}{label}.png"
            write_image(tmp_path / path, noise(2 * patient + number))
            rows.append((path, label, f"p{patient}", "mine"))
    rows.append(("missing.png", "c", "p0", "other"))
    frame = pl.DataFrame(rows, schema=["path", "label", "group", "task"], orient="row")
    frame.write_csv(tmp_path / "table.csv")
    return tmp_path / "table.csv"


def task_of(table: Path, **changes: object) -> PatchTask:
    values = {"where": {"task": "mine"}, "mpp": 0.5} | changes
    return PatchTask(name="mine", organ="breast", table=table, **values)


def build(task: PatchTask, patch: int = 32, mpp: float = 0.5, seed: int = 0):
    return build_patch_task(task, patch=patch, mpp=mpp, seed=seed)


def truncate(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def rewrite(table: Path, *expressions: pl.Expr) -> None:
    pl.read_csv(table).with_columns(*expressions).write_csv(table)


def test_each_patch_has_a_row_with_its_position(table: Path):
    dataset = build(task_of(table))
    assert dataset.classes == ("a", "b")
    assert dataset.patches.shape == (24 * 4, 32, 32, 3)
    assert dataset.table.schema == pl.Schema(TABLE_SCHEMA)
    row = dataset.table.row(5, named=True)
    image = read_image(Path(row["source"]))
    crop = image[row["y"] : row["y"] + 32, row["x"] : row["x"] + 32]
    assert np.array_equal(dataset.patches[5], crop)
    assert (dataset.table["label"] == dataset.table["class"].replace_strict({0: "a", 1: "b"})).all()


def test_a_parquet_table_gives_the_same_patches(table: Path):
    path = table.with_suffix(".parquet")
    pl.read_csv(table).filter(pl.col("task") == "mine").write_parquet(path)
    assert build(task_of(path, where={})).table.equals(build(task_of(table)).table)


def test_patches_of_a_patient_stay_in_one_split(table: Path):
    frame = build(task_of(table)).table
    assert frame.group_by("group").agg(pl.col("split").n_unique())["split"].max() == 1
    assert frame["split"].n_unique() == 3


def test_splits_depend_on_the_seed(table: Path):
    splits = [build(task_of(table), seed=seed).table["split"] for seed in (0, 0, 1)]
    assert splits[0].equals(splits[1])
    assert not splits[0].equals(splits[2])


def test_test_groups_are_the_test_split(table: Path):
    frame = build(task_of(table, test_groups=("p4", "p5"))).table
    assert set(frame.filter(pl.col("split") == "test")["group"]) == {"p4", "p5"}


def test_one_folder_per_class_needs_no_table(table: Path):
    for number in range(10):
        write_image(table.parent / "f" / "ab"[number % 2] / f"{number}.jpg", noise(number))
    dataset = build(
        PatchTask(name="f", organ="colon", mpp=0.5, folder=table.parent / "f"), patch=64
    )
    assert dataset.classes == ("a", "b")
    assert len(dataset.patches) == 10
    assert dataset.table["group"].n_unique() == 10


def test_rows_without_a_group_are_separate_groups(table: Path):
    rewrite(table, pl.when(pl.col("group") == "p1").then(None).otherwise("group").alias("group"))
    frame = build(task_of(table)).table
    assert frame["group"].n_unique() == 11 + 2


def published(*, validation_from: int = 99, test_from: int) -> pl.Expr:
    """Assign splits by the number of the patient."""
    number = pl.col("group").str.slice(1).cast(pl.Int64)
    return (
        pl.when(number >= test_from).then(pl.lit("test"))
        .when(number >= validation_from).then(pl.lit("validation"))
        .otherwise(pl.lit("train"))
    )  # fmt: skip


def test_a_split_column_is_used(table: Path):
    rewrite(table, published(validation_from=6, test_from=9).alias("split"))
    frame = build(task_of(table)).table
    assert set(frame.filter(pl.col("split") == "validation")["group"]) == {"p6", "p7", "p8"}
    assert set(frame.filter(pl.col("split") == "test")["group"]) == {"p9", "p10", "p11"}


def test_a_missing_validation_split_is_taken_from_train(table: Path):
    rewrite(table, published(test_from=8).alias("split"))
    frame = build(task_of(table)).table
    groups = {split: set(rows["group"]) for (split,), rows in frame.group_by("split")}
    assert groups["test"] == {"p8", "p9", "p10", "p11"}
    assert len(groups["validation"]) == 2
    assert not groups["validation"] & groups["train"]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (pl.lit("train"), "must be train, validation, test"),
        (
            pl.int_range(pl.len()) % 3,
            "must be train, validation, test",
        ),
        (
            (pl.int_range(pl.len()) % 3).replace_strict(
                {0: "train", 1: "validation", 2: "test"}, return_dtype=pl.String
            ),
            "12 group\\(s\\) are in several splits .*'p0'",
        ),
        (
            pl.when(pl.col("label") == "b").then(pl.lit("test"))
            .when(pl.col("group").is_in(["p1", "p2"])).then(pl.lit("validation"))
            .otherwise(pl.lit("train")),
            "has no image of \\['b'\\]|in several splits",
        ),
    ],
)  # fmt: skip
def test_an_invalid_split_column_is_refused(table: Path, split: pl.Expr, message: str):
    rewrite(table, split.alias("split"))
    with pytest.raises(CohortError, match=message):
        build(task_of(table))


def test_images_of_another_resolution_are_resampled(table: Path):
    assert build(task_of(table), patch=16, mpp=1.0).patches.shape == (24 * 4, 16, 16, 3)
    assert build(task_of(table), patch=128, mpp=0.25).patches.shape == (24, 128, 128, 3)


def test_halving_the_resolution_averages_2_x_2_px(tmp_path: Path):
    pixels = noise(3)
    path = write_image(tmp_path / "i.png", pixels)
    means = pixels.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(rescale(read_image(path), 0.5) - means).max() <= 0.5


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 90), st.integers(5, 90), st.integers(4, 40).map(lambda n: 2 * n))
def test_patches_do_not_overlap_and_are_centred(height: int, width: int, patch: int):
    image = np.arange(height * width * 3, dtype=np.uint32).reshape(height, width, 3)
    crops = list(cut_patches(image, patch))
    assert len(crops) == max(1, height // patch) * max(1, width // patch)
    assert {crop.shape for _, _, crop in crops} == {(patch, patch, 3)}
    if height >= patch and width >= patch:
        pixels = np.concatenate([crop[..., 0].ravel() for _, _, crop in crops])
        assert len(np.unique(pixels)) == len(pixels)
        x0, y0, _ = crops[0]
        x1, y1, _ = crops[-1]
        assert abs(x0 - (width - x1 - patch)) <= 1
        assert abs(y0 - (height - y1 - patch)) <= 1


def test_a_small_image_is_mirrored_to_one_patch():
    image = noise(0, 50, 50)
    ((x, y, patch),) = cut_patches(image, 128)
    assert (x, y) == (-39, -39)
    assert np.array_equal(patch[39:89, 39:89], image)
    assert np.array_equal(patch[38], patch[39])
    assert np.array_equal(patch[:, 89], patch[:, 88])


def test_identical_images_with_different_labels_are_excluded(table: Path):
    write_image(table.parent / "images" / "3b.png", noise(0))  # the pixels of 0a
    dataset = build(task_of(table))
    assert len(dataset.patches) == 22 * 4
    assert not dataset.table["source"].str.contains("/(3b|0a)").any()
    (conflict,) = dataset.found("conflict").rows(named=True)
    assert (Path(conflict["source"]).name, conflict["label"]) == ("3b.png", "b")
    assert (Path(conflict["other"]).name, conflict["other_label"]) == ("0a.png", "a")


def test_a_copy_with_the_same_label_is_excluded(table: Path):
    write_image(table.parent / "images" / "3a.png", noise(0))
    dataset = build(task_of(table))
    assert len(dataset.patches) == 23 * 4
    (copy,) = dataset.found("copy").rows(named=True)
    assert (Path(copy["source"]).name, Path(copy["other"]).name) == ("3a.png", "0a.png")


def test_the_copy_in_the_published_test_split_is_kept(table: Path):
    write_image(table.parent / "images" / "0a.png", noise(22))  # the pixels of 11a
    rewrite(table, published(test_from=9).alias("split"))
    dataset = build(task_of(table))
    (copy,) = dataset.found("copy").rows(named=True)
    assert (Path(copy["source"]).name, copy["split"]) == ("0a.png", "train")
    assert (Path(copy["other"]).name, copy["other_split"]) == ("11a.png", "test")


def test_error_names_a_missing_image(table: Path):
    (table.parent / "images" / "5a.png").unlink()
    with pytest.raises(CohortError, match=r"patch task 'mine': 1 image.*exist.*5a\.png"):
        build(task_of(table))


def test_an_unreadable_image_is_excluded(table: Path):
    truncate(table.parent / "images" / "5a.png")
    dataset = build(task_of(table))
    assert len(dataset.patches) == 23 * 4
    (unreadable,) = dataset.found("unreadable").rows(named=True)
    assert Path(unreadable["source"]).name == "5a.png"
    assert unreadable["detail"]


def test_a_class_without_a_readable_image_is_refused(table: Path):
    for image in (table.parent / "images").glob("*b.png"):
        truncate(image)
    with pytest.raises(CohortError, match=r"class 'b' has no usable image.*\['a'\]"):
        build(task_of(table))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"where": {"task": "nobody"}}, "no row that matches 'where'"),
        ({"label_column": "class"}, "no column 'class'"),
        ({"group_column": "patient"}, "no column 'patient'"),
        ({"where": {"task": "mine", "label": "a"}}, "only the class \\['a'\\]"),
        ({"where": {"task": "other"}}, r"1 image.*exist.*missing\.png"),
        ({"classes": ("a", "c")}, r"class 'c' has no usable image.*\['a'\]"),
        ({"test_groups": ("p99",)}, "p99"),
    ],
)
def test_a_table_that_contradicts_the_task_is_refused(table: Path, changes, message):
    with pytest.raises(CohortError, match=message):
        build(task_of(table, **changes))


def test_a_row_without_a_label_is_refused(table: Path):
    rewrite(table, pl.when(pl.col("group") == "p2").then(None).otherwise("label").alias("label"))
    with pytest.raises(
        CohortError, match="2 of the rows used have an empty 'label'; the first is row 5 of them"
    ):
        build(task_of(table))


def test_errors_name_missing_sources(tmp_path: Path):
    with pytest.raises(CohortError, match=r"none\.csv: cannot be read"):
        build(task_of(tmp_path / "none.csv"))
    with pytest.raises(CohortError, match="none does not exist"):
        build(PatchTask(name="f", organ="x", mpp=0.5, folder=tmp_path / "none"))
    (tmp_path / "f" / "empty").mkdir(parents=True)
    with pytest.raises(CohortError, match="class 'empty' has no image"):
        build(PatchTask(name="f", organ="x", mpp=0.5, folder=tmp_path / "f"))


def test_a_saved_task_is_loaded_memory_mapped(tmp_path: Path):
    dataset = make_dataset(each=10)
    save_patch_task(tmp_path / "t", dataset)
    loaded = load_patch_task(tmp_path / "t")
    assert isinstance(loaded.patches, np.memmap)
    assert np.array_equal(loaded.patches, dataset.patches)
    assert loaded.table.equals(dataset.table)
    assert (loaded.name, loaded.organ, loaded.classes, loaded.mpp) == (
        dataset.name,
        dataset.organ,
        dataset.classes,
        dataset.mpp,
    )
    assert loaded.identity == dataset.identity


def test_identity_covers_all_that_training_uses():
    dataset = make_dataset(each=10)
    pixels = dataset.patches.copy()
    pixels[3, 0, 0, 0] ^= 1
    table = dataset.table
    tables = [
        table.with_columns(split=pl.lit("train")),
        table.with_columns(group=pl.col("group").reverse()),
        table.with_columns(column=pl.col("index") % 2),
        table.with_columns(source=pl.col("source").first()),
    ]
    others = [
        dataclasses.replace(dataset, patches=pixels),
        *(dataclasses.replace(dataset, table=other) for other in tables),
    ]
    assert len({dataset.identity, *(other.identity for other in others)}) == 6
    moved = table.with_columns(source=pl.format("elsewhere/{}", "source"))
    assert dataclasses.replace(dataset, table=moved).identity == dataset.identity


def test_a_table_of_other_patches_is_refused(tmp_path: Path):
    save_patch_task(tmp_path, make_dataset(each=10))
    np.save(tmp_path / "patches.npy", np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="3 patches but 20 rows"):
        load_patch_task(tmp_path)


@pytest.mark.parametrize("name", ["patches.npy", "patches.parquet", "findings.parquet"])
@pytest.mark.parametrize("damage", ["missing", "empty", "torn"])
def test_error_names_a_damaged_patch_task(tmp_path: Path, name, damage):
    save_patch_task(tmp_path, make_dataset(each=10))
    if damage == "missing":
        (tmp_path / name).unlink()
    else:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2 if damage == "torn" else 0])
    with pytest.raises(
        EncoderError, match=f"{tmp_path}: not a complete patch task .*make it again"
    ):
        load_patch_task(tmp_path)


def test_leaks_finds_test_patients_in_training_data():
    one, other = make_dataset("one", each=10), make_dataset("other", each=10)
    assert leaks([one, other], [one, other]) == []
    swapped = pl.col("split").replace({"test": "train", "train": "test"})
    other = dataclasses.replace(other, table=other.table.with_columns(split=swapped))
    found = leaks([other], [one, other])
    assert found == [
        "2 group(s) of the test split of 'one' are in the training data of 'other', "
        "for example 'test-4'"
    ]


def test_unused_columns_may_have_any_type(table: Path):
    path = table.with_suffix(".parquet")
    extra = (pl.lit(b"\xff\xfe").alias("note"), pl.lit([1, 2]).alias("many"))
    pl.read_csv(table).with_columns(*extra).write_parquet(path)
    assert build(task_of(path)).table.equals(build(task_of(table)).table)


@pytest.mark.parametrize("bits", [8, 16])
def test_transparency_is_white_at_any_depth(tmp_path: Path, bits):
    pixels = np.zeros((8, 8, 4), np.dtype(f"uint{bits}"))
    pixels[:4, :, 1] = pixels[:4, :, 3] = 2**bits - 1  # opaque green above, nothing below
    image = pyvips.Image.new_from_array(pixels)
    interpretation = "srgb" if bits == 8 else "rgb16"
    image.copy(interpretation=interpretation).write_to_file(str(tmp_path / "a.png"))
    read = read_image(tmp_path / "a.png")
    assert (read[:4] == (0, 255, 0)).all()
    assert (read[4:] == 255).all()


def test_real_patches_split_by_patient(real_data: Path):
    task = PatchTask(
        name="nct_crc",
        organ="colon",
        mpp=0.5,
        table=real_data / "MANIFEST.csv",
        where={"task": "nct_crc"},
    )
    dataset = build(task, patch=128)
    assert len(dataset.classes) == 9
    assert dataset.patches.shape[1:] == (128, 128, 3)
    assert dataset.table.group_by("group").agg(pl.col("split").n_unique())["split"].max() == 1

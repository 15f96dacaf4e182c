"""Order of the images of a patch task whose patients are unknown."""

from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nic_core.cohort import PatchTask
from nic_core.encoders.order import BLOCKS, blocks_of_order, order_test, texture
from nic_core.encoders.patch_tasks import PatchDataset, build_patch_task


def names(count: int) -> list[str]:
    return [f"img{i}.png" for i in range(count)]


def colours_by_patient(count: int, run: int, seed: int) -> np.ndarray:
    """Colours of images of which ``run`` after each other are of one patient."""
    rng = np.random.default_rng(seed)
    patients = np.repeat(rng.normal(size=(count // run + 1, 3)), run, axis=0)[:count]
    return patients + rng.normal(scale=0.7, size=(count, 3))


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=150))
def test_blocks_are_runs_of_one_class_of_equal_size(labels):
    blocks = blocks_of_order(labels, names(len(labels)))
    for label in set(labels):
        own = [block for block, other in zip(blocks, labels, strict=True) if other == label]
        sizes = Counter(own)
        assert len(sizes) == min(BLOCKS, len(own))
        assert max(sizes.values()) - min(sizes.values()) <= 1
        assert own == sorted(own)
    assert all(block.endswith(label) for block, label in zip(blocks, labels, strict=True))


def test_digits_of_names_count_as_numbers():
    shuffled = ["img10", "img9", "img100", "img1"] * 10
    numbered = [f"{name}-{i // 4}" for i, name in enumerate(shuffled)]
    blocks = blocks_of_order(["a"] * 40, numbered)
    assert blocks[numbered.index("img1-0")] == blocks[numbered.index("img1-1")] == "block 01 of a"
    assert blocks[numbered.index("img100-9")] == "block 20 of a"


@pytest.mark.parametrize("seed", range(5))
def test_images_numbered_by_patient_are_found(seed):
    labels = ["a", "b"] * 100
    found = order_test(colours_by_patient(200, 10, seed), labels, names(200))
    assert found is not None
    assert found.ordered
    assert found.correlation > 0.3


def test_images_in_random_order_are_seldom_reported():
    reported = 0
    for seed in range(50):
        shuffled = np.random.default_rng(seed).permutation(colours_by_patient(120, 10, seed))
        found = order_test(shuffled, ["a", "b"] * 60, names(120))
        reported += found is not None and found.ordered
    assert reported <= 2


def test_a_difference_between_classes_is_no_order():
    labels = ["a"] * 60 + ["b"] * 60
    rng = np.random.default_rng(0)
    colours = rng.normal(size=(120, 3)) + 20 * (np.arange(120) >= 60)[:, None]
    found = order_test(colours, labels, names(120))
    assert found is not None
    assert not found.ordered


def test_the_correlation_is_that_of_numpy():
    colours = colours_by_patient(3000, 5, seed=1)
    found = order_test(colours, ["a"] * 3000, names(3000))
    reference = np.mean([np.corrcoef(c[:-1], c[1:])[0, 1] for c in colours.T])
    assert found is not None
    assert found.correlation == pytest.approx(reference, abs=2e-3)


@pytest.mark.parametrize("colours", [np.zeros((9, 3)), np.eye(2, 3)])
def test_too_little_to_compare_gives_no_result(colours):
    assert order_test(colours, ["a"] * len(colours), names(len(colours))) is None


def test_texture_is_that_of_the_definition():
    (found,) = texture(np.tile(np.uint8([[0, 100], [0, 100]]), (1, 4, 4))[..., None].repeat(3, -1))
    # columns of 0 and 100: half of the steps are 100 px apart in value; means of 2 px are all 50
    assert found[:2] == pytest.approx(np.log1p([50, 50]))
    assert found[2:] == pytest.approx([0, 0, 0, 0])


@given(st.integers(-60, 60))
def test_texture_ignores_the_mean_colour(shift):
    patches = np.random.default_rng(0).integers(60, 190, (3, 32, 32, 3))
    assert texture((patches + shift).astype(np.uint8)) == pytest.approx(
        texture(patches.astype(np.uint8)), abs=1e-4
    )


def task_of(folder: Path, run: int, *, same_colour: bool = False, **options: str) -> PatchDataset:
    """A task of 2 x 60 images; ``run`` after each other share their colour and their contrast."""
    for number, label in enumerate("ab"):
        (folder / label).mkdir(parents=True)
        look = colours_by_patient(60, run, number)
        colours = np.clip(150 + 30 * look, 0, 255)
        grain = np.random.default_rng(number).integers(-40, 40, (60, 32, 32, 3))
        if same_colour:
            contrast = np.exp(0.5 * look[:, :1])[:, None, None]
            grain = grain - grain.mean((1, 2), keepdims=True)
            colours, grain = np.full((60, 3), 128.0), grain * contrast
        images = np.clip(colours[:, None, None] + grain, 0, 255).astype(np.uint8)
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / label / f"{label}{i:03d}-p{i // run}.png")
    task = PatchTask.model_validate(
        {"name": "t", "organ": "colon", "folder": str(folder), "mpp": 0.5, **options}
    )
    return build_patch_task(task, patch=32, mpp=0.5, seed=0)


def test_a_task_of_unknown_patients_is_split_by_blocks(tmp_path):
    dataset = task_of(tmp_path, run=10)
    assert dataset.found("unknown_groups")["detail"].to_list() == ["40 blocks of 120 images"]
    assert "mean colour correlates by 0." in dataset.found("ordered")["detail"][0]
    # the three images of a block are in one split
    splits = dataset.table.group_by("group").agg(pl.col("split").unique())
    assert splits["split"].list.len().to_list() == [1] * 40


def test_order_is_found_by_texture_where_colour_is_normalised(tmp_path):
    (detail,) = task_of(tmp_path, run=10, same_colour=True).found("ordered")["detail"]
    assert "texture correlates by 0." in detail


def test_an_order_without_meaning_is_not_reported(tmp_path):
    dataset = task_of(tmp_path, run=1)
    assert len(dataset.found("unknown_groups")) == 1
    assert dataset.found("ordered").is_empty()


def test_known_patients_are_neither_tested_nor_cut_in_blocks(tmp_path):
    dataset = task_of(tmp_path, run=10, group_pattern=r"-(?P<group>p\d+)")
    assert dataset.found("unknown_groups").is_empty()
    assert dataset.found("ordered").is_empty()
    assert sorted(dataset.table["group"].unique()) == [f"p{i}" for i in range(6)]


def test_images_without_a_group_are_tested_beside_others_with_one(tmp_path):
    task_of(tmp_path / "images", run=10)
    files = sorted((tmp_path / "images").rglob("*.png"))
    table = pl.DataFrame(
        {
            "path": [str(file) for file in files],
            "label": [file.parent.name for file in files],
            "group": ["p1"] * 30 + [None] * 30 + ["p2"] * 30 + [None] * 30,
        }
    )
    table.write_csv(tmp_path / "t.csv")
    task = PatchTask.model_validate(
        {"name": "t", "organ": "colon", "table": str(tmp_path / "t.csv"), "mpp": 0.5}
    )
    dataset = build_patch_task(task, patch=32, mpp=0.5, seed=0)
    (detail,) = dataset.found("unknown_groups")["detail"]
    assert detail == "40 blocks of 60 images; the other 60 images have groups"
    assert "of the next image" in dataset.found("ordered")["detail"][0]
    assert {"p1", "p2"} < set(dataset.table["group"])

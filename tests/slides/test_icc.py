"""ICC profiles: recorded as stored, and applied only on request."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image

from nic_core.slides import SlideError, open_slide
from nic_core.slides.icc import describe_profile
from tests.slides.conftest import paint, vips

PIXELS = paint(200, 300)


def builtin_profile(name: str) -> bytes:
    """A profile that libvips brings: ``p3`` (a wide gamut) or ``cmyk``."""
    return bytes(pyvips.Operation.call("profile_load", name))


P3 = builtin_profile("p3")


def write(path: Path, profile: bytes | None) -> Path:
    """Write an SVS, which tifffile, OpenSlide and libvips read."""
    options = {} if profile is None else {"iccprofile": profile}
    tifffile.imwrite(
        path,
        PIXELS,
        photometric="rgb",
        tile=(128, 128),
        description="Aperio Image Library v12\n300x200 (128x128) RGB|MPP = 0.5",
        metadata=None,
        **options,
    )
    return path


@pytest.mark.parametrize("engine", ["tifffile", "openslide", "libvips"])
def test_pixels_are_as_stored_and_the_profile_is_recorded(tmp_path, engine):
    with open_slide(write(tmp_path / "a.svs", P3), engine=engine) as slide:
        assert slide.icc_profile is not None
        assert slide.icc_profile.sha256 == hashlib.sha256(P3).hexdigest()
        assert slide.icc_profile.description == "sP3C"
        np.testing.assert_array_equal(slide.read(0, 0, 300, 200, 0.5), PIXELS)


@pytest.mark.parametrize("engine", ["tifffile", "openslide", "libvips"])
def test_srgb_agrees_with_the_conversion_by_libvips(tmp_path, engine):
    source = vips(PIXELS)
    source.set_type(pyvips.GValue.blob_type, "icc-profile-data", P3)
    expected = source.icc_transform("srgb", embedded=True, intent="perceptual").numpy()
    with open_slide(write(tmp_path / "a.svs", P3), engine=engine, colours="srgb") as slide:
        read = slide.read(0, 0, 300, 200, 0.5)
        outside = slide.read(-10, -10, 10, 10, 0.5)
    assert np.abs(read.astype(int) - PIXELS).max() > 10
    assert np.abs(read.astype(int) - expected).max() <= 1
    assert (outside == 255).all()


def test_a_slide_without_a_profile_is_the_same_in_srgb(tmp_path):
    with open_slide(write(tmp_path / "a.svs", None), colours="srgb") as slide:
        assert slide.icc_profile is None
        np.testing.assert_array_equal(slide.read(0, 0, 300, 200, 0.5), PIXELS)


def test_the_profile_of_a_png_is_recorded_and_applied(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path, icc_profile=P3)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.icc_profile == describe_profile(P3)
        stored = slide.read(0, 0, 300, 200, 0.5)
    with open_slide(path, mpp=0.5, colours="srgb") as slide:
        converted = slide.read(0, 0, 300, 200, 0.5)
    np.testing.assert_array_equal(stored, PIXELS)
    assert np.abs(converted.astype(int) - stored).max() > 10


@pytest.mark.parametrize("profile", [b"junk" * 50, builtin_profile("cmyk")], ids=["junk", "CMYK"])
def test_a_profile_that_cannot_be_applied_is_refused_in_srgb_only(tmp_path, profile):
    path = write(tmp_path / "a.svs", profile)
    with open_slide(path) as slide:
        assert slide.icc_profile == describe_profile(profile)
    with pytest.raises(SlideError, match=r"a\.svs: its ICC profile cannot be applied.*'stored'"):
        open_slide(path, colours="srgb")

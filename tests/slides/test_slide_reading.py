"""Pixels of every engine, compared with a plain reference."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nic_core.slides import SlideError, open_slide
from nic_core.slides.engines.base import downsample, flatten_on_white
from nic_core.slides.resample import coverage, snap_to_whole
from tests.slides.conftest import area_mean, paint, reduced, write_tiff

ENGINES = {
    "tiff": "tifffile",
    "bigtiff": "tifffile",
    "subifd": "tifffile",
    "strips": "tifffile",
    "single": "tifffile",
    "svs": "tifffile",
    "ome": "tifffile",
    "jpeg2000": "tifffile",
    "png": "libvips",
}
# engines that are not the default; OpenSlide supports neither strips nor sub-IFDs
REQUESTED = [
    *(
        ("libvips", kind)
        for kind in ("tiff", "bigtiff", "subifd", "strips", "single", "svs", "ome")
    ),
    *(("openslide", kind) for kind in ("tiff", "bigtiff", "single", "svs")),
]
EVERY = [("tifffile", "single"), ("tifffile", "tiff"), ("tifffile", "ome"), *REQUESTED]


@pytest.mark.parametrize(("engine", "kind"), [*((None, kind) for kind in ENGINES), *REQUESTED])
def test_every_container_returns_the_written_pixels(engine, kind, files, pixels):
    mpp = 0.25 if kind == "png" else None
    with open_slide(files[kind], mpp=mpp, engine=engine) as slide:
        assert slide.engine == (engine or ENGINES[kind])
        assert (slide.width, slide.height) == (900, 700)
        assert slide.mpp == pytest.approx(0.25)
        read = slide.read(0, 0, 900, 700, slide.mpp)
    if kind == "jpeg2000":
        assert np.abs(read.astype(int) - pixels).mean() < 2
    else:
        np.testing.assert_array_equal(read, pixels)
    assert read.flags.c_contiguous
    assert read.dtype == np.uint8


@pytest.mark.parametrize("engine", [None, "libvips"])
@pytest.mark.parametrize("kind", ["tiff", "subifd", "ome"])
def test_levels_match_the_pyramid(kind, engine, files, pixels):
    with open_slide(files[kind], engine=engine) as slide:
        assert [level.downsample for level in slide.levels][:2] == [1.0, 2.0]
        assert (slide.levels[1].width, slide.levels[1].height) == (450, 350)
        assert slide.levels[1].tile == (128, 128)
        read = slide.read(0, 0, 450, 350, 0.5)
    assert np.abs(read.astype(int) - reduced(pixels, 2)).max() <= 1


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    x=st.floats(-60, 920),
    y=st.floats(-60, 720),
    width=st.integers(1, 90),
    height=st.integers(1, 70),
    mpp=st.floats(0.25, 3.0),
    opened=st.sampled_from(
        [pair for pair in EVERY if pair not in (("openslide", "tiff"), ("openslide", "bigtiff"))]
    ),
)
def test_a_read_is_the_area_mean_of_the_nearest_finer_level(
    x, y, width, height, mpp, opened, files, pixels
):
    engine, kind = opened
    with open_slide(files[kind], engine=engine) as slide:
        index = slide.level_for(mpp)
        level = slide.levels[index]
        assert level.downsample <= mpp / slide.mpp * 1.01
        whole = slide._engine.read_region(index, 0, 0, level.width, level.height)
        read = slide.read(x, y, width, height, mpp)
        scale = mpp / slide.mpp / level.downsample
        # scale and start are rounded within the precision of a file's um/px
        left, settled = snap_to_whole(x / level.downsample, scale)
        top, _ = snap_to_whole(y / level.downsample, scale)
        assert abs(settled - scale) <= 1e-5 * scale
        assert max(abs(left - x / level.downsample), abs(top - y / level.downsample)) <= 1e-2
        expected = area_mean(whole, left, top, width, height, settled)
    assert np.abs(read - expected).max() <= 0.5 + 3e-3


def test_openslide_is_close_at_levels_with_fractional_downsample(files):
    with open_slide(files["tiff"], engine="openslide") as slide:
        level = slide.levels[3]  # 112 x 87 px of 900 x 700
        whole = slide._engine.read_region(3, 0, 0, level.width, level.height).astype(int)
        part = slide._engine.read_region(3, 50, 40, 40, 30)
    # OpenSlide interpolates by the fraction of a level-0 px
    assert np.abs(part - whole[40:70, 50:90]).mean() < 2.5


@pytest.mark.parametrize("engine", ["tifffile", "libvips", "openslide"])
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 7])
def test_whole_downsamples_give_exact_block_means(factor, engine, files, pixels):
    with open_slide(files["single"], engine=engine) as slide:
        read = slide.read(0, 0, 900 // factor, 700 // factor, 0.25 * factor)
    np.testing.assert_array_equal(read, reduced(pixels, factor))


def test_a_patch_is_the_same_read_alone_or_within_a_block(files):
    with open_slide(files["single"], mpp=0.2498) as slide:
        step = 64 * 0.5 / slide.mpp
        block = slide.read(step, 2 * step, 4 * 64, 64, 0.5)
        for i in range(4):
            alone = slide.read((1 + i) * step, 2 * step, 64, 64, 0.5)
            difference = np.abs(alone.astype(int) - block[:, 64 * i : 64 * (i + 1)])
            assert difference.max() <= 1  # float32 rounds .5 either way
            assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize(("engine", "kind"), EVERY)
def test_pixels_outside_the_slide_are_white(engine, kind, files, pixels):
    with open_slide(files[kind], engine=engine) as slide:
        read = slide.read(-10, -20, 30, 40, slide.mpp)
        np.testing.assert_array_equal(read[20:, 10:], pixels[:20, :20])
        assert (read[:20] == 255).all()
        assert (read[:, :10] == 255).all()
        assert (slide.read(5000, 0, 8, 8, 1.0) == 255).all()


def test_a_finer_resolution_than_stored_is_interpolated(files, pixels):
    with open_slide(files["single"], mpp=1.0) as slide:
        read = slide.read(100, 100, 200, 200, 0.5)
    expected = np.asarray(Image.fromarray(pixels).resize((1800, 1400), Image.Resampling.BILINEAR))
    difference = np.abs(read.astype(int) - expected[200:400, 200:400])
    assert difference.max() <= 1


def test_reading_in_bands_gives_the_same_pixels(files, monkeypatch):
    with open_slide(files["single"]) as slide:
        whole = slide.read(3.3, 4.4, 300, 200, 0.67)
        monkeypatch.setattr("nic_core.slides.slide._SOURCE_PIXELS", 20_000)
        banded = slide.read(3.3, 4.4, 300, 200, 0.67)
    assert np.abs(whole.astype(int) - banded).max() <= 1


def test_a_thumbnail_has_the_aspect_ratio_of_the_slide(files):
    with open_slide(files["tiff"]) as slide:
        assert slide.thumbnail(300).shape == (233, 300, 3)
        assert slide.thumbnail(5000).shape == (700, 900, 3)


@pytest.mark.parametrize(
    ("engine", "kind"),
    [("tifffile", "tiff"), ("tifffile", "jpeg2000"), ("libvips", "ome"), ("openslide", "tiff")],
)
def test_threads_can_share_a_slide(engine, kind, files):
    with open_slide(files[kind], engine=engine) as slide:
        places = [(x, y) for x in range(0, 800, 90) for y in range(0, 600, 80)]
        alone = [slide.read(x, y, 50, 50, 0.6) for x, y in places]
        gate = threading.Barrier(4)

        def read(part: int) -> list[np.ndarray]:
            gate.wait()
            return [slide.read(x, y, 50, 50, 0.6) for x, y in places[part::4]]

        with ThreadPoolExecutor(4) as pool:
            for part, reads in enumerate(pool.map(read, range(4))):
                np.testing.assert_array_equal(np.stack(reads), np.stack(alone[part::4]))


@pytest.mark.parametrize("engine", ["openslide", "libvips"])
def test_other_engines_agree_with_tifffile(engine, tmp_path):
    path = write_tiff(tmp_path / "slide.tif", paint(500, 600), mpp=0.25, compression="jpeg")
    with open_slide(path) as by_tifffile, open_slide(path, engine=engine) as other:
        assert (by_tifffile.engine, other.engine) == ("tifffile", engine)
        assert (by_tifffile.engine_reason, other.engine_reason) == (
            "TIFF tiles read directly",
            "requested",
        )
        assert other.levels == by_tifffile.levels
        for args in [(0, 0, 300, 250, 0.5), (33, 21, 77, 66, 0.61), (-9, 480, 50, 50, 1.3)]:
            difference = other.read(*args).astype(int) - by_tifffile.read(*args)
            # JPEG decoders may differ in rounding
            assert np.abs(difference).max() <= 2


def test_jfif_tiles_tagged_rgb_are_decoded_to_true_colours(real_data):
    with open_slide(real_data / "slides" / "OS-1-detail.ome.tif") as slide:
        mean = slide.thumbnail(256).mean(axis=(0, 1))
    # H&E absorbs green the most; YCbCr read as RGB would make green the brightest
    assert mean[1] == mean.min()


def test_real_slides_open_with_their_size_and_mpp(real_data):
    known = {
        "CMU-1-Small-Region.svs": ("tifffile", 2220, 2967, 0.499),
        "OS-1-detail.ome.tif": ("tifffile", 1101, 1101, 0.2271),
        "camelyon_multiframe_lowres.dcm": ("openslide", 1152, 700, 28.9685),
        "idc_8863.tif": ("tifffile", 2800, 2350, 4.0),
    }
    for name, (engine, width, height, mpp) in known.items():
        with open_slide(real_data / "slides" / name) as slide:
            assert (slide.engine, slide.width, slide.height) == (engine, width, height), name
            assert slide.mpp == pytest.approx(mpp, rel=1e-3)
            assert slide.thumbnail(64).shape[1] <= 64


def test_aperio_pixels_agree_with_openslide(real_data):
    path = real_data / "slides" / "CMU-1-Small-Region.svs"
    reference = np.asarray(openslide.OpenSlide(path).read_region((700, 800), 0, (256, 256)))
    with open_slide(path) as slide:
        read = slide.read(700, 800, 256, 256, slide.mpp)
    # two JPEG decoders may differ in rounding
    assert np.abs(read.astype(int) - reference[..., :3]).max() <= 3


@given(
    width=st.integers(50, 5000), height=st.integers(50, 5000), factor=st.sampled_from([2, 4, 16])
)
def test_a_whole_downsample_is_found_despite_rounded_sizes(width, height, factor):
    for rounded in (np.floor, np.ceil, np.round):
        w, h = int(rounded(width / factor)), int(rounded(height / factor))
        if w > 2 * factor and h > 2 * factor:
            assert downsample(width, height, w, h) == factor


@given(start=st.floats(-20, 50), scale=st.floats(0.2, 9), count=st.integers(1, 20))
def test_coverage_weights_sum_to_one_inside(start, scale, count):
    weights = coverage(start, scale, count, 60)
    sums = np.asarray(weights.sum(axis=1)).ravel()
    low = start + scale * np.arange(count)
    inside = (low >= 0) & (low + scale <= 60)
    np.testing.assert_allclose(sums[inside], 1, atol=1e-5)
    assert (sums <= 1 + 1e-5).all()


@pytest.mark.parametrize(
    "options",
    [
        {"rowsperstrip": 50, "compression": "lzw", "predictor": True},
        {"rowsperstrip": 50, "compression": "deflate"},
        {"rowsperstrip": 1},
        {"tile": (128, 64), "compression": "packbits"},
        {"tile": (128, 64), "compression": "zstd"},
        {"tile": (128, 64), "byteorder": ">"},
    ],
    ids=str,
)
def test_lossless_codecs_in_strips_and_tiles_are_exact(tmp_path, options, pixels):
    path = tmp_path / "slide.tif"
    scale = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, photometric="rgb", **scale, **options)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 900, 700, slide.mpp), pixels)
        assert slide.levels[0].tile in ((900, 50), (900, 1), (64, 128))


def over_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Reference: blend over white, rounded half up."""
    weight = alpha[..., None].astype(int)
    return ((pixels * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)


ALPHA = np.tile(np.repeat([0, 255, 90, 1, 254, 128], 150).astype(np.uint8), (700, 1))


@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
@pytest.mark.parametrize("engine", ["tifffile", "openslide", "libvips"])
def test_transparency_is_flattened_on_white(tmp_path, engine, kind, planes, pixels):
    if (engine, planes) == ("libvips", "separate"):
        pytest.skip("libvips does not read tiles of separate planes")
    stored = pixels.copy()
    stored[ALPHA == 0] = 0  # what scanners store outside of the section
    if kind == "assocalpha":
        stored = (stored.astype(int) * ALPHA[..., None] // 255).astype(np.uint8)
        expected = (stored.astype(int) + 255 - ALPHA[..., None]).astype(np.uint8)
    else:
        expected = over_white(stored, ALPHA)
    image = np.dstack([stored, ALPHA])
    path = tmp_path / "slide.tif"
    tifffile.imwrite(
        path,
        image if planes == "contig" else np.moveaxis(image, -1, 0).copy(),
        photometric="rgb",
        planarconfig=planes,
        extrasamples=[kind],
        tile=(128, 128),
    )
    with open_slide(path, mpp=0.5, engine=engine) as slide:
        read = slide.read(0, 0, 900, 700, 0.5).astype(int)
    assert np.array_equal(read[ALPHA == 0], np.full((700 * 150, 3), 255))
    # OpenSlide and libvips pass premultiplied colours on divided by their opacity
    assert np.abs(read - expected).max() <= (0 if engine == "tifffile" else 1)


@given(
    rgba=st.lists(st.tuples(*[st.integers(0, 255)] * 4), min_size=1, max_size=50),
    kind=st.sampled_from(["straight", "premultiplied"]),
)
def test_flattening_keeps_opaque_pixels_and_whitens_clear_ones(rgba, kind):
    pixels = np.array([rgba], np.uint8)
    flat = flatten_on_white(pixels, kind)[0].astype(int)
    alpha = pixels[0, :, 3].astype(int)
    assert (flat[alpha == 255] == pixels[0, alpha == 255, :3]).all()
    assert (flat[alpha == 0] == 255).all()
    assert (flat >= 255 - alpha[:, None]).all()


def test_a_transparent_png_is_flattened_on_white(tmp_path, pixels):
    path = tmp_path / "slide.png"
    Image.fromarray(np.dstack([pixels, ALPHA])).save(path)
    with open_slide(path, mpp=0.5) as slide:
        read = slide.read(0, 0, 900, 700, 0.5)
    np.testing.assert_array_equal(read, over_white(pixels, ALPHA))


@pytest.mark.parametrize("engine", ["tifffile", "openslide"])
@pytest.mark.parametrize("codec", [None, "zlib", "jpeg"])
def test_separate_colour_planes_are_read(tmp_path, engine, codec, pixels):
    path = tmp_path / "slide.tif"
    planes = np.moveaxis(pixels, -1, 0).copy()
    options = {"photometric": "rgb", "planarconfig": "separate", "compression": codec}
    tifffile.imwrite(path, planes, tile=(128, 128), **options)
    with open_slide(path, mpp=0.5, engine=engine) as slide:
        read = slide.read(0, 0, 900, 700, 0.5)
    assert np.abs(read.astype(int) - pixels).max() <= (25 if codec == "jpeg" else 0)


def test_one_strip_for_the_whole_image_is_read(tmp_path, pixels, monkeypatch):
    monkeypatch.setattr("nic_core.slides.engines.tifffile._HUGE_TILE", 1000)
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", rowsperstrip=700, compression="lzw")
    with open_slide(path, mpp=0.5) as slide:
        assert slide.levels[0].tile == (900, 700)
        np.testing.assert_array_equal(slide.read(0, 0, 900, 700, 0.5), pixels)


def test_ycbcr_outside_jpeg_is_read_by_openslide(tmp_path, pixels):
    path = tmp_path / "slide.tif"
    ycbcr = np.asarray(Image.fromarray(pixels).convert("YCbCr"))
    tifffile.imwrite(path, ycbcr, photometric="ycbcr", tile=(128, 128), compression="lzw")
    with open_slide(path, mpp=0.5) as slide:
        assert (slide.engine, slide.engine_reason) == (
            "openslide",
            "YCbCr colours outside JPEG",
        )
        read = slide.read(0, 0, 900, 700, 0.5)
    assert np.abs(read.astype(int) - pixels).max() <= 3


def test_tifffile_engine_reads_padded_edge_tiles(tmp_path):
    image = paint(150, 170)
    path = tmp_path / "edge.tif"
    tifffile.imwrite(
        path,
        image,
        tile=(64, 64),
        photometric="rgb",
        compression="lzma",
        resolution=(40_000, 40_000),
        resolutionunit="CENTIMETER",
    )
    with open_slide(path) as slide:
        assert slide.engine == "tifffile"
        np.testing.assert_array_equal(slide.read(0, 0, 170, 150, slide.mpp), image)
        np.testing.assert_array_equal(slide.read(61, 60, 20, 30, slide.mpp), image[60:90, 61:81])


def test_a_path_may_contain_spaces_and_brackets(tmp_path):
    path = write_tiff(tmp_path / "a slide [1].tif", paint(100, 100), mpp=0.5)
    with open_slide(Path(path)) as slide:
        assert slide.width == 100


def test_libvips_refuses_mistagged_colours(real_data):
    with pytest.raises(SlideError, match="false colours"):
        open_slide(real_data / "slides" / "OS-1-detail.ome.tif", engine="libvips")


@pytest.mark.parametrize(("kind", "engine"), [("png", "openslide"), ("png", "tifffile")])
def test_an_engine_that_cannot_read_a_file_is_refused(kind, engine, files):
    with pytest.raises(SlideError, match=f"engine '{engine}' does not read"):
        open_slide(files[kind], mpp=0.5, engine=engine)

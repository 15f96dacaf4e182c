"""Unusable slides are refused with a one-line error: which slide, why, and what to do."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from nic_core.slides import Slide, SlideError, content_identity, open_slide
from tests.slides import vendors
from tests.slides.conftest import paint, vips, write_tiff

pytestmark = pytest.mark.slow


def refused(path: Path, *words: str, mpp: float | None = None) -> None:
    with pytest.raises(SlideError) as caught:
        open_slide(path, mpp=mpp)
    message = str(caught.value)
    assert path.name in message
    assert caught.value.remedy
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_missing_files_folders_and_empty_files_are_refused(tmp_path):
    refused(tmp_path / "gone.svs", "No such file")
    refused(tmp_path, "is a folder")
    (tmp_path / "empty.svs").touch()
    refused(tmp_path / "empty.svs", "empty")


def test_a_pipe_is_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe.svs")
    refused(tmp_path / "pipe.svs", "not a regular file")


AS_ANOTHER_USER = """
import os, sys
from pathlib import Path
from nic_core.slides import SlideError, content_identity, open_slide
if os.geteuid() == 0:
    os.setuid(65534)  # root can read every file
for call in (open_slide, content_identity):
    try:
        call(Path(sys.argv[1]))
    except SlideError as error:
        print(error)
"""


def test_a_file_without_permission_is_refused():
    # not inside pytest's folder, which other users cannot enter
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        path = write_tiff(folder / "locked.tif", paint(64, 64), mpp=0.5)
        path.chmod(0)
        done = subprocess.run(
            [sys.executable, "-c", AS_ANOTHER_USER, str(path)],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            check=False,
        )
        message = f"{path}: cannot be read (Permission denied); check the path\n"
        assert done.stdout == 2 * message, done.stderr


@pytest.mark.parametrize("name", ["text.svs", "text.tif", "text.ndpi", "text.dcm", "text"])
def test_text_with_a_slide_suffix_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_text("slide,patient\n1,2\n" * 50)
    refused(path, "known format")


def test_a_tiff_header_followed_by_noise_is_refused(tmp_path):
    path = tmp_path / "header.tif"
    path.write_bytes(b"II*\0" + random.Random(0).randbytes(500))
    refused(path, "TIFF structure cannot be read")


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.95, 0.999])
@pytest.mark.parametrize("options", [{}, {"subifd": True}, {"tile": False, "pyramid": False}])
def test_a_truncated_tiff_is_refused(tmp_path, fraction, options):
    whole = write_tiff(tmp_path / "whole.tif", paint(600, 600), mpp=0.5, **options)
    path = tmp_path / "cut.tif"
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * fraction)])
    refused(path)


@pytest.mark.parametrize("name", ["slide.png", "slide.jpg", "slide.ndpi", "slide.dcm", "slide"])
def test_the_format_is_recognised_by_content_not_by_suffix(tmp_path, name, files, pixels):
    shutil.copy(files["tiff"], tmp_path / name)
    with open_slide(tmp_path / name) as slide:
        assert slide.engine == "tifffile"
        np.testing.assert_array_equal(slide.read(0, 0, 90, 70, slide.mpp), pixels[:70, :90])


def test_ndpi_is_recognised_with_another_suffix(tmp_path):
    image = paint(512, 768)
    path = vendors.write_ndpi(tmp_path / "a.tif", [image], 0.5)
    with open_slide(path) as slide:
        assert slide.engine_reason == "hamamatsu format"
        read = slide.read(100, 100, 100, 100, 0.5)
    assert np.abs(read.astype(int) - image[100:200, 100:200]).max() < 16


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_truncated_plain_image_is_refused(tmp_path, suffix):
    whole = tmp_path / f"whole{suffix}"
    vips(paint(600, 600)).write_to_file(str(whole))
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.6)])
    refused(path, mpp=0.5)


def test_a_plain_image_needs_mpp_from_the_slide_table(tmp_path):
    path = tmp_path / "region.jpg"
    vips(paint(100, 100)).write_to_file(str(path))
    refused(path, "um/px", "column `mpp`")
    with open_slide(path, mpp=0.5) as slide:
        assert slide.mpp == 0.5


def test_a_tiff_without_mpp_or_with_print_resolution_is_refused(tmp_path):
    image = paint(100, 100)
    bare = tmp_path / "bare.tif"
    tifffile.imwrite(bare, image, photometric="rgb")
    refused(bare, "column `mpp`")
    for dpi in (72, 300, 600):
        path = tmp_path / f"dpi{dpi}.tif"
        tifffile.imwrite(
            path, image, photometric="rgb", resolution=(dpi, dpi), resolutionunit="INCH"
        )
        refused(path, "impossible for a microscope", "column `mpp`")


def test_pixels_that_are_not_square_are_refused(tmp_path):
    path = tmp_path / "oblong.tif"
    tifffile.imwrite(
        path,
        paint(100, 100),
        photometric="rgb",
        resolution=(40_000, 20_000),
        resolutionunit="CENTIMETER",
    )
    refused(path, "not square")


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf"), 1000.0])
def test_an_impossible_mpp_in_the_slide_table_is_refused(files, mpp):
    refused(files["tiff"], "slide table", "column `mpp`", mpp=mpp)


def test_a_slide_larger_than_any_glass_is_refused(tmp_path):
    path = write_tiff(tmp_path / "wide.tif", np.full((1, 9000, 3), 240, np.uint8), mpp=0.5)
    refused(path, "slide of 360 mm", "column `mpp`", mpp=40.0)
    with open_slide(path) as slide:
        assert slide.width == 9000


def test_mpp_of_the_slide_table_overrides_that_of_the_file(files):
    with open_slide(files["tiff"], mpp=0.5) as slide:
        assert slide.mpp == 0.5


@pytest.mark.parametrize(
    "image",
    [np.zeros((64, 64), np.uint8), np.zeros((3, 64, 64), np.uint16), np.ones((4, 64, 64), bool)],
    ids=["grey", "three 16-bit channels", "bits"],
)
def test_images_that_are_not_rgb_are_refused(tmp_path, image):
    path = tmp_path / "channels.tif"
    tifffile.imwrite(path, image, photometric="minisblack")
    refused(path, "RGB", mpp=0.5)


COLOURS = {
    "16 bits": ((64, 64, 3), np.uint16, {"photometric": "rgb"}),
    "floats": ((64, 64, 3), np.float32, {"photometric": "rgb"}),
    "CMYK": ((64, 64, 4), np.uint8, {"photometric": "separated"}),
    "CIELAB": ((64, 64, 3), np.uint8, {"photometric": "cielab"}),
    "palette": (
        (64, 64),
        np.uint8,
        {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)},
    ),
}


@pytest.mark.parametrize("kind", COLOURS)
@pytest.mark.parametrize("tiling", [{}, {"tile": (32, 32)}])
def test_tiff_colours_other_than_8_bit_rgb_are_refused(tmp_path, kind, tiling):
    shape, dtype, options = COLOURS[kind]
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, np.full(shape, 200, dtype), **options, **tiling)
    refused(path, "RGB", "save it as 8-bit RGB", mpp=0.5)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_rotated_and_mirrored_pixels_are_refused(tmp_path, orientation):
    path = tmp_path / "slide.tif"
    tag = [(274, 3, 1, orientation, True)]
    tifffile.imwrite(path, paint(64, 64), photometric="rgb", extratags=tag)
    refused(path, f"orientation {orientation}", "save it upright", mpp=0.5)
    exif = Image.Exif()
    exif[274] = orientation
    for name in ("a.jpg", "b.png"):
        Image.fromarray(paint(64, 64)).save(tmp_path / name, exif=exif)
        refused(tmp_path / name, f"orientation {orientation}", "save it upright", mpp=0.5)


def test_a_fourth_channel_of_unknown_meaning_is_refused(tmp_path):
    path = tmp_path / "slide.tif"
    image = np.dstack([paint(64, 64), np.full((64, 64), 255, np.uint8)])
    tifffile.imwrite(path, image, photometric="rgb", extrasamples=["unspecified"])
    refused(path, "fourth channel", "ExtraSamples", mpp=0.5)


def test_a_strip_too_large_to_decode_is_not_called_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr("nic_core.slides.tiff._MAX_TILE", 1000)
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, paint(64, 64), photometric="rgb", rowsperstrip=64)
    refused(path, "strips of 64 x 64 px", "save it tiled", mpp=0.5)


def test_a_resolution_without_a_unit_is_refused_with_this_reason(tmp_path):
    path = tmp_path / "slide.tif"
    scale = {"resolution": (20_000, 20_000), "resolutionunit": "NONE"}
    tifffile.imwrite(path, paint(64, 64), photometric="rgb", metadata=None, **scale)
    refused(path, "resolution (20000 px) has no unit", "column `mpp`")


def test_plain_images_of_other_colours_are_refused(tmp_path):
    image = Image.fromarray(paint(64, 64))
    for mode, name in (("CMYK", "a.jpg"), ("L", "b.jpg"), ("L", "c.png"), ("I;16", "d.png")):
        converted = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
        converted.save(tmp_path / name)
        refused(tmp_path / name, "not an 8-bit RGB image", mpp=0.5)
    for name in ("a.jpg", "d.png"):
        refused(tmp_path / name, "save it as 8-bit RGB", mpp=0.5)


def test_a_black_image_with_one_lit_channel_is_refused(tmp_path):
    image = np.zeros((300, 300, 3), np.uint8)
    image[::20, ::20, 2] = 255
    refused(write_tiff(tmp_path / "dapi.tif", image, mpp=0.5), "not a brightfield scan")


def test_a_slide_of_one_pixel_opens_in_every_container(tmp_path):
    image = np.full((1, 1, 3), 200, np.uint8)
    vips(image).write_to_file(str(tmp_path / "dot.jpg"))
    write_tiff(tmp_path / "strip.tif", image, mpp=0.5, tile=False, pyramid=False)
    write_tiff(tmp_path / "tile.tif", image, mpp=0.5)
    for name in ("dot.jpg", "strip.tif", "tile.tif"):
        with open_slide(tmp_path / name, mpp=0.5) as slide:
            assert (slide.width, slide.height) == (1, 1)
            assert slide.thumbnail(64).tolist() == [[[200] * 3]]


def test_a_slide_of_one_pixel_is_padded_with_white(tmp_path):
    path = tmp_path / "dot.png"
    vips(np.full((1, 1, 3), 200, np.uint8)).pngsave(str(path))
    with open_slide(path, mpp=0.5) as slide:
        assert slide.read(0, 0, 2, 2, 0.5).tolist()[0] == [[200] * 3, [255] * 3]


def damage_tile(path: Path, tile: int, start: float = 0.0) -> None:
    """Overwrite a tile's data with noise, from the fraction ``start`` of its length on."""
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[tile], tiff.pages[0].databytecounts[tile]
    first = int(count * start)
    with path.open("r+b") as file:
        file.seek(offset + first)
        file.write(random.Random(1).randbytes(count - first))


@pytest.mark.parametrize("engine", ["tifffile", "openslide", "libvips"])
@pytest.mark.parametrize("codec", ["jpeg", "deflate"])
def test_an_undecodable_tile_fails_its_region_only(tmp_path, engine, codec):
    image = paint(512, 512)
    path = write_tiff(tmp_path / "damaged.tif", image, mpp=0.5, compression=codec, pyramid=False)
    damage_tile(path, 5)
    with open_slide(path, engine=engine) as slide:
        for _ in range(2):  # the same error at every read
            with pytest.raises(SlideError, match=r"damaged.tif: pixels cannot be decoded"):
                slide.read(140, 140, 50, 50, 0.5)
            with pytest.raises(SlideError, match="cannot be decoded"):
                slide.read(90, 200, 100, 100, 0.5)  # also when a good tile is read first
            for x, y in ((300, 300), (0, 130), (260, 130), (130, 0)):
                read = slide.read(x, y, 100, 100, 0.5)
                assert np.abs(read.astype(int) - image[y : y + 100, x : x + 100]).max() < 25


@pytest.mark.parametrize("codec", ["jpeg", "deflate", "lzw"])
def test_damage_within_a_tile_is_detected(tmp_path, codec):
    path = write_tiff(
        tmp_path / "damaged.tif", paint(512, 512), mpp=0.5, compression=codec, pyramid=False
    )
    damage_tile(path, 5, 0.5)
    with open_slide(path) as slide, pytest.raises(SlideError, match="cannot be decoded"):
        slide.read(140, 140, 50, 50, 0.5)


LARGE = paint(1024, 1536)
LARGE_SLIDES = ["tiff tifffile", "tiff libvips", "tiff openslide", "ndpi", "scn", "mirax", "dicom"]


def open_large(kind: str, folder: Path) -> tuple[Slide, Path]:
    """Open a large slide; also return the file that holds its pixels."""
    image, levels = LARGE, [LARGE, LARGE[::2, ::2].copy()]
    name, _, engine = kind.partition(" ")
    if name == "tiff":
        path = write_tiff(folder / "a.tif", image, mpp=0.5, compression="jpeg", pyramid=False, Q=95)
        return open_slide(path, engine=engine), path
    if name == "ndpi":
        path = vendors.write_ndpi(folder / "a.ndpi", levels, 0.5)
    elif name == "scn":
        path = vendors.write_scn(folder / "a.scn", levels, 0.5, macro=image[:64, :64])
    elif name == "mirax":
        path = vendors.write_mirax(folder / "a.mrxs", levels, 0.5, picture=image[:64, :64])
        return open_slide(path), folder / "a" / "Data0000.dat"
    else:
        path = vendors.write_dicom(folder / "dicom", levels, 0.5, label=image[:64, :64])
    return open_slide(path), path


@pytest.mark.parametrize("kind", LARGE_SLIDES)
@pytest.mark.parametrize("event", ["removed", "truncated"])
def test_a_file_lost_while_open_gives_its_pixels_or_an_error(tmp_path, kind, event):
    slide, path = open_large(kind, tmp_path)
    with slide:
        x, y = slide.bounds[:2]
        before = slide.read(x, y, 100, 100, 0.5)
        if event == "removed":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 5)
        failed = 0
        for left, top in [(0, 0), (1400, 900), (700, 500), (0, 900), (0, 0)]:
            try:
                read = slide.read(x + left, y + top, 100, 100, 0.5)
            except SlideError as error:
                failed += str(error).startswith(str(slide.path))
                continue
            expected = LARGE[top : top + 100, left : left + 100]
            assert np.abs(read.astype(int) - expected).mean() < 3
        if event == "truncated":
            assert failed >= 2  # pixels that were read on opening may be cached
        assert before.shape == (100, 100, 3)


def test_a_slide_error_survives_pickling():
    error = SlideError("a.svs", "two\nlines", "do this")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.slide, again.reason) == (
        "a.svs: two lines; do this",
        "a.svs",
        "two lines",
    )


def test_content_identity_depends_on_the_content_only(tmp_path, files):
    copy = tmp_path / "renamed.tif"
    shutil.copy(files["tiff"], copy)
    first = content_identity(copy)
    assert first == content_identity(files["tiff"])
    assert len(first) == 32
    data = bytearray(copy.read_bytes())
    data[100] ^= 1
    copy.write_bytes(data)
    assert content_identity(copy) != first
    with pytest.raises(SlideError, match="cannot be read"):
        content_identity(tmp_path / "gone.tif")


def test_unusable_real_files_are_refused(real_data):
    folder = real_data / "slides"
    refused(folder / "broken.svs", "known format")
    refused(folder / "unreadable.svs", "cannot be decoded")
    refused(folder / "stritt_test3_DAPI.ndpi", "fluorescence")


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "camelyon_multiframe_lowres.dcm"])
def test_truncated_real_slides_are_refused(real_data, tmp_path, name):
    data = (real_data / "slides" / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * 0.6)])
    refused(path)

"""What cannot be used is refused with one line that says which, why and what to do."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile

from nic_core.slides import SlideError, content_identity, open_slide
from tests.slides.conftest import paint, vips, write_tiff


def refused(path: Path, *words: str, mpp: float | None = None) -> None:
    with pytest.raises(SlideError) as caught:
        open_slide(path, mpp=mpp)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_a_missing_file_a_folder_and_an_empty_file_are_refused(tmp_path):
    refused(tmp_path / "gone.svs", "No such file")
    refused(tmp_path, "is a folder")
    (tmp_path / "empty.svs").touch()
    refused(tmp_path / "empty.svs", "empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path):
    path = write_tiff(tmp_path / "locked.tif", paint(64, 64), mpp=0.5)
    path.chmod(0)
    refused(path, "Permission denied")


@pytest.mark.parametrize("name", ["text.svs", "text.tif", "text.ndpi", "text.mrxs", "text.dcm"])
def test_text_under_a_slide_name_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_text("slide,patient\n1,2\n" * 50)
    refused(path, "known format")


def test_a_tiff_header_without_a_tiff_is_refused(tmp_path):
    path = tmp_path / "header.tif"
    path.write_bytes(b"II*\0" + random.Random(0).randbytes(500))
    refused(path, "damaged")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95, 0.999])
@pytest.mark.parametrize("options", [{}, {"subifd": True}, {"tile": False, "pyramid": False}])
def test_a_tiff_cut_short_is_refused(tmp_path, share, options):
    whole = write_tiff(tmp_path / "whole.tif", paint(600, 600), mpp=0.5, **options)
    path = tmp_path / "cut.tif"
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    refused(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_plain_image_cut_short_is_refused(tmp_path, suffix):
    whole = tmp_path / f"whole{suffix}"
    vips(paint(600, 600)).write_to_file(str(whole))
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.6)])
    refused(path, mpp=0.5)


def test_a_plain_image_needs_its_scale_from_the_table(tmp_path):
    path = tmp_path / "region.jpg"
    vips(paint(100, 100)).write_to_file(str(path))
    refused(path, "um/px", "column `mpp`")
    with open_slide(path, mpp=0.5) as slide:
        assert slide.mpp == 0.5


def test_a_tiff_without_scale_or_with_print_resolution_is_refused(tmp_path):
    image = paint(100, 100)
    bare = tmp_path / "bare.tif"
    tifffile.imwrite(bare, image, photometric="rgb")
    refused(bare, "column `mpp`")
    for dpi in (72, 300, 600):
        path = tmp_path / f"dpi{dpi}.tif"
        tifffile.imwrite(
            path, image, photometric="rgb", resolution=(dpi, dpi), resolutionunit="INCH"
        )
        refused(path, "no microscope's", "column `mpp`")


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
def test_an_impossible_scale_in_the_table_is_refused(files, mpp):
    refused(files["tiff"], "slide table", "column `mpp`", mpp=mpp)


def test_the_scale_of_the_table_overrides_that_of_the_file(files):
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


def test_a_black_image_with_single_colours_is_no_brightfield_scan(tmp_path):
    image = np.zeros((300, 300, 3), np.uint8)
    image[::20, ::20, 2] = 255
    refused(write_tiff(tmp_path / "dapi.tif", image, mpp=0.5), "not a brightfield scan")


def test_a_single_pixel_is_a_slide(tmp_path):
    path = tmp_path / "dot.png"
    vips(np.full((1, 1, 3), 200, np.uint8)).pngsave(str(path))
    with open_slide(path, mpp=0.5) as slide:
        assert slide.read(0, 0, 2, 2, 0.5).tolist()[0] == [[200] * 3, [255] * 3]


def test_an_undecodable_tile_fails_its_region_only(tmp_path):
    path = write_tiff(
        tmp_path / "scratched.tif", paint(512, 512), mpp=0.5, compression="jpeg", pyramid=False
    )
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[5], tiff.pages[0].databytecounts[5]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(random.Random(1).randbytes(count))
    with open_slide(path) as slide:
        for _ in range(2):  # the failure does not stick to the slide
            with pytest.raises(SlideError, match="cannot be decoded"):
                slide.read(140, 140, 50, 50, 0.5)
            assert slide.read(300, 300, 50, 50, 0.5).shape == (50, 50, 3)


def test_the_error_survives_pickling():
    error = SlideError("a.svs", "two\nlines", "do this")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.slide, again.reason) == (
        "a.svs: two lines; do this",
        "a.svs",
        "two lines",
    )


def test_identity_follows_the_content(tmp_path, files):
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


def test_real_bad_files_are_refused(real_data):
    folder = real_data / "slides"
    refused(folder / "broken.svs", "known format")
    refused(folder / "unreadable.svs", "cannot be decoded")
    refused(folder / "stritt_test3_DAPI.ndpi", "fluorescence")


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "camelyon_multiframe_lowres.dcm"])
def test_real_slides_cut_to_60_percent_are_refused(real_data, tmp_path, name):
    data = (real_data / "slides" / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * 0.6)])
    refused(path)

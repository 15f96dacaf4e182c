"""Files with several images: which one is the slide, and that all its data are of that image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nic_core.slides import SlideError, open_slide
from tests.slides.conftest import paint, reduced

SCAN, OTHER, PHOTO = paint(300, 400, 1), paint(300, 400, 2), paint(150, 200, 3)
OME_SPACE = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
TILES = {"tile": (128, 128)}
LEVEL = {"subfiletype": 1}


def scale(mpp: float) -> dict[str, object]:
    return {"resolution": (10_000 / mpp, 10_000 / mpp), "resolutionunit": "CENTIMETER"}


Page = tuple[np.ndarray, dict[str, object]]


def write_pages(path: Path, pages: Sequence[Page]) -> Path:
    with tifffile.TiffWriter(path) as writer:
        for pixels, options in pages:
            plain = {"photometric": "rgb", "compression": "zlib", "metadata": None}
            writer.write(pixels, **plain | options)
    return path


def write_ome(path: Path, images: Sequence[tuple[np.ndarray, str, float | None]]) -> Path:
    """Write images with a name and um/px, each with one coarser level as sub-directory."""
    options = TILES | {"photometric": "rgb", "compression": "zlib"}
    with tifffile.TiffWriter(path) as writer:
        for pixels, name, mpp in images:
            size = {} if mpp is None else {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
            about = {"axes": "YXS", "Name": name} | size
            writer.write(pixels, subifds=1, metadata=about, **options)
            writer.write(reduced(pixels, 2), subfiletype=1, **options)
    return path


def check_image(
    path: Path, pixels: np.ndarray, mpp: float, number: int, *, image: int | None = None
) -> None:
    """Check that size, um/px, number and the pixels of each level are those of one image."""
    for engine in (None, "libvips"):
        with open_slide(path, image=image, engine=engine) as slide:
            assert (slide.image, slide.mpp) == (number, pytest.approx(mpp))
            height, width = pixels.shape[:2]
            assert (slide.width, slide.height) == (width, height)
            read = slide.read(0, 0, width, height, slide.mpp)
            np.testing.assert_array_equal(read, pixels)
            half = slide.read(0, 0, width // 2, height // 2, 2 * slide.mpp)
            np.testing.assert_array_equal(half, reduced(pixels, 2))


@pytest.mark.parametrize("name", ["macro", "macro image", "Image:0"])
def test_the_scan_after_a_macro_photo_is_read_at_its_own_mpp(tmp_path, name):
    path = write_ome(tmp_path / "a.ome.tif", [(PHOTO, name, 16.0), (SCAN, "scan", 0.5)])
    check_image(path, SCAN, 0.5, 1)


def test_a_macro_photo_with_more_pixels_than_the_scan_is_not_read(tmp_path):
    for name, photo in (("macro", 16.0), ("Image:0", 16.0)):
        path = write_ome(tmp_path / "a.ome.tif", [(SCAN, name, photo), (PHOTO, "scan", 0.5)])
        check_image(path, PHOTO, 0.5, 1)


def test_of_two_scans_the_first_is_read_unless_the_other_is_named(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", [(SCAN, "s1", 0.5), (OTHER, "s2", 0.25)])
    check_image(path, SCAN, 0.5, 0)
    check_image(path, OTHER, 0.25, 1, image=1)
    path = write_pages(
        tmp_path / "b.tif", [(SCAN, TILES | scale(0.5)), (OTHER, TILES | scale(0.25))]
    )
    check_image(path, SCAN, 0.5, 0)
    check_image(path, OTHER, 0.25, 1, image=1)


def test_images_that_were_not_read_are_listed(tmp_path):
    images = [(PHOTO, "macro", 16.0), (SCAN, "Jane Doe", 0.5), (PHOTO, "x", None)]
    with open_slide(write_ome(tmp_path / "a.ome.tif", images)) as slide:
        assert [str(image) for image in slide.images] == [
            "0: macro, 200 x 150 px, 16 um/px",
            "1: 400 x 300 px, 0.5 um/px",
            "2: 200 x 150 px",
        ]


def test_mpp_of_another_image_is_never_used(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", [(PHOTO, "x", 16.0), (SCAN, "y", None)])
    with pytest.raises(SlideError, match="does not state its um/px"):
        open_slide(path)


def test_the_objective_is_that_of_the_image(tmp_path):
    xml = (
        f'<OME xmlns="{OME_SPACE}"><Instrument ID="Instrument:0">'
        '<Objective ID="Objective:0" NominalMagnification="1.25"/><Objective '
        'ID="Objective:1" NominalMagnification="20"/></Instrument>{}</OME>'
    )
    image = (
        '<Image ID="Image:{0}"><ObjectiveSettings ID="Objective:{0}"/><Pixels ID="Pixels:{0}" '
        'Type="uint8" DimensionOrder="XYCZT" SizeX="400" SizeY="300" SizeC="3" SizeZ="1" '
        'SizeT="1"><Channel ID="Channel:{0}" SamplesPerPixel="3"/><TiffData IFD="{0}" '
        'PlaneCount="1"/></Pixels></Image>'
    )
    text = xml.format(image.format(0) + image.format(1))
    path = write_pages(tmp_path / "a.ome.tif", [(OTHER, {"description": text}), (SCAN, {})])
    with open_slide(path) as slide:
        assert (slide.image, slide.objective_power, slide.mpp) == (1, 20, 0.5)
    with open_slide(path, image=0) as slide:
        assert (slide.image, slide.objective_power, slide.mpp) == (0, 1.25, 8.0)


@pytest.mark.parametrize("number", [-1, 2, 7])
def test_an_image_that_does_not_exist_is_refused_with_a_list(tmp_path, number):
    path = write_ome(tmp_path / "a.ome.tif", [(SCAN, "s1", 0.5), (OTHER, "s2", 0.25)])
    with pytest.raises(SlideError, match=rf"no image {number}; it has image 0: 400 x 300 px"):
        open_slide(path, image=number)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_format_with_one_image_has_image_0_only(tmp_path, suffix, files):
    assert open_slide(files["png"], mpp=0.5, image=0).image == 0
    with pytest.raises(SlideError, match="no image 1; its format has one scan: 0"):
        open_slide(files["png"], mpp=0.5, image=1)


def test_a_label_or_macro_image_is_not_read_even_if_named(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", [(PHOTO, "Label", 16.0), (SCAN, "scan", 0.5)])
    with pytest.raises(SlideError, match="image 0 is a label image, which may show a patient's"):
        open_slide(path, image=0)


APERIO = "Aperio Image Library v11.2.1 \r\n"
SVS = {
    "base": (SCAN, TILES | {"description": f"{APERIO}400x300 RGB|AppMag = 20|MPP = 0.5"}),
    "level": (
        reduced(SCAN, 2),
        TILES | {"description": f"{APERIO}400x300 -> 200x150 RGB|AppMag = 20|MPP = 0.5"},
    ),
    "level 2": (
        reduced(SCAN, 4),
        TILES | {"description": f"{APERIO}400x300 -> 100x75 RGB|AppMag = 20|MPP = 0.5"},
    ),
    "thumbnail": (
        paint(180, 240, 5),
        {"rowsperstrip": 16, "description": f"{APERIO}400x300 -> 240x180 - |MPP = 0.5"},
    ),
    "label": (PHOTO, {"rowsperstrip": 16, "description": f"{APERIO}label 200x150"}),
    "macro": (paint(500, 900, 6), TILES | {"description": f"{APERIO}macro 900x500"}),
}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(order=st.permutations(sorted(SVS)))
def test_pages_of_an_svs_may_have_any_order(tmp_path, order):
    path = write_pages(tmp_path / "a.svs", [SVS[name] for name in order])
    with open_slide(path) as slide:
        assert (slide.width, slide.height, slide.mpp) == (400, 300, 0.5)
        assert [level.downsample for level in slide.levels] == [1, 2, 4]
        assert sorted(slide.associated) == ["label", "macro", "thumbnail"]
        for factor in (1, 2, 4):
            read = slide.read(0, 0, 400 // factor, 300 // factor, 0.5 * factor)
            np.testing.assert_array_equal(read, reduced(SCAN, factor))


def pyramid(pixels: np.ndarray, mpp: float) -> list[Page]:
    return [
        (pixels, TILES | scale(mpp)),
        (reduced(pixels, 2), TILES | LEVEL | scale(2 * mpp)),
    ]


@pytest.mark.parametrize("order", ["0123", "0213", "2013", "1032"])
@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_levels_of_two_pyramids_are_never_exchanged(tmp_path, order, mpp):
    pages = [*pyramid(SCAN, 0.5), *pyramid(OTHER, mpp)]
    path = write_pages(tmp_path / "a.tif", [pages[int(place)] for place in order])
    with open_slide(path) as slide:
        numbers = [i.number for i in slide.images if (i.width, i.height) == (400, 300)]
    assert len(numbers) == 2
    first = (SCAN, 0.5) if order.index("0") < order.index("2") else (OTHER, mpp)
    second = (OTHER, mpp) if first[0] is SCAN else (SCAN, 0.5)
    check_image(path, *first, numbers[0])
    check_image(path, *second, numbers[1], image=numbers[1])


def test_an_unmarked_smaller_page_is_not_a_level(tmp_path):
    for mpp in (16.0, 1.0, 0.5):
        path = write_pages(
            tmp_path / "a.tif", [(PHOTO, TILES | scale(mpp)), (SCAN, TILES | scale(0.5))]
        )
        check_image(path, SCAN, 0.5, 1)


GREY = {"photometric": "minisblack"}


def test_a_grey_image_beside_the_scan_is_not_read(tmp_path):
    grey = np.zeros((400, 500), np.uint16)
    path = write_pages(tmp_path / "a.tif", [(grey, GREY), (SCAN, TILES | scale(0.5))])
    check_image(path, SCAN, 0.5, 1)


def test_a_photo_beside_a_far_larger_grey_scan_is_refused(tmp_path):
    grey = np.zeros((1300, 1600), np.uint16)
    path = write_pages(tmp_path / "a.tif", [(grey, GREY), (SCAN, TILES | scale(0.5))])
    with pytest.raises(SlideError, match=r"image, 0, is not a brightfield scan.*column"):
        open_slide(path)
    check_image(path, SCAN, 0.5, 1, image=1)


def test_a_bright_image_is_read_instead_of_a_dark_one(tmp_path):
    dark = np.zeros((400, 500, 3), np.uint8)
    dark[::20, ::20, 2] = 255
    pages = [(dark, TILES | scale(0.5)), (SCAN, TILES | scale(0.25))]
    check_image(write_pages(tmp_path / "a.tif", pages), SCAN, 0.25, 1)
    with pytest.raises(SlideError, match="not a brightfield scan"):
        open_slide(tmp_path / "a.tif", image=0)


def test_the_largest_scan_is_refused_rather_than_replaced(tmp_path):
    deep = OTHER.repeat(2, 0).astype(np.uint16) * 257
    path = write_pages(tmp_path / "a.tif", [(deep, {}), (SCAN, TILES | scale(0.5))])
    with pytest.raises(SlideError, match=r"image 0: not an 8-bit RGB image.*16-bit"):
        open_slide(path)


def test_an_ome_fluorescence_image_in_colour_is_not_the_slide(tmp_path):
    images = [(OTHER.repeat(2, 0), "DAPI", 0.5), (SCAN, "HE", 0.25)]
    path = write_ome(tmp_path / "a.ome.tif", images)
    with tifffile.TiffFile(path) as tiff:
        xml = tiff.ome_metadata or ""
    first = xml.index("SamplesPerPixel")
    marked = f'{xml[:first]}EmissionWavelength="461" {xml[first:]}'
    tifffile.tiffcomment(path, marked.encode())
    check_image(path, SCAN, 0.25, 1)


def ome_image(number: int, width: int, height: int, data: str) -> str:
    """An image of 0.5 um/px in OME-XML, with the given elements TiffData."""
    return (
        f'<Image ID="Image:{number}"><Pixels ID="Pixels:{number}" Type="uint8" SizeX="{width}" '
        f'SizeY="{height}" SizeC="3" SizeZ="1" SizeT="1" DimensionOrder="XYCZT" '
        f'PhysicalSizeX="0.5" PhysicalSizeY="0.5">{data}</Pixels></Image>'
    )


def write_with_xml(path: Path, xml: str, *pixels: np.ndarray) -> Path:
    text = f'<OME xmlns="{OME_SPACE}" UUID="urn:uuid:1">{xml}</OME>'
    first, *others = pixels
    return write_pages(path, [(first, {"description": text}), *((page, {}) for page in others)])


def test_ome_xml_without_tiff_data_describes_the_first_page(tmp_path):
    path = write_with_xml(tmp_path / "a.ome.tif", ome_image(0, 400, 300, ""), SCAN)
    check_image(path, SCAN, 0.5, 0)
    xml = ome_image(0, 400, 300, "") + ome_image(1, 400, 300, "")
    path = write_with_xml(tmp_path / "b.ome.tif", xml, SCAN, OTHER)
    with pytest.raises(SlideError, match="does not say which pages"):
        open_slide(path)


def test_a_uuid_with_line_breaks_around_it_names_the_file(tmp_path):
    data = '<TiffData IFD="0"><UUID FileName="old.tif">\n urn:uuid:1\n </UUID></TiffData>'
    path = write_with_xml(tmp_path / "new.ome.tif", ome_image(0, 400, 300, data), SCAN)
    check_image(path, SCAN, 0.5, 0)


def test_ome_xml_of_an_image_of_another_size_is_refused(tmp_path):
    xml = ome_image(0, 4000, 3000, "<TiffData/>")
    path = write_with_xml(tmp_path / "a.ome.tif", xml, SCAN)
    with pytest.raises(SlideError, match="4000 x 3000 px, but the page has 400 x 300 px; correct"):
        open_slide(path)


def test_ome_xml_that_cannot_be_parsed_is_refused(tmp_path):
    xml = "<Image>" + ome_image(0, 400, 300, "<TiffData/>")
    path = write_with_xml(tmp_path / "a.ome.tif", xml, SCAN)
    with pytest.raises(SlideError, match="its OME-XML cannot be parsed"):
        open_slide(path)


def test_a_sub_directory_of_other_pixels_is_no_level(tmp_path):
    half = reduced(SCAN, 2)
    others = [
        (half[..., 0], {"photometric": "minisblack"}),
        (half.astype(np.uint16), {}),
    ]
    for pixels, options in others:
        first = (SCAN, TILES | scale(0.5) | {"subifds": 1})
        path = write_pages(tmp_path / "a.tif", [first, (pixels, options)])
        check_image(path, SCAN, 0.5, 0)


def test_a_stack_of_planes_is_one_image_and_refused(tmp_path):
    path = tmp_path / "scan.ome.tif"
    stack = np.stack([SCAN, OTHER, SCAN])
    about = {"axes": "ZYXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(path, stack, photometric="rgb", metadata=about)
    with pytest.raises(SlideError, match=r"scan.ome.tif: a stack of 3 planes.*save one plane"):
        open_slide(path)


def test_interleaved_pixels_of_three_stated_channels_are_one_plane(tmp_path):
    xml = (
        f'<OME xmlns="{OME_SPACE}"><Image ID="Image:0">'
        '<Pixels ID="Pixels:0" Type="uint8" DimensionOrder="XYCZT" SizeX="400" SizeY="300" '
        'SizeC="3" '
        'SizeZ="1" SizeT="1" PhysicalSizeX="0.5" PhysicalSizeY="0.5"><Channel ID="Channel:0"/>'
        '<Channel ID="Channel:1"/><Channel ID="Channel:2"/><TiffData/></Pixels></Image></OME>'
    )
    path = write_pages(tmp_path / "a.ome.tif", [(SCAN, {"description": xml})])
    check_image(path, SCAN, 0.5, 0)


def test_pages_that_the_ome_xml_does_not_list_are_images_too(tmp_path):
    macro = tmp_path / "macro.ome.tif"
    tifffile.imwrite(macro, PHOTO, photometric="rgb", metadata={"axes": "YXS", "Name": "macro"})
    with tifffile.TiffFile(macro) as tiff:
        about = TILES | {"description": tiff.ome_metadata}
    path = write_pages(tmp_path / "a.ome.tif", [(PHOTO, about), (SCAN, TILES | scale(0.5))])
    check_image(path, SCAN, 0.5, 1)


def test_an_image_of_a_series_in_this_file_precedes_one_in_another(tmp_path):
    image = (
        '<Image ID="Image:{0}"><Pixels ID="Pixels:{0}" Type="uint8" DimensionOrder="XYCZT" '
        'SizeX="400" SizeY="300" SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="{1}" '
        'PhysicalSizeY="{1}"><Channel ID="Channel:{0}" SamplesPerPixel="3"/><TiffData IFD="0" '
        'PlaneCount="1"><UUID FileName="{2}">urn:uuid:{0}</UUID></TiffData></Pixels></Image>'
    )
    images = image.format(0, 0.5, "first.ome.tif") + image.format(1, 0.25, "second.ome.tif")
    for number, pixels, mpp in ((0, SCAN, 0.5), (1, OTHER, 0.25)):
        root = f'<OME xmlns="{OME_SPACE}" UUID="urn:uuid:{number}">'
        name = ("first", "second")[number]
        path = write_pages(
            tmp_path / f"{name}.ome.tif", [(pixels, {"description": f"{root}{images}</OME>"})]
        )
        check_image(path, pixels, mpp, number)
        with pytest.raises(SlideError, match="another file of its OME series"):
            open_slide(path, image=1 - number)


def test_a_scan_with_a_transparency_mask_of_its_own_is_refused(tmp_path):
    mask = {"photometric": "mask", "subfiletype": 4} | TILES
    pages = [(SCAN, TILES | scale(0.5)), (np.ones(SCAN.shape[:2], bool), mask)]
    with pytest.raises(SlideError, match=r"a TIFF mask\); save it as RGBA"):
        open_slide(write_pages(tmp_path / "a.tif", pages))


def test_openslide_is_refused_where_it_may_read_another_image(tmp_path):
    path = write_pages(tmp_path / "a.tif", [(PHOTO, TILES | scale(16)), (SCAN, TILES | scale(0.5))])
    with pytest.raises(SlideError, match="may not be image 1"):
        open_slide(path, engine="openslide")


def test_the_shared_ome_file_with_a_macro_photo_is_read_right(real_data):
    path = real_data.parent / "cases" / "ome-macro-first" / "scan.ome.tif"
    if not path.exists():
        pytest.skip(f"no file {path}")
    with open_slide(path) as slide:
        assert (slide.image, slide.width, slide.mpp) == (1, 2048, 0.5)

"""um/px and other metadata of slide files."""

from __future__ import annotations

from pathlib import Path

import pytest
import tifffile

from nic_core.slides import SlideError, open_slide
from nic_core.slides.metadata import openslide_metadata, scanner_name
from tests.slides.conftest import paint


def aperio(folder: Path, fields: str) -> Path:
    path = folder / "slide.svs"
    tifffile.imwrite(
        path,
        paint(80, 80),
        tile=(64, 64),
        description=f"Aperio Image Library v12\n80x80 RGB|{fields}",
        metadata=None,
    )
    return path


def test_aperio_mpp_is_preferred_to_magnification(tmp_path):
    with open_slide(aperio(tmp_path, "AppMag = 40|MPP = 0.2527|Date = 1")) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.2527, "Aperio tag")


def test_aperio_mpp_may_have_a_decimal_comma(tmp_path):
    with open_slide(aperio(tmp_path, "AppMag = 40|MPP = 0,2527|Date = 1")) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.2527, "Aperio tag")


def test_aperio_magnification_is_used_without_mpp(tmp_path):
    with open_slide(aperio(tmp_path, "AppMag = 20|Date = 1")) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.5, "objective power 20x")
        assert slide.objective_power == 20


@pytest.mark.parametrize(
    ("size", "unit"), [(0.5, "µm"), (500.0, "nm"), (0.0005, "mm"), (0.00005, "cm")]
)
def test_ome_units_are_converted_to_micrometres(tmp_path, size, unit):
    path = tmp_path / "slide.ome.tif"
    sizes = {f"PhysicalSize{a}": size for a in "XY"} | {f"PhysicalSize{a}Unit": unit for a in "XY"}
    tifffile.imwrite(path, paint(80, 80), photometric="rgb", metadata={"axes": "YXS", **sizes})
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.5)


@pytest.mark.parametrize(("unit", "value"), [("CENTIMETER", 20_000), ("INCH", 50_800)])
def test_resolution_tags_are_read_in_their_unit(tmp_path, unit, value):
    path = tmp_path / "slide.tif"
    tifffile.imwrite(
        path, paint(80, 80), photometric="rgb", resolution=(value, value), resolutionunit=unit
    )
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.5)
        assert slide.mpp_source == "TIFF resolution"
        assert slide.objective_power is None


@pytest.mark.parametrize(
    ("unit", "value"), [("micron", 2), ("um", 2), ("mm", 2000), ("inch", 50_800)]
)
def test_imagej_states_its_resolution_in_a_unit_of_its_own(tmp_path, unit, value):
    path = tmp_path / "slide.tif"
    options = {"imagej": True, "resolution": (value, value), "metadata": {"unit": unit}}
    tifffile.imwrite(path, paint(80, 80), **options)
    with open_slide(path) as slide:
        assert (slide.mpp, slide.mpp_source) == (pytest.approx(0.5), "ImageJ resolution")


@pytest.mark.parametrize("value", ["0", "nan", "1000", "-0.25", "inf", "1e-9"])
def test_an_impossible_mpp_in_the_file_is_refused_with_a_remedy(tmp_path, value):
    path = aperio(tmp_path, f"AppMag = 40|MPP = {value}|Date = 1")
    with pytest.raises(
        SlideError, match=r"slide.svs: mpp .* given by the file \(Aperio tag\).*`mpp`"
    ):
        open_slide(path)
    with open_slide(path, mpp=0.5) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.5, "slide table")


def test_an_unreadable_mpp_counts_as_missing(tmp_path):
    with open_slide(aperio(tmp_path, "AppMag = 20|MPP = unknown|Date = 1")) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.5, "objective power 20x")
    with pytest.raises(SlideError, match=r"does not state its um/px.*`mpp`"):
        open_slide(aperio(tmp_path, "AppMag = |MPP = ?|Date = 1"))


def test_ome_without_pixel_size_uses_the_objective_power(tmp_path):
    path = tmp_path / "slide.ome.tif"
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Instrument ID="Instrument:0"><Objective ID="Objective:0" NominalMagnification="{}"/>'
        '</Instrument><Image ID="Image:0" Name="Doe, Jane"><Pixels ID="Pixels:0" Type="uint8" '
        'DimensionOrder="XYCZT" SizeX="80" SizeY="80" SizeC="3" SizeZ="1" SizeT="1" {}>'
        '<Channel ID="Channel:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1"/>'
        "</Pixels></Image></OME>"
    )
    for power, size, mpp, source in (
        ("20", "", 0.5, "objective power 20x"),
        ("20", 'PhysicalSizeX="0.25" PhysicalSizeY="0.25"', 0.25, "OME-XML"),
        ("20", 'PhysicalSizeX="?" PhysicalSizeY="0.25"', 0.5, "objective power 20x"),
    ):
        text = xml.format(power, size)
        tifffile.imwrite(
            path,
            paint(80, 80),
            photometric="rgb",
            description=text,
            metadata=None,
            resolution=(1, 1),
            resolutionunit="NONE",
        )
        with open_slide(path) as slide:
            assert (slide.mpp, slide.mpp_source) == (mpp, source)
            assert slide.objective_power == 20
            assert slide.bounds == (0, 0, 80, 80)


def test_only_standard_names_of_other_images_are_reported(tmp_path):
    path = tmp_path / "slide.ome.tif"
    with tifffile.TiffWriter(path) as writer:
        for name, side in (("scan", 96), ("label", 32), ("Jane Doe", 48), ("Macro", 64)):
            metadata = {"axes": "YXS", "Name": name, "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
            writer.write(paint(side, side), photometric="rgb", metadata=metadata)
    with open_slide(path) as slide:
        assert (slide.width, slide.mpp_source) == (96, "OME-XML")
        assert slide.associated == ("label", "macro")


def test_openslide_properties_are_parsed():
    stated = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26", "openslide.vendor": "leica"}
    metadata = openslide_metadata(stated, ["label"])
    assert (metadata.mpp, metadata.mpp_source) == ((0.25, 0.26), "leica metadata")
    assert metadata.associated == ("label",)
    metadata = openslide_metadata({"openslide.objective-power": "20"}, [])
    assert (metadata.mpp, metadata.mpp_source) == ((0.5, 0.5), "objective power 20x")
    assert metadata.objective_power == 20
    assert openslide_metadata({}, []).mpp is None
    assert openslide_metadata({"openslide.mpp-x": "?", "openslide.mpp-y": "0.2"}, []).mpp is None
    box = {
        f"openslide.bounds-{k}": v
        for k, v in zip(("x", "y", "width", "height"), "1234", strict=True)
    }
    assert openslide_metadata(box, []).bounds == (1, 2, 3, 4)
    assert openslide_metadata(box | {"openslide.bounds-x": "nan"}, []).bounds is None


@pytest.mark.parametrize(
    ("properties", "name"),
    [
        ({"aperio.ScanScope ID": "SS1302"}, "Aperio SS1302"),
        ({"leica.device-model": "Leica SCN400"}, "Leica SCN400"),
        ({"ventana.ScannerModel": "VENTANA DP 200"}, "VENTANA DP 200"),
        ({"tiff.Make": "Hamamatsu", "tiff.Model": "C9600-12"}, "Hamamatsu C9600-12"),
        ({"mirax.NONHIERLAYER_1_SECTION.SCANNER_HARDWARE_ID": "P1000"}, "3DHISTECH P1000"),
        ({"dicom.Manufacturer": "A", "dicom.ManufacturerModelName": "B  2"}, "A B 2"),
        ({"dicom.Manufacturer": "GOOGLE"}, None),  # a maker alone distinguishes no scanners
        ({"openslide.vendor": "generic-tiff", "tiff.Model": " "}, None),
    ],
)
def test_scanner_is_read_from_openslide_properties(properties, name):
    assert openslide_metadata(properties, []).scanner == name


def test_scanner_is_read_from_the_aperio_tag(tmp_path):
    with open_slide(aperio(tmp_path, "AppMag = 40|ScanScope ID = SS1302|MPP = 0.25")) as slide:
        assert slide.scanner == "Aperio SS1302"
    with open_slide(aperio(tmp_path, "AppMag = 40|MPP = 0.25")) as slide:
        assert slide.scanner is None


def test_scanner_is_read_from_the_tiff_tags(tmp_path):
    path = tmp_path / "slide.tif"
    tags = [(271, "s", 0, "3DHISTECH", True), (272, "s", 0, "Pannoramic 1000", True)]
    tifffile.imwrite(
        path,
        paint(80, 80),
        photometric="rgb",
        resolution=(20_000, 20_000),
        resolutionunit="CENTIMETER",
        extratags=tags,
    )
    with open_slide(path) as slide:
        assert slide.scanner == "3DHISTECH Pannoramic 1000"


def test_scanner_is_the_microscope_of_the_ome_instrument(tmp_path):
    path = tmp_path / "slide.ome.tif"
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Instrument ID="Instrument:0"><Microscope Manufacturer="Zeiss" Model="Axioscan"/>'
        '</Instrument><Image ID="Image:0"><Pixels ID="Pixels:0" Type="uint8" '
        'DimensionOrder="XYCZT" SizeX="80" SizeY="80" SizeC="3" SizeZ="1" SizeT="1" '
        'PhysicalSizeX="0.5" PhysicalSizeY="0.5"><Channel ID="Channel:0" SamplesPerPixel="3"/>'
        '<TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
    )
    tifffile.imwrite(path, paint(80, 80), photometric="rgb", description=xml, metadata=None)
    with open_slide(path) as slide:
        assert slide.scanner == "Zeiss Axioscan"


def test_scanner_name_states_the_maker_once():
    assert scanner_name("Leica", "Leica  SCN400") == "Leica SCN400"
    assert scanner_name(None, "NanoZoomer S360") == "NanoZoomer S360"
    assert scanner_name("Hamamatsu", None) is None

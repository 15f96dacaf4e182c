"""um/px from what files say."""

from __future__ import annotations

from pathlib import Path

import pytest
import tifffile

from nic_core.slides import open_slide
from nic_core.slides.metadata import openslide_mpp
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


def test_aperio_mpp_comes_before_magnification(tmp_path):
    with open_slide(aperio(tmp_path, "AppMag = 40|MPP = 0.2527|Date = 1")) as slide:
        assert slide.mpp == 0.2527


def test_aperio_magnification_is_the_last_resort(tmp_path):
    with open_slide(aperio(tmp_path, "AppMag = 20|Date = 1")) as slide:
        assert slide.mpp == 0.5


@pytest.mark.parametrize(
    ("size", "unit"), [(0.5, "µm"), (500.0, "nm"), (0.0005, "mm"), (0.00005, "cm")]
)
def test_ome_units_are_converted(tmp_path, size, unit):
    path = tmp_path / "slide.ome.tif"
    about = {f"PhysicalSize{a}": size for a in "XY"} | {f"PhysicalSize{a}Unit": unit for a in "XY"}
    tifffile.imwrite(path, paint(80, 80), photometric="rgb", metadata={"axes": "YXS", **about})
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


def test_openslide_properties_are_read():
    stated = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}
    assert openslide_mpp(stated) == (0.25, 0.26)
    assert openslide_mpp({"openslide.objective-power": "20"}) == (0.5, 0.5)
    assert openslide_mpp({}) is None

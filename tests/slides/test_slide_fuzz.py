"""Opening mutated files raises SlideError at most; it never crashes or hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.slides import vendors
from tests.slides.conftest import paint, vips, write_tiff

pytestmark = pytest.mark.slow

MUTATIONS = int(os.environ.get("NIC_FUZZ", "150"))


def fuzz(sources: list[Path]) -> None:
    script = Path(__file__).with_name("fuzz_open.py")
    done = subprocess.run(
        [sys.executable, str(script), "0", str(MUTATIONS), *map(str, sources)],
        capture_output=True,
        text=True,
        timeout=60 + MUTATIONS,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-200:]}\n{done.stderr[-2000:]}"
    assert f" of {MUTATIONS}" in done.stdout


def test_mutated_tiff_png_and_jpeg_are_opened_or_refused(tmp_path):
    image = paint(300, 300)
    jpeg, png = tmp_path / "region.jpg", tmp_path / "region.png"
    vips(image).write_to_file(str(jpeg))
    vips(image).write_to_file(str(png))
    pyramid = write_tiff(tmp_path / "pyramid.tif", image, mpp=0.5, compression="jpeg")
    parts = write_tiff(tmp_path / "parts.tif", image, mpp=0.5, subifd=True, bigtiff=True)
    several = tmp_path / "several.ome.tif"
    with tifffile.TiffWriter(several) as writer:
        for pixels, name in ((image[:90, :90], "macro"), (image, "scan")):
            rgba = np.dstack([pixels, pixels[..., 0]])
            writer.write(rgba, photometric="rgb", metadata={"axes": "YXS", "Name": name})
    fuzz([jpeg, png, pyramid, parts, several])


def test_mutated_vendor_slides_are_opened_or_refused(tmp_path):
    fuzz([*vendor_slides(tmp_path)])


def test_mutated_ome_zarr_sets_and_czi_are_opened_or_refused(tmp_path):
    levels = [paint(256, 384), paint(128, 192)]
    options = {"axes": "cyx", "unit": "micrometer"}
    old = vendors.write_ome_zarr(tmp_path / "a.zarr", levels, 0.25, version="0.4", **options)
    new = vendors.write_ome_zarr(tmp_path / "b.zarr", levels, 0.25, version="0.5", **options)
    czi = vendors.write_czi(tmp_path / "a.czi", levels[0], 0.25)
    (tmp_path / "set").mkdir()
    images = {"macro.ome.tif": levels[1][:64, :64], "scan.ome.tif": levels[0]}
    scan = vendors.write_ome_set(tmp_path / "set", images, companion=True)[1]
    fuzz([old, new, czi, scan])


def vendor_slides(folder: Path) -> Iterator[Path]:
    levels = [paint(256, 384), paint(128, 192)]
    picture = paint(32, 64)
    yield vendors.write_svs(folder / "a.svs", levels, 0.25, pictures=picture)
    for codec in ("33003", "33005"):
        yield vendors.write_svs(
            folder / f"{codec}.svs", levels, 0.25, codec=codec, pictures=picture
        )
    yield vendors.write_ndpi(folder / "a.ndpi", levels, 0.25, macro=picture)
    yield vendors.write_scn(folder / "a.scn", levels, 0.25, macro=picture)
    yield vendors.write_philips(folder / "a.tiff", levels, 0.25, macro=picture)
    stitched = paint(*vendors.bif_size(3, 2))
    yield vendors.write_bif(folder / "a.bif", stitched, 0.25, macro=picture)
    yield vendors.write_mirax(folder / "a.mrxs", levels, 0.25, picture=picture)
    yield vendors.write_dicom(folder / "dicom", levels, 0.25, label=picture)


@pytest.mark.skipif("NIC_FUZZ" not in os.environ, reason="slow; set NIC_FUZZ to a number of files")
def test_mutated_real_slides_are_opened_or_refused(real_data):
    names = [
        "OS-1-detail.ome.tif",
        "camelyon_multiframe_lowres.dcm",
        "idc_8913.tif",
        "unreadable.svs",
        "CMU-1-Small-Region.svs",
        "stritt_test3_DAPI.ndpi",
    ]
    fuzz([real_data / "slides" / name for name in names])

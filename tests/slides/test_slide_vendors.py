"""Vendor formats, written with known pixels: engine, levels, um/px, pixels."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import pyvips
import tifffile
import zarr

from nic_core.slides import SlideError, content_identity, open_slide
from tests.slides import vendors
from tests.slides.conftest import area_mean, paint, reduced

MPP = 0.25
PICTURE = paint(64, 128, seed=9)
SLIDE = paint(512, 768)
STITCHED = paint(*vendors.bif_size(6, 4))


def levels(count: int = 2) -> list[np.ndarray]:
    return [SLIDE, *(reduced(SLIDE, 2**number) for number in range(1, count))]


@dataclass(frozen=True)
class Format:
    """How to write a format, and what opening it must return.

    ``corner`` is the top-left corner (x, y) of the written pixels within the slide.
    """

    write: Callable[[Path], Path]
    engine: str
    source: str
    power: float | None = 20
    corner: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (768, 512)
    names: frozenset[str] = frozenset({"macro"})
    stitched: bool = False
    lossless: bool = False

    @property
    def pixels(self) -> np.ndarray:
        return STITCHED if self.stitched else SLIDE


SVS_NAMES = frozenset({"label", "macro", "thumbnail"})
FORMATS = {
    "svs": Format(
        lambda f: vendors.write_svs(f / "a.svs", levels(), MPP, power=20, pictures=PICTURE),
        "tifffile",
        "Aperio tag",
        names=SVS_NAMES,
    ),
    "svs 33003": Format(
        lambda f: vendors.write_svs(
            f / "a.svs", levels(), MPP, codec="33003", power=20, pictures=PICTURE
        ),
        "openslide",
        "Aperio tag",
        names=SVS_NAMES,
    ),
    "svs 33005": Format(
        lambda f: vendors.write_svs(
            f / "a.svs", levels(), MPP, codec="33005", power=20, pictures=PICTURE
        ),
        "tifffile",
        "Aperio tag",
        names=SVS_NAMES,
        lossless=True,
    ),
    "svs without pictures": Format(
        lambda f: vendors.write_svs(f / "a.svs", levels(), MPP, power=20),
        "tifffile",
        "Aperio tag",
        names=frozenset(),
    ),
    "ndpi": Format(
        lambda f: vendors.write_ndpi(f / "a.ndpi", levels(), MPP, macro=PICTURE, power=20),
        "openslide",
        "hamamatsu metadata",
    ),
    "scn": Format(
        lambda f: vendors.write_scn(f / "a.scn", levels(), MPP, macro=PICTURE),
        "openslide",
        "leica metadata",
        corner=(128, 64),
        size=(1024, 640),
    ),
    "philips": Format(
        lambda f: vendors.write_philips(f / "a.tiff", levels(), MPP, macro=PICTURE),
        "openslide",
        "philips metadata",
        power=None,
    ),
    "bif": Format(
        lambda f: vendors.write_bif(f / "a.bif", STITCHED, MPP, macro=PICTURE),
        "openslide",
        "ventana metadata",
        size=(728, 488),
        stitched=True,
    ),
    "mirax": Format(
        lambda f: vendors.write_mirax(f / "a.mrxs", levels(), MPP, picture=PICTURE),
        "openslide",
        "mirax metadata",
        names=frozenset({"label", "macro"}),
    ),
    "dicom": Format(
        lambda f: vendors.write_dicom(f / "dicom", levels(), MPP, label=PICTURE),
        "openslide",
        "dicom metadata",
        names=frozenset({"label"}),
    ),
    **{
        f"ome-zarr {version} {axes}": Format(
            lambda f, version=version, axes=axes: vendors.write_ome_zarr(
                f / "a.ome.zarr", levels(), MPP, axes=axes, version=version, unit="micrometer"
            ),
            "zarr",
            "OME-Zarr scale",
            power=None,
            names=frozenset(),
            lossless=True,
        )
        for version, axes in (("0.4", "tczyx"), ("0.5", "tczyx"), ("0.5", "yxc"), ("0.4", "cyx"))
    },
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: form.write(tmp_path_factory.mktemp("f")) for kind, form in FORMATS.items()}


def assert_close(read: np.ndarray, expected: np.ndarray) -> None:
    """Assert that pixels are equal up to JPEG compression."""
    difference = np.abs(read.astype(int) - expected)
    assert difference.mean() < 2.5
    assert difference.max() < 16


@pytest.mark.parametrize("kind", FORMATS)
def test_a_vendor_slide_opens_with_its_metadata(kind, written):
    form = FORMATS[kind]
    with open_slide(written[kind]) as slide:
        assert slide.engine == form.engine
        assert (slide.width, slide.height) == form.size
        assert [level.downsample for level in slide.levels][:2] == [1.0, 2.0]
        assert slide.mpp == pytest.approx(MPP)
        assert slide.mpp_source == form.source
        assert slide.objective_power == form.power
        assert set(slide.associated) == form.names
        x, y = form.corner
        # Ventana states no bounds: the whole slide
        assert slide.bounds[:2] == (x, y)
        assert slide.bounds[2:] == (form.pixels.shape[1], form.pixels.shape[0])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_vendor_slide_returns_the_written_pixels(kind, written):
    form = FORMATS[kind]
    height, width = form.pixels.shape[:2]
    with open_slide(written[kind]) as slide:
        x, y = form.corner
        whole = slide.read(x, y, width, height, MPP)
        (assert_close, np.testing.assert_array_equal)[form.lossless](whole, form.pixels)
        # across tile borders and at a corner
        for left, top in ((100, 110), (250, 5), (width - 60, height - 60)):
            part = slide.read(x + left, y + top, 60, 60, MPP)
            np.testing.assert_array_equal(part, whole[top : top + 60, left : left + 60])
        outside = slide.read(slide.width - 5, slide.height - 5, 30, 30, MPP)
        assert (outside[5:] == 255).all()
        assert (outside[:, 5:] == 255).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mpp", [0.5, 1.0, 0.37, 0.83])
def test_a_vendor_slide_returns_area_means_at_any_mpp(kind, mpp, written):
    with open_slide(written[kind]) as slide:
        index = slide.level_for(mpp)
        level = slide.levels[index]
        assert index == 0 or mpp >= 0.5
        whole = slide._engine.read_region(index, 0, 0, level.width, level.height)
        factor = level.downsample
        for x, y in ((130.0, 70.0), (201.7, 99.2), (-6.0, slide.height - 40.5)):
            read = slide.read(x, y, 40, 30, mpp)
            expected = area_mean(whole, x / factor, y / factor, 40, 30, mpp / MPP / factor)
            # a start within 0.01 px of a whole number is rounded
            assert np.abs(read - expected).max() <= 0.5 + 1e-2


def test_a_coarser_level_shows_the_same_region(written):
    for kind, path in written.items():
        form = FORMATS[kind]
        with open_slide(path) as slide:
            x, y = form.corner
            read = slide.read(x + 128, y + 128, 100, 100, 2 * MPP)
        assert_close(read, reduced(form.pixels[128:328, 128:328], 2))


def test_areas_that_mirax_did_not_scan_are_white(tmp_path):
    path = vendors.write_mirax(
        tmp_path / "a.mrxs", levels(), MPP, picture=PICTURE, missing=(0, 6, 12, 18, 1)
    )
    with open_slide(path) as slide:
        assert slide.bounds == (128, 0, 640, 512)
        assert (slide.read(0, 0, 128, 512, MPP) == 255).all()
        assert_close(slide.read(256, 0, 100, 100, MPP), SLIDE[:100, 256:356])


def test_a_leica_fluorescence_scan_is_refused(tmp_path):
    path = vendors.write_scn(tmp_path / "a.scn", levels(), MPP, macro=PICTURE, light="fluorescence")
    with pytest.raises(SlideError, match="fluorescence scan .illumination"):
        open_slide(path)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if FORMATS[kind].engine != "zarr"])
@pytest.mark.parametrize("fraction", [0.05, 0.6, 0.98])
def test_a_truncated_vendor_slide_is_refused(kind, fraction, tmp_path):
    path = FORMATS[kind].write(tmp_path)
    large = max((p for p in tmp_path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = large.read_bytes()
    large.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(SlideError, match="copy the file again"):
        open_slide(path, mpp=MPP)


def test_a_mirax_file_without_its_folder_is_refused(tmp_path):
    path = vendors.write_mirax(tmp_path / "a.mrxs", levels(), MPP, picture=PICTURE)
    path.with_suffix("").rename(tmp_path / "elsewhere")
    with pytest.raises(SlideError, match="its folder 'a' is missing"):
        open_slide(path)


def test_an_undecodable_tile_does_not_affect_other_threads(tmp_path):
    path = vendors.write_philips(tmp_path / "a.tiff", levels(), MPP, macro=PICTURE)
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[8], tiff.pages[0].databytecounts[8]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(np.random.default_rng(0).bytes(count))
    corners = [(x, y) for y in range(0, 512, 128) for x in range(0, 768, 128)] * 4

    with open_slide(path) as slide, ThreadPoolExecutor(4) as pool:

        def read(corner: tuple[int, int]) -> bool:
            try:
                pixels = slide.read(*corner, 128, 128, MPP)
            except SlideError:
                return False
            assert_close(pixels, SLIDE[corner[1] : corner[1] + 128, corner[0] : corner[0] + 128])
            return True

        good = list(pool.map(read, corners))
    assert good == [corner != (256, 128) for corner in corners]


def write_zarr(path: Path, *, axes: str = "cyx", version: str = "0.5", **options: object) -> Path:
    settings = {"unit": "micrometer", **options}
    return vendors.write_ome_zarr(path, levels(), MPP, axes=axes, version=version, **settings)


def test_ome_zarr_by_another_writer_is_read(tmp_path):
    from ome_zarr.writer import write_multiscale

    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    steps = [[{"type": "scale", "scale": [1.0, n * MPP / 1000, n * MPP / 1000]}] for n in (1, 2)]
    units = [{"name": n, "type": "space", "unit": "millimeter"} for n in "yx"]
    write_multiscale(
        [pixels.transpose(2, 0, 1) for pixels in levels()[:2]],
        group,
        axes=[{"name": "c", "type": "channel"}, *units],
        coordinate_transformations=steps,
    )
    with open_slide(tmp_path / "a.zarr") as slide:
        assert slide.mpp == pytest.approx(MPP)
        np.testing.assert_array_equal(slide.read(0, 0, 768, 512, MPP), SLIDE)


@pytest.mark.parametrize(
    "options", [{"shards": (3, 512, 512)}, {"chunks": (1, 100, 90)}, {"compressors": None}]
)
def test_ome_zarr_is_read_however_it_is_chunked(tmp_path, options):
    chunks = options.pop("chunks", (3, 128, 128))
    path = write_zarr(tmp_path / "a.zarr", chunks=chunks, **options)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 768, 512, MPP), SLIDE)


def test_the_largest_image_of_bioformats2raw_is_the_slide(tmp_path):
    root = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    root.attrs["bioformats2raw.layout"] = 3
    small = [PICTURE, reduced(PICTURE, 2)]
    options = {"axes": "tczyx", "version": "0.4", "unit": "micrometer"}
    vendors.write_ome_zarr(tmp_path / "a.zarr" / "0", small, 16.0, **options)
    vendors.write_ome_zarr(tmp_path / "a.zarr" / "1", levels(), MPP, **options)
    with open_slide(tmp_path / "a.zarr") as slide:
        assert (slide.width, slide.height, slide.mpp) == (768, 512, MPP)
    vendors.write_ome_zarr(tmp_path / "a.zarr" / "2", levels(), 2 * MPP, **options)
    with pytest.raises(SlideError, match="several scans, whose level 0 is at 1/0 and 2/0"):
        open_slide(tmp_path / "a.zarr")
    with open_slide(tmp_path / "a.zarr" / "2") as slide:
        assert slide.mpp == 2 * MPP


def test_a_chunk_that_is_not_stored_is_white(tmp_path):
    path = write_zarr(tmp_path / "a.zarr")
    shutil.rmtree(path / "0" / "c" / "0" / "0")  # the first row of chunks
    with open_slide(path) as slide:
        pixels = slide.read(0, 0, 768, 512, MPP)
    assert (pixels[:128] == 255).all()
    np.testing.assert_array_equal(pixels[128:], SLIDE[128:])


def test_a_truncated_chunk_fails_the_reads_that_touch_it(tmp_path):
    path = write_zarr(tmp_path / "a.zarr")
    chunk = path / "0" / "c" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-100])
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(128, 0, 600, 512, MPP), SLIDE[:, 128:728])
        with pytest.raises(SlideError, match="chunk 0, 0 of level 0.*copy the file again"):
            slide.read(0, 0, 10, 10, MPP)


def test_an_ome_zarr_without_units_needs_an_mpp(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", unit=None)
    with pytest.raises(SlideError, match="does not state its um/px"):
        open_slide(path)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.mpp == 0.5


def test_a_zarr_folder_that_is_not_an_rgb_image_is_refused(tmp_path):
    zarr.open_group(tmp_path / "empty.zarr", mode="w")
    deep = [level.astype(np.uint16) for level in levels()]
    options = {"axes": "cyx", "version": "0.5", "unit": "micrometer"}
    vendors.write_ome_zarr(tmp_path / "deep.zarr", deep, MPP, **options)
    grey = [level[..., :1] for level in levels()]
    vendors.write_ome_zarr(tmp_path / "grey.zarr", grey, MPP, **options)
    (tmp_path / "damaged.zarr").mkdir()
    (tmp_path / "damaged.zarr" / "zarr.json").write_text("{")
    for name, message in (
        ("empty", "without an OME-Zarr image"),
        ("deep", "not an 8-bit RGB image.*uint16"),
        ("grey", "not an 8-bit RGB image.*shape .1, 512, 768"),
        ("damaged", "damaged OME-Zarr metadata"),
    ):
        with pytest.raises(SlideError, match=message):
            open_slide(tmp_path / f"{name}.zarr")


def test_czi_is_read_in_a_process_of_its_own(tmp_path):
    path = vendors.write_czi(tmp_path / "a.czi", SLIDE, MPP)
    with open_slide(path) as slide:
        assert (slide.engine, slide.width, slide.height) == ("czi", 768, 512)
        assert slide.mpp == pytest.approx(MPP)
        np.testing.assert_array_equal(slide.read(0, 0, 768, 512, MPP), SLIDE)
        assert (slide.read(768, 0, 10, 10, MPP) == 255).all()
        expected = area_mean(SLIDE, 100, 50, 40, 30, 0.7 / MPP)
        assert np.abs(slide.read(100, 50, 40, 30, 0.7) - expected).max() <= 0.5 + 1e-2


def test_a_crash_of_libczi_fails_one_read_only(tmp_path):
    path = vendors.write_czi(tmp_path / "a.czi", SLIDE, MPP)
    with open_slide(path) as slide:
        os.kill(slide._engine._process._running.pid, signal.SIGSEGV)
        with pytest.raises(SlideError, match="the process of libCZI ended with status -11"):
            slide.read(0, 0, 10, 10, MPP)
        np.testing.assert_array_equal(slide.read(0, 0, 10, 10, MPP), SLIDE[:10, :10])


@pytest.mark.parametrize("fraction", [0.05, 0.6, 0.98])
def test_a_truncated_czi_is_refused(tmp_path, fraction):
    path = vendors.write_czi(tmp_path / "a.czi", SLIDE, MPP)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(SlideError, match="libCZI cannot open it.*copy the file again"):
        open_slide(path)


def test_czi_without_its_package_names_the_extra(tmp_path, monkeypatch):
    path = vendors.write_czi(tmp_path / "a.czi", SLIDE, MPP)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SlideError, match=r"pip install 'nic-pathology\[czi\]'"):
        open_slide(path)


def test_content_identity_includes_all_files_of_a_slide(tmp_path):
    mirax = vendors.write_mirax(tmp_path / "a.mrxs", levels(), MPP, picture=PICTURE)
    dicom = vendors.write_dicom(tmp_path / "dicom", levels(), MPP, label=PICTURE)
    (dicom.parent / "notes.txt").write_text("not a part of the slide")
    for path, part in (
        (mirax, tmp_path / "a" / "Data0000.dat"),
        (dicom, dicom.parent / "level1.dcm"),
    ):
        before = content_identity(path)
        assert content_identity(path) == before
        with part.open("ab") as file:
            file.write(b"more")
        assert content_identity(path) != before
    assert content_identity(dicom.parent / "label.dcm") == content_identity(dicom)
    before = content_identity(dicom)
    (dicom.parent / "notes.txt").write_text("not a part of the slide, changed")
    assert content_identity(dicom) == before


WITH_OPENSLIDE = bool(pyvips.type_find("VipsForeignLoad", "openslideload"))


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if FORMATS[kind].engine == "openslide"])
def test_libvips_reads_vendor_formats_if_built_with_openslide(kind, written):
    if not WITH_OPENSLIDE:
        with pytest.raises(SlideError, match="install a libvips with OpenSlide"):
            open_slide(written[kind], engine="libvips")
        return
    with open_slide(written[kind]) as slide, open_slide(written[kind], engine="libvips") as other:
        assert other.engine == "libvips"
        assert [(a.width, a.height) for a in other.levels] == [
            (a.width, a.height) for a in slide.levels
        ]
        assert (other.mpp, other.bounds) == (slide.mpp, slide.bounds)
        assert set(other.associated) == set(slide.associated)
        for args in ((0, 0, 300, 250, MPP), (133, 121, 77, 66, 0.61), (-9, 480, 50, 50, 1.3)):
            np.testing.assert_array_equal(other.read(*args), slide.read(*args))

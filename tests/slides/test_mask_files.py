"""Given tissue masks: which px are background, and where an image lies on the slide."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import pyvips
import tifffile
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from nic_core.slides import Slide, SlideError, open_slide
from nic_core.tiling.mask_files import StoredImage, level0_px_per_px, read_mask
from tests.slides.conftest import vips


@pytest.fixture(scope="module")
def slide(files) -> Iterator[Slide]:
    with open_slide(files["tiff"]) as opened:  # 900 x 700 px of 0.25 um: 225 x 175 um
        yield opened


TISSUE = np.zeros((175, 225), np.uint8)  # at 1 um/px
TISSUE[20:90, 30:120] = 1
ONES, NONE = np.ones_like(TISSUE), np.zeros_like(TISSUE)
WHITE_FIRST = np.zeros((3, 256), np.uint16)
WHITE_FIRST[:, 0] = 65535


def png(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path.with_suffix(".png"), **options)
    return path.with_suffix(".png")


def tiff(path: Path, values: np.ndarray, **options: object) -> Path:
    tifffile.imwrite(path.with_suffix(".tif"), values, **options)
    return path.with_suffix(".tif")


def palette(colours: list[int]) -> Image.Image:
    image = Image.fromarray(TISSUE)
    image.putpalette(colours)
    return image


def bands(*values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack(values))


READ = {
    "grey of any value": lambda p: png(p, Image.fromarray(TISSUE * 3)),
    "1 bit": lambda p: png(p, Image.fromarray(TISSUE > 0)),
    "16 bits": lambda p: tiff(p, TISSUE.astype(np.uint16) * 40_000),
    "64 bits": lambda p: tiff(p, TISSUE.astype(np.int64)),
    "float": lambda p: tiff(p, TISSUE.astype(np.float32)),
    "double of 255": lambda p: tiff(p, TISSUE * 255.0),
    "bool of tifffile, 0 is white": lambda p: tiff(p, TISSUE > 0),
    "one coloured band": lambda p: png(p, bands(NONE, TISSUE * 255, NONE)),
    "palette with black for every index": lambda p: png(p, palette([0, 0, 0] * 3)),
    "palette with white background": lambda p: png(p, palette([255, 255, 255, 0, 128, 0])),
    "palette with transparent background": lambda p: png(p, palette([9] * 6), transparency=0),
    "palette of a TIFF": lambda p: tiff(
        p, TISSUE, photometric="palette", colormap=WHITE_FIRST, metadata=None
    ),
    "opaque colour": lambda p: png(p, bands(TISSUE * 9, NONE, NONE, ONES * 255)),
    "coloured tissue on transparent": lambda p: png(p, bands(NONE, TISSUE, NONE, TISSUE * 99)),
    "alpha alone": lambda p: png(p, bands(NONE, NONE, NONE, TISSUE * 200)),
    "grey with alpha": lambda p: png(p, bands(NONE, TISSUE * 255)),
    "classes in two bands": lambda p: tiff(
        p,
        np.dstack([TISSUE * (np.arange(225) < 60), TISSUE * (np.arange(225) >= 60)]),
        photometric="minisblack",
        planarconfig="contig",
    ),
    "classes in four planes": lambda p: tiff(
        p,
        np.stack([NONE, TISSUE, NONE, NONE]),
        photometric="minisblack",
        planarconfig="separate",
    ),
}


@pytest.mark.parametrize("kind", READ)
def test_background_is_the_stored_value_0(tmp_path, slide, kind):
    path = READ[kind](tmp_path / "mask")
    np.testing.assert_array_equal(read_mask(path, slide, mpp=1.0).array, TISSUE > 0)


def white_is_zero(path: Path) -> Path:
    vips(TISSUE[..., None] * 255).tiffsave(f"{path}.tif", bitdepth=1, miniswhite=True)
    return path.with_suffix(".tif")


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


THREE = bands(TISSUE * 255, NONE, NONE, ONES * (np.arange(175) > 9)[:, None].astype(np.uint8))
REFUSED = {
    "JPEG": (lambda p: (Image.fromarray(TISSUE).save(f"{p}.jpg"), Path(f"{p}.jpg"))[1], "may chan"),
    "JPEG in a TIFF": (lambda p: tiff(p, TISSUE, compression="jpeg"), "by JPEG, which may change"),
    "probabilities": (lambda p: tiff(p, TISSUE * np.float32(0.5) + 0.1 * THIRD), "fractional"),
    "NaN": (lambda p: tiff(p, np.where(TISSUE, np.float32(1), np.nan)), "fractional"),
    "no 0": (lambda p: png(p, Image.fromarray(TISSUE + 1)), "several values, but none is 0"),
    "white ground": (
        lambda p: png(p, bands(ONES * 255, 255 - TISSUE, 255 - TISSUE)),
        "none is 0",
    ),
    "black and transparent": (lambda p: png(p, THREE), "transparent, black and coloured px"),
    "0 is white": (white_is_zero, "write it with 0 as black"),
    "stack": (lambda p: tiff(p, np.stack([TISSUE] * 2)), "2 images of the same size"),
    "64 bits": (lambda p: tiff(p, TISSUE.astype(np.int64) << 40), "more than 32 bits"),
    "missing": (lambda p: p / "gone.png", r"gone.png: No such file"),
    "empty": (lambda p: written(p, b""), "neither a PNG nor a TIFF"),
    "cut TIFF": (lambda p: written(p, tiff(p, TISSUE).read_bytes()[:200]), "damaged TIFF|error"),
    "cut PNG": (lambda p: written(p, png(p, palette([0] * 6)).read_bytes()[:-40]), "truncated"),
}
THIRD = (np.arange(225) % 3).astype(np.float32)[None]


@pytest.mark.parametrize("kind", REFUSED)
def test_a_mask_whose_background_is_not_known_is_refused(tmp_path, slide, kind):
    write, reason = REFUSED[kind]
    path = write(tmp_path / "mask")
    with pytest.raises(SlideError, match=rf"mask .*{reason}"):
        read_mask(path, slide)


def test_a_mask_of_tissue_only_is_read(tmp_path, slide):
    for value in (1, 255):
        path = png(tmp_path / "mask", Image.fromarray(ONES * np.uint8(value)))
        assert read_mask(path, slide).array.all()


# --- place -----------------------------------------------------------------------------------


def resolution(mpp: float) -> dict[str, object]:
    return {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}


def micrometres(mpp: float) -> dict[str, object]:
    return {
        "ome": True,
        "metadata": {
            "axes": "YX",
            "PhysicalSizeX": mpp,
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeY": mpp,
            "PhysicalSizeYUnit": "µm",
        },
    }


PADDED = np.pad(TISSUE, ((0, 17), (0, 31)))  # to 192 x 256, whole tiles of 64 px


@pytest.mark.parametrize(
    "write",
    [
        lambda p: tiff(p, PADDED, tile=(64, 64), **resolution(1.0)),
        lambda p: tiff(p, np.pad(TISSUE, ((0, 849), (0, 799))), **resolution(1.0)),
        lambda p: tiff(p, PADDED, **micrometres(1.0)),
        lambda p: png(p, Image.fromarray(PADDED), dpi=(25_400, 25_400)),
        # the slide's own size, whatever the um/px round to
        lambda p: tiff(p, TISSUE, **resolution(1.004)),
        lambda p: tiff(p, TISSUE, resolution=(300, 300), resolutionunit="INCH"),
        lambda p: tiff(p, TISSUE, resolution=(1, 1), resolutionunit="NONE"),
    ],
)
def test_a_mask_lies_at_the_um_per_px_that_it_states(tmp_path, slide, write):
    found = read_mask(write(tmp_path / "mask"), slide, mpp=1.0)
    np.testing.assert_array_equal(found.array, TISSUE > 0)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda p: tiff(p, PADDED), "another ratio of sides.*states no um/px"),
        (lambda p: tiff(p, TISSUE.T), "175 x 225|225 x 175"),  # portrait and landscape
        (lambda p: tiff(p, TISSUE.T, **resolution(1.0)), "at the 1 um/px that it states"),
        (lambda p: tiff(p, TISSUE, **resolution(0.25)), "at the 0.25 um/px that it states"),
        (lambda p: tiff(p, TISSUE, **resolution(3.0)), "it has tissue beyond"),
        (lambda p: tiff(p, np.pad(PADDED[:, ::-1], 9), **resolution(1.0)), "it has tissue beyond"),
        (lambda p: tiff(p, np.zeros((175, 228), np.uint8)), "another ratio of sides"),  # 1.3 %
    ],
)
def test_a_mask_that_does_not_fit_the_slide_is_refused(tmp_path, slide, write, reason):
    with pytest.raises(SlideError, match=reason):
        read_mask(write(tmp_path / "mask"), slide)


@given(
    scale=st.integers(1, 64),
    size=st.tuples(*[st.integers(3000, 60_000)] * 2),
    up=st.tuples(*[st.booleans()] * 2),
)
def test_a_whole_reduction_is_found_whichever_way_it_was_rounded(scale, size, up):
    shape = [-(-side // scale) if u else side // scale for side, u in zip(size, up, strict=True)]
    assume(min(shape) > 2 * scale + 2)  # else several scales give this size
    image = StoredImage(pyvips.Image.black(*shape), False, None)
    assert level0_px_per_px(image, *size, 0.25) == (scale, scale)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    scale=st.floats(0.5, 12),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
    mpp=st.sampled_from([1.0, 2.0, 8.0]),
)
def test_a_mask_of_any_scale_covers_the_slide_exactly(tmp_path, slide, scale, corners, mpp):
    size = round(700 / scale), round(900 / scale)
    assume(all(size[1] not in (900 // k, -(-900 // k)) for k in range(1, 20)))
    y0, y1 = sorted(round(c * size[0]) for c in corners[:2])
    x0, x1 = sorted(round(c * size[1]) for c in corners[2:])
    assume((y1 - y0) * (x1 - x0) < size[0] * size[1])
    image = np.zeros((*size, 1), np.uint8)
    image[y0:y1, x0:x1] = 3
    path = tmp_path / "mask.tif"
    vips(image).tiffsave(str(path), tile=True, pyramid=True, compression="deflate")
    found = read_mask(path, slide, mpp=mpp).array

    def fraction(start: float, stop: float, um: float) -> np.ndarray:
        low = np.arange(np.ceil(um / mpp)) * mpp
        high = np.minimum(low + mpp, um)
        return np.clip(np.minimum(high, stop) - np.maximum(low, start), 0, None) / (high - low)

    covered = np.outer(
        fraction(y0 * 175 / size[0], y1 * 175 / size[0], 175),
        fraction(x0 * 225 / size[1], x1 * 225 / size[1], 225),
    )
    unsure = abs(covered - 0.5) < 1e-3  # half covered: rounding decides
    np.testing.assert_array_equal(found | unsure, (covered > 0.5) | unsure)


# --- regions as masks ------------------------------------------------------------------------


def test_features_of_a_mask_that_are_not_used_are_logged(tmp_path, slide, caplog):
    square = {"type": "Polygon", "coordinates": [[[0, 0], [400, 0], [400, 400], [0, 400]]]}
    point = {"type": "Point", "coordinates": [1, 2]}
    path = tmp_path / "mask.geojson"
    path.write_text(json.dumps([square, point, point]))
    assert read_mask(path, slide, mpp=1.0).array.sum() == 100 * 100
    (message,) = caplog.messages
    assert message.endswith("2 features not used: a point, without an area: [2, 3]")


def test_regions_without_an_area_are_not_a_mask(tmp_path, slide):
    path = tmp_path / "mask.geojson"
    path.write_text(json.dumps({"geometry": {"type": "Point", "coordinates": [1, 2]}}))
    with pytest.raises(SlideError, match="none of its 1 features is one"):
        read_mask(path, slide)


def test_qupath_regions_can_be_the_mask(tmp_path, slide):
    """A ring with a hole and two more polygons, one partly outside; level-0 px of 0.25 um."""
    corners = [[0, 0], [448, 0], [448, 300], [0, 300], [0, 0]]
    hole = [[40, 40], [80, 40], [80, 120], [40, 120], [40, 40]]
    pieces = [
        [[[500, 400], [600, 400], [600, 480], [500, 480]]],
        [[[880, 680], [980, 680], [980, 780], [880, 780]]],
    ]
    qupath = tmp_path / "tissue.geojson"
    geometries = [
        {"type": "Polygon", "coordinates": [corners, hole]},
        {"type": "MultiPolygon", "coordinates": pieces},
    ]
    qupath.write_text(json.dumps([{"geometry": geometry} for geometry in geometries]))
    expected = np.zeros((175, 225), bool)
    expected[:75, :112] = True
    expected[10:30, 10:20] = False
    expected[100:120, 125:150] = expected[170:, 220:] = True
    np.testing.assert_array_equal(read_mask(qupath, slide, mpp=1.0).array, expected)


def test_asap_regions_can_be_the_mask(tmp_path, slide):
    points = "".join(
        f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>'
        for i, (x, y) in enumerate([(100, 20), (300, 20), (300, 60), (100, 60)])
    )
    asap = tmp_path / "tissue.xml"
    asap.write_text(
        '<ASAP_Annotations><Annotations><Annotation Type="Polygon" PartOfGroup="None">'
        f"<Coordinates>{points}</Coordinates></Annotation></Annotations></ASAP_Annotations>"
    )
    expected = np.zeros((175, 225), bool)
    expected[5:15, 25:75] = True
    np.testing.assert_array_equal(read_mask(asap, slide, mpp=1.0).array, expected)

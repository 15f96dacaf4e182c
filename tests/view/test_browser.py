"""The pages of ``nic view`` in a real browser: what is drawn, where, and what the user can do.

The study has a slide whose scanned area does not start at its corner (``bounded``), one of another
um/px whose sizes are odd (``odd``), one without tissue, and a file that is no slide.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import polars as pl
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from nic_core.cohort import Cohort, load_cohort
from nic_core.slides import open_slide
from nic_core.steps.slide_index import read_slide_index
from nic_core.store import GridKey, PatchTableKey, Store
from tests.slides import vendors
from tests.slides.conftest import paint, write_tiff

uvicorn = pytest.importorskip("uvicorn", reason="the extra 'view' is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
)
SIZE = {"width": 1280, "height": 800}
WAIT_MS = 8_000
SLIDES = ("bounded", "odd")


def glass_with_tissue(height: int, width: int) -> np.ndarray:
    """Paint glass with a piece of tissue that no flip or rotation leaves where it is."""
    pixels = np.full((height, width, 3), 244, np.uint8)
    tissue = paint(height, width)
    for rows, columns in ((slice(0.15, 0.9), slice(0.1, 0.4)), (slice(0.6, 0.9), slice(0.1, 0.8))):
        area = tuple(
            slice(int(part.start * side), int(part.stop * side))
            for part, side in ((rows, height), (columns, width))
        )
        pixels[area] = tissue[area]
    return pixels


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cohort, Store]:
    from nic_core import steps

    folder = tmp_path_factory.mktemp("viewed")
    full = glass_with_tissue(1536, 2048)
    levels = [full, *(full[:: 2**n, :: 2**n] for n in (1, 2))]
    outside = [row * 8 + column for row in range(6) for column in range(8) if not (row and column)]
    vendors.write_mirax(folder / "bounded.mrxs", levels, 0.5, picture=levels[2], missing=outside)
    write_tiff(folder / "odd.tif", glass_with_tissue(1403, 1901), mpp=0.3)
    write_tiff(folder / "empty.tif", np.full((512, 512, 3), 244, np.uint8), mpp=0.5)
    (folder / "broken.tif").write_bytes(b"II*\0 this is no slide")
    names = ("bounded.mrxs", "odd.tif", "empty.tif", "broken.tif")
    pl.DataFrame(
        {
            "slide": [name.split(".")[0] for name in names],
            "path": names,
            "patient": ["P10", "P9", "P2", "P1"],
            "split": ["cv", "cv", "test", "cv"],
        }
    ).write_csv(folder / "slides.csv")
    pl.DataFrame({"slide": ["bounded", "odd", "empty"], "score": [-1.5, 10.25, 9.0]}).write_csv(
        folder / "labels.csv"
    )
    (folder / "cohort.yaml").write_text(
        "name: viewed\nslides: {table: slides.csv}\nlabels: labels.csv\n"
        "encoders: [{name: colour, objective: mean_rgb}]\n"
        "targets: [{name: score, kind: regression, column: score}]\n"
    )
    cohort, store = load_cohort(folder / "cohort.yaml"), Store(folder / "store")
    steps.make_slide_index(cohort, store)
    for slide in ("bounded", "odd", "empty"):
        steps.make_slide(store, slide)
        steps.make_patch_table(cohort, store, PatchTableKey(geometry="128px-0.5um", slide=slide))
    steps.make_encoder(cohort, store, "colour")
    encoder = steps.prepare_encoder(cohort, store, "colour")
    for slide in SLIDES:
        steps.make_grid(cohort, store, encoder, slide)
    steps.make_grid_manifest(store, "colour")
    steps.make_embedding_colours(store, "colour")
    return cohort, store


@contextmanager
def served(application: Any) -> Iterator[str]:
    """Serve an application on a free port; yield its address."""
    config = uvicorn.Config(application, host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended"
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def address(study: tuple[Cohort, Store]) -> Iterator[str]:
    from nic_core.view.server import application
    from nic_core.view.study import open_study

    with served(application(open_study(*study))) as url:
        yield url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Seen:
    """A page, what it asked for, and what went wrong."""

    page: Any
    requests: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@pytest.fixture
def seen(chromium: Any, address: str) -> Iterator[Seen]:
    context = chromium.new_context(viewport=SIZE, base_url=address)
    found = Seen(context.new_page())
    found.page.set_default_timeout(WAIT_MS)
    found.page.on("request", lambda request: found.requests.append(request.url))
    found.page.on("pageerror", lambda error: found.faults.append(str(error)))
    found.page.on(
        "console",
        lambda message: found.faults.append(message.text) if message.type == "error" else None,
    )
    yield found
    context.close()


@pytest.fixture
def page(seen: Seen, address: str) -> Iterator[Any]:
    """A page without errors that asks this server alone."""
    yield seen.page
    assert seen.faults == []
    assert [url for url in seen.requests if not url.startswith((address, "data:"))] == []


def settle(page: Any) -> None:
    """Wait until every tile is there and has faded in, which takes 200 ms."""
    page.wait_for_timeout(300)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(300)


def open_view(page: Any, slide: str, x: float, y: float, zoom: float, layers: str) -> np.ndarray:
    """Open a view of a slide and return its map, uint8 (rows, columns, 3)."""
    page.goto("about:blank")
    page.goto(f"/slide/{quote(slide)}#x={x}&y={y}&zoom={zoom}&layers={layers}")
    page.wait_for_selector("#layers fieldset")
    settle(page)
    return map_of(page)


def map_of(page: Any) -> np.ndarray:
    """Return the map without its controls, uint8 (rows, columns, 3)."""
    page.evaluate("document.querySelector('.leaflet-control-container').hidden = true")
    shown = picture(page.locator("#map").screenshot())
    page.evaluate("document.querySelector('.leaflet-control-container').hidden = false")
    return shown


def picture(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def middle(pixels: np.ndarray) -> np.ndarray:
    return pixels[8:-8, 8:-8]


def corner(shown: np.ndarray, x: float, y: float, zoom: float) -> tuple[float, float]:
    """The level-0 px at the upper left corner of a view whose centre is x, y.

    Leaflet puts the corner at a whole screen px.
    """
    rows, columns = shown.shape[:2]
    left, top = (
        np.floor(value * 2**zoom - side / 2 + 0.5) / 2**zoom
        for value, side in ((x, columns), (y, rows))
    )
    return left, top


def path_of(study: tuple[Cohort, Store], slide: str) -> Path:
    return Path(
        read_slide_index(study[1]).row(by_predicate=pl.col("slide") == slide, named=True)["path"]
    )


def best_shift(shown: np.ndarray, expected: np.ndarray) -> tuple[int, int]:
    """The shift (rows, columns) of at most 3 px at which two pictures agree best."""
    shifts = [(down, right) for down in range(-3, 4) for right in range(-3, 4)]

    def difference(shift: tuple[int, int]) -> float:
        moved = np.roll(shown, shift, (0, 1))
        return float(np.abs(moved.astype(int) - expected)[4:-4, 4:-4].mean())

    return min(shifts, key=difference)


@pytest.mark.parametrize("slide", SLIDES)
@pytest.mark.parametrize("zoom", [1, 0, -1, -2])
def test_tiles_lie_where_the_slide_has_them(page, study, slide, zoom):
    shown = open_view(page, slide, 700, 800, zoom, "")
    x, y = corner(shown, 700, 800, zoom)
    with open_slide(path_of(study, slide)) as opened:
        rows, columns = shown.shape[:2]
        expected = opened.read(x, y, columns, rows, opened.mpp / 2**zoom)
        end = [
            int((side - start) * 2**zoom) for side, start in ((opened.height, y), (opened.width, x))
        ]
    start = [max(0, int(-value * 2**zoom) + 2) for value in (y, x)]
    inside = tuple(slice(low + 8, high - 8) for low, high in zip(start, end, strict=True))
    shown, expected = shown[inside], expected[inside]
    assert best_shift(shown, expected) == (0, 0)
    # JPEG twice for the scanner's format, once for the tiles
    assert np.abs(shown.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("slide", SLIDES)
def test_grid_colours_fill_the_cells_they_belong_to(page, study, slide):
    from nic_core.grids import open_grid
    from nic_core.grids.preview import colour_cells, read_colours

    zoom = -0.5
    shown = open_view(page, slide, 700, 800, zoom, "grid.colour:1")
    x, y = corner(shown, 700, 800, zoom)
    store = study[1]
    grid = open_grid(store.grid(GridKey(encoder="colour", slide=slide)))
    colours = colour_cells(grid, read_colours(store.embedding_colours("colour")))
    left, top = grid.provenance.origin
    compared = 0
    for row, column in np.argwhere(grid.valid):
        # close to the four corners of a cell
        for down in (0.06, 0.94):
            for right in (0.06, 0.94):
                place = (
                    (top + (row + down) * grid.provenance.cell - y) * 2**zoom,
                    (left + (column + right) * grid.provenance.cell - x) * 2**zoom,
                )
                if all(0 <= value < side for value, side in zip(place, shown.shape, strict=False)):
                    pixel = shown[int(place[0]), int(place[1])]
                    np.testing.assert_allclose(pixel, colours[row, column], atol=2)
                    compared += 1
    assert compared > 40
    # the cell size is no whole number of px on the slide with another um/px
    assert (grid.provenance.cell == 128) == (slide == "bounded")


@pytest.mark.parametrize("slide", SLIDES)
def test_the_tissue_outline_lies_on_the_mask(page, study, slide):
    from nic_core.maps.heatmaps import outlines
    from nic_core.steps.slides import TISSUE, read_record
    from nic_core.tiling.tissue import TissueMask

    zoom = -1
    without = open_view(page, slide, 700, 800, zoom, "").astype(int)
    shown = open_view(page, slide, 700, 800, zoom, "tissue:1").astype(int)
    x, y = corner(shown, 700, 800, zoom)
    drawn = np.abs(shown - without).sum(-1) > 60
    record = read_record(study[1], slide)
    mask = TissueMask.load(study[1].slide(slide) / TISSUE, record.tissue_mpp)
    reference = Image.new("1", drawn.shape[::-1])
    pen = ImageDraw.Draw(reference)
    for polygon in outlines(mask.array, mask.mpp / record.mpp):
        for ring in polygon:
            pen.line([((u - x) * 2**zoom, (v - y) * 2**zoom) for u, v in ring], fill=1)
    expected = np.asarray(reference)
    assert expected.sum() > 500
    # the outline is simplified by less than a px of the mask
    limit = 2 + mask.mpp / record.mpp * 2**zoom
    for one, other in ((drawn, expected), (expected, drawn)):
        distance = ndimage.distance_transform_edt(~other)
        assert distance[one].max() <= limit
        assert np.median(distance[one]) <= 1.5


def test_opacity_fades_a_layer(page):
    pictures = [
        open_view(page, "odd", 400, 700, 0, layers)
        for layers in ("", "grid.colour:0.5", "grid.colour:1")
    ]
    none, half, full = (middle(picture).astype(float) for picture in pictures)
    np.testing.assert_allclose(half, (none + full) / 2, atol=2)
    assert np.abs(full - none).mean() > 5


def test_the_permalink_keeps_place_zoom_and_layers(page):
    open_view(page, "odd", 700, 800, -1, "tissue:1")
    page.locator("#map").press("+")
    page.get_by_role("checkbox", name="Grid of colour").check()
    page.get_by_label("Opacity of Grid of colour").fill("35")
    page.wait_for_url(re.compile("grid.colour:0.35$"))
    link = page.evaluate("location.hash")
    assert link == "#x=700&y=800&zoom=0&layers=tissue:1,grid.colour:0.35"
    settle(page)
    before = map_of(page)
    page.goto("about:blank")
    page.goto(f"/slide/odd{link}")
    page.wait_for_selector("#layers fieldset")
    settle(page)
    after = map_of(page)
    # the address holds whole px of the slide, the corner of a view lies on whole px of the screen
    shift = best_shift(middle(after), middle(before))
    assert max(map(abs, shift)) <= 1
    moved = np.roll(middle(after), shift, (0, 1))
    assert np.abs(moved.astype(int) - middle(before)).mean() < 1
    # an address that is typed into the open page is followed as well
    page.evaluate("location.hash = '#x=300&y=200&zoom=-2&layers='")
    expect(page.get_by_role("checkbox", name="Grid of colour")).not_to_be_checked()
    assert page.evaluate("location.hash") == "#x=300&y=200&zoom=-2&layers="


def test_unknown_layers_of_an_address_are_named(page):
    open_view(page, "odd", 700, 800, -1, "heat.none:1,tissue:1")
    assert "heat.none" in page.locator("#notice").inner_text()
    assert page.get_by_role("checkbox", name="Tissue outline").is_checked()


@pytest.mark.parametrize(
    "hash", ["#x=abc&y=1&zoom=2", "#x=1e9&y=-1e9&zoom=99&layers=%2F:9", "#&&==", "#zoom=NaN&x=&y="]
)
def test_any_hash_gives_a_view_of_the_slide(page, hash):
    page.goto(f"/slide/odd{hash}")
    page.wait_for_selector("#layers fieldset")
    page.wait_for_url(re.compile(r"#x=[0-9-]+&y=[0-9-]+&zoom=[0-9.-]+&layers=[a-z:1]*$"))
    x, y, zoom = (
        float(re.search(rf"{name}=([0-9.-]+)", page.url)[1]) for name in ("x", "y", "zoom")
    )
    assert 0 <= x <= 1901
    assert 0 <= y <= 1403
    assert -5 <= zoom <= 2


def test_keys_move_zoom_and_switch_layers(page):
    open_view(page, "odd", 700, 800, 0, "")
    for key, expected in (
        ("ArrowRight", r"x=7[1-9]\d&y=80[01]&zoom=0&layers=$"),
        ("-", r"zoom=-1&layers=$"),
        ("1", r"layers=tissue:1$"),
        ("1", r"layers=$"),
        ("f", r"x=95[01]&y=70[12]&zoom=-"),
    ):
        page.keyboard.press(key)
        page.wait_for_url(re.compile(expected))
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()


@pytest.mark.parametrize(("slide", "mpp"), [("bounded", 0.5), ("odd", 0.3)])
def test_the_scale_bar_is_as_long_as_it_says(page, slide, mpp):
    open_view(page, slide, 700, 800, 0, "")
    for zoom in (0, -1, -2):
        bar = page.locator(".scale-bar")
        um = float(bar.inner_text().removesuffix(" µm"))
        assert bar.bounding_box()["width"] * mpp / 2**zoom == pytest.approx(um, rel=0.02)
        page.keyboard.press("-")
        page.wait_for_url(re.compile(f"zoom={zoom - 1}&"))


def test_the_minimap_frames_the_view_and_moves_it(page):
    open_view(page, "odd", 700, 800, 0, "")
    box = page.locator(".minimap").bounding_box()
    frame = page.locator(".minimap .frame").bounding_box()
    scale = box["width"] / 1901
    centre = [
        frame[start] + frame[side] / 2 - box[start]
        for start, side in (("x", "width"), ("y", "height"))
    ]
    # the view reaches beyond neither edge in x
    assert centre[0] / scale == pytest.approx(700, abs=20)
    page.mouse.click(box["x"] + 1300 * scale, box["y"] + 500 * scale)
    page.wait_for_url(re.compile(r"x=1(29|30|31)\d&y=(49|50|51)\d&"))


def test_values_under_the_pointer_are_those_of_its_cell(page):
    shown = open_view(page, "odd", 700, 800, 0, "")
    x, y = corner(shown, 700, 800, 0)
    box = page.locator("#map").bounding_box()
    page.mouse.move(box["x"] + 500 - x, box["y"] + 900 - y)
    values = page.locator("#pointer")
    cell = 128 * 0.5 / 0.3  # level-0 px
    place = f"row {int(900 // cell)}, column {int(500 // cell)}"
    expect(values).to_contain_text(place)
    expect(values).to_contain_text("x 150 µm, y 270 µm")


def rows(page: Any) -> list[str]:
    return page.locator("#slides tbody tr:not(.space) td.name").all_inner_texts()


def test_the_cohort_is_sorted_by_numbers_as_numbers(page):
    page.goto("/")
    page.wait_for_selector("#slides tbody td.name")
    assert rows(page) == ["bounded", "broken", "empty", "odd"]
    page.get_by_role("button", name="Sort by score, label").click()
    assert rows(page) == ["bounded", "empty", "odd", "broken"]
    page.get_by_role("button", name="Sort by score, label").click()
    assert rows(page) == ["odd", "empty", "bounded", "broken"]
    page.get_by_role("button", name="Sort by Patient").click()
    known = [name for name in rows(page) if name != "broken"]
    assert known == ["empty", "odd", "bounded"]  # P2, P9, P10
    # the address keeps the order
    page.reload()
    page.wait_for_selector("#slides tbody td.name")
    assert page.locator("th[aria-sort=ascending]").inner_text().strip() == "Patient"


def test_the_cohort_is_searched_and_filtered(page):
    page.goto("/")
    page.wait_for_selector("#slides tbody td.name")
    page.get_by_label("Search").fill("P9 10.25")
    expect(page.locator("#slides td.name")).to_have_count(1)
    assert rows(page) == ["odd"]
    assert page.locator("#count").inner_text() == "1 of 4 slides"
    page.get_by_label("Search").fill("")
    page.get_by_role("combobox", name="Split").select_option("test")
    expect(page.locator("#slides td.name")).to_have_count(1)
    assert rows(page) == ["empty"]


def test_a_broken_slide_has_its_reason_and_remedy(seen):
    page = seen.page
    page.goto("/#state=failed")
    page.wait_for_selector("#slides tbody td.name")
    assert rows(page) == ["broken"]
    reason = page.locator("#slides td.reason strong").inner_text()
    remedy = page.locator("#slides td.reason span").inner_text()
    assert reason
    assert remedy
    page.get_by_role("link", name="broken").click()
    message = page.get_by_role("alert")
    message.wait_for()
    assert remedy in message.inner_text()
    assert "/" not in message.inner_text()  # no path


def test_an_id_that_the_study_lacks_is_an_error_with_a_remedy(seen):
    seen.page.goto("/slide/%3Cimg%20src=x%3E")
    message = seen.page.get_by_role("alert")
    message.wait_for()
    assert "no such slide" in message.inner_text()
    assert seen.page.locator("h1").inner_text() == "<img src=x>"


def slide_row(number: int) -> dict[str, Any]:
    return {
        "slide": f"slide-{number:05d}",
        "patient": f"patient-{number // 2}",
        "split": "cv",
        "exclude": None,
        "organ": None,
        "thumbnail": None,
        "quality": {"flags": []},
        "labels": {"score": number % 97},
        "predictions": {"score": {"value": number % 89, "encoder": "colour", "seen": False}},
        "failed": None,
    }


def test_a_table_of_10000_slides_draws_what_is_visible(page):
    body = json.dumps([slide_row(number) for number in range(10_000)])
    page.route(
        "**/api/slides", lambda route: route.fulfill(body=body, content_type="application/json")
    )
    page.goto("/")
    page.wait_for_selector("#slides tbody td.name")
    assert page.locator("#count").inner_text() == "10,000 slides"
    assert len(rows(page)) < 60
    page.evaluate("document.getElementById('frame').scrollTop = 5000 * 56")
    page.get_by_role("link", name="slide-05003").wait_for()
    assert len(rows(page)) < 60
    page.evaluate("document.getElementById('frame').scrollTop = 1e9")
    page.get_by_role("link", name="slide-09999").wait_for()
    page.get_by_role("button", name="Sort by score, predicted").click()
    page.get_by_role("link", name="slide-00089").wait_for()
    page.get_by_label("Search").fill("05003")
    expect(page.locator("#slides td.name")).to_have_count(1)
    assert rows(page) == ["slide-05003"]

"""The pages of targets, of two encoders, and the drawing of regions, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nic_core.tiling.annotations import read_annotations
from tests.view.test_browser import CHROMIUM, SIZE, WAIT_MS, chromium, playwright, served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]
expect = playwright.expect
SLIDE = "demo-01-1"
__all__ = ["chromium"]  # the fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("drawn")


@pytest.fixture(scope="module")
def address(viewed_study, folder) -> Iterator[str]:
    from nic_core.view.server import application

    with served(application(viewed_study, annotate=folder)) as url:
        yield url


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Any]:
    context = chromium.new_context(viewport=SIZE, base_url=address)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    yield page
    context.close()
    assert not faults


def point_of_first_unit(page: Any) -> tuple[float, float]:
    """Place of a plot's first point on the screen."""
    x, y = page.evaluate(
        """() => {
            const document = Bokeh.documents[0];
            const view = Bokeh.index.find_one(document.roots()[0]);
            const { data } = document.get_model_by_name("units");
            const { left, top } = view.canvas_view.el.getBoundingClientRect();
            const { x_scale, y_scale } = view.frame;
            return [left + x_scale.compute([...data.x][0]), top + y_scale.compute([...data.y][0])];
        }"""
    )
    return x, y


def test_a_click_on_a_point_opens_the_hottest_cell(page, address):
    page.goto("/target/growth")
    expect(page.locator("figcaption").first).to_contain_text("AUC")
    page.wait_for_function("() => globalThis.Bokeh?.documents.length >= 2")
    page.wait_for_function(
        "() => Bokeh.index.find_one(Bokeh.documents[0].roots()[0])?.frame?.x_scale"
    )
    page.wait_for_load_state("networkidle")
    unit = page.evaluate("Bokeh.documents[0].get_model_by_name('units').data.unit[0]")
    hottest = page.request.get(
        "/api/targets/growth/hottest", params={"encoder": "mean-rgb", "unit": unit}
    ).json()
    page.mouse.click(*point_of_first_unit(page))
    page.wait_for_url("**/slide/**")
    place = f"#x={round(hottest['x'])}&y={round(hottest['y'])}&zoom=-1"
    assert page.url.startswith(f"{address}/slide/{hottest['slide']}{place}")
    assert "heat.growth.mean-rgb:0.5" in page.url
    expect(page.locator(".leaflet-image-layer[src*='layers/heat.growth']")).to_be_visible()


def test_both_encoders_keep_one_place_and_zoom(page):
    page.goto(f"/compare/{SLIDE}?left=mean-rgb&right=mean-rgb#x=500&y=400&zoom=-1&layers=")
    images = page.locator(".side .leaflet-image-layer[src*='layers/grid.mean-rgb']")
    expect(images).to_have_count(2)
    left, right = (page.locator(".side [data-map]").nth(side) for side in (0, 1))
    box = left.bounding_box()
    centre = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*centre)
    page.mouse.down()
    page.mouse.move(centre[0] - 60, centre[1] - 30, steps=4)
    page.mouse.up()
    left.get_by_title("Zoom in").click()
    page.wait_for_function("() => location.hash.includes('zoom=0&')")
    page.wait_for_timeout(500)  # the animation of the zoom
    corners = [
        (image.bounding_box()["x"] - side.bounding_box()["x"], image.bounding_box()["y"])
        for image, side in zip(images.all(), (left, right), strict=True)
    ]
    assert corners[0] == pytest.approx(corners[1], abs=1)


def test_an_encoder_without_a_picture_is_named(page):
    page.goto(f"/compare/{SLIDE}?left=mean-rgb&right=mtl-4")
    expect(page.locator(".side").nth(1)).to_contain_text("No grid with colours by mtl-4")


def test_a_drawn_rectangle_is_saved_where_it_was_drawn(page, folder):
    # centre of the map at 512, 512, and two screen px for a px of the slide
    page.goto(f"/slide/{SLIDE}#x=512&y=512&zoom=1&layers=tissue:1")
    page.locator("#region-label").fill("tumour")
    page.get_by_role("button", name="Rectangle").click()
    box = page.locator("#map").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.click(x - 100, y - 60)
    page.mouse.move(x, y)
    page.mouse.click(x + 140, y + 80)
    expect(page.locator("#annotate [role=status]")).to_contain_text("Saved: 1 region")
    [region] = read_annotations(folder / f"{SLIDE}.geojson").regions
    assert region.label == "tumour"
    assert region.shape.bounds == pytest.approx((462, 482, 582, 552), abs=1)
    page.reload()
    expect(page.locator(".regions li")).to_have_count(1)
    # a click that draws searches no similar cells
    expect(page.locator("#similar")).to_contain_text("Click a cell")
    page.get_by_role("button", name="Remove region 1, tumour").click()
    expect(page.locator("#annotate [role=status]")).to_contain_text("Saved: 0 regions")


def test_a_polygon_that_crosses_itself_is_refused(page, folder):
    page.goto(f"/slide/{SLIDE}#x=512&y=512&zoom=0&layers=")
    page.locator("#region-label").fill("knot")
    page.get_by_role("button", name="Polygon").click()
    box = page.locator("#map").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for right, down in ((-100, -100), (100, 100), (100, -100), (-100, 100)):
        page.mouse.click(x + right, y + down, delay=10)
        page.wait_for_timeout(350)  # a quick second click would close the polygon
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("crosses itself")
    expect(page.locator(".regions li")).to_have_count(0)

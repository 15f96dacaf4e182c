"""The server of the viewer: what each address answers, what it refuses, and its limits."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import polars as pl
import pytest
import shapely
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient
from typer.testing import CliRunner

from nic_core import steps
from nic_core.cli import app
from nic_core.grids import open_grid
from nic_core.grids.preview import colour_cells, read_colours
from nic_core.maps.heatmaps import read_heatmap
from nic_core.slides import open_slide
from nic_core.steps.slide_models import PREDICTIONS
from nic_core.store import GridKey, ModelKey, PatchTableKey, Store
from nic_core.tiling.tissue import TissueMask
from nic_core.view import slides as view_slides
from nic_core.view.cache import AnswerCache, FileCache
from nic_core.view.errors import without_paths
from nic_core.view.server import application
from nic_core.view.study import ViewedStudy, open_study
from tests.slides.conftest import paint, write_tiff
from tests.slides.vendors import write_mirax
from tests.view.conftest import plain_study

view_command = sys.modules["nic_core.cli.view"]  # the package has the function under this name
SLIDE = "demo-01-1"
JPEG_ERROR = 12  # grey levels; mean error of a tile by its compression, and more is another place


def browser(study: ViewedStudy, **options) -> TestClient:
    """A client whose requests come from this machine."""
    return TestClient(application(study, **options), base_url="http://127.0.0.1")


@pytest.fixture(scope="module")
def client(viewed_study) -> TestClient:
    return browser(viewed_study)


def picture(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def layer(client: TestClient, name: str, slide: str = SLIDE) -> dict:
    layers = client.get(f"/api/slides/{slide}").json()["layers"]
    return next(found for found in layers if found["id"] == name)


def content(client: TestClient, name: str, slide: str = SLIDE) -> bytes:
    answer = client.get(layer(client, name, slide)["url"])
    assert answer.status_code == 200, answer.text
    return answer.content


# --- the study and its slides ----------------------------------------------------------------


def test_the_study_lists_encoders_targets_and_maps(client, viewed_study):
    found = client.get("/api/study").json()
    assert [entry["name"] for entry in found["encoders"]] == ["mean-rgb", "mtl-4"]
    kinds = {target["name"]: target["kind"] for target in found["targets"]}
    assert kinds == {
        "proliferation": "regression",
        "growth": "classification",
        "survival": "survival",
    }
    assert found["targets"][1]["encoders"] == ["mean-rgb"]
    assert found["maps"] == [{"name": "tumour", "classes": [viewed_study.cohort.maps[0].label]}]
    assert found["annotate"] is False


def test_each_slide_has_its_label_and_its_held_out_prediction(client, viewed_study):
    rows = {row["slide"]: row for row in client.get("/api/slides").json()}
    key = ModelKey(encoder="mean-rgb", target="proliferation")
    stored = pl.read_parquet(viewed_study.store.slide_model(key) / PREDICTIONS)
    assert len(rows) == 12
    for row in stored.filter(model="network").iter_rows(named=True):
        shown = rows[row["unit"]]
        assert shown["labels"]["proliferation"] == pytest.approx(row["y"])
        found = shown["predictions"]["proliferation"]
        assert found["value"] == pytest.approx(row["prediction"])
        assert found["error"] == pytest.approx(row["prediction"] - row["y"])
        assert found["seen"] is False
    growth = rows[SLIDE]["predictions"]["growth"]
    assert growth["class"] in ("replacement", "desmoplastic")
    assert 0.5 <= growth["value"] <= 1
    right = growth["class"] == rows[SLIDE]["labels"]["growth"]
    assert growth["error"] == pytest.approx(1 - growth["value"] if right else growth["value"])
    assert set(rows[SLIDE]["labels"]["survival"]) == {"time", "event"}


def test_a_slide_that_cannot_be_opened_is_listed_with_reason_and_remedy(tmp_path):
    good = write_tiff(tmp_path / "good.tif", paint(300, 400), mpp=0.5)
    (tmp_path / "bad one.svs").write_bytes(b"II*\0" + bytes(200))
    gone = tmp_path / "gone.tif"
    shutil.copy(good, gone)
    study = plain_study(tmp_path, {"good": good, "bad": tmp_path / "bad one.svs", "gone": gone})
    (tmp_path / "slides.csv").write_text((tmp_path / "slides.csv").read_text() + "new,no.tif,x\n")
    study = open_study(study.cohort, study.store)
    gone.unlink()
    answer = browser(study).get("/api/slides")
    failed = {row["slide"]: row["failed"] for row in answer.json()}
    assert set(failed) == {"bad", "gone", "good", "new"}
    assert failed["good"]["remedy"].startswith("materialize 'slide'")
    assert failed["gone"]["reason"].startswith("its file was moved or removed")
    assert failed["new"]["reason"] == "its slide file does not exist"
    assert failed["bad"]["reason"]
    assert all(found["remedy"] for found in failed.values())
    assert str(tmp_path) not in answer.text


def test_a_target_with_wrong_labels_is_listed_with_the_reason(viewed_study, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text(f"slide,score\n{SLIDE},high\n")
    cohort = viewed_study.cohort.model_copy(update={"labels": labels})
    client = browser(replace(viewed_study, cohort=cohort))
    problems = {t["name"]: t["problem"] for t in client.get("/api/study").json()["targets"]}
    assert "'high' is not a finite number" in problems["proliferation"]
    assert str(tmp_path) not in "".join(problems.values())
    assert not any(row["labels"] for row in client.get("/api/slides").json())


# --- tiles -----------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tile_shows_its_part_of_the_slide_and_white_beyond(client, viewed_study, data):
    about = client.get(f"/api/slides/{SLIDE}").json()
    zoom = data.draw(st.integers(about["min_zoom"], 0))
    side = 256 * 2**-zoom
    column, row = (
        data.draw(st.integers(0, (about[length] - 1) // side)) for length in ("width", "height")
    )
    tile = picture(client.get(f"/api/slides/{SLIDE}/tiles/{zoom}/{column}/{row}.jpg").content)
    with open_slide(Path(viewed_study.row(SLIDE)["path"])) as slide:
        expected = slide.read(column * side, row * side, 256, 256, slide.mpp * 2**-zoom)
    assert np.abs(tile - expected).mean() < JPEG_ERROR


def test_the_last_zoom_shows_the_whole_slide_in_one_tile(tmp_path):
    pixels = paint(333, 777)
    study = plain_study(
        tmp_path, {"odd": write_tiff(tmp_path / "odd.tif", pixels, mpp=0.31, pyramid=False)}
    )
    client = browser(study)
    about = client.get("/api/slides/odd").json()
    assert (about["width"], about["height"], about["min_zoom"]) == (777, 333, -2)
    assert about["mpp"] == pytest.approx(0.31)
    tile = picture(client.get("/api/slides/odd/tiles/-2/0/0.jpg").content)
    height, width = math.ceil(333 / 4), math.ceil(777 / 4)
    assert tile[height + 8 :].min() > 245
    assert tile[:, width + 8 :].min() > 245
    assert tile[: height - 8, : width - 8].mean() == pytest.approx(pixels.mean(), abs=4)
    assert client.get("/api/slides/odd/tiles/-2/1/0.jpg").status_code == 404
    assert client.get("/api/slides/odd/tiles/-3/0/0.jpg").status_code == 404
    assert client.get("/api/slides/odd/tiles/1/0/0.jpg").status_code == 404


def test_coordinates_count_from_level_0_of_a_slide_with_bounds(tmp_path):
    pixels = paint(1024, 1280)
    levels = [pixels, pixels[::2, ::2]]
    missing = range(0, 80, 10)  # the first 128 px were not scanned
    path = write_mirax(
        tmp_path / "bounds.mrxs", levels, 0.4, picture=paint(64, 64), missing=missing
    )
    client = browser(plain_study(tmp_path, {"bounds": path}))
    with open_slide(path) as slide:
        assert slide.bounds[:2] == (128, 0)
        expected = slide.read(512, 256, 256, 256, slide.mpp)
    assert client.get("/api/slides/bounds").json()["width"] == 1280
    tile = picture(client.get("/api/slides/bounds/tiles/0/2/1.jpg").content)
    assert np.abs(tile - expected).mean() < JPEG_ERROR


def test_an_overview_gives_the_tiles_that_the_file_gives(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "flat.tif", paint(1500, 2100), mpp=0.25, pyramid=False)
    monkeypatch.setattr(view_slides, "OVERVIEW_SIDE", 600)
    monkeypatch.setattr(view_slides, "DIRECT", 2)
    with open_slide(path) as slide:
        opened = view_slides.OpenedSlide("flat", (), slide)
        made = opened.read(Store(tmp_path), 1024, 512, 256, 4)
        expected = slide.read(1024, 512, 256, 256, slide.mpp * 4)
        assert [reduced.factor for reduced in opened._reduced] == [4]
    assert np.abs(made.astype(int) - expected).max() <= 1


def test_a_thumbnail_stands_for_a_slide_of_the_same_content_alone(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "flat.tif", paint(300, 2050), mpp=0.25, pyramid=False)
    study = plain_study(tmp_path, {"flat": path})
    steps.make_slide(study.store, "flat")
    monkeypatch.setattr(view_slides, "DIRECT", 2)
    with open_slide(path) as slide:
        opened = view_slides.OpenedSlide("flat", (), slide)
        made = opened.read(study.store, 0, 0, 256, 8)
        expected = slide.read(0, 0, 256, 256, slide.mpp * 8)
        assert [round(reduced.factor, 3) for reduced in opened._reduced] == [2.002]
    assert np.abs(made.astype(int) - expected).mean() < JPEG_ERROR
    write_tiff(path, paint(300, 2050, seed=1), mpp=0.25, pyramid=False)
    with open_slide(path) as slide:
        opened = view_slides.OpenedSlide("flat", (), slide)
        opened.read(study.store, 0, 0, 256, 8)
        assert [reduced.factor for reduced in opened._reduced] == [1]


def test_a_vanished_slide_is_gone_and_a_damaged_one_says_why(tmp_path):
    path = write_tiff(tmp_path / "slide one.tif", paint(300, 400), mpp=0.5)
    client = browser(plain_study(tmp_path, {"one": path}))
    url = "/api/slides/one/tiles/0/0/0.jpg"
    assert client.get(url).status_code == 200
    path.write_bytes(path.read_bytes()[:500])
    damaged = client.get(url)
    path.unlink()
    gone = client.get(url)
    assert (damaged.status_code, gone.status_code) == (422, 410)
    for answer in (damaged, gone):
        assert set(answer.json()) == {"error", "remedy"}
        assert "one.tif" not in answer.text


# --- layers ----------------------------------------------------------------------------------


def test_every_image_layer_lies_on_its_grid(client):
    for found in client.get(f"/api/slides/{SLIDE}").json()["layers"]:
        if found["kind"] == "image" and found["id"] != "labels":
            assert found["box"] == [0, 0, 1024, 1024]
            assert picture(client.get(found["url"]).content).shape == (8, 8, 4)


def test_the_tissue_outline_has_the_area_of_the_mask(client, viewed_study):
    [feature] = json.loads(content(client, "tissue"))["features"]
    record = steps.read_record(viewed_study.store, SLIDE)
    mask = TissueMask.load(viewed_study.store.slide(SLIDE) / "tissue.png", record.tissue_mpp)
    shape = shapely.from_geojson(json.dumps(feature["geometry"]))
    expected = mask.array.sum() * (mask.mpp / record.mpp) ** 2
    assert shape.is_valid
    assert shape.area == pytest.approx(expected, rel=0.05)


def test_the_patch_table_is_drawn_cell_by_cell(client, viewed_study):
    key = PatchTableKey(geometry="128px-0.5um", slide=SLIDE)
    kept = pl.read_parquet(viewed_study.store.patch_table(key))["kept"].to_numpy().reshape(8, 8)
    drawn = picture(content(client, "patches.128px-0.5um"))
    assert (kept == (drawn[..., 1] == 0x9E)).all()
    legend = layer(client, "patches.128px-0.5um")["legend"]
    assert legend["labels"][:2] == [f"kept ({kept.sum()})", f"background ({64 - kept.sum()})"]
    focus = picture(content(client, "focus.128px-0.5um"))
    assert ((focus[..., 3] == 255) == kept).all()


def test_the_grid_is_drawn_in_the_colours_of_the_cohort(client, viewed_study):
    store = viewed_study.store
    grid = open_grid(store.grid(GridKey(encoder="mean-rgb", slide=SLIDE)))
    drawn = picture(content(client, "grid.mean-rgb"))
    expected = colour_cells(grid, read_colours(store.embedding_colours("mean-rgb")))
    assert (drawn[grid.valid][:, :3] == expected[grid.valid]).all()
    assert ((drawn[..., 3] > 0) == grid.valid).all()


def test_heat_is_red_where_it_is_high_and_clear_without_an_embedding(client, viewed_study):
    key = ModelKey(encoder="mean-rgb", target="growth")
    heat = read_heatmap(viewed_study.store.explanation(key) / SLIDE)
    drawn = picture(content(client, "heat.growth.mean-rgb"))
    assert ((drawn[..., 3] > 0) == np.isfinite(heat)).all()
    strong = np.abs(heat) > 0.2 * np.nanmax(np.abs(heat))
    assert ((drawn[..., 0] > drawn[..., 2]) == (heat > 0))[strong].all()
    legend = layer(client, "heat.growth.mean-rgb")["legend"]
    assert legend["meaning"].startswith("Red cells speak for desmoplastic,")
    assert legend["low"] == -legend["high"]


def test_a_map_is_drawn_from_blue_0_to_red_1(client):
    drawn = picture(content(client, "map.tumour"))
    rows, columns = np.nonzero(drawn[..., 3])
    order = np.argsort(rows + columns)
    first, last = (drawn[rows[order[i]], columns[order[i]]] for i in (0, -1))
    assert first[2] > first[0]
    assert tuple(last[:3]) == (180, 4, 38)  # the end of matplotlib's coolwarm


def test_the_label_image_covers_the_slide_in_its_own_px(client, viewed_study):
    labels = np.asarray(Image.open(viewed_study.row(SLIDE)["truth"]))
    found = layer(client, "labels")
    drawn = picture(content(client, "labels"))
    assert found["box"] == [0, 0, 1024, 1024]
    assert ((drawn[..., 3] > 0) == (labels != 0)).all()
    values = sorted(set(labels.ravel().tolist()) - {0})
    assert [label.partition(":")[0] for label in found["legend"]["labels"]] == [
        str(value) for value in values
    ]


@pytest.mark.parametrize(("origin", "shift"), [("level0", 0), ("bounds", 128)])
def test_annotations_of_a_patch_task_lie_where_they_were_drawn(tmp_path, origin, shift):
    pixels = paint(1024, 1280)
    path = write_mirax(
        tmp_path / "bounds.mrxs",
        [pixels, pixels[::2, ::2]],
        0.4,
        picture=paint(64, 64),
        missing=range(0, 80, 10),
    )
    ring = [[10, 20], [110, 20], [110, 220], [10, 220], [10, 20]]
    feature = {
        "type": "Feature",
        "properties": {"classification": {"name": "gland"}},
        "geometry": {"type": "Polygon", "coordinates": [ring]},
    }
    (tmp_path / "drawn.geojson").write_text(json.dumps(feature))
    (tmp_path / "regions.csv").write_text(
        f"path,annotations,group,origin\nbounds.mrxs,drawn.geojson,a,{origin}\n"
    )
    more = (
        "patch_tasks:\n- name: glands\n  organ: colon\n  slides: {table: regions.csv}\n"
        "  classes: [stroma, gland]\n"
    )
    client = browser(plain_study(tmp_path, {"bounds": path}, more))
    [drawn] = json.loads(content(client, "annotations.glands", "bounds"))["features"]
    found = shapely.from_geojson(json.dumps(drawn["geometry"]))
    with open_slide(path) as slide:
        assert slide.bounds[:2] == (128, 0)
    assert found.equals(shapely.box(10 + shift, 20, 110 + shift, 220))
    legend = layer(client, "annotations.glands", "bounds")["legend"]
    assert legend["labels"] == ["gland"]
    assert legend["colours"] == [drawn["properties"]["colour"]]


def test_a_damaged_product_is_listed_with_the_reason(viewed_study, tmp_path):
    store = Store(tmp_path / "store")
    shutil.copytree(viewed_study.store.root / "slide_index", store.root / "slide_index")
    shutil.copytree(viewed_study.store.slide(SLIDE), store.slide(SLIDE))
    key = PatchTableKey(geometry="128px-0.5um", slide=SLIDE)
    store.patch_table(key).parent.mkdir(parents=True)
    store.patch_table(key).write_bytes(b"PAR1 no table")
    client = browser(open_study(viewed_study.cohort, store))
    legend = layer(client, "patches.128px-0.5um")["legend"]
    assert legend["meaning"].startswith("Cannot be read")
    answer = client.get(f"/api/slides/{SLIDE}/layers/patches.128px-0.5um")
    assert answer.status_code == 422
    assert str(tmp_path) not in answer.text + legend["meaning"]
    assert client.get(f"/api/slides/{SLIDE}/layers/tissue").status_code == 200


def test_a_layer_is_sent_again_only_if_it_changed(client):
    url = layer(client, "grid.mean-rgb")["url"]
    tag = client.get(url).headers["etag"]
    assert client.get(url, headers={"if-none-match": tag}).status_code == 304
    assert client.get(url, headers={"if-none-match": '"other"'}).status_code == 200


# --- values under a point --------------------------------------------------------------------


def test_values_under_a_point_are_those_of_its_cell(client, viewed_study):
    store = viewed_study.store
    heat = read_heatmap(store.explanation(ModelKey(encoder="mean-rgb", target="growth")) / SLIDE)
    row, column = np.argwhere(np.isfinite(heat))[3].tolist()
    x, y = column * 128 + 100, row * 128 + 3
    found = client.get(f"/api/slides/{SLIDE}/at", params={"x": x, "y": y}).json()
    assert (found["x_um"], found["y_um"]) == (x / 2, y / 2)
    table = pl.read_parquet(store.patch_table(PatchTableKey(geometry="128px-0.5um", slide=SLIDE)))
    cell = table.filter(row=row, column=column).row(0, named=True)
    patch = found["patch"]["128px-0.5um"]
    assert patch["kept"] is True
    assert patch["focus"] == pytest.approx(cell["focus"])
    assert patch["tissue"] == pytest.approx(cell["tissue"])
    assert found["grids"]["mean-rgb"] == {"row": row, "column": column}
    assert found["heat"]["heat.growth.mean-rgb"] == pytest.approx(float(heat[row, column]))
    assert 0 <= found["maps"]["tumour"]["tumor"] <= 1


def test_a_point_beyond_the_slide_has_no_values(client):
    for x, y in ((-1, 5), (5, 1e8), (-1e8, -1e8)):
        found = client.get(f"/api/slides/{SLIDE}/at", params={"x": x, "y": y}).json()
        assert not any(found[name] for name in ("patch", "grids", "maps", "heat", "label"))


# --- what is refused -------------------------------------------------------------------------

ODD = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["..", "../..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "1e9", "NaN", "-0", "０"]
    ),
    st.integers(-(10**40), 10**40).map(str),
)
SHAPES = [
    "/api/slides/{0}",
    "/api/slides/{0}/tiles/{1}/{2}/{3}.jpg",
    "/api/slides/demo-01-1/tiles/{1}/{2}/{3}.jpg",
    "/api/slides/{0}/layers/{1}",
    "/api/slides/demo-01-1/layers/{0}",
    "/api/slides/demo-01-1/at?x={0}&y={1}",
    "/api/slides/demo-01-1/thumbnail.jpg?side={0}",
    "/static/{0}/{1}",
    "/static/leaflet/{0}",
    "/{0}/{1}",
]


@given(st.sampled_from(SHAPES), st.lists(ODD, min_size=4, max_size=4))
@example(SHAPES[1], ["demo-01-1", "-99999999999", "0", "0"])
@example(SHAPES[2], ["", "0", "99999999999", "0"])
@example(SHAPES[7], ["..", "server.py", "", ""])
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_address_fails_the_server_or_shows_a_path(client, viewed_study, shape, parts):
    answer = client.get(shape.format(*(quote(part) for part in parts)))
    assert answer.status_code < 500
    if answer.status_code >= 400:
        assert set(answer.json()) == {"error", "remedy"}
    assert str(viewed_study.store.root) not in answer.text
    assert "root:" not in answer.text
    assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_nothing_can_be_changed(client):
    for method in ("post", "put", "delete", "patch"):
        for url in ("/api/study", "/api/slides", f"/api/slides/{SLIDE}", "/static/view.css"):
            assert getattr(client, method)(url).status_code in (404, 405)


def test_other_hosts_are_refused_without_a_token(viewed_study):
    client = TestClient(application(viewed_study), base_url="http://attacker.example")
    assert client.get("/api/study").status_code == 400


def test_a_token_is_asked_for_once_and_kept_in_a_cookie(viewed_study):
    client = TestClient(application(viewed_study, token="secret"), base_url="http://host.example")
    assert client.get("/api/study").status_code == 401
    assert client.get("/api/study", params={"token": "wrong"}).status_code == 401
    first = client.get("/api/study", params={"token": "secret"}, follow_redirects=False)
    assert first.status_code == 303
    assert "token" not in first.headers["location"]
    assert "httponly" in first.headers["set-cookie"].lower()
    assert client.get("/api/study").status_code == 200


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("path /data/a b/c.svs does not exist", "path the file does not exist"),
        ("C:\\slides\\one.svs cannot be read", "the file cannot be read"),
        ("its um/px is unknown", "its um/px is unknown"),
        ("0.5 um/px and 1/2", "0.5 um/px and 1/2"),
        ("see /tmp/x/y: damaged", "see the file: damaged"),
    ],
)
def test_messages_are_shown_without_paths(text, shown):
    assert without_paths(text, ["/data/a b/c.svs"]) == shown


# --- limits ----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 9), st.binary(max_size=40)), max_size=60))
def test_a_cache_of_answers_keeps_to_its_size_and_returns_what_was_put(items):
    cache = AnswerCache(100)
    last = {}
    for key, value in items:
        cache.put(key, value)
        last[key] = value
        assert cache.held <= 100
    for key in last:
        assert cache.get(key) in (None, last[key])
    assert cache.held == sum(len(cache.get(key) or b"") for key in last)


def test_a_file_is_read_again_when_it_changed(tmp_path):
    path, cache = tmp_path / "file", FileCache(2)
    path.write_text("one")
    reads = []

    def read() -> str:
        reads.append(path.read_text())
        return reads[-1]

    assert [cache.get(path, read), cache.get(path, read)] == ["one", "one"]
    path.write_text("other")
    assert cache.get(path, read) == "other"
    assert reads == ["one", "other"]


# --- the command -----------------------------------------------------------------------------


def test_another_host_needs_a_token():
    done = CliRunner().invoke(app, ["view", "--host", "0.0.0.0"])
    assert done.exit_code == 2
    assert "--token" in done.output


def test_a_port_in_use_is_refused_in_one_line(viewed_study, monkeypatch):
    monkeypatch.setattr("nic_core.cohort.load_cohort", lambda path: viewed_study.cohort)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        store = str(viewed_study.store.root)
        done = CliRunner().invoke(app, ["view", "--store", store, "--port", port])
    assert done.exit_code == 2
    assert "choose another port" in done.output


def test_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(view_command, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["view"])
    assert done.exit_code == 1
    assert "pip install 'nic-pathology[view]'" in re.sub(r"\s+", " ", done.output)

"""Regions drawn in the viewer: saved for patch tasks, never over another program's file."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient

from nic_core.cohort import AnnotatedSlides, PatchTask
from nic_core.encoders.patch_sources import open_source
from nic_core.tiling.annotations import read_annotations
from nic_core.view.regions import MAX_BODY, TABLE
from nic_core.view.server import application

HOST = "http://127.0.0.1"
SLIDES = ("demo-01-1", "demo-02-1", "demo-03-1")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "annotations"


@pytest.fixture
def client(viewed_study, folder):
    return TestClient(application(viewed_study, annotate=folder), base_url=HOST)


def region(label="tumour", ring=((100, 100), (900, 100), (900, 900), (100, 900))):
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [[*map(list, ring), list(ring[0])]]},
        "properties": {"objectType": "annotation", "classification": {"name": label}},
    }


def post(client, slide, features, version="", **headers):
    headers = {"origin": HOST, "content-type": "application/json"} | headers
    body = json.dumps({"version": version, "features": features})
    return client.post(f"/api/slides/{slide}/regions", content=body, headers=headers)


def saved(client, slide=SLIDES[0]):
    return client.get(f"/api/slides/{slide}/regions").json()


def test_saved_regions_are_read_again(client):
    assert saved(client) == {"version": "", "features": []}
    answer = post(client, SLIDES[0], [region(), region("stroma", ((10, 10), (50, 10), (30, 60)))])
    assert answer.status_code == 200
    assert answer.json() == saved(client)
    labels = [f["properties"]["classification"]["name"] for f in answer.json()["features"]]
    assert labels == ["tumour", "stroma"]


def test_drawn_regions_are_a_patch_task(client, folder, viewed_study):
    for slide in SLIDES:
        left = region("left", ((0, 0), (512, 0), (512, 1024), (0, 1024)))
        right = region("right", ((512, 0), (1024, 0), (1024, 1024), (512, 1024)))
        assert post(client, slide, [left, right]).status_code == 200
    task = PatchTask(
        name="drawn",
        organ="colon",
        group_column="patient",
        slides=AnnotatedSlides(table=folder / TABLE),
    )
    with open_source(task, patch=128, mpp=0.5, tissue=0.6, seed=0) as source:
        listing = source.listing
    assert set(listing["label"]) == {"left", "right"}
    assert listing["group"].n_unique() == len(
        {viewed_study.row(slide)["patient"] for slide in SLIDES}
    )
    # the middle of the slide divides the labels
    assert listing.filter(label="left")["x"].max() < 512
    assert listing.filter(label="right")["x"].min() >= 512 - 64


def test_a_slide_without_regions_leaves_the_table(client, folder):
    version = post(client, SLIDES[0], [region()]).json()["version"]
    post(client, SLIDES[1], [region()])
    assert post(client, SLIDES[0], [], version).status_code == 200
    lines = (folder / TABLE).read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["slide", SLIDES[1]]


def test_what_was_saved_before_is_kept(client, folder):
    first = post(client, SLIDES[0], [region("first")]).json()
    second = post(client, SLIDES[0], [region("second")], first["version"]).json()
    post(client, SLIDES[0], [region("third")], second["version"])
    kept = [folder / "versions" / f"{SLIDES[0]}.{number}.geojson" for number in (1, 2)]
    assert [read_annotations(path).regions[0].label for path in kept] == ["first", "second"]


def test_two_pages_do_not_overwrite_each_other(client):
    post(client, SLIDES[0], [region("of one page")])
    answer = post(client, SLIDES[0], [region("of another")])
    assert answer.status_code == 409
    assert "changed since" in answer.json()["error"]
    assert saved(client)["features"][0]["properties"]["classification"]["name"] == "of one page"


@pytest.mark.parametrize("name", [f"{SLIDES[0]}.geojson", TABLE])
def test_a_file_of_another_program_is_never_replaced(client, folder, name):
    folder.mkdir()
    (folder / name).write_text("of another program")
    answer = post(client, SLIDES[0], [region()])
    assert answer.status_code == 409
    assert "another program" in answer.json()["error"]
    assert (folder / name).read_text() == "of another program"


def test_a_file_that_was_edited_is_never_replaced(client, folder):
    version = post(client, SLIDES[0], [region()]).json()["version"]
    path = folder / f"{SLIDES[0]}.geojson"
    path.write_text(path.read_text().replace("tumour", "edited"))
    assert post(client, SLIDES[0], [], version).status_code == 409
    assert client.get(f"/api/slides/{SLIDES[0]}/regions").status_code == 409
    assert "edited" in path.read_text()


def test_a_link_is_never_followed(client, folder, tmp_path):
    folder.mkdir()
    (folder / f"{SLIDES[0]}.geojson").symlink_to(tmp_path / "elsewhere.geojson")
    assert post(client, SLIDES[0], [region()]).status_code == 409
    assert not (tmp_path / "elsewhere.geojson").exists()


@pytest.mark.parametrize(
    "features",
    [
        [region("")],
        [region("   ")],
        [region("a\nb")],
        [region("x" * 81)],
        [region(ring=((0, 0), (10, 10)))],
        [region(ring=((0, 0), (90, 90), (90, 0), (0, 90)))],  # crosses itself
        [region(ring=((0, 0), (50, 50), (90, 90)))],  # has no area
        [region(ring=((-1, 0), (90, 0), (90, 90)))],
        [region(ring=((0, 0), (5000, 0), (90, 90)))],
        [region(ring=((0, 0), (float("nan"), 0), (90, 90)))],
        [region(ring=((0, 0), ("90", 0), (90, 90)))],
        [{**region(), "geometry": {"type": "Point", "coordinates": [1, 1]}}],
        [{**region(), "properties": {}}],
        [{**region(), "id": "../../other"}],
        "no list",
        [None],
    ],
)
def test_invalid_regions_are_refused_and_not_saved(client, folder, features):
    answer = post(client, SLIDES[0], features)
    assert answer.status_code == 400
    assert answer.json()["error"]
    assert answer.json()["remedy"]
    assert not folder.exists()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_requests_of_other_sites_are_refused(client, folder, headers, status):
    assert post(client, SLIDES[0], [region()], **headers).status_code == status
    assert not folder.exists()


def test_a_request_without_an_origin_is_refused(client):
    headers = {"content-type": "application/json"}
    answer = client.post(f"/api/slides/{SLIDES[0]}/regions", content="{}", headers=headers)
    assert answer.status_code == 403


def test_a_long_request_is_refused(client):
    assert post(client, SLIDES[0], [], "x" * MAX_BODY).status_code == 413


def test_an_unknown_slide_is_refused(client, folder):
    for slide in ("other", "..%2Fother"):
        assert post(client, slide, [region()]).status_code == 404
    assert not folder.exists()


def test_without_a_folder_nothing_can_be_drawn(viewed_study):
    client = TestClient(application(viewed_study), base_url=HOST)
    assert post(client, SLIDES[0], [region()]).status_code == 404
    assert client.get(f"/api/slides/{SLIDES[0]}/regions").status_code == 404

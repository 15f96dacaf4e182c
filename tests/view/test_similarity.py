"""Similar cells, target plots and their hottest cells, as the viewer's server answers them."""

from __future__ import annotations

import io
import json

import numpy as np
import polars as pl
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score
from starlette.testclient import TestClient

from nic_core.grids import open_grid
from nic_core.maps.heatmaps import read_heatmap
from nic_core.models.cross_validation import NETWORK
from nic_core.models.metrics import high_risk
from nic_core.models.plots import RED
from nic_core.slides import open_slide
from nic_core.steps.slide_models import PREDICTIONS
from nic_core.store import GridKey, ModelKey
from nic_core.view.server import application
from nic_core.view.targets import UNITS

ENCODER = "mean-rgb"
JPEG_ERROR = 12  # grey levels, mean over a picture


@pytest.fixture(scope="module")
def client(viewed_study) -> TestClient:
    return TestClient(application(viewed_study), base_url="http://127.0.0.1")


@pytest.fixture(scope="module")
def query(viewed_study):
    """A slide and one of its cells."""
    slide = next(iter(viewed_study.index()))
    grid = open_grid(viewed_study.store.grid(GridKey(encoder=ENCODER, slide=slide)))
    row, column = map(int, np.argwhere(grid.valid)[len(np.argwhere(grid.valid)) // 2])
    return slide, row, column


def similar(client, slide, **asked):
    return client.get(f"/api/slides/{slide}/similar", params=asked)


def test_similar_cells_are_those_of_the_most_alike_colours(client, viewed_study, query):
    slide, row, column = query
    found = similar(client, slide, encoder=ENCODER, row=row, column=column, count=5).json()
    grids = {
        name: open_grid(viewed_study.store.grid(GridKey(encoder=ENCODER, slide=name)))
        for name in viewed_study.index()
    }
    assert found["cells_searched"] == sum(int(grid.valid.sum()) for grid in grids.values())
    cells = np.concatenate(
        [np.asarray(g.embeddings[:])[:, g.valid].T.astype(float) for g in grids.values()]
    )
    mean = cells.mean(axis=0)
    asked = np.asarray(grids[slide].embeddings[:, row, column]).astype(float) - mean
    for cell in found["cells"]:
        other = np.asarray(grids[cell["slide"]].embeddings[:, cell["row"], cell["column"]]) - mean
        cosine = asked @ other / np.linalg.norm(asked) / np.linalg.norm(other)
        assert cell["similarity"] == pytest.approx(cosine, abs=1e-4)
    similarities = [cell["similarity"] for cell in found["cells"]]
    assert similarities == sorted(similarities, reverse=True)
    assert set(found["cells"][0]["labels"]) == {"proliferation", "growth", "survival"}


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"encoder": "other", "row": 1, "column": 1}, 404),
        ({"encoder": ENCODER, "row": 100_000, "column": 1}, 404),
        ({"encoder": ENCODER, "row": -1, "column": 1}, 400),
        ({"encoder": ENCODER, "row": "1e3", "column": 1}, 400),
        ({"encoder": ENCODER, "row": 1}, 400),
        ({"encoder": ENCODER, "row": 1, "column": 1, "count": 101}, 400),
        ({"encoder": "mtl-4", "row": 1, "column": 1}, 404),  # has no grid manifest
    ],
)
def test_wrong_searches_get_a_reason_and_a_remedy(client, query, asked, status):
    answer = similar(client, query[0], **asked)
    assert answer.status_code == status
    assert answer.json()["error"]
    assert answer.json()["remedy"]


def test_a_patch_shows_the_pixels_around_its_centre(client, viewed_study, query):
    slide, *_ = query
    place = {"x": 300, "y": 420.5, "size": 128, "px": 64}
    answer = client.get(f"/api/slides/{slide}/patch", params=place)
    shown = np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)
    with open_slide(viewed_study.row(slide)["path"]) as opened:
        expected = opened.read(236, 356.5, 64, 64, 2 * opened.mpp)
    assert np.abs(shown - expected).mean() < JPEG_ERROR


@pytest.mark.parametrize(
    ("place", "status"),
    [
        ({"x": 10, "y": 10, "size": 1e9}, 400),
        ({"x": 10, "y": 10, "size": 0}, 400),
        ({"x": "nan", "y": 10, "size": 10}, 400),
        ({"x": 10, "y": 10, "size": 10, "px": 100_000}, 400),
        ({"x": 1e7, "y": 10, "size": 10}, 404),
    ],
)
def test_patches_out_of_range_are_refused(client, query, place, status):
    assert client.get(f"/api/slides/{query[0]}/patch", params=place).status_code == status


def models_of(item):
    """Attributes of all Bokeh models in an encoded plot, by name of the model."""
    found = []

    def visit(value):
        if isinstance(value, dict):
            if value.get("type") == "object" and "attributes" in value:
                found.append((value["name"], value["attributes"]))
            for part in value.values():
                visit(part)
        elif isinstance(value, list):
            for part in value:
                visit(part)

    visit(item["doc"])
    return found


def points_of(item):
    """The columns of the points of a plot that can be clicked."""
    [data] = [
        attributes["data"] for _, attributes in models_of(item) if attributes.get("name") == UNITS
    ]
    return dict(data["entries"])


def held_out(study, target):
    path = study.store.slide_model(ModelKey(encoder=ENCODER, target=target)) / PREDICTIONS
    return pl.read_parquet(path).filter(model=NETWORK, split="cv")


def plot(client, target, title):
    found = client.get(f"/api/targets/{target}").json()
    assert found["encoders"] == [ENCODER]
    return next(entry for entry in found["items"] if entry["title"].startswith(title))


def test_points_of_the_roc_curve_enclose_its_auc(client, viewed_study):
    entry = plot(client, "growth", "cross-validated")
    rows = held_out(viewed_study, "growth")
    points = points_of(entry["item"])
    assert points["unit"] == rows["unit"].to_list()
    x, y = np.array(points["x"]), np.array(points["y"])
    order = np.lexsort((y, x))
    area = np.trapezoid(np.r_[0, y[order], 1], np.r_[0, x[order], 1])
    auc = roc_auc_score(rows["y"], rows["probability_desmoplastic"])
    assert area == pytest.approx(auc)
    assert f"AUC {auc:.2f}" in entry["title"]


def test_points_of_a_scatter_plot_are_label_and_prediction(client, viewed_study):
    rows = held_out(viewed_study, "proliferation")
    points = points_of(plot(client, "proliferation", "cross-validated")["item"])
    assert points["x"] == pytest.approx(rows["y"].to_numpy())
    assert points["y"] == pytest.approx(rows["prediction"].to_numpy())


def test_points_of_survival_are_coloured_by_risk_group(client, viewed_study):
    rows = held_out(viewed_study, "survival")
    points = points_of(plot(client, "survival", "cross-validated")["item"])
    assert points["x"] == pytest.approx(rows["time"].to_numpy())
    red = [colour == RED for colour in points["colour"]]
    assert red == high_risk(rows["risk"].to_numpy()).tolist()


def test_every_target_has_a_calibration_plot(client, viewed_study):
    for target in viewed_study.cohort.targets:
        entry = plot(client, target.name, "calibration")
        assert len(json.dumps(entry["item"])) > 1000


def test_a_unit_opens_at_the_cell_of_highest_heat(client, viewed_study):
    rows = held_out(viewed_study, "growth")
    unit, [slide] = rows.select("unit", "slides").row(0)
    answer = client.get(
        "/api/targets/growth/hottest", params={"encoder": ENCODER, "unit": unit}
    ).json()
    key = ModelKey(encoder=ENCODER, target="growth")
    heat = read_heatmap(viewed_study.store.explanation(key) / slide)
    row, column = np.argwhere(heat == np.nanmax(heat))[0]
    about = open_grid(viewed_study.store.grid(GridKey(encoder=ENCODER, slide=slide))).provenance
    assert answer["slide"] == slide
    assert answer["x"] == about.origin[0] + (column + 0.5) * about.cell
    assert answer["y"] == about.origin[1] + (row + 0.5) * about.cell
    layers = client.get(f"/api/slides/{slide}").json()["layers"]
    assert answer["layer"] in [layer["id"] for layer in layers]


def test_without_an_explanation_a_unit_opens_its_slide(client, viewed_study):
    unit, slides = held_out(viewed_study, "survival").select("unit", "slides").row(0)
    asked = {"encoder": ENCODER, "unit": unit}
    answer = client.get("/api/targets/survival/hottest", params=asked).json()
    assert answer == {"slide": slides[0], "x": None, "y": None, "layer": None}


@pytest.mark.parametrize(
    "address",
    [
        "/api/targets/other",
        "/api/targets/growth/hottest?encoder=mtl-4&unit=x",
        "/api/targets/growth/hottest?encoder=mean-rgb&unit=x",
        "/api/targets/other/hottest?encoder=mean-rgb&unit=x",
    ],
)
def test_unknown_targets_models_and_units_are_404(client, address):
    answer = client.get(address)
    assert answer.status_code == 404
    assert answer.json()["remedy"]

"""Prediction of new slides, by the library and by ``nic predict``; the model file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from nic_core import steps
from nic_core.cli import app
from nic_core.cohort import Cohort, CohortError
from nic_core.cohort.index import row_source
from nic_core.encoders import load_encoder
from nic_core.grids import Grid, open_grid, write_grid
from nic_core.models.cross_validation import NETWORK
from nic_core.models.files import (
    ModelFileError,
    load_model,
    metrics_frame,
    read_model_card,
    training_cohort,
)
from nic_core.models.kinds import kind_of
from nic_core.models.prediction import (
    ModelMismatchError,
    check_grid,
    predict_grids,
    predict_slides,
    read_patients,
)
from nic_core.models.slide_table import SlideTableError, predict_table, read_slide_table
from nic_core.reports import slide_model_card
from nic_core.slides import SlideSource
from nic_core.steps.slide_models import PREDICTIONS
from nic_core.store import GridKey, ModelKey, Store

pytestmark = pytest.mark.slow

ENCODER = "mean-rgb"
TARGETS = ("proliferation", "growth", "survival")


@pytest.fixture(scope="module")
def study(mean_rgb_study) -> tuple[Cohort, Store]:
    """The model of every target on grids of mean colours."""
    return mean_rgb_study


def split(store: Store, name: str) -> dict[str, SlideSource]:
    rows = steps.read_slide_index(store).filter(split=name).sort("slide")
    return {row["slide"]: row_source(row) for row in rows.iter_rows(named=True)}


def paths(slides: dict[str, SlideSource]) -> list[Path]:
    return [source.path for source in slides.values()]


def patients(store: Store) -> dict[str, str]:
    return dict(steps.read_slide_index(store).select("slide", "patient").rows())


def predict(*arguments: object, store: Store):
    return CliRunner().invoke(
        app, ["predict", *map(str, arguments)], env={"NIC_STORE": str(store.root), "COLUMNS": "300"}
    )


@pytest.mark.parametrize("target", TARGETS)
def test_predictions_from_grids_equal_the_test_split(study, target):
    _, store = study
    model = load_model(store.slide_model(ModelKey(encoder=ENCODER, target=target)))
    stored = (
        pl.read_parquet(store.slide_model(ModelKey(encoder=ENCODER, target=target)) / PREDICTIONS)
        .filter(model=NETWORK, split="test")
        .sort("unit")
    )
    units = pl.read_parquet(store.target_folds(target)).filter(split="test").sort("unit")
    found = predict_grids(
        model, units, lambda slide: open_grid(store.grid(GridKey(encoder=ENCODER, slide=slide)))
    )
    assert stored.height > 0
    assert found["unit"].equals(stored["unit"])
    columns = kind_of(model.card.target).prediction_columns
    np.testing.assert_allclose(
        found.select(columns).to_numpy(), stored.select(columns).to_numpy(), rtol=1e-5, atol=1e-6
    )
    for column in columns:
        folds = found.select(f"fold_{k}_{column}" for k in range(4)).to_numpy()
        np.testing.assert_allclose(folds.mean(1), found[column], rtol=1e-9, atol=1e-9)
    assert not found["in_training"].any()


@pytest.mark.parametrize("target", TARGETS)
def test_predictions_from_files_equal_the_test_split(study, target, tmp_path):
    _, store = study
    model = load_model(store.slide_model(ModelKey(encoder=ENCODER, target=target)))
    slides = split(store, "test")
    predicted = predict_slides(
        model, load_encoder(store.encoder(ENCODER)), slides, patients=patients(store)
    ).predictions.sort("unit")
    stored = (
        pl.read_parquet(store.slide_model(ModelKey(encoder=ENCODER, target=target)) / PREDICTIONS)
        .filter(model=NETWORK, split="test")
        .sort("unit")
    )
    both = stored.join(predicted, on="unit", suffix="_now")
    assert both.height == stored.height
    for column in kind_of(model.card.target).prediction_columns:
        np.testing.assert_allclose(both[f"{column}_now"], both[column], rtol=1e-5, atol=1e-6)


def test_training_slides_are_marked(study):
    _, store = study
    model = load_model(store.slide_model(ModelKey(encoder=ENCODER, target="growth")))
    encoder = load_encoder(store.encoder(ENCODER))
    both = dict([*list(split(store, "cv").items())[:1], *list(split(store, "test").items())[:1]])
    assert predict_slides(model, encoder, both).predictions["in_training"].to_list() == [
        True,
        False,
    ]


def test_risk_groups_are_divided_at_the_median_risk(study):
    _, store = study
    model = load_model(store.slide_model(ModelKey(encoder=ENCODER, target="survival")))
    stored = pl.read_parquet(
        store.slide_model(ModelKey(encoder=ENCODER, target="survival")) / PREDICTIONS
    )
    held_out = stored.filter(model=NETWORK, split="cv")["risk"]
    assert model.card.median_risk == held_out.median()
    units = pl.read_parquet(store.target_folds("survival"))

    def grid(slide):
        return open_grid(store.grid(GridKey(encoder=ENCODER, slide=slide)))

    found = predict_grids(model, units, grid)
    # the tiny networks may all be on one side: divide them at their own median
    card = model.card.model_copy(update={"median_risk": found["risk"].median()})
    found = predict_grids(replace(model, card=card), units, grid)
    assert set(found["risk_group"]) == {"high", "low"}
    assert ((found["risk_group"] == "high") == (found["risk"] > card.median_risk)).all()


def test_survival_probabilities_equal_the_test_split(study):
    _, store = study
    model = load_model(store.slide_model(ModelKey(encoder=ENCODER, target="survival")))
    stored = (
        pl.read_parquet(
            store.slide_model(ModelKey(encoder=ENCODER, target="survival")) / PREDICTIONS
        )
        .filter(model=NETWORK, split="test")
        .sort("unit")
    )
    horizons = stored["horizons"][0].to_list()
    units = pl.read_parquet(store.target_folds("survival")).filter(split="test").sort("unit")
    found = predict_grids(
        model,
        units,
        lambda slide: open_grid(store.grid(GridKey(encoder=ENCODER, slide=slide))),
        times=[0, *horizons],
    )
    alive = found.select(f"survival_{time:g}" for time in horizons).to_numpy()
    np.testing.assert_allclose(alive, stored["survival"].to_list(), atol=1e-5)
    assert (found["survival_0"] == 1).all()
    for k in range(4):
        assert found[f"fold_{k}_survival_{horizons[0]:g}"].is_between(0, 1).all()
    # the median is between the last horizon above one half and the first at or below it
    for median, functions in zip(found["median_survival"], alive, strict=True):
        fallen = [time for time, a in zip(horizons, functions, strict=True) if a <= 0.5]
        above = [time for time, a in zip(horizons, functions, strict=True) if a > 0.5]
        assert median is not None or not fallen
        assert median is None or (median <= min(fallen, default=np.inf))
        assert median is None or median > max(above, default=0)


def test_invalid_times_are_refused(study):
    _, store = study
    slide = next(iter(split(store, "test").values())).path
    done = predict("--model", f"{ENCODER}/growth", "--times", 365, slide, store=store)
    assert done.exit_code == 2
    assert "is not a survival target" in done.output
    done = predict("--model", f"{ENCODER}/survival", "--times", -1, slide, store=store)
    assert done.exit_code == 2
    assert "give times from 0 on" in done.output
    twice = ["--times", 365, "--times", 365.0]
    done = predict("--model", f"{ENCODER}/survival", *twice, slide, store=store)
    assert done.exit_code == 2
    assert "two times are equal" in done.output


def test_predicted_class_is_the_most_probable_one(study):
    _, store = study
    model = load_model(store.slide_model(ModelKey(encoder=ENCODER, target="growth")))
    units = pl.read_parquet(store.target_folds("growth"))
    found = predict_grids(
        model, units, lambda slide: open_grid(store.grid(GridKey(encoder=ENCODER, slide=slide)))
    )
    columns = kind_of(model.card.target).prediction_columns
    most = found.select(columns).to_numpy().argmax(1)
    assert found["class"].to_list() == [model.card.target.classes[i] for i in most]


def test_patient_is_the_mean_of_the_usable_slides(study, tmp_path):
    _, store = study
    model = load_model(store.slide_model(ModelKey(encoder=ENCODER, target="survival")))
    encoder = load_encoder(store.encoder(ENCODER))
    slides = dict(list(split(store, "cv").items())[:2])
    first, second = slides
    alone = predict_slides(model, encoder, slides, tmp_path).predictions
    assert alone["unit"].to_list() == [first, second]
    one = dict.fromkeys(slides, "anna")
    pooled = predict_slides(model, encoder, slides, tmp_path, patients=one).predictions
    assert pooled["unit"].to_list() == ["anna"]
    assert pooled["slides"].to_list() == [[first, second]]
    assert pooled["risk"][0] == pytest.approx(alone["risk"].mean(), rel=1e-5, abs=1e-6)
    (tmp_path / "bad.svs").write_text("no slide")
    with_bad = slides | {"bad": SlideSource(tmp_path / "bad.svs")}
    found = predict_slides(model, encoder, with_bad, tmp_path, patients=one | {"bad": "anna"})
    assert found.predictions["failed"].to_list() == [["bad"]]
    assert found.predictions["risk"][0] == pytest.approx(pooled["risk"][0], rel=1e-6)
    assert found.slides["status"].to_list() == ["up to date", "up to date", "failed"]
    with pytest.raises(ValueError, match="'bad' is not in the table of patients"):
        predict_slides(model, encoder, with_bad, tmp_path, patients=one)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weights_hash", "0" * 64, "weights 000000000000, not"),
        ("patch", 64, "patch 64, not 128"),
        ("mpp", 1.0, "um/px 1.0, not 0.5"),
        ("embedding_size", 4, "embedding size 4, not 3"),
    ],
)
def test_other_encoder_is_refused(study, field, value, message):
    _, store = study
    model = load_model(store.slide_model(ModelKey(encoder=ENCODER, target="growth")))
    encoder = load_encoder(store.encoder(ENCODER))
    other = replace(encoder, card=encoder.card.model_copy(update={field: value}))
    with pytest.raises(ModelMismatchError, match=message):
        predict_slides(model, other, split(store, "test"))


@pytest.mark.parametrize("field", ["weights_hash", "precision", "reading", "colours"])
def test_grid_with_other_settings_is_refused(study, field):
    _, store = study
    model = load_model(store.slide_model(ModelKey(encoder=ENCODER, target="growth")))
    grid = open_grid(store.grid(GridKey(encoder=ENCODER, slide=next(iter(split(store, "test"))))))
    check_grid(model.card, grid)
    other = {
        "weights_hash": "1",
        "precision": "bfloat16",
        "reading": "input",
        "colours": "srgb",
    }[field]
    about = grid.provenance.model_copy(update={field: other})
    with pytest.raises(ModelMismatchError, match=f"'{about.slide}'.*{other}, not"):
        check_grid(model.card, replace(grid, provenance=about))


def test_command_continues_after_bad_slides_and_exits_with_1(study, tmp_path):
    _, store = study
    (tmp_path / "bad.svs").write_text("no slide")
    good = split(store, "test")
    out = tmp_path / "out"
    model = ["--model", f"{ENCODER}/growth"]
    done = predict(*model, "--out", out, tmp_path / "bad.svs", *paths(good), store=store)
    assert done.exit_code == 1, done.output
    assert "not an image of a known format" in done.output
    table = pl.read_csv(out / "predictions-growth.csv")
    assert table["unit"].to_list() == ["bad", *good]
    assert table["failed"].to_list() == ["bad", *[""] * len(good)]
    assert table["class"].null_count() == 1
    whole = pl.read_parquet(out / "predictions-growth.parquet")
    assert whole["class"].equals(table["class"])
    assert pl.read_csv(out / "report.csv")["status"].to_list() == [
        "failed",
        *["compressed"] * len(good),
    ]
    again = predict(*model, "--out", out, *paths(good), store=store)
    assert again.exit_code == 0, again.output
    assert set(pl.read_csv(out / "report.csv")["status"]) == {"up to date"}
    assert (
        pl.read_parquet(out / "predictions-growth.parquet")
        .drop("slides", "failed")
        .equals(whole.drop("slides", "failed")[1:])
    )


def test_command_writes_heatmaps_and_pools_by_patient(study, tmp_path):
    _, store = study
    slides = dict(list(split(store, "test").items())[:1])
    (tmp_path / "patients.csv").write_text(f"slide,patient\n{next(iter(slides))},007\n")
    done = predict(
        *(
            "--model",
            store.slide_model(ModelKey(encoder=ENCODER, target="survival")),
            "--encoder",
            store.encoder(ENCODER),
        ),
        *("--patients", tmp_path / "patients.csv", "--out", tmp_path, "--heatmaps"),
        *("--times", 100, "--times", 12.5),
        *paths(slides),
        store=store,
    )
    assert done.exit_code == 0, done.output
    assert "a higher risk means an earlier event" in done.output
    # a narrow terminal wraps the heading
    assert "alive" in done.output
    assert "12.5" in done.output
    assert pl.read_parquet(tmp_path / "predictions-survival.parquet")["unit"].to_list() == ["007"]
    assert (tmp_path / "heatmaps" / "survival" / next(iter(slides)) / "heat.tif").exists()


def test_command_names_a_missing_model_and_a_wrong_encoder(study, tmp_path):
    _, store = study
    slide = next(iter(split(store, "test").values())).path
    done = predict("--model", "none/growth", slide, store=store)
    assert done.exit_code == 2
    assert f"{ENCODER}/growth" in done.output
    other = tmp_path / "other"
    shutil.copytree(store.encoder(ENCODER), other)
    card = json.loads((other / "card.json").read_text())
    (other / "card.json").write_text(json.dumps(card | {"mpp": 1.0}))
    done = predict("--model", f"{ENCODER}/growth", "--encoder", other, slide, store=store)
    assert done.exit_code == 2
    assert "does not fit the model" in done.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,person\na,b\n", "no column 'patient'"),
        ("slide,patient\na,\n", "'a' has an empty cell"),
        ("slide,patient\na,b\na,c\n", "'a' has more than one row"),
    ],
)
def test_invalid_table_of_patients_raises(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_patients(tmp_path / "t.csv")


def test_a_table_of_slides_is_read_by_its_columns():
    table = pl.DataFrame(
        {
            "slide": ["x/a.svs", "b.ome.tif", "c"],
            "mpp": ["0.5", None, "nan"],
            "mask": [" ", "m.png", None],
            "origin": [None, "bounds", ""],
            "patient": ["007", "7", "007"],
        }
    )
    numbers = pl.Series("mpp", [0.5, None, float("nan")])
    assert read_slide_table(table) == read_slide_table(table.with_columns(numbers))
    assert read_slide_table(table) == (
        {
            "a": SlideSource(Path("x/a.svs"), 0.5),
            "b": SlideSource(Path("b.ome.tif"), mask=Path("m.png"), origin="bounds"),
            "c": SlideSource(Path("c")),
        },
        {"a": "007", "b": "7", "c": "007"},
    )
    assert read_slide_table(table.select("slide"))[1] is None


@given(st.lists(st.text(), unique=True), st.data())
def test_a_table_of_slides_keeps_its_rows_or_is_refused(paths, data):
    people = st.one_of(st.none(), st.text())
    patients = data.draw(st.lists(people, min_size=len(paths), max_size=len(paths)))
    table = pl.DataFrame({"slide": paths, "patient": patients}, schema_overrides={"patient": str})
    try:
        slides, found = read_slide_table(table)
    except SlideTableError:
        return
    assert [source.path for source in slides.values()] == list(map(Path, paths))
    assert found is None or list(found.values()) == patients


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["a.svs"]}, "column 'path' is unknown; the columns are slide, mpp, mask"),
        ({"mpp": [0.5]}, "no column 'slide' with the paths of slides"),
        ({"slide": ["a.svs", None]}, "row 2: slide '' is not the path of a file"),
        ({"slide": ["/"]}, "row 1: slide '/' is not the path of a file"),
        ({"slide": ["a\0b"]}, r"row 1: slide 'a.x00b' contains a null character"),
        ({"slide": ["x" * 201]}, "has a name of more than 200 bytes"),
        ({"slide": ["a.svs"], "mask": ["/"]}, "row 1: mask '/' is not the path of a file"),
        ({"slide": ["a.svs"], "origin": ["corner"]}, "origin 'corner' must be 'level0' or 'bou"),
        ({"slide": ["a.svs"], "mpp": [float("inf")]}, "row 1, column 'mpp'"),
        ({"slide": [["a.svs"]]}, r"column 'slide' holds List"),
        ({"slide": ["a.svs", "a.tif"]}, "row 2: a.tif has the slide id 'a' of a.svs"),
        ({"slide": ["a", "b"], "patient": ["p", None]}, "row 2 has no patient; give one in every"),
    ],
)
def test_an_invalid_table_of_slides_is_refused(columns, message):
    with pytest.raises(SlideTableError, match=message):
        read_slide_table(pl.DataFrame(columns))


def test_a_table_of_slides_without_rows_gives_no_predictions(study):
    _, store = study
    for target in TARGETS:
        model = load_model(store.slide_model(ModelKey(encoder=ENCODER, target=target)))
        encoder, none = load_encoder(store.encoder(ENCODER)), pl.DataFrame({"slide": []})
        empty = predict_table(model, encoder, none)
        whole = predict_slides(model, encoder, dict(list(split(store, "test").items())[:1]))
        assert empty.height == 0
        assert dict(empty.drop("reasons").schema) == dict(whole.predictions.schema)


def test_model_file_with_other_format_or_weights_is_refused(study, tmp_path):
    _, store = study
    with pytest.raises(ModelFileError, match="not a model file of format 7.*train the model again"):
        load_model(store.encoder(ENCODER))
    shutil.copytree(store.slide_model(ModelKey(encoder=ENCODER, target="growth")), tmp_path / "m")
    shutil.copy(tmp_path / "m" / "fold-0.safetensors", tmp_path / "m" / "fold-1.safetensors")
    with pytest.raises(ModelFileError, match=r"fold-1.*hash of its numbers differs"):
        load_model(tmp_path / "m")
    card = json.loads((tmp_path / "m" / "card.json").read_text())
    (tmp_path / "m" / "card.json").write_text(json.dumps(card | {"format": 3}))
    with pytest.raises(ModelFileError, match=r"format: Input should be 7.*train the model again"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "card.json").write_text("{")
    with pytest.raises(ModelFileError, match="not a model file"):
        load_model(tmp_path / "m")


def test_card_describes_training_data_and_grids(study):
    cohort, store = study
    card = load_model(store.slide_model(ModelKey(encoder=ENCODER, target="growth"))).card
    learned = pl.read_parquet(store.target_folds("growth")).filter(split="cv")
    assert card.training.patients == learned["patient"].n_unique()
    assert card.training.units == learned.height == len(card.training.slides)
    assert (card.grids.precision, card.grids.reading) == ("float32", "patch")
    assert card.grids.tissue == cohort.settings.tissue
    assert set(card.software) == {"nic", "torch"}
    assert card.median_risk is None


def test_training_digest_depends_on_labels_and_slides_only(study):
    _, store = study
    table = pl.read_parquet(store.target_folds("growth"))
    names = {slide: slide for slide in table["slides"].explode()}

    def digest(table=table, names=names):
        mpp, scanners = dict.fromkeys(names, 0.25), dict.fromkeys(names)
        return training_cohort("c", table, names, mpp=mpp, scanners=scanners).digest

    first = table.filter(split="cv")["unit"][0]
    assert digest() == digest(table.reverse())
    assert digest() != digest(names=names | {first: "another slide"})
    flipped = pl.when(unit=first).then(1 - pl.col("y")).otherwise("y").alias("y")
    assert digest() != digest(table.with_columns(flipped))
    assert digest() == digest(
        table.with_columns(pl.when(split="test").then(1 - pl.col("y")).otherwise("y").alias("y"))
    )


def test_a_stored_model_is_read_as_it_was_made(study):
    cohort, store = study
    for target in TARGETS:
        key = ModelKey(encoder=ENCODER, target=target)
        read, card = steps.read_slide_model(store.slide_model(key))
        assert card == read_model_card(store.slide_model(key))
        assert read.predictions.equals(
            pl.read_parquet(store.slide_model(key) / "predictions.parquet")
        )
        assert read.metrics.equals(metrics_frame(card))
        assert [len(fold) for fold in read.history.partition_by("fold")] == (
            [cohort.settings.models.epochs] * len(card.networks)
        )
        assert (len(read.networks), read.best_epochs) == (len(card.networks), card.best_epochs)


def test_the_card_names_the_tables_that_the_training_read(study):
    _, store = study
    card = read_model_card(store.slide_model(ModelKey(encoder=ENCODER, target=TARGETS[0])))
    assert card.data == {
        f"target_grids/{ENCODER}/{TARGETS[0]}": steps.digest(
            steps.read_target_grids(store, ModelKey(encoder=ENCODER, target=TARGETS[0])).rows()
        ),
        f"target_folds/{TARGETS[0]}": steps.digest(
            pl.read_parquet(store.target_folds(TARGETS[0])).to_dicts()
        ),
    }


def test_the_model_card_has_the_metrics_of_each_site(study, tmp_path):
    shutil.copytree(study[1].root, tmp_path / "store")
    store, key = Store(tmp_path / "store"), ModelKey(encoder=ENCODER, target=TARGETS[0])
    result, card = steps.read_slide_model(store.slide_model(key))
    assert steps.model_subgroups(store, result).is_empty()
    index = steps.read_slide_index(store)
    sites = [None if row == 0 else "city" for row in range(index.height)]
    index = index.with_columns(site=pl.Series(sites, dtype=pl.String))
    index.write_parquet(store.slide_index)
    found = steps.model_subgroups(store, result)
    assert set(found["column"]) == {"site"}
    assert set(found["group"]) == {"city", "(missing)"}
    units = result.predictions.filter(model="network", split="cv").height
    assert found["units"].sum() == units
    text = slide_model_card(card, None, origin={}, subgroups=found)
    assert "Cross-validated, by subgroup:" in text
    assert "| site | city |" in text


@pytest.mark.parametrize("change", ["rewritten", "removed"])
def test_grids_that_differ_from_their_manifest_are_refused(study, tmp_path, change):
    cohort, _ = study
    shutil.copytree(study[1].root, tmp_path / "store")
    store, key = Store(tmp_path / "store"), ModelKey(encoder=ENCODER, target=TARGETS[0])
    slide = steps.read_slide_index(store)["slide"][0]
    path = store.grid(GridKey(encoder=ENCODER, slide=slide))
    if change == "removed":
        shutil.rmtree(path)
    else:
        grid = open_grid(path)
        embeddings = np.array(grid.embeddings[:])
        embeddings[:, grid.valid] += 1
        write_grid(path, Grid(embeddings, grid.valid, grid.provenance))
    with pytest.raises(CohortError, match=f"'{slide}' changed after it was listed"):
        steps.make_slide_model(cohort, store, key)
    steps.make_grid_manifest(store, ENCODER)
    steps.make_target_grids(store, key)
    steps.make_slide_model(cohort, store, key)

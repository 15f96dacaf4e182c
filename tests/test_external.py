"""Another hospital's cohort: metrics, leaks, subgroups, cohort file, command and asset."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import pyvips
import yaml
from sklearn.metrics import roc_auc_score
from sksurv.compare import compare_survival
from sksurv.util import Surv
from typer.testing import CliRunner

from nic_core import steps
from nic_core.cli import app
from nic_core.cohort import Cohort, CohortError, ExternalCohort, SlideFolder, Slides, load_cohort
from nic_core.cohort.scan import watched_files
from nic_core.encoders import load_encoder
from nic_core.models.files import ModelFileError, load_model, metrics_frame
from nic_core.models.prediction import predict_slides
from nic_core.models.subgroups import MISSING_GROUP
from nic_core.slides import SlideSource
from nic_core.steps.external import LeakError, StudySlides, evaluate_external, unit_subgroups
from nic_core.steps.study_check import check_study
from nic_core.store import ExternalKey, ModelKey, Store

NOTHING = StudySlides(frozenset(), {})


@dataclass(frozen=True)
class Hospital:
    """Files of an external cohort: the tiny cohort's slides, mirrored and darker."""

    root: Path

    @property
    def slides(self) -> pl.DataFrame:
        return pl.read_csv(self.root / "slides.csv")

    def entry(self, *subgroups: str, **tables: pl.DataFrame) -> ExternalCohort:
        """The entry of the cohort; ``slides`` and ``labels`` replace its tables."""
        paths = {name: self.root / f"{name}.csv" for name in ("slides", "labels")}
        for name, table in tables.items():
            paths[name] = self.root / f"{name}-{abs(hash(str(table.rows())))}.csv"
            table.write_csv(paths[name])
        return ExternalCohort(
            name="north",
            slides=Slides(table=paths["slides"]),
            labels=paths["labels"],
            subgroups=subgroups,
        )


@pytest.fixture(scope="module")
def hospital(tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    root, source = tmp_path_factory.mktemp("hospital"), tiny_cohort.parent
    slides = pl.read_csv(source / "slides.csv").select("slide", "path", "patient")
    for path in slides["path"]:
        target = root / path
        target.parent.mkdir(exist_ok=True)
        pixels = pyvips.Image.new_from_file(str(source / path)).fliphor() * 0.95
        resolution = {"resunit": "cm", "xres": 2000.0, "yres": 2000.0}
        pixels.cast("uchar").tiffsave(str(target), tile=True, pyramid=True, **resolution)
    slides = slides.with_columns(
        slide="n-" + pl.col("slide"),
        patient="n-" + pl.col("patient"),
        site=pl.Series(["city"] * 10 + ["harbour"] * 2),
    )
    slides.write_csv(root / "slides.csv")
    pl.read_csv(source / "labels.csv").with_columns(
        slide="n-" + pl.col("slide"), patient="n-" + pl.col("patient")
    ).write_csv(root / "labels.csv")
    return Hospital(root)


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grids")


def model_of(store: Store, target: str) -> Path:
    return store.slide_model(ModelKey(encoder="mean-rgb", target=target))


@pytest.fixture
def evaluate(mean_rgb_study: tuple[Cohort, Store], grids: Path):
    _, store = mean_rgb_study

    def run(entry: ExternalCohort, target: str = "growth", *, study: StudySlides | None = None):
        return evaluate_external(
            model_of(store, target),
            load_encoder(store.encoder("mean-rgb")),
            entry,
            grids=grids,
            study=steps.study_slides(store) if study is None else study,
        )

    return run


def row(table: pl.DataFrame, metric: str) -> dict[str, float]:
    return table.row(by_predicate=pl.col("metric") == metric, named=True)


# --- metrics ---------------------------------------------------------------------------------


def test_the_frozen_model_is_applied_as_by_predict(evaluate, hospital, mean_rgb_study):
    _, store = mean_rgb_study
    made = evaluate(hospital.entry("site"))
    predicted = predict_slides(
        load_model(model_of(store, "growth")),
        load_encoder(store.encoder("mean-rgb")),
        {
            slide: SlideSource(hospital.root / path)
            for slide, path in hospital.slides.select("slide", "path").iter_rows()
        },
    ).predictions
    both = made.predictions.join(predicted, on="unit", suffix="_again")
    assert both.height == 12
    np.testing.assert_allclose(
        both["probability_desmoplastic"], both["probability_desmoplastic_again"], rtol=1e-6
    )
    auc = row(made.metrics, "auc")
    assert auc["value"] == pytest.approx(roc_auc_score(both["y"], both["probability_desmoplastic"]))
    assert auc["low"] <= auc["value"] <= auc["high"]


@pytest.mark.parametrize("target", ["growth", "proliferation", "survival"])
def test_cross_validated_values_are_those_of_the_card(evaluate, hospital, mean_rgb_study, target):
    made = evaluate(hospital.entry(), target)
    card = metrics_frame(made.card).filter(model="network", split="cv")
    compared = made.metrics.join(card, on="metric", suffix="_of_card")
    known = compared.drop_nulls("difference")
    assert known.height >= 2
    np.testing.assert_allclose(known["cross_validated"], known["value_of_card"], atol=1e-9)
    np.testing.assert_allclose(
        known["difference"], known["value"] - known["cross_validated"], atol=1e-9
    )
    names = set(made.metrics["metric"])
    assert "calibration_slope" in names
    assert names & {"calibration_in_the_large", "observed_expected_ratio"}
    assert set(made.figures) == {"evaluation", "comparison"}


def test_risk_groups_are_divided_at_the_training_median(evaluate, hospital):
    made = evaluate(hospital.entry(), "survival")
    table = made.predictions
    high = (table["risk"] > made.card.median_risk).to_numpy()
    assert (table["risk_group"] == "high").to_numpy().tolist() == high.tolist()
    p = row(made.metrics, "log_rank_p")["value"]
    if 0 < high.sum() < len(high):
        labels = Surv.from_arrays(table["event"].to_numpy(), table["time"].to_numpy())
        assert p == pytest.approx(compare_survival(labels, high)[1])
    else:
        assert p is None


def test_slides_without_part_in_the_metrics_are_listed(evaluate, hospital):
    broken = hospital.root / "broken.tif"
    broken.write_bytes(b"II*\0" + bytes(2000))
    slides = hospital.slides.with_columns(exclude=pl.lit(None, pl.String))
    slides[0, "exclude"] = "pen over the tumour"
    slides[1, "path"] = str(broken)
    labels = pl.read_csv(hospital.root / "labels.csv").filter(pl.col("slide") != slides["slide"][2])
    made = evaluate(hospital.entry(slides=slides, labels=labels))
    reasons = dict(made.left_out.iter_rows())
    assert list(reasons) == sorted(slides["slide"][:3])
    assert reasons[slides["slide"][0]] == "excluded: pen over the tumour"
    assert "cannot be read" in reasons[slides["slide"][1]]
    assert reasons[slides["slide"][2]] == "no label of target 'growth'"
    assert made.predictions.height == 9


def test_no_usable_slide_is_an_error(evaluate, hospital):
    broken = hospital.root / "broken-again.tif"
    broken.write_bytes(b"II*\0" + bytes(3000))
    slides = hospital.slides[:1].with_columns(path=pl.lit(str(broken)))
    labels = pl.read_csv(hospital.root / "labels.csv")[:1]
    with pytest.raises(CohortError, match="external cohort 'north': no labelled slide can be used"):
        evaluate(hospital.entry(slides=slides, labels=labels))


def test_equal_slides_are_refused(evaluate, hospital):
    slides = hospital.slides
    copied = hospital.root / "copied.tif"
    shutil.copy(hospital.root / slides["path"][0], copied)
    slides[1, "path"] = str(copied)
    with pytest.raises(CohortError, match="have the same content; exclude all but one"):
        evaluate(hospital.entry(slides=slides))


def test_a_model_without_its_predictions_is_refused(evaluate, hospital, mean_rgb_study, tmp_path):
    _, store = mean_rgb_study
    folder = shutil.copytree(model_of(store, "growth"), tmp_path / "model")
    (folder / "predictions.parquet").unlink()
    with pytest.raises(ModelFileError, match="cross-validated predictions are compared"):
        evaluate_external(
            folder,
            load_encoder(store.encoder("mean-rgb")),
            hospital.entry(),
            grids=tmp_path,
            study=NOTHING,
        )


# --- leaks -----------------------------------------------------------------------------------


def with_slide_of_the_study(hospital: Hospital, tiny_cohort: Path, split: str) -> pl.DataFrame:
    """The slide table with a copy of a slide of the study under another name."""
    own = pl.read_csv(tiny_cohort.parent / "slides.csv").filter(split=split)
    copied = hospital.root / f"other-name-{split}.tif"
    shutil.copy(tiny_cohort.parent / own["path"][0], copied)
    slides = hospital.slides
    slides[3, "path"] = str(copied)
    return slides


@pytest.mark.parametrize("split", ["cv", "test"])
def test_a_slide_of_the_study_under_another_name_is_refused(evaluate, hospital, tiny_cohort, split):
    slides = with_slide_of_the_study(hospital, tiny_cohort, split)
    with pytest.raises(LeakError, match=r"'n-.*' is slide 'demo-.*'; remove or exclude them"):
        evaluate(hospital.entry(slides=slides))


def test_a_training_slide_is_refused_without_the_study(evaluate, hospital, tiny_cohort):
    slides = with_slide_of_the_study(hospital, tiny_cohort, "cv")
    with pytest.raises(LeakError, match="the model was trained on 'n-"):
        evaluate(hospital.entry(slides=slides), study=NOTHING)


def test_an_excluded_slide_of_the_study_is_accepted(evaluate, hospital, tiny_cohort):
    slides = with_slide_of_the_study(hospital, tiny_cohort, "cv")
    slides = slides.with_columns(exclude=pl.lit(None, pl.String))
    slides[3, "exclude"] = "slide of the study"
    assert evaluate(hospital.entry(slides=slides)).predictions.height == 11


def test_a_patient_of_the_study_is_refused(evaluate, hospital):
    slides = hospital.slides.with_columns(pl.col("patient").str.strip_prefix("n-"))
    labels = pl.read_csv(hospital.root / "labels.csv").drop("patient")
    with pytest.raises(LeakError, match="of its patients are in the study too: patient-01"):
        evaluate(hospital.entry(slides=slides, labels=labels))


# --- subgroups -------------------------------------------------------------------------------


def groups(entry: ExternalCohort, hospital: Hospital, column: str, level: str = "slide"):
    index = hospital.slides
    if level == "slide":
        units = index.select("patient", slides=pl.concat_list("slide"))
    else:
        units = index.group_by("patient", maintain_order=True).agg(slides="slide")
    return unit_subgroups(entry, column, units, index)


def test_subgroups_come_from_the_slide_table_or_the_label_table(hospital, evaluate):
    labels = pl.read_csv(hospital.root / "labels.csv").with_columns(scanner=pl.lit("S1"))
    labels[0, "scanner"] = None
    entry = hospital.entry("site", "scanner", labels=labels)
    assert groups(entry, hospital, "site") == hospital.slides["site"].to_list()
    assert groups(entry, hospital, "scanner") == [None] + ["S1"] * 11
    table = evaluate(entry).subgroups
    assert table["column"].unique(maintain_order=True).to_list() == ["site", "scanner"]
    assert set(table.filter(column="scanner")["group"]) == {"S1", MISSING_GROUP}
    assert table.filter(group="S1", metric="auc")["units"].to_list() == [11]


def test_a_patient_of_several_subgroups_is_a_subgroup_of_its_own(hospital):
    slides = hospital.slides.with_columns(patient=pl.lit("one"), scanner=pl.lit("A"))
    slides[1, "scanner"] = "B"
    entry = hospital.entry(slides=slides)
    units = pl.DataFrame({"patient": ["one"], "slides": [slides["slide"].to_list()]})
    assert unit_subgroups(entry, "scanner", units, slides) == ["A + B"]


def test_a_column_that_no_table_has_is_refused(hospital):
    with pytest.raises(CohortError, match="no table has the column 'scaner'"):
        groups(hospital.entry(), hospital, "scaner")


def test_a_column_that_both_tables_have_is_refused(hospital):
    labels = pl.read_csv(hospital.root / "labels.csv").with_columns(site=pl.lit("x"))
    with pytest.raises(CohortError, match="both the slide table and the label table"):
        groups(hospital.entry(labels=labels), hospital, "site")


def test_two_values_of_one_slide_are_refused(hospital):
    labels = pl.read_csv(hospital.root / "labels.csv").with_columns(scanner=pl.lit("A"))
    labels = pl.concat([labels, labels[:1].with_columns(scanner=pl.lit("B"))])
    with pytest.raises(CohortError, match="has two values in column 'scanner': A and B"):
        groups(hospital.entry(labels=labels), hospital, "scanner")


# --- cohort file and scan --------------------------------------------------------------------


@pytest.fixture
def study_file(tiny_cohort: Path, hospital: Hospital, tmp_path: Path) -> Path:
    """The tiny cohort's file with an external cohort, whose tables a test may change."""
    for name in ("slides", "labels"):
        shutil.copy(hospital.root / f"{name}.csv", tmp_path / f"north-{name}.csv")
    (tmp_path / "north-slides.csv").write_text(
        (tmp_path / "north-slides.csv").read_text().replace(",slides/", f",{hospital.root}/slides/")
    )
    study = yaml.safe_load(tiny_cohort.read_text())
    study["encoders"] = study["encoders"][:1]
    study.pop("maps")
    study["external"] = [
        {
            "name": "north",
            "slides": {"table": "north-slides.csv"},
            "labels": "north-labels.csv",
            "subgroups": ["site"],
        }
    ]
    for part in tiny_cohort.parent.iterdir():
        if part.name != "cohort.yaml":
            (tmp_path / part.name).symlink_to(part)
    path = tmp_path / "cohort.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  labels: north-labels.csv\n", "", r"external\.0\.labels: .*missing"),
        ("  subgroups:", "  subgroup:", r"external\.0\.subgroup: .*did you mean 'subgroups'"),
        ("  - site", "  - site\n  - site", r"external\.0.*occurs more than once"),
        ("- name: north", "- name: no/rth", r"external\.0\.name: .*a name becomes a folder"),
    ],
)
def test_mistakes_in_the_entry_are_reported_with_their_line(study_file, old, new, message):
    text = study_file.read_text()
    assert old in text
    study_file.write_text(text.replace(old, new))
    with pytest.raises(CohortError, match=rf"cohort\.yaml:\d+: {message}"):
        load_cohort(study_file)


def test_external_cohorts_have_distinct_names_and_need_targets(study_file):
    study = yaml.safe_load(study_file.read_text())
    twice = study | {"external": study["external"] * 2}
    study_file.write_text(yaml.safe_dump(twice))
    with pytest.raises(CohortError, match=r"external\.1\.name: 'north' occurs more than once"):
        load_cohort(study_file)
    study_file.write_text(yaml.safe_dump(study | {"targets": []}))
    with pytest.raises(CohortError, match="external: no target's model can be tested"):
        load_cohort(study_file)


def test_nic_check_finds_mistakes_of_external_cohorts(study_file, tiny_cohort):
    assert not [f for f in check_study(study_file) if f.is_error]
    slides = study_file.parent / "north-slides.csv"
    rows = slides.read_text().splitlines()
    own = tiny_cohort.parent / "slides" / "demo-01-1.tif"
    rows[1] = f"n-demo-01-1,{own},n-patient-01,city"
    slides.write_text("\n".join(rows))
    study_file.write_text(study_file.read_text().replace("- site", "- region"))
    found = [str(f.where) + " " + f.problem for f in check_study(study_file) if f.is_error]
    assert any("external.0 " in f and "'n-demo-01-1' is slide 'demo-01-1'" in f for f in found)
    assert any("external.0.subgroups.0 " in f and "column 'region'" in f for f in found)


def test_changes_of_external_files_change_only_their_version(study_file, tmp_path):
    cohort, store = load_cohort(study_file), Store(tmp_path / "store")
    watched = set(watched_files(cohort))
    assert {cohort.external[0].labels, cohort.external[0].slides.table} <= watched
    before = steps.make_slide_index(cohort, store)
    assert set(before.index["slide"].str.slice(0, 4)) == {"demo"}
    versions = steps.external_versions(cohort, before.snapshot)
    assert (
        steps.external_versions(cohort, steps.make_slide_index(cohort, store).snapshot) == versions
    )
    slide = pl.read_csv(cohort.external[0].slides.table)["path"][0]
    copied = tmp_path / "changed.tif"
    copied.write_bytes(Path(slide).read_bytes() + b"more")
    table = cohort.external[0].slides.table
    table.write_text(table.read_text().replace(slide, str(copied)))
    after = steps.make_slide_index(cohort, store)
    assert steps.external_versions(cohort, after.snapshot) != versions
    assert after.versions == before.versions


def test_an_unreadable_external_table_does_not_stop_the_study(study_file, tmp_path):
    cohort, store = load_cohort(study_file), Store(tmp_path / "store")
    table = cohort.external[0].slides.table
    table.write_text("slide\nx\n")
    assert table in watched_files(cohort)
    scan = steps.make_slide_index(cohort, store)
    assert scan.index.height == 12
    assert list(steps.external_versions(cohort, scan.snapshot)) == ["north"]


def test_a_folder_of_slides_is_an_external_cohort_too(evaluate, hospital):
    labels = pl.read_csv(hospital.root / "labels.csv").select(
        pl.col("slide").str.strip_prefix("n-"), "growth"
    )
    path = hospital.root / "labels-of-folder.csv"
    labels.write_csv(path)
    folder = SlideFolder(path=hospital.root / "slides")
    entry = ExternalCohort(name="north", slides=Slides(folders=(folder,)), labels=path)
    assert evaluate(entry).predictions.height == 12


# --- command and asset -----------------------------------------------------------------------


@pytest.mark.parametrize("model", ["growth/mean-rgb", "mean-rgb/growth"])
def test_the_command_prints_metrics_and_writes_tables(mean_rgb_study, hospital, tmp_path, model):
    _, store = mean_rgb_study
    tables = ["--slides", hospital.root / "slides.csv", "--labels", hospital.root / "labels.csv"]
    done = CliRunner().invoke(
        app,
        ["evaluate", "--model", model, *map(str, tables), "--subgroups", "site"]
        + ["--out", str(tmp_path)],
        env={"NIC_STORE": str(store.root), "COLUMNS": "200"},
    )
    assert done.exit_code == 0, done.output
    for text in ("auc", "calibration slope", "validated", "harbour", "too small: 2 of"):
        assert text in done.output
    made = pl.read_parquet(tmp_path / "evaluation-growth" / "metrics.parquet")
    assert "auc" in made["metric"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--model": "growth/none"}, "it has: mean-rgb/growth"),
        ({"--slides": "absent.csv"}, "give a slide table or a folder of slides"),
        ({"--subgroups": "region"}, "no table has the column 'region'"),
    ],
)
def test_the_command_reports_mistakes_in_one_line(
    mean_rgb_study, hospital, tmp_path, arguments, message
):
    _, store = mean_rgb_study
    given = {
        "--model": "mean-rgb/growth",
        "--slides": hospital.root / "slides.csv",
        "--labels": hospital.root / "labels.csv",
        "--out": tmp_path,
    } | arguments
    done = CliRunner().invoke(
        app,
        ["evaluate", *(str(part) for pair in given.items() for part in pair)],
        env={"NIC_STORE": str(store.root), "COLUMNS": "400"},
    )
    assert done.exit_code != 0
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.slow
def test_the_asset_evaluates_and_becomes_stale_with_the_labels(
    mean_rgb_study, study_file, tmp_path
):
    dg = pytest.importorskip("dagster", reason="Dagster is not installed: the library alone")
    from nic_assets.assets.inputs import EXTERNAL_COHORT, known_versions
    from nic_assets.build import build_defs

    store = Store(shutil.copytree(mean_rgb_study[1].root, tmp_path / "store"))
    defs = build_defs(load_cohort(study_file), store)
    instance = dg.DagsterInstance.ephemeral()
    job = defs.resolve_implicit_global_asset_job_def()

    def make(asset: str, partition: str | None = None) -> Any:
        return job.execute_in_process(
            instance=instance,
            asset_selection=[dg.AssetKey(asset)],
            partition_key=partition,
            raise_on_error=False,
        )

    assert make("slide_index").success
    version = known_versions(instance, EXTERNAL_COHORT, ["north"])
    assert make("external_evaluation", "north|growth").success
    event = instance.get_latest_materialization_event(dg.AssetKey("external_evaluation"))
    reason = event.asset_materialization.metadata["not_evaluated"].value
    assert "target 'growth' has no champion" in reason

    model = store.slide_model(ModelKey(encoder="mean-rgb", target="growth"))
    champion = steps.ChampionVersion(name="model-growth", version=1, run="r", encoder="mean-rgb")
    steps.make_champion(store, "growth", champion, model)
    assert make("external_evaluation", "north|growth").success
    event = instance.get_latest_materialization_event(dg.AssetKey("external_evaluation"))
    metadata = event.asset_materialization.metadata
    assert metadata["units"].value == 12
    assert {"subgroups", "evaluation", "comparison", "left_out", "encoder"} <= set(metadata)
    assert metadata["metrics"].records[0].data["metric"] == "auc"
    folder = store.external_evaluation(ExternalKey(cohort="north", target="growth"))
    assert {"metrics.parquet", "about.json", "evaluation.png"} <= set(os.listdir(folder))

    labels = study_file.parent / "north-labels.csv"
    labels.write_text(labels.read_text().replace("replacement", "desmoplastic", 1))
    assert make("slide_index").success
    assert known_versions(instance, EXTERNAL_COHORT, ["north"]) != version

    slides = study_file.parent / "north-slides.csv"
    slides.write_text(slides.read_text().replace("n-patient-01", "patient-01"))
    labels.write_text(labels.read_text().replace("n-patient-01", "patient-01"))
    done = make("external_evaluation", "north|growth")
    assert not done.success
    failure = done.failure_data_for_node("external_evaluation")
    assert "patients are in the study too: patient-01" in failure.error.message
